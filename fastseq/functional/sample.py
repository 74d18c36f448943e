"""sample."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops.sample import sample_op
from ._dispatch import FLOATING


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    seed: Tensor | None = None,
    first_row: int = 0,
) -> Tensor:
    r"""Draws the next token of every row from ``softmax(logits / temperature)``.

    By the Gumbel-max trick: the largest :math:`x_j / T - \log E_j`, with independent exponential
    variables :math:`E_j`, has class :math:`j` with the probability that softmax gives it. So one
    read of the logits does it all, and no probabilities are stored; ``top_k`` and ``top_p`` cost a
    selection or a sort first.

    :math:`E_j` is a function of a seed, the number of the row and the class, and of nothing else.
    Rows are numbered from ``first_row`` on in the order of the leading dimensions. So a batch that
    is cut in parts gives the same tokens, when all have the same ``seed`` and each its
    ``first_row``; and ``generator`` in the same state gives the same tokens on every call.

    Args:
        logits: ``[*, classes]``; fp32, fp64, fp16 or bf16; any strides. -Inf excludes a class.
        temperature: above 0; towards 0 the largest logit wins.
        top_k: draw from the so many largest logits of a row only (more are drawn from where equal
            logits stand at the border); more than there are classes means all.
        top_p: then draw only from the fewest classes whose probabilities sum to at least this,
            in (0, 1].
        generator: where the seed comes from; None means torch's own of the logits' device.
        seed: int64 ``[1]`` on the logits' device, instead of one from a generator.
        first_row: the number of the first row, at least 0.

    Returns:
        Class indices, int64 ``[*]``; -1 for a row without a logit above -Inf. Not differentiable.

    Raises:
        ValueError: temperature, top_k, top_p or first_row out of range; generator and seed both.
        RuntimeError: logits without classes; a seed of another shape, dtype or device.
        NotImplementedError: logits are not floating point.

    Source: Gumbel-max: Maddison, Tarlow & Minka, "A* Sampling", 2014, section 2; top-p: Holtzman et
    al., "The Curious Case of Neural Text Degeneration", 2020, section 3.1.
    """
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"sample: temperature must be positive and finite, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"sample: top_k must be at least 1, or None, got {top_k}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"sample: top_p must be in (0, 1], or None, got {top_p}")
    if first_row < 0:
        raise ValueError(f"sample: first_row must be at least 0, got {first_row}")
    if not logits.dim() or not logits.shape[-1]:
        raise RuntimeError(f"sample: logits must be [*, classes], got shape {list(logits.shape)}")
    if logits.dtype not in FLOATING:
        raise NotImplementedError(
            f"sample: logits must be fp32, fp64, fp16 or bf16, got {logits.dtype}"
        )
    logits = logits.detach()
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, -1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p is not None and top_p < 1.0:
        logits = _nucleus(logits, temperature, top_p)
    return sample_op(  # type: ignore[no-any-return]
        logits, _seed(logits, generator, seed), first_row, float(temperature)
    )


def _nucleus(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """-Inf wherever more probable classes sum to ``top_p`` already."""
    ordered, order = torch.sort(logits, dim=-1, descending=True, stable=True)
    probability = torch.softmax(
        ordered.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, -1
    )
    before = probability.cumsum(-1) - probability
    beyond = (before >= top_p).scatter(-1, order, before >= top_p)
    beyond.scatter_(-1, order[..., :1], False)
    return logits.masked_fill(beyond, -torch.inf)


def _seed(logits: Tensor, generator: torch.Generator | None, seed: Tensor | None) -> Tensor:
    if seed is None:
        device = logits.device if generator is None else generator.device
        drawn = torch.randint(
            -(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device, generator=generator
        )
        return drawn.to(logits.device)
    if generator is not None:
        raise ValueError("sample: generator and seed must not both be given")
    if seed.shape != (1,) or seed.dtype != torch.int64 or seed.device != logits.device:
        raise RuntimeError(
            f"sample: seed must be int64 [1] on the logits' device {logits.device}, "
            f"got {seed.dtype} {list(seed.shape)} on {seed.device}"
        )
    return seed
