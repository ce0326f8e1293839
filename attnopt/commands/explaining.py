"""`attnopt explain`: what was weighed for one head, and why the choice won."""

from __future__ import annotations

import argparse
import difflib
from typing import Any

from attnopt.commands.common import emit
from attnopt.cost import CostTable
from attnopt.errors import OptionError, PlanError
from attnopt.fitted import Fitted
from attnopt.ir import DENSE, Choice
from attnopt.plan import Plan
from attnopt.planner.tried import not_pruned, refused
from attnopt.profile_file import Profile
from attnopt.registry import CANDIDATES
from attnopt.report import terminal

UNKNOWN = "not compared: what the chosen one loses stands in the file of fits, give --fitted"


def explain(args: argparse.Namespace) -> None:
    held, seen = Plan.load(args.plan), Profile.load(args.profile)
    fitted = Fitted.load(args.fitted) if args.fitted else None
    site, _, head = args.head.rpartition(".")
    if not head.isdigit() or site not in held.choices or int(head) >= len(held.choices.get(site, ())):
        near = difflib.get_close_matches(site, held.choices, 1) or list(held.choices)[:1]
        heads = len(held.choices[near[0]]) if near else 0
        raise OptionError(
            f"The plan has no head {args.head!r}.", f"Try {near[0] if near else 'SITE'}.0 to .{heads - 1}."
        )
    if (missing := [n for n in held.choices if n not in seen.sites]) and site in missing:
        raise PlanError(f"The profile holds nothing of {site}.", "Give the profile the plan was made from.")
    if fitted is not None:
        fitted.check_model(held.fingerprint)
    rows = candidates_of(held, seen, site, int(head), fitted)
    title = (
        f"{args.head} at {held.lengths.planned} keys: damage in nats per token, cost in pairs of query and key, "
        "as a share of dense"
    )
    emit(args, {"head": args.head, "candidates": rows}, lambda: terminal.print_candidates(rows, title))


def candidates_of(
    held: Plan, seen: Profile, site: str, head: int, fitted: Fitted | None = None
) -> list[dict[str, Any]]:  # fmt: skip
    """Every candidate's predicted damage (nats per token, the worst length; None where it is not known) and cost as a
    share of a dense head's pairs; what it keeps beyond keys; and why it was not chosen."""
    grid, length = seen.header.grid, held.lengths.planned
    chosen = held.choices[site][head]
    space = {c: None for _, kind in CANDIDATES for c in kind.space(grid, [*seen.lengths, length])}
    tried = [] if fitted is None else [c for _, kind in CANDIDATES for c in kind.tried(fitted, site)]
    space |= dict.fromkeys([*tried, chosen])
    table = CostTable.by_density()
    rows = []
    for choice in (DENSE, *[c for c in space if c != DENSE]):
        kind, params = CANDIDATES[choice.candidate], dict(choice.params)
        rows.append({
            "choice": str(choice),
            "damage": _damage(seen, site, head, choice, fitted),
            "cost": kind.cost(table, params, length) / table.cost(length, 0, length),
            "chosen": choice == chosen,
            "why": "" if fitted is None or choice not in tried else _left_out(held, seen, fitted, site, head, choice),
        })  # fmt: skip
    rows.sort(key=lambda r: r["cost"])
    own = next(r for r in rows if r["chosen"])
    for row in rows:
        row["why"] = "chosen" if row["chosen"] else row["why"] or _compared(row, own)
    return rows


def _damage(seen: Profile, site: str, head: int, choice: Choice, fitted: Fitted | None) -> float | None:
    """Nats per token at the worst length."""
    kind, params = CANDIDATES[choice.candidate], dict(choice.params)
    if kind.far:
        if fitted is None or choice not in fitted.choices(site):
            return None
        return max(float(fitted.damage(site, n, choice)[head]) for n in seen.lengths)
    sums = {n: seen.observations[site, n] for n in seen.lengths}
    return max(float(kind.damage(o, params, n)[head]) / max(1e-9, o.tokens) for n, o in sums.items())


def _left_out(held: Plan, seen: Profile, fitted: Fitted, site: str, head: int, choice: Choice) -> str:
    """Why a choice that was tried was not weighed for a head; empty where it was."""
    kind = CANDIDATES[choice.candidate]
    if kind.family not in held.constraints.allow:
        return f"not weighed: the plan was made without --allow {kind.family}"
    no = refused(fitted, site, head, choice)
    if no:
        return f"not offered: {no}"
    kept = not_pruned(seen, [site]).get(site, {}) if kind.far == "gone" else {}
    return f"not pruned: {kept[head]}" if head in kept else ""


def _compared(row: dict[str, Any], own: dict[str, Any]) -> str:
    if row["damage"] is None or own["damage"] is None:
        return UNKNOWN
    cheaper, milder = row["cost"] < own["cost"], row["damage"] < own["damage"]
    if cheaper and milder:
        return "cheaper and milder here; the whole plan's limit of spans a layer decided"
    if cheaper:
        return "cheaper, but more damage"
    return "less damage, but dearer" if milder else "no better on either count"
