"""The error rule: a kernel may err twice as far from the truth as torch's own op in the same dtype.

The truth is the same computation in fp64 on the same (rounded) inputs. Fixed tolerances either hide
a bug at one size or fail good code at another; torch's own error moves with dtype, size and
conditioning just as ours does, so the ratio of the two is what is bounded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

#: The largest ratio that passes, of the largest error and of the RMS error alike.
BOUND = 2.0
#: Numbers of a part: on a CPU few enough for one core and its cache, on a GPU enough for a launch.
_PART, _PART_ON_GPU = 2**14, 2**24


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
    ours, theirs, oracle = (t.detach().reshape(-1) for t in (ours, torch_same_dtype, oracle))
    # A part at a time: whole tensors in fp64 would take several times as long as what made them.
    size = _PART_ON_GPU if ours.is_cuda else _PART
    parts = [tensor.split(size) for tensor in (ours, theirs, oracle)]
    if not all(bool(part.isfinite().all()) for part in chain(*parts)):
        if not _same_specials(ours, theirs, oracle):
            return math.inf, math.inf
        counted = ours.isfinite() & oracle.isfinite()
        if not counted.any():
            return 0.0, 0.0
        parts = [tensor[counted].split(size) for tensor in (ours, theirs, oracle)]
    result_ulp = torch.finfo(ours.dtype).eps
    arithmetic_ulp = torch.finfo(_arithmetic(ours.dtype)).eps
    floor_ulps = result_ulp / 2 + arithmetic_ulp * (2 + math.sqrt(summed) / 2)
    return _ratios(*parts, floor_ulps=floor_ulps)


def _ratios(
    ours: Sequence[Tensor],
    theirs: Sequence[Tensor],
    oracle: Sequence[Tensor],
    *,
    floor_ulps: float,
) -> tuple[float, float]:
    """The largest ratio and that of the RMS, of flat tensors in parts."""
    root = math.sqrt(sum(part.numel() for part in ours))
    truth_norm = torch_norm = torch_largest = 0.0
    for other, exact in zip(theirs, oracle, strict=True):
        true = exact.double()
        torch_error = (other.double() - true).abs_().nan_to_num_(posinf=0.0)
        truth_norm = math.hypot(truth_norm, _norm(true))
        torch_norm = math.hypot(torch_norm, _norm(torch_error))
        torch_largest = max(torch_largest, float(torch_error.amax()))
    # Never 0: where truth and all errors are 0 the ratio is 0, not NaN.
    tiny = torch.finfo(ours[0].dtype).tiny
    largest = error_norm = floor_norm = 0.0
    for one, exact in zip(ours, oracle, strict=True):
        true = exact.double()
        error = (one.double() - true).abs_()
        floor = true.abs().clamp_min_(truth_norm / root).mul_(floor_ulps).clamp_min_(tiny)
        error_norm = math.hypot(error_norm, _norm(error))
        floor_norm = math.hypot(floor_norm, _norm(floor))
        largest = max(largest, float(error.div_(floor.clamp_min_(torch_largest)).amax()))
    return largest, error_norm / max(torch_norm, floor_norm / 2, tiny * root)


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor))


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
