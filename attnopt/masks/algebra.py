"""The small algebra masks are computed in: index expressions and predicates over them, under one name."""

from attnopt.masks.expressions import Affine, Ranges, Read, as_constant
from attnopt.masks.predicates import FALSE, TRUE, BoolLoad, Conjunction, at_least_zero, fold_ranges

__all__ = [
    "FALSE", "TRUE", "Affine", "BoolLoad", "Conjunction", "Ranges", "Read", "as_constant", "at_least_zero",
    "fold_ranges",
]  # fmt: skip
