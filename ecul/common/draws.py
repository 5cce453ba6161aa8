"""A generator of one's own for code that draws from torch's default one, as the layers of networks do."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

DRAWS = {"uniform_", "normal_", "random_", "bernoulli_", "exponential_", "rand", "randn", "randint"}
DRAWS |= {"randperm", "normal", "bernoulli", "multinomial", "kaiming_uniform_", "kaiming_normal_"}


class _Draws(TorchFunctionMode):
    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if getattr(function, "__name__", "") in DRAWS and options.get("generator") is None:
            options["generator"] = self.generator
        return function(*args, **options)


@contextmanager
def drawing(seed: int) -> Iterator[None]:
    """In here torch draws on the CPU, in this thread, what it draws after `torch.manual_seed(seed)`.

    Its default generator does not move, so other threads neither disturb this nor notice it.
    """
    with torch.device("cpu"), _Draws(torch.Generator().manual_seed(seed)):
        yield
