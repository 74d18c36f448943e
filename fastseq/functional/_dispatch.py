"""What every public function decides before it reaches its op."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def is_foreign(*tensors: Tensor | None) -> bool:
    """Whether torch's own function must take the call.

    So it is for tensor subclasses and modes that override torch functions (DTensor, nested and
    masked tensors, user classes), for layouts other than dense, for complex numbers and 8-bit
    floats, and while ``torch.jit.trace`` records a graph that has to run without fastseq.
    """
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN_TYPES and _overrides_functions(tensor):
            return True
        if tensor.layout is not torch.strided or tensor.is_nested:
            return True
        if tensor.dtype not in FLOATING and (tensor.is_complex() or tensor.is_floating_point()):
            return True
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined,no-untyped-call]


_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def _overrides_functions(tensor: Tensor) -> bool:
    # Not has_torch_function: that is also true under torch.set_default_device, which is a mode.
    return type(tensor).__torch_function__ is not torch._C._disabled_torch_function_impl


def is_transformed() -> bool:
    """Whether ``torch.func`` or forward-mode AD is at work: then the reference takes the call."""
    return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0


def records_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd will want a gradient for any of these."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def under_autocast(tensor: Tensor) -> bool:
    """Whether autocast is at work for the tensor's device. The meta device has none to ask."""
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)


def autocast_to_fp32(tensor: Tensor) -> bool:
    """Whether CUDA's autocast runs fp32 ops on this tensor: norms, softmax and losses are such.

    CPU autocast leaves them in the dtype they come in.
    """
    return (
        tensor.is_cuda
        and tensor.dtype in (torch.float16, torch.bfloat16)
        and torch.is_autocast_enabled("cuda")
    )
