"""Each example runs as it is; the pattern worked out in docs/add-a-pattern.md is a pattern."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tracing import qkv, trace

from attnopt.registry import PATTERNS

ROOT = Path(__file__).parents[2]
EXPECTED = {
    "exact_mode": ["Llama, padded", "padding folded into a feature", "largest difference"],
    "nanogpt": ["written-out heads=4", "blocks.2.attention: SDPA is_causal"],
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


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    b, h, n, d = q.shape
    q, k, v = (t.reshape(b * h, n, d) for t in (q, k, v))
    weights = torch.softmax(torch.bmm(q, k.transpose(1, 2)) * d**-0.5, -1)
    return torch.bmm(weights, v).view(b, h, n, d)


def wrong_split(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    b, h, n, d = q.shape
    q, k, v = (t.reshape(b * h, n, d) for t in (q, k, v))
    weights = torch.softmax(torch.bmm(q, k.transpose(1, 2)) * d**-0.5, -1)
    return torch.bmm(weights, v).view(h, b, n, d)


def test_the_documented_pattern_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/add-a-pattern.md").read_text(encoding="utf-8"), re.S)
    (source,) = (b for b in blocks if "PATTERNS.register" in b)
    path = tmp_path / "folded.py"
    path.write_text(source, encoding="utf-8")
    list(PATTERNS)  # all others are there first
    items: dict[str, Any] = dict(PATTERNS._items)
    monkeypatch.setattr(PATTERNS, "_items", items)
    spec = importlib.util.spec_from_file_location("folded", path)
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))

    inputs = qkv()
    traced = trace(attention, *inputs)
    (site,) = traced.sites
    assert (site.pattern, site.heads, site.mask.kind) == ("folded", 4, "none")
    assert traced.rewrites == ["SDPA without a mask"]
    torch.testing.assert_close(traced.output, attention(*inputs), atol=2e-5, rtol=1e-4)

    traced = trace(wrong_split, *inputs)
    assert traced.misses == ["batch and heads are not split as they were folded"] and not traced.sites
    torch.testing.assert_close(traced.output, wrong_split(*inputs))
