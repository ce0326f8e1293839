"""The backend from outside: found by name, options checked, results and gradients the model's, nothing raised."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch._inductor.compile_fx
import torch.nn.functional as F
from models import HEADS, LAYERS, ExplicitMasks, NanoGPT, build, make_plan, padding, tokens
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

from attnopt import backend
from attnopt.errors import OptionError, PlanError
from attnopt.ir import DENSE, Choice
from attnopt.passes import lower_exact

SPANS = (DENSE, *(Choice.of("sink_window", {"sink": s, "alpha": w, "beta": 0.0}) for s, w in ((2, 5), (0, 7), (2, 5))))
LLAMA = {f"model.layers.{n}.self_attn": SPANS for n in range(LAYERS)}


@pytest.fixture(autouse=True)
def no_reports():
    backend.clear_reports()


@pytest.fixture
def eagerly(monkeypatch):
    """Inductor replaced by the rewritten graph itself; what it would have been given is recorded."""
    seen = []

    def compile_fx(gm, inputs, *, config_patches=None, **_):
        seen.append((gm, config_patches))
        return gm.forward

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", compile_fx)
    return seen


def compiled(model, **options):
    return torch.compile(model, backend=backend.attnopt, options=options or None)


def rewritten():
    return [r.path for report in backend.reports() for r in report.rewrites]


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)


# --- found by name, through inductor --------------------------------------------------------------------------------

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


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.slow
def test_training_through_inductor(family):
    """Loss and gradients are eager's, exact and with a plan, which a graph that needs gradients refuses."""
    model, batch, mask = build(family, seed=3), tokens(2, 20), padding(2, 20, "right")
    arguments = {"input_ids": batch, "attention_mask": mask, "labels": batch, "use_cache": False}

    def gradients(call):
        model.zero_grad()
        loss = call(**arguments).loss
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

    loss, expected = gradients(model)
    names = list(LLAMA) if family == "llama" else [f"transformer.h.{n}.attn" for n in range(LAYERS)]
    plan = make_plan(dict.fromkeys(names, SPANS))
    for options in ({}, {"plan": plan}) if family == "llama" else ({},):
        torch._dynamo.reset()
        found_loss, found = gradients(compiled(model, **options))
        torch.testing.assert_close(found_loss, loss, atol=1e-4, rtol=1e-4)
        for name, gradient in expected.items():
            scale = float(gradient.norm()) or 1.0
            assert float((found[name] - gradient).norm()) < 2e-3 * scale, name
    assert rewritten() == names * (2 if family == "llama" else 1)
    if family == "llama":
        reasons = [r.reason for r in backend.reports()[-1].refusals]
        assert len(reasons) == LAYERS and all("no gradient" in r and "stays exact" in r for r in reasons)


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


# --- plans ----------------------------------------------------------------------------------------------------------


def test_a_plan_runs(eagerly, tmp_path):
    model, path = build("llama"), tmp_path / "plan.json"
    make_plan(LLAMA).save(path)
    with torch.no_grad():
        found = compiled(model, plan=str(path), verify=False)(tokens(), use_cache=False).logits
        with ExplicitMasks([[(0, 2**30), (2, 5), (0, 7), (2, 5)]] * LAYERS) as masks:
            expected = model(tokens(), use_cache=False).logits
        dense = model(tokens(), use_cache=False).logits
    assert masks.calls == LAYERS and rewritten() == list(LLAMA)
    close(found, expected)
    assert not torch.allclose(found, dense, atol=0.05)


def test_a_plan_below_its_least_length_is_dense(eagerly):
    model = build("llama")
    with torch.no_grad():
        found = compiled(model, plan=make_plan(LLAMA, min_length=21))(tokens(), use_cache=False).logits
        close(found, model(tokens(), use_cache=False).logits)
    assert rewritten() == list(LLAMA)


def test_a_new_plan_of_equal_shape_emits_nothing(eagerly, cache_folder):
    model = build("llama")
    with torch.no_grad():
        compiled(model, plan=make_plan(LLAMA))(tokens(), use_cache=False)
        before = sorted((cache_folder / "kernels").iterdir())
        torch._dynamo.reset()
        other = {name: (SPANS[1],) * HEADS for name in LLAMA}
        compiled(model, plan=make_plan(other))(tokens(), use_cache=False)
    assert sorted((cache_folder / "kernels").iterdir()) == before


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"encoder.0.attn": SPANS}, "holds nothing for"),
        ({name: SPANS[:2] for name in LLAMA}, "The plan has 2 heads at model.layers.0.self_attn, this model has 4"),
    ],
    ids=["other sites", "other heads"],
)
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_a_plan_for_another_model(eagerly, choices, said, grad):
    with torch.set_grad_enabled(grad), pytest.raises(BackendCompilerFailed) as caught:
        compiled(build("llama"), plan=make_plan(choices))(tokens(), use_cache=False)
    error = caught.value.inner_exception
    assert isinstance(error, PlanError) and said in str(error) and "attnopt profile" in error.remedy


def test_a_site_the_plan_does_not_name_stays_exact(eagerly):
    model, first = build("llama"), {"model.layers.0.self_attn": SPANS}
    with torch.no_grad():
        compiled(model, plan=make_plan(first))(tokens(), use_cache=False)
    (report,) = backend.reports()
    assert [r.lowering.split(",")[0] for r in report.rewrites] == ["span kernel", "SDPA is_causal"]
    assert [(r.path, "does not name" in r.reason) for r in report.refusals] == [("model.layers.1.self_attn", True)]


def test_graphs_without_a_planned_site_are_no_mistake(eagerly):
    """A graph of no attention, of a bidirectional one, or of one decoded token says nothing about the plan."""
    plan = make_plan(LLAMA)
    q = torch.randn(1, 2, 9, 8)
    compiled(lambda x: x + 1, plan=plan)(torch.ones(3))
    compiled(lambda q: F.scaled_dot_product_attention(q, q, q), plan=plan)(q)
    compiled(lambda q, k: F.scaled_dot_product_attention(q[:, :, :1], k, k), plan=plan)(q, q.clone())


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


def test_a_softmax_that_stays_is_kept_from_inductors_patterns(eagerly):
    def fn(q, k, v):
        i = torch.arange(q.shape[2])
        masked = F.scaled_dot_product_attention(q, k, v, attn_mask=i[:, None] >= i)
        return masked + torch.softmax((q @ k.transpose(-1, -2)).tanh(), -1) @ v

    q = torch.randn(2, 2, 9, 8)
    compiled(fn)(q, q + 1, q - 1)
    assert set(eagerly[0][1]) == {"joint_custom_pre_pass", "joint_custom_post_pass"}
    assert "attention patterns are kept from" in "".join(map(str, backend.reports()[0].notes))


# Each is matched by one of inductor's patterns and means something else than the pattern.
LOOKALIKES = {
    "axis of the queries": lambda q, k, v: torch.softmax((q @ k.transpose(-1, -2)) * 0.3, -2) @ v,
    "axis of the heads": lambda q, k, v: torch.softmax((q @ k.transpose(-1, -2)) * 0.3, 1) @ v,
    "by hand": lambda q, k, v: hand_softmax((q @ k.transpose(-1, -2)) * 0.3) @ v,
}


def hand_softmax(x):
    e = torch.exp(x - x.amax(-2, keepdim=True))
    return e / e.sum(-2, keepdim=True)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", LOOKALIKES)
def test_inductor_fuses_nothing_that_was_left_alone(name, grad):
    """Through inductor itself, whose other patterns stay on."""
    fn, (q, k, v) = LOOKALIKES[name], (torch.randn(2, 8, 8, 8, requires_grad=grad) for _ in range(3))
    found = compiled(fn)(q, k, v)
    torch.testing.assert_close(found, fn(q, k, v), atol=1e-5, rtol=1e-5)
    if grad:
        (ours,), (theirs,) = (torch.autograd.grad(out.square().sum(), q) for out in (found, fn(q, k, v)))
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_pass_of_the_users_own_still_runs():
    seen = []
    options = {"inductor": {"joint_custom_pre_pass": lambda graph: seen.append(len(graph.nodes))}}
    q = torch.randn(1, 2, 8, 8)
    compiled(LOOKALIKES["by hand"], **options)(q, q + 1, q - 1)
    assert seen


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


@pytest.mark.slow
def test_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint

    model = NanoGPT(flash=False)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            x = self.model.wte(ids)
            for block in self.model.h:
                x = checkpoint(block, x, use_reentrant=False)
            return self.model.head(x)

    def gradients(call):
        model.zero_grad()
        call(tokens()).square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    expected = gradients(model)
    found = gradients(compiled(Checkpointed()))
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm()) <= 1e-3 * float(gradient.norm()) + 1e-6, name
    assert "higher-order operator" in backend.reports()[0].fallback


def test_a_plan_refuses_what_its_kernel_cannot_do(eagerly):
    """Each reason by itself; a Refusal is falsy, so it is easily lost."""
    plan = make_plan({"attention": SPANS[1:3]})
    q, k, v = torch.randn(3, 1, 2, 9, 8)

    def attend(scale, q, k, v):
        i, j = torch.arange(q.shape[2]), torch.arange(k.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=j <= i[:, None], scale=scale)

    cases = {
        "serve prefill only": (0.3, q[:, :, :5], k, v),
        "values as wide as keys": (0.3, q, k, v[..., :4]),
        "a positive scale": (-0.3, q, k, v),
        "no gradient": (0.3, q.clone().requires_grad_(), k, v),
    }
    for said, (scale, *inputs) in cases.items():
        torch._dynamo.reset()
        backend.clear_reports()
        close(compiled(lambda *x, scale=scale: attend(scale, *x), plan=plan)(*inputs), attend(scale, *inputs))
        (report,) = backend.reports()
        assert any(said in r.reason for r in report.refusals), (said, report.lines())
        assert not any("span" in r.lowering for r in report.rewrites)


class Normalised(nn.Module):
    """A buffer that every training step writes to, beside an attention."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.project = nn.BatchNorm1d(16), nn.Linear(16, 16)

    def forward(self, x):
        q = self.project(self.norm(x.transpose(1, 2)).transpose(1, 2)).view(2, 9, 2, 8).transpose(1, 2)
        i = torch.arange(9)
        return F.scaled_dot_product_attention(q, q, q, attn_mask=i[:, None] >= i)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_a_buffer_that_is_written(training, grad):
    model = Normalised().train(training)
    twin, x = copy.deepcopy(model), torch.randn(2, 9, 16)
    with torch.set_grad_enabled(grad):
        call = compiled(twin)
        for _ in range(2):
            expected, found = model(x), call(x)
            close(found, expected)
    close(twin.norm.running_mean, model.norm.running_mean)
    close(twin.norm.running_var, model.norm.running_var)
    if grad:
        expected.square().sum().backward()
        found.square().sum().backward()
        close(twin.project.weight.grad, model.project.weight.grad)
    assert rewritten() == ["attention"]


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


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_as_many_graphs_as_inductor(family, eagerly):
    """Our own questions about sizes add no guards: three lengths take as many compilations as without us."""
    model = build(family)

    def graphs(name):
        torch._dynamo.reset()
        counters.clear()
        call = torch.compile(model, backend=name)
        for length in (20, 33, 47):
            with torch.no_grad():
                close(call(tokens(2, length), use_cache=False).logits, model(tokens(2, length), use_cache=False).logits)
        return counters["stats"]["unique_graphs"]

    assert graphs(backend.attnopt) == graphs("eager")
    assert len(rewritten()) == LAYERS * len(backend.reports())


def test_as_many_graphs_with_a_plan(eagerly):
    model = build("llama")
    call = compiled(model, plan=make_plan(LLAMA))
    counters.clear()
    for length in (20, 33, 47):
        with torch.no_grad(), ExplicitMasks([[(0, 2**30), (2, 5), (0, 7), (2, 5)]] * LAYERS):
            expected = model(tokens(2, length), use_cache=False).logits
        with torch.no_grad():
            close(call(tokens(2, length), use_cache=False).logits, expected)
    assert counters["stats"]["unique_graphs"] == 2


def test_dynamic_from_the_start(eagerly):
    """dynamic=True makes every float of a module an input; such a graph may be left alone, never wrong."""
    model = build("llama")
    call = torch.compile(model, backend=backend.attnopt, dynamic=True)
    for length in (20, 33):
        with torch.no_grad():
            close(call(tokens(2, length), use_cache=False).logits, model(tokens(2, length), use_cache=False).logits)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_prefill_and_decoding_with_a_cache(family, cache, eagerly):
    import transformers

    model = build(family)

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


def test_debug_prints_the_report_and_the_graphs(eagerly, monkeypatch, capsys):
    monkeypatch.setenv("ATTNOPT_DEBUG", "2")
    compiled(NanoGPT(flash=False).eval())(tokens())
    said = capsys.readouterr().err
    assert "h.0: SDPA is_causal" in said and "--- before" in said and "--- after" in said


def test_scaled_up_models_attend_unevenly():
    """The tests above would pass under any mask if attention were uniform."""
    model = build("llama")
    with torch.no_grad():
        dense = model(tokens(), use_cache=False).logits
        with ExplicitMasks([[(0, 12)] * HEADS] * LAYERS):
            windowed = model(tokens(), use_cache=False).logits
    assert float((dense - windowed).abs().max()) > 0.1
