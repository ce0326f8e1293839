"""The backend from outside: found by name, options checked, results the model's, nothing raised."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from compiling import close, compiled, rewritten
from models import LAYERS, NanoGPT, build, tokens
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

from attnopt import backend
from attnopt.errors import OptionError, PlanError
from attnopt.passes import lower_exact

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def no_reports():
    backend.clear_reports()


# --- found by name --------------------------------------------------------------------------------------------------

CHILD = """
import sys, torch
import torch.nn.functional as F
def attend(q, k, v):
    i = torch.arange(q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=i[:, None] >= i)
assert "attnopt" not in sys.modules
q, k, v = torch.randn(3, 1, 2, 16, 8)
found = torch.compile(attend, backend="attnopt")(q, k, v)
torch.testing.assert_close(found, attend(q, k, v), atol=1e-5, rtol=1e-5)
from attnopt import backend
assert [r.lowering for report in backend.reports() for r in report.rewrites] == ["SDPA is_causal"]
heavy = {"rich", "transformers", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
print("done")
"""


def test_the_entry_point_in_a_process_that_never_imports_attnopt(tmp_path):
    """Needs the package installed; a source tree alone has no entry point."""
    from importlib.metadata import entry_points

    if "attnopt" not in {e.name for e in entry_points(group="torch_dynamo_backends")}:
        pytest.skip("attnopt is not installed here")
    command = [sys.executable, "-c", CHILD]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=dict(os.environ), timeout=300)
    assert ran.returncode == 0 and ran.stdout.strip() == "done", ran.stderr[-3000:]


# --- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"plam": "x"}, OptionError, "Did you mean 'plan'?"),
        ({"max_autotune": True}, OptionError, 'Inductor\'s own go into "inductor"'),
        ({"mode": "max-autotun"}, OptionError, "Did you mean 'max-autotune'?"),
        ({"mode": 3}, OptionError, "no mode of inductor"),
        ({"inductor": [1]}, OptionError, "must be a dict"),
        ({"verify": 1}, OptionError, "must be true or false"),
        ({"plan": 3}, OptionError, "Give the path of a plan file"),
        ({"plan": "nowhere/plan.json"}, PlanError, "There is no plan at nowhere/plan.json"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_wrong_options(options, error, said):
    with pytest.raises(error) as caught:
        backend.Options.of(options)
    assert said in str(caught.value)


def test_a_wrong_option_reaches_the_user(eagerly):
    with pytest.raises(BackendCompilerFailed) as caught:
        compiled(lambda x: x + 1, verfy=True)(torch.ones(3))
    assert isinstance(caught.value.inner_exception, OptionError) and "Did you mean 'verify'?" in str(caught.value)
    assert not eagerly


def test_a_broken_plan_file_reaches_the_user(eagerly, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text("{")
    with pytest.raises(BackendCompilerFailed) as caught:
        compiled(lambda x: x + 1, plan=str(path))(torch.ones(3))
    assert isinstance(caught.value.inner_exception, PlanError) and not eagerly


def test_mode_and_inductor_settings_reach_inductor(eagerly):
    compiled(lambda x: x + 1)(torch.ones(3))
    assert eagerly.pop()[1] is None
    torch._dynamo.reset()
    compiled(lambda x: x + 1, mode="max-autotune-no-cudagraphs", inductor={"epilogue_fusion": False})(torch.ones(3))
    patches = eagerly.pop()[1]
    assert patches["max_autotune"] is True and patches["epilogue_fusion"] is False
    torch._dynamo.reset()
    # torch.compile's own mode is not swallowed.
    torch.compile(lambda x: x + 1, backend="attnopt", mode="max-autotune-no-cudagraphs")(torch.ones(3))
    assert eagerly.pop()[1]["max_autotune"] is True


# --- never in the way -----------------------------------------------------------------------------------------------


def test_a_failure_at_one_site_leaves_that_site_only(eagerly, monkeypatch):
    choose = lower_exact.choose

    def broken(program, region):
        build, lowering = choose(program, region)

        def fail(region):
            build(region)
            raise RuntimeError("out of luck\nand more")

        return (fail, lowering) if region.site.path.startswith("h.0") else (build, lowering)

    monkeypatch.setattr(lower_exact, "choose", broken)
    model = NanoGPT(flash=False).eval()
    close(compiled(model)(tokens()), model(tokens()))
    (report,) = backend.reports()
    assert [r.path for r in report.rewrites] == ["h.1"]
    assert [(r.path, r.reason) for r in report.refusals] == [("h.0", "RuntimeError while rewriting: out of luck")]


@pytest.mark.parametrize("where", ["attnopt.backend.capture", "attnopt.backend.Program"])
def test_a_failure_of_everything_leaves_the_graph(eagerly, monkeypatch, where, caplog):
    def fail(*_, **__):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(where, fail)
    model = NanoGPT(flash=False).eval()
    close(compiled(model)(tokens()), model(tokens()))
    (report,) = backend.reports()
    assert report.fallback == "RuntimeError: out of luck" and not report.rewrites
    assert len(eagerly) == 1 and "left a graph alone" in caplog.text


def test_strict_raises(eagerly, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(backend, "capture", fail)
    monkeypatch.setenv("ATTNOPT_STRICT", "1")
    with pytest.raises(BackendCompilerFailed, match="out of luck"):
        compiled(NanoGPT(flash=False).eval())(tokens())


def test_a_graph_without_attention_is_given_on_unchanged(eagerly):
    def fn(x):
        return x.sin().sum()

    close(compiled(fn)(torch.ones(3)), fn(torch.ones(3)))
    assert any(
        n.target is not None and "sin" in str(n.target) and n.op == "call_method" for n in eagerly[0][0].graph.nodes
    )


@pytest.mark.parametrize("outer", [True, False], ids=["outer", "inner"])
def test_autocast(eagerly, outer):
    """As near to the truth as eager's own mixed precision, and rewritten all the same."""
    model = NanoGPT(flash=False).eval()

    def inner(ids):
        with torch.autocast("cpu", torch.bfloat16):
            return model(ids)

    if outer:
        with torch.autocast("cpu", torch.bfloat16):
            expected, found = model(tokens()), compiled(model)(tokens())
    else:
        expected, found = inner(tokens()), compiled(inner)(tokens())
    assert found.dtype == expected.dtype == torch.bfloat16
    truth = copy.deepcopy(model).double()(tokens())
    error, of_eager = ((out.double() - truth).norm() for out in (found, expected))
    assert 0 < error < 1.2 * of_eager < 0.1 * truth.norm()
    assert len(rewritten()) == LAYERS and not any(report.fallback for report in backend.reports())


def test_graph_breaks(eagerly):
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = NanoGPT(flash=False).eval()

        def forward(self, ids):
            x = self.model.wte(ids)
            for block in self.model.h:
                x = block(x)
                torch._dynamo.graph_break()
            return self.model.head(x)

    model = Broken()
    close(compiled(model)(tokens()), model(tokens()))
    # Both blocks run through one graph, which knows no module path.
    assert rewritten() == ["attention"]


# --- shapes and caches ----------------------------------------------------------------------------------------------


def test_as_many_graphs_as_inductor(eagerly):
    """Our own questions about sizes add no guards: three lengths take as many compilations as without us."""
    model = build("gpt2", n_layer=1)

    def graphs(name):
        torch._dynamo.reset()
        counters.clear()
        call = torch.compile(model, backend=name)
        for length in (20, 33, 47):
            with torch.no_grad():
                close(call(tokens(2, length), use_cache=False).logits, model(tokens(2, length), use_cache=False).logits)
        return counters["stats"]["unique_graphs"]

    assert graphs(backend.attnopt) == graphs("eager")
    assert len(rewritten()) == len(backend.reports()) > 0


def test_dynamic_from_the_start(eagerly):
    """dynamic=True makes every float of a module an input; such a graph may be left alone, never wrong."""
    model = build("llama", num_hidden_layers=1)
    call = torch.compile(model, backend=backend.attnopt, dynamic=True)
    for length in (20, 33):
        with torch.no_grad():
            close(call(tokens(2, length), use_cache=False).logits, model(tokens(2, length), use_cache=False).logits)


@pytest.mark.parametrize(
    ("cache", "family"),
    [
        ("static", "llama"),
        ("dynamic", "mistral"),
        pytest.param("static", "mistral", marks=pytest.mark.full),
        pytest.param("dynamic", "llama", marks=pytest.mark.full),
    ],
)
def test_prefill_and_decoding_with_a_cache(cache, family, eagerly):
    import transformers

    model = build(family, num_hidden_layers=1)

    def generate(call):
        held = transformers.DynamicCache(config=model.config)
        if cache == "static":
            held = transformers.StaticCache(config=model.config, max_cache_len=32)
        logits = []
        with torch.no_grad():
            for start, stop in ((0, 12), (12, 13), (13, 14), (14, 15)):
                logits.append(call(tokens(2, 16)[:, start:stop], past_key_values=held, use_cache=True).logits[:, -1])
        return torch.stack(logits)

    close(generate(compiled(model)), generate(model))
    assert not any(report.fallback for report in backend.reports())


def test_reports_are_bounded(monkeypatch):
    from attnopt.ir import GraphReport

    monkeypatch.setattr(backend, "MAX_REPORTS", 3)
    for n in range(5):
        backend.record(GraphReport(notes=(str(n),)))
    assert [r.notes for r in backend.reports()] == [("2",), ("3",), ("4",)]
