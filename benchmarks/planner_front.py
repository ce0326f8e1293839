"""Seconds from a profile's statistics to the whole Pareto front, and how far the front is from the exact plan.

    python -m benchmarks.planner_front --layers 32 --heads 32 --kv-heads 8 --exact 20

The statistics are made up, as a profile of such a model holds them: only the sizes matter to the time.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch

from attnopt.cost import CostTable, kept_pairs
from attnopt.fingerprint import Fingerprint
from attnopt.ir import Mask, Site
from attnopt.plan import OBJECTIVES
from attnopt.planner import Limits, compare, front, make_problem
from attnopt.profile_file import Profile
from attnopt.statistics import Grid

TAKES = "1 min"
QUICK = ("--layers", "4")

SINKS = (0, 4, 16)
WINDOWS = (32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048)


def synthetic_profile(
    layers: int, heads: int, kv_heads: int, lengths: tuple[int, ...], seed: int = 0
) -> tuple[Profile, list[Site]]:
    """Damage that falls as a power of the window, with a scale, a power and a use of sinks of each head's own."""
    grid = Grid(SINKS, WINDOWS)
    mask = Mask(causal=True)
    sites = [Site(f"layers.{n}", 0, "sdpa", heads, kv_heads, 64, 64, 0.125, "bfloat16", mask) for n in range(layers)]
    profile = Profile.empty(Fingerprint("x", (1.0,)), grid, ["d"], ["bfloat16"])
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    windows = torch.tensor(WINDOWS, dtype=torch.float64)
    for site in sites:
        scale = torch.exp(torch.randn(heads, 1, 1, generator=generator, dtype=torch.float64) * 2.5 - 9)
        power, eased = uniform(heads, 1, 1) * 1.7 + 0.3, 1 / (1 + uniform(heads, 3, 1).cumsum(1))
        for n in lengths:
            seen = profile.observation(site.name, heads, n)
            seen.rows, seen.samples = n, 1
            seen.t2[:] = scale * ((n / windows) ** power - 1).clamp(min=0) * eased * 2 * n
            seen.ablation_t2[:] = 4 * seen.t2.amax((1, 2))
    return profile, sites


def synthetic_table(lengths: tuple[int, ...]) -> CostTable:
    """Times in proportion to kept pairs, above a least time, and a fixed one for every distinct span of a layer."""
    spans = [(n, s, w) for n in lengths for s in SINKS for w in WINDOWS if w < n]
    entries = {(n, 0, n): kept_pairs(n, 0, n) / 1e6 for n in lengths}
    entries |= {span: 1.3 * kept_pairs(*span) / 1e6 + 0.2 for span in spans}
    return CostTable((("target", "cpu"),), tuple(entries.items()), ((max(lengths), 0.5),))


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--objective", choices=OBJECTIVES, default="prefill")
    parser.add_argument("--exact", type=float, default=0.0, metavar="SECONDS", help="also solve exactly, this long")
    args = parser.parse_args(arguments)
    lengths = (1024, 2048, 4096, 8192)
    profile, sites = synthetic_profile(args.layers, args.heads, args.kv_heads, lengths)
    table = synthetic_table((1024, 8192))
    start = time.perf_counter()
    problem = make_problem(profile, table, sites, 8192, objective=args.objective)
    made = time.perf_counter()
    limits = Limits(spans=4 if args.objective in ("prefill", "mixed") else None)
    sweep = front(problem, limits)
    found: dict[str, Any] = {
        "objective": args.objective, "layers": args.layers, "heads": args.heads, "candidates": len(problem.choices),
        "lengths": len(lengths), "points": len(sweep), "problem_seconds": round(made - start, 3),
        "front_seconds": round(time.perf_counter() - made, 3),
    }  # fmt: skip
    for damage in (1e-3, 1e-2, 1e-1) if args.exact else ():
        compared = compare(sweep, max_damage=damage, seconds=args.exact)
        found[f"gap_percent_at_{damage:g}"] = None if compared.gap is None else round(compared.gap, 3)
        found[f"unproved_percent_at_{damage:g}"] = None if compared.bound is None else round(compared.bound, 3)
    print(json.dumps(found))
    return found


if __name__ == "__main__":
    main()
