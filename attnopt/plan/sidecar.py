"""What a plan needs that is no JSON: the feature maps and mean outputs of its heads, in a file beside it.

plan.json                     "fitted": "9f86d081..."      sha256 of the file beside it; null where no choice needs one
plan.fitted.safetensors       `Fitted.part_of` the plan's choices
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from attnopt.errors import FittedError, PlanError
from attnopt.fingerprint import Fingerprint, mismatch
from attnopt.fitted import Fitted
from attnopt.ir import Choice, Site
from attnopt.registry import CANDIDATES
from attnopt.strict_json import Place

SUFFIX = ".fitted.safetensors"
AGAIN = "Put the file that was written with the plan beside it, or write the plan again with `attnopt plan --fitted`."


def beside(plan: Path | str) -> Path:
    """The file that belongs to a plan's file."""
    path = Path(plan)
    return path.with_name(path.name.removesuffix(".json") + SUFFIX)


def needed(choices: Mapping[str, Sequence[Choice]]) -> bool:
    """Whether any head's choice stands on something fitted."""
    every = {choice for heads in choices.values() for choice in heads}
    kinds = [(CANDIDATES[c.candidate], dict(c.params)) for c in every]
    return any(kind.far == "gone" or kind.map_name(params) for kind, params in kinds)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def read(plan: Path | str) -> bytes | None:
    """The content of the file beside a plan; None where there is none."""
    path = beside(plan)
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise PlanError(f"{path} cannot be read: {error.strerror}.", "Check its permissions.") from error


def refuse_overwriting(plan: Path | str) -> None:
    """PlanError where the file that would be written beside a plan is there and is no part of a plan."""
    path = beside(plan)
    if not path.exists():
        return
    try:
        ours = not Fitted.load(path).trials
    except FittedError:
        ours = False
    if not ours:
        raise PlanError(
            f"{path} belongs beside the plan {plan}, and is there as another file.", "Write the plan elsewhere."
        )


def found(place: Place, expected: str, content: bytes | None, fingerprint: Fingerprint) -> Fitted:
    """What was fitted, of the file's content, which must be the one that `expected` is the sha256 of."""
    file = beside(place.file).name
    if content is None:
        place.fail(f"the plan needs {file}, and it is not there", AGAIN)
    if digest(content) != expected:
        place.fail(f"{file} is not the file that this plan was written with (sha256 {digest(content)[:12]}...)", AGAIN)
    try:
        fitted = Fitted.from_bytes(content, file)
    except FittedError as error:
        place.fail(error.problem.removesuffix("."), AGAIN)
    different = mismatch(fitted.header.fingerprint, fingerprint)
    if different:
        place.fail(f"{file} was fitted for another model than the plan: {different}", AGAIN)
    return fitted


def check(place: Place, fitted: Fitted | None, choices: Mapping[str, Sequence[Choice]]) -> None:
    """Fail at the first head whose choice needs a map or a mean that is not held."""
    for site, heads in choices.items():
        for head, choice in enumerate(heads):
            kind = CANDIDATES[choice.candidate]
            name = kind.map_name(dict(choice.params))
            here = place.at("sites").at(site).at("choices").at(str(head))
            remedy = "Choose another replacement, or write the plan again with `attnopt plan --fitted`."
            if name and (fitted is None or head not in fitted.held.get((site, name), ())):
                here.fail(f"{choice} needs a feature map {name} of this head, which the plan does not hold", remedy)
            if kind.far == "gone" and (fitted is None or head >= len(fitted.means.get(site, ()))):
                here.fail(f"{choice} needs this head's mean output, which the plan does not hold", remedy)


def misfit(fitted: Fitted, sites: Mapping[str, Site]) -> str:
    """What of the fits does not fit a model of these sites, or an empty string."""
    for (name, of_map), maps in fitted.maps.items():
        site = sites.get(name)
        problem = maps.problem(site.head_dim) if site is not None else ""
        if problem:
            return f"the feature map {of_map} of {name}: {problem}"
    for name, means in fitted.means.items():
        site = sites.get(name)
        if site is not None and tuple(means.shape) != (site.heads, site.head_dim_v):
            return f"the mean outputs of {name} are {tuple(means.shape)}, expected {(site.heads, site.head_dim_v)}"
    return ""
