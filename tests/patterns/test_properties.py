"""Properties of recognition, on attention put together from random pieces and on graphs that are no attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations
from typing import Any, NamedTuple

import networkx
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Graph, Node
from tracing import qkv, trace

from attnopt.ir import Region
from attnopt.passes import RECOGNISE

from .spellings import normalised

HEADS, KV_HEADS, DIM, LENGTH, BATCH, WINDOW = 6, 3, 8, 13, 2, 4
GROUP = HEADS // KV_HEADS
SCALE, INF = DIM**-0.5, float("inf")


# --- pieces: each table holds spellings of the same thing -------------------------------------------------------------

PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda q, k: q @ k.mT,
    "einsum": lambda q, k: torch.einsum("bhid,bhjd->bhij", q, k),
    "bmm": lambda q, k: torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).view(-1, HEADS, q.shape[2], k.shape[2]),
    "other way": lambda q, k: (k @ q.mT).mT,
}
MIXES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda w, v: w @ v,
    "einsum": lambda w, v: torch.einsum("bhij,bhjd->bhid", w, v),
    "bmm": lambda w, v: torch.bmm(w.flatten(0, 1), v.flatten(0, 1)).unflatten(0, (-1, HEADS)),
    "cast": lambda w, v: w.to(v.dtype).contiguous() @ v.contiguous(),
    "dropout": lambda w, v: F.dropout(w, 0.3, training=False) @ v,
}
# (factor of q, factor of k, factor of the scores); all give SCALE.
SCALES: dict[str, tuple[float, float, float]] = {
    "scores": (1.0, 1.0, SCALE),
    "queries": (SCALE, 1.0, 1.0),
    "keys": (1.0, SCALE, 1.0),
    "both": (math.sqrt(SCALE), math.sqrt(SCALE), 1.0),
    "all": (0.5, 2.0, SCALE),
}
REPEATS: dict[str, Callable[[Tensor], Tensor]] = {
    "repeat_interleave": lambda t: t.repeat_interleave(GROUP, 1),
    "expand": lambda t: t[:, :, None].expand(-1, -1, GROUP, -1, -1).reshape(t.shape[0], HEADS, *t.shape[2:]),
    "stack": lambda t: torch.stack([t] * GROUP, 2).flatten(1, 2),
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads first": lambda t: t,
    "heads last": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "merged": lambda t: t.transpose(1, 2).flatten(2).unflatten(2, (-1, DIM)).transpose(1, 2),
}
KEEPS: dict[str, tuple[str, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "causal": ("j <= i", lambda i, j, pad: j <= i),
    "future": ("j <= i", lambda i, j, pad: ~(j > i)),
    "window": (f"j <= i and i - j < {WINDOW}", lambda i, j, pad: (j <= i) & (j > i - WINDOW)),
    "band": (f"|i - j| < {WINDOW}", lambda i, j, pad: (i - j < WINDOW) & (j - i < WINDOW)),
    "padding": ("L0[b, j]", lambda i, j, pad: pad[:, None, None]),
    "both": ("j <= i and L0[b, j]", lambda i, j, pad: (j <= i) & pad[:, None, None]),
}
MASKINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "masked_fill": lambda s, keep: s.masked_fill(~keep, -INF),
    "in place": lambda s, keep: s.clone().masked_fill_(keep.logical_not(), torch.finfo(s.dtype).min),
    "where": lambda s, keep: torch.where(keep, s, -INF),
    "added": lambda s, keep: s + torch.zeros(keep.shape, dtype=s.dtype).masked_fill(~keep, -INF),
    "complement": lambda s, keep: s + (1.0 - keep.to(s.dtype)) * -1e9,
}
SOFTMAXES: dict[str, Callable[[Tensor], Tensor]] = {
    "function": lambda s: F.softmax(s, -1),
    "float32": lambda s: torch.softmax(s, 3, dtype=torch.float32),
    "logarithm": lambda s: F.log_softmax(s, -1).exp(),
    "logsumexp": lambda s: (s - s.logsumexp(-1, keepdim=True)).exp(),
    "by hand": lambda s: s.exp() / s.exp().sum(-1, keepdim=True),
    "less the maximum": lambda s: F.softmax(s - s.amax(-1, keepdim=True), -1),
}


class Pieces(NamedTuple):
    """One attention, as names in the tables above; `keep` and `repeat` may be "none"."""

    layout: str
    product: str
    scale: str
    keep: str
    masking: str
    softmax: str
    mix: str
    repeat: str

    @property
    def record(self) -> str:
        heads = HEADS if self.repeat == "none" else f"{HEADS}/{KV_HEADS}"
        keep = "all" if self.keep == "none" else KEEPS[self.keep][0]
        return f"heads={heads} dim={DIM} scale={SCALE:.6g} keep {keep}"


def pieces() -> st.SearchStrategy[Pieces]:
    def name(table: dict[str, Any], *more: str) -> st.SearchStrategy[str]:
        return st.sampled_from([*more, *table])

    tables = (name(LAYOUTS), name(PRODUCTS), name(SCALES), name(KEEPS, "none"), name(MASKINGS), name(SOFTMAXES))
    return st.builds(Pieces, *tables, name(MIXES), name(REPEATS, "none"))


# What turns an attention into something else, applied to the scores or to the weights.
BROKEN_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "rectified": torch.relu,
    "squared": lambda s: s.square(),
    "clamped": lambda s: s.clamp(-2.0, 2.0),
    "divided by their norm": lambda s: s / s.norm(dim=-1, keepdim=True),
    "weighed by distance": lambda s: s / (1 + torch.arange(LENGTH)[:, None] + torch.arange(LENGTH)),
    "shifted in a cap": lambda s: 3.0 * torch.tanh((s - s.amax(-1, keepdim=True)) / 3.0),
    "soft-max before": lambda s: F.softmax(s, -1),
    "rounded": torch.round,
}
BROKEN_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "squared": lambda w: w.square(),
    "transposed": lambda w: w.mT,
    "shifted": lambda w: w + 0.1,
    "masked": lambda w: w.masked_fill(torch.arange(LENGTH) == 5, 0.0),
    "over queries": lambda w: w / w.sum(-2, keepdim=True),
    "product": lambda w: w @ w,
    "of heads added": lambda w: w + w.flip(1),
    "logarithm": lambda w: w.log1p(),
}


def same(tensor: Tensor) -> Tensor:
    return tensor


def attention(
    chosen: Pieces, q: Tensor, k: Tensor, v: Tensor, pad: Tensor,
    on_scores: Callable[[Tensor], Tensor] = same, on_weights: Callable[[Tensor], Tensor] = same,
) -> Tensor:  # fmt: skip
    layout = LAYOUTS[chosen.layout]
    q, k, v = layout(q), layout(k), layout(v)
    if chosen.repeat != "none":
        k, v = REPEATS[chosen.repeat](k), REPEATS[chosen.repeat](v)
    on_q, on_k, on_s = SCALES[chosen.scale]
    s = PRODUCTS[chosen.product](q * on_q, k * on_k) * on_s
    s = on_scores(s)
    if chosen.keep != "none":
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None, :]
        s = MASKINGS[chosen.masking](s, KEEPS[chosen.keep][1](i, j, pad))
    return MIXES[chosen.mix](on_weights(SOFTMAXES[chosen.softmax](s)), v)


def inputs_of(chosen: Pieces) -> tuple[Tensor, ...]:
    pad = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    pad[0, 5:7], pad[1, -2:] = False, False
    return *qkv(BATCH, HEADS, HEADS if chosen.repeat == "none" else KV_HEADS, LENGTH, dim=DIM), pad


def examples(number: int) -> Callable[[Any], Any]:
    """Without shrinking: a graph is traced for every attempt, and a failing example is small as it is."""
    return settings(max_examples=number, phases=[Phase.generate], suppress_health_check=[HealthCheck.too_slow])


@examples(16)
@given(pieces())
def test_random_spellings_are_one_site_with_the_right_record(chosen: Pieces) -> None:
    def fn(*inputs: Tensor) -> Tensor:
        return attention(chosen, *inputs)

    inputs = inputs_of(chosen)
    traced = trace(fn, *inputs)
    torch.testing.assert_close(traced.output, fn(*inputs), atol=5e-5, rtol=1e-4)
    assert [normalised(site.canonical) for site in traced.sites] == [chosen.record], traced.misses


@examples(14)
@given(pieces(), st.sampled_from([*BROKEN_SCORES.items(), *((n, None) for n in BROKEN_WEIGHTS)]))
def test_one_broken_piece_makes_it_no_attention(chosen: Pieces, broken: tuple[str, Any]) -> None:
    name, on_scores = broken
    on_weights = BROKEN_WEIGHTS[name] if on_scores is None else same

    def fn(*inputs: Tensor) -> Tensor:
        return attention(chosen, *inputs, on_scores or same, on_weights)

    inputs = inputs_of(chosen)
    traced = trace(fn, *inputs, verify=False)
    assert not traced.sites, [site.canonical for site in traced.sites]
    torch.testing.assert_close(traced.output, fn(*inputs), atol=5e-5, rtol=1e-4, equal_nan=True)


# --- random programs: whatever is found there, the numbers stay -------------------------------------------------------

CUBE = 4
UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax -1": lambda x: F.softmax(x, -1),
    "softmax -2": lambda x: F.softmax(x, -2),
    "softmax 1": lambda x: F.softmax(x, 1),
    "transposed": lambda x: x.mT,
    "permuted": lambda x: x.permute(0, 2, 3, 1),
    "halved": lambda x: x * 0.5,
    "less one": lambda x: x - 1.0,
    "tanh": torch.tanh,
    "masked": lambda x: x.masked_fill(torch.ones(CUBE, CUBE, dtype=torch.bool).triu(1), -INF),
    "less the maximum": lambda x: x - x.amax(-1, keepdim=True),
    "less the maximum of queries": lambda x: x - x.amax(-2, keepdim=True),
    "exponential": lambda x: x.clamp(max=4.0).exp(),
    "divided by its sum": lambda x: x / (x.abs().sum(-1, keepdim=True) + 1e-3),
    "rolled": lambda x: x.roll(1, -1),
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": lambda x, y: x @ y,
    "sum": lambda x, y: x + y,
    "scores": lambda x, y: x @ y.mT,
    "attention": lambda x, y: F.softmax(x @ y.mT, -1) @ y,
    "einsum": lambda x, y: torch.einsum("bhij,bjhd->bhid", x, y),
}
Step = tuple[str, int, int]


def run_steps(steps: list[Step], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each step reads one or two of the last four values; all shapes are (4, 4, 4, 4), so every program runs."""
    values = [q, k, v]
    for name, a, b in steps:
        x, y = values[-1 - a % min(4, len(values))], values[-1 - b % min(4, len(values))]
        values.append(UNARY[name](x) if name in UNARY else BINARY[name](x, y))
    return values[-1]


def steps() -> st.SearchStrategy[list[Step]]:
    step = st.tuples(st.sampled_from([*UNARY, *BINARY]), st.integers(0, 3), st.integers(0, 3))
    return st.lists(step, min_size=3, max_size=9)


@examples(14)
@given(steps())
def test_random_programs_compute_what_they_computed(program: list[Step]) -> None:
    """All sizes are equal, so a wrong axis shows in the numbers only; nothing is verified while compiling."""

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return run_steps(program, q, k, v)

    inputs = tuple(t / 2 for t in qkv(CUBE, CUBE, length=CUBE, dim=CUBE))
    with torch.no_grad():
        expected = fn(*inputs)
    traced = trace(fn, *inputs, verify=False)
    torch.testing.assert_close(traced.output, expected, atol=1e-4, rtol=1e-3, equal_nan=True)


# --- regions ----------------------------------------------------------------------------------------------------------


def digraph(graph: Graph) -> networkx.DiGraph:
    edges = networkx.DiGraph()
    edges.add_nodes_from(graph.nodes)
    edges.add_edges_from((source, node) for node in graph.nodes for source in node.all_input_nodes)
    return edges


def inner(region: Region) -> set[Node]:
    return {*region.match.inner, region.anchor, region.out}


def operands(region: Region) -> set[Node]:
    match = region.match
    return {match.q.node, match.k.node, match.v.node, *(term.node for term in match.terms)}


@examples(6)
@given(st.lists(pieces(), min_size=2, max_size=3))
def test_regions_are_convex_and_disjoint(layers: list[Pieces]) -> None:
    """Layers one after the other, the output of each being the queries of the next."""

    def fn(q: Tensor, pad: Tensor, *rest: Tensor) -> Tensor:
        for n, chosen in enumerate(layers):
            q = q + attention(chosen, q, rest[2 * n], rest[2 * n + 1], pad).to(q.dtype)
        return q

    made = [inputs_of(chosen) for chosen in layers]
    rest = [t for m in made for t in m[1:3]]
    traced = trace(fn, made[0][0], made[0][3], *rest, passes=RECOGNISE)
    program = traced.program
    assert len(program.regions) == len(layers), [str(m) for m in program.misses]
    edges = digraph(program.gm.graph)
    insides = [inner(region) for region in program.regions]
    for region, inside in zip(program.regions, insides, strict=True):
        after = set().union(*(networkx.descendants(edges, node) for node in inside))
        before = set().union(*(networkx.ancestors(edges, node) for node in inside))
        assert (after & before) <= inside, "a path leaves the region and comes back"
        assert not after & operands(region), "what a region reads must not depend on what it computes"
        assert networkx.has_path(edges, region.match.q.node, region.out)
    assert all(a.isdisjoint(b) for a, b in combinations(insides, 2))
