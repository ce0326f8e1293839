"""How an emitted file of linear attention to far keys checks and times itself: ``check(spec, *functions)``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.codegen import reference_linear, self_check
from attnopt.codegen.self_check import TOLERANCE, Check, Race, Results
from attnopt.codegen.spec import Linear, LinearBackward, LinearDecode, LinearPrefill
from attnopt.feature_maps import FeatureMap, shapes

# Sinks and windows that the served heads take in turn; the last has nothing far at any length that is checked.
SINKS, WINDOWS = (0, 5, 64, 3), (7, 1, 40, 2**30)
# Tokens and the window that are timed, by type of device, and sequences that decode.
TIMED = {"cuda": (16384, 128, 16), "cpu": (2048, 128, 1)}


def check(spec: Linear, *functions: Callable[..., Any]) -> NoReturn:
    """Compare the functions of an emitted file with the reference, time the first, and exit."""
    device = self_check.device_of(spec.target)
    if isinstance(spec, LinearDecode):
        checks, races = _decode_checks(spec, *functions, device), _decode_races(spec, functions[0], device)
    elif isinstance(spec, LinearBackward):
        checks, races = _backward_checks(spec, *functions, device), iter(())
    else:
        assert isinstance(spec, LinearPrefill)
        checks, races = _prefill_checks(spec, *functions, device), _prefill_races(spec, functions[0], device)
    self_check.run(spec, device, checks, races)


def maps_of(spec: Linear, device: torch.device) -> FeatureMap:
    """Maps of exponents around 1."""
    torch.manual_seed(0)
    sizes = {"wq": 1.0, "wk": 1.0, "bq": 0.3, "bk": 0.3, "cq": 0.5, "ck": 0.5, "u": 1.0, "u0": 0.5}
    wide = shapes(spec.served, spec.rank, spec.head_dim)
    by_dim = ("wq", "wk", "u", "cq", "ck")
    scales = {n: x * (spec.head_dim**-0.5 if n in by_dim else 1.0) for n, x in sizes.items()}
    made = (torch.randn(shape, device=device) * scales[n] * 0.7 for n, shape in wide.items())
    return FeatureMap(spec.kind, *made)


def tables_of(spec: Linear) -> tuple[Tensor, Tensor, Tensor]:
    """heads, spread over the model's, and their sinks and windows, int32 (served,)."""
    heads = torch.arange(spec.served) * spec.heads // max(1, spec.served)
    turn = torch.arange(spec.served) % 4
    return heads.int(), *(torch.tensor(x, dtype=torch.int32)[turn] for x in (SINKS, WINDOWS))


def _inputs(spec: Linear, groups: int, batch: int, length: int, device: torch.device) -> list[Tensor]:
    """q, k, v as a model's projections lay them out: (B, heads, N, dim), physically (B, N, heads, dim)."""
    torch.manual_seed(length)
    sizes = (spec.heads, spec.head_dim), (groups, spec.head_dim), (groups, spec.head_dim_v)
    made = (torch.randn(batch, length, *size, device=device).to(getattr(torch, spec.dtype)) for size in sizes)
    return [x.transpose(1, 2) for x in made]


def _padding(spec: LinearPrefill, length: int, device: torch.device) -> Tensor | None:
    """pad bool (2, N): a third of the first entry, on the left. None if the spec knows no padding."""
    first = torch.tensor([[length // 3], [0]], device=device)
    return torch.arange(length, device=device) >= first if spec.padded else None


def _prefill_checks(
    spec: LinearPrefill, prefill: Callable[..., Results], state: Callable[..., Tensor], device: torch.device
) -> Iterator[Check]:
    heads, sinks, windows = tables_of(spec)
    maps, tolerance = maps_of(spec, device), TOLERANCE[spec.dtype]
    for length in (1, 65, 200):
        given = _inputs(spec, spec.kv_heads, 2, length, device)
        pad = _padding(spec, length, device)
        found = partial(prefill, *given, heads, sinks, windows, maps, pad)
        wide = [x.double() for x in given]
        expected, wrong = (
            partial(reference_linear.prefill, *wide, heads.to(device), sinks.to(device), at.to(device), maps, pad)
            for at in (windows, windows + 1)
        )
        # Of one token no head has a far key; the logarithms of sums are compared where there are some.
        yield Check(f"out, lse, N = {length}", found, expected, tolerance, wrong if length > 1 else None)
    rest = maps, pad
    kept = partial(state, *given[1:], heads, spec.heads, sinks, windows, *rest)
    at, off = (
        partial(reference_linear.state, *wide[1:], heads.to(device), spec.heads, sinks.to(device), w.to(device), *rest)
        for w in (windows, windows + 1)
    )
    yield Check(f"state, N = {length}", kept, at, tolerance, off)


def _backward_checks(
    spec: LinearBackward, backward: Callable[..., Results], device: torch.device
) -> Iterator[Check]:
    heads, sinks, windows = tables_of(spec)
    maps = maps_of(spec, device)
    for length in (1, 65, 200):
        given = _inputs(spec, spec.kv_heads, 2, length, device)
        pad = _padding(spec, length, device)
        wide = [x.double() for x in given]
        far = heads.to(device), sinks.to(device), windows.to(device)
        out, lse = reference_linear.prefill(*wide, *far, maps, pad)
        dout = torch.randn(2, length, spec.served, spec.head_dim_v, device=device).transpose(1, 2)
        dlse = torch.randn(lse.shape, device=device)
        dout = dout.to(given[0].dtype)
        found = partial(backward, dout, dlse, *given, out.to(dout.dtype), lse.float(), heads, sinks, windows, maps, pad)
        results = dout.double(), dlse.double(), *wide, out, lse
        expected = partial(reference_linear.backward, *results, *far, maps, pad)
        wrong = partial(reference_linear.backward, *results, *far[:2], far[2] + 1, maps, pad)
        # Gradients are sums of products that were themselves rounded: twice what a prefill may err.
        yield Check(
            f"dq, dk, dv, N = {length}", found, expected, 2 * TOLERANCE[spec.dtype], wrong if length > 1 else None
        )


def _decode_checks(
    spec: LinearDecode, decode: Callable[..., Results], state: Callable[..., Tensor], device: torch.device
) -> Iterator[Check]:
    heads, sinks, windows = tables_of(spec)
    maps, tolerance, batch = maps_of(spec, device), TOLERANCE[spec.dtype], 3
    q, k, v = (x for x in _inputs(spec, 1, batch, 65, device))
    keys, values = k[:, 0], v[:, 0]
    slots = torch.arange(batch * spec.served, dtype=torch.int32).view(batch, -1).to(device) % 66 - 1
    given = q[:, :, -1:], keys, values, slots, heads
    wide = *(x.double() for x in given[:3]), slots, heads.to(device)
    first = torch.rand(batch, spec.served, maps.width, spec.head_dim_v + 1, device=device)

    def stepped(step: Callable[..., Results], *held: Tensor, of: Tensor) -> Results:
        kept = of.clone()
        return *step(*held, kept, maps), kept

    found, expected = partial(stepped, decode, *given, of=first), partial(stepped, reference_linear.decode, *wide, of=first.double())
    off = *wide[:3], slots - 1, wide[4]
    yield Check("out, lse, state", found, expected, tolerance, partial(stepped, reference_linear.decode, *off, of=first.double()))
    tables = heads.to(device), spec.heads, sinks.to(device), windows.to(device), maps
    kept = partial(state, k, v, heads, spec.heads, sinks, windows, maps)
    yield Check("state of a prompt", kept, partial(reference_linear.state, k.double(), v.double(), *tables), tolerance)


def _prefill_races(spec: LinearPrefill, prefill: Callable[..., Results], device: torch.device) -> Iterator[Race]:
    if spec.target == "reference" or spec.padded:
        return
    length, window, _ = TIMED[device.type]
    q, k, v = _inputs(spec, spec.kv_heads, 1, length, device)
    heads, sinks, windows = tables_of(spec)
    held = heads, torch.full_like(sinks, 4), torch.full_like(windows, window), maps_of(spec, device)
    share = spec.heads // spec.kv_heads
    alike = q[:, heads.long().to(device)], *(x[:, heads.long().to(device) // share] for x in (k, v))
    dense = partial(F.scaled_dot_product_attention, *alike, is_causal=True)
    yield Race(f"N = {length}", {"this kernel": partial(prefill, q, k, v, *held), "dense SDPA": dense})


def _decode_races(spec: LinearDecode, decode: Callable[..., Results], device: torch.device) -> Iterator[Race]:
    if spec.target == "reference":
        return
    length, _, batch = TIMED[device.type]
    q, k, v = _inputs(spec, spec.served, batch, length, device)
    heads, maps = tables_of(spec)[0], maps_of(spec, device)
    state = torch.rand(batch, spec.served, maps.width, spec.head_dim_v + 1, device=device)
    slots = torch.arange(spec.served, dtype=torch.int32, device=device).expand(batch, -1).contiguous()
    leaving = q[:, :, -1:].contiguous(), k[:, :, 0].contiguous(), v[:, :, 0].contiguous()
    alike = q[:, heads.long().to(device), -1:], k, v
    dense = partial(F.scaled_dot_product_attention, *alike)
    own = partial(decode, *leaving, slots, heads, state, maps)
    yield Race(f"{batch} sequences, N = {length}", {"this kernel": own, f"SDPA over {length} keys": dense})
