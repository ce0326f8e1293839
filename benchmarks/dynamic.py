"""Blocks selected while running: what each method recalls and loses at its density, and what selecting costs.

    python -m benchmarks.dynamic                       # the shipped model, 2048 tokens
    python -m benchmarks.dynamic ./my-llama --length 8192 --methods pooled vertical_slash
    python -m benchmarks.dynamic --quick               # few and short, to check the script
    python -m benchmarks.dynamic --keep                # also benchmarks/results and docs/figures

Every candidate that selects blocks, at each setting that `attnopt distill` tries of it, stands at all heads in turn, on
ordinary text and on long recall prompts (attnopt/probe.py), neither of which it was made with. Beside it, at the very
same number of blocks in each row of each head, stand two others: `window`, the first block and the last ones, and
`oracle`, the blocks that hold most of the true attention, which nothing but dense attention can know.

density    blocks visited and not skipped, of those causality leaves
recalled   the share of dense attention's mass that lies in them, mean over the rows that count: all rows of text, on
           recall prompts those that answer
damage     nats per counted token, the sum over heads of what each does alone: t = dO.(O' - O), half the sum of t^2;
           answers are softened as for a profile (attnopt/probe.py), as the model is sure of them
selecting  time of the selection over that of torch's dense attention, on one processor core, calls in turn; `whole` is
           the operator with its kernel, where this machine has one
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from attnopt import settings as switches
from attnopt.candidates._selected import Selected, asked_of, bounds_of
from attnopt.codegen.emit import load, write_atomically
from attnopt.codegen.spec import BLOCKS, BlockPrefill
from attnopt.instrument import Attention, Instrumented, gradients_through
from attnopt.ir import Choice, Site
from attnopt.ops.selected import Visits, attend_selected
from attnopt.probe import Probe
from attnopt.registry import CANDIDATES
from attnopt.selection import Asked, keep_of, lists_of, most
from attnopt.statistics import attention
from attnopt.statistics.trials import Kept, Trials, Try
from attnopt.supervision import Sample, loss_and_gradient
from benchmarks.planners.page import fill, markdown
from benchmarks.planners.subject import Subject
from benchmarks.record import WrongResult, environment, relative_error
from benchmarks.timing import interleaved, ratio

TAKES = "10 min"
QUICK = ("--quick",)

WAYS = ("method", "window", "oracle")
COLOURS = ("#1668a8", "#c2632f", "#4f9a53", "#a45fb5", "#b0892a", "#c4507a", "#5f6b7a", "#2a9d8f")
# Of the operator against dense attention, in float32.
TOLERANCE = 1e-4
REPEATS, SECONDS = 5, 60.0


@dataclass(frozen=True)
class Row:
    """One setting of one method on one kind of text. recalled and damage: by way, of WAYS. selecting and whole: times
    over that of dense attention at one site of the model; whole is None where the operator has no kernel here."""

    text: str
    method: str
    setting: str
    density: float
    recalled: dict[str, float]
    damage: dict[str, float]
    selecting: float = math.nan
    whole: float | None = None


def settings_of(methods: Sequence[str], length: int, block: int) -> list[Choice]:
    """What distilling tries of each method, in blocks of this size."""
    kinds = [kind for name, kind in CANDIDATES if isinstance(kind, Selected) and (not methods or name in methods)]
    menu = [(kind, choice) for kind in kinds for choice in kind.menu(length)]
    return list(dict.fromkeys(Choice.of(kind.name, {**dict(c.params), "block": block}) for kind, c in menu))


def named(choice: Choice) -> str:
    """Its parameters without those that say nothing: "mass 0.5, least 2"."""
    silent = {"skip": 0.0, "alike": -1.0}
    told = [(k, v) for k, v in choice.params if k != "block" and v != silent.get(k) and v < 1 << 20]
    return ", ".join(f"{k} {v:g}" for k, v in told)


def asked_at(choice: Choice, q: Tensor, k: Tensor, scale: float, window: int) -> Asked:
    kind, heads = CANDIDATES[choice.candidate], torch.arange(q.shape[1])
    table = torch.tensor([kind.settings(dict(choice.params))] * len(heads), dtype=torch.float64)
    return asked_of(kind, q, k, heads, table, scale, None, window)


def run_operator(
    choice: Choice, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor, Visits]:
    """Output (B, H, N, Dv), lse (B, H, N) and what was visited, by the operator that a plan runs."""
    kind = CANDIDATES[choice.candidate]
    table = torch.tensor([kind.settings(dict(choice.params))] * q.shape[1], dtype=torch.float64)
    out, lse = q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3])
    heads = torch.arange(q.shape[1], dtype=torch.int32)
    method = kind.method(dict(choice.params))
    return out, lse, attend_selected(q, k, v, heads, method, table, None, scale, window, out, lse)


def run_blocks(keep: Tensor, asked: Asked, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output and lse of the blocks of keep (B, H, R, C), by the same kernel."""
    q, k = asked.q, asked.k
    sizes = q.shape[1], k.shape[1], q.shape[3], v.shape[3]
    spec = BlockPrefill(switches.target(q.device.type), str(q.dtype).removeprefix("torch."), *sizes, asked.block, False)
    out, lse = q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3])
    none = torch.full_like(bounds_of(asked), -torch.inf)
    heads, lists = asked.heads.int(), lists_of(keep)
    load(spec).prefill(q, k, v, heads, *lists, none, asked.scale, None, asked.window, out, lse)
    return out, lse


def check(choice: Choice, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> None:
    """WrongResult unless the operator's first head is dense attention under the mask of its blocks."""
    asked = asked_at(choice, q, k, scale, window)
    keep = keep_of(CANDIDATES[choice.candidate].select(asked), asked.columns)[:, :1]
    tokens = keep.repeat_interleave(asked.block, 2).repeat_interleave(asked.block, 3)[..., : q.shape[2], : k.shape[2]]
    apart = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
    tokens = tokens & (apart >= 0) & (apart < (window or q.shape[2]))
    expected = F.scaled_dot_product_attention(q[:, :1], k[:, :1], v[:, :1], tokens, scale=scale)
    error = relative_error(run_operator(choice, q, k, v, scale, window)[0][:, :1], expected)
    if not error <= TOLERANCE:
        raise WrongResult(f"WRONG: {choice}: relative error {error:.2e} > {TOLERANCE:.0e}")


def true_mass(asked: Asked) -> tuple[Tensor, Tensor]:
    """Of dense attention: what each row block gives each block of keys (B, H, R, C), and lse (B, H, N)."""
    length, block = asked.k.shape[2], asked.block
    apart = torch.arange(length)[:, None] - torch.arange(length)
    hidden = (apart < 0) | (apart >= asked.window) if asked.window else apart < 0
    mass, lse = [], []
    for head, group in zip(asked.heads.tolist(), asked.kv.tolist(), strict=True):
        scores = (asked.q[:, head] @ asked.k[:, group].mT * asked.scale).masked_fill_(hidden, -torch.inf)
        lse.append(scores.logsumexp(-1))
        weights = scores.sub_(lse[-1][..., None]).exp_()
        missing = -length % block
        weights = F.pad(weights, (0, missing, 0, missing))
        mass.append(weights.unflatten(2, (-1, block)).sum(3).unflatten(1, (-1, block)).sum(2))
    return torch.stack(mass, 1), torch.stack(lse, 1)


def as_many(way: str, counts: Tensor, asked: Asked, mass: Tensor) -> Tensor:
    """bool (B, H, R, C): as many blocks as counts (B, H, R) says, the first and the diagonal before all others."""
    columns = torch.arange(asked.columns, device=counts.device)
    worth = (columns + 1.0).expand_as(mass) if way == "window" else mass + 1e-30
    worth = torch.where(asked.always, torch.inf, worth) * asked.possible
    return most(worth.nan_to_num(posinf=torch.finfo(worth.dtype).max), counts[..., None])


class Trying:
    """What stands at every site: dense attention, whose backward pass tries every setting and adds up what it did."""

    def __init__(self, settings: Sequence[Choice]) -> None:
        self.settings = list(settings)
        # The method first, for the two beside it take as many blocks.
        self.columns = tuple(Choice.of(way, {"setting": n}) for n in range(len(self.settings)) for way in WAYS)
        self.trials: dict[str, Trials] = {}
        self.weights, self.tell = torch.zeros(0), (lambda site: None)
        self._dense: tuple[Tensor, Tensor] | None = None
        self._visits: Visits | None = None

    def __call__(self, site: Site) -> Attention:
        held = self.trials.setdefault(site.name, Trials.zeros(site.heads, self.columns))
        window = site.mask.window

        def run(q: Tensor, k: Tensor, v: Tensor, pad: Tensor | None) -> Tensor:
            if not torch.is_grad_enabled():
                return attention(q, k, v, site.scale, pad, window, site.softcap)
            replaced = partial(self._replaced, site)
            return Try.apply(q, k, v, site.scale, pad, held, replaced, window, site.softcap)

        return run

    def _replaced(
        self, site: Site, column: Choice, q: Tensor, k: Tensor, v: Tensor, pad: Tensor | None
    ) -> tuple[Tensor, Kept]:
        choice, window = self.settings[int(column["setting"])], site.mask.window or 0
        asked = asked_at(choice, q, k, site.scale, window)
        if column == self.columns[0]:
            self.tell(site.name)
            self._dense = true_mass(asked)
        assert self._dense is not None
        mass, dense = self._dense
        if column.candidate == "method":
            out, lse, self._visits = run_operator(choice, q, k, v, site.scale, window)
        visits = self._visits
        assert visits is not None
        if column.candidate != "method":
            keep = as_many(column.candidate, visits.counts - visits.skipped, asked, mass)
            out, lse = run_blocks(keep, asked, v)
        # Weighed, so that on recall prompts the rows that answer are what is recalled.
        return out, Kept(visits.sums, (lse - dense).exp().clamp(max=1.0).double() * self.weights)

    def rows_of(self, text: str) -> list[Row]:
        held = list(self.trials.values())
        heads = sum(t.heads * t.tokens for t in held)
        recalled = torch.stack([t.recalled.sum(0) for t in held]).sum(0) / heads
        damage = torch.stack([t.t2.sum(0) / 2 / t.tokens for t in held]).sum(0)
        possible, visited = (torch.stack([x.sum(0) for x in of]).sum(0) for of in (
            [t.possible for t in held], [t.visited - t.skipped for t in held]))  # fmt: skip
        found = []
        for n, choice in enumerate(self.settings):
            at = slice(n * len(WAYS), (n + 1) * len(WAYS))
            share, nats = (dict(zip(WAYS, of[at].tolist(), strict=True)) for of in (recalled, damage))
            density = float(visited[at][0] / possible[at][0])
            found.append(Row(text, choice.candidate, named(choice), density, share, nats))
        return found


def tried(subject: Subject, text: str, samples: Sequence[Sample], settings: Sequence[Choice], seed: int) -> list[Row]:
    """Every setting at every site, on samples that each draw labels of their own."""
    trying = Trying(settings)
    instrumented = Instrumented(subject.model, trying)
    for n, sample in enumerate(samples):
        trying.weights = sample.row_weights("model").double()
        trying.tell = lambda site, n=n: print(f"{text} {n + 1} of {len(samples)}: {site}", flush=True)  # type: ignore[misc]
        with gradients_through(subject.model):
            logits = instrumented.logits(sample.ids)
            generator = torch.Generator().manual_seed(seed + n)
            _, gradient = loss_and_gradient(logits, sample, "model", generator, True)
            logits.backward(gradient)
        for trials in trying.trials.values():
            trials.tokens += float(trying.weights.sum())
    return trying.rows_of(text)


def seen_at(subject: Subject, ids: Tensor, place: int) -> tuple[Site, Tensor, Tensor, Tensor]:
    """A site of the model in the order of its layers, and its q, k and v on ids (1, N)."""
    seen: list[tuple[Site, Tensor, Tensor, Tensor]] = []

    def observer(site: Site) -> Attention:
        def run(q: Tensor, k: Tensor, v: Tensor, pad: Tensor | None) -> Tensor:
            seen.append((site, q.contiguous(), k.contiguous(), v.contiguous()))
            return attention(q, k, v, site.scale, pad, site.mask.window, site.softcap)

        return run

    with torch.no_grad():
        Instrumented(subject.model, observer).logits(ids)
    return seen[place]


@torch.no_grad()
def timed(subject: Subject, ids: Tensor, settings: Sequence[Choice]) -> dict[Choice, tuple[float, float | None]]:
    """Selection, and where there is a kernel the whole operator, over dense attention, on what a middle layer sees."""
    site, q, k, v = seen_at(subject, ids, len(subject.sites) // 2)
    window = site.mask.window or 0
    calls: dict[str, Callable[[], object]] = {
        "dense": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=site.scale, enable_gqa=True)
    }
    for n, choice in enumerate(settings):
        kind = CANDIDATES[choice.candidate]
        if not choice["skip"]:
            check(choice, q, k, v, site.scale, window)
        calls[f"select {n}"] = lambda kind=kind, c=choice: kind.select(asked_at(c, q, k, site.scale, window))  # type: ignore[misc]
        if switches.target(q.device.type) != "reference":
            calls[f"whole {n}"] = partial(run_operator, choice, q, k, v, site.scale, window)
    times = interleaved(calls, REPEATS, "thread", SECONDS)
    return {
        choice: (
            ratio(times[f"select {n}"], times["dense"])[0],
            ratio(times[f"whole {n}"], times["dense"])[0] if f"whole {n}" in times else None,
        )
        for n, choice in enumerate(settings)
    }


def cells(row: Row) -> list[str]:
    recalled = [f"{100 * row.recalled[way]:.1f}" for way in WAYS]
    damage = [f"{row.damage[way]:.2g}" for way in WAYS]
    whole = "" if row.whole is None else f"{row.whole:.2f}"
    return [row.method, row.setting, f"{100 * row.density:.0f} %", *recalled, *damage, f"{row.selecting:.3f}", whole]


HEADER = ["method", "setting", "density", "recalled, %", *WAYS[1:], "damage, nats", *WAYS[1:], "selecting", "whole"]


def described(found: dict[str, Any], rows: Sequence[Row]) -> str:
    """Of the documentation: a table for each kind of text."""
    sizes = f"{found['length']} tokens in blocks of {found['block']}, {found['samples']} sequences"
    parts = [f"`{found['model']}`, {sizes}; times on {found['environment']['device']}, one thread, {found['dtype']}:"]
    for text in dict.fromkeys(row.text for row in rows):
        parts += [f"{text.capitalize()}:", markdown(HEADER, [cells(row) for row in rows if row.text == text])]
    return "\n\n".join(parts)


def figure(rows: Sequence[Row], path: Path) -> None:
    """Recalled and lost over density, a column for each kind of text; the two ways beside them in grey."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "attnopt"
    texts, methods = (list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("text", "method"))
    made, axes = pyplot.subplots(2, len(texts), figsize=(5.2 * len(texts), 7.0), sharex=True, squeeze=False)
    for column, text in enumerate(texts):
        of_text = sorted((row for row in rows if row.text == text), key=lambda row: row.density)
        for axis, what in zip(axes[:, column], ("recalled", "damage"), strict=True):
            for way, mark in (("window", "x"), ("oracle", "+")):
                points = [(row.density, getattr(row, what)[way]) for row in of_text]
                axis.plot(*zip(*points, strict=True), mark, ms=4, color="#767c85", label=f"{way}, as many blocks")
            for n, method in enumerate(methods):
                points = [(row.density, getattr(row, what)["method"]) for row in of_text if row.method == method]
                axis.plot(
                    *zip(*points, strict=True), "o-", ms=3.5, lw=1.2, color=COLOURS[n % len(COLOURS)], label=method
                )
        axes[0, column].set_title(text)
        axes[1, column].set_yscale("log")
        axes[1, column].set_xlabel("density")
    axes[0, 0].set_ylabel("mass recalled")
    axes[1, 0].set_ylabel("damage, nats per token")
    axes[1, 0].legend(frameon=False, fontsize=7)
    made.tight_layout()
    made.savefig(path, metadata={"Date": None})
    pyplot.close(made)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], list[Row]]:
    begin = time.perf_counter()
    subject, settings = Subject(args.model, args.dtype, args.text), settings_of(args.methods, args.length, args.block)
    ordinary = [Sample(ids[None]) for ids in subject.split("final", args.length, args.samples)]
    documents = Probe(subject.tokenizer, split="final").documents(args.length, args.samples, "dynamic")
    prompts = [document.sample for document in documents]
    rows = []
    for text, samples in (("ordinary text", ordinary), ("recall prompts", prompts)):
        times = timed(subject, samples[0].ids, settings)
        for row, choice in zip(tried(subject, text, samples, settings, args.seed), settings, strict=True):
            selecting, whole = times[choice]
            rows.append(replace(row, selecting=selecting, whole=whole))
    given = {name: getattr(args, name) for name in ("model", "length", "block", "samples", "seed", "dtype")}
    return {**given, "seconds": round(time.perf_counter() - begin, 1)}, rows


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--text", nargs="*", default=[], help="files; by default the library's own source")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--block", type=int, default=64, choices=BLOCKS)
    parser.add_argument("--samples", type=int, default=2, help="sequences of each kind of text")
    parser.add_argument("--methods", nargs="*", default=[], help="candidates; by default all that select blocks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument(
        "--keep", action="store_true", help="write benchmarks/results, docs/figures and docs/selection.md"
    )
    args = parser.parse_args()
    if args.quick:
        args.length, args.block, args.samples = 256, 16, 1
    return args


def main() -> None:
    args, console = arguments(), Console()
    # Of a file or a pipe: cells of a table are not cut.
    console.width = console.width if console.is_terminal else 160
    found, rows = run(args)
    for text in dict.fromkeys(row.text for row in rows):
        shown = Table(*HEADER, title=text)
        for row in rows:
            if row.text == text:
                shown.add_row(*cells(row))
        console.print(shown)
    root, stem = Path(__file__).parents[1], f"dynamic-{Path(args.model).name}"
    data = {**found, "rows": [asdict(row) for row in rows], "environment": environment()}
    for path in [args.json] * (args.json is not None) + [root / f"benchmarks/results/{stem}.json"] * args.keep:
        write_atomically(path, json.dumps(data, indent=1) + "\n")
    if args.keep:
        figure(rows, root / f"docs/figures/{stem}.svg")
        fill(root / "docs/selection.md", stem, described(data, rows))


if __name__ == "__main__":
    main()
