"""The fenced blocks of a page, and how a command in one of them is made small enough to run.

A comment on the line above a block says what is special about it:

    <!-- not run: REASON -->        it needs what is not here; it must still parse
    <!-- output: shortened -->      the lines below a command are not compared with what it prints
    <!-- exit: 2 -->                its commands fail, with this code
    <!-- file: NAME -->             a file of the folder in which the page's blocks run
    <!-- given: plan.json profile.safetensors -->   anywhere on a page: files that are there from the start
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from attnopt.options import build_parser

ROOT = Path(__file__).parents[2]
KINDS = ("python", "console", "json", "toml", "text", "cpp", "diff")
GENERATED = ("{command-line}", "{plan-file}", "{python-api}")
NOTE = re.compile(r"<!-- (not run|output|exit|file|given): (.+?) -->")
COMMAND = re.compile(r" {4,}(\$ |([A-Z_]+=\S+ )*(attnopt|python3?|make|pip|torchrun)( |$))")

# What makes a command short: for an option that stands in a block or not, its value here.
SMALL = {
    "examine": {"--length": "32"},
    "profile": {"--lengths": "64", "--samples": "1", "--probe": "0", "--text": "book.txt"},
    "distill": {"--features": "8", "--ranks": "2", "--windows": "32", "--steps": "0", "--samples": "1"},
    "calibrate": {"--lengths": "64", "--rounds": "1"},
    "plan": {"--length": "64", "--verify-lengths": "64", "--samples": "8", "--probe": "0", "--text": "book.txt"},
    "bench": {"--lengths": "64", "--rounds": "1", "--generate": "2"},
}
# Options that are only given another value, not added.
KEPT_OUT = {"--generate"}
# What is added to a command: everything that recompiles a model is a matter of other tests.
FLAGS = {"examine": ["--prompt-only"]}
# The words of a command that are others here: the model has one layer of four heads.
WORDS = {
    "demo": "./my-model",
    "MODEL": "./my-model",
    "model.layers.3.self_attn.5": "model.layers.0.self_attn.3",
    "model.layers.1.self_attn.3": "model.layers.0.self_attn.3",
    "layers.3.5": "layers.0.3",
}
# The same in Python.
TEXTS = (
    (r"layers\.[1-9]\b", "layers.0"),
    (r"max_new_tokens=\d+", "max_new_tokens=3"),
    (r"max_length=\d+", "max_length=256"),
)


@dataclass(frozen=True)
class Block:
    """One fence: the page's path and the line of its first line of text. notes: the comments above it."""

    page: str
    line: int
    kind: str
    text: str
    notes: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> dict[str, str]:
    """The text of the README and of every page of the site, by its path."""
    docs = [path for path in sorted((ROOT / "docs").rglob("*.md")) if "_build" not in path.parts]
    return {p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8") for p in (ROOT / "README.md", *docs)}


def blocks_of(page: str, text: str) -> Iterator[Block]:
    """The fences of a page, dedented where they stand in a list."""
    notes: dict[str, str] = {}
    lines = iter(enumerate(text.splitlines(), 1))
    for number, line in lines:
        opened = re.match(r"( *)```(\S*)$", line)
        if opened:
            inner = []
            for _, within in lines:
                if within.strip() == "```":
                    break
                inner.append(within.removeprefix(opened[1]))
            yield Block(page, number + 1, opened[2], "\n".join(inner) + "\n", notes)
        found = dict(NOTE.findall(line))
        notes = notes | found if found else {}


def indented_commands(page: str, text: str) -> list[str]:
    """Lines that show a command in an indented block, where nothing would run it."""
    fenced, found = False, []
    for number, line in enumerate(text.splitlines(), 1):
        fenced ^= line.lstrip().startswith("```")
        if not fenced and COMMAND.match(line):
            found.append(f"{page}:{number}: {line.strip()}")
    return found


def commands(block: Block) -> list[tuple[str, list[str]]]:
    """The commands of a console block, each with the lines of its output that are shown."""
    found: list[tuple[str, list[str]]] = []
    continued = False
    for line in block.text.splitlines():
        if continued:
            found[-1] = (f"{found[-1][0]} {line.strip()}", [])
        elif line.startswith("$ "):
            found.append((line[2:], []))
        else:
            assert found, f"{block}: output before a command"
            found[-1][1].append(line)
        continued = bool(found) and not found[-1][1] and found[-1][0].endswith("\\")
        if continued:
            found[-1] = (found[-1][0][:-1].rstrip(), [])
    return found


def settings_and_words(command: str) -> tuple[dict[str, str], list[str]]:
    """VAR=1 attnopt examine demo -> {"VAR": "1"}, ["attnopt", "examine", "demo"]."""
    words = shlex.split(command, comments=True)
    settings: dict[str, str] = {}
    while words and (set_ := re.fullmatch(r"([A-Z_][A-Z0-9_]*)=(.*)", words[0])):
        settings[set_[1]] = set_[2]
        words = words[1:]
    return settings, words


def arguments_of(words: list[str]) -> list[str] | None:
    """What attnopt is given, by its own name, as a module, or by torchrun; None for another command."""
    if "attnopt" not in words or words[0] not in ("attnopt", "python", "torchrun"):
        return None
    return words[words.index("attnopt") + 1 :]


def accepted(arguments: list[str]) -> bool:
    """Whether the command line takes them; --help and --version end well."""
    try:
        build_parser().parse_args(arguments)
    except SystemExit as ended:
        return not ended.code
    return True


def smaller(arguments: list[str]) -> list[str]:
    """The same command on the small model, at small lengths."""
    arguments = [WORDS.get(word, word) for word in arguments]
    small = SMALL.get(arguments[0], {})
    if "--device-preset" in arguments:
        # Costs are computed, not timed: at a small length nothing is cheaper than dense there.
        small = {option: value for option, value in small.items() if option != "--length"}
    for option, value in small.items():
        if option in arguments:
            at = arguments.index(option)
            end = next((n for n in range(at + 1, len(arguments)) if arguments[n].startswith("-")), len(arguments))
            arguments[at + 1 : end if option == "--text" else at + 2] = [value]
        elif option not in KEPT_OUT:
            arguments += [option, value]
    return arguments + [flag for flag in FLAGS.get(arguments[0], []) if flag not in arguments]


def missing(shown: list[str], real: str) -> list[str]:
    """From the first word of shown lines that does not follow those before it in real output. Numbers, what is drawn
    between them, and what is printed beside what is shown, may differ."""
    following = iter(re.findall(r"[^\W\d_][\w-]*", real))
    return [word for line in shown for word in re.findall(r"[^\W\d_][\w-]*", line) if word not in following]
