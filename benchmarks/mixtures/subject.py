"""A model to mix replacements on: its text in three splits, its profile and its fits, kept in the cache folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt import hf, settings, text
from attnopt.fitted import Fitted
from attnopt.ir import Site
from attnopt.measure import Spans
from attnopt.profile_file import Profile
from attnopt.profiler import profile_model
from benchmarks.mixtures.documents import KINDS
from benchmarks.mixtures.trained import trained

Say = Callable[[str], None]


@dataclass(frozen=True)
class Sizes:
    """lengths: profiled and tried at, `samples` sequences each; length: planned for, and measured at on `final`
    sequences. features, ranks, windows, sinks, steps: what `attnopt distill` fits and tries."""

    lengths: tuple[int, ...]
    length: int
    samples: int
    final: int
    features: tuple[int, ...] = (32, 64)
    ranks: tuple[int, ...] = (8,)
    windows: tuple[int, ...] = (64, 256)
    sinks: tuple[int, ...] = (4,)
    steps: int = 300


@dataclass(frozen=True)
class Outcome:
    """Of a plan on held-out text: loss increase over dense in percent, and KL(dense || plan) in nats per token."""

    increase: float
    kl: float


class Subject:
    """name: "demo", "diffuse" or "recall", the latter two trained here."""

    def __init__(self, name: str, sizes: Sizes, say: Say = print) -> None:
        self.name, self.sizes, self.say = name, sizes, say
        loaded = hf.load("demo" if name == "demo" else str(trained(KINDS[name], say=say)))
        self.model, self.tokenizer = loaded.model.eval(), loaded.tokenizer
        self.calibration = [r[None] for n in sizes.lengths for r in self.split("calibrate", n, sizes.samples)]

    def split(self, which: str, length: int, samples: int) -> Tensor:
        """Token ids int64 (samples, length)."""
        if self.name in KINDS:
            return KINDS[self.name].sequences(which, length, samples)
        tokens = text.stream([], self.tokenizer, which, 2 * samples * length)
        return text.sequences(tokens, length, samples, which)

    def profiled(self) -> Profile:
        self.say(f"{self.name}: profiling at {self.sizes.lengths}")
        return profile_model(self.model, self.calibration)

    @torch.no_grad()
    def inputs(self, ids: Tensor) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """q, k and v of every site on `ids` (1, N)."""
        found: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

        def observer(site: Site) -> Attention:
            def attend(q: Tensor, k: Tensor, v: Tensor, pad: Tensor | None) -> Tensor:
                found[site.name] = q.clone(), k.clone(), v.clone()
                return attention(q, k, v, site.scale, pad, site.mask.window, site.softcap)

            return attend

        Instrumented(self.model, observer).logits(ids)
        return found
