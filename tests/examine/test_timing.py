"""Timing runs what was there and what replaces it, and refuses to time what differs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnopt.capture import capture
from attnopt.examine.timing import Timings
from attnopt.passes import LOWER, RECOGNISE, Program


class Attentions(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = torch.softmax(x @ x.mT + torch.full((9, 9), float("-inf")).triu(1), -1) @ x
        return x


def lowered() -> Program:
    made: list[Program] = []

    def look(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        captured = capture(gm)
        assert isinstance(captured, torch.fx.GraphModule)
        made.append(Program(captured).run((*RECOGNISE, *LOWER)))
        return gm.forward

    torch.compile(Attentions(), backend=look)(torch.randn(1, 2, 9, 8))
    return made[0]


def test_equal_sites_are_timed_once() -> None:
    timings = Timings()
    timings.run(lowered())
    (found,) = timings.found
    assert found.like == 2 and not found.wrong and (found.queries, found.keys) == (9, 9)
    assert found.before_ms > 0 and found.ratio == found.before_ms / found.after_ms


def test_what_differs_is_not_timed() -> None:
    program = lowered()
    region = program.regions[0]
    with program.gm.graph.inserting_after(region.q):
        program.replaced[region.site.name] = program.gm.graph.call_function(torch.ops.aten.neg.default, (region.q,))
    timings = Timings()
    timings.run(program)
    assert "differs from the original" in timings.found[0].wrong and timings.found[0].ratio == 0
