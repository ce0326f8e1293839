"""Models, a text, a profile and a plan on disk, and what every command that fails must say."""

from __future__ import annotations

import argparse
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models import save_model

from attnopt.cli import main

from .lines import LENGTHS, Fails, density_as_time, plan_command


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and a text."""
    folder = tmp_path_factory.mktemp("cli")
    save_model(folder / "model")
    save_model(folder / "heads", num_attention_heads=8, num_hidden_layers=1)
    save_model(folder / "shallow", num_hidden_layers=1)
    save_model(folder / "weights", seed=1, num_hidden_layers=1)
    source = "".join(Path(str(m.__file__)).read_text(encoding="utf-8") for m in (argparse, typing))
    (folder / "text.py").write_text(source, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def planned(work: Path) -> Iterator[Path]:
    """The same folder with a profile and a plan of the model of one layer, which is traced in half the time.

    Costs are counted until the module ends."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("attnopt.planner.costs.load_or_measure", density_as_time)
        command = ["profile", str(work / "shallow"), "--lengths", LENGTHS, "--samples", "2"]
        assert main([*command, "--text", str(work / "text.py"), "--out", str(work / "profile")]) == 0
        assert main(plan_command(work, work / "plan.json", probe="1")) == 0
        torch._dynamo.reset()
        yield work


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """Runs a command that must fail with `code`: its message, which has a remedy and no traceback."""

    def check(command: list[str], code: int = 2) -> str:
        capsys.readouterr()
        try:
            found = main(command)
        except SystemExit as ended:
            found = int(str(ended.code))
        out, err = capsys.readouterr()
        assert found == code, err
        assert out == "" and "Traceback" not in err
        problem, remedy = err.strip().split("\n")
        assert problem.strip() and remedy.startswith("  ") and remedy.strip()
        return err

    return check
