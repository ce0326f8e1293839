"""Every block of every page runs: Python in one namespace a page, commands through the command line."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from commands.lines import density_as_time
from models import save_model

from attnopt.cli import main
from attnopt.corpus import library_texts
from attnopt.errors import OptionError
from attnopt.registry import CANDIDATES, PATTERNS, TARGETS

from .blocks import (
    GENERATED,
    KINDS,
    NOTE,
    TEXTS,
    Block,
    accepted,
    arguments_of,
    blocks_of,
    commands,
    indented_commands,
    missing,
    pages,
    settings_and_words,
    smaller,
)

pytestmark = pytest.mark.slow

PAGES = pages()
BLOCKS = {page: list(blocks_of(page, text)) for page, text in PAGES.items()}
RUN = ("python", "console")
PLAN = "plan MODEL --profile profile.safetensors --max-loss-increase 50% --out plan.json"
# What the blocks of a page find in their namespace, as its text says.
PRELUDES = {
    "docs/reasons.md": "import torch\nimport torch.nn.functional as F",
    "docs/add-a-pattern.md": "from tracing import qkv, trace",
}


@pytest.fixture(scope="session")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every block finds in its folder: a small random model with a tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("docs")
    save_model(folder / "my-model", num_hidden_layers=1)
    (folder / "book.txt").write_text("\n".join(library_texts("calibrate"))[:60_000], encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def given(kit: Path) -> Path:
    """What some pages ask for: a profile and a plan of that model. What costs are is counted, not timed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("attnopt.planner.costs.load_or_measure", density_as_time)
        patch.chdir(kit)
        for command in ("profile MODEL --out profile.safetensors", PLAN):
            assert main(smaller(command.split())) == 0
    return kit


@pytest.fixture
def folder(tmp_path: Path, kit: Path, request: pytest.FixtureRequest) -> Path:
    """A page's own folder, with what it asks for by a comment."""
    page: str = request.node.callspec.params["page"]
    asked = [name for note, names in NOTE.findall(PAGES[page]) if note == "given" for name in names.split()]
    source = request.getfixturevalue("given") if asked else kit
    (tmp_path / "my-model").symlink_to(kit / "my-model")
    for name in ("book.txt", *asked):
        shutil.copy(source / name, tmp_path)
    return tmp_path


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch, eagerly: list[Any]) -> Path:
    """The process as a user has it: in that folder, with the standard settings, and what is registered undone later.

    The rewritten graph takes the place of inductor, or compiling would be most of what the tests do.
    """
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delenv("ATTNOPT_ALWAYS", raising=False)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr("attnopt.planner.costs.load_or_measure", density_as_time)
    for registry in (PATTERNS, CANDIDATES, TARGETS):
        list(registry)
        monkeypatch.setattr(registry, "_items", dict(registry._items))
    return folder


def run_python(block: Block, folder: Path, names: dict[str, Any]) -> None:
    """Execute the block in the page's namespace, from a file, so that tracebacks and Dynamo find its lines."""
    text = block.text
    for pattern, replacement in TEXTS:
        text = re.sub(pattern, replacement, text)
    path = folder / f"block_{block.line}.py"
    path.write_text(text, encoding="utf-8")
    exec(compile(text, str(path), "exec"), names)


def run_command(command: str, folder: Path) -> int:
    """The exit code of one command line, run in this process."""
    settings, words = settings_and_words(command)
    arguments = arguments_of(words)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        try:
            if arguments is not None:
                return main(smaller(arguments))
            assert words[0] == "python", f"{command}: no command that is run here; say why above the block"
            module = words[1] == "-m"
            patch.setattr(sys, "argv", words[2 if module else 1 :])
            if module:
                runpy.run_module(words[2], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(folder / words[1]), run_name="__main__")
        except SystemExit as ended:
            return int(ended.code or 0)
    return 0


def run_console(block: Block, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command ends as it should, and prints the words that the page shows."""
    for command, shown in commands(block):
        capsys.readouterr()
        code = run_command(command, folder)
        real = "\n".join(capsys.readouterr())
        assert code == int(block.notes.get("exit", 0)), f"{block}: {command}: exit code {code}\n{real}"
        if "output" not in block.notes:
            assert not missing(shown, real), f"{block}: {command}: {missing(shown, real)} not in\n{real}"


@pytest.mark.parametrize("page", [name for name, blocks in BLOCKS.items() if any(b.kind in RUN for b in blocks)])
def test_the_blocks_of_the_page_run(page: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {"__name__": "page"}
    exec(PRELUDES.get(page, ""), names)
    for block in BLOCKS[page]:
        if "not run" in block.notes:
            continue
        if "file" in block.notes:
            (here / block.notes["file"]).write_text(block.text, encoding="utf-8")
        elif block.kind == "python":
            run_python(block, here, names)
        elif block.kind == "console":
            run_console(block, here, capsys)
    for name in [name for name in names if name.startswith("test_")]:
        names[name]()


def check(block: Block) -> None:
    """What no test can run is at least well formed."""
    assert block.kind in (*KINDS, *GENERATED), f"{block}: {block.kind!r} is no kind of block"
    if block.kind == "python":
        compile(block.text, str(block), "exec")
    elif block.kind == "json":
        json.loads(block.text)
    elif block.kind == "toml":
        tomllib.loads(block.text)
    elif block.kind == "console":
        for command, _ in commands(block):
            arguments = arguments_of(settings_and_words(command)[1])
            assert arguments is None or accepted(arguments), f"{block}: attnopt does not take: {command}"


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_of_a_known_kind_and_parses(page: str) -> None:
    for block in BLOCKS[page]:
        check(block)
    assert not indented_commands(page, PAGES[page])


BAD = {
    "an option that is not there": "<!-- not run: a test -->\n```console\n$ attnopt show plan.json --no-such\n```\n",
    "python with a mistake": "<!-- not run: a test -->\n```python\nx = (\n```\n",
    "no JSON": "```json\n{\n```\n",
    "an unknown kind": "```sh\nls\n```\n",
}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
def test_what_is_wrong_with_a_block_is_seen(text: str) -> None:
    (block,) = blocks_of("page", text)
    with pytest.raises((AssertionError, SyntaxError, ValueError, OptionError)):
        check(block)


def test_an_indented_command_is_seen() -> None:
    assert indented_commands(
        "page", "text\n\n    A=1 attnopt env\n\n```console\n    attnopt env\n```\n    attn = 3"
    ) == ["page:3: A=1 attnopt env"]


def test_a_word_that_is_not_printed_is_seen() -> None:
    assert missing(["heads 32  windowed"], "heads 16: windowed") == []
    assert missing(["heads 32  windowed"], "heads 32") == ["windowed"]
    assert missing(["heads windowed"], "windowed heads") == ["windowed"]


def test_a_command_is_read_with_its_settings_and_continued_lines() -> None:
    block = Block("page", 1, "console", "$ A=1 attnopt show \\\n    plan.json\nshown\n$ attnopt env  # all of it\n")
    assert commands(block) == [("A=1 attnopt show plan.json", ["shown"]), ("attnopt env  # all of it", [])]
    assert settings_and_words("A=1 attnopt env  # all") == ({"A": "1"}, ["attnopt", "env"])
    assert smaller(["plan", "demo", "--length", "8192"])[:4] == ["plan", "./my-model", "--length", "64"]
