"""Through inductor itself: gradients, written buffers, what its own patterns must not fuse, a pass of the user's."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from compiling import SPANS, close, compiled, rewritten
from models import ExplicitMasks, NanoGPT, build, make_plan, padding, tokens
from torch import nn

from attnopt import backend


@pytest.fixture(autouse=True)
def no_reports():
    backend.clear_reports()


@pytest.mark.slow
@pytest.mark.parametrize("planned", [True, pytest.param(False, marks=pytest.mark.full)], ids=["planned", "exact"])
def test_training_through_inductor(planned):
    """Loss and gradients are eager's; with a plan, those of the model under the plan's masks. One layer: each that
    inductor compiles forward and backward takes seconds."""
    model, batch, mask = build("llama", seed=3, num_hidden_layers=1), tokens(2, 20), padding(2, 20, "right")
    arguments = {"input_ids": batch, "attention_mask": mask, "labels": batch, "use_cache": False}

    def gradients(call):
        model.zero_grad()
        loss = call(**arguments).loss
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

    names = ["model.layers.0.self_attn"]
    options = {"plan": make_plan(dict.fromkeys(names, SPANS))} if planned else {}
    found_loss, found = gradients(compiled(model, **options))
    with ExplicitMasks([[(0, 2**30), (2, 5), (0, 7), (2, 5)]]) if planned else contextlib.nullcontext():
        loss, expected = gradients(model)
    torch.testing.assert_close(found_loss, loss, atol=1e-4, rtol=1e-4)
    for name, gradient in expected.items():
        scale = float(gradient.norm()) or 1.0
        assert float((found[name] - gradient).norm()) < 2e-3 * scale, name
    assert rewritten() == names
    assert not planned or [r.lowering for r in backend.reports()[-1].rewrites] == ["span kernel, 3 spans"]


def test_a_softmax_that_stays_is_kept_from_inductors_patterns(eagerly):
    def fn(q, k, v):
        i = torch.arange(q.shape[2])
        masked = F.scaled_dot_product_attention(q, k, v, attn_mask=i[:, None] >= i)
        return masked + torch.softmax((q @ k.transpose(-1, -2)).tanh(), -1) @ v

    q = torch.randn(2, 2, 9, 8)
    compiled(fn)(q, q + 1, q - 1)
    assert set(eagerly[0][1]) == {"joint_custom_pre_pass", "joint_custom_post_pass"}
    assert "attention patterns are kept from" in "".join(map(str, backend.reports()[0].notes))


# Each is matched by one of inductor's patterns and means something else than the pattern.
LOOKALIKES = {
    "axis of the queries": lambda q, k, v: torch.softmax((q @ k.transpose(-1, -2)) * 0.3, -2) @ v,
    "axis of the heads": lambda q, k, v: torch.softmax((q @ k.transpose(-1, -2)) * 0.3, 1) @ v,
    "by hand": lambda q, k, v: hand_softmax((q @ k.transpose(-1, -2)) * 0.3) @ v,
}


def hand_softmax(x):
    e = torch.exp(x - x.amax(-2, keepdim=True))
    return e / e.sum(-2, keepdim=True)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_inductor_fuses_nothing_that_was_left_alone(grad):
    """Through inductor itself, whose other patterns stay on; in one graph, each with tensors of its own."""

    def fn(*tensors):
        return [alike(*tensors[3 * n : 3 * n + 3]) for n, alike in enumerate(LOOKALIKES.values())]

    tensors = [torch.randn(2, 8, 8, 8, requires_grad=grad) for _ in range(3 * len(LOOKALIKES))]
    found, expected = compiled(fn)(*tensors), fn(*tensors)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    if grad:
        ours, theirs = (torch.autograd.grad(sum(o.square().sum() for o in out), tensors) for out in (found, expected))
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_pass_of_the_users_own_still_runs():
    seen = []
    options = {"inductor": {"joint_custom_pre_pass": lambda graph: seen.append(len(graph.nodes))}}
    q = torch.randn(1, 2, 8, 8)
    compiled(LOOKALIKES["by hand"], **options)(q, q + 1, q - 1)
    assert seen


def test_activation_checkpointing(eagerly):
    from torch.utils.checkpoint import checkpoint

    model = NanoGPT(flash=False)
    model.h = model.h[:1]

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            x = self.model.wte(ids)
            for block in self.model.h:
                x = checkpoint(block, x, use_reentrant=False)
            return self.model.head(x)

    def gradients(call):
        model.zero_grad()
        call(tokens()).square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    expected = gradients(model)
    found = gradients(compiled(Checkpointed()))
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm()) <= 1e-3 * float(gradient.norm()) + 1e-6, name
    assert "higher-order operator" in backend.reports()[0].fallback


class Normalised(nn.Module):
    """A buffer that every training step writes to, beside an attention."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.project = nn.BatchNorm1d(16), nn.Linear(16, 16)

    def forward(self, x):
        q = self.project(self.norm(x.transpose(1, 2)).transpose(1, 2)).view(2, 9, 2, 8).transpose(1, 2)
        i = torch.arange(9)
        return F.scaled_dot_product_attention(q, q, q, attn_mask=i[:, None] >= i)


# In evaluation mode nothing is written.
@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.full)])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_a_buffer_that_is_written(training, grad):
    model = Normalised().train(training)
    twin, x = copy.deepcopy(model), torch.randn(2, 9, 16)
    with torch.set_grad_enabled(grad):
        call = compiled(twin)
        for _ in range(2):
            expected, found = model(x), call(x)
            close(found, expected)
    close(twin.norm.running_mean, model.norm.running_mean)
    close(twin.norm.running_var, model.norm.running_var)
    if grad:
        expected.square().sum().backward()
        found.square().sum().backward()
        close(twin.project.weight.grad, model.project.weight.grad)
    assert rewritten() == ["attention"]
