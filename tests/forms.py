"""Forms of masked attention that several tests share, each with a near neighbour that must not pass for it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnopt.codegen.equal_runs import equal_runs, kept_runs
from attnopt.masks.expressions import Affine, Quotient, Read
from attnopt.masks.kernel_form import Form, Slot
from attnopt.masks.live_range import documents, flags
from attnopt.masks.predicates import BoolLoad, at_least_zero, equal_zero, single
from attnopt.masks.values import Sum

B, H, G = 2, 4, 2
QUERY, J, BATCH, HEAD = (Affine.var(name) for name in "ijbh")
ZERO = Affine()


def read(*index: Affine, dtype: str = "int64", number: int = 0) -> Read:
    return Read(Slot(number, dtype), index)


def value(*index: Affine, **more) -> Affine:
    return Affine.var(read(*index, **more))


def window(width: int):
    return at_least_zero(J - QUERY + width - 1)


def first(count):
    """j < count"""
    return at_least_zero((count if isinstance(count, Affine) else Affine((), count)) - J - 1)


CAUSAL = at_least_zero(QUERY - J)
PAD = single(BoolLoad(Slot(0, "bool"), (BATCH, J)))
SLOPE = read(HEAD, ZERO, ZERO, dtype="float32")
TABLE = read(HEAD, QUERY - J + 40, dtype="float32")


def chunk(size: int):
    return equal_zero(Affine.var(Quotient(QUERY, size)) - Affine.var(Quotient(J, size)))


class Case(NamedTuple):
    """near: a form that differs by little; data: what t0, t1, ... hold, by the name of a maker below."""

    form: Form
    near: Form
    data: tuple[str, ...] = ()
    more_keys: int = 0
    dtype: str = "float32"


CASES = {
    "all, soft-capped": Case(Form(softcap=3.0), Form(softcap=2.5)),
    "causal, soft-capped": Case(Form(CAUSAL, softcap=3.0), Form(CAUSAL)),
    "causal behind a cache, sink 0": Case(
        Form(at_least_zero(QUERY - J + Affine.var("s0")), sink="0"),
        Form(at_least_zero(QUERY - J + Affine.var("s0"))),
        more_keys=30,
    ),
    "window and padding": Case(Form(CAUSAL & window(30) & PAD), Form(CAUSAL & window(31) & PAD), ("pad",)),
    "causal and padding on the left, soft-capped": Case(
        Form(CAUSAL & PAD, softcap=3.0), Form(CAUSAL & PAD, softcap=2.0), ("left",)
    ),
    "first keys and a window, sink of a head": Case(
        Form(CAUSAL & (first(4) | window(20)), sink="h"), Form(CAUSAL & (first(5) | window(20)), sink="h")
    ),
    "both sides": Case(
        Form(at_least_zero(QUERY - J + 20) & window(21)), Form(at_least_zero(QUERY - J + 19) & window(21))
    ),
    "chunked, sink of a row": Case(Form(CAUSAL & chunk(24), sink="bhi"), Form(CAUSAL & chunk(25), sink="bhi")),
    "packed documents": Case(
        Form(CAUSAL & equal_zero(value(BATCH, QUERY) - value(BATCH, J))), Form(CAUSAL), ("documents",)
    ),
    "documents in any order, both sides": Case(
        Form(equal_zero(value(BATCH, QUERY) - value(BATCH, J))), Form(), ("any documents",)
    ),
    "prefix": Case(Form(CAUSAL | first(value(BATCH))), Form(CAUSAL | first(value(BATCH) + 1)), ("start",)),
    "the next entry's start": Case(
        Form(CAUSAL & first(value(BATCH + 1))), Form(CAUSAL & first(value(BATCH))), ("starts",)
    ),
    "rows and keys padded": Case(
        Form(PAD & single(BoolLoad(Slot(0, "bool"), (BATCH, QUERY)))), Form(PAD), ("pad",)
    ),
    "alibi": Case(
        Form(CAUSAL, Sum.of({(SLOPE, "j"): 1.0, (SLOPE, "i"): -1.0})),
        Form(CAUSAL, Sum.of({(SLOPE, "j"): 1.01, (SLOPE, "i"): -1.0})),
        ("slopes",),
    ),
    "table of distances": Case(Form(CAUSAL & window(40), Sum.atom(TABLE)), Form(CAUSAL & window(40)), ("table",)),
    # Backwards where the index is negative.
    "table read from its end": Case(
        Form(added=Sum.atom(read(HEAD, QUERY - J, dtype="float32"))),
        Form(added=Sum.atom(read(HEAD, J - QUERY, dtype="float32"))),
        ("table",),
    ),
    "one row of flags": Case(
        Form(single(BoolLoad(Slot(0, "bool"), (BATCH, ZERO + 2, J)))),
        Form(single(BoolLoad(Slot(0, "bool"), (BATCH, ZERO + 1, J)))),
        ("rows of flags",),
    ),
    "data over pairs": Case(
        Form(CAUSAL, Sum.of({(read(BATCH, ZERO, QUERY, J, dtype="float32"),): 2.0})),
        Form(CAUSAL, Sum.of({(read(BATCH, ZERO, QUERY, J, dtype="float32"),): 2.1})),
        ("pairs",),
    ),
    "flags over pairs": Case(
        Form(single(BoolLoad(Slot(0, "bool"), (BATCH, ZERO, QUERY, J), True))), Form(), ("flags",)
    ),
    "float16": Case(Form(CAUSAL & window(30) & PAD), Form(CAUSAL & window(31) & PAD), ("pad",), dtype="float16"),
    "bfloat16": Case(
        Form(CAUSAL, Sum.of({(read(BATCH, ZERO, QUERY, J, dtype="bfloat16"),): 1.0}), sink="h"),
        Form(CAUSAL, Sum.of({(read(BATCH, ZERO, QUERY, J, dtype="bfloat16"),): 1.0})),
        ("half pairs",),
        dtype="bfloat16",
    ),
}  # fmt: skip


def data_of(name: str, queries: int, keys: int) -> Tensor:
    makers = {
        "pad": lambda: torch.rand(B, keys) > 0.3,
        "left": lambda: torch.arange(keys) >= torch.tensor([[keys // 7], [0]]),
        "documents": lambda: torch.randint(0, 4, (B, keys)).sort(descending=True).values,
        "any documents": lambda: (
            torch.randint(0, 3, (B, keys // 10 + 1)).repeat_interleave(10, 1)[:, :keys].contiguous()
        ),
        "start": lambda: torch.tensor([keys // 2 + 5, 3]),
        "starts": lambda: torch.tensor([5, keys // 2 + 3, 40]),
        "slopes": lambda: torch.rand(H, 1, 1) + 0.1,
        # Transposed, and wider than what is read.
        "table": lambda: torch.randn(90, H).t(),
        "rows of flags": lambda: torch.rand(B, 3, keys) > 0.4,
        "pairs": lambda: torch.randn(B, 1, queries, keys),
        "half pairs": lambda: torch.randn(B, 1, queries, keys).bfloat16(),
        "flags": lambda: torch.rand(B, 1, queries, keys) > 0.6,
    }
    return makers[name]()


def sink_of(kind: str, queries: int) -> Tensor | None:
    return {"h": torch.randn(H), "bhi": torch.randn(B, H, queries)}.get(kind)


def inputs_of(case: Case, queries: int, dim: int = 16) -> tuple:
    """q, k, v, tensors, sizes, sink, scale: what ``attend`` takes."""
    keys = queries + case.more_keys
    dtype = getattr(torch, case.dtype)
    q, k, v = (
        torch.randn(B, length, heads, dim).to(dtype).transpose(1, 2)
        for length, heads in ((queries, H), (keys, G), (keys, G))
    )
    sizes = [case.more_keys] if case.form.sizes else []
    data = [data_of(name, queries, keys) for name in case.data]
    # What kernels that leave out other documents and padding get beside.
    data += [equal_runs(data[read.node.number]) for read in documents(case.form)]
    data += [kept_runs(data[load.node.number]) for load in flags(case.form)]
    return q, k, v, data, sizes, sink_of(case.form.sink, queries), 0.4


def doubled(inputs: tuple) -> tuple:
    return (*(x.double() for x in inputs[:3]), *inputs[3:])


def error(found: Tensor, expected: Tensor) -> float:
    """Relative Frobenius norm."""
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-30))
