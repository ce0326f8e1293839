"""The training script at its smallest: it trains, saves, and after an interruption ends in the very same state."""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

for needed in ("transformers", "tokenizers", "matplotlib"):
    pytest.importorskip(needed, reason=f"{needed} is not installed")

import torch
from safetensors import safe_open

SCRIPT = Path(__file__).parents[2] / "examples" / "train_demo_model.py"
# Three steps: two of four short sequences and one after the change of length.
CURRICULUM = ((0.5, 128, 4, 128), (1.0, 128, 4, 512))
TOKENS, STEPS = 1_500, 3


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("train_demo_model", SCRIPT)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    module.CURRICULUM, module.TINY_FILES = CURRICULUM, 10
    return module


def options(out: Path) -> argparse.Namespace:
    # A checkpoint after every step.
    return argparse.Namespace(
        out=out, tokens=TOKENS, shape="demo", context=8192, tiny=True, compile=False, save_every=-1.0
    )


def checkpoint(out: Path) -> tuple[dict[str, torch.Tensor], dict]:
    with safe_open(out / "checkpoint.safetensors", "pt") as f:
        return {name: f.get_tensor(name) for name in f.keys()}, json.loads(f.metadata()["state"])  # noqa: SIM118


def test_an_interrupted_run_ends_where_an_unbroken_one_does(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    script.train(options(whole))
    broken.mkdir()
    for name in ("tokenizer.json", "library.npy"):
        shutil.copy(whole / name, broken / name)

    batch = script.Batches.batch

    def interrupted(self: object, step: int, *shape: int) -> tuple[torch.Tensor, ...]:
        if step == STEPS - 1:
            raise KeyboardInterrupt
        return batch(self, step, *shape)

    with monkeypatch.context() as patch:
        patch.setattr(script.Batches, "batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            script.train(options(broken))
    assert checkpoint(broken)[1]["step"] == STEPS - 1
    script.train(options(broken))

    (tensors, state), (again, resumed) = checkpoint(whole), checkpoint(broken)
    assert state == resumed and state["step"] == STEPS and state["tokens"] >= TOKENS
    assert set(tensors) == set(again)
    for name, tensor in tensors.items():
        torch.testing.assert_close(
            again[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert (broken / "model" / "config.json").exists() and (broken / "model" / "tokenizer.json").exists()
