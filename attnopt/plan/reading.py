"""A plan file's content, checked value by value: an error names the place and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cache
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from attnopt.ir import Choice, Share
from attnopt.plan import OBJECTIVES, SCHEMA, UNITS, Budget, Constraints, Lengths, Measured, Plan, Predicted, sidecar
from attnopt.plan.writing import ranges
from attnopt.registry import CANDIDATES
from attnopt.strict_json import Place, nearest, show

if TYPE_CHECKING:
    from attnopt.fingerprint import Fingerprint
    from attnopt.fitted import Fitted


_KEYS = (
    "schema", "versions", "model", "budget", "objective", "constraints", "lengths", "min_length", "predicted",
    "measured", "cost_table", "calibration", "fitted", "seed", "sites",
)  # fmt: skip


# Resolved once for each record: every time anew, reading a plan takes three times as long.
_hints = cache(get_type_hints)


def read_plan(root: Place, data: Any, fitted: bytes | None) -> Plan:
    """fitted: the content of the file beside the plan's, if there is one."""
    if isinstance(data, dict) and data.get("schema", SCHEMA) != SCHEMA:
        found = show(data["schema"])
        root.at("schema").fail(
            f"this is schema {found}; this attnopt reads schema {SCHEMA}", "Write the plan again with `attnopt plan`."
        )
    data = root.record(data, _KEYS, ("visits",))
    place = root.at("versions")
    versions = _of_names(place, data["versions"])
    model = root.at("model").record(data["model"], ("name", "fingerprint"))
    lengths = root.at("lengths").record(data["lengths"], [f.name for f in fields(Lengths)])
    many = {
        key: tuple(p.number(v, int, 1) for p, v in root.at("lengths").at(key).items(lengths[key]))
        for key in ("profiled", "verified")
    }
    planned = root.at("lengths").at("planned").number(lengths["planned"], int, 1)
    fingerprint = _read_fingerprint(root.at("model").at("fingerprint"), model["fingerprint"])
    choices = _read_sites(root.at("sites"), data["sites"])
    visits = _read_visits(root.at("visits"), data.get("visits", {}), choices)
    held = _read_fitted(root.at("fitted"), data["fitted"], fitted, fingerprint)
    sidecar.check(root, held, choices)
    return Plan(
        model=root.at("model").at("name").string(model["name"]),
        fingerprint=fingerprint,
        budget=_read_budget(root.at("budget"), data["budget"]),
        lengths=Lengths(many["profiled"], planned, many["verified"]),
        choices=choices,
        predicted=_read_numbers(root.at("predicted"), data["predicted"], Predicted),
        measured=tuple(_read_numbers(p, v, Measured) for p, v in root.at("measured").items(data["measured"])),
        objective=_read_objective(root.at("objective"), data["objective"]),
        constraints=_read_numbers(root.at("constraints"), data["constraints"], Constraints),
        min_length=root.at("min_length").number(data["min_length"], int, 0),
        cost_table=root.at("cost_table").string(data["cost_table"]),
        calibration=root.at("calibration").string(data["calibration"]),
        seed=root.at("seed").number(data["seed"], int),
        versions={k: place.at(k).string(v) for k, v in versions.items()},
        visits=visits,
        fitted=held,
    )


def _read_fitted(place: Place, value: Any, content: bytes | None, fingerprint: Fingerprint) -> Fitted | None:
    if value is None:
        return None
    if not re.fullmatch(r"[0-9a-f]{64}", place.string(value)):
        place.fail(f"{show(value)} is no sha256", sidecar.AGAIN)
    return sidecar.found(place, value, content, fingerprint)


def _read_budget(place: Place, value: Any) -> Budget:
    value = place.record(value, ("kind", "limit", "unit"))
    if value["kind"] not in tuple(UNITS):
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
    for name, wanted in _hints(kind).items():
        here, found = place.at(name), value[name]
        if found is None and NoneType in get_args(wanted):
            read[name] = None
        elif wanted is str:
            read[name] = here.string(found)
        elif get_origin(wanted) is tuple:
            read[name] = tuple(p.string(v) for p, v in here.items(found))
        else:
            read[name] = here.number(found, int if int in (wanted, *get_args(wanted)) else float)
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
            here.fail(f"no choice for head {ranges(missing)} of {heads}", 'Add it, e.g. as {"candidate": "dense"}.')
        sites[name] = tuple(taken[h] for h in range(heads))
    return sites


def _read_visits(
    place: Place, value: Any, choices: Mapping[str, Sequence[Choice]]
) -> dict[str, dict[int, Share]]:  # fmt: skip
    visits: dict[str, dict[int, Share]] = {}
    for name, heads in _of_names(place, value).items():
        here = place.at(name)
        if name not in choices:
            here.fail("there is no such site", "Name one of those under sites.")
        for text, record in _of_names(here, heads).items():
            if not re.fullmatch(r"\d{1,6}", text) or int(text) >= len(choices[name]):
                here.fail(f"head {text!r} does not exist; there are 0-{len(choices[name]) - 1}", "Correct it.")
            at = here.at(text)
            held = at.record(record, [f.name for f in fields(Share)])
            shares = {key: at.at(key).number(number, float, 0) for key, number in held.items()}
            over = [key for key, number in shares.items() if number > 1]
            if over:
                at.at(over[0]).fail(f"{shares[over[0]]:g} is no share of 1")
            visits.setdefault(name, {})[int(text)] = Share(**shares)
    return visits


def _of_names(place: Place, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        place.fail(f"a record is needed here, not {show(value)}")
    return dict(value)


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
    kinds = {p.name: p.kind for p in candidate.params}
    params = {k: v for k, v in place.record(value, ("candidate", *kinds)).items() if k != "candidate"}
    problem = candidate.problem(params)
    if problem:
        place.fail(problem, "Correct the value, or choose dense.")
    return Choice.of(name, {k: kinds[k](v) for k, v in params.items()})
