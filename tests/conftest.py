"""Set-up shared by all tests: two threads, no network, a small scene and a small untrained prior."""

import os

# Before torch is imported: idle OpenMP threads sleep instead of spinning, and nobody asks a hub for anything.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import pytest
import torch

torch.set_num_threads(2)


def pytest_collection_modifyitems(items):
    """A GPU test chosen on a machine without one is skipped, not failed."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
