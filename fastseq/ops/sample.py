"""The sampling op: a class for every row of logits, drawn in one read of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import Candidate
from ..reference import cross_entropy as reference
from ..rows import as_rows
from ._op import define_op, extension_op

_extension_sample = extension_op("sample")

_SAMPLE = "_sample(Tensor logits, Tensor seed, int first_row, float temperature) -> Tensor tokens"


class Sample(NamedTuple):
    """The arguments of the op: logits ``[*, classes]``, ``seed`` int64 ``[1]`` beside them."""

    logits: Tensor
    seed: Tensor
    first_row: int
    temperature: float


def _output(a: Sample) -> Tensor:
    return a.logits.new_empty(a.logits.shape[:-1], dtype=torch.int64)


def _by_extension(a: Sample) -> Tensor:
    tokens: Tensor = _extension_sample(
        as_rows(a.logits, a.logits.shape[-1]), a.seed, a.first_row, a.temperature
    )
    return tokens.view(a.logits.shape[:-1])


def _by_triton(a: Sample) -> Tensor:
    from ..kernels import cross_entropy

    tokens = _output(a)
    if tokens.numel():
        rows = as_rows(a.logits, a.logits.shape[-1])
        classes = a.logits.shape[-1]
        cross_entropy.sample(rows, a.seed, tokens, classes, a.first_row, a.temperature)
    return tokens


def _by_reference(a: Sample) -> Tensor:
    rows = a.logits.reshape(-1, a.logits.shape[-1])
    return reference.sample(rows, a.seed, a.first_row, a.temperature).view(a.logits.shape[:-1])


def _fp64_rejects(a: Sample) -> str | None:
    return "no fp64 kernel" if a.logits.dtype == torch.float64 else None


sample_op = define_op(
    _SAMPLE,
    Sample,
    _output,
    (
        Candidate("cpu", _by_extension, _fp64_rejects),
        Candidate("triton", _by_triton, _fp64_rejects),
        Candidate("reference", _by_reference),
    ),
)
