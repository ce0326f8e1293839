"""Each example runs as it is; the pattern worked out in docs/add-a-pattern.md is a pattern."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attnopt.registry import PATTERNS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/add-a-pattern.md"
EXPECTED = {
    "exact_mode": ["Llama, padded", "run of real tokens", "largest difference"],
    "nanogpt": ["written-out float32 heads=4", "blocks.2.attention: SDPA is_causal"],
    "plan_and_run": ["span kernel", "final split"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_example_runs(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py")]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert all(text in ended.stdout for text in EXPECTED[name]), ended.stdout
    assert not list(tmp_path.iterdir())


def test_fine_tuning_lowers_the_loss(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The example itself with fewer steps, its graphs run as they are: compiling them takes half a minute."""
    import torch._inductor.compile_fx as inner

    monkeypatch.setattr(inner, "compile_fx", lambda gm, inputs, **_: gm.forward)
    spec = importlib.util.spec_from_file_location("finetune", ROOT / "examples" / "finetune_under_plan.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.STEPS, example.BATCH, example.LENGTH = 9, 2, 64
    torch.manual_seed(0)
    example.main()
    said = capsys.readouterr().out
    won = re.search(r"won back: (\S+) of (\S+) nats", said)
    assert "step 8: loss" in said and won is not None and 0.01 < float(won[1]) < float(won[2])


def test_tails_are_fitted_planned_and_saved(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The example itself on a model of one untrained layer: its forty seconds are those of 48 heads."""
    import transformers

    from attnopt import hf

    spec = importlib.util.spec_from_file_location("linear_tail", ROOT / "examples" / "linear_tail.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    torch.manual_seed(0)
    sizes = dict(vocab_size=4096, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, attn_implementation="sdpa")).eval()
    tokenizer = hf.tokenizer_of(str(hf.demo_model_path()))
    monkeypatch.setattr(example.hf, "load", lambda name: hf.Loaded(model, tokenizer, name))
    example.PROFILED, example.PLANNED, example.SAMPLES = 96, 128, 8
    example.MENU = replace(example.MENU, steps=2)
    example.main()
    said = capsys.readouterr().out
    assert said.count("offered on") == 3 and "of 4 heads" in said and "budget 5 %; cache " in said
    assert "plan.json" in said and int(re.search(r"cache (\d+)% of dense", said)[1]) < 100  # type: ignore[index]


def test_the_documented_pattern_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of docs/add-a-pattern.md, one module: the operator, its pattern, their tests."""
    operator, pattern, tests = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    path = tmp_path / "documented.py"
    pattern = pattern.replace("from __future__ import annotations\n", "")
    path.write_text("\n".join(["from tracing import qkv, trace", operator, pattern, tests]), encoding="utf-8")
    list(PATTERNS)  # all others are there first
    monkeypatch.setattr(PATTERNS, "_items", dict(PATTERNS._items))
    spec = importlib.util.spec_from_file_location("documented", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ran = [getattr(module, name)() for name in dir(module) if name.startswith("test_")]
    assert len(ran) == 2
