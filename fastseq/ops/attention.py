"""The attention ops: schemas, fakes, candidates, autograd.

``_attention_fwd`` and ``_attention_bwd`` serve every public function of the family, for
training and for decoding::

    s_ij  = cap(scale * q_i . k_j) + bias_ij - slope * |j - i|       over the keys that i sees
    lse_i = log(e^sink + sum_j e^s_ij),    p_ij = e^(s_ij - lse_i)
    out_i = sum_j dropout(p_ij) v_j

Backward needs inputs, output and lse. The public functions are in
``fastseq/functional/attention.py``; the formulas with all options in ``fastseq/reference``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import Candidate, current_backend
from ..reference import attention as reference
from ..reference.attention import sequences
from ..reference.layer_norm import compute_dtype
from . import attention_blockwise as blockwise
from . import attention_flash as flash
from . import attention_tiles as tiles
from ._op import define_op, differentiable_gradients, extension_op, function_backward

_extension_decode = extension_op("attention_decode")
Tensors4 = tuple[Tensor, Tensor, Tensor, Tensor]

# --- arguments -----------------------------------------------------------------------------------

_COMMON = """Tensor? bias, Tensor? mask, Tensor? alibi_slopes, Tensor? sinks,
    Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? key_lengths, Tensor? seed,
    float scale, SymInt window_left, SymInt window_right, bool bottom_right, float softcap,
    float dropout_p"""
_FORWARD = f"""_attention_fwd(
    Tensor query, Tensor key, Tensor value, {_COMMON}
) -> (Tensor output, Tensor lse)"""


class Forward(NamedTuple):
    """The arguments of the forward op.

    ``query [B, H, Lq, D]``, ``key [B, Hk, Lk, D]``, ``value [B, Hk, Lk, Dv]`` with H a multiple of
    Hk; ``bias`` and a boolean ``mask`` have four dimensions that broadcast to ``[B, H, Lq, Lk]``;
    ``alibi_slopes [B or 1, H]``, ``sinks [H]``; ``cu_seqlens`` int32 or int64 ``[sequences + 1]``
    (then B is 1), ``key_lengths [B]`` likewise. A window bound of -1 is none; causal is
    ``window_right = 0``. ``softcap`` 0: none.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    mask: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    key_lengths: Tensor | None
    seed: Tensor | None
    scale: float
    window_left: int
    window_right: int
    bottom_right: bool
    softcap: float
    dropout_p: float


def _options(a: Forward | Backward) -> dict[str, Any]:
    """What the reference takes by name, of either op's arguments."""
    return {
        name: getattr(a, name) for name in Forward._fields if name not in ("query", "key", "value")
    }


def _laid_out_as(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised ``[B, H, L, *]`` in the order of ``tensor``'s: heads before L or behind it.

    Models have ``[B, L, H, D]`` in memory and transpose a view of it; so does the result then, and
    nothing is copied when it is transposed back.
    """
    batch, heads, length, width = shape
    if tensor.stride(1) < tensor.stride(2):
        return tensor.new_empty((batch, length, heads, width), dtype=dtype).transpose(1, 2)
    return tensor.new_empty(shape, dtype=dtype)


def _forward_outputs(a: Forward) -> tuple[Tensor, Tensor]:
    """Uninitialised outputs, the fake's too."""
    shape = (*a.query.shape[:3], a.value.shape[3])
    return (
        _laid_out_as(a.query, shape, a.query.dtype),
        a.query.new_empty(a.query.shape[:3], dtype=compute_dtype(a.query.dtype)),
    )


_BACKWARD = f"""_attention_bwd(
    Tensor query, Tensor key, Tensor value, {_COMMON},
    Tensor grad_output, Tensor? grad_lse, Tensor output, Tensor lse, bool bias_gradient,
    Tensor? delta
) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_bias)"""


class Backward(NamedTuple):
    """The arguments of the backward op: the forward's, its results and their gradients.

    With ``delta [B, H, Lq]`` the keys may be some of those that output and lse are of, as where
    each process has a part of a sequence: it is ``sum_j p_ij dp_ij - dlse_i`` over all of them,
    which the part alone does not tell (:func:`delta_of`).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    mask: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    key_lengths: Tensor | None
    seed: Tensor | None
    scale: float
    window_left: int
    window_right: int
    bottom_right: bool
    softcap: float
    dropout_p: float
    grad_output: Tensor
    grad_lse: Tensor | None
    output: Tensor
    lse: Tensor
    bias_gradient: bool
    delta: Tensor | None


def _backward_outputs(a: Backward) -> Tensors4:
    """Uninitialised gradients; the bias's, if wanted, in its shape and the compute dtype."""
    grads = (_laid_out_as(t, tuple(t.shape), t.dtype) for t in (a.query, a.key, a.value))
    if a.bias_gradient and a.bias is not None:
        bias = a.query.new_empty(a.bias.shape, dtype=compute_dtype(a.query.dtype))
    else:
        bias = a.query.new_empty(0, dtype=compute_dtype(a.query.dtype))
    return (*grads, bias)  # type: ignore[return-value]


# --- Triton --------------------------------------------------------------------------------------


def _forward_by_triton(a: Forward) -> tuple[Tensor, Tensor]:
    # Here, not above: without Triton the rest still works.
    from ..kernels import attention, attention_decode

    output, lse = _forward_outputs(a)
    if a.cu_seqlens_q is not None:  # queries behind the last sequence are nobody's
        output.zero_()
        lse.fill_(-math.inf)
    query, key, value = tiles.contiguous_rows(a.query, a.key, a.value)
    a = a._replace(query=query, key=key, value=value)
    kernels = attention_decode if attention_decode.serves(a) else attention
    kernels.forward(a, output, lse)
    return output, lse


def _backward_by_triton(a: Backward) -> Tensors4:
    from ..kernels import attention_backward

    grads = _backward_outputs(a)
    if a.cu_seqlens_q is not None:
        for grad in grads:
            grad.zero_()
    query, key, value, grad_output, output = tiles.contiguous_rows(
        a.query, a.key, a.value, a.grad_output, a.output
    )
    a = a._replace(query=query, key=key, value=value, grad_output=grad_output, output=output)
    attention_backward.backward(a, *grads)
    return grads


# --- blockwise -----------------------------------------------------------------------------------


def dense_problem(a: Forward | Backward) -> blockwise.Problem:
    """The whole as one dense problem, whose parts :func:`_parts` cuts out of it."""
    batch, heads, queries, _ = a.query.shape
    keys = a.key.shape[2]
    shape = (batch, heads, queries, keys)
    compute = compute_dtype(a.query.dtype)
    slopes = None
    if a.alibi_slopes is not None:
        slopes = a.alibi_slopes.to(compute).expand(batch, heads).contiguous()
    return blockwise.Problem(
        query=a.query,
        key=a.key,
        value=a.value,
        bias=None if a.bias is None else a.bias.expand(shape),
        mask=None if a.mask is None else a.mask.expand(shape),
        slopes=slopes,
        sinks=None if a.sinks is None else a.sinks.to(compute).contiguous(),
        seed=a.seed,
        scale=a.scale,
        window_left=a.window_left,
        window_right=a.window_right,
        shift=keys - queries if a.bottom_right else 0,
        softcap=a.softcap,
        dropout_p=a.dropout_p,
        row_offset=0,
        row_pitch=queries,
    )


class _Part(NamedTuple):
    """Which batches, queries and keys of the whole a sequence has."""

    b: slice
    i: slice
    j: slice


def _sequences(a: Forward | Backward) -> Iterator[tuple[_Part, int]] | None:
    """The sequences that make up the whole, and the dropout row each begins with; None: one."""
    heads, queries, keys = a.query.shape[1], a.query.shape[2], a.key.shape[2]
    if a.cu_seqlens_q is not None and a.cu_seqlens_k is not None:
        starts = zip(
            sequences(a.cu_seqlens_q, queries), sequences(a.cu_seqlens_k, keys), strict=True
        )
        return (
            (_Part(slice(0, 1), slice(*these), slice(*those)), these[0]) for these, those in starts
        )
    if a.key_lengths is not None:
        lengths = a.key_lengths.clamp(0, keys).tolist()
        return (
            (_Part(slice(b, b + 1), slice(0, queries), slice(0, length)), b * heads * queries)
            for b, length in enumerate(lengths)
        )
    return None


def _cut(whole: blockwise.Problem, part: _Part, row_offset: int, *, bottom_right: bool) -> Any:
    """The dense problem of one sequence."""
    b, i, j = part
    return replace(
        whole,
        query=whole.query[b, :, i],
        key=whole.key[b, :, j],
        value=whole.value[b, :, j],
        bias=None if whole.bias is None else whole.bias[b, :, i, j],
        mask=None if whole.mask is None else whole.mask[b, :, i, j],
        slopes=None if whole.slopes is None else whole.slopes[b],
        shift=(j.stop - j.start) - (i.stop - i.start) if bottom_right else 0,
        row_offset=row_offset,
    )


def _forward_densely(a: Forward, *, by_extension: bool) -> tuple[Tensor, Tensor]:
    """Sequence by sequence, by :mod:`attention_tiles` or :mod:`attention_blockwise`."""
    output, lse = _forward_outputs(a)
    forward = tiles.forward if by_extension else _forward_blockwise
    whole, parts = dense_problem(a), _sequences(a)
    if parts is None:
        done = forward(whole, output, lse)
    else:
        if a.cu_seqlens_q is not None:
            output.zero_()
            lse.fill_(-math.inf)
        done = all(
            forward(
                _cut(whole, part, row_offset, bottom_right=a.bottom_right),
                output[part.b, :, part.i],
                lse[part.b, :, part.i],
            )
            for part, row_offset in parts
        )
    return (output, lse) if done else _forward_densely(a, by_extension=False)


def _forward_blockwise(p: blockwise.Problem, output: Tensor, lse: Tensor) -> bool:
    blockwise.forward(p, output, lse)
    return True


def _backward_densely(a: Backward, *, by_extension: bool) -> Tensors4:
    """Sequence by sequence, by :mod:`attention_tiles` or :mod:`attention_blockwise`."""
    grads = _backward_outputs(a)
    backward = tiles.backward if by_extension else _backward_blockwise
    grad_bias = grads[3].zero_() if a.bias_gradient else None
    whole, parts = dense_problem(a), _sequences(a)
    if parts is None:
        given = (a.grad_output, a.output, a.lse, a.grad_lse, a.delta)
        done = backward(whole, *given, grads[:3], grad_bias)
    else:
        for grad in grads:
            grad.zero_()
        done = all(
            backward(
                _cut(whole, part, row_offset, bottom_right=a.bottom_right),
                *_cut_backward(a, part, grads, grad_bias),
            )
            for part, row_offset in parts
        )
    return grads if done else _backward_densely(a, by_extension=False)


def _cut_backward(
    a: Backward, part: _Part, grads: Tensors4, grad_bias: Tensor | None
) -> tuple[Any, ...]:
    """What the backward of one sequence takes after its problem."""
    b, i, j = part
    if grad_bias is not None:
        rows = b if grad_bias.shape[0] > 1 else slice(0, 1)
        columns = j if grad_bias.shape[3] > 1 else slice(0, 1)
        grad_bias = grad_bias[rows, :, :, columns]
    of_queries = (a.grad_output, a.output, a.lse, a.grad_lse, a.delta)
    return (
        *(None if t is None else t[b, :, i] for t in of_queries),
        (grads[0][b, :, i], grads[1][b, :, j], grads[2][b, :, j]),
        grad_bias,
    )


def _backward_blockwise(
    p: blockwise.Problem,
    grad_output: Tensor,
    output: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    delta: Tensor | None,
    grads: tuple[Tensor, Tensor, Tensor],
    grad_bias: Tensor | None,
) -> bool:
    blockwise.backward(p, grad_output, lse, grad_lse, delta, grads, grad_bias)
    return True


#: Keys of one task of it: what one core reads in some 10 us, and the same for any thread count.
DECODE_SPLIT = 512


def decodes(a: Forward) -> bool:
    """Whether the CPU's decoding kernel takes the call: few queries, and nothing dropped."""
    rows = a.query.shape[2] * a.query.shape[1] // max(a.key.shape[1], 1)
    packed = a.cu_seqlens_q is not None or a.seed is not None
    return (
        0 < rows <= flash.DECODE_ROWS and not packed and 0 not in (a.query.numel(), a.value.numel())
    )


def _forward_by_extension(a: Forward) -> tuple[Tensor, Tensor]:
    if not decodes(a):
        return _forward_densely(a, by_extension=True)
    whole = dense_problem(a)
    output = _forward_outputs(a)[0]
    query, key, value = tiles.contiguous_rows(a.query, a.key, a.value)
    lengths = None if a.key_lengths is None else a.key_lengths.to(torch.int64).contiguous()
    made, made_lse = _extension_decode(
        query,
        key,
        value,
        whole.bias,
        whole.mask,
        whole.slopes,
        whole.sinks,
        lengths,
        a.scale,
        a.softcap,
        a.window_left,
        a.window_right,
        a.bottom_right,
        DECODE_SPLIT,
    )
    if whole.hides and blockwise.may_hide(made):
        # 0 times a NaN or Inf value that is hidden: the careful way. Seldom, and made is small.
        return _forward_densely(a, by_extension=True)
    if made.stride() == output.stride():
        return made, made_lse
    return output.copy_(made), made_lse


def _forward_by_torch(a: Forward) -> tuple[Tensor, Tensor]:
    if flash.serves(a) and (made := flash.forward(a)) is not None:
        output, lse = made
        return _laid_out(output, a.query), lse.contiguous()
    return _forward_densely(a, by_extension=False)


def _backward_by_extension(a: Backward) -> Tensors4:
    return _backward_densely(a, by_extension=True)


def _backward_by_torch(a: Backward) -> Tensors4:
    if _flash_serves_backward(a) and (made := flash.backward(a)) is not None:
        query, key, value = (
            _laid_out(grad, of) for grad, of in zip(made, (a.query, a.key, a.value), strict=True)
        )
        return query, key, value, a.lse.new_empty(0)
    return _backward_densely(a, by_extension=False)


#: Scores of a head below which the products of a backward in 16 bits are quicker in one piece than
#: in torch's blocks: at 128 x 128 1.2 to 1.3 of torch, at 256 x 256 0.9.
_FEW_SCORES = 1 << 15


def _flash_serves_backward(a: Backward) -> bool:
    if a.grad_lse is not None or a.delta is not None or not flash.serves(a):
        return False
    return a.query.element_size() > 2 or a.query.shape[2] * a.key.shape[2] >= _FEW_SCORES


def _laid_out(made: Tensor, of: Tensor) -> Tensor:
    """``made`` as :func:`_laid_out_as` allocates it; copied only where it is not so already."""
    if of.stride(1) < of.stride(2):
        return made.transpose(1, 2).contiguous().transpose(1, 2)
    return made.contiguous()


# --- reference -----------------------------------------------------------------------------------


def _forward_by_reference(a: Forward) -> tuple[Tensor, Tensor]:
    outputs = _forward_outputs(a)
    made = reference.attention(a.query, a.key, a.value, **_options(a))
    for output, result in zip(outputs, made, strict=True):
        output.copy_(result)
    return outputs


# --- candidates ----------------------------------------------------------------------------------


def _triton_rejects(a: Forward | Backward) -> str | None:
    if a.query.dtype == torch.float64:
        return "no fp64 kernel"
    if max(a.query.shape[3], a.value.shape[3]) > 256:
        return "head_dim above 256"
    return None


def _cpu_rejects(a: Forward | Backward) -> str | None:
    if a.query.dtype == torch.float64:
        return "no fp64 kernel"
    if current_backend() == "auto" and flash.has_better_products(a.query.dtype):
        serves = _flash_serves_backward(a) if isinstance(a, Backward) else flash.serves(a)
        return "torch's flash kernel is quicker on this machine" if serves else None
    return None


forward_op = define_op(
    _FORWARD,
    Forward,
    _forward_outputs,
    (
        Candidate("triton", _forward_by_triton, _triton_rejects),
        Candidate("cpu", _forward_by_extension, _cpu_rejects),
        Candidate("torch", _forward_by_torch),
        Candidate("reference", _forward_by_reference),
    ),
)

backward_op = define_op(
    _BACKWARD,
    Backward,
    _backward_outputs,
    (
        Candidate("triton", _backward_by_triton, _triton_rejects),
        Candidate("cpu", _backward_by_extension, _cpu_rejects),
        Candidate("torch", _backward_by_torch),
        # An op runs below autograd, which the naive forward would need for its gradients.
        Candidate("reference", _backward_by_torch),
    ),
)


# --- autograd ------------------------------------------------------------------------------------


class AttentionFunction(torch.autograd.Function):
    """Saves inputs, output and lse; the arguments are those of the op, in its order."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        output, lse = forward_op(*arguments)
        a = Forward(*arguments)
        ctx.save_for_backward(*(getattr(a, name) for name in _TENSORS), output, lse)
        ctx.options = arguments[len(_TENSORS) :]
        ctx.set_materialize_grads(False)
        return output, lse

    @staticmethod
    @function_backward
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        *tensors, output, lse = ctx.saved_tensors
        none = (None,) * len(Forward._fields)
        if grad_output is None:
            if grad_lse is None:
                return none
            grad_output = torch.zeros_like(output)
        a = Forward(*tensors, *ctx.options)
        needs = dict(zip(Forward._fields, ctx.needs_input_grad, strict=True))
        # With create_graph the gradient must be differentiable itself: the reference is.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _differentiable(a, needs, grad_output, grad_lse)
        grads: dict[str, Tensor | None] = dict.fromkeys(Forward._fields)
        bias_gradient = needs["bias"]
        made = backward_op(*a, grad_output, grad_lse, output, lse, bias_gradient, None)
        for name, grad in zip(("query", "key", "value"), made[:3], strict=True):
            grads[name] = grad if needs[name] else None
        if bias_gradient and a.bias is not None:
            grads["bias"] = made[3].to(a.bias.dtype)
        if needs["sinks"] and a.sinks is not None:
            grads["sinks"] = _sink_gradient(a.sinks, grad_output, grad_lse, output, lse)
        return tuple(grads.values())


_TENSORS = Forward._fields[: Forward._fields.index("scale")]


def delta_of(grad_output: Tensor, grad_lse: Tensor | None, output: Tensor, lse: Tensor) -> Tensor:
    """``dout_i . out_i - dlse_i``, in lse's dtype and shape."""
    delta = (grad_output.to(lse.dtype) * output.to(lse.dtype)).sum(-1)
    return delta if grad_lse is None else delta - grad_lse.masked_fill(lse == -math.inf, 0.0)


def _sink_gradient(
    sinks: Tensor, grad_output: Tensor, grad_lse: Tensor | None, output: Tensor, lse: Tensor
) -> Tensor:
    """A sink is a key whose value is 0: ``-p_sink * delta``, summed over batch and queries."""
    compute = lse.dtype
    seen = lse > -math.inf
    delta = delta_of(grad_output, grad_lse, output, lse)
    weight = torch.where(seen, (sinks.to(compute)[:, None] - lse).exp(), 0.0)
    return -torch.where(seen, weight * delta, 0.0).sum((0, 2)).to(sinks.dtype)


def _differentiable(
    a: Forward, needs: dict[str, bool], grad_output: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients through the reference, to be differentiated again."""
    names = ("query", "key", "value", "bias", "sinks")
    options = _options(a)

    def weighted(*tensors: Tensor) -> Tensor:
        given = dict(zip(names, tensors, strict=True))
        qkv = [given.pop(name) for name in names[:3]]
        output, lse = reference.attention(*qkv, **{**options, **given})
        total = (output * grad_output).sum(dtype=lse.dtype)
        if grad_lse is not None:
            seen = lse > -math.inf
            total = total + torch.where(seen, lse, 0.0).mul(grad_lse).sum()
        return total

    wanted = tuple(needs[name] for name in names)
    one = torch.ones((), dtype=a.query.dtype, device=a.query.device)
    one = one.to(compute_dtype(a.query.dtype))
    made = differentiable_gradients(
        weighted, tuple(getattr(a, name) for name in names), wanted, one
    )
    grads: dict[str, Tensor | None] = dict.fromkeys(Forward._fields)
    grads.update(zip(names, made, strict=True))
    return tuple(grads.values())
