"""Random inputs for any class of transformers, chosen by the names of its forward's arguments."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from attnopt.errors import ModelError
from attnopt.hf.shrink import IMAGE, LENGTH, VOCAB

# Queries of a decoder beside an encoder: unequal to LENGTH, so that the two cannot be mistaken.
BATCH, TARGETS, SAMPLES, PADDING = 2, 24, 4000, 7


class NoInput(ModelError):
    """Nothing is known about what this class takes."""


def tokens(config: Any, length: int, generator: torch.Generator, batch: int = BATCH) -> torch.Tensor:
    """Tokens int64 (batch, length): above the usual special ones, below those that shrinking put at the end."""
    vocab = getattr(config.get_text_config(), "vocab_size", None) or VOCAB
    return torch.randint(5, max(6, min(vocab, VOCAB) - 40), (batch, length), generator=generator)


def first(config: Any, *names: str, default: Any = None) -> Any:
    """The first of the named fields that the configuration, or one nested in it, has."""
    nested = [config] + [getattr(config, name, None) for name in config.sub_configs]
    for held in nested:
        for name in names:
            value = getattr(held, name, None)
            if value is not None:
                return value
    return default


def pixels(config: Any, generator: torch.Generator, batch: int = BATCH) -> torch.Tensor:
    size = first(config, "image_size", "img_size", "input_size", default=IMAGE)
    size = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    channels = first(config, "num_channels", "in_chans", "in_channels", default=3)
    # Perceiver has frames for another of its inputs.
    frames = first(config, "num_frames", default=0) if config.model_type != "perceiver" else 0
    shape = (batch, frames, channels, *size[-2:]) if frames else (batch, channels, *size[-2:])
    return torch.randn(shape, generator=generator)


def features(config: Any, generator: torch.Generator, batch: int = BATCH) -> torch.Tensor:
    """Spectrograms; Whisper's are (bins, frames), the others' (frames, bins)."""
    bins = first(
        config,
        "feature_projection_input_dim",
        "num_mel_bins",
        "input_feat_per_channel",
        "feature_size",
        "input_dim",
        default=80,
    )
    frames = 2 * first(config, "max_source_positions", default=32)
    if "whisper" in config.model_type or "qwen2_audio" in config.model_type:
        return torch.randn(batch, bins, frames, generator=generator)
    return torch.randn(batch, frames, bins, generator=generator)


def padding_mask(length: int, left: bool, batch: int = BATCH) -> torch.Tensor:
    """int64 (batch, length), without PADDING positions at one end of every sequence but the first of several."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[min(1, batch - 1) :, slice(0, PADDING) if left else slice(-PADDING, None)] = 0
    return mask


def generates(model: Any) -> bool:
    """Whether the class continues its own tokens, which padding has to stand before."""
    return bool(model.can_generate()) and not model.config.is_encoder_decoder


def inputs_of(
    model: Any, padded: bool = False, length: int = LENGTH, seed: int = 0, training: bool = False,
    batch: int = BATCH, targets: int = TARGETS,
) -> dict[str, Any]:  # fmt: skip
    """Keyword arguments of ``model.forward`` for `batch` sequences of `length` tokens, `targets` of them in a decoder
    beside an encoder; `padded` adds an attention mask where the class takes tokens. NoInput where that is not known.

    Padding is at the front where a class generates, else at the end, and there in training too: at the front, causal
    rows of it have no key. What those compute is not defined, and a pooled token or a gradient would read it.
    """
    generator = torch.Generator().manual_seed(seed)
    config, takes = model.config, inspect.signature(model.forward).parameters
    main = model.main_input_name
    given: dict[str, Any] = {}
    if "input_ids" in takes:
        given["input_ids"] = tokens(config, length, generator, batch)
        if padded and "attention_mask" in takes:
            given["attention_mask"] = padding_mask(length, generates(model) and not training, batch)
    if main == "pixel_values" or ("pixel_values" in takes and "logit_scale" in dict(model.named_parameters())):
        given["pixel_values"] = pixels(config, generator, batch)
    if not given and "pixel_values" in takes:
        given["pixel_values"] = pixels(config, generator, batch)
    if "input_features" in takes and "input_ids" not in takes:
        given["input_features"] = features(config, generator, batch)
    elif "input_values" in takes and "input_ids" not in takes:
        spectrogram = first(config, "num_mel_bins") and "spectrogram" in config.model_type
        frames = first(config, "max_length", default=64)
        shape = (batch, frames, first(config, "num_mel_bins")) if spectrogram else (batch, SAMPLES)
        given["input_values"] = torch.randn(shape, generator=generator)
    if "decoder_input_ids" in takes and config.is_encoder_decoder:
        given["decoder_input_ids"] = tokens(config, targets, generator, batch)
    if not given:
        raise NoInput(
            f"What {type(model).__name__} takes is not known: {', '.join(list(takes)[:4])}.",
            "Write a callable that returns a module which takes token ids alone, and give it as module:callable.",
        )
    if "use_cache" in takes:
        given["use_cache"] = False
    return given
