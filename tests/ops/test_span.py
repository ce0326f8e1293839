"""The operators of span attention: gradients on every target, registration, tracing, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnopt import ops
from attnopt.codegen.reference_prefill import prefill_lse as reference
from attnopt.ops.span import IDLE

SINKS = torch.tensor([0, 3, 0, 90], dtype=torch.int32)
ALPHAS = torch.tensor([2**30, 5, 1, 0], dtype=torch.int32)
BETAS = torch.tensor([0, 0.1, 0, 0.2], dtype=torch.float64)
REST = (0.3, 0, 0)  # scale, the model's own window, the least length


def inputs(length: int = 40, dtype: torch.dtype = torch.float64, padded: bool = False) -> tuple[Any, ...]:
    """Arguments of the operators up to pad: four query heads over two KV heads, two samples."""
    generator = torch.Generator().manual_seed(length)
    shapes = (4, length, 8), (2, length, 8), (2, length, 8)
    q, k, v = (torch.randn(2, *s, generator=generator, dtype=dtype).requires_grad_() for s in shapes)
    pad = torch.arange(length).repeat(2, 1) >= torch.tensor([[5], [0]]) if padded else None
    return q, k, v, SINKS, ALPHAS, BETAS, pad


def expected(arguments: tuple[Any, ...], *weights: Tensor) -> tuple[Tensor, ...]:
    """Autograd's gradients through the reference: of the output alone, or of it and the logsumexp."""
    q, k, v, *_, pad = arguments
    windows = ops.windows_at(ALPHAS, BETAS, q.shape[2])
    both = reference(q, k, v, SINKS, windows, 0.3, pad)
    return torch.autograd.grad(both[: len(weights)], (q, k, v), weights)


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("target", ["cpu", "reference"])
def test_gradients(target: str, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNOPT_TARGET", target)
    ops.launches.clear()
    arguments = inputs(padded=padded)
    out, lse = ops.span_attention_lse(*arguments, *REST)
    plain = ops.span_attention(*(x.detach() for x in arguments[:3]), *arguments[3:], *REST)
    torch.testing.assert_close(out.detach(), plain)
    weight, lse_weight = torch.randn_like(out), torch.randn_like(lse)
    # Padded rows in front keep no key: their logsumexp is constant.
    lse_weight[:, :, :5] = 0.0
    everything = torch.autograd.grad((out, lse), arguments[:3], (weight, lse_weight), retain_graph=True)
    alone = torch.autograd.grad(lse, arguments[:3], lse_weight, retain_graph=True)
    no_weight = torch.zeros_like(weight)
    for gradients, right in (
        (torch.autograd.grad(out, arguments[:3], weight), expected(arguments, weight)),
        (everything, expected(arguments, weight, lse_weight)),
        (alone, expected(arguments, no_weight, lse_weight)),
    ):
        torch.testing.assert_close(gradients, right)
        assert all(x.transpose(1, 2).is_contiguous() for x in gradients)
    assert [key.split("_h4")[0] for key in ops.launches] == [f"span_prefill_{target}", f"span_backward_{target}"]


@pytest.mark.parametrize("pads", ["", "left", "holes"])
def test_an_idle_head_is_zero_and_its_keys_are_not_read(pads: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 70, 32, generator=generator) for heads in (4, 2, 2))
    column = torch.arange(70).repeat(2, 1)
    pad = {"": None, "left": column >= torch.tensor([[20], [0]]), "holes": column % 7 > 0}[pads]
    alphas = torch.tensor([IDLE, IDLE, IDLE, 9], dtype=torch.int32)
    tables = torch.zeros(4, dtype=torch.int32), alphas, torch.zeros(4, dtype=torch.float64), pad
    k[:, 0] = v[:, 0] = torch.nan
    windows = torch.tensor([0, 0, 0, 9], dtype=torch.int32)
    assert torch.equal(ops.windows_at(*tables[1:3], 70), windows)
    right, sums = reference(q, k.nan_to_num(), v.nan_to_num(), tables[0], windows, 0.3, pad)
    found, (out, lse) = ops.span_attention(q, k, v, *tables, *REST), ops.span_attention_lse(q, k, v, *tables, *REST)
    for x in (found, out):
        torch.testing.assert_close(x, right, rtol=1e-4, atol=1e-5)
        assert not x[:, :3].any()
    torch.testing.assert_close(lse, sums, rtol=1e-4, atol=1e-5)
    # Below a plan's least length it is dense like the others.
    k, v = k.nan_to_num(), v.nan_to_num()
    whole = ops.span_attention(q, k, v, *tables, 0.3, 0, 71)
    torch.testing.assert_close(
        whole, reference(q, k, v, tables[0], windows * 0 + 70, 0.3, pad)[0], rtol=1e-4, atol=1e-5
    )


def test_registration() -> None:
    arguments = inputs(9, torch.float32, padded=True)
    torch.library.opcheck(torch.ops.attnopt.span_attention_lse.default, (*arguments, *REST))
    q, k, v, *tables = (x.detach() if isinstance(x, Tensor) else x for x in arguments)
    torch.library.opcheck(torch.ops.attnopt.span_attention.default, (q, k, v, *tables, *REST))
    out, lse = ops.span_attention_lse(q, k, v, *tables, *REST)
    torch.library.opcheck(
        torch.ops.attnopt.span_attention_backward.default, (torch.ones_like(out), q, k, v, out, lse, *tables, *REST)
    )


def test_traced_with_dynamic_lengths() -> None:
    def loss(*arguments: Any) -> Tensor:
        return (ops.span_attention_lse(*arguments, *REST)[0] * 2).sin().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (40, 57):
        arguments = inputs(length)
        found = torch.autograd.grad(compiled(*arguments), arguments[:3])
        for gradient, right in zip(found, torch.autograd.grad(loss(*arguments), arguments[:3]), strict=True):
            torch.testing.assert_close(gradient, right)


def test_no_gradient_where_none_can_be() -> None:
    """The form without a logsumexp, and a second derivative, say so."""
    arguments = inputs(9)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        ops.span_attention(*arguments, *REST).sum().backward()
    q = arguments[0]
    (once,) = torch.autograd.grad(ops.span_attention_lse(*arguments, *REST)[0].sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(once.sum(), q)
