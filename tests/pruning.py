"""What the tests of pruning share: attentions in many spellings, whose heads can be replaced by constants."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from models import make_plan
from torch import Tensor, nn
from tracing import Traced, trace

from attnopt.fitted import Fitted, Header
from attnopt.ir import DENSE, Choice

PRUNED = Choice("pruned")
WIDTH, LENGTH, BATCH = 24, 13, 2


class Attention(nn.Module):
    """(B, N, WIDTH) -> (B, N, WIDTH); `constants` are the heads that are a vector instead, which is the definition of
    pruning. Subclasses say how q, k and v are made."""

    def __init__(self, heads: int = 4, groups: int = 4, dim: int = 8, bias: bool = True) -> None:
        super().__init__()
        self.heads, self.groups, self.dim = heads, groups, dim
        self.constants: dict[int, Tensor] = {}
        self.build(bias)
        self.o = nn.Linear(heads * dim, WIDTH, bias=bias)

    def build(self, bias: bool) -> None:
        self.q = nn.Linear(WIDTH, self.heads * self.dim, bias=bias)
        self.k = nn.Linear(WIDTH, self.groups * self.dim, bias=bias)
        self.v = nn.Linear(WIDTH, self.groups * self.dim, bias=bias)

    def split(self, x: Tensor) -> Tensor:
        """(B, N, heads * D) -> (B, heads, N, D)"""
        return x.view(*x.shape[:2], -1, self.dim).transpose(1, 2)

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.groups)

    def output(self, out: Tensor) -> Tensor:
        return self.o(out.transpose(1, 2).reshape(out.shape[0], out.shape[2], -1))

    def forward(self, x: Tensor) -> Tensor:
        out = self.attend(*self.operands(x))
        if self.constants:
            heads = [self.constants[h].to(out).expand_as(out[:, h]) if h in self.constants else out[:, h]
                     for h in range(self.heads)]  # fmt: skip
            out = torch.stack(heads, 1)
        return self.output(out)


class Thirds(Attention):
    """One projection, cut into q, k and v."""

    def build(self, bias: bool) -> None:
        self.parts = [self.heads * self.dim, self.groups * self.dim, self.groups * self.dim]
        self.qkv = nn.Linear(WIDTH, sum(self.parts), bias=bias)

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).split(self.parts, dim=-1)
        return self.split(q), self.split(k), self.split(v)


class Stacked(Thirds):
    """q, k and v as a dimension of their own, before the heads."""

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.heads, self.dim).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v


class Chunked(Thirds):
    """q, k and v beside each other in every head, as in GPT-NeoX."""

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).view(*x.shape[:2], self.heads, 3 * self.dim).transpose(1, 2).chunk(3, dim=-1)
        return q, k, v


class Falcon(Thirds):
    """Each group's queries, its key and its value beside each other."""

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        own = self.heads // self.groups
        packed = self.qkv(x).view(*x.shape[:2], self.groups, own + 2, self.dim)
        q, k, v = packed[..., :-2, :].flatten(2, 3), packed[..., -2, :], packed[..., [-1], :].flatten(2, 3)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class Conv(Thirds):
    """A projection as GPT-2 writes it: addmm on rows, the weight (in, out)."""

    def build(self, bias: bool) -> None:
        super().build(bias)
        self.weight = nn.Parameter(torch.randn(WIDTH, sum(self.parts)) / 4)
        self.bias = nn.Parameter(torch.randn(sum(self.parts)))
        self.out_weight = nn.Parameter(torch.randn(self.heads * self.dim, WIDTH) / 4)

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.addmm(self.bias, x.view(-1, WIDTH), self.weight).view(*x.shape[:2], -1)
        q, k, v = rows.split(self.parts, dim=2)
        return self.split(q), self.split(k), self.split(v)

    def output(self, out: Tensor) -> Tensor:
        rows = out.transpose(1, 2).reshape(-1, self.heads * self.dim)
        return torch.mm(rows, self.out_weight).view(out.shape[0], out.shape[2], WIDTH)


class Einsum(Attention):
    """Weights (H, WIDTH, D), no head ever merged with its features, and the output summed over both."""

    def build(self, bias: bool) -> None:
        self.w = nn.ParameterList(nn.Parameter(torch.randn(h, WIDTH, self.dim) / 4)
                                  for h in (self.heads, self.groups, self.groups))  # fmt: skip

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (torch.einsum("bnc,hcd->bhnd", x, w) for w in self.w)
        return q, k, v


class Rotated(Attention):
    """RoPE by halves on q; on k by pairs, as complex numbers; both normalised per head before, with weights."""

    def build(self, bias: bool) -> None:
        super().build(bias)
        self.norm, self.layer_norm = nn.RMSNorm(self.dim), nn.LayerNorm(self.dim)
        self.scale = nn.Parameter(torch.rand(self.dim) + 0.5)

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().operands(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        angles = torch.arange(x.shape[1])[:, None].to(wide) / 3 ** torch.arange(self.dim // 2).to(wide)
        cos, sin = (torch.cat([f(angles), f(angles)], -1).to(x.dtype) for f in (torch.cos, torch.sin))
        q = self.scale * (q * torch.rsqrt(q.to(wide).pow(2).mean(-1, keepdim=True) + 1e-6).to(x.dtype))
        half = torch.cat([-q[..., self.dim // 2 :], q[..., : self.dim // 2]], -1)
        pairs = self.layer_norm(k).to(wide).reshape(*k.shape[:3], -1, 2)
        turned = torch.view_as_complex(pairs) * torch.polar(torch.ones_like(angles), angles)
        return q * cos + half * sin, torch.view_as_real(turned).flatten(3).type_as(x), self.norm(v)


class Adapted(Attention):
    """Low-rank adapters beside the projections of q, v and the output."""

    def build(self, bias: bool) -> None:
        super().build(bias)
        self.a = nn.ParameterList(nn.Parameter(torch.randn(3, n) / 3) for n in (WIDTH, WIDTH, self.heads * self.dim))
        sizes = self.heads * self.dim, self.groups * self.dim, WIDTH
        self.b = nn.ParameterList(nn.Parameter(torch.randn(n, 3) / 3) for n in sizes)

    def low_rank(self, n: int, x: Tensor) -> Tensor:
        return 0.5 * F.linear(F.linear(x, self.a[n]), self.b[n])

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, v = self.q(x) + self.low_rank(0, x), self.v(x) + self.low_rank(1, x)
        return self.split(q), self.split(self.k(x)), self.split(v)

    def output(self, out: Tensor) -> Tensor:
        rows = out.transpose(1, 2).reshape(out.shape[0], out.shape[2], -1)
        return self.o(rows) + self.low_rank(2, rows)


class Dequantised(Attention):
    """Weights kept as 8-bit integers with a scale for each row, made whole before each product."""

    def build(self, bias: bool) -> None:
        own, shared = self.heads * self.dim, self.groups * self.dim
        for name, rows, width in (("q", own, WIDTH), ("k", shared, WIDTH), ("v", shared, WIDTH), ("p", WIDTH, own)):
            self.register_buffer(f"{name}_whole", torch.randint(-9, 9, (rows, width), dtype=torch.int8))
            self.register_buffer(f"{name}_scale", torch.rand(rows, 1) / 20)

    def weight(self, name: str) -> Tensor:
        scale = getattr(self, f"{name}_scale")
        return getattr(self, f"{name}_whole").to(scale.dtype) * scale

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (self.split(F.linear(x, self.weight(name))) for name in "qkv")
        return q, k, v

    def output(self, out: Tensor) -> Tensor:
        return F.linear(out.transpose(1, 2).flatten(2), self.weight("p"), self.o.bias)


class Tied(Attention):
    """k is projected as q is, and the output by the transpose of what makes v."""

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.split(self.q(x)), self.split(self.q(x)), self.split(self.v(x))

    def output(self, out: Tensor) -> Tensor:
        return out.transpose(1, 2).flatten(2) @ self.v.weight


class WrittenOut(Attention):
    """The soft-max of a product under a boolean mask with padding, K and V repeated, heads folded into the batch."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(self.heads // self.groups, 1) for t in (k, v))
        length = q.shape[2]
        keep = torch.ones(length, length, dtype=torch.bool).tril()
        q, k, v = (t.reshape(-1, length, self.dim) for t in (q, k, v))
        scores = torch.bmm(q * self.dim**-0.5, k.transpose(1, 2)).masked_fill(~keep, float("-inf"))
        return torch.bmm(scores.softmax(-1), v).view(-1, self.heads, length, self.dim)


class Twice(nn.Module):
    """One attention module in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + self.layer(x))


def means_for(heads: int, dim: int = 8, seed: int = 3) -> Tensor:
    return torch.randn(heads, dim, generator=torch.Generator().manual_seed(seed))


def choices_for(heads: int, gone: Any, other: Choice = DENSE) -> tuple[Choice, ...]:
    return tuple(PRUNED if h in gone else other for h in range(heads))


def plan_of(choices: dict[str, tuple[Choice, ...]], means: dict[str, Tensor], **more: Any) -> Any:
    plan = make_plan(choices, **more)
    return replace(plan, fitted=Fitted(Header(plan.fingerprint), means=means))


def built(kind: type[Attention], *sizes: Any, seed: int = 0, **more: Any) -> Attention:
    torch.manual_seed(seed)
    return kind(*sizes, **more).eval()


def rows(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(5)).to(dtype)


def expected(module: nn.Module, x: Tensor, constants: dict[nn.Module, dict[int, Tensor]]) -> Tensor:
    """The module in float64, with the constants in the place of these heads."""
    names = {inner: name for name, inner in module.named_modules()}
    twin = copy.deepcopy(module).double()
    for inner, values in constants.items():
        twin.get_submodule(names[inner]).constants = values
    with torch.no_grad():
        return twin(x.double())


def pruned(module: Attention, gone: Any, x: Tensor | None = None, other: Choice = DENSE, **more: Any) -> Traced:
    """The traced run of a module whose one site has these heads removed."""
    plan = plan_of({"attention": choices_for(module.heads, gone, other)}, {"attention": means_for(module.heads)})
    return trace(module, rows() if x is None else x, plan=plan, **{"verify": False, **more})


def error(module: Attention, gone: Any, traced: Traced, x: Tensor | None = None) -> float:
    """The largest distance from the float64 reference."""
    means = means_for(module.heads)
    found = expected(module, rows() if x is None else x, {module: {h: means[h] for h in gone}})
    return float((traced.output - found).abs().max())
