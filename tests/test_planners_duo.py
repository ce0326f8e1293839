"""Gates in DuoAttention's manner: what they compute, what they learn, the plan they make."""

from __future__ import annotations

import pytest
import torch
from models import LAYERS, build, tokens

from attnopt.ir import DENSE, Choice
from benchmarks.planners.duo import Gated, split, streaming, train

EXAMPLES = [(tokens(1, 40, seed=n), torch.arange(40) >= 32) for n in range(3)]
KV_HEADS = build("llama").config.num_key_value_heads


def test_streaming_keeps_the_first_and_the_last_keys():
    q, k, v = (torch.randn(1, h, 12, 4, dtype=torch.float64) for h in (4, 2, 2))
    found = streaming(q, k, v, 0.5, 2, 3)
    for i in (0, 4, 11):
        kept = sorted({*range(min(2, i + 1)), *range(max(0, i - 2), i + 1)})
        keys, values = (x[:, :, kept].repeat_interleave(2, 1) for x in (k, v))
        expected = (q[:, :, i : i + 1] @ keys.mT * 0.5).softmax(-1) @ values
        torch.testing.assert_close(found[:, :, i : i + 1], expected)


def test_open_gates_are_the_model_and_closed_ones_stream():
    body, ids = build("llama").model, EXAMPLES[0][0]
    gated = Gated(body, 2, 4)
    with torch.no_grad():
        expected = body(ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(gated.hidden(ids), expected, rtol=1e-4, atol=1e-5)
        for gate in gated.gates.values():
            gate.zero_()
        closed = gated.hidden(ids)
        # The first rows have no other keys.
        torch.testing.assert_close(closed[:, :5], expected[:, :5], rtol=1e-4, atol=1e-5)
        assert (closed - expected)[:, 10:].abs().max() > 1e-2
        gated.open = True
        torch.testing.assert_close(gated.hidden(ids), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.full
def test_gates_stay_where_they_are_needed_and_fall_where_nothing_is_lost():
    body = build("llama").model
    free = train(body, EXAMPLES, sink=2, window=4, steps=5, penalty=0.0)
    assert list(free) == [f"layers.{n}.self_attn" for n in range(LAYERS)]
    assert all(torch.equal(gate, torch.ones(KV_HEADS)) for gate in free.values())
    # A window over all keys loses nothing.
    idle = train(body, EXAMPLES, sink=2, window=40, steps=100)
    assert all((gate < 0.2).all() for gate in idle.values())
    some = train(body, EXAMPLES, sink=2, window=4, steps=100)
    assert sum(float(gate.sum()) for gate in some.values()) > sum(float(gate.sum()) for gate in idle.values())
    assert all(p.requires_grad and p.grad is None for p in body.parameters())


@pytest.mark.parametrize("retrieval", [0, 1, 3])
def test_the_plan_keeps_the_largest_gates_dense(retrieval):
    gates = {"a": torch.tensor([0.2, 0.9]), "b": torch.tensor([0.9, 0.1])}
    plan = split(gates, {"a": 4, "b": 2}, retrieval, 4, 64)
    stream = Choice.of("sink_window", {"sink": 4, "alpha": 64, "beta": 0.0})
    expected = {
        0: {"a": (stream,) * 4, "b": (stream,) * 2},
        1: {"a": (stream, stream, DENSE, DENSE), "b": (stream,) * 2},
        3: {"a": (DENSE,) * 4, "b": (DENSE, stream)},
    }
    assert plan == expected[retrieval]
