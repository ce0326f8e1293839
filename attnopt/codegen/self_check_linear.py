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

reference_prefill: Callable[..., Any] = reference_linear.prefill
reference_backward: Callable[..., Any] = reference_linear.backward
reference_state: Callable[..., Any] = reference_linear.state
# Sinks and windows that the served heads take in turn; the last has nothing far at any length that is checked.
SINKS, WINDOWS = (0, 5, 64, 3), (7, 1, 40, 2**30)
# Tokens and the window that are timed, by type of device, and sequences that decode.
TIMED = {"cuda": (16384, 128, 16), "cpu": (2048, 128, 1)}


def check(spec: Linear, *functions: Callable[..., Any]) -> NoReturn:
    """Compare the functions of an emitted file with the reference, time the first, and exit."""
    device = self_check.device_of(spec.target)
    if isinstance(spec, LinearDecode):
        checks, races = _decode_checks(spec, functions, device), _decode_races(spec, functions[0], device)
    elif isinstance(spec, LinearBackward):
        checks, races = _backward_checks(spec, functions[0], device), iter(())
    else:
        assert isinstance(spec, LinearPrefill)
        checks, races = _prefill_checks(spec, functions, device), _prefill_races(spec, functions[0], device)
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
    spec: LinearPrefill, functions: tuple[Callable[..., Any], ...], device: torch.device
) -> Iterator[Check]:
    prefill, state = functions
    heads, sinks, windows = (x.to(device) for x in tables_of(spec))
    maps, tolerance = maps_of(spec, device), TOLERANCE[spec.dtype]
    for length in (1, 65, 200):
        given = _inputs(spec, spec.kv_heads, 2, length, device)
        wide, pad = [x.double() for x in given], _padding(spec, length, device)
        found = partial(prefill, *given, heads, sinks, windows, maps, pad)
        expected = partial(reference_prefill, *wide, heads, sinks, windows, maps, pad)
        wrong = partial(_out_of, reference_prefill, *wide, heads, sinks, windows, maps, pad)
        # Of one token no head has a far key.
        yield Check(f"out, lse, N = {length}", found, expected, tolerance, wrong if length > 1 else None)
    kept = partial(state, *given[1:], heads, spec.heads, sinks, windows, maps, pad)
    at, off = (
        partial(reference_state, *wide[1:], heads, spec.heads, sinks, ends, maps, pad)
        for ends in (windows, windows + 1)
    )
    yield Check(f"state, N = {length}", kept, at, tolerance, off)


def _out_of(prefill: Callable[..., Any], *given: Any) -> Results:
    """The right logarithms beside an out of windows that are one key longer."""
    *inputs, windows, maps, pad = given
    return prefill(*inputs, windows + 1, maps, pad)[0], prefill(*given)[1]


def _backward_checks(spec: LinearBackward, backward: Callable[..., Results], device: torch.device) -> Iterator[Check]:
    heads, sinks, windows = (x.to(device) for x in tables_of(spec))
    maps = maps_of(spec, device)
    for length in (1, 65, 200):
        given = _inputs(spec, spec.kv_heads, 2, length, device)
        wide, pad = [x.double() for x in given], _padding(spec, length, device)
        out, lse = reference_prefill(*wide, heads, sinks, windows, maps, pad)
        dout = torch.randn(out.shape, device=device).to(given[0].dtype)
        dlse = torch.randn(lse.shape, device=device)
        of = dout, dlse, *given, out.to(dout.dtype), lse.float()
        found = partial(backward, *of, heads, sinks, windows, maps, pad)
        of = dout.double(), dlse.double(), *wide, out, lse
        expected, wrong = (
            partial(reference_backward, *of, heads, sinks, ends, maps, pad) for ends in (windows, windows + 1)
        )
        # Gradients are sums of products that were themselves rounded: twice what a prefill may err.
        tolerance = 2 * TOLERANCE[spec.dtype]
        yield Check(f"dq, dk, dv, N = {length}", found, expected, tolerance, wrong if length > 1 else None)


def _decode_checks(
    spec: LinearDecode, functions: tuple[Callable[..., Any], ...], device: torch.device
) -> Iterator[Check]:
    decode, state = functions
    heads, sinks, windows = (x.to(device) for x in tables_of(spec))
    maps, tolerance, batch = maps_of(spec, device), TOLERANCE[spec.dtype], 3
    q, k, v = _inputs(spec, 1, batch, 65, device)
    slots = (torch.arange(batch * spec.served, device=device).view(batch, -1) % 66 - 1).int()
    given = q[:, :, -1:], k[:, 0], v[:, 0]
    wide = [x.double() for x in given]
    first = torch.rand(batch, spec.served, maps.width, spec.head_dim_v + 1, device=device)
    found = partial(_stepped, decode, *given, slots, heads, first, maps)
    expected, wrong = (
        partial(_stepped, reference_linear.decode, *wide, at, heads, first.double(), maps) for at in (slots, slots - 1)
    )
    yield Check("out, lse, state", found, expected, tolerance, wrong)
    rest = heads, spec.heads, sinks, windows, maps
    kept = partial(state, k, v, *rest)
    yield Check("state of a prompt", kept, partial(reference_state, k.double(), v.double(), *rest), tolerance)


def _stepped(decode: Callable[..., Any], *given: Any) -> Results:
    """out, lse, and the state as the step leaves it."""
    *inputs, state, maps = given
    kept = state.clone()
    return *decode(*inputs, kept, maps), kept


def _prefill_races(spec: LinearPrefill, prefill: Callable[..., Results], device: torch.device) -> Iterator[Race]:
    if spec.target == "reference" or spec.padded:
        return
    length, window, _ = TIMED[device.type]
    q, k, v = _inputs(spec, spec.kv_heads, 1, length, device)
    heads, sinks, windows = tables_of(spec)
    held = heads, torch.full_like(sinks, 4), torch.full_like(windows, window), maps_of(spec, device)
    share, served = spec.heads // spec.kv_heads, heads.long().to(device)
    alike = q[:, served], k[:, served // share], v[:, served // share]
    dense = partial(F.scaled_dot_product_attention, is_causal=True)
    yield Race(f"N = {length}", {"this kernel": partial(prefill, q, k, v, *held), "dense SDPA": partial(dense, *alike)})


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
