"""`attnopt explain`: what was weighed for one head, and why the choice won."""

from __future__ import annotations

import argparse

from attnopt.commands.common import checked_sites, emit, load
from attnopt.commands.given import named_head, plan_at, profile_at, profile_beside
from attnopt.fitted import Fitted
from attnopt.planner.again import pose
from attnopt.planner.make import calibration_of
from attnopt.report import terminal
from attnopt.report.data import head_json


def explain(args: argparse.Namespace) -> None:
    plan = plan_at(args.plan)
    site, head = named_head(args.head, plan)
    others: list[str] = []
    if args.profile is None:
        file, profile, others = profile_beside(args.plan, plan)
    else:
        file, profile = args.profile, profile_at(args.profile)
    fitted = Fitted.load(args.fitted) if args.fitted else None
    if fitted is not None:
        fitted.check_model(plan.fingerprint)
    sites = checked_sites(plan, load(args)) if args.model else None
    found = head_json(plan, profile, pose(plan, profile, sites, fitted), site, head, fitted)
    if (digest := calibration_of(profile)) != plan.calibration:
        found["notes"].append(f"The plan was made from another profile, {plan.calibration}; this one is {digest}.")
    if others:
        found["notes"].append(
            f"Taken from {file.name}; {' and '.join(others)} may be meant as well: --profile says which."
        )
    found = {"plan_file": args.plan, "profile_file": str(file), **found}
    emit(args, found, lambda: terminal.print_head(found, args.all))
