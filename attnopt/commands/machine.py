"""`attnopt env`: what a report of a mistake needs, as a block to paste."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from attnopt import settings
from attnopt.codegen import native
from attnopt.commands.common import emit
from attnopt.errors import OptionError
from attnopt.report.data import cached, environment
from attnopt.units import bytes_text


def env(args: argparse.Namespace) -> None:
    data = {
        **environment(),
        "kernel target": {device: target_of(device) for device in ("cpu", "cuda")},
        "compiled CPU kernel": native.told(),
        "caches": cached(),
    }

    def draw() -> None:
        print("```text", *block(data), "```", sep="\n")

    emit(args, data, draw)


def target_of(device: str) -> str:
    """The target of a kind of device, or that ATTNOPT_TARGET names none."""
    try:
        return settings.target(device)
    except OptionError as error:
        return error.problem


def block(data: dict[str, Any]) -> Iterator[str]:
    """One line for each thing that is known."""
    for key, value in data.items():
        if key == "caches":
            yield "caches:"
            yield from (f"  {c['of']}: {c['files']} files, {bytes_text(c['bytes'])}, {c['path']}" for c in value)
        elif isinstance(value, dict):
            yield f"{key}:"
            yield from (f"  {name}: {held}" for name, held in value.items())
        else:
            known = ", ".join(map(str, value)) if isinstance(value, list) else value
            yield f"{key}: {'none' if known in (None, '') else known}"
