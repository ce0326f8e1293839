"""Which file, which profile and which head are meant: what `show`, `explain` and `diff` share."""

from __future__ import annotations

import difflib
from pathlib import Path

from attnopt.errors import AttnoptError, OptionError, PlanError, ProfileError
from attnopt.fingerprint import mismatch
from attnopt.plan import Plan
from attnopt.planner.make import calibration_of
from attnopt.profile_file import Profile

SUFFIX = ".safetensors"


def is_plan(path: str) -> bool:
    """Whether a file is meant to be a plan: it is text that starts with a brace."""
    file = Path(path)
    if file.is_dir():
        raise PlanError(f"{path} is a folder.", "Give a plan (JSON) or a profile (safetensors).")
    if not file.exists():
        raise PlanError(f"There is no file {path}.", "Give a plan (JSON) or a profile (safetensors).")
    with open(file, "rb") as f:
        return f.read(64).lstrip()[:1] == b"{"


def plan_at(path: str) -> Plan:
    """The plan; where the file is a profile, an error that says so."""
    if Path(path).is_file() and not is_plan(path):
        raise PlanError(f"{path} is not a plan.", "Give the file that `attnopt plan` wrote, which is JSON.")
    return Plan.load(path)


def profile_at(path: str) -> Profile:
    """The profile; where the file is a plan, an error that says so."""
    if Path(path).is_file() and is_plan(path):
        raise ProfileError(f"{path} is not a profile.", "Give the file that `attnopt profile` wrote (safetensors).")
    return Profile.load(path)


def profile_beside(path: str, plan: Plan) -> tuple[Path, Profile, list[str]]:
    """The profile that a plan was made from, found in the plan's folder by its text's digest, model, lengths and sites,
    and the names of others that fit as well."""
    folder, passed, fit = Path(path).resolve().parent, [], []
    for file in sorted(folder.glob(f"*{SUFFIX}")):
        try:
            found = Profile.load(file)
        except AttnoptError:
            continue
        wrong = _misfit(found, plan)
        if wrong:
            passed.append(f"{file.name} is {wrong}")
        else:
            fit.append((file, found))
    if fit:
        return *fit[0], [file.name for file, _ in fit[1:]]
    there = f" ({', '.join(passed[:3])})" if passed else ""
    raise ProfileError(
        f"Beside {path} there is no profile {plan.calibration or 'that it names'}, which it was made from{there}.",
        f"Name it with --profile FILE; {SUFFIX} files in the plan's folder are looked at without it.",
    )


def _misfit(profile: Profile, plan: Plan) -> str:
    """What a profile is that is not the plan's; "" where it may be. The digest is of the text alone."""
    if (digest := calibration_of(profile)) != plan.calibration:
        return digest
    if mismatch(plan.fingerprint, profile.header.fingerprint):
        return "of another model"
    if plan.lengths.profiled and profile.lengths != plan.lengths.profiled:
        return f"of {', '.join(map(str, profile.lengths))} tokens"
    return "" if set(plan.choices) <= set(profile.sites) else "of other attentions"


def named_head(text: str, plan: Plan) -> tuple[str, int]:
    """SITE.HEAD of a plan. SITE may lack its beginning or its end, or be the site's number, if that leaves one."""
    name, _, number = text.rpartition(".")
    sites = [name] if name in plan.choices else _sites(name, list(plan.choices))
    if len(sites) > 1:
        some = ", ".join(sites[:3]) + (f" and {len(sites) - 3} more" if len(sites) > 3 else "")
        raise OptionError(f"{name!r} may be any of {some}.", f"Say more of it, for example {sites[0]}.{number or 0}.")
    if sites and number.isdecimal() and int(number) < len(plan.choices[sites[0]]):
        return sites[0], int(number)
    near = (sites or difflib.get_close_matches(name, plan.choices, 1) or list(plan.choices)[:1] or ["SITE"])[0]
    heads = len(plan.choices.get(near, ()))
    raise OptionError(f"The plan has no head {text!r}.", f"Try {near}.0 to .{max(heads - 1, 0)}.")


def _sites(name: str, sites: list[str]) -> list[str]:
    if name.isdecimal():
        return [sites[int(name)]] if int(name) < len(sites) else []
    ends = [s for s in sites if s.endswith(f".{name}")]
    return ends or [s for s in sites if f".{name}." in f".{s}."] if name else []
