"""A profile as plain data and as a picture: where heads look, what rests on the first keys, what is alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnopt.errors import DependencyError, ProfileError
from attnopt.profile_file import Profile
from attnopt.report import figures
from attnopt.report.cells import at_longest
from attnopt.statistics import Observation, distance_buckets

WORST = 12  # heads in the list of the largest long-range damage
ALIKE = 8  # pairs in the list of heads that attend most alike
FIRST_KEYS = 4  # what attention that has nothing to say rests on
NEAR, MOSTLY = 64, 0.8  # a head is called local if so much of its mass is nearer


def profile_json(profile: Profile) -> dict[str, Any]:
    """Damages are per token counted: t2 / 2 / tokens, as [sink][window] in the order of `grid`; None where the profile
    was made without a backward pass. worst: heads by what they lose of the text beyond the narrowest window; recalling:
    by what they lose of the probe's answers. mass: of a head, the share in every bucket of i - j in grid's `distances`,
    first and last of each, at the longest length; shorter ones have their first few."""
    header, grid = profile.header, profile.header.grid
    sites: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for (site, length), observation in profile.observations.items():
        sites.setdefault(site, {})[str(length)] = [_head(observation, head) for head in range(observation.heads)]
    lengths = [
        {"length": n, "samples": profile.samples[n],
         "rows": max(o.rows for (_, length), o in profile.observations.items() if length == n),
         "tokens": max(o.tokens for (_, length), o in profile.observations.items() if length == n)}
        for n in profile.lengths
    ]  # fmt: skip
    return {
        "fingerprint": header.fingerprint.structure,
        "grid": {
            "sinks": list(grid.sinks),
            "windows": list(grid.windows),
            "distances": [list(ends) for ends in distances(max(profile.lengths, default=1))],
        },
        "data": list(header.data),
        "supervision": list(header.supervision),
        "dtypes": list(header.dtypes),
        "held": list(header.held),
        "versions": [list(version) for version in header.versions],
        "lengths": lengths,
        "sites": sites,
        "worst": _worst(profile.observations),
        "recalling": _worst({key: probe for key, o in profile.observations.items() if (probe := o.of_probe)}),
        "totals": _totals(sites),
        "similarity": similarity(profile),
    }


def _head(observation: Observation, head: int) -> dict[str, Any]:
    rows, tokens, backward = max(observation.rows, 1), max(observation.tokens, 1e-9), "t2" in observation.held
    low, high = median_distance(observation, head)
    return {
        "head": head,
        "distance": [low, high],
        "entropy": float(observation.entropy[head]) / rows,
        "sink": float(observation.mass_at_key[head, :FIRST_KEYS].sum()) / rows,
        "local": _within(observation, head, NEAR) / rows,
        "mass": [float(f"{x:.4g}") for x in (observation.mass_by_distance[head] / rows).tolist()],
        "ablation": float(observation.ablation_t2[head]) / 2 / tokens if backward else None,
        "damage": (observation.t2[head] / 2 / tokens).tolist() if backward else None,
        "moved": (observation.delta[head] / rows).tolist() if "delta" in observation.held else None,
    }


def distances(length: int) -> list[tuple[int, int]]:
    """The first and last i - j of every bucket of a text of `length` tokens."""
    starts = distance_buckets(length)
    ends = [*(s - 1 for s in starts[1:]), length - 1]
    return [(start, max(end, start)) for start, end in zip(starts, ends, strict=True)]


def median_distance(observation: Observation, head: int) -> tuple[int, int]:
    """The bucket of i - j up to which half of the head's mass lies: its first and last distance."""
    buckets = distances(observation.length)
    mass = observation.mass_by_distance[head].cumsum(0)
    at = int(torch.searchsorted(mass, float(mass[-1]) / 2)) if float(mass[-1]) > 0 else 0
    return buckets[min(at, len(buckets) - 1)]


def _worst(observations: Mapping[tuple[str, int], Observation]) -> list[dict[str, Any]]:
    """The heads with most to lose beyond the narrowest window, the largest sink kept, so that it is the distance that
    counts; at the longest length of each site. Of a probe: per token of its answers."""
    longest: dict[str, int] = {}
    for site, length in observations:
        longest[site] = max(length, longest.get(site, 0))
    found: list[dict[str, Any]] = []
    for site, length in longest.items():
        observation = observations[site, length]
        grid = observation.grid
        sink, window = grid.sinks[-1], grid.windows[0]
        scores = observation.scores()[:, *grid.index(sink, window)].tolist()
        for head, damage in enumerate(scores if window < length else []):
            found.append({
                "site": site, "head": head, "length": length, "sink": sink, "window": window,
                "nats_per_token": damage,
            })  # fmt: skip
    return sorted(found, key=lambda row: -row["nats_per_token"])[:WORST]


def _within(observation: Observation, head: int, distance: int) -> float:
    """Mass at i - j < distance, a power of two."""
    buckets = sum(start < distance for start in distance_buckets(observation.length))
    return float(observation.mass_by_distance[head, :buckets].sum())


def _totals(sites: Mapping[str, Mapping[str, list[dict[str, Any]]]]) -> dict[str, float]:
    """Means over all heads at each site's longest length."""
    heads = [head for row in at_longest(sites).values() for head in row]
    if not heads:
        return {}
    return {
        "heads": len(heads),
        "local_heads": sum(head["local"] > MOSTLY for head in heads),
        "sink_heads": sum(head["sink"] > 0.5 for head in heads),
        **{name: sum(head[name] for head in heads) / len(heads) for name in ("local", "sink", "entropy")},
    }


def similarity(profile: Profile) -> dict[str, Any]:
    """How alike heads attend: the cosine of their mass by distance and on the first keys, at the longest length.

    layers: mean over pairs of different heads, sites x sites; alike: the pairs of different sites that are most alike.
    """
    if not profile.lengths:
        return {"length": 0, "sites": [], "layers": [], "alike": []}
    length = profile.lengths[-1]
    sites = [site for site in profile.sites if (site, length) in profile.observations]
    seen = [profile.observations[site, length] for site in sites]
    features = [torch.cat((o.mass_by_distance, o.mass_at_key), 1) for o in seen]
    units = [f / f.norm(dim=1, keepdim=True).clamp(min=1e-30) for f in features]
    layers = [[_mean_cosine(a, b, a is b) for b in units] for a in units]
    heads = [(site, head) for site, o in zip(sites, seen, strict=True) for head in range(o.heads)]
    every = torch.cat(units)
    cosines = (every @ every.T).triu(1)
    at = 0
    for o in seen:
        cosines[at : at + o.heads, at : at + o.heads] = 0
        at += o.heads
    best = cosines.flatten().topk(min(ALIKE, cosines.numel()))
    alike = [
        {
            "one": "{}.{}".format(*heads[n // len(heads)]),
            "other": "{}.{}".format(*heads[n % len(heads)]),
            "cosine": value,
        }
        for value, n in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        if value > 0
    ]
    return {"length": length, "sites": sites, "layers": layers, "alike": alike}


def _mean_cosine(one: Tensor, other: Tensor, same: bool) -> float:
    """Over pairs of different heads; a layer of one head is like itself."""
    products = one @ other.T
    if not same:
        return float(products.mean())
    count = len(one) * (len(one) - 1)
    return float((products.sum() - products.diagonal().sum()) / count) if count else 1.0


def draw_profile(found: Mapping[str, Any], path: Path) -> None:
    """The picture of a profile's data, SVG or PNG by the file's name: how far heads look, what rests on the first keys,
    what a narrow window would cost, and how alike layers are."""
    if not figures.available():
        raise DependencyError("Pictures are drawn by matplotlib, which is not installed.", "pip install matplotlib")
    if not found["sites"]:
        raise ProfileError("The profile holds no site to draw.", "Profile some text first.")
    heads = list(at_longest(found["sites"]).values())
    moved = heads[0][0]["damage"] is None
    panels = [
        (
            "half of the mass lies within (tokens, log2)",
            _grid(heads, lambda h: math.log2(h["distance"][1] + 1)),
            "viridis",
        ),
        (f"share of mass on the first {FIRST_KEYS} keys", _grid(heads, lambda h: h["sink"]), "magma"),
        (
            f"window {found['grid']['windows'][0]} beside {found['grid']['sinks'][-1]} sinks, log10 "
            + ("squared change of output" if moved else "nats per token"),
            _grid(heads, lambda h: math.log10(max(h["moved" if moved else "damage"][-1][0], 1e-12))),
            "inferno",
        ),
        ("layers alike (cosine)", found["similarity"]["layers"], "cividis"),
    ]
    path.write_bytes(figures.maps(panels, path.suffix.lstrip(".") or "svg"))


def _grid(
    heads: Sequence[Sequence[Mapping[str, Any]]], value: Callable[[Mapping[str, Any]], float]
) -> list[list[float]]:
    """Layers x heads; layers with fewer heads end in NaN, which is left white."""
    widest = max(map(len, heads))
    return [[value(h) for h in row] + [math.nan] * (widest - len(row)) for row in heads]
