"""The output projection is found by following the heads' outputs, and only where they reach it as they are."""

from __future__ import annotations

import pytest
import torch
from models import HEADS, LAYERS, NanoGPT, build, tokens
from torch import Tensor, nn

from attnopt.instrument import Instrumented
from attnopt.ir import Site
from attnopt.profiler import discover, factors_of, profile_model
from attnopt.statistics import Grid, attention


def projections(model: nn.Module) -> dict[str, Tensor | None]:
    return discover(model, tokens(1, 20)).projections


@pytest.mark.parametrize(("name", "spelling"), [("mistral", "sdpa"), ("gpt2", "sdpa"), ("llama", "eager")])
def test_weights_of_transformers(name: str, spelling: str) -> None:
    model = build(name, spelling)
    found = list(projections(model).values())
    if name == "gpt2":
        expected = [layer.attn.c_proj.weight.T for layer in model.transformer.h]  # Conv1D keeps (in, out)
    else:
        expected = [layer.self_attn.o_proj.weight for layer in model.model.layers]
    assert len(found) == len(expected) == LAYERS
    assert all(w is not None and torch.equal(w, e) for w, e in zip(found, expected, strict=True))


class Gated(nn.Module):
    """Attention whose output is scaled before its projection, or whose heads are arranged otherwise."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.wte, self.qkv, self.out = nn.Embedding(61, 16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.wte(ids))
        q, k, v = (y.unflatten(-1, (4, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        o = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        if self.how == "gated":
            o = o * torch.sigmoid(q)
        o = o.permute(0, 2, 3, 1) if self.how == "interleaved" else o.transpose(1, 2)
        y = self.out(o.reshape(*x.shape))
        if self.how == "read twice":
            y = y + o.reshape(*x.shape)
        return (x + y) @ self.wte.weight.T


@pytest.mark.parametrize("how", ["gated", "interleaved", "read twice"])
def test_what_changes_outputs_on_their_way_has_no_projection(how: str) -> None:
    model = Gated(how).eval()
    assert list(projections(model).values()) == [None]
    made = profile_model(model, [tokens(1, 20)], Grid((0,), (4,)), forward_only=True)
    assert "not every projection was found" in made.header.supervision[0]
    (weight,) = projections(Gated("plain").eval()).values()
    assert weight is not None and torch.equal(weight, model.out.weight)


def test_one_site_without_a_projection_leaves_all_without() -> None:
    instrumented = discover(NanoGPT(True).eval(), tokens(1, 20))
    assert set(factors_of(instrumented)) == set(instrumented.sites)
    instrumented.projections[next(iter(instrumented.sites))] = None
    assert factors_of(instrumented) == {}


def test_delta_is_measured_through_the_projection() -> None:
    """Against every head's output recomputed over the keys it keeps, through the module's own weight."""
    model, ids, window = build("llama"), tokens(1, 20), 4
    made = profile_model(model, [ids], Grid((0,), (window,)), forward_only=True)
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def observer(site: Site):  # type: ignore[no-untyped-def]
        def attend(q: Tensor, k: Tensor, v: Tensor, pad: Tensor | None) -> Tensor:
            out = attention(q, k, v, site.scale, pad, None)
            seen[site.name] = (out, attention(q, k, v, site.scale, pad, window))
            return out

        return attend

    with torch.no_grad():
        Instrumented(model, observer).logits(ids)
    for n, (name, (dense, narrow)) in enumerate(seen.items()):
        weight = model.model.layers[n].self_attn.o_proj.weight.unflatten(1, (HEADS, -1))
        moved = torch.einsum("bhnd,ohd->bhno", narrow - dense, weight).square().sum((0, 2, 3))
        torch.testing.assert_close(
            made.observations[name, 20].delta[:, 0, 0], moved.detach().double(), rtol=1e-4, atol=1e-9
        )
