"""Models whose scores are soft-capped, or whose values are not as wide as their keys: observed like any other, planned
dense with the reason, and left as they are by a plan for the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from models import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, LAYERS, VOCABULARY, NanoGPT, scaled_up, tokens
from torch import Tensor, nn
from tracing import trace

from attnopt.cost import CostTable
from attnopt.errors import ModelError, PlanError
from attnopt.instrument import Instrumented
from attnopt.ir import DENSE, Choice
from attnopt.measure import Spans
from attnopt.plan import Budget, Constraints
from attnopt.planner.make import make_plan, posed
from attnopt.planner.problem import left_dense
from attnopt.profiler import _Recorder, discover, profile_model
from attnopt.statistics import Grid, Observation, naive_observation

GRID = Grid((0, 2), (8, 16, 32))
LENGTH = 48
NAMES = tuple(f"model.layers.{n}.self_attn" for n in range(LAYERS))


def gemma(softcap: float | None = 2.0, attention: str = "eager") -> Any:
    """Gemma 2: soft-capped scores and logits, grouped heads, every other layer sliding (16 keys here)."""
    import transformers

    config = transformers.Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, intermediate_size=96, max_position_embeddings=512,
        sliding_window=16, query_pre_attn_scalar=HEAD_DIM, attn_logit_softcapping=softcap, final_logit_softcapping=30.0,
    )  # fmt: skip
    config._attn_implementation = attention
    torch.manual_seed(0)
    return scaled_up(transformers.Gemma2ForCausalLM(config)).eval()


class Odd(nn.Module):
    """Causal attention written out; scores capped at `softcap` (0: not), values of `dim_v` features."""

    def __init__(self, softcap: float, dim_v: int = HEAD_DIM) -> None:
        super().__init__()
        self.softcap, self.widths = softcap, [HEADS * HEAD_DIM, HEADS * HEAD_DIM, HEADS * dim_v]
        self.c_attn, self.c_proj = nn.Linear(HIDDEN, sum(self.widths)), nn.Linear(self.widths[2], HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        split = self.c_attn(self.norm(x)).split(self.widths, dim=2)
        q, k, v = (t.unflatten(2, (HEADS, -1)).transpose(1, 2) for t in split)
        scores = q @ k.transpose(-2, -1) * HEAD_DIM**-0.5
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        below = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        y = torch.softmax(scores.masked_fill(~below, float("-inf")), dim=-1) @ v
        return x + self.c_proj(y.transpose(1, 2).flatten(2))


def mixed(odd: Odd) -> NanoGPT:
    """An odd layer before a plain one."""
    model = NanoGPT()
    torch.manual_seed(1)
    model.h[0] = scaled_up(odd, 3.0)
    return model.eval()


def gradients(model: nn.Module, call: Any, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(5)
    out = call(ids)
    out = out if isinstance(out, Tensor) else out.logits
    (out * torch.randn(out.shape)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("make", [gemma, lambda: mixed(Odd(1.5)), lambda: mixed(Odd(0.0, 24))])
def test_an_observed_model_has_its_own_outputs_and_gradients(make: Any) -> None:
    model, ids = make(), tokens(2, LENGTH)
    recorder = _Recorder()
    recorder.target = lambda site, length: Observation.zeros(site.heads, GRID, length)
    observed = Instrumented(model, recorder)
    found, expected = gradients(model, observed, ids), gradients(model, model, ids)
    assert len(observed.sites) == LAYERS and not observed.left_alone
    assert found.keys() == expected.keys()
    for name, theirs in expected.items():
        assert (found[name] - theirs).norm() <= 1e-4 * theirs.norm() + 1e-6, name


def test_what_is_observed_of_a_capped_site() -> None:
    """The sums of a profile against the naive twin on the tensors that the site saw."""
    model, seen = gemma(), {}
    recorder = _Recorder()
    observations: dict[str, Observation] = {}

    def target(site: Any, length: int) -> Observation:
        return observations.setdefault(site.name, Observation.zeros(site.heads, GRID, length))

    recorder.target = target

    def kept(site: Any) -> Any:
        attend = recorder(site)

        def run(q: Tensor, k: Tensor, v: Tensor, pad: Tensor | None) -> Tensor:
            out = attend(q, k, v, pad)
            seen[site.name] = (site, q, k, v, pad, out)
            out.retain_grad()
            return out

        return run

    out = Instrumented(model, kept)(tokens(2, LENGTH))
    torch.manual_seed(5)
    (out.logits * torch.randn(out.logits.shape)).sum().backward()
    assert [site.softcap for site, *_ in seen.values()] == [2.0] * LAYERS
    assert [site.mask.window for site, *_ in seen.values()] == [16, None]
    for name, (site, q, k, v, pad, out) in seen.items():
        twin, held = (
            naive_observation(q, k, v, out.grad, GRID, site.scale, pad, site.mask.window, False, cap)
            for cap in (2.0, 0.0)
        )
        for sums in ("t2", "mass", "ablation_t2"):
            torch.testing.assert_close(observations[name].sums[sums], twin.sums[sums], rtol=1e-3, atol=1e-6)
        assert (held.t2 - twin.t2).norm() > 0.1 * twin.t2.norm()


def test_forward_only_observes_them_too() -> None:
    profile = profile_model(gemma(), [tokens(1, LENGTH)], GRID, forward_only=True)
    assert profile.sites == NAMES
    assert all((seen.delta >= 0).all() and seen.delta.any() for seen in profile.observations.values())


def texts() -> list[dict[int, Tensor]]:
    return [{LENGTH: tokens(8, LENGTH, seed=n)} for n in (3, 4)]


def test_where_every_head_is_capped_there_is_nothing_to_plan() -> None:
    model, costs = gemma(), CostTable.by_density()
    profile = profile_model(model, [tokens(1, LENGTH, seed=n) for n in range(2)], GRID)
    assert profile.sites == NAMES and all((o.t2[..., 0] > 0).all() for o in profile.observations.values())
    with pytest.raises(ModelError, match=r"No head of this model can be replaced: .* softcap=2") as caught:
        make_plan(model, "gemma", profile, *texts(), Budget("loss", 50.0), LENGTH, tables=costs)
    assert caught.value.exit_code == 2
    # A problem that is posed all the same has nothing but dense to choose.
    problem, _ = posed(
        profile, costs, list(discover(model, tokens(1, LENGTH)).sites.values()), LENGTH, Constraints(), "prefill"
    )
    assert np.isinf(problem.damage[:, 1:]).all() and not problem.damage[:, 0].any()


@pytest.mark.parametrize(("odd", "reason"), [(Odd(1.5), "softcap=1.5"), (Odd(0.0, 24), "as wide as keys")])
def test_the_plain_layers_beside_are_planned(odd: Odd, reason: str) -> None:
    model = mixed(odd)
    profile = profile_model(model, [tokens(1, LENGTH, seed=n) for n in range(2)], GRID)
    assert profile.sites == ("h.0", "h.1")
    made = make_plan(model, "mixed", profile, *texts(), Budget("loss", 80.0), LENGTH, tables=CostTable.by_density())
    assert set(made.plan.choices["h.0"]) == {DENSE} and set(made.plan.choices["h.1"]) != {DENSE}
    (note,) = made.notes
    assert note.startswith("h.0: every head stays dense") and reason in note
    ids = tokens(2, LENGTH)
    traced = trace(model, ids, plan=made.plan, verify=False)
    assert [r for r in traced.rewrites if "span kernel" in r] and "h.0" in {s.name for s in traced.sites}
    spans = Spans(model)
    with torch.no_grad():
        planned = spans.logits(ids, made.plan.choices)
    torch.testing.assert_close(traced.output, planned, rtol=1e-4, atol=1e-4)


def test_spans_are_not_run_where_no_kernel_can() -> None:
    spans = Spans(mixed(Odd(1.5)))
    narrow = Choice.of("sink_window", {"sink": 0, "alpha": 8, "beta": 0.0})
    with torch.no_grad():
        spans.logits(tokens(1, LENGTH), None)
        with pytest.raises(PlanError, match=r"No kernel runs spans at h\.0: .* softcap=1\.5"):
            spans.logits(tokens(1, LENGTH), {"h.0": [narrow] * HEADS})


def test_sites_that_share_a_reason_share_a_line() -> None:
    capped, plain = (list(discover(m, tokens(1, LENGTH)).sites.values()) for m in (gemma(), NanoGPT().eval()))
    lines = left_dense([*capped, *capped, *plain])
    assert len(lines) == 2 and all("and 1 more: every head" in line for line in lines)
    assert left_dense(plain) == ()
