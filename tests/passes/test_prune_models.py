"""Pruned heads through torch.compile(backend="attnopt"): models of transformers against float64 ones whose heads are
replaced by their means in front of the output projection, and what is saved."""

from __future__ import annotations

import copy

import pruning
import pytest
import torch
from compiling import compiled
from models import HEAD_DIM, HEADS, build, tokens
from pruning import choices_for, means_for, plan_of
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tracing import trace

from attnopt import backend

GONE = {"llama": ((0, 1), (0, 3)), "gpt2": ((1,), range(HEADS))}


class Adapted(nn.Module):
    """linear(x, W) + s linear(linear(x, A), B), as an adapter library wraps a projection."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Linear(base.in_features, 3, bias=False)
        self.b = nn.Linear(3, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + 0.5 * self.b(self.a(x))


def adapted(model):
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Adapted(getattr(layer.self_attn, name)))
    return model.eval()


def attentions(model):
    """(name, module) of each attention."""
    return [(n, m) for n, m in model.named_modules() if n.endswith(("self_attn", ".attn"))]


def planned(model, gone):
    names = [name for name, _ in attentions(model)]
    means = {name: means_for(HEADS, HEAD_DIM, seed=n) for n, name in enumerate(names)}
    return plan_of({name: choices_for(HEADS, heads) for name, heads in zip(names, gone, strict=True)}, means)


def reference(model, plan):
    """The model in float64, the inputs of its output projections written over where a head is gone."""
    twin = copy.deepcopy(model).double()
    for name, attention in attentions(twin):
        values = [
            (slice(h * HEAD_DIM, (h + 1) * HEAD_DIM), plan.fitted.means[name][h].double())
            for h, choice in enumerate(plan.choices[name]) if choice.candidate == "pruned"
        ]  # fmt: skip

        def write_over(_, inputs, values=values):
            x = inputs[0].clone()
            for columns, mean in values:
                x[..., columns] = mean
            return (x,)

        (attention.o_proj if hasattr(attention, "o_proj") else attention.c_proj).register_forward_pre_hook(write_over)
    return twin


def eagerly(monkeypatch):
    for part in (backend, backend.inductor):
        monkeypatch.setattr(part, "to_inductor", lambda gm, inputs, patches: gm.forward)


@pytest.mark.parametrize(("family", "changed", "cached"), [("llama", adapted, False), ("gpt2", None, True)])
def test_a_model(family, changed, cached, monkeypatch):
    """Without a KV cache, and with one, whose keys and values are those of the whole model."""
    eagerly(monkeypatch)
    backend.clear_reports()
    model = build(family)
    model = changed(model) if changed else model
    plan, ids = planned(model, GONE[family]), tokens(2, 20)
    twin, call = reference(model, plan), compiled(model, plan=plan)
    with torch.no_grad():
        expected, found = twin(ids, use_cache=cached), call(ids, use_cache=cached)
        torch.testing.assert_close(found.logits.double(), expected.logits, atol=2e-4, rtol=1e-4)
        assert float((model(ids, use_cache=False).logits - expected.logits).abs().max()) > 0.05
    layers = zip(found.past_key_values.layers, expected.past_key_values.layers, strict=True) if cached else ()
    for layer, whole in layers:
        torch.testing.assert_close(layer.keys.double(), whole.keys, atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(layer.values.double(), whole.values, atol=2e-4, rtol=1e-4)
    (report,) = backend.reports()
    assert ["removed" in rewrite.lowering for rewrite in report.rewrites] == [True, True], report.lines()


@pytest.mark.slow
def test_a_module_through_inductor():
    """The constants are constants of what inductor makes; once the parameter is written, all heads are back."""
    module = pruning.built(pruning.Attention, 6, 2)
    plan = plan_of({"attention": choices_for(6, (0, 1, 2, 4))}, {"attention": means_for(6)})
    call, x = compiled(module, plan=plan), pruning.rows()
    means = plan.fitted.means["attention"]
    with torch.no_grad():
        expected = pruning.expected(module, x, {module: {h: means[h] for h in (0, 1, 2, 4)}})
        torch.testing.assert_close(call(x).double(), expected, atol=1e-5, rtol=1e-5)
        module.o.weight.mul_(2)
        torch.testing.assert_close(call(x), module(x), atol=1e-5, rtol=1e-5)


def flops(run):
    """Those of products; the fused kernel of the CPU is not counted, written out it is."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_the_operations_that_go():
    """Two of four query heads, and one of two KV heads: as many multiplications as their slices have, and no more."""
    model, ids = build("llama"), tokens(2, 20)
    plan = planned(model, ((0, 1), (0, 1)))
    with torch.no_grad():
        traced = trace(lambda ids: model(ids, use_cache=False).logits, ids, plan=plan, verify=False)
    inputs = [n.meta["grapharg"].example for n in traced.program.gm.graph.nodes if n.op == "placeholder"]
    saved = flops(lambda: model(ids, use_cache=False)) - flops(lambda: traced.program.gm(*inputs))
    rows, width = ids.numel(), model.config.hidden_size
    projections = 2 * rows * width * HEAD_DIM * (2 + 1 + 1 + 2)
    attention = 2 * (2 * ids.shape[0] * 2 * ids.shape[1] ** 2 * HEAD_DIM)
    assert saved == len(plan.choices) * (projections + attention)
