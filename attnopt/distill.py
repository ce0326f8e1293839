"""Fit and try what may replace heads besides spans, and measure what it does to the loss: `attnopt distill`.

Two parts of the calibration text, disjoint. On one the model runs forward and backward once, rows of every site are
kept, and maps are fitted to them (attnopt/fitting). On the other every choice is tried: its outputs are computed in the
backward pass of a run as the profiler's, by the operators that a plan runs through, and turned into nats by the
profiler's formula (attnopt/statistics/trials.py). The model's weights are not touched.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from attnopt.board import Board, selections, write_rows
from attnopt.errors import FittedError
from attnopt.fingerprint import fingerprint_of
from attnopt.fitted import Fitted, Header, HeadFit
from attnopt.fitting.menu import Menu
from attnopt.fitting.rows import Collect, Collected, drawn_rows
from attnopt.fitting.site import SiteFit
from attnopt.instrument import Attention, Instrumented, gradients_through
from attnopt.ir import Choice, Site
from attnopt.mixed import attend, far_of, settings_of, tables
from attnopt.ops.selected import attend_selected
from attnopt.profile_file import Profile
from attnopt.progress import Progress
from attnopt.registry import CANDIDATES
from attnopt.statistics import attention
from attnopt.statistics.trials import Kept, Trials, Try
from attnopt.supervision import Sample, loss_and_gradient

# Rows of queries kept of a sequence and head, fewer where their scores would be more than so many of a site.
ROWS, FEWEST_ROWS = 256, 32
SCORES = 1 << 26
# Bytes of queries, keys and values kept at a time; sites beyond that wait for a further run over the same text.
KEPT = 1 << 30
# A name's place among 2^31 seeds.
SEEDS = 1 << 31


def distill_model(
    model: nn.Module,
    fit: Sequence[Tensor],
    tried: Sequence[Tensor | Sample],
    menu: Menu | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    partial: Path | None = None,
    profile: Profile | None = None,
    tell: Callable[[str], None] | None = None,
) -> Fitted:
    """Fit on sequences `fit`, each int64 (1, N), at least two, of which the last is held out, or none where the menu
    fits nothing; try on sequences `tried`, whose lengths are those of the trials. Those of a retrieval probe are summed
    apart.

    partial: a file that holds what is done so far and is taken up again by the next call with equal arguments. profile:
    refused if it is of another model. tell: given a line that says whether the partial file was taken up.
    """
    menu = Menu() if menu is None else menu
    samples = [s if isinstance(s, Sample) else Sample(s) for s in tried]
    check_text([Sample(ids) for ids in fit], samples, menu)
    model.eval()
    run = _Run(model, menu, seed, progress or (lambda *_: None))
    fresh = run.begin([Sample(ids) for ids in fit], samples, profile)
    asked = {f"{s.mark}-{seed}" for s in samples}
    fitted = fresh if partial is None else resumed(fresh, partial, asked, tell)
    keep = (lambda: None) if partial is None else (lambda: fitted.save(partial))
    if menu.fits:
        run.fit(fitted, list(fit), keep)
    run.try_all(fitted, samples, keep)
    order = {name: n for n, name in enumerate(run.sites)}
    fitted.trials = dict(sorted(fitted.trials.items(), key=lambda item: (item[0][1], order[item[0][0]])))
    return fitted


def check_text(fit: Sequence[Sample], tried: Sequence[Sample], menu: Menu) -> None:
    """FittedError unless there is text for both parts, none of it in both, and some of it far."""
    if (menu.fits and len(fit) < 2) or not any(s.kind != "probe" for s in tried):
        raise FittedError(
            f"{len(fit)} sequences to fit on and {len(tried)} to try on are too few.",
            "Give two to fit on, one of which is held out, and one to try on.",
        )
    if {s.mark for s in fit} & {s.mark for s in tried}:
        raise FittedError("A sequence would be fitted and tried on.", "Keep the two parts of the text apart.")
    parts = [part for part in (fit, tried) if part]
    longest, reach = min(max(s.length for s in part) for part in parts), menu.sinks[0] + menu.windows[0]
    if menu.far and longest <= reach:
        raise FittedError(
            f"No key of {longest} tokens lies beyond {reach} of them.", "Use longer text, or smaller --windows."
        )


def resumed(fresh: Fitted, partial: Path, asked: set[str], tell: Callable[[str], None] | None = None) -> Fitted:
    """What an earlier call left, if it was asked for the same and tried no text but what is `asked` for; otherwise
    `fresh`. tell: given a line that says which."""
    tell = tell or (lambda line: None)
    if not partial.exists():
        return fresh
    try:
        left = Fitted.load(partial)
        left.check_model(fresh.header.fingerprint)
    except FittedError as error:
        tell(f"{partial} is not taken up: {error.problem}")
        return fresh
    same = replace(left.header, data=fresh.header.data, fingerprint=fresh.header.fingerprint) == fresh.header
    fitted_on, done = set(fresh.header.data), set(left.header.data)
    if not same or not fitted_on <= done <= fitted_on | asked:
        tell(f"{partial} is not taken up: it is of other text, another seed or other options.")
        return fresh
    begun = f"{len(left.means)} attentions are fitted, " if fitted_on else ""
    tell(f"Going on from {partial}: {begun}{len(done - fitted_on)} sequences tried.")
    return left


@dataclass
class _Recorder:
    """What stands at every site: attention, which also keeps rows or tries choices while that is asked for. tell: told
    each site at which choices are tried."""

    tell: Callable[[str], None] = lambda site: None
    collected: dict[str, Collected] = field(default_factory=dict)
    at: Tensor | None = None
    trials: dict[str, Trials] = field(default_factory=dict)
    fitted: Fitted | None = None
    board: Board = field(default_factory=Board)

    def __call__(self, site: Site) -> Attention:
        def run(q: Tensor, k: Tensor, v: Tensor, pad: Tensor | None) -> Tensor:
            window, softcap = site.mask.window, site.softcap
            if torch.is_grad_enabled() and self.at is not None and site.name in self.collected:
                return Collect.apply(q, k, v, site.scale, pad, self.collected[site.name], self.at, window, softcap)
            if torch.is_grad_enabled() and site.name in self.trials:
                self.tell(site.name)
                self.board.post(site.name, q.detach(), k.detach(), pad, None)
                return Try.apply(q, k, v, site.scale, pad, self.trials[site.name], replaced, window, softcap)
            return attention(q, k, v, site.scale, pad, window, softcap)

        def replaced(
            choice: Choice, q: Tensor, k: Tensor, v: Tensor, pad: Tensor | None
        ) -> tuple[Tensor, Kept | None]:  # fmt: skip
            far = CANDIDATES[choice.candidate].far
            if far == "gone" and self.fitted is not None:
                return self.fitted.means[site.name].to(v)[None, :, None].expand(*q.shape[:3], -1), None
            if far == "selected":
                return selected(choice, site, q, k, v, pad)
            if CANDIDATES[choice.candidate].decoded:
                return decoded(choice, site, q, k, v, pad, self.board)
            return attend(q, k, v, [choice] * site.heads, site, self.fitted, pad), None

        return run


def selected(choice: Choice, site: Site, q: Tensor, k: Tensor, v: Tensor, pad: Tensor | None) -> tuple[Tensor, Kept]:
    """The output (B, H, N, Dv) of all heads of a site under a choice that selects keys, computed as
    `attnopt::selected_attention` does, and what that kept of dense attention."""
    every, out = range(site.heads), torch.empty_like(q[..., : v.shape[3]])
    lse = torch.empty(q.shape[:3], dtype=q.dtype, device=q.device)
    table = torch.tensor([settings_of(choice)] * len(every), dtype=torch.float64)
    window = site.mask.window or 0
    heads = torch.tensor(every, dtype=torch.int32)
    visits = attend_selected(q, k, v, heads, far_of(choice)[1], table, pad, site.scale, window, out, lse)
    return out, Kept(visits.sums, recalled(lse, site, q, k, v, pad))


def decoded(
    choice: Choice, site: Site, q: Tensor, k: Tensor, v: Tensor, pad: Tensor | None, board: Board
) -> tuple[Tensor, Kept]:  # fmt: skip
    """The same under a choice that selects tokens while decoding, every row as its step would be; of steps those that
    select."""
    out = torch.empty_like(q[..., : v.shape[3]])
    lse = torch.empty(q.shape[:3], dtype=q.dtype, device=q.device)
    write_rows(out, q, k, v, [choice] * site.heads, site, pad, board, lse)
    found = selections(choice, q, k, pad)
    steps = torch.full_like(found, q.shape[0] * q.shape[2] if pad is None else int(pad.sum()))
    sums = torch.stack((steps, found, torch.zeros_like(found)), 1)
    return out, Kept(sums, recalled(lse, site, q, k, v, pad))


def recalled(lse: Tensor, site: Site, q: Tensor, k: Tensor, v: Tensor, pad: Tensor | None) -> Tensor:
    """The share of every row's dense mass (B, H, N) that keys with the logsumexp `lse` hold; a row that keeps no key,
    of padding, has none to recall."""
    whole = tables(None, site.heads).values()
    _, dense = torch.ops.attnopt.span_attention_lse(q, k, v, *whole, pad, site.scale, site.mask.window or 0, 0)
    return torch.where(dense == -torch.inf, 0.0, (lse - dense).exp())


class _Run:
    """One distillation of one model."""

    def __init__(self, model: nn.Module, menu: Menu, seed: int, progress: Progress) -> None:
        self.model, self.menu, self.seed, self.progress = model, menu, seed, progress
        self.recorder = _Recorder()
        self.instrumented = Instrumented(model, self.recorder)
        self.sites: dict[str, Site] = {}
        self.longest = self.remaining = 0
        # Of all attentions, in which they run.
        self.order: list[str] = []

    def begin(self, fit: list[Sample], tried: list[Sample], profile: Profile | None) -> Fitted:
        """Find the sites, and an empty file of fits of this model."""
        self.progress("tracing", 0, 0)
        lengths = sorted({s.length for s in tried})
        self.longest = lengths[-1]
        # The graph that rows are collected in: with gradients, of the length that is fitted on.
        with gradients_through(self.model):
            self.instrumented.logits([*fit, *tried][0].ids)
        self.instrumented.need_sites()
        every = list(self.instrumented.sites.values())
        self.order = [site.name for site in every]
        fingerprint = fingerprint_of(self.model, every)
        if profile is not None:
            profile.check_model(fingerprint)
        self.sites = {site.name: site for site in every if self.menu.serves(site, self.longest)}
        if not self.sites:
            what = ", ".join(self.menu.families)
            raise FittedError(
                f"Nothing of {what} may stand at any of the {len(every)} attentions of this model.",
                "`attnopt examine` lists them with their masks; causal ones without further terms can be fitted.",
            )
        marks = tuple(sorted(f"{s.mark}-fit" for s in fit))
        return Fitted(Header(fingerprint, marks, tuple(lengths), self.seed, self.menu.line))

    def fit(self, fitted: Fitted, fit: list[Tensor], keep: Callable[[], None]) -> None:
        """Fit the sites that have not been yet, and `keep` what there is after each."""
        left = [name for name in self.sites if name not in fitted.means]
        self.remaining = len(left)
        while left:
            here = left[: self._at_once(fit)]
            for name, found in self._collect(here, fit).items():
                self._fit_site(fitted, name, found)
                self.remaining -= 1
                keep()
            left = left[len(here) :]

    def _at_once(self, fit: list[Tensor]) -> int:
        """Sites whose rows fit KEPT bytes together."""
        largest = max(
            sum(
                site.kv_heads * ids.shape[1] * (site.head_dim + site.head_dim_v) + site.heads * ROWS * site.head_dim
                for ids in fit
            )
            for site in self.sites.values()
        )
        return max(1, KEPT // (4 * largest))

    def _collect(self, names: list[str], fit: list[Tensor]) -> dict[str, Collected]:
        """Run the model over the text once, with rows of some sites kept."""
        found = {name: Collected(self.sites[name].scale) for name in names}
        generator = torch.Generator().manual_seed(self.seed)
        self.recorder.collected = found
        try:
            for n, ids in enumerate(fit):
                self.progress(f"collecting from {len(names)} sites", n, len(fit))
                first = self.menu.sinks[0] + self.menu.windows[0]
                rows = SCORES // (ids.shape[1] * max(site.heads for site in self.sites.values()))
                at = drawn_rows(ids.shape[1], first, min(ROWS, max(FEWEST_ROWS, rows)), generator)
                self.recorder.at = at.to(ids.device)
                self._backward(Sample(ids), "fit")
            self.progress(f"collecting from {len(names)} sites", len(fit), len(fit))
        finally:
            self.recorder.collected, self.recorder.at = {}, None
        return found

    def _fit_site(self, fitted: Fitted, name: str, found: Collected) -> None:
        """Fit every map of one site."""
        site, menu = self.sites[name], self.menu
        longest = max(part.k.shape[1] for part in found.rows)
        windows = tuple(w for w in menu.windows if menu.sinks[0] + w < longest) or menu.windows[:1]
        maps = list(menu.maps(site))
        if maps:
            work = SiteFit(found, menu.sinks[0], windows, self._seed_of(name))
        stage = f"fitting {name}, {self.remaining} left"
        steps = max(1, menu.steps * sum(family == "linear" for family, _ in maps))
        done = 0
        for family, size in maps:
            if family == "linear":

                def report(step: int, before: int = done) -> None:
                    self.progress(stage, before + step, steps)

                map, fits = work.exponential(size, menu.steps, report)
                done += menu.steps
            else:
                map, fits = work.expansion(min(size, site.head_dim))
            fitted.add_map(name, f"{family}/{size}", map.to("cpu"), fits)
        self.progress(stage, steps, steps)
        fitted.means[name] = found.mean().cpu()

    def _seed_of(self, name: str) -> int:
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        return int.from_bytes(digest[:8], "little") % SEEDS

    def try_all(self, fitted: Fitted, samples: list[Sample], keep: Callable[[], None]) -> None:
        """Try every choice on the sequences it was not tried on yet, and `keep` what there is after each."""
        left = {f"{s.mark}-{self.seed}": s for s in samples if f"{s.mark}-{self.seed}" not in fitted.header.data}
        self.recorder.fitted = fitted
        for n, (mark, sample) in enumerate(left.items()):
            self.recorder.tell = functools.partial(self._trying, n, len(left))
            self.progress("trying", n, len(left))
            part = {
                name: Trials.zeros(site.heads, self.menu.choices(site, self.longest, self.order.index(name)))
                for name, site in self.sites.items()
            }
            self.recorder.trials = part
            try:
                self._backward(sample, "try")
            finally:
                self.recorder.trials, self.recorder.board = {}, Board()
            for name, trials in part.items():
                trials.tokens = float(sample.row_weights("model").sum())
                settle(fitted, name, trials)
                trials = trials.as_probe() if sample.kind == "probe" else trials
                held = fitted.trials.setdefault((name, sample.length), Trials.zeros(trials.heads, trials.choices))
                held += trials
            fitted.header = replace(fitted.header, data=tuple(sorted((*fitted.header.data, mark))))
            keep()
        self.progress("trying", max(1, len(left)), max(1, len(left)))

    def _trying(self, done: int, of: int, site: str) -> None:
        self.progress(f"trying: {site}", done, of)

    def _backward(self, sample: Sample, what: str) -> None:
        """One forward and backward pass with labels drawn from the model, as the profiler makes."""
        generator = torch.Generator().manual_seed(self.seed + int(sample.mark[:8], 16))
        with gradients_through(self.model):
            logits = self.instrumented.logits(sample.ids)
            _, gradient = loss_and_gradient(logits, sample, "model", generator, True)
            logits.backward(gradient)


def settle(fitted: Fitted, site: str, trials: Trials) -> None:
    """Refuse the maps of heads whose outputs were not finite; FittedError where that has nothing to do with a map."""
    for column, choice in enumerate(trials.choices):
        broken = ~(trials.t2[:, column].isfinite() & trials.sample_sq[:, column].isfinite())
        if not bool(broken.any()):
            continue
        name = CANDIDATES[choice.candidate].map_name(dict(choice.params))
        if not name:
            raise FittedError(
                f"What {choice} does at {site} is not finite.",
                "Check that the model's loss and gradients are finite on this text, or use --dtype fp32.",
            )
        fits = list(fitted.fits[site, name])
        for head in broken.nonzero()[:, 0].tolist():
            fits[head] = HeadFit(fits[head].method, fits[head].error, "outputs were not finite on the text tried")
            for sums in (trials.t2, trials.t1, trials.sample_sq):
                sums[head, column] = 0.0
        fitted.fits[site, name] = tuple(fits)


__all__ = ["Menu", "check_text", "distill_model", "resumed", "settle"]
