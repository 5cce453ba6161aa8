"""Every test run sees the same examples, and sums in one thread, its processes too: to the same bits."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

from ecul import open_dataset, synthesize  # noqa: E402

torch.set_num_threads(1)
settings.register_profile(
    "ecul",
    derandomize=True,
    deadline=None,
    max_examples=10 if os.environ.get("TRITON_INTERPRET") == "1" else 40,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("ecul")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The folder of a synthetic world of 10 training and 5 held-out people, 3 images a camera."""
    root = tmp_path_factory.mktemp("shared") / "world"
    return synthesize(root, identities=10, images=3, size=(32, 16), progress=False)


@pytest.fixture(scope="session")
def dataset(world):
    """That world, opened."""
    return open_dataset("sysu", world)
