"""What `attnopt distill` found: every choice that was tried, beside the plain window it has to be better than."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from attnopt.fitted import Fitted, plain_window
from attnopt.ir import Choice
from attnopt.registry import CANDIDATES
from attnopt.report.terminal.console import console, table


def fitted_json(fitted: Fitted) -> dict[str, Any]:
    """All of it by site and choice. Damages in nats per token of every head, by length: of the choice and, where it has
    one, of its own plain window; offered: the heads to which it may be."""
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
    plain = plain_window(choice)
    return {
        "choice": str(choice),
        "family": CANDIDATES[choice.candidate].family,
        "replacement": name or choice.candidate,
        "window": None if plain is None else str(plain),
        "offered": fitted.offered(site, choice).nonzero()[:, 0].tolist(),
        "damage": {str(n): fitted.damage(site, n, choice).tolist() for n in lengths},
        "window_damage": None if plain is None else {str(n): fitted.damage(site, n, plain).tolist() for n in lengths},
        "fits": [
            {"method": fit.method, "held_out_error": fit.error, "refused": fit.refused}
            for fit in fitted.fits.get((site, name), ())
        ],
    }


def print_fitted(found: Mapping[str, Any], to: Console | None = None) -> None:
    """Of the data of `fitted_json`: a line for every replacement at the narrowest window of each site, and how many
    heads each family is offered."""
    to = to or console()
    longest = str(max(found["lengths"]))
    to.print(Text(f"fits of model {found['fingerprint']}", style="bold"))
    to.print(f"{found['settings']}; tried at {', '.join(map(str, found['lengths']))} tokens")
    columns = ("site", "replacement", "offered", "window loses", "it loses", "maps")
    listed = table(columns, columns[2:5])
    # replacement -> (nats lost by it, by its window alone) of every head
    against: dict[str, list[tuple[float, float]]] = {}
    for site, rows in found["sites"].items():
        for row in _narrowest(rows):
            damage, window = row["damage"][longest], (row["window_damage"] or {}).get(longest)
            listed.add_row(
                site, row["choice"], f"{len(row['offered'])} of {len(damage)}",
                "" if window is None else f"{sum(window):.3g}", f"{sum(damage):.3g}", _methods(row["fits"]),
            )  # fmt: skip
            if window is not None:
                against.setdefault(row["replacement"], []).extend(zip(damage, window, strict=True))
    to.print(listed)
    to.print(f"nats per token, summed over the heads of a site, at {longest} tokens and the narrowest window")
    for what, heads in against.items():
        loses, alone = (sum(column) for column in zip(*heads, strict=True))
        better = f"better on {sum(one < other for one, other in heads)} of {len(heads)} heads"
        to.print(f"{what}: loses {loses:.3g} where the window alone loses {alone:.3g}; {better}")
    for family, (offered, of) in _offered(found["sites"]).items():
        to.print(f"{family}: offered on {offered} of {of} heads{_why(family, offered < of)}")


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
    return "; on the others no choice of it is better than its own window at every length" if some_not else ""


def _methods(fits: list[dict[str, Any]]) -> str:
    counted = Counter("refused" if fit["refused"] else fit["method"] for fit in fits)
    return ", ".join(f"{method} {count}" for method, count in counted.most_common())
