"""How names, numbers and maps are written, on the terminal and on the page alike."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, TypeVar

from attnopt.candidates import Candidate
from attnopt.registry import CANDIDATES

Row = TypeVar("Row")


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def cell_text(value: Any) -> str:
    """A value as every table shows it: numbers to four digits."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def rounded(value: float | None) -> float | None:
    """To four significant digits, as the page's own figures are; None where it is not finite."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def counted(n: int, noun: str) -> str:
    """ "1 graph", "2 graphs"."""
    return f"{n} {noun}" + ("s" if n != 1 else "")


def outcomes(counts: Mapping[str, int]) -> str:
    """The counts of `graphs_json` in a line."""
    return (
        f"{counted(counts['sites'], 'attention')} in {counted(counts['graphs'], 'graph')}: {counts['rewritten']} "
        f"rewritten, {counts['left_alone']} left alone, {counts['not_recognised']} not recognised"
    )


def folded_name(name: str, times: int) -> str:
    """ "layers.0-5.attn ×6": a name under which rows were folded, and how many."""
    return name + (f" ×{times}" if times > 1 else "")


def phase_of(record: Mapping[str, Any]) -> str:
    """ "decode, StaticCache"; empty where the graphs were not traced phase by phase."""
    return ", ".join(text for text in (record.get("phase"), record.get("cache")) if text)


def at_longest(sites: Mapping[str, Mapping[str, Row]]) -> dict[str, Row]:
    """Of the sites of `profile_json`, what was seen at each one's longest length."""
    return {site: by_length[max(by_length, key=int)] for site, by_length in sites.items()}


# What a formula's ASCII stands for.
SIGNS = {"<=": "≤", ">=": "≥", "==": "=", "!=": "≠", "-": "−", "*": "·"}


def formula(text: str, unicode: bool = True) -> str:
    """A mask or bias for people, ``j ≤ i and i − j < 4096 and pad[b, j]``; as it is where `unicode` cannot be shown."""
    if not unicode:
        return text
    return " ".join(SIGNS.get(word, word) for word in text.split(" "))


def scaled(number: float) -> str:
    """A count to three digits: 268 M for 268468224."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def short_source(source: str) -> str:
    """A source line from its package on, or the last two parts of its path: enough to find it on any machine."""
    for root in ("site-packages/", "dist-packages/"):
        if root in source:
            return source.rsplit(root, 1)[1]
    return "/".join(source.rsplit("/", 2)[-2:]) if source.startswith("/") else source


def letter(n: int) -> str:
    """The n-th class of a map, so that a map reads without its colours."""
    return "abcdefghijklmnopqrstuvwxyz"[min(n, 25)]


def bucket(window: int) -> int:
    """Windows up to 2^bucket share a class of a map."""
    return max(window - 1, 0).bit_length()


def number_ranges(numbers: Iterable[int]) -> str:
    """ "0-3,6" for 0, 1, 2, 3, 6."""
    runs: list[list[int]] = []
    for n in sorted(set(numbers)):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def fold_rows(
    rows: Sequence[Row], name: Callable[[Row], str], facts: Callable[[Row], Any]
) -> list[tuple[str, list[Row]]]:
    """Rows of equal facts whose names differ in one number only, together under one name such as "layers.0-5.attn".

    Order is that of each group's first row. Where a name holds several numbers, the one that folds most rows counts.
    """
    groups: dict[Any, list[int]] = {}
    parts = [re.split(r"(\d+)", name(row)) for row in rows]
    keys: list[list[Any]] = []
    for at, row in enumerate(rows):
        # The odd parts are the numbers; a template is the name without one of them. Index -1 is the whole name.
        places = [-1, *range(1, len(parts[at]), 2)]
        keys.append([(facts(row), p, tuple(x for i, x in enumerate(parts[at]) if i != p)) for p in places])
        for key in keys[at]:
            groups.setdefault(key, []).append(at)
    folded: list[tuple[str, list[Row]]] = []
    taken: set[int] = set()
    for at in range(len(rows)):
        if at in taken:
            continue
        best = max(keys[at], key=lambda key: len(set(groups[key]) - taken))
        members = [m for m in groups[best] if m not in taken]
        place = best[1]
        shown = list(parts[at])
        if place >= 0 and len(members) > 1:
            shown[place] = number_ranges(int(parts[m][place]) for m in members)
        folded.append(("".join(shown), [rows[m] for m in members]))
        taken.update(members)
    return folded


def short_labels(names: Sequence[str]) -> tuple[str, list[str]]:
    """("layers.*.attn", ["0", "1", ...]) if the names differ in one number only, else ("", the names)."""
    folded = fold_rows(list(names), str, lambda _: 0)
    if len(folded) != 1 or len(names) < 2 or len(set(names)) != len(names):
        return "", list(names)
    split = [re.split(r"(\d+)", n) for n in names]
    place = next(i for i in range(len(split[0])) if len({s[i] for s in split}) > 1)
    return "".join("*" if i == place else x for i, x in enumerate(split[0])), [s[place] for s in split]


def without_common(names: Sequence[str]) -> tuple[str, list[str]]:
    """("model.layers.*.attn", ["0", "1-3"]): dotted names without the parts at both ends that all share."""
    split = [name.split(".") for name in names]
    shortest = min(map(len, split), default=0)
    first = next((n for n in range(shortest) if len({s[n] for s in split}) > 1), 0)
    last = next((n for n in range(shortest - first) if len({s[-1 - n] for s in split}) > 1), 0)
    if len(set(names)) < 2 or not first + last:
        return "", list(names)
    title = [*split[0][:first], "*", *split[0][len(split[0]) - last :]]
    return ".".join(title), [".".join(s[first : len(s) - last]) for s in split]


def far_of(kind: Candidate) -> str:
    """`Candidate.far`, and "tokens" where only steps of decoding select what they read."""
    return "tokens" if kind.decoded else kind.far


@cache
def signs() -> dict[str, str]:
    """The letter of every candidate whose heads are more, or less, than a span: L, T, C; x where they are gone. Of
    those that select keys, which came later, the first letter of the name that is free."""
    later = {"selected": 1, "tokens": 2}
    kinds = sorted((later.get(far_of(kind), 0), name, far_of(kind)) for name, kind in CANDIDATES if far_of(kind))
    found: dict[str, str] = {}
    for _, name, far in kinds:
        free = (c for c in name.upper() if c.isalpha() and c not in found.values())
        found[name] = "x" if far == "gone" else next(free, "?")
    return found


def search_title(records: Sequence[Mapping[str, Any]]) -> str:
    """Of the data of `records_json`: by what a point holds or misses, which is less than the budget."""
    if not records:
        return "Search on the verify split"
    limit = f"{records[0]['limit']:.4g}"
    return f"Search on the verify split: a point holds up to {limit}, the part of the budget that it keeps to"


def far_sign(head: Mapping[str, Any]) -> str:
    """The letter of a head that is more, or less, than a span, of the data of `plan_json`."""
    return signs()[str(head["candidate"])]


def otherwise(saving: Mapping[str, Any]) -> list[str]:
    """Of a record of savings: the attentions that another length makes something else of than the traced one."""
    found = []
    for lowering, count in saving.get("otherwise", {}).items():
        who = counted(count, "attention")
        verb, negated = ("is", "it is not") if count == 1 else ("are", "they are not")
        if lowering:
            verb, negated = ("becomes", "it does not") if count == 1 else ("become", "they do not")
        found.append(f"at {saving['length']} tokens {who} {verb} {lowering or 'left alone'}; as traced, {negated}.")
    return found
