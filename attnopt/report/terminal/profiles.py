"""A profile on a terminal: what was seen, and maps of where heads look and what they matter."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from attnopt.report.cells import at_longest, letter
from attnopt.report.profile_map import FIRST_KEYS, MOSTLY, NEAR
from attnopt.report.terminal.console import console, print_titled, table
from attnopt.report.terminal.maps import print_legend, print_map, ramp


def print_profile(found: Mapping[str, Any], to: Console | None = None) -> None:
    """Of the data of `profile_json`: text seen, where each head's mass lies, what removing a head costs, and who needs
    distance most."""
    to = to or console()
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
    heads = at_longest(found["sites"])
    totals = found["totals"]
    to.print(
        f"{totals['heads']} heads: {totals['local_heads']} with {MOSTLY:.0%} of their mass within {NEAR} tokens, "
        f"{totals['sink_heads']} with half of it on the first {FIRST_KEYS} keys; "
        f"mean {totals['local']:.0%} and {totals['sink']:.0%}, entropy {totals['entropy']:.2f} nats"
    )
    to.print()
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

    def meaning(n: int) -> str:
        return f"from {n / 10:g}" if n else "under 0.1"

    classes = {site: [tenth(share) for share in shares] for site, shares in rows.items()}
    _map(to, title, classes, {n: (letter(n), ramp(n / 10), meaning(n)) for n in range(10)}, columns)


def _distance_map(to: Console, heads: Mapping[str, Sequence[Mapping[str, Any]]], length: int) -> None:
    ends = {head["distance"][0]: head["distance"][1] for row in heads.values() for head in row}
    top = max(length.bit_length(), 1)
    look = {
        start: (letter(n), ramp(start.bit_length() / top), f"<= {ends[start]}") for n, start in enumerate(sorted(ends))
    }
    classes = {site: [head["distance"][0] for head in row] for site, row in heads.items()}
    _map(to, "Half of the mass lies within this distance", classes, look)


def _ablation_map(to: Console, heads: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Letters by powers of ten: what matters between heads is the order of size."""
    classes = {site: [_power(head["ablation"]) for head in row] for site, row in heads.items()}
    powers = sorted({power for row in classes.values() for power in row})
    span = max(powers[-1] - powers[0], 1)
    look = {p: (letter(n), ramp((p - powers[0]) / span * 0.999), f"< 1e{p + 1}") for n, p in enumerate(powers)}
    _map(to, "Damage of removing the head, nats per token", classes, look)


def _map(
    to: Console, title: str, classes: Mapping[str, Sequence[int]], look: Mapping[int, tuple[str, str, str]],
    columns: str = "heads",
) -> None:  # fmt: skip
    """Every head by its class, and the legend of those classes that there are, with their numbers of heads."""
    to.print(Text(title, style="bold"))
    print_map(to, {site: [look[n][:2] for n in row] for site, row in classes.items()}, columns)
    counts = Counter(n for row in classes.values() for n in row)
    print_legend(to, [(*look[n][:2], f"{look[n][2]} ({counts[n]})") for n in sorted(counts)])
    to.print()


def _power(value: float) -> int:
    """Floor of the decimal logarithm; everything under 1e-12 counts as nothing."""
    return math.floor(math.log10(max(value, 1e-12)))


def _numbers(values: Iterable[int]) -> str:
    return ", ".join(map(str, values))
