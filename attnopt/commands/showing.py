"""`attnopt show`: a plan or a profile, on the terminal, as a picture or as a page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from attnopt.commands.common import emit, writable
from attnopt.errors import OptionError, PlanError
from attnopt.plan import Plan
from attnopt.profile_file import Profile
from attnopt.report import terminal
from attnopt.report.data import plan_facts, plan_json, profile_json
from attnopt.report.page import write_page
from attnopt.report.profile_map import draw_profile


def is_plan(path: str) -> bool:
    """Whether a file is meant to be a plan: it is text that starts with a brace."""
    if not Path(path).exists():
        raise PlanError(f"There is no file {path}.", "Give a plan (JSON) or a profile (safetensors).")
    with open(path, "rb") as f:
        return f.read(64).lstrip()[:1] == b"{"


def shown_file(args: argparse.Namespace) -> str:
    """The file of `show FILE`, `show profile FILE` or `show plan FILE`, which is then of that kind."""
    *kind, file = args.file
    if kind and kind not in (["profile"], ["plan"]):
        raise OptionError(f"One file is shown at a time, not {' and '.join(args.file)}.", "Give the file alone.")
    if kind and is_plan(file) != (kind == ["plan"]):
        raise OptionError(f"{file} is not a {kind[0]}.", f"Try `attnopt show {file}`.")
    return str(file)


def show(args: argparse.Namespace) -> None:
    file = shown_file(args)
    page = writable(args.html) if args.html else None
    pictures = [writable(name) for name in (args.svg, args.png) if name]
    for picture, name in zip(pictures, [n for n in ("svg", "png") if getattr(args, n)], strict=True):
        if picture.suffix != f".{name}":
            raise OptionError(f"--{name} {picture} does not end in .{name}.", f"Call it {picture.stem}.{name}.")
    if is_plan(file):
        if pictures:
            raise OptionError("Pictures are drawn of profiles.", "Give a profile, or --html for a page of the plan.")
        held = Plan.load(file)
        data: dict[str, Any] = {"plan": plan_json(held)}
        summary, draw = plan_facts(data["plan"]), lambda: terminal.print_plan(held)
    else:
        seen = Profile.load(file)
        data = {"profile": profile_json(seen)}
        for picture in pictures:
            draw_profile(data["profile"], picture)
        summary, draw = [], lambda: terminal.print_profile(seen)
    if page is not None:
        write_page(page, {"title": f"attnopt show {file}", "summary": summary, **data})
    emit(args, data, draw)
