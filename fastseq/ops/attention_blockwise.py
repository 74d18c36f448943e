"""Attention block by block over library GEMMs: memory O(L x block), every feature, every device.

For a block of queries the scores against all keys they may see are one GEMM; between the products a
row of scores is an ordinary softmax, and whole rows are at hand, so nothing is rescaled and the
output is rounded once. Backward draws the scores again and needs lse alone. Blocks hold
:data:`BLOCK_ELEMENTS` scores, so peak memory does not grow with the square of the length; keys that
no query of a block sees are not multiplied at all, which halves causal attention.

In 16 bits the scores and their gradients come from fp32 GEMMs (the library's 16-bit ones round
their results, and a score of 10 rounded to bf16 is off by 2%); the other products, whose operands
are rounded in every flash attention, run in 16 bits at twice the rate.

What lies between the products is done by torch's operations, on any device and in fp64. On the CPU
the C++ kernels (:mod:`attention_tiles`) are the quicker way, and leave what they cannot do to this
one: a NaN or Inf in a key or value must not reach queries that do not see it, but in a product 0
times NaN is NaN. Where there is any, the careful product is taken, which costs two more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..random import bits_at, keep_scale, threshold
from ..reference.attention import visible_positions
from ..reference.layer_norm import compute_dtype

#: Scores of a block, by device. On the CPU 2 MB in fp32: they stay in the caches between the
#: products. On others as many as keep the launches from showing.
BLOCK_ELEMENTS = {"cpu": 1 << 19}
_BLOCK_ELEMENTS_ELSEWHERE = 1 << 25


@dataclass
class Problem:
    """One dense attention problem: sequences of one length, all there.

    Attributes:
        query, key, value: ``[B, H, Lq, D]``, ``[B, Hk, Lk, D]``, ``[B, Hk, Lk, Dv]``.
        bias, mask: views ``[B, H, Lq, Lk]``, broadcast by strides.
        slopes, sinks: ``[B, H]`` and ``[H]`` in the compute dtype.
        shift: query i stands beside key ``i + shift``.
        row_offset, row_pitch: the dropout row of query i of head h of batch b is
            ``row_offset + (b * H + h) * row_pitch + i``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    mask: Tensor | None
    slopes: Tensor | None
    sinks: Tensor | None
    seed: Tensor | None
    scale: float
    window_left: int
    window_right: int
    shift: int
    softcap: float
    dropout_p: float
    row_offset: int
    row_pitch: int

    @cached_property
    def group(self) -> int:
        """Query heads for one key head."""
        return self.query.shape[1] // max(self.key.shape[1], 1)

    @property
    def hides(self) -> bool:
        """Whether there may be keys that a query does not see."""
        bounded = self.window_left >= 0 or self.window_right >= 0
        return bounded or self.mask is not None or self.bias is not None

    def by_head(self, tensor: Tensor) -> Tensor:
        """A query-like tensor as ``[B * Hk, group, Lq, *]``."""
        batch, heads, length, width = tensor.shape
        return tensor.reshape(batch * heads // self.group, self.group, length, width)

    def by_key_head(self, tensor: Tensor) -> Tensor:
        """A key-like tensor as ``[B * Hk, Lk, *]``."""
        return tensor.reshape(tensor.shape[0] * tensor.shape[1], *tensor.shape[2:])


class Piece(NamedTuple):
    """Some of the scores: key heads, query heads of their group, queries, keys."""

    n: slice
    g: slice
    i: slice
    j: slice

    @property
    def shape(self) -> tuple[int, int, int, int]:
        n, g, i, j = (part.stop - part.start for part in self)
        return n, g, i, j


def _pieces(p: Problem) -> Iterator[Piece]:
    """The scores cut up: several heads at a time where they are small, else blocks of queries.

    How a row is cut depends on lengths alone, so that its bits do not depend on the batch.
    """
    batch, heads, queries, _ = p.query.shape
    key_heads, keys = p.key.shape[1], p.key.shape[2]
    budget = BLOCK_ELEMENTS.get(p.query.device.type, _BLOCK_ELEMENTS_ELSEWHERE)
    if not batch * heads * queries:
        return
    whole = p.group * queries * max(keys, 1)
    if whole <= budget:
        step = max(1, budget // whole)
        for n in range(0, batch * key_heads, step):
            last = min(n + step, batch * key_heads)
            j = _seen(p, 0, queries)
            yield Piece(slice(n, last), slice(0, p.group), slice(0, queries), j)
        return
    rows = max(16, budget // keys // 16 * 16)
    # A head for each thread: what one has multiplied is then in its own cache for what follows, and
    # the threads meet once a piece and product, not within them.
    at_once = torch.get_num_threads() if p.query.is_cpu else 1
    for n in range(0, batch * key_heads, at_once):
        heads_here = slice(n, min(n + at_once, batch * key_heads))
        for g in range(p.group):
            for i in range(0, queries, rows):
                last = min(i + rows, queries)
                yield Piece(heads_here, slice(g, g + 1), slice(i, last), _seen(p, i, last))


def _seen(p: Problem, first: int, last: int) -> slice:
    """The keys that any of the queries ``[first, last)`` may see."""
    start, stop = 0, p.key.shape[2]
    if p.window_left >= 0:
        start = max(start, first + p.shift - p.window_left)
    if p.window_right >= 0:
        stop = min(stop, last + p.shift + p.window_right)
    return slice(min(start, p.key.shape[2]), max(start, stop)) if stop > start else slice(0, 0)


# --- between the products, by torch --------------------------------------------------------------


class _Terms(NamedTuple):
    """Scores of a piece after everything that is added to them, and what else they were made of."""

    scores: Tensor
    visible: Tensor
    capped: Tensor | None  # tanh(scale * product / softcap)


def _heads_of(p: Problem, piece: Piece) -> tuple[Tensor, Tensor]:
    """The batch and the head of every ``[n, g]``."""
    key_heads = p.key.shape[1]
    n = torch.arange(piece.n.start, piece.n.stop, device=p.query.device)[:, None]
    g = torch.arange(piece.g.start, piece.g.stop, device=p.query.device)
    return (n // key_heads).expand(-1, len(g)), n % key_heads * p.group + g


def _cut(p: Problem, plane: Tensor, piece: Piece) -> Tensor:
    """A view ``[B, H, Lq, Lk]`` cut to ``[n, g, i, j]``."""
    if piece.n.stop - piece.n.start == 1 and piece.g.stop - piece.g.start == 1:
        batch, key_head = divmod(piece.n.start, p.key.shape[1])
        head = key_head * p.group + piece.g.start
        return plane[batch, head, piece.i, piece.j][None, None]
    b, h = _heads_of(p, piece)
    return plane[:, :, piece.i, piece.j][b, h]


def _terms(p: Problem, products: Tensor, piece: Piece) -> _Terms:
    queries = torch.arange(piece.i.start, piece.i.stop, device=products.device)[:, None]
    keys = torch.arange(piece.j.start, piece.j.stop, device=products.device)
    relative = keys - (queries + p.shift)
    visible = visible_positions(relative, p.window_left, p.window_right).expand(products.shape)
    scores, capped = products * p.scale, None
    if p.softcap:
        capped = torch.tanh(scores / p.softcap)
        scores = capped * p.softcap
    if p.bias is not None:
        bias = _cut(p, p.bias, piece)
        scores = scores + bias
        visible = visible & (bias != -math.inf)
    if p.slopes is not None:
        slopes = p.slopes[_heads_of(p, piece)]
        scores = scores - slopes[..., None, None] * relative.abs()
    if p.mask is not None:
        visible = visible & _cut(p, p.mask, piece)
    return _Terms(scores.masked_fill(~visible, -math.inf), visible, capped)


def _kept(p: Problem, piece: Piece) -> Tensor:
    """``1 / (1 - p)`` where dropout keeps a weight, else 0."""
    assert p.seed is not None
    b, h = _heads_of(p, piece)
    i = torch.arange(piece.i.start, piece.i.stop, device=p.seed.device)
    rows = p.row_offset + (b * p.query.shape[1] + h)[..., None] * p.row_pitch + i
    drawn = bits_at(p.seed, rows.flatten(), torch.arange(piece.j.start, piece.j.stop).to(p.seed))
    kept = (drawn >= threshold(p.dropout_p)).to(compute_dtype(p.query.dtype))
    return (kept * keep_scale(p.dropout_p)).view(piece.shape)


def _forward_by_torch(
    p: Problem, products: Tensor, piece: Piece, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Probabilities, dropped out, in the value's dtype; and what is visible."""
    terms = _terms(p, products, piece)
    if products.shape[-1]:
        largest = terms.scores.amax(-1, keepdim=True)
    else:
        largest = products.new_full((*products.shape[:-1], 1), -math.inf)
    sink = None
    if p.sinks is not None:
        sink = p.sinks[_heads_of(p, piece)[1]][..., None, None]
        largest = torch.maximum(largest, sink)
    largest = largest.masked_fill(largest == -math.inf, 0.0)
    power = (terms.scores - largest).exp_()
    total = power.sum(-1, keepdim=True)
    if sink is not None:
        total = total + (sink - largest).exp()
    lse.copy_((largest + total.log()).squeeze(-1))
    weights = power / total.masked_fill(total == 0, 1.0)
    if p.seed is not None:
        weights = weights * _kept(p, piece)
    return weights.to(p.value.dtype), terms.visible


def _backward_by_torch(
    p: Problem,
    products: Tensor,
    grad: Tensor,
    piece: Piece,
    lse: Tensor,
    grad_lse: Tensor | None,
    delta: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Probabilities, gradients of the capped and of the raw scores, and what is visible."""
    terms = _terms(p, products, piece)
    lse = lse.masked_fill(lse == -math.inf, math.inf)
    weights = (terms.scores - lse[..., None]).exp_()
    dropped = weights
    if p.seed is not None:
        kept = _kept(p, piece)
        dropped = weights * kept
        grad = torch.where(kept > 0, grad * kept, 0.0)
    grad = grad.masked_fill(~terms.visible, 0.0)
    if delta is None:
        delta = (weights * grad).sum(-1)
        if p.sinks is None:  # but for lse's rounding it is 1, which a large delta would show
            total = weights.sum(-1)
            delta = delta / total.masked_fill(total == 0, 1.0)
        if grad_lse is not None:
            delta = delta - grad_lse
    grad = (weights * (grad - delta[..., None])).masked_fill_(~terms.visible, 0.0)
    raw = grad
    if terms.capped is not None:
        raw = (grad * (1 - terms.capped.square())).masked_fill_(~terms.visible, 0.0)
    return dropped, grad, raw, terms.visible


# --- products ------------------------------------------------------------------------------------


def _careful(weights: Tensor, x: Tensor, visible: Tensor) -> Tensor:
    """``weights @ x`` where NaN and Inf in x reach those alone that see them."""
    bad = ~x.isfinite()
    product = weights @ x.masked_fill(bad, 0.0)
    seen = visible.to(torch.float32) @ bad.to(torch.float32) > 0
    return product.masked_fill_(seen, math.nan)


def may_hide(*tensors: Tensor) -> bool:
    """Whether the tensors may hold NaN or Inf, to be kept from the rows that must not see them.

    0 times either is NaN, so products of hidden numbers then take the careful way. A GPU is not
    asked, which would wait for it and could not be captured in a graph. (Finite numbers that add up
    to Inf take the careful way for nothing.)
    """
    return any(
        not t.is_cpu or not math.isfinite(t.sum(dtype=compute_dtype(t.dtype)).item())
        for t in tensors
    )


def _wide(x: Tensor) -> Tensor:
    return x.to(compute_dtype(x.dtype))


class _Wide:
    """A tensor ``[n, L, *]`` in the compute dtype, converted head by head as it is needed."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._dtype = tensor, compute_dtype(tensor.dtype)
        self._n: slice | None = None
        self._part: Tensor = tensor

    def __getitem__(self, n: slice) -> Tensor:
        if self._n != n:
            self._n, self._part = n, self._tensor[n].to(self._dtype)
        return self._part


def weights_by_piece(p: Problem) -> Iterator[tuple[Piece, Tensor, Tensor]]:
    """The weights block by block: ``(piece, heads [n, g], weights [n, g, i, j])``.

    The same memory is used for all: take from it what is wanted before the next.
    """
    query, keys = p.by_head(p.query), p.by_key_head(p.key)
    width = compute_dtype(p.query.dtype)
    lse = query.new_empty(query.shape[:3], dtype=width)
    wide_keys = _Wide(keys)
    narrow = replace(p, value=p.value.to(width))  # the dtype that weights come in
    for piece in _pieces(p):
        n, g, i, j = piece
        heads, group, rows, columns = piece.shape
        wide_query = _wide(query[n, g, i].reshape(heads, group * rows, -1))
        products = torch.bmm(wide_query, wide_keys[n][:, j].mT).view(heads, group, rows, columns)
        weights, _ = _forward_by_torch(narrow, products, piece, lse[n, g, i])
        batch, head = _heads_of(p, piece)
        yield piece, batch * p.query.shape[1] + head, weights


def forward(p: Problem, output: Tensor, lse: Tensor) -> None:
    """Fills ``output`` and ``lse``, ``[B, H, Lq, Dv]`` and ``[B, H, Lq]``, of any strides."""
    width = p.value.shape[3]
    query, keys, value = p.by_head(p.query), p.by_key_head(p.key), p.by_key_head(p.value)
    careful = p.hides and may_hide(p.value)
    statistics = lse if lse.is_contiguous() else torch.empty_like(lse, memory_format=_DENSE)
    lse_by_head = statistics.view(query.shape[:3])
    shape = (*query.shape[:3], width)
    results = output.view(shape) if output.is_contiguous() else output.new_empty(shape)
    wide_keys = _Wide(keys)
    for piece in _pieces(p):
        n, g, i, j = piece
        heads, group, rows, columns = piece.shape
        if not columns:
            results[n, g, i] = 0.0
            lse_by_head[n, g, i] = _lse_of_nothing(p, piece)
            continue
        flat = (heads, group * rows, columns)
        wide_query = _wide(query[n, g, i].reshape(heads, group * rows, -1))
        products = torch.bmm(wide_query, wide_keys[n][:, j].mT).view(piece.shape)
        weights, visible = _forward_by_torch(p, products, piece, lse_by_head[n, g, i])
        if careful:
            product = _careful(weights.view(flat), value[n, j], visible.reshape(flat))
        else:
            product = torch.bmm(weights.view(flat), value[n, j])
        results[n, g, i] = product.view(heads, group, rows, width)
    if results.data_ptr() != output.data_ptr():
        output.copy_(results.view(output.shape))
    if statistics is not lse:
        lse.copy_(statistics)


_DENSE = torch.contiguous_format


def _lse_of_nothing(p: Problem, piece: Piece) -> Tensor | float:
    if p.sinks is None:
        return -math.inf
    return p.sinks[_heads_of(p, piece)[1]][..., None]


def backward(
    p: Problem,
    grad_output: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    delta: Tensor | None,
    grads: tuple[Tensor, Tensor, Tensor],
    grad_bias: Tensor | None,
) -> None:
    """Fills the gradients of query, key and value, and adds to that of the bias.

    Args:
        lse, grad_lse: ``[B, H, Lq]``.
        delta: likewise, where the keys are some of those that lse is of; None: it is computed.
        grads: of query, key and value, in their shapes.
        grad_bias: ``[B or 1, H or 1, Lq or 1, Lk or 1]`` in the compute dtype, or None.
    """
    dtype = p.query.dtype
    query, keys, value = p.by_head(p.query), p.by_key_head(p.key), p.by_key_head(p.value)
    grad_by_head = p.by_head(grad_output)
    careful = p.hides and may_hide(p.query, p.key, p.value, grad_output)
    statistics = lse.contiguous()
    lse_by_head = statistics.view(query.shape[:3])
    grad_lse_by_head = None
    if grad_lse is not None:
        grad_lse = grad_lse.to(lse.dtype).contiguous()
        grad_lse_by_head = grad_lse.view(query.shape[:3])
    delta_by_head = None
    if delta is not None:
        delta = delta.contiguous()
        delta_by_head = delta.view(query.shape[:3])
    grad_query = query.new_zeros(query.shape)
    grad_key, grad_value = grads[1].new_zeros(keys.shape), grads[2].new_zeros(value.shape)
    sums = _Sums(p, grad_key, grad_value)
    wide_keys, wide_value = _Wide(keys), _Wide(value)
    for piece in _pieces(p):
        n, g, i, j = piece
        heads, group, rows, columns = piece.shape
        if not columns:
            continue
        flat = (heads, group * rows, columns)
        q = query[n, g, i].reshape(heads, group * rows, -1)
        g_out = grad_by_head[n, g, i].reshape(heads, group * rows, -1)
        products = torch.bmm(_wide(q), wide_keys[n][:, j].mT).view(piece.shape)
        grad = torch.bmm(_wide(g_out), wide_value[n][:, j].mT).view(piece.shape)
        weights, grad, raw, visible = _backward_by_torch(
            p,
            products,
            grad,
            piece,
            lse_by_head[n, g, i],
            None if grad_lse_by_head is None else grad_lse_by_head[n, g, i],
            None if delta_by_head is None else delta_by_head[n, g, i],
        )
        weights, raw = weights.to(dtype), raw.to(dtype)
        if grad_bias is not None:
            _add_bias_gradient(p, grad_bias, grad, piece)
        weights, raw = weights.reshape(flat), raw.reshape(flat)
        if careful:
            visible = visible.reshape(flat)
            product = _careful(raw, keys[n, j], visible)
            sums.add(
                piece, _careful(raw.mT, q, visible.mT), _careful(weights.mT, g_out, visible.mT)
            )
        else:
            product = torch.bmm(raw, keys[n, j])
            sums.multiply(piece, raw, q, weights, g_out)
        torch.mul(product.view(heads, group, rows, -1), p.scale, out=grad_query[n, g, i])
    sums.finish()
    for target, made in zip(grads, (grad_query, grad_key, grad_value), strict=True):
        target.copy_(made.view(target.shape))


class _Sums:
    """Gradients of keys and values, summed over blocks of queries in the compute dtype."""

    def __init__(self, p: Problem, grad_key: Tensor, grad_value: Tensor) -> None:
        self._grad_key, self._grad_value, self._scale = grad_key, grad_value, p.scale
        self._n: slice | None = None
        self._key: Tensor = grad_key
        self._value: Tensor = grad_value

    def _at(self, n: slice) -> None:
        if self._n == n:
            return
        self.finish()
        self._n = n
        dtype = compute_dtype(self._grad_key.dtype)
        self._key = self._grad_key.new_zeros(self._grad_key[n].shape, dtype=dtype)
        self._value = self._grad_value.new_zeros(self._grad_value[n].shape, dtype=dtype)

    def add(self, piece: Piece, key: Tensor, value: Tensor) -> None:
        self._at(piece.n)
        self._key[:, piece.j] += key
        self._value[:, piece.j] += value

    def multiply(
        self, piece: Piece, raw: Tensor, query: Tensor, weights: Tensor, grad_output: Tensor
    ) -> None:
        """Adds ``raw^T @ query`` and ``weights^T @ grad_output``."""
        self._at(piece.n)
        for total, left, right in (
            (self._key[:, piece.j], raw, query),
            (self._value[:, piece.j], weights, grad_output),
        ):
            if total.dtype == left.dtype:
                torch.baddbmm(total, left.mT, right, out=total)
            else:
                total.add_(torch.bmm(left.mT, right))

    def finish(self) -> None:
        """Round what has been summed."""
        if self._n is not None:
            self._grad_key[self._n] = (self._key * self._scale).to(self._grad_key.dtype)
            self._grad_value[self._n] = self._value.to(self._grad_value.dtype)


def _add_bias_gradient(p: Problem, grad_bias: Tensor, grad: Tensor, piece: Piece) -> None:
    """Adds a piece's gradient, summed over the dimensions along which the bias is one."""
    if grad_bias.shape[2] == 1:
        grad = grad.sum(2, keepdim=True)
    if grad_bias.shape[3] == 1:
        grad = grad.sum(3, keepdim=True)
    i = slice(0, 1) if grad_bias.shape[2] == 1 else piece.i
    j = slice(0, 1) if grad_bias.shape[3] == 1 else piece.j
    batch, head = _heads_of(p, piece)
    for n, g in ((n, g) for n in range(batch.shape[0]) for g in range(batch.shape[1])):
        b = 0 if grad_bias.shape[0] == 1 else int(batch[n, g])
        h = 0 if grad_bias.shape[1] == 1 else int(head[n, g])
        grad_bias[b, h, i, j] += grad[n, g]
