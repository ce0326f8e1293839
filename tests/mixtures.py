"""What the tests of mixed heads share: a site, fits of random maps, and the whole mixture pair by pair in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.feature_maps import FeatureMap, key_features, query_features
from attnopt.fingerprint import Fingerprint
from attnopt.fitted import Fitted, Header, HeadFit
from attnopt.ir import DENSE, Choice, Mask, Site
from attnopt.registry import CANDIDATES

PRUNED = Choice("pruned")


def window(sink: int, window: int) -> Choice:
    return Choice.of("sink_window", {"sink": sink, "alpha": window, "beta": 0.0})


def linear(sink: int, window: int, features: int = 6) -> Choice:
    return Choice.of("linear", {"sink": sink, "window": window, "features": features})


def taylor(sink: int, window: int, rank: int = 2) -> Choice:
    return Choice.of("taylor", {"sink": sink, "window": window, "rank": rank})


def mean(sink: int, alpha: int, beta: float = 0.0) -> Choice:
    return Choice.of("compensation", {"sink": sink, "alpha": alpha, "beta": beta})


def attend(q: Tensor, k: Tensor, v: Tensor, pad: Tensor | None = None) -> Tensor:
    """The mask written out, as models do; a graph in which it stands for causal and padding."""
    keep = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    keep = keep if pad is None else keep & pad[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep, enable_gqa=q.shape[1] != k.shape[1])


# Eight heads over two KV heads, of every family; equal maps apart from each other, and under different windows.
CHOICES = (DENSE, linear(2, 5), window(2, 5), mean(1, 4), linear(0, 9), taylor(2, 5), mean(0, 0, 0.25), linear(2, 5))


def site(heads: int = 8, kv_heads: int = 2, dim: int = 8, name: str = "attention", **changes: Any) -> Site:
    return Site(name, 0, "sdpa", heads, kv_heads, dim, dim, dim**-0.5, "float64", Mask(causal=True), **changes)


def fits(choices: dict[str, tuple[Choice, ...]], dim: int = 8, seed: int = 0) -> Fitted:
    """Random maps of every head of these sites for all that their choices want, and random means."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return 0.4 * torch.randn(shape, generator=generator)

    found = Fitted(Header(Fingerprint("0" * 16, ())))
    for name, of_site in choices.items():
        heads = len(of_site)
        for map_name in {CANDIDATES[c.candidate].map_name(dict(c.params)) for c in of_site} - {""}:
            kind, rank = map_name.split("/")[0], int(map_name.split("/")[1])
            maps = [(heads, rank, dim), (heads, rank), (heads,)] * 2 + [(heads, dim), (heads,)]
            made = FeatureMap("taylor" if kind == "taylor" else "exp", *(normal(*shape) for shape in maps))
            found.add_map(name, map_name, made, [HeadFit("random", 0.0)] * heads)
        found.means[name] = normal(heads, dim)
    return found


def weights(
    q: Tensor, k: Tensor, head: int, choice: Choice, of: Site, fitted: Fitted, pad: Tensor | None, min_length: int
) -> Tensor:
    """What each key of a head weighs, not normalised, (B, N, N) in float64."""
    length, candidate = q.shape[2], CANDIDATES[choice.candidate]
    keys = k[:, head // (of.heads // of.kv_heads)].double()
    queries = q[:, head].double()
    scores = of.scale * queries @ keys.mT
    i, j = torch.arange(length)[:, None], torch.arange(length)
    sink, width = candidate.span(dict(choice.params), length) if length >= min_length else (0, length)
    there = (j <= i)[None] if pad is None else (j <= i) & pad[:, None, :]
    near = there & ((j < sink) | (i - j < width))
    far = (there & ~near).double()
    found = scores.exp() * near
    if candidate.far == "mean":
        count = far.sum(-1, keepdim=True)
        found = found + far * (of.scale * (queries * (far @ keys / count.clamp(min=1))).sum(-1, keepdim=True)).exp()
    if candidate.far == "linear":
        maps = fitted.map_of(of.name, candidate.map_name(dict(choice.params)), [head])
        (of_q, shift), of_k = query_features(queries[:, None], maps), key_features(keys[:, None], maps)
        found = found + far * ((of_q @ of_k.mT) * shift.exp()[..., None])[:, 0]
    return found


def naive(
    q: Tensor, k: Tensor, v: Tensor, choices: tuple[Choice, ...], of: Site, fitted: Fitted, pad: Tensor | None = None,
    min_length: int = 0,
) -> Tensor:  # fmt: skip
    """The outputs (B, H, N, Dv) in float64; a row without a key is 0."""
    outs = []
    for head, choice in enumerate(choices):
        if choice == PRUNED:
            mean = fitted.means[of.name][head].double()
            outs.append(mean.expand(q.shape[0], q.shape[2], -1))
            continue
        found = weights(q, k, head, choice, of, fitted, pad, min_length)
        total = found.sum(-1, keepdim=True)
        outs.append(found @ v[:, head // (of.heads // of.kv_heads)].double() / total.masked_fill(total == 0, 1.0))
    return torch.stack(outs, 1)


class ExplicitMixtures:
    """A context in which each causal SDPA call of a model, in order, is `naive` under the choices of its site."""

    def __init__(self, choices: dict[str, tuple[Choice, ...]], fitted: Fitted) -> None:
        self.choices, self.fitted, self.calls = choices, fitted, 0

    def __enter__(self) -> ExplicitMixtures:
        self.original = F.scaled_dot_product_attention
        torch.nn.functional.scaled_dot_product_attention = self.mixed  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        torch.nn.functional.scaled_dot_product_attention = self.original  # type: ignore[assignment]

    def mixed(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *_: Any, scale: Any = None, **kw: Any
    ) -> Tensor:
        name = list(self.choices)[self.calls % len(self.choices)]
        self.calls += 1
        of = replace(site(q.shape[1], k.shape[1], q.shape[3], name), scale=scale or q.shape[3] ** -0.5)
        # Of a causal mask with padding, the last query's row is the padding.
        last = None if attn_mask is None else attn_mask[:, 0, -1]
        pad = last if last is None or last.dtype == torch.bool else last > -1e4
        return naive(q, k, v, self.choices[name], of, self.fitted, pad).to(q.dtype)
