"""The error rule: a kernel may err twice as far from the truth as torch's own op in the same dtype.

The truth is the same computation in fp64 on the same (rounded) inputs. Fixed tolerances either hide
a bug at one size or fail good code at another; torch's own error moves with dtype, size and
conditioning just as ours does, so the ratio of the two is what is bounded.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: The largest ratio that passes, of the largest error and of the RMS error alike.
BOUND = 2.0


class MismatchError(AssertionError):
    """A result differs from torch's in a way no tolerance covers: shape, dtype, NaN or Inf."""


def error_ratio(
    ours: Tensor, torch_same_dtype: Tensor, oracle: Tensor, *, summed: int = 1
) -> tuple[float, float]:
    r"""How far ``ours`` is from the oracle, in units of torch's own distance from it.

    .. math::
        \mathrm{max\_ratio} = \max_i \frac{|o_i - r_i|}{\max(\max_j |t_j - r_j|,\ f_i)}, \qquad
        \mathrm{rms\_ratio} = \frac{\mathrm{rms}(o - r)}{\max(\mathrm{rms}(t - r),\
        \mathrm{rms}(f) / 2)}

    with ours :math:`o`, torch :math:`t`, oracle :math:`r`. The floor :math:`f` stands for what any
    correct kernel may do where torch happens to be exact: half an ulp of the result's dtype for the
    last rounding, 2 ulps of the arithmetic (fp32, or fp64 for fp64) for what comes before it, and
    :math:`\sqrt{n} / 2` ulps of the arithmetic for a sum of ``n`` terms (the partial sums of random
    terms grow as :math:`\sqrt{k}`, so their rounding errors add up to :math:`\sqrt{n}` ulps of the
    result); an ulp is taken at :math:`\max(|r_i|, \mathrm{rms}(r))`, as a small element can be the
    difference of large terms.

    A result passes when both ratios are at most :data:`BOUND`, 2: then its error is at most twice
    torch's, or within 1 ulp of the dtype and a few of the arithmetic.

    Args:
        ours: the kernel's result.
        torch_same_dtype: torch's own result for the same inputs in the same dtype.
        oracle: the same computed in fp64.
        summed: how many terms a summed result has: the number of rows for a weight's gradient.

    Returns:
        ``(max_ratio, rms_ratio)``; 0 for an empty tensor; infinite where ours is NaN or Inf and
        torch is not, or the other way round (where torch overflows and the truth does not, ours
        may have the finite truth).

    Raises:
        MismatchError: the shapes or dtypes differ.
    """
    if ours.shape != torch_same_dtype.shape or ours.shape != oracle.shape:
        raise MismatchError(
            f"shape {list(ours.shape)}, torch's {list(torch_same_dtype.shape)}, "
            f"the oracle's {list(oracle.shape)}"
        )
    if ours.dtype != torch_same_dtype.dtype:
        raise MismatchError(f"dtype {ours.dtype}, torch's {torch_same_dtype.dtype}")
    if not ours.numel():
        return 0.0, 0.0
    ours, theirs, oracle = (t.detach() for t in (ours, torch_same_dtype, oracle))
    if not all(bool(tensor.isfinite().all()) for tensor in (ours, theirs, oracle)):
        if not _same_specials(ours, theirs, oracle):
            return math.inf, math.inf
        counted = ours.isfinite() & oracle.isfinite()
        if not counted.any():
            return 0.0, 0.0
        ours, theirs, oracle = ours[counted], theirs[counted], oracle[counted]
    truth = oracle.double()
    error = (ours.double() - truth).abs_()
    torch_error = (theirs.double() - truth).abs_().nan_to_num_(posinf=0.0)
    result_ulp = torch.finfo(ours.dtype).eps
    arithmetic_ulp = torch.finfo(_arithmetic(ours.dtype)).eps
    floor_ulps = result_ulp / 2 + arithmetic_ulp * (2 + math.sqrt(summed) / 2)
    scale = truth.abs().clamp_min(_rms(truth))
    # Never 0: where truth and all errors are 0 the ratio is 0, not NaN.
    tiny = torch.finfo(ours.dtype).tiny
    floor = (floor_ulps * scale).clamp_min(tiny)
    largest = float((error / floor.clamp_min(float(torch_error.max()))).max())
    typical = _rms(error) / max(_rms(torch_error), _rms(floor) / 2, tiny)
    return largest, typical


def assert_as_good_as_torch(
    ours: Tensor,
    torch_same_dtype: Tensor,
    oracle: Tensor,
    *,
    summed: int = 1,
    name: str = "result",
) -> None:
    """Assert that ``ours`` is as near the truth as the contract asks: see :func:`error_ratio`.

    Args:
        ours, torch_same_dtype, oracle, summed: as :func:`error_ratio`.
        name: what the tensor is called in the message.

    Raises:
        MismatchError: it is not; the message has both ratios, and where the largest error is.
    """
    try:
        largest, typical = error_ratio(ours, torch_same_dtype, oracle, summed=summed)
    except MismatchError as mismatch:
        raise MismatchError(f"{name}: {mismatch}") from None
    if largest <= BOUND and typical <= BOUND:
        return
    error = (ours.detach().double() - oracle.double()).abs().nan_to_num(math.inf, math.inf)
    worst = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    raise MismatchError(
        f"{name}: error {largest:.3g} x torch's at most and {typical:.3g} x in RMS, "
        f"where {BOUND:g} is allowed; farthest off at {worst}: {ours[worst].item()!r}, "
        f"torch {torch_same_dtype[worst].item()!r}, truth {oracle[worst].item()!r}"
    )


def _same_specials(ours: Tensor, theirs: Tensor, oracle: Tensor) -> bool:
    """Whether NaN and Inf stand where torch has them, or where torch has them in error."""
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    both_finite = ours.isfinite() & theirs.isfinite()
    truly_finite = ours.isfinite() & oracle.to(ours.dtype).isfinite()
    return bool((same | both_finite | truly_finite).all())


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rms(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.double())) / math.sqrt(tensor.numel())
