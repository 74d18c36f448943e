"""Attention over a sequence that is spread over processes: each holds its part, none the whole.

Queries stay where they are. Keys and values go round the ring of processes, and each attends to the
part that is with it while the next is on its way; what the parts give is merged by their lse. In
backward keys and values go round once more, and their gradients with them, so that no process ever
holds more than a few parts: memory O(L / processes).

Everything else of a Transformer works on rows, or sums over them: norms, feed-forward, positions
and losses run on a part as on the whole (a mean over the sequence is an ``all_reduce``).

**Layout.** Causal attention gives the last queries most work and the first next to none. So a
sequence is cut into 2R chunks for R processes, of which process r has the chunks r and 2R - 1 - r,
one behind the other. Then at every step each process has the same work, half of the pairs of its
queries and the keys that are there, and what is masked is never computed::

    4 processes, chunks   0 1 2 3 4 5 6 7
    of process            0 1 2 3 3 2 1 0

:func:`split_sequence` cuts anything that has a length so (tokens, targets, position numbers), and
:func:`join_sequence` puts parts together again. Without a causal mask any other cut will do.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .functional._dispatch import is_foreign, is_transformed, records_gradient
from .functional.attention import autocast, prepared
from .ops.attention import Forward, backward_op, delta_of, forward_op

Group = Any  # dist.ProcessGroup, which a torch built without distributed has not


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group: Group = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attention of this process's queries to the keys and values of all processes of a group.

    .. math:: o_i = \sum_j e^{s_{ij} - \mathrm{lse}_i} v_j, \qquad
              s_{ij} = \mathrm{cap}(\mathrm{scale} \cdot q_i \cdot k_j)

    over all j, or with ``causal`` the j up to i in the whole sequence: what
    :func:`fastseq.functional.attention` gives, of which each process has its rows.

    It is a collective: every process of the group calls it, and backward through it, in the same
    order, with parts of one shape and dtype, the same options and the same ``requires_grad``.
    ``TORCH_DISTRIBUTED_DEBUG=INFO`` checks the shapes and options at every call, where otherwise
    processes that disagree wait for each other.

    Args:
        query: ``[*, H, Lq / R, D]``, this process's part for R processes; fp32, fp64, fp16 or bf16.
        key: ``[*, Hk, Lk / R, D]``; H is a multiple of Hk, as in ``attention``.
        value: ``[*, Hk, Lk / R, Dv]``.
        group: the process group; None is the default one.
        causal: query i sees the keys up to i. The parts are those of :func:`split_sequence`.
        scale: None means :math:`1 / \sqrt{D}`.
        softcap: bound of the scores, :math:`\mathrm{cap}(x) = c \tanh(x / c)`; None: none.
        return_lse: return ``(output, lse)``.

    Returns:
        ``[*, H, Lq / R, Dv]`` in the query's dtype, merged in fp32 (fp64 for fp64) and rounded
        once more; and with ``return_lse`` the logarithm of the sums, ``[*, H, Lq / R]``. Both are
        differentiable, once. Gradients of keys and values travel in fp32.

    Each process sends and receives the key and value parts R - 1 times forward and as often in
    backward, and their gradients R times, while it computes on those it has.

    Raises:
        ValueError: ``softcap`` is not positive; this process is not in ``group``.
        RuntimeError: there is no process group; shapes, dtypes or devices do not fit each other;
            ``causal``, and queries and keys differ in length or it is odd; ``torch.func``
            transforms, forward-mode AD or tensor subclasses (give DTensors' ``to_local()``).
        NotImplementedError: the inputs are not floating point.

    Source: Liu, Zaharia & Abbeel, "Ring Attention with Blockwise Transformers for Near-Infinite
    Context", 2023; the layout: Brandon et al., "Striped Attention", 2023, and Zhu,
    "ring-flash-attention" (zigzag), 2024.

    Example, in each of R processes, of query, key and value ``[B, H, L, D]``::

        q, k, v = (split_sequence(tensor, 2) for tensor in (query, key, value))
        part = ring_attention(q, k, v, causal=True)  # [B, H, L / R, D]
        whole = join_sequence(part, 2)  # [B, H, L, D]
    """
    name = "ring_attention"
    ring = _Ring(name, group)
    if is_foreign(query, key, value) or is_transformed():
        raise RuntimeError(
            f"{name}: query, key and value must be plain tensors outside torch.func transforms and "
            f"forward-mode AD, got {', '.join(type(t).__name__ for t in (query, key, value))}"
        )
    query, key, value, _ = autocast(query, key, value, None)
    arguments, leading = prepared(name, query, key, value, scale=scale, softcap=softcap)
    if causal and query.shape[-2] != key.shape[-2]:
        raise RuntimeError(
            f"{name}: key must have the query's length {query.shape[-2]} where causal, "
            f"got {key.shape[-2]}"
        )
    if causal and query.shape[-2] % 2:
        raise RuntimeError(
            f"{name}: query must be two chunks of one length where causal (see split_sequence), "
            f"got an odd length {query.shape[-2]}"
        )
    if dist.get_debug_level() != dist.DebugLevel.OFF:  # type: ignore[attr-defined]
        ring.check_same(name, arguments, causal)
    if records_gradient(query, key, value):
        output, lse = _RingAttention.apply(  # type: ignore[no-untyped-call]
            *arguments[:3], arguments[3:], ring, causal
        )
    else:
        output, lse = _forward(arguments, ring, causal)
    if len(leading) != 1:
        output = output.reshape(*leading, *output.shape[1:])
        lse = lse.reshape(*leading, *lse.shape[1:])
    return (output, lse) if return_lse else output


def split_sequence(tensor: Tensor, dim: int, group: Group = None) -> Tensor:
    """This process's part of a sequence that every process has: chunks r and 2R - 1 - r of 2R.

    Args:
        tensor: anything with the sequence along ``dim``, of a length that 2R divides (pad it).
        dim: the dimension of the sequence.
        group: the process group; None is the default one.

    Returns:
        A new tensor of 1 / R the length. Differentiable: the gradient of a tensor that all
        processes have is the sum of theirs, to be had by an ``all_reduce``.

    Raises:
        ValueError: the length is not a multiple of 2R; this process is not in ``group``.
        RuntimeError: there is no process group.
    """
    ring = _Ring("split_sequence", group)
    length = tensor.shape[dim]
    if length % (2 * ring.size):
        raise ValueError(
            f"split_sequence: tensor must have a length that {2 * ring.size} (twice the number of "
            f"processes) divides along dim {dim}, got {length}"
        )
    chunk = length // (2 * ring.size)
    starts = ring.rank * chunk, (2 * ring.size - 1 - ring.rank) * chunk
    return torch.cat([tensor.narrow(dim, start, chunk) for start in starts], dim)


def join_sequence(tensor: Tensor, dim: int, group: Group = None) -> Tensor:
    """The whole sequence of the parts that :func:`split_sequence` gives, in every process.

    It holds all of it, so it is for results, not for training; and it has no gradient.

    Args:
        tensor: this process's part; of one shape in all processes.
        dim: the dimension of the sequence.
        group: the process group; None is the default one.

    Raises:
        ValueError: the part has an odd length; this process is not in ``group``.
        RuntimeError: there is no process group.
    """
    ring = _Ring("join_sequence", group)
    if tensor.shape[dim] % 2:
        raise ValueError(
            f"join_sequence: tensor must be two chunks of one length along dim {dim}, "
            f"got an odd length {tensor.shape[dim]}"
        )
    part = tensor.detach().contiguous()
    parts = [torch.empty_like(part) for _ in range(ring.size)]
    dist.all_gather(parts, part, group=group)
    early, late = zip(*(p.chunk(2, dim) for p in parts), strict=True)
    return torch.cat([*early, *reversed(late)], dim)


# --- the ring ------------------------------------------------------------------------------------


class _Passing(NamedTuple):
    """A message on its way round. What is sent has to live as long as this."""

    sent: Tensor
    received: Tensor
    works: list[Any]

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.received


class _Ring:
    """The processes of a group in the order of their ranks, the first behind the last."""

    def __init__(self, name: str, group: Group) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                f"{name}: group must be a process group, but there is none: call "
                "torch.distributed.init_process_group first"
            )
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError(f"{name}: group must have this process in it, rank {dist.get_rank()}")

    def shift(self, message: Tensor, tag: int) -> _Passing:
        """Sends to the next process and receives the like from the one before, without waiting.

        All processes do this in the same order, so nobody waits for a message that is behind one
        that waits; tags keep two kinds of messages apart on backends that have them.
        """
        if self.size == 1:
            return _Passing(message, message, [])
        received = torch.empty_like(message)
        following, previous = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        both = [
            dist.P2POp(dist.isend, message, group=self.group, tag=tag, group_peer=following),
            dist.P2POp(dist.irecv, received, group=self.group, tag=tag, group_peer=previous),
        ]
        return _Passing(message, received, dist.batch_isend_irecv(both))

    def owner(self, step: int) -> int:
        """Whose keys and values are here after so many shifts."""
        return (self.rank - step) % self.size

    def check_same(self, name: str, a: Forward, causal: bool) -> None:
        """Raises in every process if they do not all have the same shapes and options."""
        mine = {
            "query": (list(a.query.shape), str(a.query.dtype)),
            "key": list(a.key.shape),
            "value": list(a.value.shape),
            "causal, scale, softcap": (causal, a.scale, a.softcap),
            "requires_grad": [t.requires_grad for t in (a.query, a.key, a.value)],
        }
        everyones: list[Any] = [None] * self.size
        dist.all_gather_object(everyones, mine, group=self.group)
        for argument in mine:
            given = [theirs[argument] for theirs in everyones]
            if any(other != given[0] for other in given):
                raise RuntimeError(
                    f"{name}: {argument} must be the same in all processes, got {given}"
                )


_KEYS, _GRADIENTS = 0, 1  # tags


def _packed(key: Tensor, value: Tensor) -> Tensor:
    """Both as one message."""
    return torch.cat([key.reshape(-1), value.reshape(-1)])


def _unpacked(message: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Views of the message in the shapes of key and value."""
    parts = message.split([key.numel(), value.numel()])
    return parts[0].view(key.shape), parts[1].view(value.shape)


# --- the parts -----------------------------------------------------------------------------------


class _Seen(NamedTuple):
    """Which of the local queries see which of the keys that are here, all of them or causally."""

    i: slice
    j: slice
    window_right: int


def _seen(a: Forward, ring: _Ring, step: int, causal: bool) -> _Seen:
    """The layout's arithmetic: chunk r sees the chunks before it, chunk 2R - 1 - r those and more.

    Of an earlier process's two chunks all queries see the first, and none the second; of a later
    one's the queries of the second chunk see both.
    """
    owner, everything = ring.owner(step), slice(None)
    if not causal or owner == ring.rank:
        return _Seen(everything, everything, 0 if causal else -1)
    if owner < ring.rank:
        return _Seen(everything, slice(0, a.key.shape[2] // 2), -1)
    return _Seen(slice(a.query.shape[2] // 2, None), everything, -1)


def _cut(a: Forward, seen: _Seen, key: Tensor, value: Tensor) -> Forward:
    return a._replace(
        query=a.query[:, :, seen.i],
        key=key[:, :, seen.j],
        value=value[:, :, seen.j],
        window_right=seen.window_right,
    )


def _merge(output: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Attention to the keys of both, in place of the first."""
    weight = torch.sigmoid(other_lse - lse).masked_fill_(other_lse == -math.inf, 0.0)
    output.lerp_(other.to(output.dtype), weight[..., None])
    lse.copy_(torch.logaddexp(lse, other_lse))


def _forward(a: Forward, ring: _Ring, causal: bool) -> tuple[Tensor, Tensor]:
    message = _packed(a.key, a.value)
    output = lse = message
    for step in range(ring.size):
        last = step == ring.size - 1
        passing = None if last else ring.shift(message, _KEYS)  # while this part is attended to
        seen = _seen(a, ring, step, causal)
        made, made_lse = forward_op(*_cut(a, seen, *_unpacked(message, a.key, a.value)))
        if step == 0:
            output, lse = made.to(made_lse.dtype), made_lse
        else:
            _merge(output[:, :, seen.i], lse[:, :, seen.i], made, made_lse)
        if passing is not None:
            message = passing.wait()
    return output.to(a.query.dtype), lse


class _RingAttention(torch.autograd.Function):
    """Saves this process's part of the inputs, output and lse."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: tuple[Any, ...],
        ring: _Ring,
        causal: bool,
    ) -> tuple[Tensor, Tensor]:
        output, lse = _forward(Forward(query, key, value, *options), ring, causal)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.options, ctx.ring, ctx.causal = options, ring, causal
        ctx.set_materialize_grads(False)
        return output, lse

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        if grad_output is None:
            grad_output = torch.zeros_like(output)
        a = Forward(query, key, value, *ctx.options)
        wanted = ctx.needs_input_grad[:3]
        results = (grad_output, grad_lse, output, lse)
        made = _backward(a, ctx.ring, ctx.causal, *results, key_gradients=any(wanted[1:]))
        grads = (grad if want else None for grad, want in zip(made, wanted, strict=True))
        return *grads, None, None, None


def _backward(
    a: Forward,
    ring: _Ring,
    causal: bool,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    output: Tensor,
    lse: Tensor,
    *,
    key_gradients: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of this process's queries, keys and values.

    The sums for a part of the keys travel one step behind them: a process adds its own while they
    are on the way to it, and they have gone all the way round when they are back.
    """
    delta = delta_of(grad_output, grad_lse, output, lse)
    grad_query = torch.zeros_like(a.query, dtype=lse.dtype)
    message = _packed(a.key, a.value)
    sums: _Passing | None = None
    for step in range(ring.size):
        last = step == ring.size - 1
        passing = None if last else ring.shift(message, _KEYS)
        seen = _seen(a, ring, step, causal)
        part = _cut(a, seen, *_unpacked(message, a.key, a.value))
        *rows, part_of_delta = (
            None if tensor is None else tensor[:, :, seen.i].contiguous()
            for tensor in (grad_output, grad_lse, output, lse, delta)
        )
        made = backward_op(*part, *rows, False, part_of_delta)
        grad_query[:, :, seen.i] += made[0]
        if key_gradients:
            total = (
                message.new_zeros(message.shape, dtype=lse.dtype) if sums is None else sums.wait()
            )
            grad_key, grad_value = _unpacked(total, a.key, a.value)
            grad_key[:, :, seen.j] += made[1]
            grad_value[:, :, seen.j] += made[2]
            sums = ring.shift(total, _GRADIENTS)
        if passing is not None:
            message = passing.wait()
    if sums is None:
        return grad_query.to(a.query.dtype), None, None
    grad_key, grad_value = _unpacked(sums.wait(), a.key, a.value)
    dtype = a.query.dtype
    return grad_query.to(dtype), grad_key.to(dtype), grad_value.to(dtype)
