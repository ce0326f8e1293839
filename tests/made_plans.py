"""Profiles and plans without a model: random sums, and the point of the front that the planner picks from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from attnopt.cost import Costs, CostTable, kept_pairs
from attnopt.fingerprint import Fingerprint
from attnopt.ir import Mask, Site
from attnopt.plan import Budget, Constraints, Lengths, Measured, Plan, choices_id
from attnopt.planner.constraints import limits_of, protected
from attnopt.planner.frontier import front
from attnopt.planner.knapsack import choices_from
from attnopt.planner.make import calibration_of
from attnopt.planner.problem import kept_dense, make_problem, predicted_of
from attnopt.profile_file import Profile
from attnopt.statistics import Grid

MODEL = Fingerprint("0123456789abcdef", (0.125,))
LENGTHS, WINDOWS, SINKS, HEADS = (64, 128), (8, 16, 32), (0, 4), 4


def sites_of(layers: int = 2, heads: int = HEADS, kv_heads: int | None = None) -> list[Site]:
    causal = Mask(causal=True)
    return [
        Site(f"model.layers.{n}.self_attn", 0, "sdpa", heads, kv_heads or heads, 64, 64, 0.125, "float32", causal)
        for n in range(layers)
    ]


def random_profile(
    layers: int = 2, heads: int = HEADS, model: Fingerprint = MODEL, text: str = "text", seed: int = 0
) -> Profile:  # fmt: skip
    """Damages that fall with the window, of heads that matter differently by orders of magnitude."""
    draw = torch.Generator().manual_seed(seed)
    made = Profile.empty(model, Grid(SINKS, WINDOWS), [text], ["float32"])
    weight = {n: 10 ** (3 * torch.rand(heads, generator=draw, dtype=torch.float64) - 3) for n in range(layers)}
    for site in sites_of(layers, heads):
        for length in LENGTHS:
            seen = made.observation(site.name, heads, length)
            seen.rows, seen.samples = 2 * length, 2
            for name, sums in seen.sums.items():
                sums += torch.rand(sums.shape, generator=draw, dtype=torch.float64)
                if name == "sketch":
                    sums -= 0.5
            fall = torch.tensor([1.0, 0.3, 0.1]) * torch.tensor([[1.0], [0.6]])
            noise = 1 + 0.2 * torch.rand(seen.t2.shape, generator=draw, dtype=torch.float64)
            seen.sums["t2"] = length * weight[int(site.name.split(".")[2])][:, None, None] * fall * noise
            seen.sums["ablation_t2"] = 3 * seen.t2[:, 0, 0]
    return made


def timed(sites: Sequence[Site]) -> CostTable:
    """A table as if measured, in proportion to pairs, and a fixed cost of every further span."""
    length, one = LENGTHS[-1], sites[0]
    spans = [(length, s, w) for s in SINKS for w in WINDOWS] + [(length, 0, length)]
    sizes = {"target": "cpu", "dtype": one.dtype, "heads": one.heads, "kv_heads": one.kv_heads, "head_dim": 64}
    key = tuple((name, str(value)) for name, value in sizes.items())
    return CostTable(key, tuple((span, kept_pairs(*span) / 1e3) for span in spans), ((length, 0.4),))


def made_plan(
    profile: Profile, sites: Sequence[Site], table: Costs | None = None, budget: float = 0.01,
    length: int = LENGTHS[-1], objective: str = "prefill", **asked: Any,
) -> Plan:  # fmt: skip
    """The last point of the front within `budget` nats per token, as if it had been measured."""
    table, wanted = table or CostTable.by_density(), Constraints(retrieval=0.0, **asked)
    problem = make_problem(profile, table, sites, length, objective=objective, retrieval=0.0)
    problem = kept_dense(problem, protected(sites, wanted, profile))
    sweep = front(problem, limits_of(problem, wanted, objective))
    solution = sweep.point(sweep.within(budget))
    choices = choices_from(problem, solution)
    measured = tuple(
        Measured(split, LENGTHS[-1], 8, 1000, 2.0, 2.01, 0.5, bound, choices_id(choices))
        for split, bound in (("verify", 0.9), ("final", 0.75))
    )
    return Plan(
        "tiny", profile.header.fingerprint, Budget("loss", 1.0), Lengths(LENGTHS, length, LENGTHS), choices,
        predicted_of(problem, solution), measured, objective, wanted, 0, table.id, calibration_of(profile),
    )  # fmt: skip
