"""`attnopt show`: a plan or a profile, on the terminal, as a picture or as a page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from attnopt.commands.common import checked_sites, emit, load, stages, writable, wrote
from attnopt.commands.given import is_plan, profile_at
from attnopt.commands.reporting import Known, plan_report, traced
from attnopt.errors import OptionError
from attnopt.fitted import Fitted
from attnopt.plan import Plan
from attnopt.planner.again import told_sites
from attnopt.profile_file import Profile
from attnopt.report import terminal
from attnopt.report.data import page_data, plan_json, profile_json
from attnopt.report.page import write_page
from attnopt.report.profile_map import draw_profile


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
    pictures = {name: writable(given) for name in ("svg", "png") if (given := getattr(args, name))}
    for name, picture in pictures.items():
        if picture.suffix != f".{name}":
            raise OptionError(f"--{name} {picture} does not end in .{name}.", f"Call it {picture.stem}.{name}.")
    if is_plan(file):
        if pictures:
            raise OptionError("Pictures are drawn of profiles.", "Give a profile, or --html for a page of the plan.")
        show_plan(args, file, page)
        return
    given = [f"--{name}" for name in ("profile", "fitted", "model") if getattr(args, name)]
    if given:
        raise OptionError(f"{' and '.join(given)}: {file} is a profile.", "They are for the page of a plan.")
    seen = Profile.load(file)
    data = {"profile": profile_json(seen)}
    for picture in pictures.values():
        draw_profile(data["profile"], picture)
    if page is not None:
        write_page(page, page_data(f"attnopt show {file}", data))

    def told() -> None:
        terminal.print_profile(data["profile"])
        wrote(*pictures.values(), page)

    emit(args, data, told)


def show_plan(args: argparse.Namespace, file: str, page: Path | None) -> None:
    """With what else is given, its page and its JSON are the whole report."""
    plan = Plan.load(file)
    known = known_of(args, plan)
    if page is None and known is None:
        found: dict[str, Any] = {"plan": plan_json(plan, told_sites(plan))}
    else:
        found = plan_report(plan, known or Known())
    if page is not None:
        write_page(page, page_data(f"attnopt show {file}", found))

    def told() -> None:
        terminal.print_plan(found["plan"])
        wrote(page)

    emit(args, found, told)


def known_of(args: argparse.Namespace, plan: Plan) -> Known | None:
    """What is given beside the plan, which must be of its model; None where nothing is."""
    if args.fitted and not args.profile:
        raise OptionError("--fitted is weighed beside a profile.", "Give --profile FILE as well.")
    if not args.profile and not args.model:
        return None
    profile = profile_at(args.profile) if args.profile else None
    fitted = Fitted.load(args.fitted) if args.fitted else None
    if fitted is not None:
        fitted.check_model(plan.fingerprint)
    if not args.model:
        return Known(profile, fitted)
    loaded = load(args)
    with stages() as progress:
        progress("tracing", 0, 1)
        sites = checked_sites(plan, loaded)
        graphs, notes = traced(loaded, plan)
        progress("tracing", 1, 1)
    return Known(profile, fitted, sites, graphs=graphs, notes=notes, device=args.device)
