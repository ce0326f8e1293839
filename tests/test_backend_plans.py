"""The backend with a plan: it runs, it refuses another model's, and a site it cannot serve stays exact."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compiling import LLAMA, SPANS, close, compiled, rewritten
from models import HEADS, LAYERS, ExplicitMasks, NanoGPT, build, make_plan, tokens
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

from attnopt import backend
from attnopt.errors import PlanError

pytestmark = pytest.mark.slow

# A model written by hand is traced in a fifth of the time.
NANO = {f"h.{n}": SPANS for n in range(LAYERS)}


@pytest.fixture(autouse=True)
def no_reports():
    backend.clear_reports()


def test_a_plan_runs(eagerly, tmp_path):
    model, path = build("llama"), tmp_path / "plan.json"
    make_plan(LLAMA).save(path)
    with torch.no_grad():
        # What is recognised is compared with the original; what the plan makes of it is to differ.
        found = compiled(model, plan=str(path), verify=True)(tokens(), use_cache=False).logits
        with ExplicitMasks([[(0, 2**30), (2, 5), (0, 7), (2, 5)]] * LAYERS) as masks:
            expected = model(tokens(), use_cache=False).logits
        dense = model(tokens(), use_cache=False).logits
    assert masks.calls == LAYERS and rewritten() == list(LLAMA)
    close(found, expected)
    assert not torch.allclose(found, dense, atol=0.05)


def test_a_plan_below_its_least_length_is_dense(eagerly):
    model = NanoGPT().eval()
    with torch.no_grad():
        found = compiled(model, plan=make_plan(NANO, min_length=21))(tokens())
        close(found, model(tokens()))
    assert rewritten() == list(NANO)


def test_a_new_plan_of_equal_shape_emits_nothing(eagerly, cache_folder):
    model = NanoGPT().eval()
    with torch.no_grad():
        compiled(model, plan=make_plan(NANO))(tokens())
        before = sorted((cache_folder / "kernels").iterdir())
        torch._dynamo.reset()
        other = {name: (SPANS[1],) * HEADS for name in NANO}
        compiled(model, plan=make_plan(other))(tokens())
    assert sorted((cache_folder / "kernels").iterdir()) == before


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"encoder.0.attn": SPANS}, "holds nothing for"),
        ({name: SPANS[:2] for name in NANO}, "The plan has 2 heads at h.0, this model has 4"),
    ],
    ids=["other sites", "other heads"],
)
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_a_plan_for_another_model(eagerly, choices, said, grad):
    with torch.set_grad_enabled(grad), pytest.raises(BackendCompilerFailed) as caught:
        compiled(NanoGPT().eval(), plan=make_plan(choices))(tokens())
    error = caught.value.inner_exception
    assert isinstance(error, PlanError) and said in str(error) and "attnopt profile" in error.remedy


def test_a_site_the_plan_does_not_name_stays_exact(eagerly):
    model, first = NanoGPT(flash=False).eval(), {"h.0": SPANS}
    with torch.no_grad():
        compiled(model, plan=make_plan(first))(tokens())
    (report,) = backend.reports()
    assert [r.lowering.split(",")[0] for r in report.rewrites] == ["span kernel", "SDPA is_causal"]
    assert [(r.path, "does not name" in r.reason) for r in report.refusals] == [("h.1", True)]


def test_graphs_without_a_planned_site_are_no_mistake(eagerly):
    """A graph of no attention, of a bidirectional one, or of one decoded token says nothing about the plan."""
    plan = make_plan(NANO)
    q = torch.randn(1, 2, 9, 8)
    compiled(lambda x: x + 1, plan=plan)(torch.ones(3))
    compiled(lambda q: F.scaled_dot_product_attention(q, q, q), plan=plan)(q)
    compiled(lambda q, k: F.scaled_dot_product_attention(q[:, :, :1], k, k), plan=plan)(q, q.clone())


def test_a_plan_refuses_what_its_kernel_cannot_do(eagerly):
    """Each reason by itself; a Refusal is falsy, so it is easily lost."""
    plan = make_plan({"attention": SPANS[1:3]})
    q, k, v = torch.randn(3, 1, 2, 9, 8)

    def attend(scale, q, k, v):
        i, j = torch.arange(q.shape[2]), torch.arange(k.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=j <= i[:, None], scale=scale)

    cases = {
        "serve prefill only": (0.3, q[:, :, :5], k, v),
        "values as wide as keys": (0.3, q, k, v[..., :4]),
        "a positive scale": (-0.3, q, k, v),
    }
    for said, (scale, *inputs) in cases.items():
        torch._dynamo.reset()
        backend.clear_reports()
        close(compiled(lambda *x, scale=scale: attend(scale, *x), plan=plan)(*inputs), attend(scale, *inputs))
        (report,) = backend.reports()
        assert any(said in r.reason for r in report.refusals), (said, report.lines())
        assert not any("span" in r.lowering for r in report.rewrites)


def test_as_many_graphs_with_a_plan(eagerly):
    model = NanoGPT().eval()
    call = compiled(model, plan=make_plan(NANO))
    counters.clear()
    for length in (20, 33, 47):
        with torch.no_grad(), ExplicitMasks([[(0, 2**30), (2, 5), (0, 7), (2, 5)]] * LAYERS):
            expected = model(tokens(2, length))
        with torch.no_grad():
            close(call(tokens(2, length)), expected)
    assert counters["stats"]["unique_graphs"] == 2


def test_scaled_up_models_attend_unevenly():
    """The tests above would pass under any mask if attention were uniform."""
    model = NanoGPT().eval()
    with torch.no_grad():
        dense = model(tokens())
        with ExplicitMasks([[(0, 12)] * HEADS] * LAYERS):
            windowed = model(tokens())
    assert float((dense - windowed).abs().max()) > 0.1
