"""torch's own logging has what attnopt says: TORCH_LOGS its lines, and TORCH_TRACE artifacts that tlparse shows."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = """
import torch
import torch._inductor.compile_fx
import torch.nn.functional as F
torch._inductor.compile_fx.compile_fx = lambda gm, inputs, **_: gm.forward
from attnopt import backend

def attend(q, k, v):
    i = torch.arange(q.shape[2])
    once = F.scaled_dot_product_attention(q, k, v, attn_mask=i[:, None] >= i)
    return once + torch.softmax(q @ k.transpose(-2, -1), -1).transpose(-2, -1) @ v

torch.compile(attend, backend=backend.attnopt)(*torch.randn(3, 1, 2, 16, 8))
"""


def run(script: Path, **variables: str) -> str:
    """What a fresh process writes to standard error."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, check=True)
    return done.stderr


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that TORCH_TRACE names, and what the same run wrote under TORCH_LOGS."""
    folder = tmp_path_factory.mktemp("torch")
    (folder / "script.py").write_text(SCRIPT)
    said = run(folder / "script.py", TORCH_LOGS="+attnopt", TORCH_TRACE=str(folder / "trace"))
    return folder, said


def test_torch_logs_prints_the_lines_of_attnopt(traced: tuple[Path, str]) -> None:
    """INFO and DEBUG in torch's own format, with the id of the compilation."""
    lines = traced[1].splitlines()
    (head,) = [line for line in lines if "attnopt graph 0:" in line]
    assert head.startswith("I") and "[0/0] attnopt graph 0: 1 attention, 1 rewritten" in head and "told.py:" in head
    assert any(line.startswith("I") and "SDPA is_causal" in line for line in lines)
    assert any(line.startswith("V") and "not recognised, " in line and "script.py:" in line for line in lines)


@pytest.mark.skipif(shutil.which("tlparse") is None, reason="tlparse is not installed")
def test_tlparse_shows_the_report_and_the_graph(traced: tuple[Path, str]) -> None:
    folder = traced[0]
    (log,) = (folder / "trace").iterdir()
    out = folder / "shown"
    subprocess.run(["tlparse", str(log), "-o", str(out), "--no-browser"], check=True, capture_output=True)
    (report,) = out.glob("*/attnopt_report*.txt")
    (graph,) = out.glob("*/attnopt_graph*.txt")
    assert "SDPA is_causal" in report.read_text() and "not recognised" in report.read_text()
    assert "aten.scaled_dot_product_attention.default(" in graph.read_text()
    page = (out / "index.html").read_text()
    assert report.name in page and graph.name in page and report.parent.name == "-_0_0_0"
