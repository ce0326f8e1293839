"""From trials of heads that select tokens while decoding to a verified plan of them, on a tiny model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from mixtures import site as site_of
from models import HEADS, NanoGPT, tokens

from attnopt.board import Board
from attnopt.cost import CostTable
from attnopt.distill import Menu, decoded, distill_model
from attnopt.fitted import Fitted
from attnopt.ir import DENSE, Choice
from attnopt.measure import Spans
from attnopt.plan import Budget
from attnopt.planner import choices_from, make_problem
from attnopt.planner.frontier import front
from attnopt.planner.knapsack import Limits
from attnopt.planner.make import make_plan
from attnopt.planner.reuse import links_of, settled, within_memory
from attnopt.profile_file import Profile
from attnopt.profiler import profile_model
from attnopt.registry import CANDIDATES
from attnopt.statistics import Grid
from attnopt.statistics.trials import Share

LENGTH = 64


def top(count: int, behind: int = 0, every: int = 1, similar: float = 0.0) -> Choice:
    own = {"k": count, "sink": 1, "recent": 2, "every": every, "similar": similar, "behind": behind}
    return Choice.of("top_tokens", own)


def test_what_a_trial_says_of_tokens() -> None:
    """Outputs and recalled mass by the mask written out; how many of the steps select, by a loop."""
    drawn = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 21, 8, generator=drawn, dtype=torch.float64) for n in (8, 2, 2))
    earlier = [torch.randn(2, n, 21, 8, generator=drawn, dtype=torch.float64) for n in (8, 2)]
    pad = torch.arange(21) >= torch.tensor([[6], [0]])
    site, board = site_of(), Board()
    board.post("earlier", *earlier, pad, None)
    board.post(site.name, q, k, pad, None)
    keys, values = (x.repeat_interleave(4, 1) for x in (k, v))
    for choice in (top(3), top(3, behind=1), top(3, every=4), top(3, every=8, similar=0.5)):
        out, kept = decoded(choice, site, q, k, v, pad, board)
        by, of = earlier if choice["behind"] else (q, k)
        scores = by @ of.repeat_interleave(4, 1).mT
        steps = torch.zeros(8, dtype=torch.int64)
        for b in range(2):
            first = int((~pad[b]).sum())
            for h in range(8):
                last = None
                for i in range(first, 21):
                    alike = (
                        last is not None and torch.cosine_similarity(q[b, h, i], q[b, h, last], 0) >= choice["similar"]
                    )
                    if last is None or i - last >= choice["every"] or (choice["similar"] and not alike):
                        last = i
                        steps[h] += not choice["behind"]
                    best = scores[b, h, last, first : last + 1].topk(min(3, last + 1 - first)).indices + first
                    held = {*best.tolist(), first, *range(max(i - 1, first), i + 1)}
                    seen = torch.tensor(sorted(held))
                    row = torch.exp(keys[b, h, first : i + 1] @ q[b, h, i] * site.scale)
                    part = torch.exp(keys[b, h, seen] @ q[b, h, i] * site.scale)
                    torch.testing.assert_close(out[b, h, i], part @ values[b, h, seen] / part.sum())
                    assert float(kept.recalled[b, h, i]) == pytest.approx(float(part.sum() / row.sum()), rel=1e-9)
        assert kept.blocks[:, 1].tolist() == steps.tolist() and kept.blocks[:, 0].tolist() == [int(pad.sum())] * 8


@pytest.fixture(scope="module")
def evidence() -> tuple[Profile, Fitted]:
    model, text = NanoGPT().eval(), [tokens(1, LENGTH, seed=n) for n in range(2)]
    profile = profile_model(model, text, Grid((0,), (48, 56)))
    return profile, distill_model(model, [], text, Menu(families=("tokens",)), profile=profile)


def test_a_layer_is_tried_on_the_layers_there_are(evidence: tuple[Profile, Fitted]) -> None:
    _, fitted = evidence
    for n, site in enumerate(("h.0", "h.1")):
        behind = {dict(c.params).get("behind", 0) for c in fitted.choices(site)}
        assert behind == set(range(n + 1))
        of_two, of_eight = (
            fitted.damage(site, LENGTH, Choice.of("top_tokens", {**dict(top(k).params), "sink": 4, "recent": 32}))
            for k in (2, 8)
        )
        assert float(of_eight.sum()) < float(of_two.sum())


def test_what_is_weighed_is_what_a_step_reads(evidence: tuple[Profile, Fitted]) -> None:
    profile, fitted = evidence
    sites = _sites()
    of = {
        objective: make_problem(
            profile, CostTable.by_density(), sites, 4096, objective=objective, fitted=fitted, allow=("tokens",)
        )
        for objective in ("prefill", "memory", "decode")
    }
    for objective in ("prefill", "memory"):
        # Where decoding does not count nothing is to be won.
        assert not any(CANDIDATES[c.candidate].decoded for c in of[objective].choices)
    decode = of["decode"]
    chosen = next(c for c in decode.choices if c.candidate == "top_tokens" and c["every"] == 8)
    index = np.full(len(decode.heads), decode.choices.index(chosen))
    solution = decode.of(index)
    # Of the sole query head of a KV head.
    read = int(chosen["k"]) + 32 + 4 + 4096 // 16
    assert solution.cost == pytest.approx(decode.dense.cost * read / 4096, rel=1e-6)
    # It keeps every key all the same.
    assert solution.memory == decode.dense.memory


def _sites() -> list:
    spans = Spans(NanoGPT().eval())
    spans.losses(tokens(1, 16), None)
    return list(spans.sites.values())


def test_a_similarity_costs_as_often_as_it_was_seen_to_select() -> None:
    kind, params = CANDIDATES["top_tokens"], dict(top(8, every=64, similar=0.5).params)
    table = CostTable.by_density()
    seldom, often = (kind.selecting(table, params, 1024, 16, Share(visited=visited)) for visited in (1 / 64, 0.5))
    assert (seldom, often) == ((8, 1 + 2 + 8), (256, 1 + 2 + 8))
    # Never tried: as if in each step.
    assert kind.selecting(table, params, 1024, 16) == (512, 1 + 2 + 8)


def by_damage(evidence: tuple[Profile, Fitted]) -> tuple[Profile, Fitted]:
    """Heads of h.0 lose nothing by selecting 8 tokens, of h.1 by reading them, and everything else loses much."""
    profile, fitted = evidence
    made_up = {key: replace(trials, t2=torch.full_like(trials.t2, 1e9)) for key, trials in fitted.trials.items()}
    for (site, _), trials in made_up.items():
        for c, choice in enumerate(trials.choices):
            params = dict(choice.params)
            if params["k"] == 8 and params.get("every") == 1 and params.get("behind") == (site == "h.1"):
                trials.t2[:, c] = 0.0
    for seen in profile.observations.values():
        seen.t2.fill_(1e9)
    return profile, replace(fitted, trials=made_up)


def test_heads_read_what_the_layer_before_them_selects(evidence: tuple[Profile, Fitted]) -> None:
    profile, fitted = by_damage(evidence)
    problem = make_problem(
        profile, CostTable.by_density(), _sites(), LENGTH, objective="decode", fitted=fitted, allow=("tokens",)
    )
    left = settled(problem, 1e-6)
    found = front(left).pick(max_damage=1e-6)
    assert found is not None
    chosen = choices_from(left, found)
    assert {c["behind"] for c in chosen["h.1"]} == {1} and {c["k"] for c in chosen["h.1"]} == {8}
    assert all(c == DENSE or (c["k"], c["behind"]) == (8, 0) for c in chosen["h.0"])
    assert links_of(left).counts == [2, 8] and choices_from(left, left.dense)["h.0"] == (DENSE,) * HEADS
    # Asked for a small cache nothing of the kind is left.
    small = within_memory(problem, Limits(memory=1.0))
    assert not np.isfinite(small.damage[:, links_of(small).count > 0]).any() and small.damage.shape == left.damage.shape
    assert within_memory(problem, Limits()) is problem


def test_a_plan_of_tokens_is_measured_as_it_decodes(evidence: tuple[Profile, Fitted]) -> None:
    profile, fitted = evidence
    verify, final = ({LENGTH: tokens(8, LENGTH, seed=n)} for n in (3, 4))
    made = make_plan(
        NanoGPT().eval(), "nano", profile, verify, final, Budget("kl", 10.0), LENGTH, tables=CostTable.by_density(),
        objective="decode", fitted=fitted, allow=("tokens",),
    )  # fmt: skip
    every = [c for heads in made.plan.choices.values() for c in heads]
    assert any(CANDIDATES[c.candidate].decoded for c in every)
    assert made.plan.predicted.speedup > 1 and made.plan.predicted.kv_memory > 0.9
    # The compiled kernel takes no heads as narrow as these.
    assert any("tokens are selected by torch's operators" in note for note in made.notes)
    assert made.plan.measured[-1].planned_loss != made.plan.measured[-1].dense_loss
