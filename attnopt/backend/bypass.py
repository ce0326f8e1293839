"""Say, once, that .generate() on a compiled model runs none of what was compiled.

torch.compile(model) wraps the model, and the wrapper hands out the model's own bound `generate`, which calls the
model and not the wrapper: no backend is ever called. All that can be seen of it is the wrapping, where torch looks the
backend up for the first time, and a graph that comes from such a wrapper.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import nn

log = logging.getLogger("attnopt")
_said = False


def looked_up() -> None:
    """Called while the backend is imported: speak if torch.compile is wrapping a model that generates."""
    for frame in frames():
        if frame.f_code.co_name == "compile" and frame.f_globals.get("__name__") == "torch":
            say(frame.f_locals.get("model"))
            return


def called() -> None:
    """Called with each graph: speak if it comes from a wrapped model that generates, and no gradient is asked for."""
    if _said or torch.is_grad_enabled():
        return
    for frame in frames():
        if frame.f_code.co_name in ("__call__", "_call_impl") and "self" in frame.f_locals:
            wrapper = frame.f_locals["self"]
            if isinstance(wrapper, torch._dynamo.OptimizedModule):
                say(wrapper._orig_mod)
                return


def keep_quiet() -> None:
    """For attnopt's own commands, which compile models to look at them and to time them, and generate with none."""
    global _said
    _said = True


def frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def say(model: Any) -> None:
    """Warn of a transformers model that generates, is not being trained and was prepared in no other way."""
    global _said
    generates = isinstance(model, nn.Module) and hasattr(model, "generation_config") and hasattr(model, "generate")
    if _said or not generates or model.training or "_attnopt" in vars(model) or model._compiled_call_impl is not None:
        return
    _said = True
    name = type(model).__name__
    log.warning(
        "torch.compile(model) compiles calls of the model, and .generate() of what it returns calls the %s inside, "
        'uncompiled. To generate with attnopt: attnopt.enable(model), or model.compile(backend="attnopt").',
        name,
    )
