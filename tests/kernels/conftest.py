"""
Run Triton's kernels on the GPU, or by Triton's interpreter where there is none: `pytest tests/kernels`.

Triton reads TRITON_INTERPRET when it is imported, so these tests have a process of their own.
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    if "triton" in sys.modules:
        raise pytest.UsageError("Triton is imported already: run `pytest tests/kernels` by itself")
    os.environ["TRITON_INTERPRET"] = "1"
if importlib.util.find_spec("triton") is None:
    raise pytest.UsageError("tests/kernels needs Triton: run `make test`, or install the version that Makefile names")


def pytest_configure(config: pytest.Config) -> None:
    """The interpreter computes exp and log2 with NumPy, which warns where a GPU returns infinity."""
    config.addinivalue_line("filterwarnings", "ignore:(overflow|divide by zero) encountered:RuntimeWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse to share a process with tests that import Triton, or define the kernels' operators, themselves."""
    others = {item.path.name for item in items if Path(__file__).parent not in item.path.parents}
    if others:
        raise pytest.UsageError(f"run `pytest tests/kernels` by itself, without {', '.join(sorted(others))}")


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random tensors whichever tests run."""
    torch.manual_seed(0)
