"""Kernels with a mask printed into them: one check for each kind of predicate and of score modifier."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from attnopt.codegen.emit import load
from attnopt.codegen.equal_runs import equal_runs
from attnopt.codegen.reference_masked import attend as reference
from attnopt.codegen.self_check import TOLERANCE
from attnopt.codegen.spec import MaskedPrefill
from attnopt.masks.expressions import Affine, Quotient, Read
from attnopt.masks.kernel_form import Form, Slot
from attnopt.masks.live_range import documents
from attnopt.masks.predicates import BoolLoad, at_least_zero, equal_zero, single
from attnopt.masks.values import Sum
from benchmarks.cuda.check import Check, prefill_inputs
from benchmarks.cuda.device import Device
from benchmarks.spans import Sizes

QUERY, J, BATCH, HEAD = (Affine.var(name) for name in "ijbh")
CAUSAL = at_least_zero(QUERY - J)
PAD = single(BoolLoad(Slot(0, "bool"), (BATCH, J)))
SLOPE = Read(Slot(0, "float32"), (HEAD,))
DOCUMENT = [Affine.var(Read(Slot(0, "int64"), (BATCH, at))) for at in (QUERY, J)]
BATCHES = 2


def window(width: int):  # type: ignore[no-untyped-def]
    """i - j < width"""
    return at_least_zero(J - QUERY + width - 1)


def first(count: int):  # type: ignore[no-untyped-def]
    """j < count"""
    return at_least_zero(Affine((), count) - J - 1)


def forms(length: int) -> dict[str, Form]:
    """Name -> form; t0 is what `data` makes for it."""
    wide, chunk = max(2, length // 3), max(2, length // 4)
    block = equal_zero(Affine.var(Quotient(QUERY, chunk)) - Affine.var(Quotient(J, chunk)))
    return {
        "causal, soft-capped": Form(CAUSAL, softcap=5.0),
        "window, padding": Form(CAUSAL & window(wide) & PAD),
        "first keys and a window, sink of a head": Form(CAUSAL & (first(5) | window(wide)), sink="h"),
        "chunks": Form(CAUSAL & block),
        "documents": Form(CAUSAL & equal_zero(DOCUMENT[0] - DOCUMENT[1])),
        "ALiBi": Form(CAUSAL, Sum.of({(SLOPE, "j"): 1.0, (SLOPE, "i"): -1.0})),
    }


def data(form: Form, heads: int, length: int, device: Device) -> list[Tensor]:
    """What the form's slot stands for: a padding mask that keeps the first key, documents in order, slopes; behind it
    where the runs of documents lie, which the kernel bounds its keys by."""
    if not form.slots:
        return []
    made: dict[str, Callable[[], Tensor]] = {
        "bool": lambda: (torch.rand(BATCHES, length, device=device.where) > 0.3).index_fill_(
            1, torch.zeros(1, dtype=torch.long, device=device.where), True
        ),
        "int64": lambda: torch.randint(0, 4, (BATCHES, length), device=device.where).sort(1).values,
        "float32": lambda: torch.rand(heads, device=device.where) + 0.1,
    }
    found = made[form.slots[0].dtype]()
    return [found, *(equal_runs(found) for _ in documents(form))]


def masked_checks(sizes: Sizes, device: Device) -> Iterator[Check]:
    """Every form at the lengths that are checked, in bfloat16; the first length also in the other head dimensions."""
    target = device.target_of("masked_prefill")
    for dim in sizes.dims:
        for length in sizes.checked if dim == sizes.dims[0] else sizes.checked[:1]:
            for name, form in forms(length).items():
                q, k, v = prefill_inputs(sizes, dim, length, "bfloat16", device)
                sink = torch.randn(sizes.heads, device=device.where) if form.sink else None
                held = data(form, sizes.heads, length, device), [], sink, dim**-0.5
                spec = MaskedPrefill(target, "bfloat16", sizes.heads, sizes.kv_heads, dim, dim, form.text)
                yield Check(
                    "masked", f"{name}, D = {dim}, {length} tokens",
                    lambda spec=spec, x=(q, k, v), h=held: load(spec).attend(*x, *h),
                    lambda x=(q, k, v), h=held, form=form: reference(*(t.double() for t in x), *h, form=form),
                    TOLERANCE["bfloat16"],
                )  # fmt: skip
