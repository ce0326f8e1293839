"""What `attnopt distill` found: every choice that was tried, beside the plain window it has to be better than."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich.console import Console
from rich.text import Text

from attnopt.fitted import Fitted, plain_window
from attnopt.ir import Choice
from attnopt.registry import CANDIDATES
from attnopt.report.terminal import _table, console


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
        "family": choice.candidate,
        "window": None if plain is None else str(plain),
        "offered": fitted.offered(site, choice).nonzero()[:, 0].tolist(),
        "damage": {str(n): fitted.damage(site, n, choice).tolist() for n in lengths},
        "window_damage": None if plain is None else {str(n): fitted.damage(site, n, plain).tolist() for n in lengths},
        "fits": [
            {"method": fit.method, "held_out_error": fit.error, "refused": fit.refused}
            for fit in fitted.fits.get((site, name), ())
        ],
    }


def print_fitted(fitted: Fitted, to: Console | None = None) -> None:
    """A line for every replacement at the narrowest window of each site, and how many heads each family is offered."""
    to = to or console()
    found = fitted_json(fitted)
    lengths = found["lengths"]
    to.print(Text(f"fits of model {found['fingerprint']}", style="bold"))
    to.print(f"{found['settings']}; tried at {', '.join(map(str, lengths))} tokens")
    columns = ("site", "replacement", "offered", "window loses", "it loses", "maps")
    table = _table(columns, columns[2:5])
    heads, offered = Counter[str](), Counter[str]()
    for site, rows in found["sites"].items():
        shown: set[str] = set()
        taken: dict[str, set[int]] = {}
        for row in rows:
            taken.setdefault(row["family"], set()).update(row["offered"])
            what = row["family"] + "".join(f"/{size}" for size in _size_of(row["choice"]))
            if what in shown:
                continue
            shown.add(what)
            damage = row["damage"][str(max(lengths))]
            plain = row["window_damage"]
            table.add_row(
                site, row["choice"], f"{len(row['offered'])} of {len(damage)}",
                "" if plain is None else f"{sum(plain[str(max(lengths))]):.3g}", f"{sum(damage):.3g}",
                _methods(row["fits"]),
            )  # fmt: skip
        for family, of_site in taken.items():
            heads[family] += len(damage)
            offered[family] += len(of_site)
    to.print(table)
    to.print(f"nats per token of all heads of a site, at {max(lengths)} tokens and the narrowest window")
    for family, count in heads.items():
        to.print(f"{family}: offered on {offered[family]} of {count} heads{_why(family)}")


def _size_of(choice: str) -> list[str]:
    """The features or the rank that a choice names, if any."""
    return [part.partition("=")[2] for part in choice.strip(")").replace("(", ", ").split(", ")
            if part.startswith(("features=", "rank="))]  # fmt: skip


def _why(family: str) -> str:
    if CANDIDATES[family].far == "gone":
        return " (whatever it loses: the plan's budget decides)"
    return "; on the others it loses as much as its own window at some length"


def _methods(fits: list[dict[str, Any]]) -> str:
    counted = Counter("refused" if fit["refused"] else fit["method"] for fit in fits)
    return ", ".join(f"{method} {count}" for method, count in counted.most_common())
