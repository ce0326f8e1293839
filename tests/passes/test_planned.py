"""Mixed heads in a graph: the calls inserted for them, their numbers and gradients against float64, their reports."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from compiling import compiled
from mixtures import CHOICES, PRUNED, ExplicitMixtures, attend, fits, linear, mean, naive, site, taylor, window
from models import HEAD_DIM, build, make_plan, padding, tokens
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from tracing import operators, qkv, trace

import attnopt
from attnopt import backend
from attnopt.errors import PlanError
from attnopt.ir import DENSE, Choice
from attnopt.passes import RECOGNISE, lower_planned

FITTED = fits({"attention": CHOICES})


def plan_of(choices: dict[str, tuple[Choice, ...]], fitted: Any = FITTED, min_length: int = 0) -> Any:
    return replace(make_plan(choices, min_length), fitted=fitted)


def inputs(kv_heads: int, length: int = 37, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    q, k, v = qkv(2, 8, kv_heads, length, dtype=dtype)
    return 0.5 * q, 0.5 * k, v


@pytest.mark.parametrize("kv_heads", [2, 8], ids=["GQA", "MHA"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_every_family_in_one_call(kv_heads: int, padded: bool) -> None:
    q, k, v = inputs(kv_heads)
    pad = (torch.arange(37).repeat(2, 1) >= torch.tensor([[15], [0]]),) if padded else ()
    of, plan = site(kv_heads=kv_heads), plan_of({"attention": CHOICES})
    expected = naive(q, k, v, CHOICES, of, FITTED, *pad)
    traced = trace(attend, q, k, v, *pad, plan=plan, verify=False)
    torch.testing.assert_close(traced.output, expected, atol=1e-10, rtol=1e-10)
    # Equal maps are served at once, and no mask is left.
    assert operators(traced) == ["span_attention_lse", "linear_far", "mean_far", "linear_far"]
    assert not any(n.target is torch.ops.aten.tril.default for n in traced.program.gm.graph.nodes)
    assert traced.rewrites == ["span kernel, 5 spans; linear tail on 4 heads; mean tail on 2 heads"]
    given = [x.clone().requires_grad_() for x in (q, k, v)]
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=expected.dtype)
    found = trace(attend, *given, *pad, plan=plan, verify=False, grad=True).output
    right = naive(*given, CHOICES, of, FITTED, *pad)
    gradients = [torch.autograd.grad(out, given, weight) for out in (found, right)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


def test_all_heads_alike_and_spans_alone() -> None:
    q, k, v = inputs(2)
    cases = {
        "span kernel, 1 span; mean tail on 8 heads": ((mean(0, 3),) * 8, ["span_attention_lse", "mean_far"], False),
        "span kernel, 3 spans": ((DENSE, window(2, 5), window(0, 7), DENSE) * 2, ["span_attention"], False),
    }
    for lowering, (choices, names, copied) in cases.items():
        traced = trace(attend, q, k, v, plan=plan_of({"attention": choices}, None), verify=False)
        torch.testing.assert_close(traced.output, naive(q, k, v, choices, site(), FITTED), atol=1e-10, rtol=1e-10)
        assert traced.rewrites == [lowering] and operators(traced) == names
        targets = {n.target for n in traced.program.gm.graph.nodes}
        assert (torch.ops.aten.index_put.default in targets) == copied


def test_the_least_length() -> None:
    q, k, v = inputs(2)
    for least, dense in ((37, False), (38, True)):
        found = trace(attend, q, k, v, plan=plan_of({"attention": CHOICES}, min_length=least), verify=False).output
        expected = attend(q, k, v) if dense else naive(q, k, v, CHOICES, site(), FITTED)
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


def test_maps_that_no_triton_kernel_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The passes alone run for that target: its kernels need a GPU."""
    wide = (linear(0, 3, 129),) * 8
    plan = plan_of({"attention": wide}, fits({"attention": wide}))
    for target, lowered in (("cpu", ["span kernel, 1 span; linear tail on 8 heads"]), ("triton", [])):
        monkeypatch.setattr(lower_planned.settings, "target", lambda _, target=target: target)
        traced = trace(attend, *inputs(2), plan=plan, verify=False, passes=(*RECOGNISE, lower_planned.run))
        assert traced.rewrites == lowered
        assert [no.code for no in traced.program.notes] == ([] if lowered else ["far-too-wide"])
        monkeypatch.undo()


PATH = "model.layers.{}.self_attn"


def test_a_model_and_its_gradients(eagerly: Any) -> None:
    """Of a padded batch, at two lengths, the second of which is a symbol."""
    backend.clear_reports()
    choices = {PATH.format(0): (linear(1, 4), mean(0, 6), taylor(0, 5), window(2, 5))}
    model, fitted = build("llama", num_hidden_layers=1).double().train(), fits(choices, dim=HEAD_DIM)
    call = compiled(model, plan=plan_of(choices, fitted))
    for length in (20, 31):
        mask, found, explicit = padding(2, length, "left"), [], ExplicitMixtures(choices, fitted)
        for run in (call, model):
            model.zero_grad()
            with contextlib.nullcontext() if run is call else explicit:
                logits = run(input_ids=tokens(2, length), attention_mask=mask, use_cache=False).logits
            logits[mask.bool()].square().sum().backward()
            found.append([logits.detach()[mask.bool()], *(p.grad for p in model.parameters())])
        assert explicit.calls == 1
        for one, right in zip(*found, strict=True):
            assert float((one - right).norm()) <= 1e-9 * float(right.norm())
    lowerings = {r.lowering for report in backend.reports() for r in report.rewrites}
    assert lowerings == {"span kernel, 4 spans; linear tail on 2 heads; mean tail on 1 head"}


def test_a_model_with_heads_that_are_gone(eagerly: Any) -> None:
    """Beside far parts, whose maps must stay with their heads: one head of a group, and a whole group."""
    backend.clear_reports()
    first, second = (PATH.format(n) for n in range(2))
    choices = {first: (PRUNED, linear(1, 4), mean(0, 6), DENSE), second: (PRUNED, PRUNED, window(1, 5), linear(1, 7))}
    model, fitted, mask = build("llama"), fits(choices, dim=HEAD_DIM), padding(2, 20, "left")
    with torch.no_grad():
        found = compiled(model, plan=plan_of(choices, fitted))(tokens(), attention_mask=mask, use_cache=False).logits
        with ExplicitMixtures(choices, fitted):
            expected = model(tokens(), attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=1e-4)
    (report,) = backend.reports()
    assert not report.refusals and sum(r.lowering.count("linear tail on 1 head") for r in report.rewrites) == 2


@pytest.mark.parametrize("fitted", [None, fits({"attention": (linear(0, 3, 5),) * 8})], ids=["none", "others"])
def test_a_plan_without_its_maps(eagerly: Any, fitted: Any) -> None:
    with torch.no_grad(), pytest.raises(BackendCompilerFailed) as caught:
        compiled(attend, plan=plan_of({"attention": CHOICES}, fitted))(*inputs(2))
    assert isinstance(caught.value.inner_exception, PlanError) and "feature map" in str(caught.value.inner_exception)


def test_spans_change_under_far_parts_that_stay(eagerly: Any) -> None:
    q, k, v = inputs(2)
    live = attnopt.LivePlan(plan_of({"attention": CHOICES}))
    call = compiled(attend, plan=live)
    other = (window(0, 3), linear(0, 4), DENSE, mean(0, 9), linear(3, 2), taylor(0, 11), mean(0, 5), linear(1, 8))
    with torch.no_grad():
        for choices in (CHOICES, other):
            live.change(plan_of({"attention": choices}))
            expected = naive(q, k, v, choices, site(), FITTED)
            torch.testing.assert_close(call(q, k, v), expected, atol=1e-10, rtol=1e-10)
    assert len(eagerly) == 1
    refused = {
        r"Head 1 of attention is linear\(.*\) in the compiled plan and sink_window": (
            (DENSE, window(2, 5)) * 4,
            FITTED,
        ),
        "Head 0 of attention is": ((mean(0, 3), *other[1:]), FITTED),
        "maps of attention are others": (other, fits({"attention": CHOICES}, seed=1)),
    }
    for said, (choices, fitted) in refused.items():
        with pytest.raises(PlanError, match=said):
            live.change(plan_of({"attention": choices}, fitted))
    torch.testing.assert_close(call(q, k, v), expected, atol=1e-10, rtol=1e-10)
    live.change(plan_of({"attention": other}, fits({"attention": CHOICES})))


@pytest.mark.slow
def test_compiled_to_the_end() -> None:
    """Through inductor, which reuses memory that it takes for read."""
    given = inputs(2, 96, torch.float32)
    with torch.no_grad():
        found = compiled(lambda *x: attend(*x) * 2, plan=plan_of({"attention": CHOICES}))(*given)
    expected = 2 * naive(*given, CHOICES, site(), FITTED)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)
