"""Every run of the tests sees the same examples, and leaves the second core to others."""

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "ecul", derandomize=True, deadline=None, max_examples=40, suppress_health_check=list(HealthCheck)
)
settings.load_profile("ecul")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
