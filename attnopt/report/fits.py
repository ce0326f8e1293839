"""What `attnopt distill` found: every choice that was tried, beside the plain window it has to be better than."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.text import Text

from attnopt.fitted import Fitted, plain_window
from attnopt.ir import Choice
from attnopt.registry import CANDIDATES
from attnopt.report.cells import far_of
from attnopt.report.data.candidates import label, steps_of
from attnopt.report.terminal.console import console, table


def fitted_json(fitted: Fitted) -> dict[str, Any]:
    """All of it by site and choice. Damages in nats per token of every head, by length: of the choice and, where it has
    one, of its own plain window; offered: the heads to which it may be; visits: of a choice that selects keys, what
    every head visited, or selected, and recalled, by length; steps: of one that selects tokens, what a step of decoding
    attends to, by length."""
    header = fitted.header
    return {
        "fingerprint": header.fingerprint.structure,
        "calibration": header.calibration,
        "settings": header.settings,
        "seed": header.seed,
        "lengths": list(header.lengths),
        "sites": {
            site: [_choice_json(fitted, site, c) for c in fitted.choices(site) if c.candidate != "sink_window"]
            for site in fitted.sites
        },
    }


def _choice_json(fitted: Fitted, site: str, choice: Choice) -> dict[str, Any]:
    name = CANDIDATES[choice.candidate].map_name(dict(choice.params))
    lengths = [length for of, length in fitted.trials if of == site]
    plain, far = plain_window(choice), far_of(CANDIDATES[choice.candidate])
    selects = far in ("selected", "tokens")
    return {
        "label": label(choice),
        "choice": str(choice),
        "family": CANDIDATES[choice.candidate].family,
        "replacement": name or choice.candidate,
        "window": None if plain is None else str(plain),
        "offered": fitted.offered(site, choice).nonzero()[:, 0].tolist(),
        "visits": {str(n): [asdict(s) for s in fitted.shares(site, n, choice)] for n in lengths} if selects else None,
        "steps": {str(n): steps_of(dict(choice.params), n) for n in lengths} if far == "tokens" else None,
        "damage": {str(n): fitted.damage(site, n, choice).tolist() for n in lengths},
        "window_damage": None if plain is None else {str(n): fitted.damage(site, n, plain).tolist() for n in lengths},
        "fits": [
            {"method": fit.method, "held_out_error": fit.error, "refused": fit.refused}
            for fit in fitted.fits.get((site, name), ())
        ],
    }


def print_fitted(found: Mapping[str, Any], to: Console | None = None) -> None:
    """Of the data of `fitted_json`: a line for every replacement at the narrowest window of each site and for every
    choice that selects keys, and how many heads each family is offered."""
    to = to or console()
    longest = str(max(found["lengths"]))
    to.print(Text(f"fits of model {found['fingerprint']}", style="bold"))
    to.print(f"{found['settings']}; tried at {', '.join(map(str, found['lengths']))} tokens")
    columns = ("site", "replacement", "offered", "window loses", "it loses", "maps")
    listed = table(columns, columns[2:5])
    # replacement -> (nats lost by it, by its window alone) of every head
    against: dict[str, list[tuple[float, float]]] = {}
    fixed = {site: [row for row in rows if row["visits"] is None] for site, rows in found["sites"].items()}
    for site, rows in fixed.items():
        for row in _narrowest(rows):
            damage, window = row["damage"][longest], (row["window_damage"] or {}).get(longest)
            listed.add_row(
                site, row["choice"], f"{len(row['offered'])} of {len(damage)}",
                "" if window is None else f"{sum(window):.3g}", f"{sum(damage):.3g}", _methods(row["fits"]),
            )  # fmt: skip
            if window is not None:
                against.setdefault(row["replacement"], []).extend(zip(damage, window, strict=True))
    if any(fixed.values()):
        to.print(listed)
        to.print(f"nats per token, summed over the heads of a site, at {longest} tokens and the narrowest window")
    rows = [row for rows in found["sites"].values() for row in rows if row["visits"] is not None]
    print_blocks([row for row in rows if row["steps"] is None], longest, to)
    print_tokens([row for row in rows if row["steps"] is not None], longest, to)
    for what, heads in against.items():
        loses, alone = (sum(column) for column in zip(*heads, strict=True))
        better = f"better on {sum(one < other for one, other in heads)} of {len(heads)} heads"
        to.print(f"{what}: loses {loses:.3g} where the window alone loses {alone:.3g}; {better}")
    for family, (offered, of) in _offered(found["sites"]).items():
        to.print(f"{family}: offered on {offered} of {of} heads{_why(family, offered < of)}")


def print_blocks(rows: Sequence[dict[str, Any]], length: str, to: Console) -> None:
    """A line for every choice that selects blocks of keys: over all heads of all sites, what they visited and recalled,
    and what they lose together."""
    columns = ("selection", "offered", "visits", "skips", "recalls", "loses")
    listed = table(columns, columns[1:])
    for what, (offered, visited, skipped, recalled, loses) in _summed(rows, length).items():
        listed.add_row(what, offered, *(f"{100 * mean:.3g} %" for mean in (visited, skipped, recalled)), f"{loses:.3g}")
    if rows:
        to.print(listed)
        to.print(
            f"of all heads at {length} tokens: blocks visited, of these skipped, dense mass recalled; nats per token"
        )


def print_tokens(rows: Sequence[dict[str, Any]], length: str, to: Console) -> None:
    """The same of choices that select tokens while decoding: how many keys a step attends to, in how many steps they
    are selected anew."""
    columns = ("selection", "offered", "keys", "selects", "recalls", "loses")
    listed = table(columns, columns[1:])
    keys = {row["label"]: row["steps"][length]["attended"] for row in rows}
    for what, (offered, selected, _, recalled, loses) in _summed(rows, length).items():
        means = (f"{100 * mean:.3g} %" for mean in (selected, recalled))
        listed.add_row(what, offered, str(keys[what]), *means, f"{loses:.3g}")
    if rows:
        to.print(listed)
        to.print(
            f"of all heads, as steps of decoding up to {length} tokens: keys that a step attends to, steps that select "
            "anew, dense mass recalled; nats per token"
        )


def _summed(rows: Sequence[dict[str, Any]], length: str) -> dict[str, tuple[str, float, float, float, float]]:
    """label -> heads it is offered to of those tried, the means over these of what was visited, skipped and recalled,
    nats per token of all."""
    held, found = dict[str, list[dict[str, Any]]](), {}
    for row in rows:
        held.setdefault(row["label"], []).append(row)
    for what, of in held.items():
        shares = [share for row in of for share in row["visits"][length]]
        visited, skipped, recalled = (
            sum(share[name] for share in shares) / len(shares) for name in ("visited", "skipped", "recalled")
        )
        offered = f"{sum(len(row['offered']) for row in of)} of {len(shares)}"
        found[what] = (offered, visited, skipped, recalled, sum(sum(row["damage"][length]) for row in of))
    return found


def _narrowest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first choice of every replacement of a site: that with the narrowest window."""
    return list({row["replacement"]: row for row in reversed(rows)}.values())[::-1]


def _offered(sites: dict[str, list[dict[str, Any]]]) -> dict[str, tuple[int, int]]:
    """family -> (heads that some choice of it is offered to, heads it was tried on)."""
    to: dict[str, set[tuple[str, int]]] = {}
    of: dict[str, set[tuple[str, int]]] = {}
    for site, rows in sites.items():
        for row in rows:
            to.setdefault(row["family"], set()).update((site, head) for head in row["offered"])
            heads = next(iter(row["damage"].values()))
            of.setdefault(row["family"], set()).update((site, head) for head in range(len(heads)))
    return {family: (len(to[family]), len(of[family])) for family in of}


def _why(family: str, some_not: bool) -> str:
    if family == "prune":
        return " (whatever it loses: a plan's budget decides)"
    if family == "threshold":
        return "; on the others none skips anything within its bound of mass" if some_not else ""
    return "; on the others no choice of it is better than its own window at every length" if some_not else ""


def _methods(fits: list[dict[str, Any]]) -> str:
    counted = Counter("refused" if fit["refused"] else fit["method"] for fit in fits)
    return ", ".join(f"{method} {count}" for method, count in counted.most_common())
