"""Emitted kernels, with their syntax in colours. The text on the page is the file's, character for character."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from pygments.lexers import CppLexer, PythonLexer
from pygments.token import Comment, Keyword, Name, Number, Operator, String

from attnopt.report.page.pieces import Part

# Kind of token -> class in page.css. The first that holds counts; other tokens have the text's own colour, and no span.
COLOURED = (
    (Comment, "c"), (Keyword, "k"), (Operator.Word, "k"), (String, "s"), (Number, "m"), (Name.Function, "f"),
    (Name.Class, "f"), (Name.Decorator, "d"), (Name.Builtin, "b"),
)  # fmt: skip
# Colours make a text about twice as long; beyond so many characters it is shown without.
PLAIN_FROM = 100_000


def highlighted(name: str, source: str) -> str:
    """The source as HTML with its tokens in spans: C++ where the name says so, else Python."""
    if len(source) > PLAIN_FROM:
        return escape(source)
    lexer = (CppLexer if name.endswith((".cpp", ".h")) else PythonLexer)(stripnl=False, ensurenl=False)
    parts = []
    for token, text in lexer.get_tokens(source):
        shown = escape(text)
        kind = next((name for of, name in COLOURED if token in of), "")
        parts.append(f'<span class="{kind}">{shown}</span>' if kind else shown)
    return "".join(parts)


def kernels(data: Mapping[str, Any]) -> list[Part]:
    found = []
    for name, source in data["kernels"].items():
        head = f'<code>{escape(name)}</code> <span class="soft">{len(source.splitlines())} lines</span>'
        # A browser drops a line end that begins a <pre>.
        text = f'<pre class="code" tabindex="0">\n{highlighted(name, source)}</pre>'
        found.append((f"<details><summary>{head}</summary>{text}</details>", f"kernel {name}"))
    return found
