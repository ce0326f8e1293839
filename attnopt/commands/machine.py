"""`attnopt env`: what a report of a mistake needs."""

from __future__ import annotations

import argparse

from attnopt.codegen import native
from attnopt.commands.common import emit
from attnopt.report.data import environment


def env(args: argparse.Namespace) -> None:
    data = {**environment(), "compiled CPU kernel": native.told()}

    def draw() -> None:
        for key, value in data.items():
            print(f"{key}: {value}" if not isinstance(value, dict) else f"{key}:")
            for name, held in value.items() if isinstance(value, dict) else ():
                print(f"  {name}: {held}")

    emit(args, data, draw)
