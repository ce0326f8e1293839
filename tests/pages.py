"""Data of a page for tests, made of real records: graphs, a plan, a profile, the search, candidates and a front."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch

from attnopt.fingerprint import Fingerprint
from attnopt.ir import DENSE, Choice, GraphReport, Mask, Miss, Refusal, Rewrite, Site, Step
from attnopt.plan import Budget, Lengths, Measured, Plan, Predicted
from attnopt.planner.verify import Record
from attnopt.profile_file import Profile
from attnopt.report import data, page
from attnopt.statistics import Grid, distance_buckets

EVIL = 'model.<script>alert("x")</script>&attn'
MODEL = Fingerprint("0123456789abcdef", (0.125,))
KERNEL = "\nif a < b && c:  # https://arxiv.org/abs/2309.17453 </pre><script>alert(1)</script>\n    return 'x'"
LENGTH = 64
GRID = Grid((0, 4), (8, 16, 32))


def names(layers: int) -> list[str]:
    return [f"layers.{n}.attn" for n in range(layers)]


def graph() -> GraphReport:
    sites = [Site(f"layers.{n}.attn", 0, "sdpa", 4, 4, 8, 8, 0.3, "float32", Mask(causal=True)) for n in range(3)]
    odd = replace(sites[0], path=EVIL, mask=Mask(window=7))
    return GraphReport(
        (*sites, odd), tuple(Rewrite(s, "sdpa_causal") for s in sites), (Refusal("left <b>bold</b>", odd.name),),
        (Miss("not provable", "m", "m.py:3", code="dropout-active"),), (Step("match", 1.25, 9, 9),),
        notes=("a <i>note</i>",),
    )  # fmt: skip


def narrow(window: int = 128) -> Choice:
    return Choice.of("sink_window", {"sink": 4, "alpha": window, "beta": 0.0})


def plan(layers: int = 2, heads: int = 4) -> Plan:
    """One window for all heads but each layer's last, which is dense."""
    made = Plan(
        "demo", MODEL, Budget("loss", 1.0), Lengths((512,), 4096, (2048,)),
        {site: (narrow(),) * (heads - 1) + (DENSE,) for site in names(layers)},
        Predicted(0.012345678, "measured", "ms", 12.345678, 5.0, 2.4691, 0.4, 0.25), min_length=256,
    )  # fmt: skip
    return replace(made, measured=(Measured("final", 2048, 32, 65504, 2.0, 2.01, 0.54321, 0.76543, made.choices_id),))


def profile(layers: int = 2, heads: int = 4, grid: Grid = GRID, length: int = LENGTH) -> Profile:
    made = Profile.empty(MODEL, grid, ["text"], ["float32"])
    for site in names(layers):
        seen = made.observation(site, heads, length)
        seen.rows, seen.samples = 128, 2
        for name in seen.sums:
            seen.sums[name] += torch.rand(seen.sums[name].shape, dtype=torch.float64)
    return made


def profile_data(made: Profile) -> dict[str, Any]:
    """With the share of every head's mass in each bucket of distances."""
    found = data.profile_json(made)
    starts = distance_buckets(made.lengths[-1])
    ends = [*(start - 1 for start in starts[1:]), made.lengths[-1] - 1]
    found["grid"]["distances"] = [[low, max(low, high)] for low, high in zip(starts, ends, strict=True)]
    for (site, length), seen in made.observations.items():
        for head, row in zip(found["sites"][site][str(length)], seen.mass_by_distance.tolist(), strict=True):
            head["mass"] = [float(f"{value / 128:.4g}") for value in row]
    return found


def candidates(of: dict[str, Any]) -> dict[str, Any]:
    """The windows of a profile's grid and dense, in the shape of `candidates_json`: every other head chose the second
    choice, the others dense, which costs nothing; of the first choice nothing is known."""
    grid = of["grid"]
    choices = [
        {"choice": f"sink_window(alpha={window}, beta=0, sink={sink})", "candidate": "sink_window", "sink": sink,
         "window": window, "far": "", "cost": round((sink + window) / 100, 4)}
        for sink in grid["sinks"] for window in grid["windows"]
    ]  # fmt: skip
    choices.append({"choice": "dense", "candidate": "dense", "sink": None, "window": None, "far": "", "cost": 1.0})
    sites = {}
    for site, by_length in of["sites"].items():
        heads = by_length[max(by_length, key=int)]
        damage = [[float(f"{x:.4g}") for row in head["damage"] for x in row] + [0.0] for head in heads]
        known: list[list[float | None]] = [[None, *row[1:]] for row in damage]
        sites[site] = {"damage": known, "chosen": [1 if n % 2 else len(choices) - 1 for n in range(len(heads))]}
    return {"length": 4096, "unit": "nats per token", "choices": choices, "sites": sites}


def front() -> dict[str, Any]:
    points = [
        {"predicted": 0.1 / n, "cost": float(n), "kv_memory": None if n == 1 else 0.1 * n, "chosen": n == 3}
        for n in range(1, 8)
    ]
    measured = [
        {"predicted": 0.1 / n, "cost": float(n), "increase": 0.4, "upper_95": 0.6, "holds": n == 3} for n in (2, 3)
    ]
    points.append({"predicted": None, "cost": 8.0, "kv_memory": None, "chosen": False})
    return {"length": 4096, "unit": "ms", "points": points, "measured": measured}


def records() -> list[Record]:
    one = Measured("verify", 2048, 32, 65504, 2.0, 2.01, 0.51234, 0.75, "abc")
    endless = replace(one, increase=float("inf"), upper_95=float("inf"))
    return [Record("point 4", 0.01, 5.0, (one,), True, 0.85), Record("point 8", 0.1, 2.0, (endless,), False, 0.85)]


BENCH = [
    {"variant": "inductor", "length": 4096, "milliseconds": 10.0, "times_inductor": 1.0},
    {"variant": "attnopt planned", "length": 4096, "milliseconds": 6.25, "times_inductor": 1.6, "times_exact": 1.25},
    {"variant": EVIL, "ratio": 2.5},
]


def whole(layers: int = 2, heads: int = 4, grid: Grid = GRID, length: int = LENGTH) -> dict[str, Any]:
    torch.manual_seed(0)
    seen = profile_data(profile(layers, heads, grid, length))
    return {
        "title": "A <title>",
        "summary": [("speed", 1.23456), ("kept", True)],
        "environment": data.environment(),
        "graphs": data.graphs_json([graph()]),
        "plan": data.plan_json(plan(layers, heads)),
        "profile": seen,
        "candidates": candidates(seen),
        "front": front(),
        "records": data.records_json(records()),
        "bench": BENCH,
        "notes": ["a & b"],
        "kernels": {"span<cpu>": KERNEL},
        "figures": {
            "own": '<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><path id="p" d="M0 0"/></svg>'
        },
    }


@cache
def rendered() -> tuple[dict[str, Any], str]:
    """The data and its page, drawn once: its charts take a second."""
    found = whole()
    return found, page.render(found)
