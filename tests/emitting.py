"""What the tests of every emitted Triton kernel ask of its text: is it the golden one, and clean?"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

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
