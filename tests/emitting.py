"""What the tests of every emitted Triton kernel ask: is its text the golden one and clean, and what are its numbers in
Triton's interpreter, which takes a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "codegen" / "golden"


def check_golden(name: str, text: str) -> None:
    """UPDATE_GOLDEN=1 writes the file anew; read the difference before you commit it."""
    path = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN") == "1":
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text


def check_clean(folder: Path, texts: Iterable[str]) -> None:
    """Whether ruff finds nothing in them and would lay them out as they are."""
    ruff = pytest.importorskip("ruff").find_ruff_bin()
    for n, text in enumerate(texts):
        (folder / f"kernel_{n}.py").write_text(text, encoding="utf-8")
    config = ["--config", str(ROOT / "pyproject.toml"), str(folder)]
    for command in (["check", "--output-format=concise"], ["format", "--diff"]):
        done = subprocess.run([ruff, *command, *config], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def interpreted_rows(file: str, folder: Path, key: str = "case") -> dict[str, dict[str, Any]]:
    """The JSON objects that `file`, a test module run as a script, prints in Triton's interpreter, by their `key`."""
    # The interpreter of triton 3.6 fails on loops with run-time bounds under numpy 2.4.
    pytest.importorskip("triton", minversion="3.7")
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    changes = {"TRITON_INTERPRET": "1", "PYTHONPATH": path, "ATTNOPT_CACHE": str(folder)}
    child = subprocess.run([sys.executable, file], env={**os.environ, **changes}, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-4000:]
    rows = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
    return {row[key]: row for row in rows}
