"""The emitted Triton gradients of linear far parts: their text, what they refuse, and a GPU's numbers.

Those of Triton's interpreter are in test_triton_linear_prefill.py, beside the prefill that they are of.
"""

from __future__ import annotations

from pathlib import Path

import linears
import pytest
import torch
from emitting import check_clean, check_golden

from attnopt.codegen import emit, reference_linear
from attnopt.codegen.self_check import TOLERANCE, error
from attnopt.codegen.spec import LinearBackward, LinearPrefill
from attnopt.codegen.triton_linear_backward import source
from attnopt.registry import TARGETS

SPEC = LinearBackward("triton", "bfloat16", 32, 8, 128, 128, 12, "exp", 64, False)
ODD = [
    SPEC,
    LinearBackward("triton", "float32", 6, 2, 96, 80, 3, "taylor", 7, True),
    LinearBackward("triton", "float16", 8, 8, 64, 64, 8, "exp", 24, True),
]


def test_golden_text() -> None:
    check_golden("linear_backward_bfloat16.py", source(SPEC))


def test_emitted_text_is_clean(tmp_path: Path) -> None:
    check_clean(tmp_path, map(source, ODD))


def test_what_cannot_be_served_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="taylor/12 has 157 features"):
        source(LinearBackward("triton", "float32", 4, 4, 64, 64, 4, "taylor", 12, False))
    pytest.importorskip("triton")
    assert TARGETS["triton linear_backward"].emit(SPEC) == source(SPEC)
    module = emit.load(LinearBackward("triton", "float32", 8, 4, 16, 24, 2, "exp", 24, False))
    q, k, v = linears.inputs(9)
    tables, maps, out = linears.tables((2, 3)), linears.maps("exp", 2, 16), torch.zeros(2, 2, 9, 24)
    monkeypatch.setattr(module, "INTERPRETED", True)
    with pytest.raises(ValueError, match="dout, out, lse have shapes"):
        module.backward(out[:, :1], out[..., 0], q, k, v, out, out[..., 0], *tables, maps)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", linears.RANK)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_agrees_on_a_gpu(dtype: str, kind: str) -> None:
    q, k, v = (x.cuda() for x in linears.inputs(2500, getattr(torch, dtype), dim=64, dim_v=128))
    tables, maps = [x.cuda() for x in linears.tables()], linears.maps(kind, 5, 64).to("cuda")
    wide = [x.double() for x in (q, k, v)]
    pad = torch.rand(2, 2500, device="cuda") > 0.2
    expected, sums = reference_linear.prefill(*wide, *tables, maps, pad)
    sizes = "triton", dtype, 8, 4, 64, 128, 5, kind, maps.rank, True
    out, lse = emit.load(LinearPrefill(*sizes)).prefill(q, k, v, *tables, maps, pad)
    assert error(out, expected) <= TOLERANCE[dtype] and error(lse, sums) <= max(1e-5, TOLERANCE[dtype] / 10)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    given = expected.to(q.dtype), sums.float(), *tables, maps, pad
    found = emit.load(LinearBackward(*sizes)).backward(dout, dlse, q, k, v, *given)
    wanted = reference_linear.backward(dout.double(), dlse.double(), *wide, expected, sums, *given[2:])
    assert error(found, wanted) <= 2 * TOLERANCE[dtype]
