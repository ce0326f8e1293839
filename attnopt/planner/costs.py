"""What the spans of a model's sites cost: tables that are given, or measured on this machine and stored there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from attnopt import settings
from attnopt.codegen.spec import SpanPrefill
from attnopt.cost import (
    Costs,
    CostTable,
    Joined,
    Selection,
    load_or_measure,
    load_or_measure_blocks,
    load_or_measure_far,
    load_or_measure_steps,
)
from attnopt.ir import Site
from attnopt.planner.problem import Tables, table_of, weighed_at
from attnopt.planner.tried import tried_at
from attnopt.progress import Progress
from attnopt.registry import CANDIDATES

if TYPE_CHECKING:
    from attnopt.fitted import Fitted
    from attnopt.profile_file import Profile


def costs_of(
    sites: Sequence[Site], tables: Tables | Callable[[Sequence[Site]], Tables] | None, profile: Profile,
    target_length: int, fitted: Fitted | None, families: Sequence[str], device: str, progress: Progress | None,
    objective: str = "prefill",
) -> dict[str, Costs]:  # fmt: skip
    """The costs of every site: `tables`, or what that function makes of the sites, or, of None, times measured here at
    lengths up to the planned one, with those of the `families` of far parts that were tried, and of steps that select
    where the objective counts decoding."""
    given = tables(sites) if callable(tables) else tables
    if given is None:
        lengths = [n for n in sorted({1024, 2048, 4096, target_length}) if n <= target_length]
        target = settings.target(device)
        given = timed = cost_tables(sites, profile, target, device, lengths, progress)
        if fitted is not None:
            given = with_parts(timed, sites, fitted, families, target, device, lengths, progress)
            given = with_steps(given, sites, fitted, families, target, device, lengths, progress, objective)
    return {s.name: table_of(given, s) for s in sites}


def cost_tables(
    sites: Sequence[Site], profile: Profile, target: str, device: str, lengths: Sequence[int], progress: Progress | None
) -> dict[str, CostTable]:
    """One measured table per site; sites of equal shape share it. Stored on this machine, so measured once."""
    made: dict[SpanPrefill, CostTable] = {}
    grid = profile.header.grid
    tables: dict[str, CostTable] = {}
    for site in sites:
        spec = spec_of(site, target)
        if spec not in made:
            made[spec] = load_or_measure(
                spec, lengths, windows_at(grid.windows, lengths), [max(grid.sinks)], device=device, rounds=5,
                progress=lambda done, of, what: progress(f"timing kernels at {what}", done, of) if progress else None,
            )  # fmt: skip
        tables[site.name] = made[spec]
    return tables


def spec_of(site: Site, target: str) -> SpanPrefill:
    """What a site's times are of."""
    return SpanPrefill(target, site.dtype, site.heads, site.kv_heads, site.head_dim, site.head_dim_v, False)


def with_parts(
    tables: Mapping[str, CostTable], sites: Sequence[Site], fitted: Fitted, allow: Sequence[str], target: str,
    device: str, lengths: Sequence[int], progress: Progress | None,
) -> dict[str, Costs]:  # fmt: skip
    """The tables with the times of the far parts and selections that were tried anywhere, of sites where one may
    stand."""
    tried = {s.name: tried_at(fitted, s, allow, max(lengths)) for s in sites}
    every = [(CANDIDATES[c.candidate], dict(c.params)) for found in tried.values() for c in found]
    parts = sorted({kind.far_part(params) for kind, params in every} - {("", 0)})
    selections = [
        Selection(kind.name, kind.timing(params), kind.settings(params))
        for kind, params in every
        if kind.far == "selected"
    ]
    found: dict[str, Costs] = dict(tables)
    for site in sites:
        far = blocks = None
        if parts and tried[site.name]:
            far = load_or_measure_far(
                spec_of(site, target), lengths, parts, device=device, rounds=5,
                progress=lambda done, of, what: progress(f"timing far parts at {what}", done, of) if progress else None,
            )  # fmt: skip
        if selections and tried[site.name]:
            blocks = load_or_measure_blocks(
                spec_of(site, target), lengths, selections, device=device, rounds=5,
                progress=lambda done, of, at: progress(f"timing selections at {at}", done, of) if progress else None,
            )  # fmt: skip
        if far is not None or blocks is not None:
            found[site.name] = Joined(tables[site.name], far, blocks)
    return found


def with_steps(
    tables: Mapping[str, Costs], sites: Sequence[Site], fitted: Fitted, allow: Sequence[str], target: str, device: str,
    lengths: Sequence[int], progress: Progress | None, objective: str,
) -> dict[str, Costs]:  # fmt: skip
    """The tables with the times of steps that select as was tried anywhere; of all sites or none, since a sum of times
    and bytes is neither."""
    tried = [c for s in sites for c in weighed_at(fitted, s, allow, max(lengths), objective)]
    decoded = [dict(c.params) for c in tried if CANDIDATES[c.candidate].decoded]
    if not decoded:
        return dict(tables)
    found: dict[str, Costs] = {}
    for site in sites:
        features = sorted({min(int(params.get("r", site.head_dim)), site.head_dim) for params in decoded})
        steps = load_or_measure_steps(
            spec_of(site, target), lengths, features, device=device,
            progress=lambda done, of, at: progress(f"timing steps at {at}", done, of) if progress else None,
        )  # fmt: skip
        given = tables[site.name]
        own = given if isinstance(given, Joined) else Joined(given)
        found[site.name] = replace(own, steps=steps)
    return found


def windows_at(windows: Sequence[int], lengths: Sequence[int]) -> list[int]:
    """Windows to time: those observed, and the larger shares of each length that a rule may ask for."""
    return sorted(set(windows) | {n // d for n in lengths for d in (2, 4, 8)})
