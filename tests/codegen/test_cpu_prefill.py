"""The CPU target against the plain-PyTorch reference in float64: lengths, spans, head sharing, padding, layouts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from spanning import HEADS, SMALL, SPANS, inputs, poisoned, tables  # noqa: F401  (poisoned is a fixture)

from attnopt.codegen import padding_cpu, span_cpu
from attnopt.codegen.cpu_prefill import Cpu
from attnopt.codegen.emit import load
from attnopt.codegen.reference_prefill import prefill as reference
from attnopt.codegen.spec import SpanPrefill

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def relative(found, q, k, v, sinks, windows, scale, pad=None):
    expected = reference(q.double(), k.double(), v.double(), sinks, windows, scale, pad)
    assert found.shape == expected.shape and found.dtype == q.dtype
    assert torch.isfinite(found).all()
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-30))


@pytest.mark.parametrize("tune", [None, SMALL], ids=["measured", "small"])
@pytest.mark.parametrize("length", [0, 1, 2, 63, 100, 257, 700])
@pytest.mark.parametrize("name", SPANS)
def test_matches_reference(name, length, tune, poisoned):  # noqa: F811
    q, k, v = inputs(length)
    sinks, windows = tables(SPANS[name])
    found = span_cpu.prefill(q, k, v, sinks, windows, 0.3, tune=tune)
    assert relative(found, q, k, v, sinks, windows, 0.3) < 1e-5


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kv_heads", [8, 4, 2])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("tune", [None, SMALL], ids=["measured", "small"])
def test_dtypes_and_head_sharing(dtype, kv_heads, padded, tune, poisoned):  # noqa: F811
    q, k, v = inputs(257, dtype, kv_heads=kv_heads, dim=32, dim_v=32)
    pad = torch.rand(2, 257, generator=torch.Generator().manual_seed(1)) > 0.3 if padded else None
    for name in ("mixed", "split"):
        sinks, windows = tables(SPANS[name])
        found = span_cpu.prefill(q, k, v, sinks, windows, 32**-0.5, pad, tune)
        assert relative(found, q, k, v, sinks, windows, 32**-0.5, pad) < TOLERANCE[dtype]


@pytest.mark.parametrize("scale", [0.0, -0.25])
def test_scales_that_sdpa_would_hide_keys_with(scale):
    q, k, v = inputs(90, dim=32, dim_v=32)
    for name in ("dense", "mixed"):
        sinks, windows = tables(SPANS[name])
        found, lse = span_cpu.prefill_lse(q, k, v, sinks, windows, scale)
        assert relative(found, q, k, v, sinks, windows, scale) < 1e-5 and lse.isfinite().all()


def test_long_window_runs_in_its_measured_split_form():
    q, k, v = inputs(1100, batch=1)
    sinks, windows = tables([(9, 520)] * HEADS)
    assert relative(span_cpu.prefill(q, k, v, sinks, windows, 0.3), q, k, v, sinks, windows, 0.3) < 1e-5


PADDING = {
    "left": [(30, 130), (0, 130)],
    "right": [(0, 100), (0, 130)],
    "both": [(30, 60), (1, 129)],
    "nothing kept": [(0, 0), (0, 130)],
    "hole longer than the window": None,
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", PADDING)
@pytest.mark.parametrize("spans", ["dense", "mixed", "split"])
def test_padding(name, spans, dtype, poisoned):  # noqa: F811
    q, k, v = inputs(130, dtype)
    column = torch.arange(130)
    if PADDING[name] is None:
        pad = ((column < 3) | (column > 100)).repeat(2, 1)
    else:
        pad = torch.stack([(column >= low) & (column < high) for low, high in PADDING[name]])
    sinks, windows = tables(SPANS[spans])
    for tune in (None, SMALL):
        found = span_cpu.prefill(q, k, v, sinks, windows, 0.25, pad, tune)
        assert relative(found, q, k, v, sinks, windows, 0.25, pad) < TOLERANCE[dtype]
        dead = reference(q, k, v, sinks, windows, 0.25, pad) == 0
        assert (found[dead] == 0).all()
        assert found.stride() == (130 * HEADS * 16, 16, HEADS * 16, 1)


@pytest.mark.parametrize("spans", ["dense", "mixed", "split", "sink beyond window", "no sink", "window 1"])
def test_one_run_of_real_tokens_anywhere(spans, poisoned):  # noqa: F811
    """Every place of the run, against spans that end before, in and after it; other runs in the rest of the batch."""
    places = [
        (0, 1),
        (0, 12),
        (1, 300),
        (7, 8),
        (40, 41),
        (90, 200),
        (0, 299),
        (299, 300),
        (150, 150),
        (0, 300),
        (0, 300),
    ]
    q, k, v = inputs(300, batch=len(places), kv_heads=2)
    column = torch.arange(300)
    pad = torch.stack([(column >= low) & (column < high) for low, high in places])
    assert padding_cpu.real_runs(pad)[-1] == (9, 11, 0, 300)
    sinks, windows = tables(SPANS[spans])
    found = span_cpu.prefill(q, k, v, sinks, windows, 0.25, pad)
    assert relative(found, q, k, v, sinks, windows, 0.25, pad) < 1e-5
    moved = pad.roll(1, 1)
    assert relative(found, q, k, v, sinks, windows, 0.25, moved) > 1e-3


def test_runs_of_real_tokens():
    def runs(*rows):
        return padding_cpu.real_runs(torch.tensor(rows, dtype=torch.bool))

    assert runs([0, 1, 1], [0, 1, 1], [1, 1, 1]) == [(0, 2, 1, 3), (2, 3, 0, 3)]
    assert runs([0, 0, 0], [1, 0, 0]) == [(0, 1, 0, 0), (1, 2, 0, 1)]
    assert runs([1, 0, 1], [1, 1, 1]) is None and runs([1, 1, 1], [0, 1, 0]) is not None


@pytest.mark.parametrize("sink,window", [(0, 1), (5, 3), (0, 9), (40, 2)])
def test_live_rows(sink, window):
    pad = torch.rand(4, 37, generator=torch.Generator().manual_seed(0)) > 0.8
    i, j = torch.arange(37)[:, None], torch.arange(37)
    keep = (j <= i) & ((j < sink) | (i - j < window))
    assert torch.equal(span_cpu.live_rows(pad, sink, window), (keep & pad[:, None]).any(-1))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("scale", [0.25, 1e-6, 0.0, -0.25])
def test_causal_padded(dtype, scale):
    q, k, v = inputs(90, dtype, dim=16, dim_v=24)
    q = q.contiguous()  # SDPA keeps the layout of q; the result does not
    pad = torch.arange(90).repeat(2, 1) >= torch.tensor([[7], [0]])
    sinks, windows = tables(SPANS["dense"])
    found = span_cpu.causal_padded(q, k, v, pad, scale)
    assert relative(found, q, k, v, sinks, windows, scale, pad) < TOLERANCE[dtype]
    assert (found[0, :, :7] == 0).all()
    assert found.transpose(1, 2).is_contiguous()


def test_causal_padded_changes_no_kept_score():
    """Where nothing is padded away the trick adds exact zeros, so float32 agrees with SDPA to rounding."""
    q, k, v = inputs(200, dim=32, dim_v=32, kv_heads=8)
    found = span_cpu.causal_padded(q, k, v, torch.ones(2, 200, dtype=torch.bool), 0.2)
    torch.testing.assert_close(
        found, F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("layout", ["heads first", "tokens first", "sliced"])
@pytest.mark.parametrize("name", ["mixed", "dense", "uniform"])
@pytest.mark.parametrize("dim_v", [8, 16, 24])
def test_layouts_in_and_out(layout, name, dim_v, poisoned):  # noqa: F811
    q, k, v = inputs(150, dim_v=dim_v)
    if layout == "heads first":
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    if layout == "sliced":
        q, k, v = (torch.cat((x, x), -1)[..., : x.shape[-1]] for x in (q, k, v))
    sinks, windows = tables(SPANS[name])
    found = span_cpu.prefill(q, k, v, sinks, windows, 0.3)
    assert relative(found, q, k, v, sinks, windows, 0.3) < 1e-5
    assert found.stride() == (150 * HEADS * dim_v, dim_v, HEADS * dim_v, 1)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("sink,window", [(0, 1), (0, -1), (1, 0)])
def test_one_key_more_or_less_is_out_of_tolerance(dtype, sink, window):
    """The tolerances above would show a span that is off by one."""
    q, k, v = inputs(257, dtype)
    spans = [(4, 32)] * HEADS
    wrong = tables([(s + sink, w + window) for s, w in spans])
    found = span_cpu.prefill(q, k, v, *wrong, 0.25)
    assert relative(found, q, k, v, *tables(spans), 0.25) > 2 * TOLERANCE[dtype]


def test_heads_of_one_span_are_grouped_by_how_many_share_a_kv_head():
    found = span_cpu.group_heads([0, 0, 4, 4, 4, 0], [9, 9, 2, 2, 2, 100], kv_heads=3, length=50)
    assert found == [
        span_cpu.Group(0, 9, 2, (0, 1), (0,)),
        span_cpu.Group(0, 50, 1, (5,), (2,)),
        span_cpu.Group(4, 2, 1, (4,), (2,)),
        span_cpu.Group(4, 2, 2, (2, 3), (1,)),
    ]


def test_emitted_module(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNOPT_CACHE", str(tmp_path))
    q, k, v = inputs(100)
    sinks, windows = tables(SPANS["mixed"])
    module = load(SpanPrefill("cpu", "float32", HEADS, 4, 16, 16, padded=False))
    assert relative(module.prefill(q, k, v, sinks, windows, 0.3), q, k, v, sinks, windows, 0.3) < 1e-5
    with pytest.raises(ValueError, match="padding"):
        module.prefill(q, k, v, sinks, windows, 0.3, torch.ones(2, 100, dtype=torch.bool))
    with pytest.raises(ValueError, match="emitted for"):
        module.prefill(q.bfloat16(), k, v, sinks, windows, 0.3)
    padded = Cpu.emit(SpanPrefill("cpu", "float32", HEADS, 4, 16, 16, padded=True))
    assert "scale, pad, TUNING" in padded and max(map(len, padded.splitlines())) <= 120
