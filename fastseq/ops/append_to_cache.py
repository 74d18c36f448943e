"""The op that appends to a key/value cache: schema, fake, candidates. It has no gradient.

The public function is in ``fastseq/functional/append_to_cache.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import Candidate
from ..reference import attention as reference
from ._op import define_op

_SCHEMA = """_append_to_cache(
    Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor key, Tensor value, Tensor lengths
) -> Tensor"""


class Append(NamedTuple):
    """The arguments; see :func:`fastseq.functional.append_to_cache`."""

    key_cache: Tensor
    value_cache: Tensor
    key: Tensor
    value: Tensor
    lengths: Tensor


def _new_lengths(a: Append) -> Tensor:
    """Uninitialised; the fake's too."""
    return torch.empty_like(a.lengths, memory_format=torch.contiguous_format)


def _by_triton(a: Append) -> Tensor:
    from ..kernels import append_to_cache  # here, not above: without Triton the rest still works

    lengths = _new_lengths(a)
    key, value = (t if t.stride(3) == 1 else t.contiguous() for t in (a.key, a.value))
    append_to_cache.append(*a[:2], key, value, a.lengths.contiguous(), lengths)
    return lengths


#: Tokens from which entries of different lengths are copied one by one: a slice takes 3 us,
#: indexing 6 for all entries but longer for every number.
_MANY_TOKENS = 32


def _by_torch(a: Append) -> Tensor:
    """On the CPU, where lengths can be looked at: slices where they serve, else indexing."""
    if not a.lengths.is_cpu:
        return reference.append_to_cache(*a)
    lengths, room, new = a.lengths.tolist(), a.key_cache.shape[2], a.key.shape[2]
    least, most = min(lengths, default=0), max(lengths, default=0)
    if not new or least < 0 or most + new > room:
        return reference.append_to_cache(*a)
    pairs = ((a.key_cache, a.key), (a.value_cache, a.value))
    if least == most:
        for cache, rows in pairs:
            cache.narrow(2, least, new).copy_(rows)
    elif new >= _MANY_TOKENS:
        for cache, rows in pairs:
            for part, length, its in zip(cache.unbind(), lengths, rows.unbind(), strict=True):
                part.narrow(1, length, new).copy_(its)
    else:
        entry, at = torch.arange(len(lengths)), a.lengths.long()
        if new > 1:
            entry, at = entry[:, None], at[:, None] + torch.arange(new)
        for cache, rows in pairs:
            its = rows.transpose(1, 2).to(cache.dtype)
            cache.transpose(1, 2).index_put_((entry, at), its if new > 1 else its.squeeze(1))
    return a.lengths + new


def _by_reference(a: Append) -> Tensor:
    return reference.append_to_cache(*a)


def _triton_rejects(a: Append) -> str | None:
    if torch.float64 in (a.key.dtype, a.key_cache.dtype):
        return "no fp64 kernel"
    if not (a.key.numel() and a.value.numel() and a.key_cache.numel()):
        return "nothing to move"
    if a.key_cache.stride(3) != 1 or a.value_cache.stride(3) != 1:
        return "rows of the caches do not lie side by side"
    return None


append_op = define_op(
    _SCHEMA,
    Append,
    _new_lengths,
    (
        Candidate("triton", _by_triton, _triton_rejects),
        Candidate("torch", _by_torch),
        Candidate("reference", _by_reference),
    ),
)
