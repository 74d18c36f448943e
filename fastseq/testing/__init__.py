"""How fastseq judges a kernel: the error rule, and the cases every operator is held to.

``fastseq verify``, the benchmarks' gate and the tests share what is here. A family adds a module
with its ``OPERATORS`` and its name to the tuple below.
"""

from importlib import import_module

from .errors import BOUND, MismatchError, assert_as_good_as_torch, error_ratio
from .operators import Case, Operator, Problem, Yardstick, make_problem, measure_torch, run

FAMILIES = (
    "additive_attention",
    "attention",
    "cross_entropy",
    "embedding",
    "feed_forward",
    "layer_norm",
    "recurrent",
    "rotary_embedding",
    "softmax",
)

#: Every operator by name.
OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for family in FAMILIES
    for operator in import_module(f"{__name__}.{family}").OPERATORS
}

__all__ = [
    "BOUND",
    "FAMILIES",
    "OPERATORS",
    "Case",
    "MismatchError",
    "Operator",
    "Problem",
    "Yardstick",
    "assert_as_good_as_torch",
    "error_ratio",
    "make_problem",
    "measure_torch",
    "run",
]
