"""Replacements that `attnopt distill` tried out: which a plan may weigh, and what they damage.

The trials hold damage on text, by the same formula as a profile's (attnopt/statistics/trials.py), and on a retrieval
probe where the profile has one. What they do not hold is taken from what the profile knows of the same span without its
far part: what is lost of the probe's answers, all of it, since a diffuse summary recalls no line; and how damage grows
towards a planned length beyond the trials', in proportion. Choices that select keys have no such span: theirs grows on
as it did from one length tried to the next, as fast as any may from one at which nothing was lost, and without a probe
a head loses of its answers the share of what removing it would that it does not recall of its mass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import numpy as np

from attnopt.errors import OptionError
from attnopt.fitted import MOST_SKIPPED, families, plain_window
from attnopt.ir import Choice, Share, Site
from attnopt.planner.extrapolate import carried_on
from attnopt.planner.knapsack import Array
from attnopt.registry import CANDIDATES
from attnopt.strict_json import nearest

if TYPE_CHECKING:
    from attnopt.fitted import Fitted
    from attnopt.profile_file import Profile
    from attnopt.statistics import Observation

# Weighed where there are fits and nothing else is asked for, as far as they were tried: all but pruning, which takes
# weights away.
FAMILIES = ("linear", "taylor", "compensation", "blocks", "threshold", "tokens")
# Heads whose removal is predicted to lose more than this are not pruned, whatever their mean does. Of the shipped
# model's 48 heads, profiled at 256 and 512 tokens, that leaves 12 to prune, none of them in the first layer.
MOST_REMOVED = 0.01
MOST_FORGOTTEN = 0.1
# Damage grows with the length by this power of it at most: two lengths of little text tell no more.
MOST_GROWTH = 2.0


def allowed_families(asked: Sequence[str] | None, fitted: Fitted | None) -> tuple[str, ...]:
    """The families to weigh, by default those of FAMILIES that were tried; OptionError where one does not exist or was
    not tried."""
    for name in asked or ():
        if name not in families():
            raise OptionError(f"There is no family {name!r} of replacements.", nearest(name, families(), "There are"))
    if fitted is None:
        if asked:
            raise OptionError(
                f"Nothing was fitted for {', '.join(asked)}.",
                f"Fit or try them, in one run: `attnopt distill --families {','.join(asked)}`, and give --fitted FILE.",
            )
        return ()
    there = {CANDIDATES[c.candidate].family for trials in fitted.trials.values() for c in trials.choices}
    missing = [name for name in asked or () if name not in there]
    if missing:
        every = ",".join(name for name in families() if name in there or name in missing)
        raise OptionError(
            f"The file of fits holds no trials of {', '.join(missing)}.",
            f"Try all that you want in one run, since a plan takes one file: `attnopt distill --families {every}`.",
        )
    return tuple(f for f in (FAMILIES if asked is None else families()) if f in (there if asked is None else asked))


def tried_at(fitted: Fitted | None, site: Site, allow: Sequence[str], length: int) -> list[Choice]:
    """The choices to weigh at a site that stand on trials, and drop something at `length`."""
    if fitted is None:
        return []
    kinds = [kind for _, kind in CANDIDATES if kind.family in allow and kind.refuse(site) is None]
    return [
        c
        for kind in kinds
        for c in kind.tried(fitted, site.name)
        if kind.far == "selected" or kind.decoded or kind.span(dict(c.params), length)[1] < length
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
    kind, params = CANDIDATES[choice.candidate], dict(choice.params)
    if target > longest.length and (kind.far == "selected" or kind.decoded):
        damage = np.maximum(damage, grown_on(tried, target))
    elif target > longest.length:
        here, there = (
            (kind.damage(o, params, o.length) / o.tokens).numpy() for o in (longest, carried_on(longest, target))
        )
        # A span that lost nothing here says nothing of how a far part grows: it counts as the span alone.
        grown = np.where(here > 0, tried[longest.length] * there / np.where(here > 0, here, 1.0), there)
        damage = np.maximum(damage, grown)
    return np.where(fitted.offered(site.name, choice).numpy(), damage, np.inf)


def grown_on(tried: Mapping[int, Array], target: int) -> Array:
    """What was tried at some lengths, at a longer one: by the power law through the two longest, where it grew, and as
    at the longest where it did not, or one length alone was tried."""
    *before, longest = sorted(tried)
    if not before:
        return tried[longest]
    shorter, last = tried[before[-1]], tried[longest]
    power = np.log(np.where(shorter > 0, last / np.where(shorter > 0, shorter, 1.0), 1.0).clip(min=1.0))
    power /= np.log(longest / before[-1])
    # Nothing was lost where all keys were kept: how fast damage grows from there no ratio tells.
    power = np.where((shorter == 0) & (last > 0), MOST_GROWTH, power)
    return np.asarray(last * (target / longest) ** np.minimum(power, MOST_GROWTH))


def forgotten_of(
    fitted: Fitted | None, site: Site, choice: Choice, seen: Sequence[Observation], target: int
) -> Array | None:  # fmt: skip
    """Nats per answer of the probe (heads,), the largest over the lengths at which the profile was asked and `target`;
    None where spans tell it (`planner.problem`)."""
    assert fitted is not None
    asked = [o for o in seen if o.of_probe is not None]
    tried = {o.length: fitted.forgotten(site.name, o.length, choice) for o in asked}
    known = {n: lost.numpy() for n, lost in tried.items() if lost is not None}
    if known:
        found = [*known.values(), *([grown_on(known, target)] if target > max(known) else [])]
        return np.asarray(np.max(found, axis=0))
    if CANDIDATES[choice.candidate].far != "selected" or not asked:
        return None
    lost = []
    for o in asked:
        removed = (o.probe["ablation_t2"] / 2 / max(o.asked, 1e-9)).numpy()
        recalled = np.array([share.recalled for share in fitted.shares(site.name, o.length, choice)])
        lost.append(removed * (1 - recalled))
    return np.asarray(np.max(lost, axis=0))


def selects(choice: Choice) -> bool:
    """Whether what a head reads is decided while running."""
    kind = CANDIDATES[choice.candidate]
    return bool(kind.far == "selected" or kind.decoded)


def shares_at(fitted: Fitted | None, site: str, choice: Choice, length: int, heads: int) -> tuple[Share | None, ...]:
    """What every head visits at a length: as at the longest that was tried and is no longer, since the share of blocks
    that a method needs falls with the length; below all that were tried, as many blocks as at the shortest. None where
    it was not tried, as of every choice that selects no keys."""
    lengths = sorted(n for name, n in (fitted.trials if fitted is not None else ()) if name == site)
    if fitted is None or not selects(choice) or choice not in fitted.choices(site):
        return (None,) * heads
    at = max((n for n in lengths if n <= length), default=lengths[0])
    # Steps that select are counted of steps, whose share has nothing to do with the length.
    more = 1.0 if CANDIDATES[choice.candidate].decoded else max(at / length, 1.0)
    found = fitted.shares(site, at, choice)
    return tuple(replace(share, visited=min(share.visited * more, 1.0)) for share in found)


def visits_of(
    choices: Mapping[str, Sequence[Choice]], fitted: Fitted | None, length: int
) -> dict[str, dict[int, Share]]:
    """By site and head, what those visit whose keys are selected, to four digits, as a plan file holds it."""
    found: dict[str, dict[int, Share]] = {}
    for site, heads in choices.items():
        for head, choice in enumerate(heads):
            if (share := shares_at(fitted, site, choice, length, len(heads))[head]) is not None:
                rounded = {name: round(value, 4) for name, value in asdict(share).items()}
                found.setdefault(site, {})[head] = Share(**rounded)
    return found


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
    if (skips := fitted.skips(site, choice)) is not None:
        skipped, lost_mass = (float(values[head]) for values in skips)
        if not skipped:
            return "no block of it is skipped at any length that was tried"
        return (
            f"it skips {100 * skipped:.1f} % of the blocks with {100 * lost_mass:.1f} % of the mass, of which "
            f"{100 * MOST_SKIPPED:g} % are the most"
        )
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
