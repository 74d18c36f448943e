"""Runs before any test module is imported."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Triton reads this when it is imported: without a GPU its kernels run in the interpreter.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """Every test draws the same random numbers whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """What is timed has one thread: two would wait for each other where other tests run beside."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)
    from benchmarks import memory  # not before Triton has been told of the interpreter

    memory.set_allocation("reused")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests are deselected by marker; asked for without a GPU they say why they cannot run."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))
