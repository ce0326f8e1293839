"""A replacement for heads of one's own, in one file: profiled, planned and run with those that come with attnopt.

    python examples/add_a_candidate.py

`idle` is for heads that hardly attend: it keeps the first keys and fewer of the last ones than any window that was
observed. Registering it is all there is to do; import its file before planning, and before a plan that names it is
read. docs/add-a-candidate.md explains the members. It takes under a minute on a core: lengths are short, the budget is
generous, and costs are counted (kept query-key pairs), not timed.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch

from attnopt import backend, hf, text
from attnopt.candidates import Candidate, Param, Params, refuse_span
from attnopt.cost import CostTable
from attnopt.ir import Choice, Refusal, Site
from attnopt.plan import Budget, Plan
from attnopt.planner.make import make_plan
from attnopt.profiler import profile_model
from attnopt.registry import CANDIDATES
from attnopt.statistics import Grid, Observation

PROFILED, PLANNED, SAMPLES = (128, 256), 512, 16
BUDGET = Budget("loss", 30.0)  # percent of the dense loss


class Idle(Candidate):
    """Key j is kept where j < sink or i - j < window."""

    name = "idle"
    params = (Param("sink", int, 0, 1 << 30), Param("window", int, 1, 1 << 30))

    def space(self, grid: Grid, lengths: Sequence[int], own_window: int | None = None) -> list[Choice]:
        """Windows narrower than any that was observed, with the sinks that were."""
        sinks = grid.sinks if own_window is None else [s for s in grid.sinks if s == 0]
        every = product(sinks, [w for w in (4, 8, 16) if w < grid.windows[0]])
        return [Choice.of(self.name, {"sink": int(sink), "window": window}) for sink, window in every]

    def refuse(self, site: Site) -> Refusal | None:
        return refuse_span(site)

    def rule(self, params: Params) -> tuple[int, int, float]:
        return int(params["sink"]), int(params["window"]), 0.0

    def damage(
        self, observation: Observation, params: Params, length: int, own_window: int | None = None
    ) -> torch.Tensor:
        """Half the sum of t^2, as of every candidate: linear in log(window) between the narrowest observed window and
        the head's removal, which a profile holds too."""
        sink, window = self.span(params, length, own_window)
        row, narrowest = observation.grid.index(sink, observation.grid.windows[0])
        kept, removed = observation.t2[:, row, narrowest], observation.ablation_t2
        share = math.log(window) / math.log(observation.grid.windows[0])
        return torch.maximum(removed + (kept - removed) * share, kept) / 2


CANDIDATES.register("idle")(Idle())


def sequences(tokenizer: object, split: str, length: int, samples: int) -> torch.Tensor:
    """Held-out source of Python's own library, int64 (samples, length)."""
    return text.sequences(text.stream([], tokenizer, split, 2 * samples * length), length, samples, split)


def main() -> None:
    loaded = hf.load("demo")
    rows = [row[None] for n in PROFILED for row in sequences(loaded.tokenizer, "calibrate", n, 4)]
    profile = profile_model(loaded.model, rows)
    verify, final = ({PLANNED: sequences(loaded.tokenizer, split, PLANNED, SAMPLES)} for split in ("verify", "final"))
    made = make_plan(
        loaded.model, "demo", profile, verify, final, BUDGET, PLANNED, tables=CostTable.by_density(), report=print
    )  # fmt: skip
    counts = Counter(choice.candidate for of_site in made.plan.choices.values() for choice in of_site)
    print(f"chosen, of {counts.total()} heads: {', '.join(f'{n} {name}' for name, n in counts.most_common())}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        made.plan.save(path)
        planned = torch.compile(loaded.model, backend="attnopt", options={"plan": Plan.load(path)})
        with torch.no_grad():
            planned(final[PLANNED][:1], use_cache=False)
    (report,) = backend.reports()
    print("\n".join(report.lines()))
    measured = next(m for m in made.plan.measured if m.split == "final")
    print(
        f"final split: {measured.increase:+.2f} % of the loss, at most {measured.upper_95:.2f} %, budget "
        f"{BUDGET.limit:g} %; {made.plan.predicted.speedup:.1f} times fewer query-key pairs than dense"
    )


if __name__ == "__main__":
    main()
