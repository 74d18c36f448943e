"""Fused GPU kernels for sequence models, as drop-in parts of PyTorch."""

from . import functional, nn, ops
from .backends import BackendError, backends, current_backend, use_backend

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "backends",
    "current_backend",
    "functional",
    "nn",
    "ops",
    "use_backend",
]
