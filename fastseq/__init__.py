"""Fused GPU kernels for sequence models, as drop-in parts of PyTorch."""

from . import distributed, functional, nn, ops
from .accelerate import accelerate, restore
from .backends import BackendError, backends, current_backend, use_backend
from .explain import explain

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "accelerate",
    "backends",
    "current_backend",
    "distributed",
    "explain",
    "functional",
    "nn",
    "ops",
    "restore",
    "use_backend",
]
