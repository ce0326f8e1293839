"""The plan: one Choice per query head per site, what it was promised to cost, and what was measured.

    plan = Plan.load("plan.json")                    # PlanError names the file, the place and the remedy
    plan.check(sites, fingerprint)                   # PlanError if it was made for another model
    sinks, windows = plan.tables(site, length)       # one int per query head

The file is described in docs/plan-file.md. ``Plan.load`` then ``dump`` gives the same bytes. Text is read by reading.py
and written by writing.py; sidecar.py keeps what was fitted in a second file beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from attnopt.errors import PlanError
from attnopt.ir import DENSE, Choice, Share, Site
from attnopt.plan.writing import fold, text_of
from attnopt.registry import CANDIDATES
from attnopt.strict_json import Place, parsed

if TYPE_CHECKING:
    from attnopt.fingerprint import Fingerprint
    from attnopt.fitted import Fitted

SCHEMA = 4
OBJECTIVES = ("prefill", "decode", "memory", "mixed")
UNITS = {"loss": "percent of the dense loss", "kl": "nats per token"}
AGAIN = "Write the plan again with `attnopt plan`, or restore the file."


@dataclass(frozen=True)
class Budget:
    """What the plan may cost in quality."""

    kind: Annotated[str, "`loss`, or `kl`: the divergence from the dense model"]
    limit: Annotated[float, "in `unit`"]

    @property
    def unit(self) -> str:
        return UNITS[self.kind]

    def nats(self, dense_loss: float) -> float:
        """The limit in nats per token, where the dense model loses so many."""
        return self.limit if self.kind == "kl" else self.limit / 100 * dense_loss

    def __str__(self) -> str:
        return f"{self.limit:g} {self.unit}"


@dataclass(frozen=True)
class Lengths:
    """Total lengths N, in tokens."""

    profiled: Annotated[tuple[int, ...], "observed by the profile"]
    planned: Annotated[int, "planned for"]
    verified: Annotated[tuple[int, ...], "verified end to end"] = ()


@dataclass(frozen=True)
class Constraints:
    """What was asked for besides the budget; None where it was not."""

    min_speedup: Annotated[float | None, "of what the objective weighs"] = None
    max_kv_memory: Annotated[float | None, "share of the dense cache"] = None
    max_kv_bytes: Annotated[int | None, "bytes of one sequence at the planned length"] = None
    max_rules: Annotated[int | None, "distinct spans of one layer"] = None
    protect: Annotated[tuple[str, ...], "sites and heads left dense"] = ()
    protect_top: Annotated[int | None, "so many heads left dense, those whose removal damages most"] = None
    dense_below: Annotated[int | None, "the length under which all run dense"] = None
    retrieval: Annotated[
        float | None,
        "what a nat per answer of the profiled probe counted, in nats per token of text; null: 0.05",
    ] = None
    allow: Annotated[tuple[str, ...], "the families of candidates weighed besides spans"] = ()


@dataclass(frozen=True)
class Predicted:
    """What the planner expected at the planned length."""

    kl_nats_per_token: Annotated[float, "divergence from the dense model, in nats per token"]
    cost: Annotated[
        str,
        "where the costs come from: `measured` on this device, a `roofline` of a device's datasheet, `density` (kept "
        "query-key pairs counted) or `bytes` (cached, counted)",
    ]
    unit: Annotated[str, "of the two costs"]
    dense_cost: Annotated[float, "what the objective weighs, of the dense model"]
    planned_cost: Annotated[float, "the same under the plan"]
    speedup: Annotated[float, "the first over the second"]
    kv_memory: Annotated[float, "share of the dense cache"]
    gap: Annotated[
        float | None,
        "percent by which the front's plan was dearer than the exact one, which was then taken, or at most was where "
        "only a bound could be proved; null where `--exact` was not given",
    ] = None


@dataclass(frozen=True)
class Measured:
    """One end-to-end measurement against the dense model. None where something was not measured."""

    split: Annotated[str, "of the text: `verify`, searched with, or `final`, looked at once"]
    length: Annotated[int, "tokens of a sequence"]
    sequences: Annotated[int, "measured"]
    tokens: Annotated[int, "predicted in all of them"]
    dense_loss: Annotated[float, "nats per token"]
    planned_loss: Annotated[float, "nats per token"]
    increase: Annotated[float, "in the budget's unit"]
    upper_95: Annotated[
        float, "its upper one-sided 95 % paired-bootstrap bound: what has to be within the budget, in its unit"
    ]
    choices: Annotated[str, "hash of the choices that were measured"]
    kl: Annotated[float | None, "nats per token"] = None
    top1: Annotated[float | None, "share of tokens whose most likely successor is the same"] = None
    dense_retrieval: Annotated[float | None, "share of questions about far lines that are answered, dense"] = None
    planned_retrieval: Annotated[float | None, "the same under the plan"] = None


@dataclass(frozen=True)
class Plan:
    """`choices` maps a site's name to one Choice per query head. `min_length`: under it every site runs dense, but for
    heads that are gone. `visits`: by site and head, what heads whose keys are selected did on the text tried, as
    expected at the planned length. `calibration`: hash of the profiled text; `cost_table`: the CostTable's id.
    `fitted`: the maps and means that its heads need, kept in a file beside the plan's; None where none does."""

    model: str
    fingerprint: Fingerprint
    budget: Budget
    lengths: Lengths
    choices: Mapping[str, tuple[Choice, ...]]
    predicted: Predicted
    measured: tuple[Measured, ...] = ()
    objective: str = "prefill"
    constraints: Constraints = Constraints()
    min_length: int = 0
    cost_table: str = ""
    calibration: str = ""
    seed: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    visits: Mapping[str, Mapping[int, Share]] = field(default_factory=dict)
    fitted: Fitted | None = field(default=None, compare=False)
    schema: int = SCHEMA

    @property
    def id(self) -> str:
        """Hash of the whole content."""
        return hashlib.sha256(self.dump().encode()).hexdigest()[:12]

    @property
    def choices_id(self) -> str:
        """Hash of the choices alone: what a measurement belongs to."""
        return choices_id(self.choices)

    @property
    def edited(self) -> bool:
        """True if a measurement stands here that was made with other choices."""
        return any(m.choices != self.choices_id for m in self.measured)

    def tables(self, site: Site | str, length: int) -> tuple[list[int], list[int]]:
        """Sinks and windows, one int per query head, at total length `length`; a Site brings its own window along."""
        name = site if isinstance(site, str) else site.name
        own = None if isinstance(site, str) else site.mask.window
        choices = self.choices[name]
        if length < self.min_length:
            choices = tuple(c if CANDIDATES[c.candidate].far == "gone" else DENSE for c in choices)
        spans = [CANDIDATES[c.candidate].span(dict(c.params), length, own) for c in choices]
        return [s for s, _ in spans], [w for _, w in spans]

    def check(self, sites: Iterable[Site], fingerprint: Fingerprint | None = None, complete: bool = True) -> None:
        """Raise PlanError unless this plan was made for a model of these sites. `complete`: `sites` are all of them,
        not those of one graph."""
        found = {site.name: site for site in sites}
        remedy = f"The plan is for {self.model!r}. Profile and plan this model: `attnopt profile`, then `attnopt plan`."
        extra = [n for n in found if n not in self.choices]
        gone = [n for n in self.choices if n not in found] if complete else []
        for names, text in ((gone, "plans {}, which this model does not have"), (extra, "holds nothing for {}")):
            if names:
                some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
                raise PlanError(f"The plan {text.format(some)} ({len(self.choices)} sites, {len(found)} here).", remedy)
        for name, site in found.items():
            if len(self.choices[name]) != site.heads:
                counts = f"The plan has {len(self.choices[name])} heads at {name}, this model has {site.heads}."
                raise PlanError(counts, remedy)
            for head, choice in enumerate(self.choices[name]):
                wrong = CANDIDATES[choice.candidate].misfit(dict(choice.params), site)
                if wrong:
                    raise PlanError(f"Head {head} of {name}, {choice.candidate}: {wrong}.", "Correct it in the plan.")
        if fingerprint is not None:
            from attnopt.fingerprint import mismatch

            difference = mismatch(self.fingerprint, fingerprint)
            if difference:
                raise PlanError(f"The plan was made for another model: {difference}.", remedy)
        if self.fitted is not None:
            from attnopt.plan import sidecar

            wrong = sidecar.misfit(self.fitted, found)
            if wrong:
                raise PlanError(f"What was fitted for the plan does not fit this model: {wrong}.", remedy)

    def dump(self) -> str:
        """The file's text."""
        data = {
            "schema": self.schema,
            "versions": dict(self.versions),
            "model": {"name": self.model, "fingerprint": self.fingerprint.to_json()},
            "budget": {**asdict(self.budget), "unit": self.budget.unit},
            "objective": self.objective,
            "constraints": asdict(self.constraints),
            "lengths": asdict(self.lengths),
            "min_length": self.min_length,
            "predicted": asdict(self.predicted),
            "measured": [asdict(m) for m in self.measured],
            "cost_table": self.cost_table,
            "calibration": self.calibration,
            "fitted": None if self.fitted is None else hashlib.sha256(self.fitted.to_bytes()).hexdigest(),
            "seed": self.seed,
            "sites": {n: {"heads": len(c), "choices": fold(c)} for n, c in self.choices.items()},
        }
        if self.visits:
            data["visits"] = {n: {str(h): asdict(share) for h, share in of.items()} for n, of in self.visits.items()}
        return text_of(data) + "\n"

    def save(self, path: Path | str) -> None:
        """Write the file, and before it the one beside it where anything was fitted; no reader sees half of either."""
        from attnopt.codegen.emit import write_atomically
        from attnopt.plan import sidecar

        if self.fitted is not None:
            sidecar.refuse_overwriting(path)
            write_atomically(sidecar.beside(path), self.fitted.to_bytes())
        write_atomically(Path(path), self.dump())

    @classmethod
    def load(cls, path: Path | str) -> Plan:
        from attnopt.plan import sidecar

        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise PlanError(f"There is no plan at {path}.", "Check the path, or make one: `attnopt plan`.") from None
        except (OSError, UnicodeDecodeError) as e:
            raise PlanError(f"The plan {path} cannot be read: {e}.", AGAIN) from e
        return cls.parse(text, str(path), sidecar.read(path))

    @classmethod
    def parse(cls, text: str, file: str = "plan", fitted: bytes | None = None) -> Plan:
        """A plan from its text and the content of the file beside it; `file` is what errors call it."""
        from attnopt.plan.reading import read_plan

        root = Place(file, PlanError, AGAIN)
        return read_plan(root, parsed(text, root), fitted)


def choices_id(choices: Mapping[str, tuple[Choice, ...]]) -> str:
    """Twelve hex digits that change when any head's choice does."""
    content = repr(sorted((name, [(c.candidate, c.params) for c in heads]) for name, heads in choices.items()))
    return hashlib.sha256(content.encode()).hexdigest()[:12]
