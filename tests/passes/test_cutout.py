"""What a Rewrite says of its site's nodes, before and after."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from attnopt import backend
from attnopt.passes.cutout import MOST, cutout, reached


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = q @ k.transpose(-2, -1) / 4.0
    n = torch.arange(q.shape[2])
    return scores.masked_fill(n[None, :] > n[:, None], -torch.inf).softmax(-1) @ v


def test_before_is_the_site_and_after_what_replaced_it(eagerly: list[Any]) -> None:
    backend.clear_reports()
    q, k, v = torch.randn(3, 1, 2, 8, 16)
    torch.compile(attend, backend="attnopt")(q, k, v)
    (rewrite,) = backend.reports()[0].rewrites
    before, after = ({op.name: op for op in ops} for ops in (rewrite.before, rewrite.after))
    assert {name for name, op in before.items() if op.op == "input"} == {"q", "k", "v"} == before.keys() & after.keys()
    kinds = {op.op for op in before.values()}
    assert {"aten.arange.default", "aten.softmax.int", "aten.gt.Tensor"} <= kinds
    (compare,) = (op for op in before.values() if op.op == "aten.gt.Tensor")
    assert compare.shape == "8, 8 bool" and before["q"].shape == "1, 2, 8, 16"
    assert rewrite.after[-1].op == "aten.scaled_dot_product_attention.default"
    assert rewrite.after[-1].inputs == ("q", "k", "v")
    for ops in (before, after):
        assert {name for op in ops.values() for name in op.inputs} <= ops.keys()


def test_a_mask_that_stays_is_there_before_and_after(eagerly: list[Any]) -> None:
    def biased(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return (q @ k.transpose(-2, -1) / 4.0 + table * 2.0).softmax(-1) @ v

    backend.clear_reports()
    q, k, v = torch.randn(3, 1, 2, 8, 16)
    torch.compile(biased, backend="attnopt")(q, k, v, torch.randn(8, 8))
    (rewrite,) = backend.reports()[0].rewrites
    for ops in (rewrite.before, rewrite.after):
        (doubled,) = (op for op in ops if op.shape == "8, 8" and op.op == "aten.mul.Tensor")
        assert [op.op for op in ops if op.name in doubled.inputs] == ["input"]
    assert len(rewrite.after) < len(rewrite.before)


def test_what_is_too_long_says_how_much_is_missing() -> None:
    class Chain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(MOST + 10):
                x = x + 1
            return x

    graph = torch.fx.symbolic_trace(Chain()).graph
    last = next(iter(graph.output_node().all_input_nodes))
    ops = cutout(reached(last, {}), {})
    # The chain and x; the nearest to the output stay.
    assert len(ops) == MOST + 1 and ops[-1].op == "and 11 more" and ops[-2].name == last.name
