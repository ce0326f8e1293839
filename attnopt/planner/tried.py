"""Replacements that `attnopt distill` tried out: which a plan may weigh, and what they damage.

The trials hold damage on text, by the same formula as a profile's (attnopt/statistics/trials.py). What they do not hold
is taken from what the profile knows of the same span without its far part: what is lost of the probe's answers, all of
it, since a diffuse summary recalls no line; and how damage grows towards a planned length beyond the trials', in
proportion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from attnopt.errors import OptionError
from attnopt.fitted import families, plain_window
from attnopt.ir import Choice, Site
from attnopt.planner.extrapolate import carried_on
from attnopt.planner.knapsack import Array
from attnopt.registry import CANDIDATES
from attnopt.strict_json import nearest

if TYPE_CHECKING:
    from attnopt.fitted import Fitted
    from attnopt.profile_file import Profile
    from attnopt.statistics import Observation

# Weighed where there are fits and nothing else is asked for: all but pruning, which takes weights away.
FAMILIES = ("linear", "taylor", "compensation")
# Heads whose removal is predicted to lose more than this are not pruned, whatever their mean does. Of the shipped
# model's 48 heads, profiled at 256 and 512 tokens, that leaves 12 to prune, none of them in the first layer.
MOST_REMOVED = 0.01
MOST_FORGOTTEN = 0.1


def allowed_families(asked: Sequence[str] | None, fitted: Fitted | None) -> tuple[str, ...]:
    """The families to weigh; OptionError where one does not exist or nothing was fitted."""
    if fitted is None:
        if asked:
            raise OptionError(
                f"Nothing was fitted for {', '.join(asked)}.", "Fit with `attnopt distill`, and give --fitted FILE."
            )
        return ()
    for name in asked or ():
        if name not in families():
            raise OptionError(f"There is no family {name!r} of replacements.", nearest(name, families(), "There are"))
    return FAMILIES if asked is None else tuple(f for f in families() if f in asked)


def tried_at(fitted: Fitted | None, site: Site, allow: Sequence[str], length: int) -> list[Choice]:
    """The choices to weigh at a site that stand on trials, and drop something at `length`."""
    if fitted is None:
        return []
    kinds = [kind for _, kind in CANDIDATES if kind.family in allow and kind.refuse(site) is None]
    return [
        c
        for kind in kinds
        for c in kind.tried(fitted, site.name)
        if kind.far == "selected" or kind.span(dict(c.params), length)[1] < length
    ]


def damage_of(
    fitted: Fitted | None, site: Site, choice: Choice, seen: Sequence[Observation], target: int
) -> Array:  # fmt: skip
    """Nats per token (heads,): the largest over the observed lengths and `target`; inf for heads that a choice was not
    offered to."""
    assert fitted is not None
    tried = {o.length: fitted.damage(site.name, o.length, choice).numpy() for o in seen}
    damage = np.max(list(tried.values()), axis=0)
    longest = max(seen, key=lambda o: o.length)
    if target > longest.length:
        kind, params = CANDIDATES[choice.candidate], dict(choice.params)
        here, there = (
            (kind.damage(o, params, o.length) / o.tokens).numpy() for o in (longest, carried_on(longest, target))
        )
        # A span that lost nothing here says nothing of how a far part grows: it counts as the span alone.
        grown = np.where(here > 0, tried[longest.length] * there / np.where(here > 0, here, 1.0), there)
        damage = np.maximum(damage, grown)
    return np.where(fitted.offered(site.name, choice).numpy(), damage, np.inf)


def refused(fitted: Fitted, site: str, head: int, choice: Choice) -> str:
    """Why a choice was not offered to a head, with the figures; empty where it was."""
    if bool(fitted.offered(site, choice)[head]):
        return ""
    name = CANDIDATES[choice.candidate].map_name(dict(choice.params))
    held = fitted.held.get((site, name), ())
    fits = dict(zip(held, fitted.fits.get((site, name), ()), strict=True))
    if name and head not in fits:
        return f"no map {name} was fitted for this head"
    if name and fits[head].refused:
        return f"its map was refused, {fits[head].refused}"
    plain, lengths = plain_window(choice), sorted(n for name, n in fitted.trials if name == site)
    lost = {n: [float(fitted.damage(site, n, c)[head]) for c in (choice, plain) if c is not None] for n in lengths}
    worst = max(lost, key=lambda n: lost[n][0] - lost[n][-1])
    if plain is None or len(lost[worst]) < 2:
        return "what it loses could not be measured"
    return f"it loses {lost[worst][0]:.3g} nats at {worst} tokens, its own window {lost[worst][1]:.3g}"


def not_pruned(profile: Profile, sites: Sequence[str]) -> dict[str, dict[int, str]]:
    """Heads that pruning leaves alone, by site name, and why: those whose removal is predicted to lose more than
    MOST_REMOVED nats per token of text, or MOST_FORGOTTEN per answer of the probe."""
    found: dict[str, dict[int, str]] = {site: {} for site in sites}
    for (site, length), seen in profile.observations.items():
        if site not in found:
            continue
        for observation, most, of in (
            (seen, MOST_REMOVED, "token"),
            (seen.of_probe, MOST_FORGOTTEN, "answer of the probe"),
        ):
            if observation is None:
                continue
            lost = observation.ablation_t2 / 2 / max(observation.tokens, 1e-9)
            for head in (lost > most).nonzero()[:, 0].tolist():
                found[site][head] = (
                    f"its removal loses {lost[head]:.3g} nats per {of} at {length} tokens, over {most:g}"
                )
    return found
