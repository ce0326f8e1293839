"""The reference of the command line: every command of the parser, with its usage, options, defaults and examples."""

from __future__ import annotations

import argparse

from attnopt.options import EXAMPLES, build_parser
from attnopt.parsing import HELP

NOT_SAID = (None, False, [], argparse.SUPPRESS)


def page(_: str) -> str:
    """A section for each command, in the order of `attnopt --help`."""
    parser = build_parser()
    commands = next(a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return "".join(section(name, commands[name]) for name in HELP)


def section(name: str, parser: argparse.ArgumentParser) -> str:
    parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=96)
    actions = [a for a in parser._actions if not isinstance(a, argparse._HelpAction)]
    groups = {
        "argument": [a for a in actions if not a.option_strings],
        "option": [a for a in actions if a.option_strings],
    }
    tables = "".join(table(kind, rows) for kind, rows in groups.items() if rows)
    usage = parser.format_usage().removeprefix("usage: ").rstrip()
    examples = "\n".join(f"$ {line}" for line in EXAMPLES[name].splitlines())
    told = HELP[name][:1].upper() + HELP[name][1:]
    return f"## {name}\n\n{told}.\n\n```text\n{usage}\n```\n\n{tables}```console\n{examples}\n```\n\n"


def table(kind: str, actions: list[argparse.Action]) -> str:
    rows = "".join(f"| {spelled(a)} | {cell(meaning(a))} |\n" for a in actions)
    return f"| {kind} | meaning |\n|---|---|\n{rows}\n"


def spelled(action: argparse.Action) -> str:
    """The names, and what is given with them."""
    value = action.metavar or ("" if action.nargs == 0 else "|".join(map(str, action.choices or [action.dest.upper()])))
    value = " ".join(value) if isinstance(value, tuple) else value
    names = [f"{name} {value}".rstrip() for name in action.option_strings] or [value]
    return ", ".join(f"`{name}`" for name in names).replace("|", "\\|")


def meaning(action: argparse.Action) -> str:
    """The parser's own words; the default where they do not say it."""
    told = (action.help or "") % {"default": action.default} if action.help else ""
    if action.required and action.option_strings:
        told = f"required{'; ' if told else ''}{told}"
    if "default" not in told and action.default not in NOT_SAID:
        default = action.default
        shown = ",".join(map(str, default)) if isinstance(default, list) else str(default)
        told += f"{' ' if told else ''}(default {shown})"
    return told


def cell(text: str) -> str:
    """Text for a cell of a Markdown table, none of it markup but code between backticks."""
    parts = text.split("`")
    plain = [p.replace("\\", "\\\\").replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;") for p in parts]
    return "`".join(plain)
