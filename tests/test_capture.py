"""Capture: the exported graph computes what Dynamo's did, writes included, or there is a reason why there is none."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnopt import capture as module
from attnopt.capture import capture
from attnopt.ir import Refusal


def captured(fn, *inputs, grad=False, **kwargs):
    """What capture makes of the graph of `fn`, and the result of running it."""
    seen = []

    def backend(gm, _):
        seen.append(capture(gm))
        return gm.forward if isinstance(seen[-1], Refusal) else seen[-1].forward

    with torch.set_grad_enabled(grad):
        out = torch.compile(fn, backend=backend, **kwargs)(*inputs)
    (found,) = seen
    return found, out


def targets(gm):
    return [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]


def test_attention_stays_whole_and_every_node_has_a_value():
    def fn(q):
        return F.softmax(q @ q.mT, -1) @ q + F.scaled_dot_product_attention(q, q, q)

    q = torch.randn(1, 2, 5, 8)
    gm, out = captured(fn, q)
    names = targets(gm)
    assert "aten.softmax.int" in names and "aten.scaled_dot_product_attention.default" in names
    assert all("val" in n.meta for n in gm.graph.nodes if n.op != "output")
    torch.testing.assert_close(out, fn(q))


def test_spellings_of_a_view_are_one():
    gm, _ = captured(
        lambda x: (x.T.float(), x.t().to(torch.float32), x.permute(1, 0).type(torch.float32)), torch.ones(2, 3).half()
    )
    assert {t for t in targets(gm) if "copy" in t or "assert" in t} <= {
        "aten._to_copy.default",
        "aten._assert_tensor_metadata.default",
    }


def test_writes_come_back():
    def fn(x, y):
        x[:, 1] = y
        x.mul_(2)
        return x + 1

    one, other, y = torch.ones(3, 4), torch.ones(3, 4), torch.full((3,), 5.0)
    gm, out = captured(fn, one, y)
    torch.testing.assert_close(out, fn(other, y))
    torch.testing.assert_close(one, other)
    assert targets(gm).count("aten.copy_.default") == 1
    (output,) = (n for n in gm.graph.nodes if n.op == "output")
    assert len(output.args[0]) == 1


@pytest.mark.parametrize("p, training", [(0.3, False), (0.0, True)])
def test_a_write_to_what_an_inactive_dropout_returns_is_one_to_its_input(p, training):
    def fn(x):
        y = F.dropout(x, p, training)
        y.view(-1).mul_(2)
        return x + 1, y

    one, other = torch.ones(2, 3), torch.ones(2, 3)
    gm, out = captured(fn, one)
    torch.testing.assert_close(out, fn(other))
    torch.testing.assert_close(one, other)
    assert "aten.dropout.default" not in targets(gm)


def test_a_write_to_what_an_active_dropout_returns_leaves_its_input():
    def fn(x):
        y = F.dropout(x, 0.5)
        y.view(-1).add_(1)
        return x * 3, y

    one = torch.ones(40, 50)
    gm, out = captured(fn, one)
    assert targets(gm).count("aten.dropout.default") == 1
    torch.testing.assert_close((one, out[0]), (torch.ones(40, 50), torch.full((40, 50), 3.0)))
    # Each is dropped or doubled, and then written.
    assert set(out[1].unique().tolist()) == {1.0, 3.0} and 800 < (out[1] == 1).sum() < 1200


def test_nn_multihead_attention_shows_its_attention():
    attention = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    gm, out = captured(lambda x: attention(x, x, x, need_weights=False)[0], x)
    assert "aten.scaled_dot_product_attention.default" in targets(gm)
    with torch.no_grad():
        torch.testing.assert_close(out, attention(x, x, x, need_weights=False)[0])
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_write_beside_gradients_reads_a_clone():
    """The backward pass keeps what the write then changes; eager would refuse to run this backward."""

    def fn(x, buffer):
        y = x * buffer
        buffer.add_(1)
        return y.sum()

    x, one = torch.ones(3, requires_grad=True), torch.full((3,), 2.0)
    gm, out = captured(fn, x, one, grad=True)
    assert targets(gm)[0] == "aten.clone.default"
    torch.testing.assert_close(torch.autograd.grad(out, x)[0], torch.full((3,), 2.0))
    torch.testing.assert_close(one, torch.full((3,), 3.0))


def test_a_write_of_what_needs_a_gradient_is_refused():
    def fn(x, buffer):
        buffer.add_(x)
        return (x * buffer).sum()

    found, out = captured(fn, torch.ones(3, requires_grad=True), torch.zeros(3), grad=True)
    assert isinstance(found, Refusal) and "needs a gradient" in found.reason and out.requires_grad


def test_higher_order_operators_are_refused():
    from torch.utils.checkpoint import checkpoint

    found, _ = captured(
        lambda x: checkpoint(torch.sin, x, use_reentrant=False), torch.ones(3, requires_grad=True), grad=True
    )
    assert isinstance(found, Refusal) and "higher-order operator" in found.reason


def test_a_failing_export_is_a_reason_and_strict_raises(monkeypatch):
    import torch._functorch.aot_autograd as aot

    def fail(*_, **__):
        raise RuntimeError("no\nreally")

    monkeypatch.setattr(aot, "aot_export_module", fail)
    found, _ = captured(torch.sin, torch.ones(3))
    assert isinstance(found, Refusal) and found.reason == "the graph was not exported: RuntimeError: no"
    torch._dynamo.reset()
    monkeypatch.setenv("ATTNOPT_STRICT", "1")
    with pytest.raises(Exception, match="really"):
        captured(torch.sin, torch.ones(3))


def test_gradients_are_asked_for_in_the_current_mode():
    x = torch.ones(3, requires_grad=True)
    assert module.needs_grad([x, 3]) and not module.needs_grad([x.detach(), 3])
    with torch.no_grad():
        assert not module.needs_grad([x])
