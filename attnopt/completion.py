"""`attnopt completion SHELL`: a script that completes commands, options, choices, models and files in a shell.

Nothing here imports torch: a shell may ask for the script each time it starts.
"""

from __future__ import annotations

import argparse

import shtab

# By the name that help gives a value, or else by the option.
MODEL = {
    "bash": "_attnopt_models",
    "zsh": "{_alternative 'models:model:(demo)' 'files:folder:_files -/'}",
    "tcsh": "d",
    "preamble": {"bash": '_attnopt_models() {\n  compgen -W demo -- "$1"\n  compgen -d -- "$1"\n}\n'},
}
VALUES = {
    "MODEL": MODEL,
    "FILE": shtab.FILE,
    "PLAN": shtab.FILE,
    "PROFILE": shtab.FILE,
    "FOLDER": shtab.DIRECTORY,
}
WORDS = {
    "--dtype": "fp32 bf16 fp16",
    "--device": "cpu cuda",
    "--attention": "sdpa eager",
    "--device-preset": "a100 h100 h200 b200 mi300x",
    "--families": "linear taylor compensation prune blocks threshold tokens",
    "--allow": "linear taylor compensation prune blocks threshold tokens",
}


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script for bash, zsh or tcsh; `parser` is changed."""
    for one in parsers_of(parser):
        for action in one._actions:
            words = next((WORDS[name] for name in action.option_strings if name in WORDS), "")
            # An attribute that only shtab knows.
            if action.metavar in VALUES:
                vars(action)["complete"] = VALUES[str(action.metavar)]
            elif words:
                vars(action)["complete"] = shtab.cmd(f"echo {words}")
    made: str = shtab.complete(parser, shell)
    return made


def parsers_of(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """The parser and those of its commands."""
    inner = [a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return [parser, *(p for choices in inner for p in choices.values())]
