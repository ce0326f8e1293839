"""MoA's plan, from its paper (Fu et al., "MoA: Mixture of Sparse Attention for Automatic LLM Compression", 2024).

Profile: dropping the one key j from row i and renormalising changes the loss, to first order, by

    E_ij = A_ij / (1 - A_ij) (D_i - g_ij)        A soft-max weights, g_ij = dO_i . v_j, D_i = sum_j A_ij g_ij

and a head's influence is |E| summed over blocks of 64 by 64 and averaged over samples. Search space: one sink block and
a band of span(N) = alpha + beta N tokens, alpha in steps and beta in eighths. Plan: one rule per head and at most two
per layer, the summed influence of what is dropped least at every profiled length, under a budget of mean density at
every profiled and target length; the Pareto front over lengths by epsilon constraints, and of it the plan whose loss is
least at a length that was not profiled. The paper uses Gurobi; here HiGHS solves the same programs exactly.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_matrix
from torch import Tensor, nn

from attnopt.instrument import Attention, Instrumented, gradients_through
from attnopt.ir import Site
from attnopt.statistics import attention

# Site -> length -> influence (H, N / 64, N / 64).
Profile = dict[str, dict[int, Tensor]]
BLOCK = 64
RULES_PER_LAYER = 2
# Every program is feasible with a total between these shares of the bound, as published.
LEAST_SHARE = 0.9
CELLS = 4


@dataclass(frozen=True)
class Rule:
    """A sink block and a band of ``alpha + beta * N`` tokens, in blocks."""

    alpha: int
    beta: float

    def span(self, length: int) -> float:
        return self.alpha + self.beta * length

    def band(self, length: int) -> int:
        """Blocks of the band, the query's own counted."""
        return max(1, math.ceil(self.span(length) / BLOCK))

    def density(self, length: int) -> float:
        """Most key blocks that any row of blocks keeps, sink included, over all."""
        blocks = math.ceil(length / BLOCK)
        return min(blocks, self.band(length) + 1) / blocks


def rules(profiled: Sequence[int], targets: Sequence[int] = (), step: int = 1024) -> list[Rule]:
    """The published grid: alpha from minus the shortest to the longest profiled length, beta from 0 to 1 in eighths.

    A rule stays if its span is at most N at the longest profiled and target lengths and positive at the shortest.
    """
    shortest, longest = min(profiled), max(profiled)
    furthest = max([longest, *targets])
    grid = itertools.product(range(-shortest, longest + 1, step), (n / 8 for n in range(9)))
    made = (Rule(alpha, beta) for alpha, beta in grid)
    return [
        r for r in made if r.span(shortest) > 0 and r.span(longest) <= longest and r.span(furthest) <= furthest
    ]  # fmt: skip


def influence(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, scale: float) -> Tensor:
    """|E| summed over blocks and samples, float64 (H, N / 64, N / 64), of causal attention.

    q (B, H, N, D), k (B, G, N, D), v (B, G, N, Dv), grad (B, H, N, Dv) the gradient at the output; H a multiple of G.
    """
    heads, length = q.shape[1:3]
    k, v = (x.repeat_interleave(heads // k.shape[1], 1).float() for x in (k, v))
    blocks = math.ceil(length / BLOCK)
    total = torch.zeros(heads, blocks, blocks, dtype=torch.float64)
    for n in range(blocks):
        rows = slice(n * BLOCK, min((n + 1) * BLOCK, length))
        upstream = grad[:, :, rows].float()
        future = torch.arange(rows.start, rows.stop)[:, None] < torch.arange(rows.stop)
        scores = (q[:, :, rows].float() @ k[:, :, : rows.stop].mT * scale).masked_fill(future, -math.inf)
        weights = scores.softmax(-1)
        g = upstream @ v[:, :, : rows.stop].mT
        # Where a key has all the weight nothing is left to renormalise over: the first row, as published.
        odds = weights / (1 - weights + torch.finfo(torch.float32).eps)
        change = (odds * ((weights * g).sum(-1, keepdim=True) - g)).abs()
        if n == 0:
            change[:, :, 0] = 0
        change = F.pad(change, (0, -rows.stop % BLOCK))
        total[:, n, : n + 1] = change.unflatten(-1, (-1, BLOCK)).sum((0, 2, 4)).double()
    return total


def profile(model: nn.Module, sequences: Sequence[Tensor], labels: Sequence[Tensor] | None = None) -> Profile:
    """The influence of every site's heads at every length of `sequences` (int64 (1, N)), averaged over them.

    labels: what each token should be followed by, int64 (1, N), -100 where the loss does not count; by default the next
    token of the text. The loss is the mean over what counts.
    """
    found: Profile = {}
    counts = Counter(ids.shape[1] for ids in sequences)

    def observer(site: Site) -> Attention:
        def attend(q: Tensor, k: Tensor, v: Tensor, pad: Tensor | None) -> Tensor:
            out = attention(q, k, v, site.scale, pad, site.mask.window)
            if out.requires_grad:
                kept = tuple(x.detach() for x in (q, k, v))

                def add(grad: Tensor) -> None:
                    of_site, length = found.setdefault(site.name, {}), q.shape[2]
                    seen = influence(*kept, grad, site.scale) / counts[length]
                    of_site[length] = of_site[length] + seen if length in of_site else seen

                out.register_hook(add)
            return out

        return attend

    instrumented = Instrumented(model.eval(), observer)
    for n, ids in enumerate(sequences):
        wanted = F.pad(ids[:, 1:], (0, 1), value=-100) if labels is None else labels[n]
        with gradients_through(model):
            F.cross_entropy(instrumented.logits(ids)[0].float(), wanted[0]).backward()
    instrumented.need_sites()
    # The backward pass meets the last site first.
    return {name: found[name] for name in instrumented.sites}


def dropped(blocks: Tensor, rule: Rule, length: int) -> Tensor:
    """The influence (H,) of what a rule drops, of `blocks` (H, N / 64, N / 64)."""
    i = torch.arange(blocks.shape[1])
    kept = (i == 0) | (i[:, None] - i < rule.band(length))
    return (blocks * ~kept).sum((1, 2))


def over_groups(values: np.ndarray, kv_heads: int, published: bool) -> np.ndarray:
    """The largest of each KV group's values (H, ...) at all its heads.

    Query heads of a group are consecutive; as published, those a number of KV heads apart are taken for one.
    """
    heads, share = values.shape[0], values.shape[0] // kv_heads
    shape = (share, kv_heads) if published else (kv_heads, share)
    axis = 0 if published else 1
    grouped = values.reshape(*shape, *values.shape[1:])
    return np.broadcast_to(grouped.max(axis, keepdims=True), grouped.shape).reshape(heads, *values.shape[1:])


@dataclass(frozen=True)
class Problem:
    """loss (P, L, H, R): what rule r costs head h of layer l at each of P profiled lengths; cost (T, R): length times
    density of a rule at each of T lengths; bound (T,): of the cost summed over heads."""

    loss: np.ndarray
    cost: np.ndarray
    bound: np.ndarray

    @classmethod
    def of(
        cls, loss: np.ndarray, choices: Sequence[Rule], profiled: Sequence[int], targets: Sequence[int], density: float
    ) -> Problem:
        """`density`: the mean share of key blocks that heads may keep, at every profiled and target length, but for
        those that are too short for it: at 512 tokens a sink and one block of a band are a quarter."""
        lengths = [n for n in sorted({*profiled, *targets}) if min(r.density(n) for r in choices) <= density]
        cost = np.array([[n * r.density(n) for r in choices] for n in lengths])
        heads = loss.shape[1] * loss.shape[2]
        return cls(loss, cost, density * heads * np.array(lengths, dtype=float))


def constraints(problem: Problem) -> list[LinearConstraint]:
    """Over x (L, H, R) and then y (L, R), which says that a layer uses a rule."""
    _, layers, heads, count = problem.loss.shape
    picks, total = layers * heads * count, layers * heads * count + layers * count
    one = lil_matrix((layers * heads, total))
    for head in range(layers * heads):
        one[head, head * count : (head + 1) * count] = 1
    spent = lil_matrix((len(problem.bound), total))
    for n, cost in enumerate(problem.cost):
        spent[n, :picks] = np.tile(cost, layers * heads)
    used, few = lil_matrix((picks, total)), lil_matrix((layers, total))
    for pick in range(picks):
        used[pick, pick], used[pick, picks + pick // (heads * count) * count + pick % count] = 1, -1
    for layer in range(layers):
        few[layer, picks + layer * count : picks + (layer + 1) * count] = 1
    return [
        LinearConstraint(one.tocsr(), 1, 1),
        LinearConstraint(spent.tocsr(), LEAST_SHARE * problem.bound, problem.bound),
        LinearConstraint(used.tocsr(), -np.inf, 0),
        LinearConstraint(few.tocsr(), -np.inf, RULES_PER_LAYER),
    ]


def solve(problem: Problem, objective: int, limits: Sequence[float] | None = None) -> np.ndarray | None:
    """Rules (L, H) of least loss at profiled length `objective`, the loss at each other one at most its limit; None
    where there are none."""
    if not len(problem.bound):
        return None
    _, layers, heads, count = problem.loss.shape
    picks, extra = layers * heads * count, layers * count
    rows = [np.concatenate([loss.ravel(), np.zeros(extra)]) for loss in problem.loss]
    held = constraints(problem)
    if limits is not None:
        held += [LinearConstraint(row, -np.inf, limit) for row, limit in zip(rows, limits, strict=True)]
    scale = max(rows[objective].max(), 1e-300)
    found = milp(
        rows[objective] / scale, constraints=held, integrality=np.ones(picks + extra), bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-4, "time_limit": 60},
    )  # fmt: skip
    if found.x is None:
        return None
    return np.asarray(found.x[:picks]).reshape(layers, heads, count).argmax(-1)


def loss_of(problem: Problem, plan: np.ndarray) -> np.ndarray:
    """The summed influence (P,) of a plan (L, H) at each profiled length."""
    return np.take_along_axis(problem.loss, plan[None, ..., None], 3).sum((1, 2, 3))


def pareto(problem: Problem) -> list[np.ndarray]:
    """Plans (L, H) that no other dominates over the profiled lengths, by epsilon constraints: the range of every
    objective between its best and its worst value at the others' optima, cut into four."""
    objectives = range(problem.loss.shape[0])
    best = [solve(problem, n) for n in objectives]
    plans = [plan for plan in best if plan is not None]
    if len(plans) < len(best):
        return []
    values = np.array([loss_of(problem, plan) for plan in plans])
    low, high = values.min(0), values.max(0)
    edges = [np.linspace(low[n], high[n], CELLS + 1)[1:] for n in objectives]
    for first in objectives:
        others = [n for n in objectives if n != first]
        for cell in itertools.product(*(range(CELLS) for _ in others)):
            limits = np.full(len(objectives), np.inf)
            limits[others] = [edges[n][c] for n, c in zip(others, cell, strict=True)]
            plan = solve(problem, first, limits)
            if plan is not None:
                plans.append(plan)
    unique = list({plan.tobytes(): plan for plan in plans}.values())
    values = np.array([loss_of(problem, plan) for plan in unique])
    beaten = [((values <= v).all(1) & (values < v).any(1)).any() for v in values]
    return [plan for plan, worse in zip(unique, beaten, strict=True) if not worse]
