"""What docs/masks.md says is recovered is recovered: each line of its tables, with the spelling it gives."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from masks.recovering import SK, SQ, B, H, meaning_of

from attnopt.masks.values import MASKED

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/masks.md").read_text(encoding="utf-8")
LINES = re.findall(r"^\| ([^|`]+) \| `(.+?)` \| `(.+?)` \|$", PAGE, re.M)

KEEP = torch.tensor([1, 1, 0, 1, 0, 1, 1, 1, 1] * B).view(B, SK)
DATA = {
    "pad": KEEP.bool(),
    "m": KEEP,
    "doc": torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2, 2], [0, 0, 0, 0, 1, 1, 1, 1, 1]]),
    "start": torch.tensor([2, 5]),
    "n": torch.tensor(2),
    "data": torch.arange(B * SQ * SK).view(B, 1, SQ, SK) % 3 > 0,
    "slopes": torch.tensor([0.5, 0.25, 0.125]),
    "table": torch.arange(H * (SQ + SK)).view(H, SQ + SK) / 7,
    "learned": torch.arange(H * SQ * SK).view(H, SQ, SK) / 7,
}


@pytest.mark.parametrize(("what", "spelling", "formula"), LINES, ids=[f"{line[0]}: {line[1]}" for line in LINES])
def test_the_line_is_recovered(what: str, spelling: str, formula: str) -> None:
    code = compile(spelling.replace(r"\|", "|"), "docs/masks.md", "eval")

    def build(pad, m, doc, start, n, data, slopes, table, learned):
        names = {"torch": torch, "Sq": SQ, "Sk": SK, "inf": float("inf")}
        given = (pad, m, doc, start, n, data, slopes, table, learned)
        positions = {"i": torch.arange(SQ)[:, None], "j": torch.arange(SK)}
        return eval(code, names | positions | dict(zip(DATA, given, strict=True)))

    meaning = meaning_of(build, *DATA.values())
    held = meaning.bias if formula != "all" and meaning.bias is not None else meaning.mask
    assert re.sub(r"_1\b", "", str(held)) == formula.replace(r"\|", "|")
    assert bool(meaning.assumptions) == (what == "padding as numbers")


def test_the_tables_are_read_whole_and_the_limit_is_the_code_s() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and "`" in line]
    assert len(LINES) == len(rows) == 18 and f"at or below {MASKED:g}" in PAGE
