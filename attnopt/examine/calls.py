"""Which calls a model gets: a prompt, a step of generation with each kind of cache, and what compiles anew.

A model of transformers is called as its `forward` asks; any other module with token ids alone.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attnopt.errors import OptionError
from attnopt.hf.inputs import inputs_of
from attnopt.hf.loading import Loaded, transformers

CACHES = ("DynamicCache", "StaticCache")
# Tokens of the calls that are made to see what compiles anew: those graphs are run.
SHORT = 24


@dataclass(frozen=True)
class Call:
    """One call of a model. new: what it is the first to have, such as "another length"."""

    new: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Phase:
    """Calls that are traced one after the other. sizes: those of the first that stand for a length that may change;
    empty where it has none, as for pictures."""

    name: str
    cache: str
    calls: tuple[Call, ...]
    sizes: frozenset[int]


def is_of_transformers(model: nn.Module) -> bool:
    return hasattr(model, "main_input_name") and hasattr(model, "config")


def token_ids(model: nn.Module, length: int, batch: int = 1) -> Tensor:
    """Any ids (batch, length): their values do not matter to what is recognised."""
    size = getattr(getattr(model, "config", None), "vocab_size", None) or 100
    return ((torch.arange(length)[None] * 7 + 11) % size).repeat(batch, 1)


def placed(model: nn.Module, value: Any) -> Any:
    """Inputs where the model is, floating-point ones in its dtype."""
    like = next(model.parameters(), torch.empty(0))
    if isinstance(value, Tensor):
        return value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)
    return value


def targets_of(length: int) -> int:
    """Tokens of a decoder beside an encoder of so many: another number, so that the two are not mistaken."""
    return max(1, length * 3 // 5)


def inputs(model: nn.Module, length: int, batch: int, padded: bool) -> Call:
    """One prompt. OptionError where padding is asked for and the model takes none."""
    if is_of_transformers(model):
        given = inputs_of(model, padded, length, batch=batch, targets=targets_of(length))
        if padded and "attention_mask" not in given:
            said = f"{type(model).__name__} takes no padding mask with what it was given."
            raise OptionError(said, "Leave --padded out.")
        return Call("", (), {name: placed(model, value) for name, value in given.items()})
    ids = placed(model, token_ids(model, length, batch))
    if not padded:
        return Call("", (ids,))
    if "attention_mask" not in inspect.signature(model.forward).parameters:
        raise OptionError(f"{type(model).__name__} takes no attention_mask.", "Leave --padded out.")
    mask = torch.ones_like(ids)
    mask[:, : length // 4] = 0
    return Call("", (ids,), {"attention_mask": mask})


def prefill(loaded: Loaded, length: int, padded: bool, anew: bool) -> Phase:
    """A prompt of `length` tokens; with `anew` one of another length, then another batch."""
    first = inputs(loaded.model, length, 1, padded)
    own = {length} if "input_ids" in first.kwargs or first.args else set()
    tokens = own | ({targets_of(length)} if "decoder_input_ids" in first.kwargs else set())
    calls = [first]
    if anew:
        short = max(2, min(length - 1, SHORT))
        again = [("another length", 1)] * bool(tokens) + [("another batch", 2)]
        for new, batch in again:
            made = inputs(loaded.model, short if tokens else length, batch, padded)
            calls.append(Call(new, made.args, made.kwargs))
    return Phase("prefill", "", tuple(calls), frozenset(tokens))


def no_decoding(model: nn.Module) -> str:
    """Why there is no step of generation to trace; empty where there is one."""
    if not is_of_transformers(model):
        return "Decoding was not traced: only models of transformers say which cache they take."
    takes = inspect.signature(model.forward).parameters
    if not (hasattr(model, "can_generate") and model.can_generate()):
        return f"Decoding was not traced: {type(model).__name__} does not generate."
    if "past_key_values" not in takes:
        return f"Decoding was not traced: {type(model).__name__} takes no past_key_values."
    return ""


def cache_of(model: Any, kind: str, length: int, encoded: int) -> Any:
    """An empty cache with room for some more than `length` tokens, and for `encoded` ones of an encoder."""
    hf = transformers()
    config = model.config.get_text_config(decoder=True)

    def one(size: int) -> Any:
        return getattr(hf, kind)(config=config, **({"max_cache_len": size} if kind == "StaticCache" else {}))

    own = one(slots(length))
    return hf.EncoderDecoderCache(own, one(encoded)) if model.config.is_encoder_decoder else own


def slots(length: int) -> int:
    return length + 8


def decode(loaded: Loaded, length: int, padded: bool, kind: str, anew: bool) -> Phase:
    """A step of generation after a prompt, which is run; with `anew` the next step."""
    model = loaded.model
    prompt = dict(inputs(model, length, 1, padded).kwargs)
    paired = model.config.is_encoder_decoder
    ids = "decoder_input_ids" if paired else "input_ids"
    known = prompt[ids].shape[1]
    # What the encoder's keys are many of shows in the first call: an encoder may make one of several frames.
    encoded = prompt.get("input_ids", prompt[ids]).shape[1] if paired else 0
    if paired:
        prompt["encoder_outputs"] = encoder_outputs(model, prompt)
        encoded = prompt["encoder_outputs"][0].shape[1]
    cache = cache_of(model, kind, known, encoded)
    prompt.update(use_cache=True, past_key_values=cache)
    model(**prompt)
    step = {ids: prompt[ids][:, -1:], "past_key_values": cache, "use_cache": True}
    step |= {name: prompt[name] for name in ("encoder_outputs",) if name in prompt}
    mask = prompt.get("attention_mask")
    calls = []
    for n in range(1 + anew):
        grown = {} if mask is None else {"attention_mask": mask if paired else longer(mask, n + 1)}
        calls.append(Call("the next token" if n else "", (), {**step, **grown}))
    own = slots(known) if kind == "StaticCache" else known + 1
    return Phase("decode", kind, tuple(calls), frozenset({own, encoded} - {0}))


def encoder_outputs(model: Any, prompt: dict[str, Any]) -> Any:
    """The encoder's outputs, its part of the prompt taken out of it."""
    encoder = model.get_encoder()
    takes = inspect.signature(encoder.forward).parameters
    own = {n: v for n, v in prompt.items() if n in takes and n not in ("use_cache", "past_key_values")}
    found = encoder(**own)
    for name in own.keys() - {"attention_mask"}:
        del prompt[name]
    return found


def longer(mask: Tensor, by: int) -> Tensor:
    return torch.cat([mask, mask.new_ones(mask.shape[0], by)], dim=1)
