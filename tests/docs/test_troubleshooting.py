"""docs/troubleshooting.md: every message in a heading is one that the package has."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
HEADINGS = re.findall(r"^### (.+)$", PAGE, re.M)


def messages(tree: ast.AST) -> Iterator[str]:
    """Every string of a module; what is filled in is an ellipsis."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.sub(r"\{\w*\}|%s", "…", node.value)


SAID = "\n".join(
    text.replace("\n", " ")
    for path in sorted((ROOT / "attnopt").rglob("*.py"))
    for text in messages(ast.parse(path.read_text(encoding="utf-8")))
)


@pytest.mark.parametrize("heading", HEADINGS)
def test_the_message_is_the_package_s(heading: str) -> None:
    pattern = ".*".join(re.escape(part.strip()) for part in heading.split("…") if part.strip())
    assert re.search(pattern, SAID), heading


def test_a_message_that_nothing_says_would_be_noticed() -> None:
    assert "The plan was made for a different model" not in SAID


def test_the_page_is_worth_searching() -> None:
    assert len(HEADINGS) == len(set(HEADINGS)) >= 40
    entries = re.split(r"^###? .+$", PAGE, flags=re.M)[1:]
    told = [entry.strip() for entry in entries if entry.strip()]
    assert len(told) == len(HEADINGS) and all(len(text) > 20 for text in told)
