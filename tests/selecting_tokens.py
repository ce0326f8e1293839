"""Steps of decoding whose heads select tokens, one after the other, through any kernel of `TokenStep`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from attnopt.codegen.reference_token_step import relabel
from attnopt.codegen.reference_tokens import TokenRule
from attnopt.codegen.self_check_tokens import SCALE, put, state
from attnopt.codegen.spec import TokenStep

Step = Callable[..., None]
RULES = {
    "each step": [TokenRule(7, 1, 2)] * 4,
    "of all kinds": [
        TokenRule(9, 2, 5, every=3), None, TokenRule(4, every=99, similar=0.9), TokenRule(300),
        TokenRule(6, 1, 1, channels=5), TokenRule(6, channels=16, every=2), TokenRule(5, sink=99), TokenRule(1),
    ],
    "more rows than one by one": [TokenRule(3 + h % 5, recent=h % 2, every=1 + h % 3) for h in range(20)],
}  # fmt: skip


def inputs(heads: int, groups: int, length: int, dims: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    made = torch.Generator().manual_seed(length)
    sizes = (heads, dims[0]), (groups, dims[0]), (groups, dims[1])
    q, k, v = (torch.randn(2, n, length, dim, generator=made) for n, dim in sizes)
    # Values of few bits: scores are exact in every dtype, and many of them equal.
    q[:, :, 1:] = torch.where(torch.rand(2, heads, length - 1, 1, generator=made) < 0.5, q[:, :, :-1], q[:, :, 1:])
    return [(2 * x).round().clamp(-3, 3).div(4).to(dtype) for x in (q, k, v)]


def row(rule: TokenRule | None, source: int = -1) -> tuple[int, ...]:
    """As a table of rules has it; None for a head that does not select."""
    if rule is None:
        return 0, 0, 0, 0, 0, -1
    return rule.count, rule.sink, rule.recent, rule.every, rule.channels, source


def decode(
    step: Step, q: Tensor, k: Tensor, v: Tensor, rules: Sequence[TokenRule | None], prompt: int = 0,
    valid: Tensor | None = None, sources: Callable[[int], list[Tensor]] = lambda at: [], of: Sequence[int] = (),
    capacity: int = 0,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The outputs (B, H, N - prompt, Dv) of the steps behind a prompt, and the state in the end. valid bool (B, N);
    sources: what earlier layers hold at a step; of: the source of each head. Slots that hold nothing are NaN."""
    batch, heads, length, dim = q.shape
    spec = TokenStep("reference", str(q.dtype)[6:], heads, k.shape[1], dim, v.shape[3])
    rows = [row(rule, source) for rule, source in zip(rules, of or [-1] * heads, strict=True)]
    held = state(spec, capacity or length, batch, q.dtype, rows, q.device)
    held["similar"].copy_(torch.tensor([rule.similar if rule else 0.0 for rule in rules]))
    put(held, k[:, :, :prompt], v[:, :, :prompt])
    if held["chosen"].shape[2]:
        relabel(q[:, :, :prompt], None, held["keys"], held["n"], held["table"], held["chosen"], held["labels"])
    found = []
    names = ("rules", "similar", "picked", "asked", "age")
    for at in range(prompt, length):
        here = slice(at, at + 1)
        counts = None if valid is None else valid[:, here]
        before = held["n"].clone()
        put(held, k[:, :, here], v[:, :, here])
        if counts is not None:
            held["n"].copy_(torch.where(counts[:, 0], held["n"], before))
        out = torch.full((batch, heads, 1, v.shape[3]), torch.nan, dtype=q.dtype)
        given = held["keys"], held["values"], held["n"], counts, held["table"], *(held[name] for name in names)
        step(q[:, :, here], *given, sources(at), held["chosen"], held["labels"], SCALE, out)
        found.append(out)
    return torch.cat(found, 2), held
