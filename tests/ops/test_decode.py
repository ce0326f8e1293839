"""`attnopt::span_decode`: what it computes, its fake, and that it neither traces into kernels nor loses a gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnopt import ops
from attnopt.codegen.reference_decode import decode as reference

SINKS, WINDOWS = torch.tensor([2, 1, 0, 3], dtype=torch.int32), torch.tensor([50, 9, 7, 90], dtype=torch.int32)


def inputs(tokens: int = 1) -> tuple[torch.Tensor, ...]:
    """Four query heads over two KV heads of 20 and 33 slots, the second entry not yet full."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, tokens, 16), torch.randn(2, 53, 16), torch.randn(2, 53, 16)
    return q, k, v, torch.tensor([0, 20, 53]).int(), torch.tensor([[20, 33], [20, 31]]).int()


def spans() -> dict[str, torch.Tensor]:
    positions = torch.cat((torch.arange(20), torch.arange(33))).int()
    return {"sinks": SINKS, "windows": WINDOWS, "positions": positions, "at": torch.tensor([32, 40]).int()}


@pytest.mark.parametrize("options", [{}, spans()], ids=["", "spans"])
@pytest.mark.parametrize("target", ["cpu", "reference"])
def test_agrees_with_the_reference(options: dict[str, Any], target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNOPT_TARGET", target)
    ops.launches.clear()
    found = torch.ops.attnopt.span_decode(*inputs(), 0.25, **options)
    expected = reference(*(x.double() if x.is_floating_point() else x for x in inputs()), 0.25, **options)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    (key,) = ops.launches
    assert key.startswith(f"span_decode_{target}_h4k2d16") and ("positioned" in key) == bool(options)


@pytest.mark.parametrize("tokens", [1, 3])
def test_registration(tokens: int) -> None:
    torch.library.opcheck(torch.ops.attnopt.span_decode.default, (*inputs(tokens), 0.25))
    torch.library.opcheck(torch.ops.attnopt.span_decode.default, (*inputs(tokens), 0.25), spans())


def test_stays_one_node_when_traced() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    def step(q: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return torch.ops.attnopt.span_decode(q * 2, *rest, 0.25) + 1

    found = torch.compile(step, backend=backend, fullgraph=True)(*inputs())
    torch.testing.assert_close(found, step(*inputs()))
    assert [n.target for n in graphs[0].graph.nodes if "span_decode" in str(n.target)] == [
        torch.ops.attnopt.span_decode
    ]


def test_a_wanted_gradient_is_refused() -> None:
    q, *rest = inputs()
    with pytest.raises(RuntimeError, match="no gradient"):
        torch.ops.attnopt.span_decode(q.requires_grad_(), *rest, 0.25)
    compiled = torch.compile(lambda *x: torch.ops.attnopt.span_decode(*x, 0.25), backend="aot_eager")
    with pytest.raises(RuntimeError, match="no gradient"):
        compiled(q, *rest)
    with torch.no_grad():
        torch.testing.assert_close(compiled(q, *rest), torch.ops.attnopt.span_decode(q, *rest, 0.25))


def test_half_a_set_of_spans_is_refused() -> None:
    with pytest.raises(ValueError, match="come together"):
        torch.ops.attnopt.span_decode(*inputs(), 0.25, SINKS, WINDOWS)
