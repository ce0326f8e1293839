"""A plan file's text: JSON with equal heads folded, a short record on one line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from attnopt.ir import Choice
from attnopt.registry import CANDIDATES

_LINE = 116  # a record of numbers up to this width stays on one line of the file


def fold(choices: Iterable[Choice]) -> dict[str, dict[str, Any]]:
    """Equal heads together, in the order of their first head: {"0-3,6": {"candidate": ...}, ...}."""
    groups: dict[Choice, list[int]] = {}
    for head, choice in enumerate(choices):
        groups.setdefault(choice, []).append(head)
    return {ranges(heads): _choice_json(choice) for choice, heads in groups.items()}


def _choice_json(choice: Choice) -> dict[str, Any]:
    values = dict(choice.params)
    return {"candidate": choice.candidate, **{p.name: values[p.name] for p in CANDIDATES[choice.candidate].params}}


def ranges(heads: list[int]) -> str:
    runs: list[list[int]] = []
    for head in heads:
        if runs and head == runs[-1][1] + 1:
            runs[-1][1] = head
        else:
            runs.append([head, head])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def text_of(value: Any, depth: int = 0, used: int = 0) -> str:
    """JSON with two-space indents, a short record of plain values on one line."""
    flat = json.dumps(value, ensure_ascii=False, allow_nan=False)
    nested = isinstance(value, (dict, list)) and bool(value)
    inner = list(value.values()) if isinstance(value, dict) else value
    simple = nested and not any(isinstance(v, (dict, list)) for v in inner)
    if not nested or (simple and depth and 2 * depth + used + len(flat) <= _LINE):
        return flat
    pad = "  " * (depth + 1)
    if isinstance(value, list):
        rows, ends = [text_of(v, depth + 1) for v in value], "[]"
    else:
        keys = [json.dumps(k, ensure_ascii=False) + ": " for k in value]
        rows, ends = [k + text_of(v, depth + 1, len(k)) for k, v in zip(keys, value.values(), strict=True)], "{}"
    return ends[0] + "\n" + ",\n".join(pad + row for row in rows) + "\n" + "  " * depth + ends[1]
