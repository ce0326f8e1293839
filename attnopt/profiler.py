"""Profile a model: what dropping keys would do to its loss, for every head and every span at once.

One forward and one backward per sequence and label draw. Labels are drawn from the model's own next-token
distribution (teacher-forced text), which makes half the sum of squares an estimate of the divergence from the dense
model in nats; see attnopt/statistics for the formula. Nothing of size N x N is formed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnopt.errors import ProfileError
from attnopt.fingerprint import fingerprint_of
from attnopt.instrument import Attention, Instrumented, gradients_through
from attnopt.ir import Site
from attnopt.profile_file import Profile
from attnopt.statistics import Grid, Observation, Observe, attention

# Half of the smallest window a kernel profits from, up to a quarter of the longest context in steps of two.
DEFAULT_GRID = Grid((0, 4, 16), (32, 64, 128, 256, 512, 1024, 2048))
# Rows of logits turned into labels and gradients at a time: 1024 x a 128k vocabulary in float32 is half a gigabyte.
ROWS = 1024
Progress = Callable[[int, int], None]


def data_hash(ids: Tensor) -> str:
    """Hash of one sequence of token ids, int64 (1, N)."""
    return hashlib.sha256(ids.to(torch.int64).cpu().numpy().tobytes()).hexdigest()[:16]


class _Recorder:
    """Observers that record into one place per site, chosen before each forward."""

    def __init__(self) -> None:
        self.target: Callable[[Site, int], Observation] | None = None

    def __call__(self, site: Site) -> Attention:
        def attend(q: Tensor, k: Tensor, v: Tensor, pad: Tensor | None) -> Tensor:
            if self.target is None or not torch.is_grad_enabled():
                return attention(q, k, v, site.scale, pad, site.mask.window)
            into = self.target(site, q.shape[2])
            return Observe.apply(q, k, v, site.scale, pad, into, site.mask.window)

        return attend


def discover(model: nn.Module, ids: Tensor) -> Instrumented:
    """The model with transparent observers after one short dense run: its `sites` are known then."""
    instrumented = Instrumented(model, _Recorder())
    with torch.no_grad():
        instrumented.logits(ids)
    instrumented.need_sites()
    return instrumented


def observed_loss(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Summed cross-entropy against labels drawn from the model itself, in nats; logits (1, N, V)."""
    total = logits.new_zeros((), dtype=torch.float32)
    for rows in logits[0].split(ROWS):
        wide = rows.float()
        labels = torch.multinomial(wide.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0].to(rows.device)
        total = total + F.cross_entropy(wide, labels, reduction="sum")
    return total


def profile_model(
    model: nn.Module,
    sequences: Sequence[Tensor],
    grid: Grid = DEFAULT_GRID,
    seed: int = 0,
    progress: Progress | None = None,
    partial: Path | None = None,
) -> Profile:
    """Profile `model` on token sequences, each int64 (1, N); their lengths are the profile's lengths.

    progress(done, total) is called after every sequence. partial: a file that holds what is done so far and is taken up
    again by the next call with the same model, grid and seed; it is left there if the call is interrupted.
    """
    if not sequences:
        raise ProfileError("There is no text to profile on.", "Give at least one sequence.")
    model.eval()
    instrumented = discover(model, sequences[0][:, : min(64, sequences[0].shape[1])])
    recorder = instrumented.observer
    assert isinstance(recorder, _Recorder)
    sites = list(instrumented.sites.values())
    profile = Profile.empty(fingerprint_of(model, sites), grid, [], [s.dtype for s in sites])
    if partial is not None and partial.exists():
        profile = resumed(profile, partial)
    for done, ids in enumerate(sequences):
        mark = f"{data_hash(ids)}-{seed}"
        if mark not in profile.header.data:
            profile += one_sequence(instrumented, recorder, profile, ids, mark, seed)
            if partial is not None:
                profile.save(partial)
        if progress is not None:
            progress(done + 1, len(sequences))
    return profile


def resumed(fresh: Profile, partial: Path) -> Profile:
    """The unfinished profile of an earlier call, if it is of the same model and grid; else the fresh one."""
    try:
        return fresh + Profile.load(partial)
    except ProfileError:
        return fresh


def one_sequence(
    instrumented: Instrumented, recorder: _Recorder, profile: Profile, ids: Tensor, mark: str, seed: int
) -> Profile:
    """The profile of one sequence alone; added to the others only when it is complete."""
    part = Profile.empty(profile.header.fingerprint, profile.header.grid, [mark], profile.header.dtypes)
    generator = torch.Generator().manual_seed(seed + int(data_hash(ids)[:8], 16))
    recorder.target = lambda site, length: part.observation(site.name, site.heads, length)
    try:
        with gradients_through(instrumented.model):
            observed_loss(instrumented.logits(ids), generator).backward()
    finally:
        recorder.target = None
    return part
