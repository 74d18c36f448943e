"""What attention's arguments must be: each check names the argument, what it got, what it wants."""

from __future__ import annotations

import torch
from torch import Tensor

from ._dispatch import FLOATING
from .softmax import ALIGNMENTS

Window = tuple[int | None, int | None]


def validate_tensors(
    name: str, query: Tensor, key: Tensor, value: Tensor, *, grouped: bool, packed: bool
) -> None:
    """That query, key and value are floating point, of one dtype, device and number of
    dimensions, and agree in heads, lengths, head_dim and batch."""
    named = {"query": query, "key": key, "value": value}
    wanted = "[total, H, D]" if packed else "[*, H, L, D]"
    for role, tensor in named.items():
        if tensor.dtype not in FLOATING:
            raise NotImplementedError(
                f"{name}: {role} must be fp32, fp64, fp16 or bf16, got {tensor.dtype}"
            )
        if tensor.dtype != query.dtype:
            raise RuntimeError(
                f"{name}: {role} must have the query's dtype {query.dtype}, got {tensor.dtype}"
            )
        if tensor.device != query.device:
            raise RuntimeError(
                f"{name}: {role} must be on the query's device {query.device}, got {tensor.device}"
            )
        if tensor.dim() != query.dim() or tensor.dim() < 3 or (packed and tensor.dim() != 3):
            raise RuntimeError(
                f"{name}: {role} must be {wanted} like the query, {list(query.shape)}, "
                f"got {list(tensor.shape)}"
            )
    head, length = (1, 0) if packed else (-3, -2)
    heads, key_heads = query.shape[head], key.shape[head]
    if key.shape[-1] != query.shape[-1]:
        raise RuntimeError(
            f"{name}: key must have the query's head_dim {query.shape[-1]}, got {key.shape[-1]}"
        )
    if value.shape[length] != key.shape[length]:
        raise RuntimeError(
            f"{name}: value must have the key's length {key.shape[length]}, "
            f"got {value.shape[length]}"
        )
    if value.shape[head] != key_heads:
        raise RuntimeError(
            f"{name}: value must have the key's {key_heads} heads, got {value.shape[head]}"
        )
    if heads != key_heads and not grouped:
        raise RuntimeError(
            f"{name}: key must have the query's {heads} heads, got {key_heads} "
            "(enable_gqa=True lets several query heads share one)"
        )
    if heads != key_heads and (key_heads == 0 or heads % key_heads):
        raise RuntimeError(
            f"{name}: the number of query heads must be a multiple of the key's {key_heads}, "
            f"got {heads}"
        )
    for role, tensor in (("key", key), ("value", value)):
        if not packed and tensor.shape[:-3] != query.shape[:-3]:
            raise RuntimeError(
                f"{name}: {role} must have the query's batch {list(query.shape[:-3])}, "
                f"got {list(tensor.shape[:-3])}"
            )


_UNBOUNDED = 1 << 62


def validated_window(
    name: str, window: Window | None, causal: bool, alignment: str
) -> tuple[int, int]:
    """Both bounds, -1 for none."""
    if alignment not in ALIGNMENTS:
        raise ValueError(
            f"{name}: causal_alignment must be one of {', '.join(ALIGNMENTS)}, got {alignment!r}"
        )
    left, right = (None, None) if window is None else window
    for bound in (left, right):
        if bound is not None and bound < 0:
            raise ValueError(f"{name}: window must not be negative (None: no bound), got {window}")
    # As large as integers get it is none: they would run over where a position is added.
    left, right = (
        None if bound is None or bound >= _UNBOUNDED else bound for bound in (left, right)
    )
    if causal:
        right = 0
    return -1 if left is None else left, -1 if right is None else right


def validate_plane(
    name: str, role: str, plane: Tensor, scores: tuple[int, ...], query: Tensor, *, boolean: bool
) -> None:
    """That a bias or mask has its kind of dtype and broadcasts to the scores."""
    if boolean and plane.dtype != torch.bool:
        raise RuntimeError(
            f"{name}: {role} must be boolean, got {plane.dtype} (what is added is the bias)"
        )
    if not boolean and plane.dtype not in FLOATING:
        raise RuntimeError(
            f"{name}: {role} must be boolean or floating point, got {plane.dtype}"
            if role == "attn_mask"
            else f"{name}: {role} must be floating point, got {plane.dtype}"
        )
    if plane.device != query.device:
        raise RuntimeError(
            f"{name}: {role} must be on the query's device {query.device}, got {plane.device}"
        )
    given = plane.shape
    trailing = scores[len(scores) - len(given) :] if len(given) <= len(scores) else ()
    if len(given) > len(scores) or any(
        size not in (1, full) for size, full in zip(given, trailing, strict=True)
    ):
        raise RuntimeError(
            f"{name}: {role} of shape {list(given)} does not broadcast to [*, H, Lq, Lk], "
            f"{list(scores)}"
        )


def validate_per_head(
    name: str,
    query: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    key_lengths: Tensor | None,
) -> None:
    """That what there is for each head or each entry of the batch has that shape and its dtype."""
    batch, heads = query.shape[:2]
    for role, tensor, shapes in (
        ("alibi_slopes", alibi_slopes, ((heads,), (1, heads), (batch, heads))),
        ("sinks", sinks, ((heads,),)),
        ("key_lengths", key_lengths, ((batch,),)),
    ):
        if tensor is None:
            continue
        if tuple(tensor.shape) not in shapes:
            raise RuntimeError(
                f"{name}: {role} must have shape "
                f"{' or '.join(str(list(shape)) for shape in shapes)}, got {list(tensor.shape)}"
            )
        if tensor.device != query.device:
            raise RuntimeError(
                f"{name}: {role} must be on the query's device {query.device}, got {tensor.device}"
            )
        integers = role == "key_lengths"
        if integers and tensor.dtype not in (torch.int32, torch.int64):
            raise RuntimeError(f"{name}: {role} must be int32 or int64, got {tensor.dtype}")
        if not integers and tensor.dtype not in FLOATING:
            raise RuntimeError(f"{name}: {role} must be floating point, got {tensor.dtype}")
    if alibi_slopes is not None and alibi_slopes.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{name}: alibi_slopes takes no gradient; detach it, or pass what it stands for as bias"
        )


def validate_packed(
    name: str,
    query: Tensor,
    key: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    key_lengths: Tensor | None,
) -> None:
    """That the starts of packed sequences ascend within them; on a GPU, which looking would wait
    for, that they have the right shape and dtype."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        missing = "cu_seqlens_q" if cu_seqlens_q is None else "cu_seqlens_k"
        raise RuntimeError(f"{name}: cu_seqlens_q and cu_seqlens_k go together, {missing} is None")
    for role, given in (("bias", bias), ("mask", mask), ("key_lengths", key_lengths)):
        if given is not None:
            raise RuntimeError(f"{name}: {role} must be None for packed sequences (cu_seqlens)")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise RuntimeError(
            f"{name}: cu_seqlens_k must have the shape of cu_seqlens_q, "
            f"{list(cu_seqlens_q.shape)}, got {list(cu_seqlens_k.shape)}"
        )
    for role, starts, total in (
        ("cu_seqlens_q", cu_seqlens_q, query.shape[0]),
        ("cu_seqlens_k", cu_seqlens_k, key.shape[0]),
    ):
        if starts.dtype not in (torch.int32, torch.int64) or starts.dim() != 1 or not len(starts):
            raise RuntimeError(
                f"{name}: {role} must be int32 or int64 of shape [sequences + 1], "
                f"got {starts.dtype} of {list(starts.shape)}"
            )
        if starts.device != query.device:
            raise RuntimeError(
                f"{name}: {role} must be on the query's device {query.device}, got {starts.device}"
            )
        if not starts.is_cpu or torch.compiler.is_compiling():
            continue  # looking would wait for the device
        if type(starts) is not Tensor:
            continue  # a fake tensor has no numbers
        values = starts.tolist()
        if values[0] < 0 or values[-1] > total or values != sorted(values):
            raise ValueError(
                f"{name}: {role} must ascend from 0 to {total} at most, got {values[:8]}"
                + ("..." if len(values) > 8 else "")
            )
