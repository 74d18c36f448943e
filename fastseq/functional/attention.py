"""Attention with everything that is added to it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import note
from ..ops.attention import AttentionFunction, Forward, forward_op
from ..random import draw_seed
from ..reference import attention as reference
from ._attention_by_torch import torch_serves
from ._attention_checks import (
    Window,
    validate_packed,
    validate_per_head,
    validate_plane,
    validate_tensors,
    validated_window,
)
from ._dispatch import is_transformed, records_gradient
from .softmax import ALIGNMENTS


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    causal_alignment: str = "top_left",
    window: Window | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    key_lengths: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attention with all that is added to it, each alone or together, in O(L) memory.

    .. math::
        s_{ij} &= \mathrm{cap}(\mathrm{scale} \cdot q_i \cdot k_j) + \mathrm{bias}_{ij}
                  - \mathrm{slope} \cdot |j - i| \\
        \mathrm{lse}_i &= \log \Big( e^\mathrm{sink} + \sum_{j\ \mathrm{seen}} e^{s_{ij}} \Big) \\
        o_i &= \sum_{j\ \mathrm{seen}} \mathrm{dropout}(e^{s_{ij} - \mathrm{lse}_i})\, v_j

    where :math:`\mathrm{cap}(x) = \mathrm{softcap} \cdot \tanh(x / \mathrm{softcap})`.

    Args:
        query: ``[*, H, Lq, D]``, or ``[total_q, H, D]`` with ``cu_seqlens_q``; fp32, fp64, fp16 or
            bf16; any strides.
        key: ``[*, Hk, Lk, D]``, or ``[total_k, Hk, D]``; H is a multiple of Hk, and query head h
            uses key head ``h // (H / Hk)``.
        value: ``[*, Hk, Lk, Dv]``, or ``[total_k, Hk, Dv]``.
        bias: added to the scores, broadcast to ``[*, H, Lq, Lk]``; -Inf takes no part. Its gradient
            is summed over the dimensions it is broadcast along.
        mask: boolean, broadcast likewise; True takes part.
        causal: query i sees no key behind the one it stands beside.
        causal_alignment: where queries stand: ``"top_left"``, query i beside key i, as torch has
            it; ``"bottom_right"``, the last query beside the last key. Causal, window and ALiBi go
            by it.
        window: ``(left, right)``: a query sees so many keys before and behind the one it stands
            beside; None in either place: all.
        softcap: bound of the scores, positive; None: none.
        alibi_slopes: ``[H]`` or ``[B, H]``; takes no gradient.
        sinks: ``[H]``, a score that takes part in the sum and has no value; differentiable.
        dropout_p: probability of dropping a weight, the others scaled by ``1 / (1 - p)``.
        seed: int64 ``[1]`` to draw the dropout mask from; None draws it from torch's generator.
        scale: None means :math:`1 / \sqrt{D}`.
        cu_seqlens_q, cu_seqlens_k: int32 or int64 ``[sequences + 1]``, ascending: where each of the
            sequences packed one behind another begins, and the last ends. They attend within
            themselves. Together, and without ``bias``, ``mask`` and ``key_lengths``. On the CPU
            they are checked; on a GPU that would wait for it, and what is past the end or
            descending is cut off instead.
        key_lengths: int32 or int64 ``[B]``: so many keys and values of each are there, as in a
            cache that is longer. For bottom-right alignment the last key is the last of these.
        return_lse: return ``(output, lse)``.

    Returns:
        ``[*, H, Lq, Dv]`` (packed: ``[total_q, H, Dv]``) in the query's dtype, and with
        ``return_lse`` the natural logarithm of the sums, ``[*, H, Lq]`` (``[H, total_q]``) in fp32
        (fp64 for fp64). Both are differentiable. A query that sees nothing gives 0 (lse -Inf, or
        its sink) and passes on no gradient; what a query does not see, NaN included, has no part
        in its result.

    Raises:
        ValueError: ``dropout_p``, ``window``, ``softcap``, ``causal_alignment`` or the cu_seqlens
            have values that make no sense.
        RuntimeError: shapes, dtypes or devices do not fit each other.
        NotImplementedError: the inputs are not floating point.

    Source: Dao, "FlashAttention-2", 2023; Press et al., "Train Short, Test Long" (ALiBi), 2022;
    Gemma Team, "Gemma 2" (softcap), 2024; Xiao et al., "Efficient Streaming Language Models with
    Attention Sinks", 2024.
    """
    query, key, value, bias = autocast(query, key, value, bias)
    plain = not (return_lse or dropout_p) and softcap is None and window is None
    plain = plain and alibi_slopes is None and sinks is None and key_lengths is None
    if plain and bias is None and cu_seqlens_q is None and cu_seqlens_k is None:
        made = _by_torch(query, key, value, mask, causal, causal_alignment, scale)
        if made is not None:
            return made
    output, lse = attention_and_lse(
        "attention",
        query,
        key,
        value,
        bias=bias,
        mask=mask,
        causal=causal,
        causal_alignment=causal_alignment,
        window=window,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        dropout_p=dropout_p,
        seed=seed,
        scale=scale,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        key_lengths=key_lengths,
    )
    return (output, lse) if return_lse else output


def _by_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    alignment: str,
    scale: float | None,
) -> Tensor | None:
    """What :func:`torch_serves` has torch do; not with gradients, which nothing could be taken of
    again."""
    if records_gradient(query, key, value) or (mask is not None and mask.dtype != torch.bool):
        return None
    if causal and alignment != "top_left":
        return None
    grouped = query.dim() == key.dim() == 4 and query.shape[1] != key.shape[1]
    reason = torch_serves(query, key, value, mask, 0.0, causal, grouped)
    if reason is None or alignment not in ALIGNMENTS:
        return None
    note("attention", "torch", reason)
    return F.scaled_dot_product_attention(
        query, key, value, mask, 0.0, causal, scale=scale, enable_gqa=grouped
    )


def attention_and_lse(
    name: str, query: Tensor, key: Tensor, value: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """Both results of :func:`attention`, whose arguments these are after autocast."""
    arguments, leading = prepared(name, query, key, value, **options)
    output, lse = _run(name, arguments)
    if arguments.cu_seqlens_q is not None:
        return output[0].transpose(0, 1), lse[0]
    if len(leading) == 1:
        return output, lse
    return output.reshape(*leading, *output.shape[1:]), lse.reshape(*leading, *lse.shape[1:])


def prepared(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    mask_name: str = "",
    causal: bool = False,
    causal_alignment: str = "top_left",
    window: Window | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    key_lengths: Tensor | None = None,
    grouped: bool = True,
) -> tuple[Forward, torch.Size]:
    """The op's arguments, after checking that all fit each other, and the leading dimensions."""
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    validate_tensors(name, query, key, value, grouped=grouped, packed=packed)
    left, right = validated_window(name, window, causal, causal_alignment)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{name}: softcap must be positive or None, got {softcap}")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{name}: dropout_p must be between 0 and 1, got {dropout_p}")
    if packed:
        validate_packed(name, query, key, cu_seqlens_q, cu_seqlens_k, bias, mask, key_lengths)
        query, key, value = (t.transpose(0, 1)[None] for t in (query, key, value))
    leading = query.shape[:-3]
    scores = (*leading, query.shape[-3], query.shape[-2], key.shape[-2])
    if bias is not None:
        validate_plane(name, mask_name or "bias", bias, scores, query, boolean=False)
    if mask is not None:
        validate_plane(name, mask_name or "mask", mask, scores, query, boolean=True)
    q, k, v = (_four_dimensional(t) for t in (query, key, value))
    validate_per_head(name, q, alibi_slopes, sinks, key_lengths)
    if dropout_p == 0.0:
        seed = None
    elif seed is None:
        seed = draw_seed(query.device)
    elif seed.dtype != torch.int64 or seed.shape != (1,):
        raise RuntimeError(
            f"{name}: seed must be int64 of shape [1], got {seed.dtype} of {list(seed.shape)}"
        )
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1]) if query.shape[-1] else 0.0
    if alibi_slopes is not None and alibi_slopes.dim() == 1:
        alibi_slopes = alibi_slopes[None]
    arguments = Forward(
        q,
        k,
        v,
        _four_dimensional_plane(bias, leading),
        _four_dimensional_plane(mask, leading),
        alibi_slopes,
        sinks,
        cu_seqlens_q,
        cu_seqlens_k,
        key_lengths,
        seed,
        float(scale),
        left,
        right,
        causal_alignment == "bottom_right",
        float(softcap or 0.0),
        float(dropout_p),
    )
    return arguments, leading


def _run(name: str, a: Forward) -> tuple[Tensor, Tensor]:
    if is_transformed():
        note(name, "reference", "torch.func or forward-mode AD")
        options: dict[str, Any] = a._asdict()
        q, k, v = (options.pop(tensor) for tensor in ("query", "key", "value"))
        return reference.attention(q, k, v, **options)
    if records_gradient(a.query, a.key, a.value, a.bias, a.sinks):
        if torch.compiler.is_compiling():  # which stops where a tensor is in two places: x, x, x
            a = a._replace(key=a.key.view_as(a.key), value=a.value.view_as(a.value))
        result: tuple[Tensor, Tensor] = AttentionFunction.apply(*a)  # type: ignore[no-untyped-call]
        return result
    return forward_op(*a)  # type: ignore[no-any-return]


def _four_dimensional(tensor: Tensor) -> Tensor:
    """``[*, H, L, D]`` as ``[B, H, L, D]``."""
    if tensor.dim() == 4:
        return tensor
    return tensor[None] if tensor.dim() == 3 else tensor.flatten(0, -4)


def _four_dimensional_plane(plane: Tensor | None, leading: torch.Size) -> Tensor | None:
    """A bias or mask with four dimensions, of which those that were broadcast still are."""
    if plane is None:
        return None
    missing = len(leading) + 3 - plane.dim()
    plane = plane[(None,) * missing]
    if len(leading) == 1:
        return plane
    if not leading:
        return plane[None]
    if all(size == 1 for size in plane.shape[: len(leading)]):
        return plane.flatten(0, len(leading) - 1)
    return plane.expand(*leading, *plane.shape[len(leading) :]).flatten(0, len(leading) - 1)


def autocast(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Autocast runs attention in its 16-bit dtype, on CPU and GPU alike."""
    device = query.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return query, key, value, bias
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.dtype in _CAST and tensor.dtype != dtype else tensor

    floating = bias is not None and bias.dtype != torch.bool
    return (
        cast(query),
        cast(key),
        cast(value),
        cast(bias) if floating and bias is not None else bias,
    )


_CAST = (torch.float32, torch.float16, torch.bfloat16)
