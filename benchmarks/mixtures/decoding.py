"""One decoding step of a layer under a plan's choices, out of the operators that there are, and what its cache holds.

KV heads whose query heads are plain spans lie in one ragged cache, for `attnopt::span_decode`. Those with a far part
need the logsumexp of their near keys as well, which that operator does not return: their short windows go through
torch's own flash kernel, `attnopt::linear_decode` or a running mean adds what is far, and `merge` puts them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt import ops  # noqa: F401  (registers the operators)
from attnopt.feature_maps import key_features, query_features
from attnopt.fitted import Fitted
from attnopt.ir import Choice, Site
from attnopt.ops.merge import merge
from attnopt.registry import CANDIDATES

Span = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Token:
    """The last of N tokens of B sequences at a site: its queries q (B, H, 1, D), and the keys k (B, G, N, D) and values
    v (B, G, N, Dv) up to its own."""

    q: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def random(cls, site: Site, length: int, batch: int = 1, seed: int = 0) -> Token:
        generator = torch.Generator().manual_seed(seed)
        sizes = (
            (site.heads, 1, site.head_dim),
            (site.kv_heads, length, site.head_dim),
            (site.kv_heads, length, site.head_dim_v),
        )
        return cls(*(torch.randn(batch, *size, generator=generator).to(getattr(torch, site.dtype)) for size in sizes))

    @property
    def length(self) -> int:
        return self.k.shape[2]

    @property
    def share(self) -> int:
        return self.q.shape[1] // self.k.shape[1]


def span_of(choice: Choice, length: int) -> Span:
    """(sinks, window) of near keys; (0, 0) of a head that is gone."""
    sinks, window = CANDIDATES[choice.candidate].span(dict(choice.params), length, None)
    return (min(sinks, length - window), window) if window else (0, 0)


def far_of(choice: Choice, length: int) -> str:
    """Candidate.far, "" also where the window leaves nothing far."""
    far = CANDIDATES[choice.candidate].far
    return "" if far != "gone" and sum(span_of(choice, length)) >= length else far


def kept(span: Span, length: int) -> list[int]:
    """The positions that a cache of this span holds, ascending."""
    return [*range(span[0]), *range(length - span[1], length)]


def union(spans: Sequence[Span], length: int) -> Span:
    """What a KV head keeps for query heads of these spans."""
    window = max(w for _, w in spans)
    return min(max(s for s, _ in spans), length - window), window


def cache_bytes(site: Site, choices: Sequence[Choice], length: int) -> int:
    """Of one sequence at this site: the keys and values of every KV head's union, and what far parts hold."""
    item, share = torch.finfo(getattr(torch, site.dtype)).bits // 8, site.heads // site.kv_heads
    spans = [span_of(c, length) for c in choices]
    keys = sum(sum(union(spans[g * share : (g + 1) * share], length)) for g in range(site.kv_heads))
    states = sum(
        CANDIDATES[c.candidate].state_bytes(dict(c.params), site, length)
        for c in choices
        if far_of(c, length) in ("linear", "mean")
    )
    return keys * (site.head_dim + site.head_dim_v) * item + states


class Plain:
    """KV heads without a far part, in one ragged cache."""

    def __init__(self, site: Site, token: Token, spans: Sequence[Span], groups: Sequence[int]) -> None:
        share, self.scale = token.share, site.scale
        unions = {g: union([spans[h] for h in range(g * share, (g + 1) * share)], token.length) for g in groups}
        order = sorted(groups, key=lambda g: sum(unions[g]))
        held = [kept(unions[g], token.length) for g in order]
        self.heads = torch.tensor([h for g in order for h in range(g * share, (g + 1) * share)])
        self.k, self.v = (
            torch.cat([x[:, g, at] for g, at in zip(order, held, strict=True)], 1) for x in (token.k, token.v)
        )
        self.starts = torch.tensor([0, *map(len, held)]).cumsum(0).to(torch.int32)
        self.filled = torch.tensor([[len(at) for at in held]] * len(token.q), dtype=torch.int32)
        self.own: tuple[Tensor, ...] = ()
        if any(spans[h] != unions[h // share] for h in self.heads.tolist()):
            sinks, windows = (torch.tensor([spans[h][n] for h in self.heads], dtype=torch.int32) for n in (0, 1))
            positions = torch.tensor([p for at in held for p in at], dtype=torch.int32)
            self.own = sinks, windows, positions, torch.tensor([token.length - 1] * len(token.q), dtype=torch.int32)
        self.as_given = self.heads.tolist() == list(range(token.q.shape[1]))

    def step(self, q: Tensor) -> Tensor:
        own = q if self.as_given else q.index_select(1, self.heads)
        return torch.ops.attnopt.span_decode(own, self.k, self.v, self.starts, self.filled, self.scale, *self.own)


class LinearTail:
    """The far part of some heads that share a kind and width of feature map, as a state that each step adds to."""

    def __init__(
        self, site: Site, token: Token, heads: Sequence[int], choices: Sequence[Choice], fitted: Fitted
    ) -> None:
        of = [choices[h] for h in heads]
        found = fitted.map_of(site.name, CANDIDATES[of[0].candidate].map_name(dict(of[0].params)), heads)
        spans = [span_of(c, token.length) for c in of]
        self.heads = torch.tensor(heads, dtype=torch.int32)
        self.kind, self.maps = found.kind, found.tensors
        sinks, windows = (torch.tensor([s[n] for s in spans], dtype=torch.int32) for n in (0, 1))
        # As the token before left it: what leaves the window now is added by the step.
        past = [x[:, :, :-1] for x in (token.k, token.v)]
        self.state = torch.ops.attnopt.linear_state(
            *past, self.heads, site.heads, sinks, windows, None, *self.maps, self.kind
        )
        kv = [h // token.share for h in heads]
        leaving = [token.length - 1 - w for _, w in spans]
        self.k, self.v = (x[:, kv, leaving].contiguous() for x in (token.k, token.v))
        there = [at if last >= s else -1 for at, ((s, _), last) in enumerate(zip(spans, leaving, strict=True))]
        self.slots = torch.tensor([there] * len(token.q), dtype=torch.int32)

    def step(self, q: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.attnopt.linear_decode(
            q, self.k, self.v, self.slots, self.heads, self.state, *self.maps, self.kind
        )


class MeanTail:
    """The far part of some heads as sums of keys and values and their count; plain torch, in float32."""

    def __init__(
        self, site: Site, token: Token, heads: Sequence[int], choices: Sequence[Choice], fitted: Fitted
    ) -> None:
        self.heads, self.scale = torch.tensor(heads), site.scale
        sums, counts, leaving = [], [], []
        for h in heads:
            sinks, window = span_of(choices[h], token.length)
            end = token.length - window
            both = torch.cat([x[:, h // token.share].float() for x in (token.k, token.v)], -1)
            sums.append(both[:, sinks : end - 1].sum(1))
            leaving.append(both[:, end - 1])
            counts.append(end - sinks)
        self.sums, self.leaving = torch.stack(sums, 1)[:, :, None], torch.stack(leaving, 1)[:, :, None]
        self.counts = torch.tensor(counts, dtype=torch.float32)[None, :, None]
        self.dim = token.q.shape[3]

    def step(self, q: Tensor) -> tuple[Tensor, Tensor]:
        self.sums += self.leaving
        means = self.sums / self.counts[..., None]
        scores = (q.index_select(1, self.heads).float() * means[..., : self.dim]).sum(-1)
        return means[..., self.dim :], self.scale * scores + self.counts.log()


class Hybrid:
    """KV heads of one capacity that have query heads with a far part."""

    def __init__(
        self, site: Site, token: Token, choices: Sequence[Choice], groups: Sequence[int], fitted: Fitted
    ) -> None:
        share, length, self.scale = token.share, token.length, site.scale
        heads = [h for g in groups for h in range(g * share, (g + 1) * share)]
        spans = [span_of(choices[h], length) for h in heads]
        whole = union(spans, length)
        at = kept(whole, length)
        self.heads, self.shape = torch.tensor(heads), (len(token.q), len(groups), share, token.q.shape[3])
        self.k, self.v = (x[:, groups][:, :, at].contiguous() for x in (token.k, token.v))
        place = torch.tensor(at)
        rows = torch.stack([(place < s) | (length - 1 - place < w) for s, w in spans])
        # Additive, where a head keeps less than its KV head holds.
        mask = torch.zeros(rows.shape, dtype=token.q.dtype).masked_fill_(~rows, float("-inf"))
        self.mask = None if bool(rows.all()) else mask.view(1, *self.shape[1:3], -1)
        users: dict[str, list[int]] = {}
        for h in heads:
            if far_of(choices[h], length) in TAILS:
                name = CANDIDATES[choices[h].candidate].map_name(dict(choices[h].params))
                users.setdefault(name, []).append(h)
        self.tails = [TAILS[far_of(choices[of[0]], length)](site, token, of, choices, fitted) for of in users.values()]
        self.places = [torch.tensor([heads.index(h) for h in of]) for of in users.values()]

    def step(self, q: Tensor) -> Tensor:
        own = q if len(self.heads) == q.shape[1] else q.index_select(1, self.heads)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            own.reshape(self.shape), self.k, self.v, attn_mask=self.mask, scale=self.scale
        )
        out, lse = out.reshape(len(q), len(self.heads), 1, -1), lse.reshape(len(q), -1, 1)
        if len(self.tails) == 1 and len(self.places[0]) == len(self.heads):
            return merge(out, lse, *self.tails[0].step(q))
        for at, tail in zip(self.places, self.tails, strict=True):
            out[:, at] = merge(out[:, at], lse[:, at], *tail.step(q))
        return out


TAILS = {"linear": LinearTail, "mean": MeanTail}


class Layer:
    """A site's cache after N tokens under `choices`; each `step` is one more query."""

    def __init__(self, site: Site, token: Token, choices: Sequence[Choice], fitted: Fitted) -> None:
        spans = [span_of(c, token.length) for c in choices]
        by: dict[int, list[int]] = {}
        for g in range(site.kv_heads):
            own = range(g * token.share, (g + 1) * token.share)
            capacity = sum(union([spans[h] for h in own], token.length))
            tailed = any(far_of(choices[h], token.length) in TAILS for h in own)
            by.setdefault(capacity if tailed else -1, []).append(g)
        plain = [g for g in by.pop(-1, []) if sum(spans[g * token.share]) or token.share > 1]
        self.blocks: list[Plain | Hybrid] = [Plain(site, token, spans, plain)] if plain else []
        self.blocks += [Hybrid(site, token, choices, groups, fitted) for groups in by.values()]
        done = torch.cat([block.heads for block in self.blocks]) if self.blocks else torch.zeros(0, dtype=torch.long)
        gone = [h for h in range(site.heads) if far_of(choices[h], token.length) == "gone"]
        self.constants = fitted.mean_of(site.name, gone)[None, :, None].to(token.v.dtype) if gone else None
        self.gone, self.done, self.heads = torch.tensor(gone, dtype=torch.long), done, site.heads
        self.in_order = not gone and done.tolist() == list(range(site.heads))

    def step(self, q: Tensor) -> Tensor:
        """q (B, H, 1, D) -> (B, H, 1, Dv). Heads that are gone would be part of a bias; here they are put in."""
        found = [block.step(q).to(q.dtype) for block in self.blocks]
        if self.in_order:
            return found[0] if len(found) == 1 else torch.cat(found, 1)
        out = q.new_empty(len(q), self.heads, 1, self.width(found))
        if found:
            out[:, self.done] = torch.cat(found, 1)
        if self.constants is not None:
            out[:, self.gone] = self.constants
        return out

    def width(self, found: Sequence[Tensor]) -> int:
        return found[0].shape[3] if found else self.constants.shape[3]  # type: ignore[union-attr]


def expected(site: Site, token: Token, choices: Sequence[Choice], fitted: Fitted) -> Tensor:
    """What `Layer.step` is to return, by the definition, sequence by sequence and head by head in float64."""
    if len(token.q) > 1:
        parts = zip(token.q, token.k, token.v, strict=True)
        return torch.cat([expected(site, Token(*(x[None] for x in part)), choices, fitted) for part in parts])
    q, k, v = (x.double() for x in (token.q, token.k, token.v))
    rows, length = [], token.length
    for h, choice in enumerate(choices):
        far = far_of(choice, length)
        if far == "gone":
            rows.append(fitted.mean_of(site.name, [h])[0].double())
            continue
        key, value, query = k[0, h // token.share], v[0, h // token.share], q[0, h]
        scores = (key @ query[0]) * site.scale
        sinks, window = span_of(choice, length)
        there = slice(sinks, length - window)
        if far == "linear":
            found = fitted.map_of(site.name, CANDIDATES[choice.candidate].map_name(dict(choice.params)), [h])
            features, shift = query_features(query[None], found)
            scores[there] = (key_features(key[None, there], found) @ features[0, 0])[0].log() + shift[0, 0]
        elif far == "mean":
            scores[there] = site.scale * (key[there].mean(0) @ query[0])
        else:
            scores[there] = float("-inf")
        rows.append(scores.softmax(-1) @ value)
    return torch.stack(rows)[None, :, None]
