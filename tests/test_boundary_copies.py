"""What an opaque operator costs at its edges: inductor's kernels and buffers around it, against those around SDPA."""

from __future__ import annotations

import re

import pytest
import torch
from models import HEADS, build, make_plan, padding, tokens
from torch._inductor.utils import run_and_get_code

from attnopt import backend
from attnopt.ir import Choice

WINDOW = Choice.of("sink_window", {"sink": 2, "alpha": 8, "beta": 0.0})
CALL = "torch.ops.attnopt.span_attention.default("


def calls_of(model, options, **inputs) -> str:
    """The part of inductor's wrapper that runs the model: launches and allocations, one a line."""
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend.attnopt, options=options)
    with torch.no_grad():
        _, codes = run_and_get_code(lambda: compiled(**inputs, use_cache=False))
    return str(codes[-1]).split("def call(", 1)[1]


def counted(code: str) -> dict[str, int]:
    """A copy into another layout is a fused kernel and a buffer more; `clone` and `contiguous` would be by name."""
    kernels = re.findall(r"^ +(?:cpp_fused|triton_)\w*\(", code, re.M)
    return {"kernels": len(kernels), "buffers": len(re.findall(r"= empty_strided\w*\(", code)),
            "clones": len(re.findall(r"\.clone\(|aten\.clone|\.contiguous\(", code))}  # fmt: skip


@pytest.mark.slow
def test_a_plan_adds_no_copies(tmp_path):
    model = build("llama", num_hidden_layers=1)
    path = tmp_path / "plan.json"
    make_plan({"model.layers.0.self_attn": [WINDOW] * HEADS}).save(path)
    inputs = {"input_ids": tokens(1, 64)}
    exact, planned = (calls_of(model, options, **inputs) for options in ({}, {"plan": str(path)}))
    assert CALL not in exact and planned.count(CALL) == 1
    assert counted(planned) == counted(exact) and counted(planned)["kernels"] >= 5


@pytest.mark.slow
def test_runs_of_real_tokens_add_no_copies(monkeypatch):
    """Under padding the operator takes the tensors as SDPA does; a feature would be two copies a layer more."""
    monkeypatch.setenv("ATTNOPT_ALWAYS", "1")
    code = calls_of(
        build("llama", num_hidden_layers=1), {}, input_ids=tokens(2, 64), attention_mask=padding(2, 64, "left")
    )
    assert code.count(CALL) == 1
    # What writes q and k, turned by their positions, hands them over; what the mask needs is there once.
    assert counted(code)["kernels"] <= 5 + 3 and counted(code)["clones"] == 0
