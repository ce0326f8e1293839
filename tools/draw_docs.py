"""Draw the pictures of README.md and docs/concepts.md from the model and the plan that ship with attnopt.

    python tools/draw_docs.py                    # the head map: of the plan alone, in seconds
    python tools/draw_docs.py --profile FILE     # all pictures; FILE is the plan's own profile, made by the command
                                                 # at the top of examples/generate_long.py

They go to docs/figures, and stand on light and dark pages alike: no background, and one grey for what is no data.
"""

from __future__ import annotations

import argparse
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attnopt import hf
from attnopt.codegen.emit import write_atomically
from attnopt.commands import examine_model
from attnopt.cost import CostTable
from attnopt.ir import Choice
from attnopt.plan import Plan
from attnopt.planner.frontier import front
from attnopt.planner.problem import make_problem
from attnopt.profile_file import Profile
from attnopt.report.data import plan_json
from attnopt.report.figures import NEUTRAL
from attnopt.statistics import Observation, distance_buckets

ROOT = Path(__file__).parents[1]
PLAN = ROOT / "examples" / "demo_decode_plan.json"
FIGURES = ROOT / "docs" / "figures"
# From narrow to wide; dense stands apart. Dark text on the first DARK_FROM, light text on the others.
RAMP = ("#eef3c5", "#c9e4b4", "#8fd0ba", "#4fb3bf", "#2f8fb5", "#2b64a0", "#2a3f86")
DENSE, DARK_FROM = "#4a4458", 4
SERIES = ("#2f8fb5", "#c2632f", "#7a56a8")
CELL_WIDTH, CELL_HEIGHT, LEFT, TOP = 62, 30, 74, 26
NEAREST = 7  # buckets of distances, up to 63 tokens


def head_map(plan: dict[str, Any]) -> str:
    """Layers x heads, each head's window in its cell; of the data of `plan_json`."""
    sites, length = plan["sites"], plan["lengths"]["planned"]
    wide = max(map(len, sites.values()))
    width, height = LEFT + wide * CELL_WIDTH + 2, TOP + len(sites) * CELL_HEIGHT + 34
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="keys kept by each head, layer by layer" '
        f'font-family="system-ui, sans-serif" font-size="13" text-anchor="middle">'
    ]
    lines += [text(LEFT + (n + 0.5) * CELL_WIDTH, 17, f"head {n}") for n in range(wide)]
    for row, heads in enumerate(sites.values()):
        y = TOP + row * CELL_HEIGHT
        lines.append(text(LEFT - 10, y + 20, f"layer {row}", anchor="end"))
        for column, head in enumerate(heads):
            lines += cell(LEFT + column * CELL_WIDTH, y, head, length)
    found = f"the last keys that each head keeps of {length}: "
    found += f"{plan['predicted']['kv_memory']:.0%} of the KV cache in all"
    lines.append(text(LEFT + wide * CELL_WIDTH / 2, height - 10, found))
    return "\n".join([*lines, "</svg>"]) + "\n"


def cell(x: float, y: float, head: dict[str, Any], length: int) -> list[str]:
    """A square with the window's width; the narrower, the lighter."""
    share = max(math.log2(head["window"]) - 4, 0) / max(math.log2(length) - 4, 1)
    step = min(int(share * len(RAMP)), len(RAMP) - 1)
    fill = DENSE if head["dense"] else RAMP[step]
    ink = "#ffffff" if head["dense"] or step >= DARK_FROM else "#1b2a33"
    return [
        f'<rect x="{x + 1}" y="{y + 1}" width="{CELL_WIDTH - 2}" height="{CELL_HEIGHT - 2}" rx="4" fill="{fill}"/>',
        text(x + CELL_WIDTH / 2, y + 20, "all" if head["dense"] else str(head["window"]), ink),
    ]


def text(x: float, y: float, content: str, colour: str = NEUTRAL, anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" fill="{colour}" text-anchor="{anchor}">{content}</text>'


def longest(profile: Profile) -> dict[str, Observation]:
    """What was observed of each site at the longest length."""
    return {site: o for (site, length), o in profile.observations.items() if length == profile.lengths[-1]}


def told_apart(profile: Profile) -> list[tuple[str, str, int]]:
    """(name, site, head) of three heads: the one that looks nearest, the one in the middle by what a narrow window
    loses of it, and the one that loses most."""
    observed = longest(profile)
    heads = [(site, head) for site, o in observed.items() for head in range(o.heads)]
    nearest = max(heads, key=lambda at: float(observed[at[0]].mass_by_distance[at[1], :NEAREST].sum()))
    by_loss = sorted(heads, key=lambda at: float(observed[at[0]].t2[at[1], -1, 0]))
    found = {"looks near": nearest, "in the middle": by_loss[len(by_loss) // 2], "looks far": by_loss[-1]}
    return [(f"{name}: layer {site.split('.')[2]}, head {head}", site, head) for name, (site, head) in found.items()]


def mass(profile: Profile) -> str:
    """How much of the attention of three heads lies within a distance."""
    observed, length = longest(profile), profile.lengths[-1]
    ends = [*distance_buckets(length)[1:], length]

    def draw(axes: Axes) -> None:
        for colour, (name, site, head) in zip(SERIES, told_apart(profile), strict=True):
            share = observed[site].mass_by_distance[head].cumsum(0)
            axes.plot(ends, (share / share[-1]).tolist(), color=colour, label=name)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("the last keys, tokens")
        axes.set_ylabel("share of attention on them")
        axes.set_ylim(0, 1.02)

    return drawn(draw)


def damage(profile: Profile, plan: Plan) -> str:
    """What windows beside the plan's own sink would lose of these heads, and the window that the plan gives them."""
    observed, grid = longest(profile), profile.header.grid

    def draw(axes: Axes) -> None:
        for colour, (name, site, head) in zip(SERIES, told_apart(profile), strict=True):
            o, chosen = observed[site], plan.choices[site][head]
            sink = chosen["sink"] if chosen.candidate == "sink_window" else grid.sinks[-1]
            values = o.t2[head, grid.sinks.index(int(sink))] / 2 / o.tokens
            axes.plot(grid.windows, values.tolist(), color=colour, marker=".", label=f"{name}, {int(sink)} sinks")
            if chosen.candidate == "sink_window":
                at = list(grid.windows).index(int(chosen["alpha"]))
                axes.plot([chosen["alpha"]], [float(values[at])], "o", color=colour, markersize=9, fillstyle="none")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("window, tokens (ring: what the plan chose)")
        axes.set_ylabel("damage, nats per token")

    return drawn(draw)


def pareto(profile: Profile, plan: Plan) -> str:
    """The front of KV cache against predicted divergence, and the plan that ships."""
    (graph,) = examine_model(hf.load("demo"), 64)
    problem = make_problem(
        profile, CostTable.by_density(), graph.sites, plan.lengths.planned, objective=plan.objective,
        retrieval=plan.constraints.retrieval or 0.0,
    )  # fmt: skip
    found, dense = front(problem), problem.dense.cost
    points = [found.point(k) for k in range(1, len(found))]
    named: dict[Choice, int] = {choice: n for n, choice in enumerate(problem.choices)}
    chosen = problem.of(np.array([named[plan.choices[site][head]] for site, head in problem.heads]))

    def draw(axes: Axes) -> None:
        axes.plot([p.cost / dense for p in points], [problem.expected(p) for p in points], color=SERIES[0])
        axes.plot([chosen.cost / dense], [problem.expected(chosen)], "o", color=SERIES[1], label="the plan")
        axes.set_yscale("log")
        axes.set_xlim(0, 1)
        axes.set_xlabel(f"KV cache at {plan.lengths.planned} tokens, share of dense")
        axes.set_ylabel("predicted, nats per token")

    return drawn(draw)


def drawn(draw: Callable[[Axes], None]) -> str:
    """An SVG of axes without a background."""
    style: Any = {
        "svg.fonttype": "none", "svg.hashsalt": "attnopt", "font.size": 10, "font.family": "sans-serif",
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), NEUTRAL),
    }  # fmt: skip
    with rc_context(style):
        figure = Figure(figsize=(6.4, 3.2), layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=NEUTRAL, alpha=0.25, linewidth=0.5)
        axes.patch.set_visible(False)
        draw(axes)
        if axes.get_xscale() == "log":
            axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.legend(fontsize=9, frameon=False)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--profile", type=Path, metavar="FILE", help="the plan's profile")
    given = parser.parse_args()
    plan = Plan.load(PLAN)
    pictures = {"head-map": head_map(plan_json(plan))}
    if given.profile:
        profile = Profile.load(given.profile)
        pictures |= {
            "concepts-mass": mass(profile),
            "concepts-damage": damage(profile, plan),
            "concepts-front": pareto(profile, plan),
        }
    for name, svg in pictures.items():
        write_atomically(FIGURES / f"{name}.svg", svg)
        print(FIGURES / f"{name}.svg")


if __name__ == "__main__":
    main()
