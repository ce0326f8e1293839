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

from attnopt import backend, hf, text
from attnopt.distill import Menu
from attnopt.ir import Choice
from attnopt.plan import Budget

ROOT = Path(__file__).parents[2]
EXPECTED = {
    "exact_mode": ["Llama, padded", "run of real tokens", "largest difference"],
    "nanogpt": ["written-out float32 heads=4", "blocks.2.attention: SDPA is_causal"],
    "plan_and_run": ["span kernel", "final split"],
}


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


def test_exact_mode(said: Callable[..., str]) -> None:
    said("exact_mode")


def test_an_answer_far_below_its_line(said: Callable[..., str]) -> None:
    """Nearer than in the example itself."""
    out = said("generate_long", LENGTH=1024, DISTANCE=500, TIMED=3, ROUNDS=1)
    assert out.count("(right)") == 2 and "LlamaForCausalLM: enabled" in out
    megabytes = re.findall(r"tokens/s +(\S+) MB of cache", out)
    assert len(megabytes) == 4 and float(megabytes[3]) < 0.7 * float(megabytes[2])


@pytest.mark.slow
def test_plan_and_run(said: Callable[..., str]) -> None:
    """On less text, which bounds less."""
    said("plan_and_run", PROFILED=(128,), PLANNED=256, SAMPLES=16, BUDGET=Budget("loss", 60.0))


@pytest.mark.slow
def test_fine_tuning_lowers_the_loss(said: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer steps, partly on the text that it is measured on: so few on other text may do harm."""
    stream = text.stream
    monkeypatch.setattr(text, "stream", lambda files, tokenizer, _, tokens: stream(files, tokenizer, "final", tokens))
    out = said("finetune_under_plan", STEPS=9, BATCH=2, LENGTH=64)
    won = re.search(r"won back: (\S+) of (\S+) nats", out)
    assert "step 8: loss" in out and won is not None and 0.01 < float(won[1]) < float(won[2])


@pytest.mark.slow
def test_tails_are_fitted_planned_and_saved(said: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a model of one untrained layer: the example's forty seconds are those of 48 heads."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=4096, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, attn_implementation="sdpa")).eval()
    loaded = hf.Loaded(model, hf.tokenizer_of(str(hf.demo_model_path())), "demo")
    monkeypatch.setattr(hf, "load", lambda name: loaded)
    menu = Menu((8,), (2,), (32,), (4,), 2, ("linear", "taylor", "compensation"))
    tails = {"linear": Choice.of("linear", {"sink": 4, "window": 32, "features": 8})}
    out = said("linear_tail", PROFILED=96, PLANNED=128, SAMPLES=8, MENU=menu, TAILS=tails)
    assert out.count("offered on") == 1 and "of 4 heads" in out and "plan.json" in out
    kept = re.search(r"cache (\d+)% of dense", out)
    assert kept is not None and int(kept[1]) < 100
