"""How an emitted masked prefill checks and times itself: ``check(spec, attend)``, on data made up for its form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.codegen import self_check
from attnopt.codegen.equal_runs import equal_runs, kept_runs
from attnopt.codegen.reference_masked import attend as reference
from attnopt.codegen.self_check import TOLERANCE, Check, Race
from attnopt.codegen.self_check_prefill import SCALE, TIMED
from attnopt.codegen.spec import MaskedPrefill
from attnopt.masks.expressions import Affine
from attnopt.masks.kernel_form import Form, Slot, form_from
from attnopt.masks.live_range import documents, flags

BATCH = 2
# What stands for a size known at run time only, such as how far the queries are behind the keys.
SIZE = 3
Inputs = tuple[Tensor, Tensor, Tensor, list[Tensor], list[int], Tensor | None]


def check(spec: MaskedPrefill, attend: Callable[..., Tensor]) -> NoReturn:
    """Compare an emitted file with the reference, time it against dense SDPA, and exit."""
    device, form = self_check.device_of(spec.target), form_from(spec.form)
    self_check.run(spec, device, _checks(spec, form, attend, device), _races(spec, form, attend, device))


def extent(index: Affine, length: int, heads: int) -> int:
    """Entries that a dimension needs to be read at `index` for every position of `length` queries and keys."""
    sizes = {"b": BATCH, "h": heads, "i": length, "j": length}
    (name, factor), *more = index.terms or ((None, 0),)
    plain = not more and factor == 1 and isinstance(name, str) and name in sizes
    if isinstance(index.constant, int) and index.constant >= 0 and (plain or name is None):
        return index.constant + (sizes[name] if isinstance(name, str) else 1)
    # Computed: it may be negative too, and is then counted from the end.
    return 4 * (length + heads) + 64


def data_of(form: Form, slot: Slot, length: int, heads: int) -> Tensor:
    """Random entries for a slot: most flags true, few different integers above 0, normal numbers."""
    read = [r.index for r in form.reads if r.node == slot]
    shape = [max(extent(index[d], length, heads) for index in read) for d in range(len(read[0]))]
    if slot.dtype == "bool":
        return torch.rand(shape) > 0.3
    dtype = getattr(torch, slot.dtype)
    return torch.randn(shape).to(dtype) if dtype.is_floating_point else torch.randint(1, 5, shape).to(dtype)


def inputs_of(spec: MaskedPrefill, form: Form, length: int, device: torch.device, batch: int = BATCH) -> Inputs:
    """q, k, v as a model's projections lay them out, the form's tensors, sizes and sink."""
    torch.manual_seed(0)
    sizes = (spec.heads, spec.head_dim), (spec.kv_heads, spec.head_dim), (spec.kv_heads, spec.head_dim_v)
    made = [torch.randn(batch, length, *size).to(device, getattr(torch, spec.dtype)) for size in sizes]
    q, k, v = (t.transpose(1, 2) for t in made)
    last = max((slot.number for slot in form.slots), default=-1)
    held = {slot.number: data_of(form, slot, length, spec.heads).to(device) for slot in form.slots}
    tensors = [held.get(n, torch.empty(0, device=device)) for n in range(last + 1)]
    tensors += [equal_runs(tensors[read.node.number]) for read in documents(form)]
    tensors += [kept_runs(tensors[flag.node.number]) for flag in flags(form)]
    shape = {"h": (spec.heads,), "bhi": (batch, spec.heads, length)}.get(form.sink)
    sink = None if shape is None else torch.randn(shape, device=device)
    return q, k, v, tensors, [SIZE] * form.sizes, sink


def wide(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.double() if t.is_floating_point() else t for t in tensors]


def _checks(spec: MaskedPrefill, form: Form, attend: Callable[..., Tensor], device: torch.device) -> Iterator[Check]:
    for length in (1, 65, 200):
        q, k, v, tensors, sizes, sink = inputs_of(spec, form, length, device)
        rest = wide(tensors), sizes, sink if sink is None else sink.double(), SCALE, form
        exact = partial(reference, q.double(), k.double(), v.double(), *rest)
        # Every weight with the value before its own.
        wrong = partial(reference, q.double(), k.double(), v.double().roll(1, 2), *rest)
        found = partial(attend, q, k, v, tensors, sizes, sink, SCALE)
        yield Check(f"out, N = {length}", found, exact, TOLERANCE[spec.dtype], wrong if length > 1 else None)


def _races(spec: MaskedPrefill, form: Form, attend: Callable[..., Tensor], device: torch.device) -> Iterator[Race]:
    if spec.target == "reference":
        return
    length = TIMED[device.type]
    q, k, v, tensors, sizes, sink = inputs_of(spec, form, length, device, batch=1)
    own = partial(attend, q, k, v, tensors, sizes, sink, SCALE)
    dense = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True, scale=SCALE, enable_gqa=True)
    yield Race(f"N = {length}", {"this kernel": own, "dense causal SDPA, no mask": dense})
