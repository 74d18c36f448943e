"""scaled_dot_product_attention, and attention with everything that is added to it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import current_backend, note
from ..ops.attention import DECODE_ROWS, AttentionFunction, Forward, forward_op
from ..ops.attention_blockwise import all_finite
from ..random import draw_seed
from ..reference import attention as reference
from ._dispatch import FLOATING, is_foreign, is_transformed, records_gradient
from .softmax import ALIGNMENTS

Window = tuple[int | None, int | None]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    r"""Attention, as :func:`torch.nn.functional.scaled_dot_product_attention`.

    .. math:: \mathrm{softmax}\Big(\frac{Q K^T}{\sqrt{D}} + M\Big) V

    in memory proportional to the lengths, not to their product, with any of the arguments.

    Args:
        query: ``[*, H, Lq, D]``; fp32, fp64, fp16 or bf16; any strides.
        key: ``[*, H, Lk, D]``; with ``enable_gqa`` its heads may be fewer, a divisor of H.
        value: ``[*, H, Lk, Dv]``.
        attn_mask: broadcast to ``[*, H, Lq, Lk]``. Boolean: True takes part. Floating: added to the
            scores; -Inf takes no part; its gradient is summed over the dimensions it is broadcast
            along.
        dropout_p: probability of dropping a weight; applied whether or not anything trains, as in
            torch. The mask is a function of a seed from torch's generator and the position.
        is_causal: query i sees the keys up to i. Together with ``attn_mask`` both hold (torch
            refuses that on some devices and on others, too, applies both).
        scale: of the scores; None means :math:`1 / \sqrt{D}`.
        enable_gqa: as above; query head h uses key head ``h // (H / Hk)``.

    Returns:
        ``[*, H, Lq, Dv]`` in the query's dtype. A query that sees nothing gives 0, and passes on no
        gradient; what a query does not see, NaN included, has no part in its result.

    Raises:
        ValueError: ``dropout_p`` is outside [0, 1].
        RuntimeError: shapes, dtypes or devices do not fit each other.
        NotImplementedError: the inputs are not floating point.

    Source: Vaswani et al., "Attention Is All You Need", 2017, eq. 1; Dao et al.,
    "FlashAttention", 2022.
    """
    name = "scaled_dot_product_attention"
    if is_foreign(query, key, value, attn_mask):
        note(name, "torch", "a tensor subclass, layout or trace that torch must handle")
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    query, key, value, attn_mask = _autocast(query, key, value, attn_mask)
    if reason := _torch_serves(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa):
        note(name, "torch", reason)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    boolean = attn_mask is not None and attn_mask.dtype == torch.bool
    matrices = query.dim() == key.dim() == value.dim() == 2
    query, key, value = _broadcast(query, key, value, grouped=enable_gqa)
    output = _attention(
        name,
        query,
        key,
        value,
        bias=None if boolean else attn_mask,
        mask=attn_mask if boolean else None,
        mask_name="attn_mask",
        causal=is_causal,
        dropout_p=dropout_p,
        scale=scale,
        grouped=enable_gqa,
    )[0]
    return output[0] if matrices else output


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
    query, key, value, bias = _autocast(query, key, value, bias)
    output, lse = _attention(
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


def _attention(
    name: str, query: Tensor, key: Tensor, value: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
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
    _validate_tensors(name, query, key, value, grouped=grouped, packed=packed)
    left, right = _validated_window(name, window, causal, causal_alignment)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{name}: softcap must be positive or None, got {softcap}")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{name}: dropout_p must be between 0 and 1, got {dropout_p}")
    if packed:
        _validate_packed(name, query, key, cu_seqlens_q, cu_seqlens_k, bias, mask, key_lengths)
        query, key, value = (t.transpose(0, 1)[None] for t in (query, key, value))
    leading = query.shape[:-3]
    scores = (*leading, query.shape[-3], query.shape[-2], key.shape[-2])
    if bias is not None:
        _validate_plane(name, mask_name or "bias", bias, scores, query, boolean=False)
    if mask is not None:
        _validate_plane(name, mask_name or "mask", mask, scores, query, boolean=True)
    q, k, v = (_four_dimensional(t) for t in (query, key, value))
    _validate_per_head(name, q, alibi_slopes, sinks, key_lengths)
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
        result: tuple[Tensor, Tensor] = AttentionFunction.apply(*a)  # type: ignore[no-untyped-call]
        return result
    return forward_op(*a)  # type: ignore[no-any-return]


# --- what torch takes ----------------------------------------------------------------------------


def _autocast(
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


#: Elements of a key cache from which our decoding is ahead, its way through Python included.
_DECODE_ELEMENTS = 1 << 17
#: Scores up to which the CPU's caches hold all of them and torch's operations on the whole are the
#: quickest, without and with gradients. One core of an AVX-512 EPYC: 0.9 and 1.2 of torch at 64 and
#: 256 thousand without; 0.4 to 0.8 below a million with, 1.0 to 1.2 there.
_SMALL = (1 << 17, 1 << 20)


def _torch_serves(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    causal: bool,
    grouped: bool,
) -> str | None:
    """Why torch's own call is the best there is, or None.

    On the CPU its flash kernel runs at the rate of the GEMMs, forward and backward, where it runs.
    """
    if not query.is_cpu or current_backend() != "auto" or torch.compiler.is_compiling():
        return None
    if is_transformed() or dropout_p or (mask is not None and causal):
        return None
    if not _fits(query, key, value, mask, grouped):
        return None
    records = records_gradient(query, key, value, mask)
    few = query.shape[2] * query.shape[1] // key.shape[1] <= DECODE_ROWS
    if few and key.numel() >= _DECODE_ELEMENTS and query.dtype != torch.float64 and not records:
        return None  # decoding: ours reads the cache at the memory's rate
    if (mask is not None or causal) and not all_finite(key, value):
        return None  # in torch's, NaN that is masked out comes through
    flash = query.shape[-1] == value.shape[-1] and key.shape == value.shape
    flash = flash and all(t.stride(-1) == 1 for t in (query, key, value))
    if mask is not None:
        flash = flash and not mask.requires_grad and mask.dim() in (2, 4) and 0 not in mask.stride()
    if flash:
        return "its flash kernel serves the call"
    if query.numel() // query.shape[-1] * key.shape[2] < _SMALL[records]:
        return "so small that all scores stay in the cache"
    return None


def _fits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, grouped: bool) -> bool:
    """Whether these are the plain shapes and dtypes, with nothing empty."""
    if not query.dim() == key.dim() == value.dim() == 4 or query.dtype not in FLOATING:
        return False
    if not query.dtype == key.dtype == value.dtype:
        return False
    if not all(t.numel() and t.is_cpu for t in (query, key, value)):
        return False
    same = key.shape[:3] == value.shape[:3] and query.shape[0] == key.shape[0]
    if not same or query.shape[3] != key.shape[3]:
        return False
    if query.shape[1] != key.shape[1] and (not grouped or query.shape[1] % key.shape[1]):
        return False
    if mask is None:
        return True
    scores = (*query.shape[:3], key.shape[2])
    return (
        mask.dtype in (torch.bool, query.dtype)
        and mask.is_cpu
        and mask.dim() <= 4
        and all(
            size in (1, full)
            for size, full in zip(mask.shape, scores[4 - mask.dim() :], strict=True)
        )
    )


# --- shapes --------------------------------------------------------------------------------------


def _broadcast(
    query: Tensor, key: Tensor, value: Tensor, *, grouped: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """With the same leading dimensions, as torch's matrix products make them the same.

    What does not broadcast is left as it is, for the validation to name.
    """
    if key.shape[:-2] == query.shape[:-2] == value.shape[:-2] and query.dim() > 2:
        return query, key, value
    tensors = tuple(t[None] if t.dim() == 2 else t for t in (query, key, value))
    kept = 3 if grouped else 2  # with groups the numbers of heads differ
    if min(t.dim() for t in tensors) < kept:
        return query, key, value
    try:
        leading = torch.broadcast_shapes(*(t.shape[:-kept] for t in tensors))
    except RuntimeError:
        return query, key, value
    query, key, value = (t.expand(*leading, *t.shape[-kept:]) for t in tensors)
    return query, key, value


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


def _validate_tensors(
    name: str, query: Tensor, key: Tensor, value: Tensor, *, grouped: bool, packed: bool
) -> None:
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


def _validated_window(
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
    if causal:
        right = 0
    return -1 if left is None else left, -1 if right is None else right


def _validate_plane(
    name: str, role: str, plane: Tensor, scores: tuple[int, ...], query: Tensor, *, boolean: bool
) -> None:
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


def _validate_per_head(
    name: str,
    query: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    key_lengths: Tensor | None,
) -> None:
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


def _validate_packed(
    name: str,
    query: Tensor,
    key: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    key_lengths: Tensor | None,
) -> None:
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
