"""What a benchmark found: rows of checked ratios, the machine, what was aimed at; saved, drawn, compared.

    row = Row({"dtype": "bfloat16", "length": 4096}, error, tolerance, ratios, lower, times_ms)
    run = Run("cpu-prefill", [row], environment(), [Aim("prefill over dense", 3.0, row.ratios["dense"])])
    run.save(path), run.figure(path), compare(Run.load(old), Run.load(new))

A row whose result was wrong has no ratios: to ask for them raises, its record says WRONG, and its times are not kept.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnopt.codegen.emit import write_atomically
from attnopt.report import figures

RESULTS = Path(__file__).parent / "results"
# Settings of attnopt that are folders of one machine.
PRIVATE = ("ATTNOPT_CACHE",)
SCHEMA = 1


class WrongResult(ValueError):
    """A speed-up was asked of a row whose result differs from the reference by more than its tolerance."""


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error, in float64; what `found` has of shape must be `expected`'s. NaN counts as infinite."""
    if found.shape != expected.shape:
        raise ValueError(f"a result of shape {tuple(found.shape)} against one of {tuple(expected.shape)}")
    expected = expected.double()
    norm = float(expected.norm())
    away = float((found.double().to(expected.device) - expected).norm())
    error = away / norm if norm else away
    return math.inf if math.isnan(error) else error


class Row:
    """One case: error against a float64 reference, and only if that is within `tolerance` its figures.

    ratios: name -> how many times as fast as what the name says; lower: the lower 95 % bounds of some or all of them;
    times_ms: name -> median milliseconds, for orientation.
    """

    def __init__(
        self,
        case: Mapping[str, Any],
        error: float,
        tolerance: float,
        ratios: Mapping[str, float],
        lower: Mapping[str, float],
        times_ms: Mapping[str, float],
    ) -> None:
        if unknown := set(lower) - set(ratios):
            raise ValueError(f"bounds of no ratio: {', '.join(sorted(unknown))}")
        self.case, self.error, self.tolerance = dict(case), error, tolerance
        self._ratios, self._lower, self._times_ms = dict(ratios), dict(lower), dict(times_ms)

    @property
    def wrong(self) -> bool:
        # Not `>`: an error that is no number is wrong.
        return not self.error <= self.tolerance

    def _checked(self, figures: dict[str, float]) -> dict[str, float]:
        if self.wrong:
            raise WrongResult(f"WRONG: {self.label}: relative error {self.error:.2e} > {self.tolerance:.0e}")
        return figures

    @property
    def ratios(self) -> dict[str, float]:
        return self._checked(self._ratios)

    @property
    def lower(self) -> dict[str, float]:
        return self._checked(self._lower)

    @property
    def times_ms(self) -> dict[str, float]:
        return self._checked(self._times_ms)

    @property
    def label(self) -> str:
        return " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in self.case.values())

    def __str__(self) -> str:
        if self.wrong:
            return f"{self.label}: WRONG, relative error {self.error:.2e} > {self.tolerance:.0e}"
        told = [f"{name} {x:.2f}" + (f" (≥ {self.lower[name]:.2f})" if name in self.lower else "")
                for name, x in self.ratios.items()]  # fmt: skip
        return f"{self.label}: error {self.error:.1e}; {', '.join(told)}"

    def record(self) -> dict[str, Any]:
        fields = {"case": self.case, "error": self.error, "tolerance": self.tolerance}
        if self.wrong:
            return {**fields, "error": repr(self.error), "WRONG": True}
        shown = {"ratios": self.ratios, "lower": self.lower, "times_ms": self.times_ms}
        return {**fields, **{k: {n: float(f"{x:.5g}") for n, x in v.items()} for k, v in shown.items()}}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Row:
        figures = [record.get(name, {}) for name in ("ratios", "lower", "times_ms")]
        return cls(record["case"], float(record["error"]), record["tolerance"], *figures)


@dataclass(frozen=True)
class Aim:
    """A figure that was set before: `found` is at least `wanted`, or at most if `wanted` is a ceiling; None where
    nothing here could measure it."""

    what: str
    wanted: float
    found: float | None = None
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        if self.found is None:
            return None
        return self.found <= self.wanted if self.at_most else self.found >= self.wanted

    @property
    def verdict(self) -> str:
        return {None: "goal, unmeasured", True: "met", False: "missed"}[self.met]

    def __str__(self) -> str:
        sign = "≤" if self.at_most else "≥"
        found = "" if self.found is None else f"{self.found:.3g}, "
        return f"{self.what}: {found}aim {sign} {self.wanted:g}: {self.verdict}"


@dataclass
class Run:
    """The rows of one benchmark on one machine; `notes` are sentences that belong to them, skips above all."""

    name: str
    rows: list[Row]
    environment: dict[str, Any]
    aims: list[Aim] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write the run as JSON, a row a line."""
        head = {"benchmark": self.name, "schema": SCHEMA, "environment": self.environment,
                "aims": [{**asdict(a), "verdict": a.verdict} for a in self.aims], "notes": self.notes}  # fmt: skip
        rows = ",\n".join("  " + json.dumps(row.record(), allow_nan=False) for row in self.rows)
        start = json.dumps(head, indent=1, ensure_ascii=False, allow_nan=False)[:-2]
        write_atomically(path, f'{start},\n "rows": [\n{rows}\n ]\n}}\n')

    @classmethod
    def load(cls, path: Path) -> Run:
        """What `save` wrote; ValueError for another format (benchmarks/readers.py knows the older ones)."""
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.get("schema") != SCHEMA or "benchmark" not in found:
            raise ValueError(f"{path.name} holds no run of schema {SCHEMA}")
        aims = [Aim(a["what"], a["wanted"], a["found"], a["at_most"]) for a in found["aims"]]
        rows = [Row.of(r) for r in found["rows"]]
        return cls(found["benchmark"], rows, found["environment"], aims, found["notes"])

    def figure(self, path: Path, names: Sequence[str] | None = None) -> None:
        """Every case's ratios (those of `names`, else all but shares) and their bounds as SVG; of a wrong row none."""
        right = [row for row in self.rows if not row.wrong]
        found = dict.fromkeys(name for row in right for name in row.ratios)
        names = list(names or [name for name in found if not name.startswith("share")] or found)
        marks = {n: [(row.ratios.get(n), row.lower.get(n)) for row in right] for n in names}
        write_atomically(path, figures.ratio_figure([row.label for row in right], marks))


@dataclass(frozen=True)
class Change:
    """One ratio of one case in two runs. `noise` is the relative change that the bounds of both leave open."""

    label: str
    name: str
    old: float
    new: float
    noise: float

    @property
    def factor(self) -> float:
        """Above 1: faster than it was."""
        return self.new / self.old

    @property
    def beyond_noise(self) -> bool:
        return abs(math.log(self.factor)) > self.noise

    def slower(self, tolerance: float) -> bool:
        """Whether it lost more than `tolerance` (0.05: a twentieth), and more than noise explains."""
        return self.beyond_noise and self.factor < 1 - tolerance

    def __str__(self) -> str:
        flag = ("faster" if self.factor > 1 else "slower") if self.beyond_noise else "within noise"
        return f"{self.label}, {self.name}: {self.old:.3g} -> {self.new:.3g} (x {self.factor:.3f}, {flag})"


def spread(row: Row, name: str) -> float:
    """How far, in logarithms, the lower bound lies below the ratio; 0 where there is none."""
    value, low = row.ratios[name], row.lower.get(name)
    return math.log(value / low) if low and low > 0 else 0.0


def compare(old: Run, new: Run) -> tuple[list[Change], list[str]]:
    """The ratios that both runs have, case by case, and sentences on what cannot be compared.

    Two medians whose 95 % bounds lie a and b below them differ by chance up to the root of a² + b² in 19 of 20 pairs.
    """
    before = {row.label: row for row in old.rows}
    after = {row.label: row for row in new.rows}
    changes, said = [], []
    for label, row in after.items():
        was = before.get(label)
        if was is None or was.wrong or row.wrong:
            said.append(f"{label}: " + ("only in the new run" if was is None else "WRONG, so not compared"))
            continue
        for name in row.ratios:
            if name in was.ratios:
                noise = math.hypot(spread(was, name), spread(row, name))
                changes.append(Change(label, name, was.ratios[name], row.ratios[name], noise))
    said += [f"{label}: only in the old run" for label in before if label not in after]
    return changes, said


def environment() -> dict[str, Any]:
    """Hardware, versions, threads and the date; nothing that names a folder of this machine."""
    from attnopt.report.data import environment as machine

    found = machine()
    found["variables"] = {k: v for k, v in found["variables"].items() if k not in PRIVATE}
    device = found["gpu"][0] if found["gpu"] else found["cpu"]
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"device": device, "date": today, **found, "threads": torch.get_num_threads()}
