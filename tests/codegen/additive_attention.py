"""The additive_attention calls whose kernels are compiled and measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from fastseq.kernels import additive_attention

#: [batch, queries, keys, hidden]: every tile of scores_launch.
SHAPES = ((2, 1, 512, 256), (2, 512, 512, 256), (1, 512, 20, 256), (1, 20, 512, 256))


def _scores(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    batch, queries, keys, hidden = shape
    query, key = (torch.zeros(batch, length, hidden, dtype=dtype) for length in (queries, keys))
    additive_attention.scores(query, key, torch.ones(hidden))


def _gradients(transposed: bool, fine: bool) -> None:
    numbers = torch.zeros(2, 256, 512)
    factors = additive_attention.Factors(numbers, numbers)
    direct = torch.zeros(2, dtype=torch.int32)
    additive_attention.sum_gradients(
        factors, factors, torch.zeros(2, 512, 512), torch.ones(256), direct, transposed, fine
    )


def cases(full: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """(label, call): the kernels read fp32 whatever the inputs' dtype is, which says how exactly
    they compute."""
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for shape in SHAPES if full else SHAPES[:2]:
            size = " x ".join(str(n) for n in shape)
            yield f"additive_attention scores {name} {size}", partial(_scores, shape, dtype)
        for of, transposed in (("queries", False), ("keys", True)):
            label = f"additive_attention gradients {name} of {of}"
            yield label, partial(_gradients, transposed, name == "fp32")


def expects(kernel: str, label: str) -> set[str]:
    """Nothing: a row of a tile is read by single numbers, side by side for the lanes of a warp."""
    return set()
