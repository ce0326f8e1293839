"""The pipeline: named passes over one Program, in order. Each file holds one pass and shows its rewrite as
*before -> after* in its docstring. A new pass is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from attnopt.passes import (
    append,
    kv_sources,
    lower_exact,
    lower_planned,
    match_attention,
    normalise,
    observe,
    prune,
    recover_masks,
    remove_dead_code,
    resolve_regions,
    strip_assertions,
    verify,
)
from attnopt.passes.program import Program

Pass: TypeAlias = Callable[[Program], None]

RECOGNISE: tuple[Pass, ...] = (
    strip_assertions.run,
    normalise.run,
    match_attention.run,
    resolve_regions.run,
    recover_masks.run,
    kv_sources.run,
    verify.run,
)
# torch.compile(model, backend="attnopt")
LOWER: tuple[Pass, ...] = (prune.run, lower_planned.run, lower_exact.run, append.run)
PIPELINE: tuple[Pass, ...] = (*RECOGNISE, *LOWER, remove_dead_code.run)
# attnopt profile: every recognised site computes the same and is observed
OBSERVE: tuple[Pass, ...] = (*RECOGNISE, observe.run, remove_dead_code.run)

__all__ = ["LOWER", "OBSERVE", "PIPELINE", "RECOGNISE", "Pass", "Program"]
