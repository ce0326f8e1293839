"""From a profile to a plan to a run, in one process, on the trained model that ships with attnopt.

    python examples/plan_and_run.py

Short lengths and a generous budget keep it under a minute and a half of CPU time. Here a plan saves little or nothing;
`attnopt demo` does the same at lengths that matter. So costs here are counted (kept query-key pairs), not timed.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

from attnopt import backend, hf, text
from attnopt.cost import CostTable
from attnopt.plan import Budget
from attnopt.planner.make import make_plan
from attnopt.profiler import profile_model

PROFILED, PLANNED, SAMPLES = (128, 256), 512, 32
BUDGET = Budget("loss", 5.0)  # percent of the dense loss


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
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        made.plan.save(path)
        planned = torch.compile(loaded.model, backend="attnopt", options={"plan": str(path)})
        ids = final[PLANNED][:1]
        with torch.no_grad():
            losses = [
                F.cross_entropy(call(ids, use_cache=False).logits[0, :-1].float(), ids[0, 1:]).item()
                for call in (loaded.model, planned)
            ]
    (report,) = backend.reports()
    print("\n".join(report.lines()))
    measured = next(m for m in made.plan.measured if m.split == "final")
    print(f"one sequence: loss {losses[0]:.4f} dense, {losses[1]:.4f} planned")
    print(
        f"final split: {measured.increase:+.2f} % of the loss, "
        f"at most {measured.upper_95:.2f} %, budget {BUDGET.limit:g} %"
    )


if __name__ == "__main__":
    main()
