"""What each command does: load, call one stage, print. No stage is reimplemented here."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from attnopt.commands.benching import bench, bench_rows
from attnopt.commands.bisecting import bisect
from attnopt.commands.common import emit, say, stages, writable
from attnopt.commands.diffing import diff
from attnopt.commands.distilling import distill
from attnopt.commands.examining import examine, examine_model
from attnopt.commands.explaining import explain
from attnopt.commands.machine import env
from attnopt.commands.planning import calibrate, plan
from attnopt.commands.profiling import merge, profile
from attnopt.commands.showing import show

__all__ = ["COMMANDS", "bench_rows", "emit", "examine_model", "run", "say", "stages", "writable"]


def run(args: argparse.Namespace) -> None:
    COMMANDS[args.command](args)


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "examine": examine, "profile": profile, "merge": merge, "distill": distill, "calibrate": calibrate, "plan": plan,
    "show": show, "explain": explain, "diff": diff, "bench": bench, "bisect": bisect, "env": env,
}  # fmt: skip
