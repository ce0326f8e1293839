"""Profile a model: what dropping keys would do to its loss, for every head and every span at once.

One forward and one backward per sequence and label draw. Labels are drawn from the model's own next-token
distribution (teacher-forced text), which makes half the sum of squares an estimate of the divergence from the dense
model in nats; see attnopt/statistics for the formula, attnopt/supervision for other labels and for what counts. Nothing
of size N x N is formed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from attnopt import ranks
from attnopt.errors import OptionError, ProfileError
from attnopt.fingerprint import fingerprint_of
from attnopt.instrument import Attention, Instrumented, gradients_through
from attnopt.ir import Site
from attnopt.profile_file import Profile
from attnopt.progress import Progress
from attnopt.statistics import Grid, Observation, Observe, attention, factor_of, measure_forward
from attnopt.supervision import Sample, check_labels, loss_and_gradient, not_finite

# Half of the smallest window a kernel profits from, up to a quarter of the longest context in steps of two.
DEFAULT_GRID = Grid((0, 4, 16), (32, 64, 128, 256, 512, 1024, 2048))
# Of so many blocks of rows one is looked at without a backward pass, which then costs less than half a forward pass.
SHARE = 24
FORWARD = "no loss: forward passes only"


@dataclass(frozen=True)
class Method:
    """How a sequence is observed. labels: attnopt.supervision; draws: of labels, each a backward pass of its own."""

    seed: int = 0
    labels: str = "model"
    draws: int = 1
    forward_only: bool = False

    def __post_init__(self) -> None:
        check_labels(self.labels, self.draws)
        if self.forward_only and (self.labels, self.draws) != ("model", 1):
            raise OptionError("Without a backward pass there is no loss, and no labels.", "Leave --forward-only away.")

    def marks(self, sample: Sample) -> list[str]:
        """What names each pass in a profile's header: two equal ones would count the same thing twice."""
        if self.forward_only:
            return [f"{sample.mark}-forward{self.seed}"]
        if self.labels == "data":
            return [f"{sample.mark}-data"]
        return [f"{sample.mark}-{self.seed}" + (f".{draw}" if draw else "") for draw in range(self.draws)]


class _Recorder:
    """Observers that record into one place per site, chosen before each forward; with a `seed`, without gradients.
    tell: told each site whose attention is run or differentiated."""

    def __init__(self) -> None:
        self.tell: Callable[[str], None] | None = None
        self.target: Callable[[Site, int], Observation] | None = None
        self.seed: int | None = None
        self.factors: dict[str, Tensor] = {}

    def __call__(self, site: Site) -> Attention:
        def attend(q: Tensor, k: Tensor, v: Tensor, pad: Tensor | None) -> Tensor:
            if self.target is not None and self.seed is not None:
                into = self.target(site, q.shape[2])
                measure_forward(
                    q, k, v, site.scale, pad, into, site.mask.window, self.factors.get(site.name), SHARE, self.seed,
                    site.softcap,
                )  # fmt: skip
            if self.target is None or not torch.is_grad_enabled():
                return attention(q, k, v, site.scale, pad, site.mask.window, site.softcap)
            into = self.target(site, q.shape[2])
            out: Tensor = Observe.apply(q, k, v, site.scale, pad, into, site.mask.window, site.softcap)
            if (tell := self.tell) is not None:
                tell(site.name)
                out.register_hook(lambda gradient: tell(f"{site.name}, backward"))
            return out

        return attend


def discover(model: nn.Module, ids: Tensor, recompute: bool = False) -> Instrumented:
    """The model with transparent observers after one short dense run: its `sites` are known then."""
    instrumented = Instrumented(model, _Recorder(), recompute)
    with torch.no_grad():
        instrumented.logits(ids)
    instrumented.need_sites()
    return instrumented


def profile_model(
    model: nn.Module,
    sequences: Sequence[Tensor | Sample],
    grid: Grid = DEFAULT_GRID,
    seed: int = 0,
    progress: Progress | None = None,
    partial: Path | None = None,
    *,
    labels: str = "model",
    draws: int = 1,
    forward_only: bool = False,
    recompute: bool = False,
    tell: Callable[[str], None] | None = None,
) -> Profile:
    """Profile `model` on sequences, each a Sample or token ids int64 (1, N); their lengths are the profile's lengths.

    progress(what, done, of) is called at every site, with how many of the sequences not done before are done. partial:
    a file that holds what is done so far and is taken up again by the next call with equal arguments; it is left there
    if the call is interrupted. tell: given a line that says whether that file was taken up. labels, draws: see
    `Method`. forward_only: no loss and no backward pass; what is held then is how far heads' outputs move, sum
    ||delta O W_O||^2 on a part of the rows, in place of damages in nats. recompute: less memory for more time, see
    attnopt/recompute. Under torchrun (`ranks.join`) each process takes a part of the sequences and all return the sum;
    progress and partial are then each process's own.
    """
    if not sequences:
        raise ProfileError("There is no text to profile on.", "Give at least one sequence.")
    method = Method(seed, labels, draws, forward_only)
    samples = [s if isinstance(s, Sample) else Sample(s) for s in sequences]
    model.eval()
    report = progress or (lambda what, done, of: None)
    report("tracing", 0, 0)
    instrumented = discover(model, samples[0].ids[:, :64], recompute)
    profile = nothing_seen(instrumented, samples, grid, method)
    # Each is taken up by one process; nobody writes before all have looked.
    asked = {mark for sample in samples for mark in method.marks(sample)}
    for left in [] if partial is None else ranks.leftovers(partial)[ranks.rank() :: ranks.size()]:
        profile = resumed(profile, left, asked, tell or (lambda line: None))
    own, into = dealt_out(samples, profile, method), None if partial is None else ranks.partial_of(partial)
    made = ranks.together(lambda: observed(instrumented, profile, own, method, report, into))
    order = {name: n for n, name in enumerate(instrumented.sites)}
    made.observations = dict(sorted(made.observations.items(), key=lambda item: (item[0][1], order[item[0][0]])))
    return made


def nothing_seen(instrumented: Instrumented, samples: Sequence[Sample], grid: Grid, method: Method) -> Profile:
    """The profile before the first sequence; without a backward pass the observers know the sites' projections."""
    sites = list(instrumented.sites.values())
    supervision = [s.supervision(method.labels) for s in samples]
    if method.forward_only:
        recorder = recorder_of(instrumented)
        recorder.factors = factors_of(instrumented)
        supervision = [
            FORWARD if recorder.factors else f"{FORWARD}, outputs as they are: not every projection was found"
        ]
    return Profile.empty(
        fingerprint_of(instrumented.model, sites), grid, [], [s.dtype for s in sites], method.forward_only,
        not method.forward_only, supervision,
    )  # fmt: skip


def recorder_of(instrumented: Instrumented) -> _Recorder:
    recorder = instrumented.observer
    assert isinstance(recorder, _Recorder)
    return recorder


def dealt_out(samples: Sequence[Sample], profile: Profile, method: Method) -> list[Sample]:
    """What is left to this process: what one of them has done already, none does again."""
    done = {mark for marks in ranks.gathered_json(list(profile.header.data)) for mark in marks}
    left = {s.mark: s for s in samples if not set(method.marks(s)) <= done}
    return list(left.values())[ranks.rank() :: ranks.size()]


def observed(
    instrumented: Instrumented, profile: Profile, samples: Sequence[Sample], method: Method, report: Progress,
    into: Path | None,
) -> Profile:  # fmt: skip
    """`profile` with one sequence after the other added to it, and written to `into` after each."""
    recorder = recorder_of(instrumented)
    observe = moved_outputs if method.forward_only else one_sequence
    for n, sample in enumerate(samples):
        what = f"profiling: {sample.length} tokens"
        report(what, n, len(samples))
        recorder.tell = lambda site, what=what, n=n: report(f"{what}, {site}", n, len(samples))
        profile.add(observe(instrumented, recorder, profile, sample, method))
        if into is not None:
            profile.save(into)
        report(what, n + 1, len(samples))
    return profile


def resumed(fresh: Profile, partial: Path, asked: set[str], tell: Callable[[str], None]) -> Profile:
    """With the unfinished profile of an earlier call, if it is of the same model, grid and supervision, and of `asked`
    text that is not there yet."""
    try:
        left = Profile.load(partial)
        whole = fresh + left
    except ProfileError as error:
        tell(f"{partial} is not taken up: {error.problem}.")
        return fresh
    done = set(left.header.data)
    if done & set(fresh.header.data) or not done <= asked:
        tell(f"{partial} is not taken up: it is of other text, or of another seed.")
        return fresh
    tell(f"Going on from {partial}: {len(done)} of {len(asked)} passes are done.")
    return whole


def one_sequence(
    instrumented: Instrumented, recorder: _Recorder, profile: Profile, sample: Sample, method: Method
) -> Profile:
    """The profile of one sequence alone, of the passes that `profile` does not hold yet; added only when complete."""
    marks = [mark for mark in method.marks(sample) if mark not in profile.header.data]
    header = profile.header
    part = Profile.empty(header.fingerprint, header.grid, marks, header.dtypes, supervision=header.supervision)
    recorder.target = lambda site, length: part.observation(site.name, site.heads, length)
    try:
        with gradients_through(instrumented.model):
            logits = instrumented.logits(sample.ids)
            seen: dict[str, Tensor] = {}
            for left, mark in zip(reversed(range(len(marks))), marks, strict=True):
                _, gradient = loss_and_gradient(
                    logits, sample, method.labels, _generator(sample, mark, method), not left
                )
                for observation in part.observations.values():
                    observation.key = mark
                logits.backward(gradient, retain_graph=bool(left))
                if sample.kind == "probe":
                    continue
                now = {site: o.t1.clone() for (site, _), o in part.observations.items()}
                scalars = {site: (t1 - seen.get(site, 0.0)).float() for site, t1 in now.items()}
                part.keep_scalars(sample.length, {mark: scalars})
                seen = now
    finally:
        recorder.target = None
    weight = float(sample.row_weights(method.labels).sum()) * len(marks)
    for observation in part.observations.values():
        if sample.weights is not None or method.labels == "data":
            observation.counted = weight
    if sample.kind == "probe":
        part.observations = {key: o.as_probe() for key, o in part.observations.items()}
    part.check_finite()
    return part


def _generator(sample: Sample, mark: str, method: Method) -> torch.Generator:
    """Where the labels of one pass are drawn from; of the first as if there were no others."""
    draw = int(mark.rpartition(".")[2]) if "." in mark else 0
    return torch.Generator().manual_seed(method.seed + int(sample.mark[:8], 16) + 104_729 * draw)


def factors_of(instrumented: Instrumented) -> dict[str, Tensor]:
    """What turns a head's delta O into one of the size of delta O W_O, for every site; nothing if one of them has no
    projection that the graph shows: sites have to be measured alike."""
    found = {}
    for name, site in instrumented.sites.items():
        weight = instrumented.projections.get(name)
        if weight is None:
            return {}
        found[name] = factor_of(weight, site.heads)
    return found


@torch.no_grad()
def moved_outputs(
    instrumented: Instrumented, recorder: _Recorder, profile: Profile, sample: Sample, method: Method
) -> Profile:
    """`one_sequence` without a backward pass."""
    header = profile.header
    part = Profile.empty(
        header.fingerprint, header.grid, method.marks(sample), header.dtypes, True, False, header.supervision
    )
    recorder.target = lambda site, length: part.observation(site.name, site.heads, length)
    recorder.seed = method.seed + int(sample.mark[:8], 16)
    try:
        logits = instrumented.logits(sample.ids)
    finally:
        recorder.target = recorder.seed = None
    # Attention hands what is not finite on to the last token.
    if not bool(logits[0, -1].isfinite().all()):
        raise not_finite(sample, sample.length - 1)
    part.check_finite()
    return part
