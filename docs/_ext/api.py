"""The Python reference: the names of a fence, each with its signature and docstring as the code has them."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any


def entries(names: str) -> str:
    """One entry for each name: `explain` of attnopt itself, `attnopt.ir.Site` of a module."""
    found = []
    for name in names.split():
        module, _, attribute = (name if "." in name else f"attnopt.{name}").rpartition(".")
        value = getattr(importlib.import_module(module), attribute)
        kind, options = ("class", "   :members:\n") if inspect.isclass(value) else ("function", "")
        found.append(f"```{{eval-rst}}\n.. auto{kind}:: {module}.{attribute}\n{options}```\n")
    return "\n".join(found)


def plain(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain English with code between backticks: outside of these, nothing in them is markup. What is
    indented by four is code."""
    shown: list[str] = []
    for line in lines:
        parts = re.split(r"(`[^`]*`)", line)
        blank = not shown or not shown[-1]
        if blank and line.startswith("    ") and shown:
            shown += ["::", ""]
        code = line.startswith("    ")
        shown.append(line if code else "".join(p if n % 2 else re.sub(r"([|*\\])", r"\\\1", p) for n, p in enumerate(parts)))
    lines[:] = shown
