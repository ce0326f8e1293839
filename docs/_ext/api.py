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
        code = line.startswith("    ")
        if code and shown and not shown[-1]:
            shown += ["::", ""]
        parts = [line] if code else re.split(r"(`[^`]*`)", line)
        shown.append("".join(p if code or n % 2 else re.sub(r"([|*\\])", r"\\\1", p) for n, p in enumerate(parts)))
    lines[:] = shown


def signature(
    app: Any, what: str, name: str, value: Any, options: Any, given: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Without the modules of types, and three dots for a default that a call makes."""
    return given and re.sub(r"~[\w.]+\.", "", given).replace("<factory>", "..."), returns
