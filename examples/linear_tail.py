"""What may stand in for far keys, head by head: fit it, plan with it, and see where it wins and where it does not.

    python examples/linear_tail.py

The trained model that ships with attnopt, at short lengths, in forty seconds on a core; `attnopt distill demo` and
`attnopt plan demo --fitted` do the same at lengths that matter. Costs are bytes of the KV cache, which need no timing.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import torch

from attnopt import hf, text
from attnopt.cost import CostTable
from attnopt.distill import Menu, distill_model
from attnopt.ir import Choice
from attnopt.plan import Budget, Plan
from attnopt.planner.make import make_plan
from attnopt.profiler import profile_model

PROFILED, PLANNED, SAMPLES = 256, 512, 16
MENU = Menu(
    features=(16,), ranks=(4,), windows=(32,), sinks=(4,), steps=30, families=("linear", "taylor", "compensation")
)
BUDGET = Budget("loss", 5.0)  # percent of the dense loss
NEAR = {"sink": 4, "window": 32}
TAILS = {
    "linear": Choice.of("linear", {**NEAR, "features": 16}),
    "taylor": Choice.of("taylor", {**NEAR, "rank": 4}),
    "compensation": Choice.of("compensation", {"sink": 4, "alpha": 32, "beta": 0.0}),
}
WINDOW = Choice.of("sink_window", {"sink": 4, "alpha": 32, "beta": 0.0})


def sequences(tokenizer: object, split: str, length: int, samples: int) -> torch.Tensor:
    """Held-out source of Python's own library, int64 (samples, length)."""
    return text.sequences(text.stream([], tokenizer, split, 2 * samples * length), length, samples, split)


def main() -> None:
    loaded = hf.load("demo")
    rows = [row[None] for row in sequences(loaded.tokenizer, "calibrate", PROFILED, 5)]
    profile = profile_model(loaded.model, rows[3:])
    fitted = distill_model(loaded.model, rows[:3], rows[3:], MENU, profile=profile)
    print(f"nats per token, summed over the heads of a layer: with {WINDOW}, and with a far part beside it")
    for site in fitted.sites:
        window = fitted.damage(site, PROFILED, WINDOW)
        better = ", ".join(
            f"{name} {fitted.damage(site, PROFILED, tail).sum():.4f} "
            f"(offered on {int(fitted.offered(site, tail).sum())})"
            for name, tail in TAILS.items()
        )
        print(f"  {site}: {window.sum():.4f}; {better}; of {len(window)} heads")
    verify, final = ({PLANNED: sequences(loaded.tokenizer, split, PLANNED, SAMPLES)} for split in ("verify", "final"))
    made = make_plan(
        loaded.model, "demo", profile, verify, final, BUDGET, PLANNED, tables=CostTable.by_density(),
        objective="memory", fitted=fitted,
    )  # fmt: skip
    counts = Counter(c.candidate for of_site in made.plan.choices.values() for c in of_site)
    print(f"chosen, of {counts.total()} heads: {', '.join(f'{n} {name}' for name, n in counts.most_common())}")
    measured = next(m for m in made.plan.measured if m.split == "final")
    print(
        f"final split: {measured.increase:+.2f} % of the loss, at most {measured.upper_95:.2f} %, budget "
        f"{BUDGET.limit:g} %; cache {made.plan.predicted.kv_memory:.0%} of dense"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        made.plan.save(path)
        Plan.load(path)
        print(
            "files: " + ", ".join(f"{p.name} {p.stat().st_size / 1024:.0f} KiB" for p in sorted(Path(folder).iterdir()))
        )


if __name__ == "__main__":
    main()
