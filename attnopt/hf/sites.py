"""Which modules of a transformers model attend, as the Sites that plans name, and which models cannot be served.

A module attends if it has a `layer_idx` and says whether it `is_causal`: so do all that call the attention function
their configuration names. Its site is called by its path, as in a profile.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from attnopt.errors import ModelError
from attnopt.hf.loading import transformers
from attnopt.ir import Mask, Site

KNOWN_LAYERS = frozenset({"full_attention", "sliding_attention"})
AS_IT_IS = 'Run this model as it is, or compiled: model.compile(backend="attnopt").'


@dataclass(frozen=True)
class Attention:
    """One attention of a model: the module, the layer of the cache it writes to, and its site."""

    module: nn.Module
    layer: int
    site: Site


def generator(model: Any) -> Any:
    """The transformers model itself, out of torch.compile's wrapper. ModelError where there is none that generates."""
    hf = transformers()
    inner = getattr(model, "_orig_mod", model)
    if not isinstance(inner, hf.PreTrainedModel):
        raise ModelError(
            f"{type(inner).__name__} is no transformers model.", "Give the model itself, not what is wrapped around it."
        )
    return inner


def attentions(model: Any) -> list[Attention]:
    """The attentions of a model in the order of their layers. ModelError, with a reason, where it cannot be served."""
    refuse(model)
    config = model.config
    found = []
    for name, module in model.named_modules():
        if not (isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "is_causal")):
            continue
        if not module.is_causal:
            raise unserved(model, f"{name} is not causal")
        found.append(Attention(module, module.layer_idx, site_of(model, name, module, config)))
    found.sort(key=lambda a: a.layer)
    if [a.layer for a in found] != list(range(config.num_hidden_layers)):
        raise unserved(model, f"{len(found)} attentions were found in {config.num_hidden_layers} layers")
    return found


def site_of(model: Any, name: str, module: nn.Module, config: Any) -> Site:
    """The site of an attention module, whose sizes stand in the configuration and in the module."""
    heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    kv_heads = groups or heads
    dim = getattr(module, "head_dim", None) or getattr(config, "head_dim", None) or config.hidden_size // heads
    if getattr(module, "num_key_value_groups", heads // kv_heads) != heads // kv_heads:
        raise unserved(model, f"{name} shares KV heads in another way than its configuration says")
    dtype = str(next(module.parameters()).dtype).removeprefix("torch.")
    scale = float(getattr(module, "scaling", None) or dim**-0.5)
    window = own_window(model, name, module, config)
    return Site(name, 0, "transformers", heads, kv_heads, dim, dim, scale, dtype, Mask(causal=True, window=window))


def own_window(model: Any, name: str, module: Any, config: Any) -> int | None:
    """The model's own sliding window at a layer; None for full attention."""
    types = types_of(config)
    window = getattr(config, "sliding_window", None)
    if types is not None:
        window = window if types[module.layer_idx] == "sliding_attention" else None
    if hasattr(module, "sliding_window") and (module.sliding_window or None) != (window or None):
        raise unserved(
            model, f"{name} has a sliding window of {module.sliding_window}, its configuration one of {window}"
        )
    return window or None


def refuse(model: Any) -> None:
    """Raise ModelError, which says why, where a cache of spans cannot stand in for the model's own."""
    for reason in reasons(model):
        raise unserved(model, reason)


def reasons(model: Any) -> Iterator[str]:
    """Everything that keeps a model from being served, the plainest first."""
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        yield "encoder-decoder models keep a cache of the encoder's keys, which no span of the decoder's describes"
        return
    if config.get_text_config(decoder=True) is not config:
        yield "models of text and something else mask by more than the order of their tokens"
        return
    if not hasattr(model, "generate"):
        yield "it does not generate"
    if getattr(config, "kv_lora_rank", None):
        yield "multi-head latent attention (MLA) caches a projection that all heads share, not keys and values"
    if getattr(config, "num_kv_shared_layers", 0):
        yield "some of its layers read the keys of another layer (shared KV)"
    types = set(types_of(config) or ()) - KNOWN_LAYERS
    if types:
        yield f"it has layers of the type {', '.join(sorted(types))}"
    elif getattr(config, "attention_chunk_size", None):
        yield "it attends in chunks"
    windowed = "sliding_attention" in (types_of(config) or ["sliding_attention"])
    if windowed and getattr(config, "sliding_window", None) and not masks_windows(model):
        # transformers then drops keys while decoding that the prompt's tokens saw.
        yield "its configuration has a sliding window, and the masks it makes have none"
    for field, what in (("attn_logit_softcapping", "soft-caps its scores"), ("alibi", "adds a bias to its scores")):
        if getattr(config, field, None):
            yield f"it {what}"
    if any("sinks" in vars(m).get("_parameters", {}) for m in model.modules()):
        yield "its soft-max holds a learned sink"
    if any(isinstance(p, torch.nn.parameter.UninitializedParameter) or p.is_meta for p in model.parameters()):
        yield "its weights are not loaded"


def types_of(config: Any) -> list[str] | None:
    return getattr(config, "layer_types", None)


def masks_windows(model: Any) -> bool:
    """Whether the code of a model knows transformers' masks of sliding windows."""
    homes = {type(module).__module__ for module in model.modules()}
    return any(hasattr(sys.modules.get(home), "create_sliding_window_causal_mask") for home in homes)


def problems(model: Any) -> list[str]:
    """Why a model cannot be served; nothing where it can."""
    found = list(reasons(model))
    if not found:
        try:
            attentions(model)
        except ModelError as error:
            found.append(error.problem.partition(": ")[2].removesuffix("."))
    return found


def unserved(model: Any, reason: str) -> ModelError:
    return ModelError(f"{type(model).__name__} cannot generate with a cache of spans: {reason}.", AS_IT_IS)
