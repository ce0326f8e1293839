"""What plans are made equal in: the measured time of prefill, query-key pairs, or keys that a query sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from attnopt import ops
from attnopt.codegen.reference_prefill import prefill as reference
from attnopt.codegen.spec import SpanPrefill
from attnopt.cost import Costs, CostTable, interleaved, layer_cost, load_or_measure
from attnopt.ir import DENSE, Choice, Site
from attnopt.passes.span import tables as tables_of
from attnopt.planner.costs import windows_at
from attnopt.profiler import DEFAULT_GRID
from attnopt.registry import CANDIDATES
from benchmarks.record import relative_error

Choices = Mapping[str, Sequence[Choice]]
# Relative Frobenius error of a kernel against the reference in float64, and the tokens it is taken on.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
CHECKED = 384
# Sinks that are timed: attnopt's most, and MoA's block.
SINKS = (max(DEFAULT_GRID.sinks), 64)


@dataclass(frozen=True)
class BySpan:
    """Costs that are the keys a late query sees: what a cache of one head holds."""

    kind: str = "density"
    id: str = "span"
    lengths: tuple[int, ...] = ()
    key_time: float | None = None

    def cost(self, length: int, sink: int, window: int) -> float:
        return float(min(sink + window, length))

    def group_cost(self, length: int) -> float:
        return 0.0


@dataclass(frozen=True)
class Terms:
    """Plans for `length` tokens, alike in what `tables` count; `tables` by site name, of all `sites`."""

    length: int
    sites: tuple[Site, ...]
    tables: Mapping[str, Costs]

    @classmethod
    def of(cls, sites: Sequence[Site], length: int, equal: str) -> Terms:
        """equal: "time", of the emitted kernels on this machine, timed where not stored yet; "pairs"; "span"."""
        by: dict[str, Costs] = {"pairs": CostTable.by_density(), "span": BySpan()}
        return cls(length, tuple(sites), {s.name: by[equal] if equal in by else timed(s, length) for s in sites})

    def cost(self, choices: Choices) -> float:
        """Of all layers, in the tables' unit; sites not named are dense."""
        total = 0.0
        for site in self.sites:
            of_site = choices.get(site.name, (DENSE,) * site.heads)
            total += layer_cost(self.tables[site.name], self.length, [span_of(c, self.length) for c in of_site])
        return total

    def share(self, choices: Choices) -> float:
        """Of what dense costs."""
        return self.cost(choices) / self.cost({})


def span_of(choice: Choice, length: int) -> tuple[int, int]:
    return CANDIDATES[choice.candidate].span(dict(choice.params), length, None)


def spec_of(site: Site) -> SpanPrefill:
    return SpanPrefill("cpu", site.dtype, site.heads, site.kv_heads, site.head_dim, site.head_dim_v, False)


def timed(site: Site, length: int) -> CostTable:
    """The measured table of a site's kernel at `length`; equal sites share the stored one."""
    return load_or_measure(spec_of(site), [length], windows_at(DEFAULT_GRID.windows, [length]), SINKS, rounds=5)


@torch.no_grad()
def times(sites: Sequence[Site], length: int, plans: Sequence[Choices], rounds: int = 5) -> list[float]:
    """Milliseconds that the attentions of all `sites` take under each plan, on random numbers, one sequence; all plans
    interleaved, medians. SystemExit where a plan's kernel does not compute what the plan says."""
    generator = torch.Generator().manual_seed(0)
    inputs = {
        spec_of(s): tuple(
            torch.randn(1, heads, length, dim, generator=generator).to(getattr(torch, s.dtype))
            for heads, dim in ((s.heads, s.head_dim), (s.kv_heads, s.head_dim), (s.kv_heads, s.head_dim_v))
        )
        for s in sites
    }

    def run(choices: Choices) -> None:
        for site in sites:
            q, k, v = inputs[spec_of(site)]
            held = tables_of(choices.get(site.name), site.heads)
            windows = ops.windows_at(held["alphas"], held["betas"], length)
            ops.prefill(q, k, v, held["sinks"], windows, site.scale, None)

    for plan in plans:
        for site in sites:
            check(site, plan, [x[:, :, :CHECKED] for x in inputs[spec_of(site)]])
    return interleaved([lambda plan=plan: run(plan) for plan in plans], rounds, "cpu")


def check(site: Site, choices: Choices, inputs: Sequence[torch.Tensor]) -> None:
    """SystemExit where the emitted kernel differs from the reference in float64 on q, k, v of `inputs`."""
    held = tables_of(choices.get(site.name), site.heads)
    windows = ops.windows_at(held["alphas"], held["betas"], inputs[0].shape[2])
    found = ops.prefill(*inputs, held["sinks"], windows, site.scale, None)
    expected = reference(*(x.double() for x in inputs), held["sinks"], windows, site.scale)
    error = relative_error(found, expected)
    if not error <= TOLERANCE[inputs[0].dtype]:
        raise SystemExit(f"{site.name}: the kernel of {choices.get(site.name)} is off by {error:.2e}")
