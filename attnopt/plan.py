"""The plan: one Choice per query head per site, what it was promised to cost, and what was measured.

    plan = Plan.load("plan.json")                    # PlanError names the file, the place and the remedy
    plan.check(sites, fingerprint)                   # PlanError if it was made for another model
    sinks, windows = plan.tables(site, length)       # one int per query head

The file is described in docs/plan-file.md. ``Plan.load`` then ``dump`` gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnopt.errors import PlanError
from attnopt.ir import DENSE, Choice, Site
from attnopt.registry import CANDIDATES
from attnopt.strict_json import Place, nearest, parsed, show

if TYPE_CHECKING:
    from attnopt.fingerprint import Fingerprint

SCHEMA = 3
OBJECTIVES = ("prefill", "decode", "memory", "mixed")
UNITS = {"loss": "percent of the dense loss", "kl": "nats per token"}
AGAIN = "Write the plan again with `attnopt plan`, or restore the file."
_LINE = 116  # a record of numbers up to this width stays on one line of the file


@dataclass(frozen=True)
class Budget:
    """What the plan may cost in quality: kind "loss" in percent of the dense loss, kind "kl" in nats per token."""

    kind: str
    limit: float

    @property
    def unit(self) -> str:
        return UNITS[self.kind]

    def __str__(self) -> str:
        return f"{self.limit:g} {self.unit}"


@dataclass(frozen=True)
class Lengths:
    """Total lengths N, in tokens: observed by the profile, planned for, and verified end to end."""

    profiled: tuple[int, ...]
    planned: int
    verified: tuple[int, ...] = ()


@dataclass(frozen=True)
class Constraints:
    """What was asked for besides the budget; None where it was not. min_speedup: of what the objective weighs.
    max_kv_memory, max_kv_bytes: share of the dense cache, and bytes of one sequence at the planned length. max_rules:
    distinct spans of one layer. protect: sites and heads left dense; protect_top: so many heads, those whose removal
    damages most. dense_below: the length under which all run dense. retrieval: what a nat per answer of the profiled
    probe counted, in nats per token of text."""

    min_speedup: float | None = None
    max_kv_memory: float | None = None
    max_kv_bytes: int | None = None
    max_rules: int | None = None
    protect: tuple[str, ...] = ()
    protect_top: int | None = None
    dense_below: int | None = None
    retrieval: float | None = None


@dataclass(frozen=True)
class Predicted:
    """What the planner expected at the planned length, of what the objective weighs, in `unit`. `cost` says where the
    costs come from: "measured" on this device, a "roofline" of a device, "density" (kept query-key pairs) or "bytes"
    (cached). kv_memory: share of the dense cache. gap: percent by which the front's plan was dearer than the exact one,
    which was then taken, or at most was; None where it was not computed."""

    kl_nats_per_token: float
    cost: str
    unit: str
    dense_cost: float
    planned_cost: float
    speedup: float
    kv_memory: float
    gap: float | None = None


@dataclass(frozen=True)
class Measured:
    """One end-to-end measurement against the dense model. Losses in nats per token; `increase` and `upper_95` (upper
    one-sided 95 % paired bootstrap bound) in the budget's unit. `choices` is the `choices_id` that was measured.
    kl: nats per token; top1: share of tokens with the same most likely next token; retrieval: share of questions about
    far lines answered, dense and planned. None where it was not measured."""

    split: str
    length: int
    sequences: int
    tokens: int
    dense_loss: float
    planned_loss: float
    increase: float
    upper_95: float
    choices: str
    kl: float | None = None
    top1: float | None = None
    dense_retrieval: float | None = None
    planned_retrieval: float | None = None


@dataclass(frozen=True)
class Plan:
    """`choices` maps a site's name to one Choice per query head. `min_length`: under it every site runs dense.
    `calibration`: hash of the profiled text; `cost_table`: the CostTable's id."""

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
            choices = (DENSE,) * len(choices)
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
        if fingerprint is not None:
            from attnopt.fingerprint import mismatch

            difference = mismatch(self.fingerprint, fingerprint)
            if difference:
                raise PlanError(f"The plan was made for another model: {difference}.", remedy)

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
            "seed": self.seed,
            "sites": {n: {"heads": len(c), "choices": fold(c)} for n, c in self.choices.items()},
        }
        return _text(data) + "\n"

    def save(self, path: Path | str) -> None:
        from attnopt.codegen.emit import write_atomically

        write_atomically(Path(path), self.dump())

    @classmethod
    def load(cls, path: Path | str) -> Plan:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise PlanError(f"There is no plan at {path}.", "Check the path, or make one: `attnopt plan`.") from None
        except (OSError, UnicodeDecodeError) as e:
            raise PlanError(f"The plan {path} cannot be read: {e}.", AGAIN) from e
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, file: str = "plan") -> Plan:
        """A plan from its text; `file` is what errors call it."""
        root = Place(file, PlanError, AGAIN)
        return _read_plan(root, parsed(text, root))


def choices_id(choices: Mapping[str, tuple[Choice, ...]]) -> str:
    """Twelve hex digits that change when any head's choice does."""
    content = repr(sorted((name, [(c.candidate, c.params) for c in heads]) for name, heads in choices.items()))
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def fold(choices: Iterable[Choice]) -> dict[str, dict[str, Any]]:
    """Equal heads together, in the order of their first head: {"0-3,6": {"candidate": ...}, ...}."""
    groups: dict[Choice, list[int]] = {}
    for head, choice in enumerate(choices):
        groups.setdefault(choice, []).append(head)
    return {_ranges(heads): _choice_json(choice) for choice, heads in groups.items()}


def _choice_json(choice: Choice) -> dict[str, Any]:
    values = dict(choice.params)
    return {"candidate": choice.candidate, **{p.name: values[p.name] for p in CANDIDATES[choice.candidate].params}}


def _ranges(heads: list[int]) -> str:
    runs: list[list[int]] = []
    for head in heads:
        if runs and head == runs[-1][1] + 1:
            runs[-1][1] = head
        else:
            runs.append([head, head])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _text(value: Any, depth: int = 0, used: int = 0) -> str:
    """JSON with two-space indents, a short record of plain values on one line."""
    flat = json.dumps(value, ensure_ascii=False, allow_nan=False)
    nested = isinstance(value, (dict, list)) and bool(value)
    inner = list(value.values()) if isinstance(value, dict) else value
    simple = nested and not any(isinstance(v, (dict, list)) for v in inner)
    if not nested or (simple and depth and 2 * depth + used + len(flat) <= _LINE):
        return flat
    pad = "  " * (depth + 1)
    if isinstance(value, list):
        rows, ends = [_text(v, depth + 1) for v in value], "[]"
    else:
        keys = [json.dumps(k, ensure_ascii=False) + ": " for k in value]
        rows, ends = [k + _text(v, depth + 1, len(k)) for k, v in zip(keys, value.values(), strict=True)], "{}"
    return ends[0] + "\n" + ",\n".join(pad + row for row in rows) + "\n" + "  " * depth + ends[1]


# Reading


_KEYS = (
    "schema", "versions", "model", "budget", "objective", "constraints", "lengths", "min_length", "predicted",
    "measured", "cost_table", "calibration", "seed", "sites",
)  # fmt: skip


def _read_plan(root: Place, data: Any) -> Plan:
    if isinstance(data, dict) and data.get("schema", SCHEMA) != SCHEMA:
        found = show(data["schema"])
        root.at("schema").fail(
            f"this is schema {found}; this attnopt reads schema {SCHEMA}", "Write the plan again with `attnopt plan`."
        )
    data = root.record(data, _KEYS)
    place = root.at("versions")
    if not isinstance(data["versions"], dict):
        place.fail(f"a record is needed here, not {show(data['versions'])}")
    model = root.at("model").record(data["model"], ("name", "fingerprint"))
    lengths = root.at("lengths").record(data["lengths"], [f.name for f in fields(Lengths)])
    many = {
        key: tuple(p.number(v, int, 1) for p, v in root.at("lengths").at(key).items(lengths[key]))
        for key in ("profiled", "verified")
    }
    planned = root.at("lengths").at("planned").number(lengths["planned"], int, 1)
    return Plan(
        model=root.at("model").at("name").string(model["name"]),
        fingerprint=_read_fingerprint(root.at("model").at("fingerprint"), model["fingerprint"]),
        budget=_read_budget(root.at("budget"), data["budget"]),
        lengths=Lengths(many["profiled"], planned, many["verified"]),
        choices=_read_sites(root.at("sites"), data["sites"]),
        predicted=_read_numbers(root.at("predicted"), data["predicted"], Predicted),
        measured=tuple(_read_numbers(p, v, Measured) for p, v in root.at("measured").items(data["measured"])),
        objective=_read_objective(root.at("objective"), data["objective"]),
        constraints=_read_numbers(root.at("constraints"), data["constraints"], Constraints),
        min_length=root.at("min_length").number(data["min_length"], int, 0),
        cost_table=root.at("cost_table").string(data["cost_table"]),
        calibration=root.at("calibration").string(data["calibration"]),
        seed=root.at("seed").number(data["seed"], int),
        versions={k: place.at(k).string(v) for k, v in data["versions"].items()},
    )


def _read_budget(place: Place, value: Any) -> Budget:
    value = place.record(value, ("kind", "limit", "unit"))
    if value["kind"] not in UNITS:
        place.at("kind").fail(f"{show(value['kind'])} is no budget", f"Use {' or '.join(UNITS)}.")
    budget = Budget(value["kind"], place.at("limit").number(value["limit"], float, 0))
    if value["unit"] != budget.unit:
        place.at("unit").fail(f"a {budget.kind!r} budget is in {budget.unit}, not {show(value['unit'])}")
    return budget


def _read_objective(place: Place, value: Any) -> str:
    if value not in OBJECTIVES:
        place.fail(f"{show(value)} is no objective", f"Use {', '.join(OBJECTIVES)}.")
    return str(value)


def _read_numbers(place: Place, value: Any, kind: type) -> Any:
    """A flat record of strings, lists of strings, ints and floats, null where the annotation allows it."""
    value = place.record(value, [f.name for f in fields(kind)])
    read: dict[str, Any] = {}
    for f in fields(kind):
        here = place.at(f.name)
        found, wanted = value[f.name], str(f.type)
        if found is None and wanted.endswith("| None"):
            read[f.name] = None
        elif wanted == "str":
            read[f.name] = here.string(found)
        elif wanted.startswith("tuple"):
            read[f.name] = tuple(p.string(v) for p, v in here.items(found))
        else:
            read[f.name] = here.number(found, int if wanted.startswith("int") else float)
    return kind(**read)


def _read_fingerprint(place: Place, value: Any) -> Fingerprint:
    from attnopt.fingerprint import Fingerprint

    value = place.record(value, ("structure", "samples"))
    samples = tuple(p.number(v, float) for p, v in place.at("samples").items(value["samples"]))
    return Fingerprint(place.at("structure").string(value["structure"]), samples)


def _read_sites(place: Place, value: Any) -> dict[str, tuple[Choice, ...]]:
    if not isinstance(value, dict) or not value:
        place.fail(f"a record of sites is needed here, not {show(value)}")
    sites = {}
    for name, record in value.items():
        here = place.at(name)
        record = here.record(record, ("heads", "choices"))
        heads = here.at("heads").number(record["heads"], int, 1)
        here = here.at("choices")
        if not isinstance(record["choices"], dict):
            here.fail(f"a record is needed here, not {show(record['choices'])}")
        taken: dict[int, Choice] = {}
        for text, choice in record["choices"].items():
            read = _read_choice(here.at(text), choice)
            for head in _read_heads(here, text, heads):
                if head in taken:
                    here.at(text).fail(f"head {head} is chosen twice", "List every head once.")
                taken[head] = read
        missing = [h for h in range(heads) if h not in taken]
        if missing:
            here.fail(f"no choice for head {_ranges(missing)} of {heads}", 'Add it, e.g. as {"candidate": "dense"}.')
        sites[name] = tuple(taken[h] for h in range(heads))
    return sites


def _read_heads(place: Place, text: str, heads: int) -> Iterator[int]:
    for part in text.split(","):
        bounds = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part)
        if bounds is None:
            place.fail(f"{text!r} does not name heads", 'Write them like "0-3,6".')
        first, last = int(bounds[1]), int(bounds[2] or bounds[1])
        if first > last or last >= heads:
            place.fail(f"heads {part!r} do not exist; there are 0-{heads - 1}", "Correct the range.")
        yield from range(first, last + 1)


def _read_choice(place: Place, value: Any) -> Choice:
    if not isinstance(value, dict) or not isinstance(value.get("candidate"), str):
        place.fail(f"a candidate is needed here, not {show(value)}", 'Write e.g. {"candidate": "dense"}.')
    name = value["candidate"]
    if name not in CANDIDATES:
        place.fail(f"unknown candidate {name!r}", nearest(name, [n for n, _ in CANDIDATES], "There are"))
    candidate = CANDIDATES[name]
    if candidate.far:
        place.fail(f"{name} needs what was fitted of its head, which plan files do not hold", "Choose another one.")
    kinds = {p.name: p.kind for p in candidate.params}
    params = {k: v for k, v in place.record(value, ("candidate", *kinds)).items() if k != "candidate"}
    problem = candidate.problem(params)
    if problem:
        place.fail(problem, "Correct the value, or choose dense.")
    return Choice.of(name, {k: kinds[k](v) for k, v in params.items()})
