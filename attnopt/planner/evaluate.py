"""Losses of choices and of dense on fixed sequences, kept as they are measured: an interrupted search goes on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from attnopt import __version__, settings
from attnopt.cost import device_name
from attnopt.errors import ModelError
from attnopt.fingerprint import Fingerprint, digest
from attnopt.measure import Sequences, Spans
from attnopt.plan import choices_id
from attnopt.planner.knapsack import Choices
from attnopt.planner.verify import Evaluation
from attnopt.profile_file import versions_here
from attnopt.progress import Progress
from attnopt.strict_json import unique

if TYPE_CHECKING:
    from attnopt.fitted import Fitted

SCHEMA = 1


@dataclass(eq=False)
class Kept:
    """Losses of single sequences, by what was run on which text. inputs: what they depend on beside that; path: the
    file, written after every sequence; without one they are kept in memory alone."""

    inputs: Mapping[str, str] = field(default_factory=dict)
    path: Path | None = None
    rows: dict[str, list[Sequences]] = field(default_factory=dict)

    @classmethod
    def begin(cls, inputs: Mapping[str, str], path: Path | None, tell: Callable[[str], None]) -> Kept:
        """What an earlier call left in `path`, if it is of the same inputs; `tell` is given a line that says so."""
        fresh = cls(inputs, path)
        if path is None or not path.exists():
            return fresh
        try:
            data = json.loads(path.read_bytes(), object_pairs_hook=unique)
            if data["schema"] != SCHEMA:
                raise ValueError(f"it is of format {data['schema']}, this attnopt reads {SCHEMA}")
            others = [name for name in inputs if data["inputs"].get(name) != inputs[name]]
            if others:
                raise ValueError(f"it is of other {', '.join(others)}")
            fresh.rows = {str(name): [row_of(row) for row in rows] for name, rows in data["rows"].items()}
        except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            tell(f"{path} is not taken up: {f'no {error}' if isinstance(error, KeyError) else error}.")
            return cls(inputs, path)
        tell(f"Going on from {path}: {sum(map(len, fresh.rows.values()))} sequences are measured.")
        return fresh

    def add(self, name: str, row: Sequences) -> None:
        self.rows.setdefault(name, []).append(row)
        if self.path is not None:
            from attnopt.codegen.emit import write_atomically

            rows = {
                name: [[r.tokens, r.loss, r.kl, r.dense, r.agree] for r in held] for name, held in self.rows.items()
            }
            data = {"schema": SCHEMA, "inputs": dict(self.inputs), "rows": rows}
            write_atomically(self.path, json.dumps(data) + "\n")


def row_of(data: Any) -> Sequences:
    """One sequence, as `Kept` wrote it; ValueError or TypeError for anything else."""
    tokens, loss, kl, dense, agree = (tuple(part) for part in data)
    sizes = [len(part) for part in (tokens, loss, kl, dense, agree)]
    if sizes not in ([1, 1, 1, 0, 0], [1, 1, 1, 1, 1]):
        raise ValueError("a row of it is not that of one sequence")
    counts, losses = (*tokens, *agree), (*loss, *kl, *dense)
    if not all(type(x) is int and x >= 0 for x in counts) or not all(type(x) is float for x in losses):
        raise ValueError("a row of it holds something else than counts and losses")
    return Sequences(tokens, loss, kl, dense, agree)


def digest_of(texts: Mapping[int, Tensor]) -> str:
    """Of the token ids int64 (samples, N) of every length."""
    found = hashlib.sha256()
    for length, ids in sorted(texts.items()):
        found.update(f"{length} {tuple(ids.shape)} ".encode() + ids.cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def inputs_of(
    model: nn.Module, fingerprint: Fingerprint, fitted: Fitted | None, verify: Mapping[int, Tensor],
    final: Mapping[int, Tensor],
) -> dict[str, str]:  # fmt: skip
    """What a measured loss depends on, beside the choices and the sequence."""
    weight = next(model.parameters())
    device = weight.device.type
    return {
        "model": fingerprint.structure,
        "weights": digest(model),
        "attention": str(getattr(getattr(model, "config", None), "_attn_implementation", "")),
        "dtype": str(weight.dtype),
        "device": f"{device_name(str(weight.device))}, {settings.target(device)}",
        "setting": f"native {settings.native()}, disabled {', '.join(sorted(settings.disabled()))}",
        "text": f"{digest_of(verify)} {digest_of(final)}",
        "file of fits": hashlib.sha256(fitted.to_bytes()).hexdigest()[:16] if fitted is not None else "",
        "version": " ".join(f"{name} {version}" for name, version in (("attnopt", __version__), *versions_here())),
    }


class Evaluator:
    """Measures choices against dense on fixed sequences (one tensor (samples, N) per length). Dense is run once; with
    `divergence` it runs beside every plan instead, for KL and agreement, and `dense` is filled by the first. what: the
    stage, for `progress` and in `kept`, where nothing is measured twice."""

    def __init__(
        self, spans: Spans, texts: Mapping[int, Tensor], divergence: bool, progress: Progress | None, what: str,
        kept: Kept | None = None,
    ) -> None:  # fmt: skip
        self.spans, self.texts, self.divergence = spans, texts, divergence
        self.progress, self.what, self.kept = progress, what, kept or Kept()
        self.dense: dict[int, Sequences] = {} if divergence else {n: self._run(n, None) for n in texts}
        check_finite(self.dense)
        self.planned: dict[int, Sequences] = {}

    def _run(self, length: int, choices: Choices | None) -> Sequences:
        ids, which = self.texts[length], "dense" if choices is None else "planned"
        what = f"{self.what}, {which} at {length}"
        of = "dense" if choices is None else choices_id({name: tuple(heads) for name, heads in choices.items()})
        name = f"{self.what}, {length}, {'kl' if self.divergence else 'loss'}, {of}"
        for n in range(len(self.kept.rows.get(name, ())), len(ids)):
            if self.progress is not None:
                self.progress(what, n, len(ids))
            self.kept.add(name, self.spans.losses(ids[n : n + 1], choices, self.divergence))
        if self.progress is not None:
            self.progress(what, len(ids), len(ids))
        return joined(self.kept.rows[name][: len(ids)])

    def __call__(self, choices: Choices) -> list[Evaluation]:
        self.planned = {n: self._run(n, choices) for n in self.texts}
        if self.divergence:
            self.dense = {n: Sequences(p.tokens, p.dense, (0.0,) * len(p.tokens)) for n, p in self.planned.items()}
            check_finite(self.dense)
        return [
            Evaluation(n, p.tokens, self.dense[n].loss, p.loss, p.kl if self.divergence else (), p.agree)
            for n, p in self.planned.items()
        ]


def joined(rows: list[Sequences]) -> Sequences:
    """Sequences measured one by one, as one record."""
    parts = ([x for row in rows for x in getattr(row, name)] for name in ("tokens", "loss", "kl", "dense", "agree"))
    return Sequences(*map(tuple, parts))


def check_finite(dense: Mapping[int, Sequences]) -> None:
    for length, found in dense.items():
        if not all(map(math.isfinite, found.loss)):
            raise ModelError(
                f"The dense model's loss is not finite on this text at {length} tokens.",
                "Plan in float32 (--dtype fp32), or leave out the text that does it.",
            )
