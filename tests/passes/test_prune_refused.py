"""Near misses of pruning: each stays exact and whole, with its own reason; and constants that are no longer true."""

from __future__ import annotations

import gc
import weakref

import pruning
import pytest
import torch
import torch.nn.functional as F
from compiling import compiled
from pruning import WIDTH, built, choices_for, means_for, plan_of, pruned, rows
from torch import Tensor, nn
from tracing import qkv, trace

from attnopt import backend
from attnopt.ir import Choice


class JointNorm(pruning.Attention):
    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = self.q(x)
        q = q * torch.rsqrt(q.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.split(q), self.split(self.k(x)), self.split(self.v(x))


class JointLayerNorm(pruning.Attention):
    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = F.layer_norm(self.q(x), (self.heads * self.dim,))
        return self.split(q), self.split(self.k(x)), self.split(self.v(x))


class ReadQueries(pruning.Attention):
    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().operands(x)
        self.queries = q
        return q, k, v

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), self.queries


class Gated(pruning.Attention):
    def output(self, out: Tensor) -> Tensor:
        return self.o(torch.tanh(out.transpose(1, 2).flatten(2)))


class Unprojected(pruning.Attention):
    def output(self, out: Tensor) -> Tensor:
        return F.softmax(out.transpose(1, 2).flatten(2), -1)


class ReadTwice(pruning.Attention):
    def output(self, out: Tensor) -> Tensor:
        return super().output(out) + out.sum((1, 3))[..., None]


class Sorted(pruning.Attention):
    """An operation without a rule: which head is where depends on the data."""

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.split(self.q(x).sort(-1).values), self.split(self.k(x)), self.split(self.v(x))


class Capped(pruning.Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keep = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
        scores = 20 * torch.tanh(q @ k.mT / 20)
        return scores.masked_fill(~keep, float("-inf")).softmax(-1) @ v


class Opaque(pruning.Attention):
    """A weight that an operator unpacks at every call."""

    def build(self, bias: bool) -> None:
        super().build(bias)
        self.packed = nn.Parameter(torch.rand(WIDTH))

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = F.linear(x, torch.ops.attnopt_tests.unpack(self.packed, self.heads * self.dim))
        return self.split(q), self.split(self.k(x)), self.split(self.v(x))


@torch.library.custom_op("attnopt_tests::unpack", mutates_args=())
def unpack(packed: Tensor, rows: int) -> Tensor:
    return packed.expand(rows, -1).contiguous()


@unpack.register_fake
def _(packed: Tensor, rows: int) -> Tensor:
    return packed.new_empty(rows, packed.shape[0])


NEAR_MISSES = [
    (JointNorm, "prune-joint-norm"), (JointLayerNorm, "prune-joint-norm"), (ReadQueries, "prune-read-elsewhere"),
    (Gated, "prune-gated-output"),
    (Unprojected, "prune-no-output-projection"), (ReadTwice, "prune-no-output-projection"),
    (Sorted, "prune-no-projection"),
    (Capped, "prune-needs-plain"),
]  # fmt: skip


def codes(traced):
    return [note.code for note in traced.program.notes]


@pytest.mark.parametrize(("kind", "code"), NEAR_MISSES, ids=lambda v: getattr(v, "__name__", ""))
def test_a_near_miss_stays_whole(kind, code):
    module, span = built(kind), Choice.of("sink_window", {"sink": 0, "alpha": 3, "beta": 0.0})
    with torch.no_grad():
        expected = module(rows())
        traced = pruned(module, (1,), other=span)
        torch.testing.assert_close(traced.output, expected)
    assert codes(traced) == [code], traced.left
    (note,) = traced.program.notes
    assert note.reason.startswith("1 of its heads are to go, but ") and note.reason.endswith("; it stays exact")
    assert not [name for name, _ in traced.program.gm.named_buffers() if "attnopt" in name]
    assert not traced.program.relied_on and not any("removed" in r for r in traced.rewrites)


def test_a_weight_that_cannot_be_taken():
    """One that an operator unpacks, whose rows nobody but it knows; one of a class of its own; one without versions."""
    with torch.no_grad():
        assert codes(pruned(built(Opaque), (1,))) == ["prune-no-projection"]
    with torch.inference_mode():
        found = pruned(built(pruning.Attention), (1,))
    assert codes(found) == ["prune-opaque-weight"], found.left


def test_inputs_gradients_and_missing_means():
    module = built(pruning.Attention)
    traced = pruned(module, (1,), grad=True)
    assert codes(traced) == ["prune-needs-grad"] and traced.output.requires_grad
    with torch.no_grad():
        choices = {"attention": choices_for(4, (1,))}
        assert codes(trace(module, rows(), plan=plan_of(choices, {}))) == ["prune-no-means"]
        weight = torch.randn(WIDTH, 32)

        def unprojected(q, k, v):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return F.linear(out.transpose(1, 2).flatten(2), weight)

        found = trace(unprojected, *qkv(), plan=plan_of(choices, {"attention": means_for(4)}))
        assert codes(found) == ["prune-no-projection"] and "an input of the graph" in found.left[-1]


def write(module):
    module.q.weight.mul_(2)


def replace(module):
    module.o.weight = nn.Parameter(module.o.weight * 2)


def exchange_data(module):
    module.v.bias.data = module.v.bias + 1


def test_written_parameters_run_untouched(monkeypatch):
    """A parameter that a constant was made of is written, replaced or exchanged: the model follows, with all heads.
    What is compiled does not keep it alive."""
    for part in (backend, backend.inductor):
        monkeypatch.setattr(part, "to_inductor", lambda gm, inputs, patches: gm.forward)
    plan = plan_of({"attention": choices_for(4, (1,))}, {"attention": means_for(4)})
    for change in (write, replace, exchange_data):
        torch._dynamo.reset()
        backend.clear_reports()
        module = built(pruning.Attention)
        call = compiled(module, plan=plan)
        with torch.no_grad():
            before = call(rows())
            assert [r.lowering for r in backend.reports()[0].rewrites] == ["1 of 4 heads removed; SDPA is_causal"]
            assert float((before - module(rows())).abs().max()) > 0.1
            torch.testing.assert_close(call(rows()), before, rtol=0, atol=0)
            old = weakref.ref(module.o.weight)
            change(module)
            gc.collect()
            assert (old() is None) == (change is replace)
            for _ in range(2):
                torch.testing.assert_close(call(rows()), expected_after(module, backend.reports()))


def expected_after(module, reports):
    """The whole model's output; or, where Dynamo has traced anew, that of the new weights under the plan."""
    if len(reports) == 1:
        return module(rows())
    return pruning.expected(module, rows(), {module: {1: means_for(4)[1]}}).float()
