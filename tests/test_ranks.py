"""Two processes under torchrun profile as one does, and one that fails leaves no other waiting."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import NanoGPT, save_model, tokens
from test_profiler import equal

from attnopt import ranks
from attnopt.cli import main
from attnopt.errors import ProfileError
from attnopt.profile_file import Profile
from attnopt.profiler import profile_model
from attnopt.statistics import Grid
from attnopt.supervision import Sample

GRID = Grid((0, 2), (4, 8))
# Of two lengths and an odd number, so that the parts differ.
SEQUENCES = [tokens(1, n, seed=seed) for seed, n in enumerate((24, 25, 24, 26, 24))]
SEQUENCES += SEQUENCES[:2]  # the same text counts once, whichever process it is dealt to
SCRIPT = """
import sys
from pathlib import Path
import test_ranks
from attnopt import ranks
from attnopt.errors import ProfileError
ranks.join()
assert ranks.size() == 2
folder = Path(sys.argv[1])
try:
    test_ranks.one_fails()
except ProfileError as error:
    (folder / f"error.{ranks.rank()}").write_text(str(error))
# In step again after the mistake.
test_ranks.profiled(folder).save(folder / f"made.{ranks.rank()}")
# The command leaves at its end.
assert test_ranks.main([*test_ranks.command(folder), "--out", str(folder / "command" / "two"), "--json"]) == 0
"""


def command(folder: Path) -> list[str]:
    options = ["--lengths", "64", "--samples", "3", "--labels", "continuation"]
    return ["profile", str(folder / "command" / "model"), *options]


def model() -> NanoGPT:
    """Without transformers, whose import in each process would take longer than everything else."""
    return NanoGPT(flash=True).eval()


def profiled(folder: Path) -> Profile:
    return profile_model(model(), SEQUENCES, GRID, partial=folder / "partial")


def one_fails() -> Profile:
    broken = model()
    if ranks.rank() == 1:
        with torch.no_grad():
            broken.head.weight[0] = float("nan")
    return profile_model(broken, SEQUENCES, GRID)


def torchrun(folder: Path, *command: str) -> None:
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *command]
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(run, capture_output=True, text=True, env=environment, timeout=600, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote: of a profile in which one makes a mistake, of one that both finish, and of the command:
    in one go, since each start imports torch three times."""
    folder = tmp_path_factory.mktemp("two")
    save_model(folder / "command" / "model", num_hidden_layers=1)
    (folder / "run.py").write_text(SCRIPT)
    torchrun(folder, str(folder / "run.py"), str(folder))
    return folder


@pytest.mark.slow
def test_two_processes_are_as_one(two: Path) -> None:
    one, other = (Profile.load(two / f"made.{n}") for n in (0, 1))
    assert (two / "made.0").read_bytes() == (two / "made.1").read_bytes()
    whole = profile_model(model(), SEQUENCES, GRID)
    equal(one, whole, rtol=1e-9)
    equal(other, whole, rtol=1e-9)
    # Each did a part of it, and one process takes up what two have left.
    parts = [Profile.load(two / name).samples for name in ("partial", "partial.1")]
    assert [sum(samples.values()) for samples in parts] == [3, 2]
    called: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("attnopt.profiler.one_sequence", lambda *a: called.append(a))
        equal(profiled(two), whole, rtol=1e-9)
    assert not called


def test_a_mistake_in_one_process_is_raised_in_all(two: Path) -> None:
    for n in (0, 1):
        assert "Process 1: The loss of a sequence" in (two / f"error.{n}").read_text()


@pytest.mark.slow
def test_the_command_under_torchrun(two: Path) -> None:
    """One process writes and prints; the model's own continuation is the same in both."""
    folder = two / "command"
    assert main([*command(two), "--out", str(folder / "one")]) == 0
    equal(Profile.load(folder / "two"), Profile.load(folder / "one"), rtol=1e-6)
    assert sorted(p.name for p in folder.iterdir()) == ["model", "one", "two"]


def test_alone_everything_is_ones_own(tmp_path: Path) -> None:
    assert (ranks.rank(), ranks.size(), ranks.gathered(b"x"), ranks.device_of("cuda")) == (0, 1, [b"x"], "cuda")
    assert ranks.gathered_json([1, "a"]) == [[1, "a"]]
    for name in ("p", "p.1", "p.10", "p.txt"):
        (tmp_path / name).write_text("")
    assert [p.name for p in ranks.leftovers(tmp_path / "p")] == ["p", "p.1", "p.10"]
    with pytest.raises(ProfileError, match="no text"):
        profile_model(model(), list[Sample](), GRID)
