"""Loads the compiled extension ``fastseq._C`` once, or remembers why it is not there."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch


def _load() -> str | None:
    """Load the extension; returns the reason when it cannot serve."""
    if os.environ.get("FASTSEQ_CPP") == "0":
        return "switched off by FASTSEQ_CPP=0"
    found = sorted(Path(__file__).parent.glob("_C*.so"))
    if not found:
        return "fastseq._C was not built (no C++ compiler at install time, or FASTSEQ_CPP=0)"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"fastseq._C did not load: {error}"
    return None


#: None when the compiled kernels can be used, else the reason they cannot.
UNAVAILABLE: str | None = _load()

#: Why no CUDA kernel of the extension can run, or None.
CUDA_UNAVAILABLE: str | None = UNAVAILABLE or (
    None if torch.ops.fastseq_C.cuda_architectures() else "fastseq._C was built without nvcc"
)

#: Why Triton cannot be imported, or None.
TRITON_UNAVAILABLE: str | None = (
    None if importlib.util.find_spec("triton") else "the package triton is not installed"
)


def cpu_instruction_set() -> str | None:
    """The instruction set the C++ kernels chose on this machine, or None without the extension."""
    return None if UNAVAILABLE else str(torch.ops.fastseq_C.cpu_instruction_set())
