"""The benchmark of exact mode: what it builds, what it resumes, and that it says when the promise is broken."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

from benchmarks.exact_prefill import Cell, bootstrap, environment, geometric, relative, stored, summary
from benchmarks.prefill_document import document, figure
from benchmarks.prefill_models import CLASSES, HEADS, LAYERS, inputs_of, model_of

CELL = Cell("LlamaModel", "sdpa", False, "fp32", 512)


def row(ratio, low, high, name="LlamaModel"):
    return {**asdict(CELL), "name": name, "ratio": ratio, "low": low, "high": high}


def test_the_interval_holds_the_median_and_narrows():
    values = [1.0 + 0.01 * n for n in range(21)]
    low, high = bootstrap(values)
    assert 1.0 < low < 1.1 < high < 1.2
    assert bootstrap([1.5] * 5) == (1.5, 1.5)


def test_a_cell_below_the_floor_is_named():
    rows = [row(2.0, 1.9, 2.1), row(0.5, 0.4, 0.6, "BertModel"), row(1.0, 0.9, 1.1, "ViTModel")]
    found = summary([*rows, {**asdict(CELL), "failed": "why"}, {**asdict(CELL), "wrong": "why"}])
    assert found["cells"] == 3 and found["geometric mean"] == pytest.approx(1.0)
    assert [name.split()[0] for name in found["below the floor"]] == ["BertModel"]
    assert [name.split()[0] for name in found["lower bound below the floor"]] == ["BertModel", "ViTModel"]
    assert found["failed"] == found["wrong"] == ["LlamaModel"]


def test_what_is_stored_is_not_run_again_unless_it_failed(tmp_path):
    path = tmp_path / "rows.jsonl"
    failed = {**asdict(CELL), "dtype": "bf16", "failed": "why"}
    path.write_text(json.dumps(row(1.2, 1.1, 1.3)) + "\n" + json.dumps(failed) + "\n", encoding="utf-8")
    assert len(stored(path, again=False)) == 2 and list(stored(path, again=True)) == [CELL]
    assert stored(tmp_path / "none.jsonl", again=False) == {}


def test_the_page_shows_every_cell_and_marks_what_is_slow(tmp_path):
    rows = [
        {**row(2.345, 2.2, 2.4), "rewrites": ["SDPA is_causal"], "refusals": [], "misses": []},
        {**row(0.98, 0.9, 1.1, "BertModel"), "rewrites": [], "refusals": ["already a call"], "misses": []},
        {**asdict(CELL), "dtype": "bf16", "failed": "why"},
    ]
    data = {"summary": summary(rows), "rows": rows, "environment": environment()}
    text = document(data)
    assert "| LlamaModel | causal, grouped | 2.35 |" in text and "| BertModel | all keys | 0.98 = † |" in text
    assert "| already a call | 1 |" in text and "geometric mean of 2 cells: 1.52" in text and "did not run: 1" in text
    figure(data, tmp_path / "one.svg")
    figure(data, tmp_path / "two.svg")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_figures():
    assert geometric([4.0, 1.0]) == pytest.approx(2.0)
    assert relative(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.2)


@pytest.mark.parametrize("name", ["LlamaModel", "GPT2Model", "BartModel", "T5EncoderModel", "SwinModel"])
def test_models_have_the_size_that_is_said(name):
    model = model_of(name, "eager", torch.float32, 64)
    config = model.config
    if name != "SwinModel":
        layers = getattr(config, "num_hidden_layers", None) or config.num_layers
        assert layers == LAYERS and config.num_attention_heads == HEADS
    with torch.no_grad():
        out = model(**inputs_of(name, model, 64, False, torch.float32)).last_hidden_state
    assert out.isfinite().all() and out.std() > 0.1


def test_a_padding_mask_hides_a_sixteenth():
    model = model_of("BertModel", "eager", torch.float32, 64)
    mask = inputs_of("BertModel", model, 64, True, torch.float32)["attention_mask"]
    assert mask.sum() == 60 and mask[0, 0] == 1 and mask[0, -1] == 0
    assert "LlamaModel" in CLASSES and len(CLASSES) >= 24
