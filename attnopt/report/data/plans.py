"""A plan, and the search that found it, as plain data."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from attnopt.cost import kept_pairs
from attnopt.ir import DENSE, Site
from attnopt.plan import Measured, Plan
from attnopt.planner.problem import key_bytes
from attnopt.planner.verify import Record
from attnopt.registry import CANDIDATES
from attnopt.report.cells import counted, far_of
from attnopt.report.data.candidates import label, steps_of
from attnopt.units import MIB, bytes_text

# Of all questions: so many fewer answers are worth a warning beside a budget that was kept.
FORGOTTEN = 0.05
# What plan_json says of a distinct span, in this order.
SPAN = ("choice", "sink", "window", "kept", "dense", "candidate", "far", "heads")
# What heads whose keys are selected did, of one head and as the mean over equal ones (`attnopt.ir.Share`).
SHARES = ("visited", "skipped", "recalled")
# What `steps_of` says of heads that select tokens.
STEPS = ("attended", "every", "behind")


def plan_json(plan: Plan, sites: Sequence[Site] | None = None) -> dict[str, Any]:
    """The plan with every head's span worked out at the planned length. kept: share of the dense head's pairs, or of
    the keys that a step of decoding attends to where it selects tokens, None where it is not known what a head
    selects; density: their mean, at most; far: what stands in for the keys outside the span ("linear", "mean"), "gone"
    where no attention is left, "selected" where blocks of keys are selected while running, "tokens" where steps of
    decoding select, "" where the head is dense at that length. sites: of the model, where they are known: they tell
    bytes of cache."""
    length = plan.lengths.planned
    found = spans_at(plan, length)
    density = density_of(found)
    labels = {str(choice): label(choice) for choices in plan.choices.values() for choice in choices}
    return {
        "id": plan.id,
        "model": plan.model,
        "fingerprint": plan.fingerprint.structure,
        "budget": {**asdict(plan.budget), "unit": plan.budget.unit},
        "objective": plan.objective,
        "constraints": {
            **asdict(plan.constraints),
            "protect": list(plan.constraints.protect),
            "allow": list(plan.constraints.allow),
        },
        "lengths": {
            "profiled": list(plan.lengths.profiled),
            "planned": length,
            "verified": list(plan.lengths.verified),
        },
        "min_length": plan.min_length,
        "predicted": asdict(plan.predicted),
        "measured": [asdict(m) for m in plan.measured],
        "edited": plan.edited,
        "cost_table": plan.cost_table,
        "calibration": plan.calibration,
        "seed": plan.seed,
        "versions": dict(plan.versions),
        "sites": found,
        "spans": [{"label": labels[span["choice"]], **span} for span in distinct(found)],
        "candidates": dict(Counter(choice.candidate for choices in plan.choices.values() for choice in choices)),
        "density": density,
        "totals": _totals(plan, density, sites),
    }


def distinct(sites: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The distinct spans of `spans_at`, those that keep most first. Heads of one choice whose keys are selected are
    one: what they keep is their mean."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for heads in sites.values():
        for head in heads:
            own = ("choice",) if head["far"] in ("selected", "tokens") else SPAN[:-1]
            groups.setdefault(tuple(head[name] for name in own), []).append(head)
    found = []
    for heads in groups.values():
        known = [head for head in heads if head.get("recalled") is not None]
        means = {name: sum(head[name] for head in known) / len(known) for name in SHARES if known}
        means |= {name: heads[0][name] for name in STEPS if name in heads[0]}
        every = [head["kept"] for head in heads if head["kept"] is not None]
        kept = sum(every) / len(every) if every else None
        found.append({**{name: heads[0][name] for name in SPAN[:-1]}, "kept": kept, "heads": len(heads), **means})
    return sorted(found, key=lambda span: (-_at_most(span), [span[name] for name in SPAN[:3]]))


def _at_most(span: Mapping[str, Any]) -> float:
    """What a head keeps, everything where that is not known."""
    return 1.0 if span["kept"] is None else float(span["kept"])


def spans_at(plan: Plan, length: int) -> dict[str, list[dict[str, Any]]]:
    """What every head of every site keeps at a total length; of one whose keys are selected what it did on the text
    tried, None where the plan does not say, and of one that selects tokens `steps_of`."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, choices in plan.choices.items():
        heads = found[name] = []
        for head, (choice, sink, window) in enumerate(zip(choices, *plan.tables(name, length), strict=True)):
            far = far_of(CANDIDATES[choice.candidate])
            dense = window >= length and (far not in ("selected", "tokens") or length < plan.min_length)
            sink, window = (0, length) if window >= length else (sink, window)
            kept: float | None = kept_pairs(length, sink, window) / kept_pairs(length, 0, length)
            shares = dict[str, Any]()
            if far in ("selected", "tokens") and not dense:
                share = plan.visits.get(name, {}).get(head)
                shares = dict.fromkeys(SHARES) if share is None else asdict(share)
                kept = None if share is None else share.visited * (1 - share.skipped)
            if far == "tokens" and not dense:
                shares |= steps_of(dict(choice.params), length)
                sink, kept = int(choice["sink"]), shares["attended"] / length
            heads.append({
                "choice": str(choice), "sink": sink, "window": window, "kept": kept, "dense": dense,
                "candidate": choice.candidate, "far": "" if dense else far, **shares,
            })  # fmt: skip
    return found


def window_text(span: Mapping[str, Any]) -> str:
    """The window of a distinct span in a word."""
    if span["far"] in ("gone", "selected", "tokens"):
        return "none" if span["far"] == "gone" else "selected"
    return "all" if span["dense"] else str(span["window"])


def kept_text(span: Mapping[str, Any]) -> str:
    """What a distinct span keeps of dense."""
    return "?" if span["kept"] is None else f"{100 * span['kept']:.1f} %"


def visited_text(span: Mapping[str, Any], length: int) -> str:
    """ "visits 23 % of its blocks, skips 5 % of these, recalls 98.1 % of the mass", or of a head that selects tokens "a
    step attends to 100 of 2048 keys, selected in 12.5 % of the steps, recalls 91.0 % of the mass", of data with
    `SHARES`, or `STEPS`; empty of other heads, and where nothing is known."""
    recalled = "" if span.get("recalled") is None else f"recalls {100 * span['recalled']:.1f} % of the mass"
    if "attended" in span:
        often = f"every {counted(span['every'], 'step')}" if span["every"] > 1 else "in every step"
        often = f"in {100 * span['visited']:.3g} % of the steps" if recalled else often
        often = f"by the attention {span['behind']} before" if span["behind"] else often
        said = f"a step attends to {span['attended']} of {length} keys, selected {often}"
        return ", ".join(filter(None, (said, recalled)))
    if not recalled:
        return ""
    skipped = f", skips {100 * span['skipped']:.3g} % of these" if span["skipped"] else ""
    return f"visits {100 * span['visited']:.3g} % of its blocks{skipped}, {recalled}"


def density_of(spans: Mapping[str, Sequence[Mapping[str, Any]]]) -> float:
    """The mean over heads of the share of dense pairs that they keep, at most."""
    every = [_at_most(head) for heads in spans.values() for head in heads]
    return sum(every) / len(every) if every else 1.0


def density_text(plan: Mapping[str, Any]) -> str:
    """Of the data of `plan_json`: "26.7 % of the dense query-key pairs at 2048 tokens", and how heads count that
    select."""
    spans, length = plan["spans"], plan["lengths"]["planned"]
    most = "at most " if any(span["kept"] is None for span in spans) else ""
    steps = " (of heads that select tokens, what a step attends to)" if any("attended" in s for s in spans) else ""
    return f"{most}{100 * plan['density']:.1f} % of the dense query-key pairs at {length} tokens{steps}"


# What a cost of Predicted.cost was added up from.
COSTS = {
    "measured": "from times measured on this device",
    "roofline": "by a roofline, nothing timed",
    "density": "pairs counted, nothing timed",
    "bytes": "bytes counted, nothing timed",
}


def costs_text(predicted: Mapping[str, Any]) -> str:
    """That a plan's costs are predicted, and from what."""
    return f"predicted ({COSTS.get(predicted['cost'], predicted['cost'])})"


def timed(predicted: Mapping[str, Any]) -> bool:
    """Whether what the objective weighs is time, so that its ratio is a speed: not bytes, pairs or a share."""
    return str(predicted["unit"]).split()[0] == "ms"


def constraint_texts(asked: Mapping[str, Any]) -> list[str]:
    """What was asked for besides the budget, in words."""
    words = {
        "min_speedup": "at least {:g} times as fast",
        "max_kv_memory": "at most {:.1%} of the KV cache",
        "max_kv_bytes": "at most {} bytes of KV cache",
        "max_rules": "at most {} spans a layer",
        "protect_top": "the {} heads whose removal hurts most stay dense",
        "dense_below": "dense under {} tokens",
        "retrieval": "a nat per answer of the probe counts as {:g} nats per token",
    }
    found = [text.format(asked[name]) for name, text in words.items() if asked[name] is not None]
    found += [f"dense: {', '.join(asked['protect'])}"] if asked["protect"] else []
    return found + ([f"weighed besides spans: {', '.join(asked['allow'])}"] if asked.get("allow") else [])


def plan_facts(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The plan's figures as (label, value), of the data of `plan_json`: first what was asked for, had and paid."""
    lengths, predicted, totals = plan["lengths"], plan["predicted"], plan["totals"]
    n, others = lengths["planned"], ", of other choices than these" if plan["edited"] else ""
    facts = [
        ("budget", _budget_text(plan)),
        ("density", f"{density_text(plan)}; {totals['replaced']} of {totals['heads']} heads replaced"),
        (plan["objective"], f"{predicted['dense_cost']:.4g} -> {predicted['planned_cost']:.4g} {predicted['unit']} "
                            f"at {n} tokens, {predicted['speedup']:.2f}x, {costs_text(predicted)}{others}"),
    ]  # fmt: skip
    if totals["kv_memory"] < 1:
        sizes = "" if totals["kv_bytes"] is None else f", {bytes_text(totals['kv_bytes'])} of "
        sizes += "" if totals["kv_bytes"] is None else f"{bytes_text(totals['dense_kv_bytes'])} a sequence"
        facts.append(("KV cache", f"{100 * totals['kv_memory']:.1f} % of dense at {n} tokens{sizes}{others}"))
    facts.append(("predicted", f"{predicted['kl_nats_per_token']:.3g} nats per token{others}"))
    # What decided first: the split that the search never saw.
    ordered = sorted(plan["measured"], key=lambda m: m["split"] != "final")
    facts += [("beware", lost) for lost in totals["lost"]]
    facts += [(f"{m['split']} text", f"{_measured_text(m, plan)}{others}") for m in ordered]
    if not plan["measured"]:
        facts.append(("measured", "nothing yet"))
    facts += [
        ("model", f"{plan['model']} ({plan['fingerprint']})"),
        ("lengths", f"planned {n}, profiled {_list(lengths['profiled'])}, verified {_list(lengths['verified'])}"),
    ]
    asked = constraint_texts(plan["constraints"])
    if asked:
        facts.append(("constraints", "; ".join(asked)))
    if predicted["gap"] is not None:
        facts.append(("exact plan", f"at most {predicted['gap']:.2f} % cheaper than the front's"))
    if plan["min_length"]:
        stays = " but for pruned heads" if "pruned" in plan["candidates"] else ""
        here = f"; {n} are fewer, so what is predicted there does not run" if n < plan["min_length"] else ""
        facts.append(("break-even", f"under {plan['min_length']} tokens every site runs dense{stays}{here}"))
    selecting = [span for span in plan["spans"] if span["far"] in ("selected", "tokens")]
    facts += [("selected", f"{counted(s['heads'], 'head')}, {s['label']}: {said}")
              for s in selecting if (said := visited_text(s, n))]  # fmt: skip
    if set(plan["candidates"]) - {"dense", "sink_window"}:
        facts.append(("heads", ", ".join(f"{n} {name}" for name, n in plan["candidates"].items())))
    return facts


def _budget_text(plan: Mapping[str, Any]) -> str:
    totals, budget = plan["totals"], plan["budget"]
    of = f"{budget['limit']:g} {budget['unit']}"
    if totals["budget_kept"] is None:
        return f"{of}; not known whether it is kept: " + (
            "edited since" if plan["measured"] else "nothing was measured"
        )
    if totals["budget_kept"]:
        return f"kept: at most {totals['upper_95']:.3g}, allowed {of}; {totals['margin']:.3g} to spare"
    return f"missed: at most {totals['upper_95']:.3g}, allowed {of}; {-totals['margin']:.3g} too much"


def _measured_text(m: Mapping[str, Any], plan: Mapping[str, Any]) -> str:
    retrieval = m["planned_retrieval"] is not None
    dense = ", where dense runs and its choices were measured," if m["length"] < plan["min_length"] else ""
    return (
        f"at {m['length']} tokens{dense} increase {m['increase']:.4g}, at most {m['upper_95']:.4g} "
        f"{plan['budget']['unit']}; loss {m['dense_loss']:.4f} -> {m['planned_loss']:.4f} nats per token "
        f"on {m['tokens']} tokens"
        + ("" if m["kl"] is None else f"; KL {m['kl']:.3g}")
        + ("" if m["top1"] is None else f"; same next token {100 * m['top1']:.2f} %")
        + (f"; retrieval {100 * m['dense_retrieval']:.0f} -> {100 * m['planned_retrieval']:.0f} %" if retrieval else "")
    )


def _totals(plan: Plan, density: float, sites: Sequence[Site] | None) -> dict[str, Any]:
    """split, length, increase, upper_95: of the last check, the length with the largest bound, in the budget's unit;
    margin: what of the budget it leaves. None where nothing was measured, or something else was. lost: what the budget
    does not count, in words."""
    last = [] if plan.edited else [m for m in plan.measured if m.split == "final"] or list(plan.measured)
    worst = max(last, key=lambda m: m.upper_95, default=None)
    every = [choice for heads in plan.choices.values() for choice in heads]
    dense_bytes = _dense_kv_bytes(plan, sites)
    return {
        "heads": len(every),
        "replaced": sum(choice != DENSE for choice in every),
        "density": density,
        "kv_memory": plan.predicted.kv_memory,
        "kv_bytes": None if dense_bytes is None else round(plan.predicted.kv_memory * dense_bytes),
        "dense_kv_bytes": dense_bytes,
        "speedup": plan.predicted.speedup,
        "predicted": plan.predicted.kl_nats_per_token,
        "split": worst and worst.split,
        "length": worst and worst.length,
        "increase": worst and finite(worst.increase),
        "upper_95": worst and finite(worst.upper_95),
        "budget_kept": worst and worst.upper_95 <= plan.budget.limit,
        "margin": worst and finite(plan.budget.limit - worst.upper_95),
        "lost": _lost(last),
    }


def _lost(measured: Sequence[Measured]) -> list[str]:
    return [
        f"questions about far lines answered at {m.length} tokens: {100 * m.planned_retrieval:.0f} %, "
        f"dense {100 * m.dense_retrieval:.0f} %"
        for m in measured
        if m.planned_retrieval is not None and m.dense_retrieval is not None
        and m.dense_retrieval - m.planned_retrieval > FORGOTTEN
    ]  # fmt: skip


def _dense_kv_bytes(plan: Plan, sites: Sequence[Site] | None) -> int | None:
    """Of one sequence at the planned length; None where sizes are not known."""
    if sites is not None:
        return sum(s.kv_heads * key_bytes(s) for s in sites) * plan.lengths.planned
    return round(plan.predicted.dense_cost * MIB) if plan.predicted.unit == "MiB of cache" else None


def _list(values: Iterable[int]) -> str:
    return ", ".join(map(str, values)) or "none"


def records_json(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The verify search: the figures of the worst length beside the prediction, and every measurement. limit: the part
    of the budget that the search keeps to, in the budget's unit, by which a point holds."""
    return [
        {
            "step": record.step,
            "predicted": record.predicted,
            "cost": record.cost,
            "increase": finite(record.worst.increase),
            "upper_95": finite(record.worst.upper_95),
            "length": record.worst.length,
            "holds": record.holds,
            "limit": record.limit,
            "measured": [finite(asdict(m)) for m in record.measured],
        }
        for record in records
    ]


def finite(value: Any) -> Any:
    """Plain data, of any depth, without infinities and NaN, which JSON does not have: null stands for them."""
    if isinstance(value, Mapping):
        return {key: finite(held) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return [finite(held) for held in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
