"""`attnopt completion`: the script completes in a real bash, and is there without torch."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from attnopt.cli import main
from attnopt.completion import WORDS
from attnopt.cost import devices
from attnopt.fitted import families

ASK = """
source "$1"; cd "$2"
shift 2
COMP_WORDS=(attnopt "$@"); COMP_CWORD=$#
$(complete -p attnopt | sed 's/.*-F \\([^ ]*\\).*/\\1/')
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "attnopt.bash"
    code = "import sys; from attnopt.cli import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", code, "completion", "bash"], capture_output=True, text=True, check=True)
    path.write_text(run.stdout)
    return path


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
def test_bash_completes(script: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("")
    (tmp_path / "models").mkdir()

    def answers(*words: str) -> set[str]:
        command = ["bash", "-c", ASK, "ask", str(script), str(tmp_path), *words]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        return set(run.stdout.split())

    assert {"profile", "plan"} <= answers("p") and "show" not in answers("p")
    assert answers("completion", "") >= {"bash", "zsh", "tcsh"}
    assert "--max-loss-increase" in answers("plan", "--max")
    assert answers("plan", "--objective", "") == {"prefill", "decode", "memory", "mixed"}
    assert answers("show", "") >= {"plan.json", "models"}
    assert answers("bench", "demo", "--plan", "pl") == {"plan.json"}
    assert answers("examine", "") == {"demo", "models"}
    assert answers("examine", "demo", "--dtype", "f") == {"fp32", "fp16"}
    assert answers("demo", "--out", "") == {"models"}


def test_words_are_those_that_there_are() -> None:
    assert WORDS["--device-preset"].split() == list(devices())
    assert set(WORDS["--families"].split()) == set(WORDS["--allow"].split()) == set(families())


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_have_a_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert "examine" in text and "calibrate" in text and "max-loss-increase" in text
