"""A step of heads that select tokens on the CPU: the compiled kernel, tokens.cpp, or torch's operators without it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from attnopt.codegen import native
from attnopt.codegen.reference_token_step import step as by_operators


def step(
    q: Tensor, keys: Tensor, values: Tensor, n: Tensor, valid: Tensor | None, table: Tensor, rules: Tensor,
    similar: Tensor, picked: Tensor, asked: Tensor, age: Tensor, sources: Sequence[Tensor], chosen: Tensor,
    labels: Tensor, scale: float, out: Tensor,
) -> None:  # fmt: skip
    """The contract of attnopt/codegen/reference_token_step.py."""
    if not q.numel():
        return
    state = n, valid, table, rules, similar, picked, asked, age, sources, chosen, labels
    ours = scale > 0 and native.takes(q.dtype, q.shape[3], values.shape[2], "tokens")
    ours = ours and keys.stride(2) == values.stride(2) == out.stride(3) == 1
    whole = (n, table, rules, similar, picked, asked, age, chosen, labels, *sources)
    run = native.pick if ours and all(x.is_contiguous() for x in whole) else by_operators
    run(q, keys, values, *state, scale, out)
