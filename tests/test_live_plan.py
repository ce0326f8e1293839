"""Another plan in the place of one that was compiled, and compiled graphs that a second process finds on disk."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from compiling import SPANS, close, compiled
from models import make_plan
from torch._dynamo.utils import counters

import attnopt
from attnopt.codegen.reference_prefill import prefill as reference
from attnopt.errors import OptionError, PlanError
from attnopt.ir import DENSE

HEADS = 4
WIDE = [(0, 2**30), (2, 5), (0, 7), (2, 5)]
NARROW = [(2, 5)] * HEADS


def attend(x):
    """One tensor, so that queries and keys have one length, also where it is not known."""
    q, k, v = x.unbind()
    return F.scaled_dot_product_attention(q + 1, k, v, is_causal=True) * 2


def wanted(x, spans):
    q, k, v = x.unbind()
    sinks, windows = (torch.tensor(x) for x in zip(*spans, strict=True))
    return 2 * reference(q + 1, k, v, sinks, windows, q.shape[3] ** -0.5)


def plan_of(*spans):
    return make_plan({"attention": spans})


def inputs(length=20):
    torch.manual_seed(0)
    return torch.randn(3, 1, HEADS, length, 8)


def test_another_plan_runs_in_graphs_that_are_there(eagerly):
    counters.clear()
    live = attnopt.LivePlan(plan_of(*SPANS))
    call, seen = compiled(attend, plan=live), counters["stats"]
    with torch.no_grad():
        for length in (20, 33):
            close(call(inputs(length)), wanted(inputs(length), WIDE))
        graphs = seen["unique_graphs"]
        live.change(plan_of(*[SPANS[1]] * HEADS))
        for length in (20, 33, 41):
            close(call(inputs(length)), wanted(inputs(length), NARROW))
        live.change(plan_of(*SPANS))
        close(call(inputs(33)), wanted(inputs(33), WIDE))
        assert graphs == seen["unique_graphs"] == 2
        # What is told apart differs.
        assert not torch.allclose(wanted(inputs(), WIDE), wanted(inputs(), NARROW), atol=0.05)
    with torch.inference_mode():
        torch._dynamo.reset()
        close(call(inputs()), wanted(inputs(), WIDE))
    live.change(plan_of(*[SPANS[1]] * HEADS))
    with torch.inference_mode():
        close(call(inputs()), wanted(inputs(), NARROW))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (make_plan({"attention": SPANS}, min_length=9), "dense below 9 tokens"),
        (make_plan({"elsewhere": SPANS}), "names attention, elsewhere"),
        (plan_of(*SPANS[:2]), "2 heads at attention, the compiled one 4"),
    ],
    ids=["length", "site", "heads"],
)
def test_a_plan_that_needs_another_graph_is_refused(other, said):
    live = attnopt.LivePlan(plan_of(*SPANS))
    with pytest.raises(PlanError, match=said):
        live.change(other)
    assert live.plan == plan_of(*SPANS)


def test_a_site_that_was_left_dense_cannot_be_planned_later(eagerly):
    held = {"attention": SPANS, "attention#1": (DENSE,) * HEADS}
    live = attnopt.LivePlan(make_plan(held))
    with torch.no_grad():
        compiled(attend, plan=live)(inputs())
    with pytest.raises(PlanError, match="no sink_window at attention#1"):
        live.change(make_plan({**held, "attention#1": SPANS}))
    live.change(make_plan({**held, "attention": (DENSE,) * HEADS}))
    assert live.plan.choices["attention"] == (DENSE,) * HEADS


def test_inductor_must_not_freeze_the_tables():
    with pytest.raises(OptionError, match="freezing"):
        attnopt.backend.Options.of({"plan": attnopt.LivePlan(plan_of(*SPANS)), "inductor": {"freezing": True}})


START = """
import json, sys, torch
sys.path[:0] = [{tests!r}]
import test_live_plan as t
from torch._dynamo.utils import counters
spans, rule = {{"wide": (t.SPANS, t.WIDE), "narrow": ([t.SPANS[1]] * t.HEADS, t.NARROW)}}[sys.argv[1]]
with torch.no_grad():
    found = t.compiled(lambda x: t.attend(x).clamp(max={number}), plan=t.plan_of(*spans))(t.inputs())
t.close(found, t.wanted(t.inputs(), rule))
print(json.dumps({{**counters["inductor"], **counters["aot_autograd"]}}))
"""


@pytest.mark.slow
def test_a_second_process_finds_the_compiled_graph_even_for_another_plan(cache_folder):
    """Nothing of ours in the key may differ between processes, and the tables must not be part of what is stored."""
    # The number makes the graph new: in a new folder instead, inductor would first test its compiler for a minute.
    script = START.format(tests=str(Path(__file__).parent), number=1000 + secrets.randbelow(10**9))

    def start(which, seed):
        given = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", script, which], capture_output=True, text=True, env=given)
        assert done.returncode == 0, done.stderr[-2000:]
        emitted = {path.name: path.stat().st_mtime_ns for path in (cache_folder / "kernels").iterdir()}
        return json.loads(done.stdout.splitlines()[-1]), emitted

    first, emitted = start("wide", "1")
    assert first["autograd_cache_saved"] == first["fxgraph_cache_miss"] == 1 and emitted
    second, again = start("narrow", "2")
    assert second.get("fxgraph_cache_hit") == second.get("autograd_cache_hit") == 1, second
    assert emitted == again
