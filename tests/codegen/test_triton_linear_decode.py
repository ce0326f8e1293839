"""The emitted Triton step of linear far parts: its text, what it refuses, and a GPU's numbers.

Those of Triton's interpreter are in test_triton_linear_prefill.py, beside the prefill whose state it goes on from.
"""

from __future__ import annotations

from pathlib import Path

import linears
import pytest
import torch
from emitting import check_clean, check_golden

from attnopt.codegen import emit, reference_linear
from attnopt.codegen.self_check import TOLERANCE, error
from attnopt.codegen.spec import LinearDecode
from attnopt.codegen.triton_linear_decode import source
from attnopt.registry import TARGETS

SPEC = LinearDecode("triton", "bfloat16", 32, 1, 128, 128, 12, "exp", 64)
ODD = [
    SPEC,
    LinearDecode("triton", "float32", 6, 1, 96, 80, 3, "taylor", 7),
    LinearDecode("triton", "float16", 8, 1, 64, 64, 8, "exp", 24),
]


def test_golden_text() -> None:
    check_golden("linear_decode_bfloat16.py", source(SPEC))


def test_emitted_text_is_clean(tmp_path: Path) -> None:
    check_clean(tmp_path, map(source, ODD))


def test_what_cannot_be_served_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no float64"):
        source(LinearDecode("triton", "float64", 4, 1, 64, 64, 4, "exp", 64))
    pytest.importorskip("triton")
    assert TARGETS["triton linear_decode"].emit(SPEC) == source(SPEC)
    module = emit.load(LinearDecode("triton", "float32", 8, 1, 16, 24, 2, "exp", 24))
    q, k, v = linears.inputs(1)[0], torch.zeros(2, 5, 16), torch.zeros(2, 5, 24)
    slots, heads, maps = torch.zeros(2, 2, dtype=torch.int32), linears.tables((2, 3))[0], linears.maps("exp", 2, 16)
    state = torch.zeros(2, 2, 24, 25)
    with pytest.raises(ValueError, match="needs a GPU"):
        module.decode(q, k, v, slots, heads, state, maps)
    monkeypatch.setattr(module, "INTERPRETED", True)
    with pytest.raises(ValueError, match="have shapes"):
        module.decode(q, k, v, slots, heads, state[..., 1:], maps)
    with pytest.raises(ValueError, match="written where it lies"):
        module.decode(q, k, v, slots, heads, state.mT.contiguous().mT, maps)
    with pytest.raises(ValueError, match="not copied"):
        module.decode(q, k.mT.contiguous().mT, v, slots, heads, state, maps)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", linears.RANK)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_agrees_on_a_gpu(dtype: str, kind: str) -> None:
    """As one CUDA graph, which reads `slots` and writes the state while it runs."""
    q = linears.inputs(1, getattr(torch, dtype), dim=64)[0].cuda()
    k, v = (torch.randn(2, 9, width, device="cuda").to(q.dtype) for width in (64, 128))
    heads, maps = linears.tables()[0], linears.maps(kind, 5, 64).to("cuda")
    state, slots = torch.rand(2, 5, maps.width, 129, device="cuda"), torch.full((2, 5), -1).int().cuda()
    module = emit.load(LinearDecode("triton", dtype, 8, 1, 64, 128, 5, kind, maps.rank))
    module.decode(q, k, v, slots, heads, state, maps)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = module.decode(q, k, v, slots, heads, state, maps)
    held, wide = state.double(), [x.double() for x in (q, k, v)]
    for step in range(3):
        slots.copy_(torch.arange(10).view(2, 5).cuda() % 4 - 1 + step)
        graph.replay()
        expected, sums = reference_linear.decode(*wide, slots, heads.cuda(), held, maps)
        assert error(out, expected) <= TOLERANCE[dtype] and error(lse, sums) <= max(1e-5, TOLERANCE[dtype] / 10)
        assert error(state, held) <= TOLERANCE["float32"]
