"""Command lines that the tests of the commands share, and the costs they are planned on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from attnopt.cost import CostTable, kept_pairs

LENGTHS, LENGTH = "128,256", 256
SITE = "model.layers.0.self_attn"
Fails = Callable[..., str]


def density_as_time(spec: Any, lengths: Any, windows: Any, sinks: Any, **_: Any) -> CostTable:
    """A cost table in place of a measured one: the search does not depend on how busy the machine is."""
    spans = {(n, s, w) for n in lengths for s in sinks for w in windows if w < n} | {(n, 0, n) for n in lengths}
    entries = tuple((span, kept_pairs(*span) / 1e4) for span in sorted(spans))
    return CostTable((("target", spec.target),), entries, tuple((n, 0.0) for n in lengths))


def plan_command(work: Path, out: Path, **changes: str) -> list[str]:
    options = {
        "profile": str(work / "profile"), "text": str(work / "text.py"), "length": str(LENGTH), "samples": "8",
        "max-loss-increase": "50%", "verify-lengths": str(LENGTH), "probe": "0", "out": str(out),
    } | changes  # fmt: skip
    model = options.pop("model", str(work / "shallow"))
    return ["plan", model, *(part for name, value in options.items() for part in (f"--{name}", value))]


def bench_command(work: Path, model: str = "shallow", plan: Path | None = None) -> list[str]:
    command = ["bench", str(work / model), "--text", str(work / "text.py"), "--lengths", "128", "--rounds", "1"]
    return [*command, "--plan", str(plan or work / "plan.json")]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}
