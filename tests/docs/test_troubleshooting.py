"""docs/troubleshooting.md: every message in a heading is one that the package has."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
HEADINGS = re.findall(r"^### (.+)$", PAGE, re.M)


def messages(tree: ast.AST) -> Iterator[str]:
    """Every string of a module that is no docstring; what is filled in is an ellipsis."""
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if id(node) in alone:
            continue
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.sub(r"\{\w*\}|%s", "…", node.value)


@cache
def said() -> str:
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "attnopt").rglob("*.py")))
    return "\n".join(text.replace("\n", " ") for tree in trees for text in messages(tree))


@pytest.mark.parametrize("heading", HEADINGS)
def test_the_message_is_the_package_s(heading: str) -> None:
    pattern = ".*".join(re.escape(part.strip()) for part in heading.split("…") if part.strip())
    assert re.search(pattern, said()), heading


def test_a_message_that_nothing_says_would_be_noticed() -> None:
    assert "The plan was made for a different model" not in said()
    assert set(messages(ast.parse('"""A docstring."""\nraise E(f"no {x}.", "one")'))) == {"no ….", "no ", ".", "one"}


def test_the_page_is_worth_searching() -> None:
    assert len(HEADINGS) == len(set(HEADINGS)) >= 40
    entries = re.split(r"^###? .+$", PAGE, flags=re.M)[1:]
    told = [entry.strip() for entry in entries if entry.strip()]
    assert len(told) == len(HEADINGS) and all(len(text) > 20 for text in told)
