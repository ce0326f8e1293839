"""Every Miss and Refusal has a code, every code a section in docs/reasons.md, and every example there its reason."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tracing import Traced, qkv, trace

from attnopt.ir import Miss, Refusal
from attnopt.reasons import located

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/reasons.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (\S+)\n(.*?)(?=^##? |\Z)", PAGE, re.M | re.S))
EXAMPLES = {code: m[1] for code, text in SECTIONS.items() if (m := re.search(r"```python\n(.*?)```", text, re.S))}


def reasons(source: str) -> Iterator[tuple[int, str]]:
    """The line and code of every Miss and Refusal made in a module's source; no code is ""."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("Miss", "Refusal"):
            code = next((k.value for k in node.keywords if k.arg == "code"), None)
            yield node.lineno, code.value if isinstance(code, ast.Constant) else ""


def made() -> dict[str, str]:
    """The code of every reason, by where it is made; reports only make one again from its own code."""
    found = {}
    for path in sorted((ROOT / "attnopt").rglob("*.py")):
        if path.name != "ir.py" and "report" not in path.parts:
            found |= {f"{path.relative_to(ROOT)}:{n}": c for n, c in reasons(path.read_text(encoding="utf-8"))}
    return found


def test_every_reason_has_a_code() -> None:
    assert not [where for where, code in made().items() if not code]


def test_a_reason_without_a_code_is_seen() -> None:
    source = 'x = Miss("why")\ny = Refusal("why", code="c")\nz = Miss("why", code=name)'
    assert list(reasons(source)) == [(1, ""), (2, "c"), (3, "")]


def test_every_code_is_explained_and_every_section_is_a_code() -> None:
    assert set(made().values()) == set(SECTIONS)


@pytest.mark.parametrize("code", SECTIONS)
def test_every_section_has_an_example_and_what_to_do(code: str) -> None:
    assert re.search(r"\n(    \S|```python\n)", SECTIONS[code]) and re.search(r"^To do: \S", SECTIONS[code], re.M)
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", code)


def codes(traced: Traced) -> set[str]:
    found: list[Miss | Refusal] = [*traced.refusals]
    for program in traced.programs:
        found += [*program.misses, *program.refusals, *program.notes]
    for reason in found:
        assert not traced.programs or (reason.node and reason.source), reason
    return {reason.code for reason in found}


@pytest.mark.parametrize("code", EXAMPLES)
def test_the_example_has_its_reason(code: str, tmp_path: Path) -> None:
    path = tmp_path / "example.py"
    path.write_text("import torch\nimport torch.nn.functional as F\n\n\n" + EXAMPLES[code], encoding="utf-8")
    spec = importlib.util.spec_from_file_location("example", path)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = codes(trace(module.example, *qkv(length=12), verify=False))
    assert code in found, found


class Anchor:
    """What `located` reads of a node."""

    name, target = "softmax", "aten.softmax.int"
    meta: ClassVar[dict[str, Any]] = {
        "nn_module_stack": {"": ("L['self'].h[0]", object)},
        "stack_trace": 'File "model.py", line 7\n x\nFile "inner.py", line 9\n y',
    }


def test_a_reason_names_module_node_line_and_page() -> None:
    found = located(Miss("why", code="softmax-axis"), Anchor())  # type: ignore[arg-type]
    place = "[softmax (aten.softmax.int) at inner.py:9, docs/reasons.md#softmax-axis]"
    assert str(found) == f"h.0: not recognised, why {place}"
    assert located(found, None) is found  # type: ignore[arg-type]
    assert str(Refusal("why")) == "graph: left alone, why"
