"""Each example runs as it is."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from attnopt import backend, hf, registry, text
from attnopt.distill import Menu
from attnopt.ir import Choice
from attnopt.plan import Budget

ROOT = Path(__file__).parents[2]
EXPECTED = {
    "exact_mode": ["Llama, padded", "run of real tokens", "largest difference"],
    "nanogpt": ["written-out float32 heads=4", "blocks.2.attention: SDPA is_causal"],
    "read_a_report": [
        "LlamaForCausalLM: compiled by attnopt",
        "lower_exact",
        "+scaled_dot_product_attention",
        "softmax-axis: ",
        "one file that loads",
    ],
    "plan_and_run": ["span kernel", "final split"],
}


def test_every_program_is_in_the_table() -> None:
    table = (ROOT / "examples/README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(\w+\.py)\b", table))
    assert {path.name for path in (ROOT / "examples").glob("*.py")} <= named


def test_an_example_runs_by_itself(tmp_path: Path) -> None:
    """As a user starts it, through inductor."""
    command = [sys.executable, str(ROOT / "examples" / "nanogpt.py")]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert all(line in ended.stdout for line in EXPECTED["nanogpt"]), ended.stdout
    assert not list(tmp_path.iterdir())


@pytest.fixture
def said(
    eagerly: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., str]:
    """Runs an example itself, some of its constants changed, and its graphs as they are: compiling them takes longer
    than everything else. What it prints."""

    def run(name: str, **constants: Any) -> str:
        spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        example = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(example)
        for constant, value in constants.items():
            assert hasattr(example, constant)
            setattr(example, constant, value)
        backend.clear_reports()
        torch.manual_seed(0)
        monkeypatch.chdir(tmp_path)
        example.main()
        assert not list(tmp_path.iterdir())
        out = capsys.readouterr().out
        assert all(line in out for line in EXPECTED.get(name, [])), out
        return out

    return run


@pytest.fixture
def one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of one untrained layer as the demo: the seconds of an example are those of 48 heads."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=4096, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, attn_implementation="sdpa")).eval()
    loaded = hf.Loaded(model, hf.tokenizer_of(str(hf.demo_model_path()))[0], "demo")
    monkeypatch.setattr(hf, "load", lambda name: loaded)


def test_exact_mode(said: Callable[..., str]) -> None:
    said("exact_mode")


def test_an_answer_far_below_its_line(said: Callable[..., str]) -> None:
    """Nearer than in the example itself."""
    out = said("generate_long", LENGTH=1024, DISTANCE=500, TIMED=3, ROUNDS=1)
    assert out.count("(right)") == 2 and "LlamaForCausalLM: enabled" in out
    mib = re.findall(r"tokens/s +(\S+) MiB of cache", out)
    assert len(mib) == 4 and float(mib[3]) < 0.7 * float(mib[2])


def test_a_report_is_read(said: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> None:
    page = tmp_path_factory.mktemp("pages") / "report.html"
    out = said("read_a_report", PAGE=page, LAYERS=1, LENGTH=32)
    before, after = map(int, re.findall(r"self_attn: (\d+) nodes -> (\d+), keeps j <= i", out)[0])
    assert after == 4 < before and "normalise" not in out.partition("left alone, and why")[2]
    assert "SDPA is_causal" in page.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["one_layer", pytest.param("shipped", marks=pytest.mark.full)])
def test_plan_and_run(said: Callable[..., str], layers: str, request: pytest.FixtureRequest) -> None:
    """On less text, which bounds less."""
    budget = Budget("loss", 60.0)
    if layers == "one_layer":
        request.getfixturevalue(layers)
        budget = Budget("loss", 10_000.0)
    said("plan_and_run", PROFILED=(128,), PLANNED=256, SAMPLES=16, BUDGET=budget)


@pytest.mark.slow
def test_a_candidate_of_one_s_own_is_planned_and_run(
    said: Callable[..., str], one_layer: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a budget that nothing misses, the cheapest plan is the narrowest: the example's own windows."""
    list(registry.CANDIDATES)  # all others are there first
    monkeypatch.setattr(registry.CANDIDATES, "_items", dict(registry.CANDIDATES._items))
    out = said("add_a_candidate", PROFILED=(64,), PLANNED=128, SAMPLES=8, BUDGET=Budget("loss", 10_000.0))
    assert "of 4 heads: 4 idle" in out and out.count("span kernel") == 1 and "final split" in out


@pytest.mark.slow
def test_fine_tuning_lowers_the_loss(said: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer steps, partly on the text that it is measured on: so few on other text may do harm."""
    stream = text.stream
    monkeypatch.setattr(text, "stream", lambda files, tokenizer, _, tokens: stream(files, tokenizer, "final", tokens))
    out = said("finetune_under_plan", STEPS=9, BATCH=2, LENGTH=64)
    won = re.search(r"won back: (\S+) of (\S+) nats", out)
    assert "step 8: loss" in out and won is not None and 0.01 < float(won[1]) < float(won[2])


@pytest.mark.slow
def test_tails_are_fitted_planned_and_saved(said: Callable[..., str], one_layer: None) -> None:
    menu = Menu((8,), (2,), (32,), (4,), 2, ("linear", "taylor", "compensation"))
    tails = {"linear": Choice.of("linear", {"sink": 4, "window": 32, "features": 8})}
    out = said("linear_tail", PROFILED=96, PLANNED=128, SAMPLES=8, MENU=menu, TAILS=tails)
    assert out.count("offered on") == 1 and "of 4 heads" in out and "plan.json" in out
    kept = re.search(r"cache (\d+)% of dense", out)
    assert kept is not None and int(kept[1]) < 100
