"""A small random model of a class, with weights large enough that every part of its attention shows in the output."""

from __future__ import annotations

from typing import Any

import torch

from attnopt.hf.shrink import shrink
from attnopt.hf.tiny import enlarge, summary

__all__ = ["NotBuilt", "NotOffered", "build", "summary"]


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
