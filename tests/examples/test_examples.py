"""Each example runs as it is; the pattern worked out in docs/add-a-pattern.md is a pattern."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from attnopt.registry import PATTERNS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/add-a-pattern.md"
EXPECTED = {
    # A loss that rose would be won back by less than nothing.
    "finetune_under_plan": ["step 16: loss", "won back: 0."],
    "exact_mode": ["Llama, padded", "run of real tokens", "largest difference"],
    "nanogpt": ["written-out float32 heads=4", "blocks.2.attention: SDPA is_causal"],
    "plan_and_run": ["span kernel", "final split"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_example_runs(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py")]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert all(text in ended.stdout for text in EXPECTED[name]), ended.stdout
    assert not list(tmp_path.iterdir())


def test_the_documented_pattern_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of docs/add-a-pattern.md, one module: the operator, its pattern, their tests."""
    operator, pattern, tests = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    path = tmp_path / "documented.py"
    pattern = pattern.replace("from __future__ import annotations\n", "")
    path.write_text("\n".join(["from tracing import qkv, trace", operator, pattern, tests]), encoding="utf-8")
    list(PATTERNS)  # all others are there first
    monkeypatch.setattr(PATTERNS, "_items", dict(PATTERNS._items))
    spec = importlib.util.spec_from_file_location("documented", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ran = [getattr(module, name)() for name in dir(module) if name.startswith("test_")]
    assert len(ran) == 2
