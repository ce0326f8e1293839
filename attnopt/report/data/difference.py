"""What two plans, or two profiles, of one model do not have in common, as plain data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attnopt.errors import PlanError, ProfileError
from attnopt.fingerprint import Fingerprint, mismatch
from attnopt.ir import Choice, Site
from attnopt.plan import Plan
from attnopt.planner.make import calibration_of
from attnopt.profile_file import Profile
from attnopt.report.cells import fold_rows, number_ranges
from attnopt.report.data.candidates import choice_facts, label, mean_share
from attnopt.report.data.plans import constraint_texts, density_of, plan_json, spans_at, timed

MOVED = 12  # heads in the list of those that moved most
# Of a plan's figures, those that two plans are compared by: name, key of `totals`, format.
TOTALS = (
    ("heads replaced", "replaced"),
    ("density", "density"),
    ("KV cache, share of dense", "kv_memory"),
    ("KV cache, bytes", "kv_bytes"),
    ("predicted, nats per token", "predicted"),
    ("measured increase", "increase"),
    ("measured, at most", "upper_95"),
    ("budget kept", "budget_kept"),
)


def plans_json(
    one: Plan, other: Plan, names: tuple[str, str], sites: Sequence[Site] | None = None
) -> dict[str, Any]:  # fmt: skip
    """changes: heads whose choice differs, layers and heads of equal changes together; sites: of every head whether it
    changed and what share of its pairs it keeps in either plan; of a change, cost: the share of dense pairs of both
    choices; None of a head whose selected blocks are not known. All shares of pairs are at the longer planned length,
    of heads that select tokens what a step of decoding attends to. PlanError where the plans are not of the same
    attentions."""
    _same_sites({n: len(h) for n, h in one.choices.items()}, {n: len(h) for n, h in other.choices.items()}, PlanError)
    first, second = plan_json(one, sites), plan_json(other, sites)
    length = max(one.lengths.planned, other.lengths.planned)
    spans = [spans_at(plan, length) for plan in (one, other)]
    found: dict[str, list[dict[str, Any]]] = {}
    for site, heads in spans[0].items():
        found[site] = [
            {"changed": a != b, "kept": [own["kept"], its["kept"]]}
            for a, b, own, its in zip(one.choices[site], other.choices[site], heads, spans[1][site], strict=True)
        ]
    changes, settings = _changes(one, other, length), _settings(first, second)
    totals = [{**plan["totals"], "density": density_of(at)} for plan, at in zip((first, second), spans, strict=True)]
    figures = [(what, totals[0][key], totals[1][key]) for what, key in TOTALS]
    figures += _gains(first, second)
    return {
        "of": "plans",
        "files": list(names),
        "ids": [first["id"], second["id"]],
        "same": not changes and not settings and all(a == b for _, a, b in figures),
        "heads": sum(map(len, found.values())),
        "changed": sum(head["changed"] for heads in found.values() for head in heads),
        "totals": [{"what": what, "one": a, "other": b} for what, a, b in figures],
        "settings": settings,
        "changes": changes,
        "sites": found,
        "notes": [*_notes(one.fingerprint, other.fingerprint), *_lengths(one, other)],
    }


def _gains(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """The ratio of costs, where both plans weigh the same: bytes are not to be held against time."""
    weighed = [(plan["objective"], plan["predicted"]["unit"]) for plan in (one, other)]
    if weighed[0] != weighed[1]:
        return []
    objective, unit = weighed[0]
    what = "times as fast, predicted" if timed(one["predicted"]) else f"{objective}, {unit}: dense / planned"
    return [(what, one["totals"]["speedup"], other["totals"]["speedup"])]


def _lengths(one: Plan, other: Plan) -> list[str]:
    a, b = one.lengths.planned, other.lengths.planned
    if a == b:
        return []
    return [
        f"Planned for {a} and {b} tokens: shares of pairs are of {max(a, b)} tokens in both; "
        "cache, predictions and measurements are each plan's own."
    ]


def _same_sites(
    one: Mapping[str, int], other: Mapping[str, int], error: type[PlanError] | type[ProfileError]
) -> None:  # fmt: skip
    if one == other:
        return
    differ = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    counts = " and ".join(f"{n.get(differ[0], 0)} heads" for n in (one, other))
    raise error(
        f"These are of different models: {differ[0]} has {counts}.",
        "Compare two of one model, or of two of equal shape.",
    )


def _notes(one: Fingerprint, other: Fingerprint) -> list[str]:
    different = mismatch(one, other)
    return [f"Not the same model: {different}."] if different else []


def _changes(one: Plan, other: Plan, length: int) -> list[dict[str, Any]]:
    """Equal changes of one site together, then of sites that differ in a number only; cost at a total `length`."""
    rows: list[dict[str, Any]] = []
    for site, heads in one.choices.items():
        groups: dict[tuple[Choice, Choice], list[int]] = {}
        for head, pair in enumerate(zip(heads, other.choices[site], strict=True)):
            if pair[0] != pair[1]:
                groups.setdefault(pair, []).append(head)
        rows += [
            {
                "site": site, "heads": number_ranges(n), "count": len(n), "pair": pair,
                "visits": [[p.visits[site][h] for h in n if h in p.visits.get(site, {})] for p in (one, other)],
            }
            for pair, n in groups.items()
        ]  # fmt: skip
    folded = fold_rows(rows, lambda r: str(r["site"]), lambda r: (r["heads"], r["pair"]))
    return [
        {
            "sites": name, "heads": rows[0]["heads"], "count": sum(r["count"] for r in rows),
            "choices": [str(choice) for choice in rows[0]["pair"]],
            "labels": [label(choice) for choice in rows[0]["pair"]],
            "cost": [
                choice_facts(choice, length, mean_share([s for row in rows for s in row["visits"][n]]))["cost"]
                for n, choice in enumerate(rows[0]["pair"])
            ],
        }
        for name, rows in folded
    ]  # fmt: skip


def _settings(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[dict[str, str]]:
    """What was asked for, where that differs."""

    def asked(plan: Mapping[str, Any]) -> dict[str, str]:
        return {
            "budget": f"{plan['budget']['limit']:g} {plan['budget']['unit']}",
            "objective": plan["objective"],
            "planned length": str(plan["lengths"]["planned"]),
            "constraints": "; ".join(constraint_texts(plan["constraints"])) or "none",
            "dense under": f"{plan['min_length']} tokens",
            "profiled text": plan["calibration"],
            "seed": str(plan["seed"]),
            "versions": ", ".join(f"{name} {version}" for name, version in plan["versions"].items()),
            "costs": f"{plan['predicted']['cost']} ({plan['cost_table'] or 'no table named'})",
        }

    return _differing(asked(one), asked(other))


def profiles_json(one: Profile, other: Profile, names: tuple[str, str]) -> dict[str, Any]:
    """How alike two profiles rank heads, by what they lose beyond the narrowest window that both hold, the most sinks
    kept (`unit` says in what). lengths: Spearman's correlation over all heads, and the median of other / one; moved:
    the heads whose rank changed most, at the longest length, 1 the most damaged; sites: ranks of every head in both.
    ProfileError where they are not of the same attentions or have no length, or no span, in common."""
    counts = [{site: o.heads for (site, _), o in p.observations.items()} for p in (one, other)]
    _same_sites(counts[0], counts[1], ProfileError)
    lengths = [n for n in one.lengths if n in other.lengths]
    windows, sinks = (
        [x for x in getattr(one.header.grid, name) if x in getattr(other.header.grid, name)]
        for name in ("windows", "sinks")
    )
    if not lengths or not windows or not sinks:
        what = "length" if not lengths else "window" if not windows else "sink"
        raise ProfileError(f"These profiles have no {what} in common.", "Compare profiles of equal --lengths.")
    held = ["t2" in p.header.held for p in (one, other)]
    if held[0] != held[1]:
        raise ProfileError(
            "One of these profiles was made with --forward-only, and holds no damages.", "Profile again without it."
        )
    span = windows[0], sinks[-1]
    heads = [(site, head) for site, count in counts[0].items() for head in range(count)]
    found = {n: [_damages(p, counts[0], n, *span) for p in (one, other)] for n in lengths}
    ranks = [_ranks(values, descending=True) for values in found[lengths[-1]]]
    order = sorted(range(len(heads)), key=lambda h: -abs(float(ranks[0][h] - ranks[1][h])))
    of_site: dict[str, list[dict[str, Any]]] = {}
    for h, (site, _) in enumerate(heads):
        of_site.setdefault(site, []).append({"ranks": [float(r[h]) for r in ranks]})
    settings = _profile_settings(one, other)
    return {
        "of": "profiles",
        "files": list(names),
        "same": not settings and _equal(one, other),
        "window": span[0],
        "sink": span[1],
        "unit": "nats per token" if held[0] else "squared change of the output per row",
        "lengths": [
            {"length": n, "heads": len(heads), "correlation": _spearman(a, b), "ratio": _median_ratio(a, b)}
            for n, (a, b) in found.items()
        ],
        "moved": [
            {
                "site": heads[h][0], "head": heads[h][1], "damages": [float(v[h]) for v in found[lengths[-1]]],
                "ranks": [float(r[h]) for r in ranks],
            }
            for h in order[:MOVED] if ranks[0][h] != ranks[1][h]
        ],
        "settings": settings,
        "sites": of_site,
        "notes": _notes(one.header.fingerprint, other.header.fingerprint),
    }  # fmt: skip


def _equal(one: Profile, other: Profile) -> bool:
    """Whether every sum is the same."""
    pairs = [(o, other.observations.get(key)) for key, o in one.observations.items()]
    return len(pairs) == len(other.observations) and all(
        b is not None and a.rows == b.rows and all(torch.equal(a.sums[n], b.sums[n]) for n in a.sums) for a, b in pairs
    )


def _damages(profile: Profile, sites: Iterable[str], length: int, window: int, sink: int) -> Tensor:
    """Of all heads, in the order of `sites`."""
    at = profile.header.grid.index(sink, window)
    return torch.cat([profile.observations[site, length].scores()[:, *at] for site in sites])


def _ranks(values: Tensor, descending: bool = False) -> Tensor:
    """From 1 on; equal values share the mean of their ranks."""
    _, inverse, counts = torch.unique(-values if descending else values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]


def _spearman(one: Tensor, other: Tensor) -> float | None:
    """The correlation of ranks; None where all heads of one are alike."""
    a, b = (_ranks(values) - (len(values) + 1) / 2 for values in (one, other))
    size = float(a.norm() * b.norm())
    return max(min(float(a @ b) / size, 1.0), -1.0) if size else None


def _median_ratio(one: Tensor, other: Tensor) -> float | None:
    """other / one, the median over heads that lose anything in `one`."""
    losing = one > 0
    return float((other[losing] / one[losing]).median()) if losing.any() else None


def _profile_settings(one: Profile, other: Profile) -> list[dict[str, str]]:
    def facts(profile: Profile) -> dict[str, str]:
        header = profile.header
        return {
            "lengths": ", ".join(map(str, profile.lengths)),
            "samples": ", ".join(f"{count} of {n}" for n, count in profile.samples.items()),
            "text": calibration_of(profile),
            "loss of": "; ".join(header.supervision),
            "windows": ", ".join(map(str, header.grid.windows)),
            "sinks": ", ".join(map(str, header.grid.sinks)),
            "dtypes": ", ".join(header.dtypes),
        }

    return _differing(facts(one), facts(other))


def _differing(one: Mapping[str, str], other: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"what": name, "one": one[name], "other": other[name]} for name in one if one[name] != other[name]]
