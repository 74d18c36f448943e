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
        Candidate("torch", _by_reference),
        Candidate("reference", _by_reference),
    ),
)
