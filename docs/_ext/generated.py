"""The parts of pages that are made when the site is built.

A fence such as ```{command-line} is replaced by Markdown made of what it names, so that no page holds a copy; a forge
shows its content instead, which says how to see the same. The sidebar is the list of links on index.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import api
import command_line
import plan_file
from sphinx.application import Sphinx

PARTS: dict[str, Callable[[str], str]] = {
    "command-line": command_line.page,
    "plan-file": plan_file.tables,
    "python-api": api.entries,
}
FENCE = re.compile(r"^```\{([a-z-]+)\}\n(.*?)^```\n", re.M | re.S)


def fill(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put each generated part in its place, and on the first page the sidebar."""
    text = FENCE.sub(lambda m: PARTS[m[1]](m[2]) if m[1] in PARTS else m[0], one_title(source[0]))
    source[0] = text + sidebar(text) if docname == "index" else text


def one_title(text: str) -> str:
    """From the second first-level heading of a page on, headings one level down: a page is one entry of the sidebar."""
    lines, fenced, titles = text.split("\n"), False, 0
    for n, line in enumerate(lines):
        fenced ^= line.startswith("```")
        titles += line.startswith("# ") and not fenced
        if titles > 1 and not fenced and re.match(r"#+ ", line):
            lines[n] = "#" + line
    return "\n".join(lines)


def sidebar(index: str) -> str:
    """A hidden tree of pages for each `## Group` of the first page, of its list of links, by their words."""
    trees = []
    for group in index.split("\n## ")[1:]:
        name, _, body = group.partition("\n")
        pages = [f"{told} <{page}>" for told, page in re.findall(r"^- \[([^]]+)\]\(([^)#]+)\.md\)", body, re.M)]
        trees.append(f"\n```{{toctree}}\n:hidden:\n:caption: {name}\n\n" + "\n".join(pages) + "\n```\n")
    return "".join(trees)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("source-read", fill)
    app.connect("autodoc-process-docstring", api.plain)
    app.connect("autodoc-process-signature", api.signature)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
