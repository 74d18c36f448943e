"""append_to_cache: the keys and values of new tokens to their places."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.append_to_cache import append_op
from ..reference import attention as reference
from ._dispatch import FLOATING, is_transformed, records_gradient


def append_to_cache(
    key_cache: Tensor, value_cache: Tensor, key: Tensor, value: Tensor, lengths: Tensor
) -> Tensor:
    r"""Write new keys and values behind those a cache holds, **in place**, and count them.

    .. math:: \mathrm{cache}[b, :, \mathrm{lengths}[b] + i] = \mathrm{new}[b, :, i]

    What it returns is the ``key_lengths`` of :func:`attention` over the caches::

        lengths = append_to_cache(key_cache, value_cache, key, value, lengths)
        output = attention(query, key_cache, value_cache, key_lengths=lengths,
                           causal=True, causal_alignment="bottom_right")

    Args:
        key_cache: ``[B, Hk, L, D]``, with room for L tokens; any strides.
        value_cache: ``[B, Hk, L, Dv]``.
        key: ``[B, Hk, n, D]``, converted to the cache's dtype.
        value: ``[B, Hk, n, Dv]``, likewise.
        lengths: int32 or int64 ``[B]``: how many tokens of each entry the caches hold.

    Returns:
        ``lengths + n``, a new tensor. On a GPU, which looking would wait for, what does not fit is
        left out, and the length is L.

    Raises:
        IndexError: on the CPU, an entry has no room for n more, or a negative length.
        RuntimeError: shapes, dtypes or devices do not fit each other, or autograd would have to
            record the write: call it under ``torch.no_grad()``.
    """
    _validate(key_cache, value_cache, key, value, lengths)
    if is_transformed():
        return reference.append_to_cache(key_cache, value_cache, key, value, lengths)
    made: Tensor = append_op(key_cache, value_cache, key, value, lengths)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([key_cache, value_cache])
    return made


def _validate(
    key_cache: Tensor, value_cache: Tensor, key: Tensor, value: Tensor, lengths: Tensor
) -> None:
    name = "append_to_cache"
    if records_gradient(key_cache, value_cache, key, value):
        raise RuntimeError(f"{name}: takes no gradient; call it under torch.no_grad()")
    device = key.device
    named = {"key_cache": key_cache, "value_cache": value_cache, "key": key, "value": value}
    for role, tensor in named.items():
        if tensor.dim() != 4:
            raise RuntimeError(f"{name}: {role} must be [B, Hk, L, D], got {list(tensor.shape)}")
        if tensor.dtype not in FLOATING:
            raise RuntimeError(f"{name}: {role} must be floating point, got {tensor.dtype}")
        if tensor.device != device:
            raise RuntimeError(
                f"{name}: {role} must be on the key's device {device}, got {tensor.device}"
            )
    batch, heads, room, head_dim = key_cache.shape
    new = key.shape[2]
    if value_cache.shape[:3] != (batch, heads, room):
        raise RuntimeError(
            f"{name}: value_cache must be {[batch, heads, room]} like key_cache, "
            f"got {list(value_cache.shape[:3])}"
        )
    for role, tensor, width in (("key", key, head_dim), ("value", value, value_cache.shape[3])):
        if tensor.shape != (batch, heads, new, width):
            raise RuntimeError(
                f"{name}: {role} must be {[batch, heads, new, width]}, got {list(tensor.shape)}"
            )
    if lengths.dtype not in (torch.int32, torch.int64) or lengths.shape != key.shape[:1]:
        raise RuntimeError(
            f"{name}: lengths must be int32 or int64 of shape [{key.shape[0]}], "
            f"got {lengths.dtype} of {list(lengths.shape)}"
        )
    if lengths.device != device:
        raise RuntimeError(
            f"{name}: lengths must be on the key's device {device}, got {lengths.device}"
        )
    if not lengths.is_cpu or torch.compiler.is_compiling():
        return
    if type(lengths) is not Tensor or is_transformed():
        return  # it has no numbers to look at
    if lengths.numel() and new > room:
        raise IndexError(f"{name}: key_cache has room for {room} tokens, got {new} more")
    held = lengths.tolist()
    if held and (min(held) < 0 or max(held) > room - new):
        raise IndexError(
            f"{name}: lengths must be between 0 and {room - new} for {new} more to fit, "
            f"got {min(held)} to {max(held)}"
        )
