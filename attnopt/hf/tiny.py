"""Models with random weights, of small or of their published sizes, by the name of a class or of a model type.

from_config("llama", tiny=True)                  LlamaForCausalLM with two layers of hidden size 64
from_config("T5ForConditionalGeneration", ...)   any class of transformers that has a configuration
from_config("./config.json", ...)                the class and, without `tiny`, the sizes that the file says
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attnopt.errors import ModelError, OptionError
from attnopt.hf.classes import KINDS, entries
from attnopt.hf.loading import OWN_CODE, Loaded, needs_own_code, transformers
from attnopt.hf.shrink import POSITION_COUNT, POSITIONS, shrink
from attnopt.units import bytes_text

# Bytes of random weights that are made without being asked twice: a model of two billion parameters in float32.
MOST_BYTES = 8 * 2**30
# The mappings that are asked first: transformers has a causal class of encoders and of decoders of pairs too.
FOREMOST = (
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES",
)  # fmt: skip


def from_config(
    name: str, *, tiny: bool, attention: str = "sdpa", dtype: torch.dtype = torch.float32, device: str = "cpu",
    changes: Mapping[str, Any] | None = None, positions: int = POSITIONS, seed: int = 0,
) -> Loaded:  # fmt: skip
    """A model in evaluation mode, with random weights and without a tokenizer.

    tiny: a few small layers of every type the model has; `positions` are the tokens they then serve at least, unless
    the model serves fewer. attention: of transformers; where a class has no "sdpa", it is "eager", which
    the model's note says. changes: fields of the configuration, dotted into nested ones, in place of what they were.
    ModelError where nothing has this name, or where it does not build.
    """
    cls, config = configured(name)
    try:
        config = changed(shrink(config, positions=positions) if tiny else config, changes or {})
        if not tiny:
            check_size(name, cls, config, dtype)
        torch.manual_seed(seed)
        with torch.device(device):
            model = cls._from_config(config, attn_implementation=attention, dtype=dtype)
    except (ModelError, OptionError):
        raise
    except Exception as error:
        if "attn_implementation" in str(error) or "does not support" in str(error):
            if attention == "sdpa":
                made = from_config(
                    name, tiny=tiny, attention="eager", dtype=dtype, device=device, changes=changes,
                    positions=positions, seed=seed,
                )  # fmt: skip
                return replace(made, note=f"{cls.__name__} has no SDPA path: its attention is the eager one.")
            said = f"{cls.__name__} cannot be built with --attention {attention}: {summary(error)}"
            raise OptionError(said, "Use --attention eager.") from error
        remedy = "Change its configuration with --set KEY=VALUE, for example --set num_hidden_layers=4."
        raise ModelError(f"{cls.__name__} cannot be built: {summary(error)}", remedy) from error
    return Loaded(model.eval(), None, name)


def configured(name: str) -> tuple[Any, Any]:
    """The class that a name means, and its configuration with the published sizes."""
    hf = transformers()
    path = Path(name)
    if path.suffix == ".json" or path.is_dir():
        return from_file(path)
    cls = getattr(hf, name, None) if name.isidentifier() and name[:1].isupper() else None
    if cls is None:
        cls = class_of_type(name)
    if getattr(cls, "config_class", None) is None:
        raise unknown(name)
    try:
        return cls, cls.config_class()
    except Exception as error:
        said = f"{cls.config_class.__name__} has no defaults: {summary(error)}"
        raise ModelError(said, "Give the path of a config.json.") from error


def from_file(path: Path) -> tuple[Any, Any]:
    hf = transformers()
    try:
        config = hf.AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        if needs_own_code(error):
            raise ModelError(f"{path} needs Python code of its own.", OWN_CODE) from error
        said = f"{path} is no configuration of transformers: {summary(error)}"
        raise ModelError(said, "Give a config.json that save_pretrained() wrote, or the folder of one.") from error
    named = next((cls for n in config.architectures or () if (cls := getattr(hf, n, None)) is not None), None)
    cls = named or class_of_type(config.model_type)
    if cls is None:
        said = f"{path} names no class of transformers."
        raise ModelError(said, 'Add "architectures", for example ["LlamaForCausalLM"].')
    return cls, config


def class_of_type(model_type: str) -> Any:
    """The class of a model type that does what its models were made for; None where there is none."""
    from transformers.models.auto import modeling_auto

    for mapping in (*FOREMOST, *(m for mappings in KINDS.values() for m in mappings), "MODEL_MAPPING_NAMES"):
        names = getattr(modeling_auto, mapping).get(model_type, ())
        for name in (names,) if isinstance(names, str) else names:
            if (cls := getattr(transformers(), name, None)) is not None:
                return cls
    return None


def unknown(name: str) -> ModelError:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    known = dict.fromkeys([*CONFIG_MAPPING_NAMES, *(e.name for e in entries())])
    near = difflib.get_close_matches(name, known, 3) or [n for n in known if name.lower() in n.lower()][:3]
    remedy = f"Did you mean {', '.join(near)}?" if near else "Give llama, LlamaForCausalLM, ./config.json, ..."
    return ModelError(f"transformers has no model type and no model class {name}.", remedy)


def changed(config: Any, changes: Mapping[str, Any]) -> Any:
    """The same configuration with some fields changed. OptionError where it has no such field."""
    for key, value in changes.items():
        *outer, last = key.split(".")
        held = config
        for name in outer:
            held = getattr(held, name, None)
        if held is None or not hasattr(held, last):
            fields = sorted(held.to_dict()) if hasattr(held, "to_dict") else []
            near = difflib.get_close_matches(last, fields, 1)
            remedy = f"Did you mean {'.'.join([*outer, near[0]])}?" if near else "Its config.json lists them."
            raise OptionError(f"{type(config).__name__} has no field {key!r}.", remedy)
        setattr(held, last, value)
    return config


def change_of(text: str) -> tuple[str, Any]:
    """("num_hidden_layers", 4) of "num_hidden_layers=4"; a value that is no JSON is text."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise OptionError(f"{text!r} changes nothing.", "Write KEY=VALUE, for example --set num_hidden_layers=4.")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def check_size(name: str, cls: Any, config: Any, dtype: torch.dtype) -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in cls._from_config(config).parameters())
    if count * dtype.itemsize > MOST_BYTES:
        said = f"{name} has {count / 1e9:.1f} billion parameters, {bytes_text(count * dtype.itemsize)} of them"
        raise ModelError(f"{said}.", "Add --tiny for small random ones, or --set num_hidden_layers=2 for fewer layers.")


def positions_of(config: Any) -> list[int]:
    """How many tokens the tables of positions hold, of the configuration and of those nested in it."""
    held = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    fields = [item for c in held if hasattr(c, "to_dict") for item in c.to_dict().items()]
    return [n for name, n in fields if isinstance(n, int) and POSITION_COUNT.fullmatch(name)]


def enlarge(model: nn.Module) -> None:
    """Random weights of unit gain, and none that is zero: a soft-max over scores near zero would hide its mask."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
                module.weight.normal_(0.0, max(1, min(module.weight.shape)) ** -0.5)
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(0.0, 0.5)
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.numel() and not parameter.any():
                parameter.normal_(0.0, 0.1)


def summary(error: BaseException) -> str:
    """The error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:240]}"
