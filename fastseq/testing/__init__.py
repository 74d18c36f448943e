"""How fastseq judges a kernel: the error rule, and the cases every operator is held to.

``fastseq verify``, the benchmarks' gate and the tests share what is here.
"""

from .errors import (
    BOUND,
    MismatchError,
    assert_as_good_as_torch,
    error_ratio,
)

__all__ = [
    "BOUND",
    "MismatchError",
    "assert_as_good_as_torch",
    "error_ratio",
]
