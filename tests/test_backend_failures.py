"""Whatever fails inside: the result is eager's, the report says what failed, and nothing is raised into Dynamo."""

from __future__ import annotations

import pytest
import torch
import torch._inductor.compile_fx
from models import NanoGPT, tokens
from torch._dynamo.exc import BackendCompilerFailed

from attnopt import backend
from attnopt.backend import inductor
from attnopt.passes import PIPELINE

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def no_reports():
    backend.clear_reports()


def run_eagerly(gm, inputs, patches):
    return gm.forward


def fail(*_, **__):
    raise RuntimeError("out of luck\nand more")


# What the backend calls on its way, from the first step of the capture to the last pass.
STEPS = [
    "attnopt.capture.obstacle", "attnopt.capture.prepared", "attnopt.capture.exported_graph",
    "attnopt.capture.autocast.mark", "attnopt.capture.autocast.make_explicit", "attnopt.capture.autocast.restored",
    "attnopt.capture.write_back", "attnopt.capture.small_buffers", "attnopt.capture.prepare.encoder_layer",
    "attnopt.backend.capture", "attnopt.backend.needs_grad", "attnopt.backend.Program", "attnopt.backend.relied_at",
    "attnopt.passes.program.check_same_meta", "attnopt.passes.program.Builder.call",
]  # fmt: skip
UNUSED = {"attnopt.capture.prepare.encoder_layer"}


def check(said):
    model, ids = NanoGPT(flash=False).eval(), tokens()
    model.h = model.h[:1]
    with torch.no_grad():
        found = torch.compile(model, backend=backend.attnopt)(ids)
    torch.testing.assert_close(found, model(ids), atol=1e-4, rtol=1e-4)
    (report,) = backend.reports()
    lines = "\n".join(report.lines())
    assert (said in lines and not report.rewrites) if said else report.rewrites, lines


@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_fails(step, monkeypatch):
    for module in (backend, inductor):
        monkeypatch.setattr(module, "to_inductor", run_eagerly)
    monkeypatch.setattr(step, fail)
    check("" if step in UNUSED else "out of luck")


@pytest.mark.parametrize("at", range(len(PIPELINE)), ids=lambda at: PIPELINE[at].__module__.rsplit(".", 1)[-1])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_pass_that_fails(at, when, monkeypatch):
    """Also one that has changed the graph already."""

    def broken(program):
        if when == "after":
            PIPELINE[at](program)
        fail()

    for module in (backend, inductor):
        monkeypatch.setattr(module, "to_inductor", run_eagerly)
    monkeypatch.setattr(backend, "PIPELINE", (*PIPELINE[:at], broken, *PIPELINE[at + 1 :]))
    check("RuntimeError: out of luck")


def test_inductor_that_fails_on_what_we_made(monkeypatch):
    given = []

    def compile_fx(gm, inputs, **_):
        given.append([str(n.target) for n in gm.graph.nodes])
        return (
            fail()
            if any("is_causal" in str(n.kwargs) or n.args[5:6] == (True,) for n in gm.graph.nodes)
            else gm.forward
        )

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", compile_fx)
    check("RuntimeError: out of luck")
    assert len(given) == 2 and any("scaled_dot_product" in t for t in given[0])


def test_inductor_that_fails_on_the_model_itself(monkeypatch):
    """That is for the user to know, as it would be without us."""
    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", fail)
    with pytest.raises(BackendCompilerFailed, match="out of luck"):
        torch.compile(NanoGPT(flash=False).eval(), backend=backend.attnopt)(tokens())
