"""`attnopt diff`: what two plans, or two profiles, do not have in common."""

from __future__ import annotations

import argparse

from attnopt.commands.common import emit
from attnopt.commands.given import is_plan, plan_at, profile_at
from attnopt.errors import OptionError
from attnopt.planner.again import told_sites
from attnopt.report import terminal
from attnopt.report.data import plans_json, profiles_json


def diff(args: argparse.Namespace) -> None:
    """Ends with 0 whether or not they differ; with --exit-code, as git's, with 1 where they do."""
    names = args.one, args.other
    kinds = [is_plan(name) for name in names]
    if kinds[0] != kinds[1]:
        plan, profile = names if kinds[0] else names[::-1]
        raise OptionError(f"{plan} is a plan and {profile} a profile.", "Give two plans, or two profiles.")
    if kinds[0]:
        one, other = map(plan_at, names)
        found = plans_json(one, other, names, told_sites(one) or told_sites(other))
    else:
        found = profiles_json(profile_at(names[0]), profile_at(names[1]), names)
    emit(args, found, lambda: terminal.print_difference(found))
    if args.exit_code and not found["same"]:
        raise SystemExit(1)
