"""A profile on a terminal: what was seen, and maps of where heads look and what they matter."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from attnopt.profile_file import Profile
from attnopt.report import data
from attnopt.report.cells import letter
from attnopt.report.profile_map import FIRST_KEYS, MOSTLY, NEAR
from attnopt.report.terminal.console import console, print_titled, table
from attnopt.report.terminal.maps import print_legend, print_map, ramp


def print_profile(profile: Profile, to: Console | None = None) -> None:
    """Text seen, where each head's mass lies, what removing a head costs, and who needs distance most."""
    to = to or console()
    found = data.profile_json(profile)
    grid = found["grid"]
    to.print(Text(f"profile of model {found['fingerprint']}", style="bold"))
    to.print(f"windows {_numbers(grid['windows'])}; sinks {_numbers(grid['sinks'])}; {', '.join(found['dtypes'])}")
    to.print(f"loss of {'; '.join(found['supervision'])}")
    columns = ("length", "samples", "rows", "tokens")
    listed = table(columns, columns)
    for row in found["lengths"]:
        listed.add_row(*(f"{row[name]:g}" if name == "tokens" else str(row[name]) for name in columns))
    to.print(listed)
    if not found["sites"]:
        to.print("The profile holds no site.")
        return
    heads = {site: by_length[max(by_length, key=int)] for site, by_length in found["sites"].items()}
    totals = found["totals"]
    to.print(
        f"{totals['heads']} heads: {totals['local_heads']} with {MOSTLY:.0%} of their mass within {NEAR} tokens, "
        f"{totals['sink_heads']} with half of it on the first {FIRST_KEYS} keys; "
        f"mean {totals['local']:.0%} and {totals['sink']:.0%}, entropy {totals['entropy']:.2f} nats"
    )
    _distance_map(to, heads, max(row["length"] for row in found["lengths"]))
    _share_map(to, f"Share of mass on the first {FIRST_KEYS} keys",
               {site: [head["sink"] for head in row] for site, row in heads.items()})  # fmt: skip
    nats = all(head["ablation"] is not None for row in heads.values() for head in row)
    if nats:
        _ablation_map(to, heads)
    _most_damaged(to, found["worst"], "the text", "nats per token" if nats else "squared change of the output per row")
    _most_damaged(to, found["recalling"], "answers about lines far above", "nats per token of them, softened")
    alike = found["similarity"]
    if len(alike["sites"]) > 1:
        rows = dict(zip(alike["sites"], alike["layers"], strict=True))
        _share_map(to, "How alike layers attend: mean cosine of their heads", rows, "layers")
        for pair in alike["alike"][:3]:
            to.print(Text(f"{pair['one']} and {pair['other']}: {pair['cosine']:.3f}", style="dim"))


def _most_damaged(to: Console, worst: Sequence[Mapping[str, Any]], what: str, unit: str) -> None:
    if not worst:
        return
    listed = table(["site", "head", "length", "damage"], ("head", "length", "damage"))
    for row in worst:
        listed.add_row(row["site"], str(row["head"]), str(row["length"]), f"{row['nats_per_token']:.3g}")
    beyond = f"beyond a window of {worst[0]['window']} (sink {worst[0]['sink']} kept)"
    print_titled(to, f"Most damaged {beyond}, of {what}, {unit}", listed)


def _share_map(to: Console, title: str, rows: Mapping[str, Sequence[float]], columns: str = "heads") -> None:
    """Shares of 1 by tenths: a under 0.1, j from 0.9 on."""

    def tenth(share: float) -> int:
        return min(int(max(share, 0.0) * 10), 9)

    to.print(Text(title, style="bold"))
    print_map(
        to, {name: [(letter(tenth(x)), ramp(tenth(x) / 10)) for x in values] for name, values in rows.items()}, columns
    )
    seen = sorted({tenth(x) for values in rows.values() for x in values})
    print_legend(to, [(letter(n), ramp(n / 10), f"from {n / 10:g}" if n else "under 0.1") for n in seen])
    to.print()


def _distance_map(to: Console, heads: Mapping[str, Sequence[Mapping[str, Any]]], length: int) -> None:
    starts = sorted({head["distance"][0] for row in heads.values() for head in row})
    top = max(length.bit_length(), 1)
    colour = {start: ramp(start.bit_length() / top) for start in starts}
    to.print(Text("Half of the mass lies within this distance", style="bold"))
    print_map(to, {site: [(letter(starts.index(h["distance"][0])), colour[h["distance"][0]]) for h in row]
              for site, row in heads.items()})  # fmt: skip
    ends = {head["distance"][0]: head["distance"][1] for row in heads.values() for head in row}
    print_legend(to, [(letter(n), colour[s], f"<= {ends[s]}") for n, s in enumerate(starts)])
    to.print()


def _ablation_map(to: Console, heads: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Letters by powers of ten: what matters between heads is the order of size."""
    powers = sorted({_power(head["ablation"]) for row in heads.values() for head in row})
    least = powers[0]
    colour = {p: ramp((p - least) / max(powers[-1] - least, 1) * 0.999) for p in powers}
    to.print(Text("Damage of removing the head, nats per token", style="bold"))
    print_map(to, {site: [(letter(powers.index(_power(h["ablation"]))), colour[_power(h["ablation"])]) for h in row]
              for site, row in heads.items()})  # fmt: skip
    print_legend(to, [(letter(n), colour[p], f"< 1e{p + 1}") for n, p in enumerate(powers)])
    to.print()


def _power(value: float) -> int:
    """Floor of the decimal logarithm; everything under 1e-12 counts as nothing."""
    return math.floor(math.log10(max(value, 1e-12)))


def _numbers(values: Iterable[int]) -> str:
    return ", ".join(map(str, values))
