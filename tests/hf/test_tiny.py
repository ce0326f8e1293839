"""Random models by name: the right class, small, runnable; and what each mistake is told."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from attnopt.errors import ModelError, OptionError
from attnopt.hf import load, tiny
from attnopt.hf.inputs import inputs_of
from attnopt.hf.loading import tokenizer_of
from attnopt.hf.tiny import change_of, from_config


@pytest.mark.parametrize(("name", "cls"), [
    ("llama", "LlamaForCausalLM"), ("gpt2", "GPT2LMHeadModel"), ("bert", "BertForMaskedLM"),
    ("t5", "T5ForConditionalGeneration"), ("whisper", "WhisperForConditionalGeneration"),
    ("vit", "ViTForImageClassification"), ("gemma3", "Gemma3ForConditionalGeneration"), ("clip", "CLIPModel"),
    ("Qwen3Model", "Qwen3Model"),
])  # fmt: skip
def test_a_name_is_a_small_model_that_runs(name: str, cls: str) -> None:
    model = from_config(name, tiny=True).model
    assert type(model).__name__ == cls and sum(p.numel() for p in model.parameters()) < 1_000_000
    given = inputs_of(model, batch=1)
    assert {tensor.shape[0] for tensor in given.values() if isinstance(tensor, torch.Tensor)} == {1}
    with torch.no_grad():
        model(**given)


def test_a_config_file_names_the_class_and_the_sizes(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64,
                                      vocab_size=50, architectures=["LlamaForCausalLM"])  # fmt: skip
    config.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        model = from_config(str(path), tiny=False).model
        assert type(model).__name__ == "LlamaForCausalLM" and len(model.model.layers) == 3
    assert len(from_config(str(tmp_path), tiny=True).model.model.layers) == 2
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="is no configuration of transformers"):
        from_config(str(tmp_path), tiny=True)


def test_fields_are_changed_by_name() -> None:
    changes = dict(
        map(change_of, ["num_hidden_layers=3", "hidden_act=relu", 'rope_parameters={"rope_type": "default"}'])
    )
    assert changes == {"num_hidden_layers": 3, "hidden_act": "relu", "rope_parameters": {"rope_type": "default"}}
    del changes["rope_parameters"]
    model = from_config("llama", tiny=True, changes=changes).model
    assert len(model.model.layers) == 3 and model.config.hidden_act == "relu"
    nested = from_config("gemma3", tiny=True, changes={"text_config.sliding_window": 5}).model
    assert nested.config.text_config.sliding_window == 5


def test_more_positions_are_made_for_longer_inputs() -> None:
    assert from_config("gpt2", tiny=True, positions=200).model.config.n_positions == 200
    assert tiny.positions_of(from_config("clip", tiny=True, positions=200).model.config) == [77]


@pytest.mark.parametrize(("name", "changes", "said"), [
    ("lama", {}, "no model class lama.\n  Did you mean llama"),
    ("LlamaForCausal", {}, "Did you mean LlamaForCausalLM"),
    ("LlamaConfig", {}, "no model class LlamaConfig"),
    ("no/such/config.json", {}, "is no configuration of transformers"),
    ("llama", {"num_hidden_layer": 3}, "Did you mean num_hidden_layers?"),
    ("llama", {"no.such": 3}, "has no field 'no.such'"),
    ("llama", {"hidden_act": "no-such"}, "LlamaForCausalLM cannot be built"),
])  # fmt: skip
def test_a_mistake_is_named(name: str, changes: dict[str, object], said: str) -> None:
    with pytest.raises((ModelError, OptionError)) as raised:
        from_config(name, tiny=True, changes=changes)
    assert said in str(raised.value) and raised.value.remedy


def test_a_change_without_a_value_is_refused() -> None:
    with pytest.raises(OptionError, match="Write KEY=VALUE"):
        change_of("num_hidden_layers")


def test_a_model_of_published_size_is_not_made_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, architectures=["GPT2LMHeadModel"])
    (tmp_path / "config.json").write_text(json.dumps(small.to_dict()), encoding="utf-8")
    monkeypatch.setattr(tiny, "MOST_BYTES", 1000)
    with pytest.raises(ModelError, match=r"(?s)billion parameters.*Add --tiny"):
        from_config(str(tmp_path), tiny=False)


def test_a_saved_model_is_loaded_as_what_it_was(tmp_path: Path) -> None:
    from_config("bert", tiny=True).model.save_pretrained(tmp_path)
    assert type(load(str(tmp_path), as_saved=True).model).__name__ == "BertForMaskedLM"
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    del config["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert type(load(str(tmp_path), as_saved=True).model).__name__ == "BertLMHeadModel"


OWN_CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaTokenizer
Path(RAN).touch()
class Own(LlamaConfig):
    model_type = "own"
"""


@pytest.fixture
def with_own_code(tmp_path: Path) -> Path:
    """A folder whose configuration and tokenizer name classes of a file beside them."""
    (tmp_path / "own.py").write_text(OWN_CODE.replace("RAN", repr(str(tmp_path / "was_run"))), encoding="utf-8")
    config = {"model_type": "own", "architectures": ["LlamaForCausalLM"], "auto_map": {"AutoConfig": "own.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    named = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named), encoding="utf-8")
    return tmp_path


def test_code_that_lies_with_a_model_is_not_run(with_own_code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Whoever is asked says yes.
    monkeypatch.setattr("builtins.input", lambda _: "y")
    name = str(with_own_code)
    for refused in (partial(from_config, name, tiny=True), partial(load, name), partial(load, name, as_saved=True)):
        with pytest.raises(ModelError, match=r"(?s)needs Python code of its own.*module:callable"):
            refused()
    tokenizer, note = tokenizer_of(name)
    assert tokenizer is None and "needs Python code of its own" in note
    assert not (with_own_code / "was_run").exists()


def test_a_class_without_an_sdpa_path_is_built_eager_and_says_so() -> None:
    made = from_config("gemma2", tiny=True)
    assert made.model.config._attn_implementation == "eager"
    assert made.note == "Gemma2ForCausalLM has no SDPA path: its attention is the eager one."
    assert from_config("llama", tiny=True).note == ""
