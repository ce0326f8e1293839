"""What the switches for debugging tell, write and leave out, on real models through the real pipeline."""

from __future__ import annotations

import copy
import json
import logging
import os
import re

import pruning
import pytest
import torch
from compiling import SPANS, close, compiled, rewritten
from models import make_plan
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from tracing import trace

from attnopt import backend
from attnopt.backend import dump, structured, switches
from attnopt.errors import OptionError
from attnopt.ir import GraphReport
from attnopt.passes import Program
from attnopt.passes.graph_text import changes
from attnopt.plan import Plan


@pytest.fixture(autouse=True)
def anew(monkeypatch):
    backend.clear_reports()
    monkeypatch.setattr(backend.FUEL, "made", 0)


class Layer(nn.Module):
    """Causal attention of x (B, H, N, D) over itself, written out; with a window, over the last keys only."""

    def __init__(self, window: int = 0) -> None:
        super().__init__()
        self.window = window

    def forward(self, x):
        keep = torch.ones(x.shape[2], x.shape[2], dtype=torch.bool).tril()
        keep = keep & keep.new_ones(keep.shape).triu(1 - self.window) if self.window else keep
        return x + (x @ x.transpose(-2, -1) / 3).masked_fill(~keep, float("-inf")).softmax(-1) @ x


class Sums(nn.Module):
    """Something like attention that is none: the product sums over the queries."""

    def forward(self, x):
        return torch.softmax(x @ x.transpose(-2, -1), dim=-1).transpose(-2, -1) @ x


GIVEN = torch.randn(1, 4, 12, 8, generator=torch.Generator().manual_seed(0))
CHOICES = {name: SPANS for name in "01"}


def layers(window=0):
    return nn.Sequential(Layer(window), Layer(window))


def run(model=None, given=GIVEN, **options):
    """A compiled model's output; two written-out layers are compiled where none is given."""
    torch._dynamo.reset()
    with torch.no_grad():
        return compiled(model or layers(), **options)(given)


# --- ATTNOPT_DEBUG ---------------------------------------------------------------------------------------------------


def told(level, monkeypatch, capsys, model=None):
    monkeypatch.setenv("ATTNOPT_DEBUG", str(level))
    run(model)
    return capsys.readouterr().err


def test_level_1_has_sites_and_times_and_no_reasons(eagerly, monkeypatch, capsys):
    said = told(1, monkeypatch, capsys)
    assert "2 attentions, 2 rewritten, 0 left alone, 0 not recognised" in said
    assert "  0: SDPA is_causal\n" in said and "  1: SDPA is_causal\n" in said
    (times,) = re.findall(r"^  ([\d.]+) ms: (.*)$", said, re.M)
    each = re.findall(r"(\w+) ([\d.]+)", times[1])
    assert [name for name, _ in each][:3] == ["capture", "strip_assertions", "normalise"]
    assert abs(sum(float(ms) for _, ms in each) - float(times[0])) < 1
    assert "@@" not in said and "tried" not in said


def test_what_was_not_recognised_has_its_code_at_1_and_its_reason_at_2(eagerly, monkeypatch, capsys):
    brief = told(1, monkeypatch, capsys, Sums())
    assert re.search(r"^  graph: not recognised \([a-z-]+\)$", brief, re.M) and "expected" not in brief
    full = told(2, monkeypatch, capsys, Sums())
    assert "test_debugging.py:" in full and "docs/reasons.md#" in full


def test_level_3_shows_what_passes_changed(eagerly, monkeypatch, capsys):
    said = told(3, monkeypatch, capsys)
    assert "--- before lower_exact" in said and "--- before match_attention" not in said
    assert re.search(r"^  -softmax = aten\.softmax\.int\(.*\)  \[1, 4, 12, 12\] float32$", said, re.M)
    assert re.search(r"^  \+.* = aten\.scaled_dot_product_attention\.default\(", said, re.M)


def test_level_4_shows_each_kernel_and_level_5_each_attempt(eagerly, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("ATTNOPT_CACHE", str(tmp_path))
    said = told(5, monkeypatch, capsys, layers(window=5))
    (file,) = (tmp_path / "kernels").glob("*.py")
    assert said.count("attnopt kernel:") == 1 and f"file {file}" in said and file.read_text() in said
    assert "spec SpanPrefill(target='cpu', dtype='float32', heads=4" in said
    assert "tried written-out at softmax (aten.softmax.int): matched, by " in said
    assert re.search(r"patterns matched: .*written-out 2 of 2", said) and re.search(r"rules applied: .*\w+ \d", said)


def test_a_plan_is_summed_up(eagerly, monkeypatch, capsys):
    monkeypatch.setenv("ATTNOPT_DEBUG", "1")
    run(plan=make_plan(CHOICES))
    assert re.search(r"; plan \w+: 6 sink_window, 2 dense", capsys.readouterr().err)


@pytest.mark.parametrize("setting", ["DEBUG=loud", "DEBUG=6", "FUEL=-1", "FUEL=two", "TARGET=gpu"])
def test_a_wrong_switch_is_an_error(setting, eagerly, monkeypatch):
    name, value = setting.split("=")
    monkeypatch.setenv(f"ATTNOPT_{name}", value)
    with pytest.raises(BackendCompilerFailed) as caught:
        run()
    assert isinstance(caught.value.inner_exception, OptionError) and value in str(caught.value) and not eagerly


# --- logging ---------------------------------------------------------------------------------------------------------


def test_the_logger_gets_sites_as_info_and_reasons_as_debug(eagerly, caplog):
    with caplog.at_level(logging.DEBUG, "attnopt"):
        run(Sums())
    levels = {record.levelno: record.getMessage() for record in caplog.records if record.name == "attnopt"}
    assert "not recognised, " in levels[logging.DEBUG] and " ms: capture " in levels[logging.INFO]
    caplog.clear()
    with caplog.at_level(logging.INFO, "attnopt"):
        run(Sums())
    assert {record.levelno for record in caplog.records if record.name == "attnopt"} == {logging.INFO}
    assert any(re.search(r"not recognised \([a-z-]+\)$", line) for line in caplog.messages)


@pytest.mark.parametrize("instead", [None, lambda name: None], ids=["missing", "another"])
def test_without_torchs_private_interface_that_is_said_once(instead, monkeypatch, caplog):
    monkeypatch.setattr(structured, "_said", False)
    monkeypatch.delattr("torch._logging.trace_structured")
    if instead is not None:
        monkeypatch.setattr("torch._logging.trace_structured", instead, raising=False)
    with caplog.at_level(logging.INFO, "attnopt"):
        structured.graph(torch.fx.Graph())
        structured.report(GraphReport())
    assert sum("takes no artifacts of attnopt" in line for line in caplog.messages) == 1


# --- ATTNOPT_DUMP and the history ------------------------------------------------------------------------------------


def test_a_graph_leaves_its_folder(eagerly, monkeypatch, tmp_path):
    monkeypatch.setenv("ATTNOPT_DUMP", str(tmp_path / "dumps"))
    run(plan=make_plan(CHOICES))
    run()
    process = tmp_path / "dumps" / str(os.getpid())
    first, second = sorted(p for p in process.iterdir() if p.name != "kernels")
    assert int(second.name) == int(first.name) + 1
    (report, other) = backend.reports()
    names = [f"{n:02d}.{step.name}.txt" for n, step in enumerate(other.history) if step.text or n == 0]
    assert {"00.capture.txt", "10.lower_exact.txt"} <= set(names)
    rest = ["events.jsonl", "report.txt", "sites.txt"]
    assert sorted(p.name for p in second.iterdir()) == sorted([*names, *rest])
    assert (second / "sites.txt").read_text().splitlines() == [str(site) for site in other.sites]
    assert (second / "report.txt").read_text().splitlines() == other.lines()
    assert Plan.load(first / "plan.json").choices == CHOICES
    events = [json.loads(line) for line in (first / "events.jsonl").read_text().splitlines()]
    assert [e["site"] for e in events if e["event"] == "rewrite"] == [r.path for r in report.rewrites]
    assert [e["milliseconds"] for e in events if e["event"] == "pass"] == [
        round(step.milliseconds, 3) for step in report.history
    ]
    # The texts are what each pass left, the last one the graph that went on.
    last = [step.text for step in other.history if step.text][-1]
    assert changes((second / names[-1]).read_text(), last) == "" and "softmax" not in last
    assert "scaled_dot_product_attention" in last and "softmax" in (second / "00.capture.txt").read_text()


def test_the_folder_of_another_process_of_this_number_stays(eagerly, monkeypatch, tmp_path):
    (tmp_path / str(os.getpid()) / "000").mkdir(parents=True)
    monkeypatch.setenv("ATTNOPT_DUMP", str(tmp_path))
    run()
    assert not list((tmp_path / str(os.getpid()) / "000").iterdir())
    assert list((tmp_path / f"{os.getpid()}-2").glob("*/report.txt"))


def test_a_process_that_changes_its_folder_keeps_the_one_of_its_graphs(eagerly, monkeypatch, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ATTNOPT_DUMP", "graphs")
    run()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run()
    assert not list((tmp_path / "elsewhere").iterdir())
    assert len(list((tmp_path / "graphs" / str(os.getpid())).glob("*/report.txt"))) == 2


def test_a_folder_that_cannot_be_written_is_said_once(eagerly, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATTNOPT_DUMP", str(tmp_path / "file" / "below"))
    run()
    run()
    assert len(rewritten()) == 4 and sum("nothing more is written" in line for line in caplog.messages) == 1
    assert dump.folder() is None


def test_texts_are_kept_where_asked_for(eagerly):
    run(history=True)
    run()
    kept, bare = backend.reports()
    assert kept.source.splitlines()[0].endswith(" = input  [1, 4, 12, 8] float32") and not bare.source
    assert {step.name for step in kept.history if step.text} >= {"normalise", "lower_exact", "remove_dead_code"}
    assert not any(step.text for step in bare.history)
    with pytest.raises(OptionError, match='"history" must be true or false'):
        backend.Options.of({"history": 3})


# --- ATTNOPT_FUEL and ATTNOPT_DISABLE --------------------------------------------------------------------------------


def test_fuel_is_counted_over_all_graphs(eagerly, monkeypatch):
    monkeypatch.setenv("ATTNOPT_FUEL", "3")
    close(run(), layers()(GIVEN))
    close(run(), layers()(GIVEN))
    assert rewritten() == ["0", "1", "0"]
    (no,) = backend.reports()[1].refusals
    assert (no.path, no.code) == ("1", "out-of-fuel") and no.node and no.source


def test_without_fuel_inductor_gets_what_it_would_have_had(eagerly, monkeypatch):
    monkeypatch.setenv("ATTNOPT_FUEL", "0")
    run()
    assert not rewritten() and "softmax" in eagerly[0][0].code
    assert [no.code for no in backend.reports()[0].refusals] == ["out-of-fuel"] * 2


def test_a_pruned_site_takes_one_replacement(eagerly, monkeypatch):
    """Heads of unequal groups leave two attentions behind, each replaced by itself; the site is one all the same."""
    model = nn.Sequential(pruning.Attention(4, 2), pruning.Attention(4, 2)).eval()
    gone = {name: pruning.choices_for(4, (0,)) for name in "01"}
    plan = pruning.plan_of(gone, {name: pruning.means_for(4) for name in "01"})
    monkeypatch.setenv("ATTNOPT_FUEL", "1")
    run(model, torch.randn(2, 6, pruning.WIDTH), plan=plan)
    (report,) = backend.reports()
    (rewrite,) = report.rewrites
    assert rewrite.lowering.startswith("1 of 4 heads removed") and rewrite.path == "0"
    assert [(no.path, no.code) for no in report.refusals] == [("1", "out-of-fuel")]


def disabled(name, monkeypatch, **options):
    monkeypatch.setenv("ATTNOPT_DISABLE", name)
    run(**options)
    return backend.reports()[-1]


def test_everything_can_be_switched_off(eagerly, monkeypatch):
    report = disabled("all", monkeypatch)
    assert report.fallback_code == "switched-off" and not report.history and "softmax" in eagerly[0][0].code


def test_a_pattern_can_be_switched_off(eagerly, monkeypatch):
    report = disabled("written-out", monkeypatch)
    assert [miss.code for miss in report.misses] == ["switched-off"] * 2 and not report.rewrites
    assert "ATTNOPT_DISABLE switches off written-out" in report.notes
    assert len(disabled("sdpa", monkeypatch).rewrites) == 2


def test_a_candidate_can_be_switched_off(eagerly, monkeypatch):
    report = disabled("sink_window", monkeypatch, plan=make_plan(CHOICES))
    assert {no.code for no in report.refusals} >= {"switched-off"}
    assert not any(rewrite.choices for rewrite in report.rewrites)


def test_a_kernel_can_be_switched_off(eagerly, monkeypatch, tmp_path):
    monkeypatch.setenv("ATTNOPT_CACHE", str(tmp_path))
    model = layers(window=5)
    for name in ("cpu span_prefill", "cpu"):
        monkeypatch.setenv("ATTNOPT_DISABLE", name)
        close(run(model), model(GIVEN))
        assert {p.name.split("_")[2] for p in (tmp_path / "kernels").glob("*.py")} == {"reference"}


def test_each_pass_can_be_switched_off(monkeypatch):
    """But for those that others are built on: what is left computes the same."""
    captured = trace(layers(), GIVEN, passes=()).program.gm
    (expected,), names = captured(GIVEN), [step.__module__.rsplit(".", 1)[-1] for step in backend.PIPELINE]
    for name in set(names) - set(switches.NEEDED):
        monkeypatch.setenv("ATTNOPT_DISABLE", name)
        program = Program(copy.deepcopy(captured)).run(backend.PIPELINE)
        close(program.gm(GIVEN)[0], expected)
        assert [step.name for step in program.history] == [n for n in names if n != name]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("writen-out", "Did you mean 'written-out'?"),
        ("lower_exakt", "Did you mean 'lower_exact'?"),
        ("sdpa,zzz", "There are all, "),
        ("resolve_regions", "cannot be switched off"),
        ("reference span_prefill", "cannot be switched off"),
    ],
)
def test_a_name_that_cannot_be_switched_off_is_an_error(name, said, monkeypatch):
    monkeypatch.setenv("ATTNOPT_DISABLE", name)
    with pytest.raises(OptionError) as caught:
        switches.check()
    assert said in str(caught.value)
