"""A plan from file to kernel: a tiny Llama through torch.compile, the emitted kernel, and a dense model under masks.

The Triton kernel runs in Triton's interpreter, which is chosen before Triton is imported: in a child process, this file
run as a script. The CPU target runs here.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from interpreting import interpreted
from models import HEAD_DIM, HEADS, KV_HEADS, LAYERS, ExplicitMasks, build, make_plan, padding, tokens

LENGTH = 96
DENSE = (0, 2**30)
# (sink, window) of each head, layer by layer: dense, sinks, no sinks, a window of one key, one that nothing reaches.
SPANS = [[DENSE, (4, 16), (0, 24), (4, 16)], [(1, 1), (0, 40), (90, 4), DENSE]]


def plan():
    from attnopt.ir import Choice

    def choice(sink, window):
        dense = (sink, window) == DENSE
        params = {"sink": sink, "alpha": window, "beta": 0.0}
        return Choice.of("dense") if dense else Choice.of("sink_window", params)

    return make_plan({f"model.layers.{n}.self_attn": [choice(*s) for s in SPANS[n]] for n in range(LAYERS)})


def run_all() -> dict:
    """Errors of the planned model against the dense one under masks, and which kernels ran."""
    from attnopt import backend, ops

    model, found = build("llama"), {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        plan().save(Path(folder) / "plan.json")
        import torch._inductor.compile_fx as inner

        # The graph runs as it is: what inductor makes of it is a matter of other tests.
        inner.compile_fx = lambda gm, inputs, **_: gm.forward
        call = torch.compile(model, backend=backend.attnopt, options={"plan": str(Path(folder) / "plan.json")})
        for side in ("none", "left"):
            ids, mask = tokens(2, LENGTH), padding(2, LENGTH, side) if side != "none" else None
            arguments = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
            ops.launches.clear()
            planned = call(**arguments).logits
            kernels = dict(ops.launches)
            dense = model(**arguments).logits
            with ExplicitMasks(SPANS) as masks:
                expected = model(**arguments).logits
            assert masks.calls == LAYERS
            rows = mask.bool() if mask is not None else torch.ones(2, LENGTH, dtype=torch.bool)
            # A window of one key keeps no key of a padded row's own past; those rows are left out by `rows`.
            found[side] = {
                "error": float((planned - expected)[rows].abs().max()),
                "effect": float((dense - expected)[rows].abs().max()),
                "kernels": kernels,
            }
    found["lowerings"] = [r.lowering for report in backend.reports() for r in report.rewrites]
    return found


def check(found: dict, target: str, folder: Path) -> None:
    for side in ("none", "left"):
        result = found[side]
        assert result["effect"] > 0.5, "the spans change nothing: the comparison would prove nothing"
        assert result["error"] < 2e-3, (side, result)
        (key,) = result["kernels"]
        assert key.startswith(f"span_prefill_{target}_h{HEADS}k{KV_HEADS}d{HEAD_DIM}_float32"), key
        assert result["kernels"][key] == LAYERS
        emitted = (folder / f"{key}.py").read_text()
        assert ("@triton.jit" in emitted) == (target == "triton") and "codegen.reference_prefill" not in emitted
    assert found["lowerings"] == ["span kernel, 3 spans", "span kernel, 4 spans"] * 2


def test_cpu(cache_folder, monkeypatch):
    import torch._inductor.compile_fx as inner

    from attnopt import backend

    monkeypatch.setattr(inner, "compile_fx", inner.compile_fx)
    backend.clear_reports()
    check(run_all(), "cpu", cache_folder / "kernels")


@pytest.mark.slow
def test_triton(tmp_path):
    printed = interpreted(__file__, tmp_path, ATTNOPT_TARGET="triton")
    check(json.loads(printed.splitlines()[-1]), "triton", tmp_path / "kernels")


if __name__ == "__main__":
    torch.set_num_threads(2)
    print(json.dumps(run_all()))
