"""What the kernels are measured against: SDPA's backends, FlexAttention, FlashAttention and FlashInfer where installed.

Each is called once when it is made. What refuses, or is not installed, is a note; what comes out wrong is dropped with
a note by who measures it.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from benchmarks.block_mask import block_mask
from benchmarks.cuda.device import Device
from benchmarks.spans import Spans

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Baseline:
    """call: out (B, H, Q, D); spans: what it computes, which its result is checked against."""

    name: str
    call: Call
    spans: Spans


def tried(name: str, call: Call, notes: list[str]) -> bool:
    """Whether it runs; else a note with the first line of why not."""
    with warnings.catch_warnings():
        # SDPA warns of every reason why a backend is not to be had.
        warnings.simplefilter("ignore")
        try:
            call()
        except Exception as error:
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if (line := f"{name}: {said[:160]}") not in notes:
                notes.append(line)
            return False
    return True


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, scale: float, spans: Spans, notes: list[str], skip: tuple[str, ...] = ()
) -> list[Baseline]:
    """Dense causal attention by every backend that serves these tensors. One query attends to all keys.

    A backend that knows no grouped heads gets its K and V repeated beforehand, and the copies are not timed.
    """
    share, causal = q.shape[1] // k.shape[1], q.shape[2] > 1
    repeated: list[Tensor] = []

    def with_backend(backend: SDPBackend, wide: bool) -> Call:
        def call() -> Tensor:
            keys, values = repeated if wide else (k, v)
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(
                    q, keys, values, is_causal=causal, scale=scale, enable_gqa=not wide and share > 1
                )

        return call

    found = []
    for name, backend in BACKENDS.items():
        if name in skip:
            continue
        call = with_backend(backend, False)
        if tried(f"SDPA {name} with grouped heads", call, notes):
            found.append(Baseline(f"SDPA {name}", call, spans))
            continue
        if share > 1 and not repeated:
            repeated.extend(x.repeat_interleave(share, 1) for x in (k, v))
        call = with_backend(backend, True)
        if share > 1 and tried(f"SDPA {name} with repeated heads", call, notes):
            found.append(Baseline(f"SDPA {name}, repeated heads", call, spans))
    return found


@cache
def compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)


def flex(
    q: Tensor, k: Tensor, v: Tensor, scale: float, spans: Spans, device: Device, notes: list[str]
) -> list[Baseline]:
    """FlexAttention on the same mask; compiled, but for a dry run."""
    mask = block_mask(spans, q.shape[2], k.shape[2], device.where)
    run = flex_attention if device.dry else compiled_flex()

    def call() -> Tensor:
        return run(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])

    return [Baseline("FlexAttention", call, spans)] if tried("FlexAttention", call, notes) else []


def installed(name: str, notes: list[str]) -> Any:
    """A module, or None and a note."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        said = f"{name}: not here ({type(error).__name__})"
        if said not in notes:
            notes.append(said)
        return None


def first(found: Any) -> Tensor:
    """The output of a function that may also return its logsumexp."""
    return found[0] if isinstance(found, tuple) else found


def libraries(q: Tensor, k: Tensor, v: Tensor, scale: float, spans: Spans, notes: list[str]) -> list[Baseline]:
    """Prefill by FlashAttention 3 and 2 and by FlashInfer: dense where `spans` is, else with its one window.

    They know no sinks beside a window: what is left out of the work is in their favour. None for a mixture.
    """
    windows = set(spans.windows)
    if len(windows) > 1:
        return []
    (window,) = windows
    own = Spans(spans.name, (0,) * len(spans.sinks), spans.windows)
    left = -1 if window >= q.shape[2] else window - 1
    rows = [x.transpose(1, 2) for x in (q, k, v)]
    found = []
    for name, label in (("flash_attn_interface", "FlashAttention 3"), ("flash_attn", "FlashAttention 2")):
        module = installed(name, notes)
        if module is not None:

            def flash(module: Any = module) -> Tensor:
                out = module.flash_attn_func(
                    *rows, softmax_scale=scale, causal=True, window_size=(left, 0 if left >= 0 else -1)
                )
                return first(out).transpose(1, 2)

            if tried(label, flash, notes):
                found.append(Baseline(label, flash, own))
    flashinfer = installed("flashinfer", notes)
    if flashinfer is not None and q.shape[0] == 1:

        def infer() -> Tensor:
            out = flashinfer.single_prefill_with_kv_cache(
                *(x[0] for x in rows), causal=True, sm_scale=scale, window_left=left
            )
            return first(out)[None].transpose(1, 2)

        if tried("FlashInfer", infer, notes):
            found.append(Baseline("FlashInfer", infer, own))
    return found


def decode_libraries(q: Tensor, k: Tensor, v: Tensor, scale: float, spans: Spans, notes: list[str]) -> list[Baseline]:
    """One token against a dense cache by FlashAttention, q (B, H, 1, D), k, v (B, G, N, D)."""
    found = []
    rows = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    for name, label in (("flash_attn_interface", "FlashAttention 3"), ("flash_attn", "FlashAttention 2")):
        module = installed(name, notes)
        if module is not None:

            def flash(module: Any = module) -> Tensor:
                return first(module.flash_attn_with_kvcache(*rows, softmax_scale=scale, causal=True)).transpose(1, 2)

            if tried(label, flash, notes):
                found.append(Baseline(label, flash, spans))
    return found
