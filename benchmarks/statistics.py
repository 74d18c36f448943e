"""What samples say: medians, spread, ratios taken pair by pair, and the noise around them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

#: One number a round, in fp64.
Samples = torch.Tensor

#: p80 - p20 of a normal distribution, in standard deviations.
_SPREAD = 1.683


@dataclass(frozen=True)
class Summary:
    """Median, 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


def summarise(samples: Samples) -> Summary:
    quantiles = torch.quantile(samples, torch.tensor([0.2, 0.5, 0.8], dtype=samples.dtype))
    p20, median, p80 = quantiles.tolist()
    return Summary(median, p20, p80)


def ratio(numerator: Samples, denominator: Samples) -> Summary:
    """Of samples taken in turn: what slows both (a neighbour, the clock) cancels in each pair."""
    return summarise(numerator / denominator)


def noise(paired: Summary, floor: Summary, count: int) -> float:
    """How far a ratio's median can be off, relative: a change below this is no news.

    Args:
        paired: the ratio in question.
        floor: the ratio of the baseline to itself; its distance from 1 is what the set-up gets
            wrong however long it measures.
        count: how many pairs there are. Three standard errors of a median, 1.25 sigma / sqrt(n).
    """
    sigma = (paired.p80 - paired.p20) / _SPREAD / paired.median
    return abs(floor.median - 1) + 3 * 1.25 * sigma / math.sqrt(count)
