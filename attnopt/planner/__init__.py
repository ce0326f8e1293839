"""Choose one replacement per head under a budget, and measure that it keeps it.

    problem = make_problem(profile, tables, sites, target_length=8192)
    found = verify_loop(problem, evaluate, Budget("loss", 1.0))      # the fastest plan measured within 1 %
    choices = choices_from(problem, found.solution)                  # {site name: one Choice per head}
    final = final_check(evaluations, Budget("loss", 1.0), choices_id(choices))

problem.py makes the knapsack from a profile and a cost table, knapsack.py solves it, verify.py measures.
"""

from attnopt.planner.exact import Compared, compare, solve
from attnopt.planner.frontier import Front, front
from attnopt.planner.knapsack import (
    Choices,
    Limits,
    Problem,
    Solution,
    back_off,
    choices_from,
    settle,
)
from attnopt.planner.problem import kept_dense, make_problem, min_length_of, predicted_of
from attnopt.planner.verify import (
    Evaluation,
    Record,
    Verified,
    final_check,
    holds,
    judge,
    paired_bound,
    tokens_needed,
    verify_loop,
)

__all__ = [
    "Choices",
    "Compared",
    "Evaluation",
    "Front",
    "Limits",
    "Problem",
    "Record",
    "Solution",
    "Verified",
    "back_off",
    "choices_from",
    "compare",
    "final_check",
    "front",
    "holds",
    "judge",
    "kept_dense",
    "make_problem",
    "min_length_of",
    "paired_bound",
    "predicted_of",
    "settle",
    "solve",
    "tokens_needed",
    "verify_loop",
]
