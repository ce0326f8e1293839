"""What the command line says of itself: the commands, their help in groups, and the nearest one to a misspelt word."""

from __future__ import annotations

import argparse
import difflib
import textwrap
from typing import Any, NoReturn

from attnopt.errors import OptionError

HELP = {
    "examine": "list every attention of a model: what was recognised, what would be done, or why not",
    "profile": "measure what dropping keys would do to the loss, head by head",
    "merge": "add up profiles of one model over different text",
    "distill": "fit and try what may replace heads besides spans, and measure what it does to the loss",
    "calibrate": "time the kernels of this device, once, for all plans made here",
    "plan": "choose for every head what is cheapest within a loss budget, measured end to end",
    "show": "show a plan or a profile",
    "explain": "the candidates that were weighed for one head, and why the choice won",
    "diff": "what two plans, or two profiles, do not have in common, head by head",
    "bench": "time a model: eager, inductor, attnopt exact and planned, interleaved",
    "bisect": "find the rewrite that breaks a model's output, or the check of any command",
    "env": "versions, hardware and settings, to paste into a report",
    "demo": "the whole path on the small trained model that ships with attnopt",
    "completion": "print a script that completes attnopt's commands in bash, zsh or tcsh",
}
# As `attnopt --help` lists them; whatever is in no group is a tool.
GROUPS = {
    "look": ("examine", "show", "explain", "diff"),
    "measure": ("profile", "merge", "distill", "calibrate"),
    "plan": ("plan",),
    "run": ("bench", "demo"),
}


class Parser(argparse.ArgumentParser):
    """An unknown command or option raises OptionError, which names the nearest one."""

    # Where it takes a command line of its own after --: what that is called, None without one.
    before_command = ""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        if not self.before_command:
            return super().parse_known_args(args, namespace)
        given = list(args)
        at = given.index("--") if "--" in given else len(given)
        found, left = super().parse_known_args(given[:at], namespace)
        setattr(found, self.before_command, given[at + 1 :] if at < len(given) else None)
        return found, left

    def error(self, message: str) -> NoReturn:
        words = [w.strip(":,()").partition("=")[0] for w in message.replace("'", " ").split()]
        known = [*HELP, *self.options_known()]
        unknown = [w for w in words if (w.startswith("--") or f"'{w}'" in message) and w not in known]
        near = next((m for w in unknown for m in difflib.get_close_matches(w, known, 1)), "")
        raise OptionError(f"{self.prog}: {message}", f"Did you mean {near}?" if near else f"See `{self.prog} --help`.")

    def options_known(self) -> list[str]:
        """The options of this parser and, since leftovers are only found at the top, of its commands."""
        inner = [a.choices for a in self._actions if isinstance(a, argparse._SubParsersAction)]
        parsers = [p for choices in inner for p in choices.values()]
        return [*self._option_string_actions, *(o for p in parsers for o in p._option_string_actions)]


class CommandsParser(Parser):
    """The parser of the command's name, whose help lists the commands in groups."""

    def format_help(self) -> str:
        grouped = {name for group in GROUPS.values() for name in group}
        groups = {**GROUPS, "tools": tuple(name for name in HELP if name not in grouped)}
        lines = [self.format_usage(), str(self.description)]
        for group, members in groups.items():
            lines += ["", f"{group}:"]
            for name in (name for name in members if name in HELP):
                lines += textwrap.wrap(HELP[name], 79, initial_indent=f"  {name:<12}", subsequent_indent=" " * 14)
        lines += ["", "options:", "  -h, --help, --version"]
        lines += ["", "`attnopt COMMAND --help` has the command's options, and examples."]
        return "\n".join(lines) + "\n"
