"""A small random model of a class, with weights large enough that every part of its attention shows in the output."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.zoo.shrink import shrink


class NotBuilt(Exception):
    """The class cannot be built from a small configuration."""


class NotOffered(Exception):
    """transformers does not offer this class with the asked attention."""


def build(name: str, attention: str = "eager", dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """An instance of transformers' class `name`, in eval mode, with transformers' attention `attention`."""
    import transformers

    torch.manual_seed(seed)
    try:
        cls = getattr(transformers, name)
        config = shrink(cls.config_class())
    except Exception as error:
        raise NotBuilt(f"configuration: {summary(error)}") from error
    try:
        model = cls._from_config(config, attn_implementation=attention)
    except Exception as error:
        if attention != "eager" and ("does not support" in str(error) or "attn_implementation" in str(error)):
            raise NotOffered(attention) from error
        raise NotBuilt(f"model: {summary(error)}") from error
    if attention != "eager" and not getattr(model, "_supports_sdpa", True):
        raise NotOffered(attention)
    if sum(p.numel() for p in model.parameters()) > 60_000_000:
        raise NotBuilt("model: more than 60 million parameters remain")
    enlarge(model)
    return model.eval().to(dtype)


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
