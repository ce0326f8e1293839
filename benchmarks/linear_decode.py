"""Decoding at equal loss: dense, the best plan of spans, and the best with linear and mean tails; time and cache.

    python -m benchmarks run linear_decode -- [--keep] [--out FILE] [--lengths 4096 16384] [--increase 1] [--quick]

The model is one trained here, on documents whose far past is worth a histogram (benchmarks/mixtures/documents.py). For
every length two plans are made, with the least cache of those that were measured, at that length on held-out
documents, to lose at most `--increase` percent: one of sinks and windows alone, one that may also give a head a far
part. Then one query is decoded on caches that hold what each plan keeps of a document of that length:

    packed   SDPA on the dense cache, as it is called at its fastest
    dense    every head dense, through the emitted kernel
    spans    the plan of sinks and windows
    tails    the plan with far parts: near keys, running state and merge are separate calls

A ratio says how many times as fast as *packed* the attention of all layers is, *token* the same with all else that the
model computes for a token, *cache* how many times fewer bytes of one sequence are held. Every step is checked against
the definition in float64. One thread, processor time; the write of the new key is in none of the times.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.ir import DENSE
from attnopt.mixed import attend
from attnopt.planner import choices_from, front
from benchmarks.mixtures.decoding import Layer, Token, cache_bytes, expected
from benchmarks.mixtures.subject import Choices, Outcome, Sizes, Subject
from benchmarks.record import RESULTS, Aim, Row, Run, environment, relative_error
from benchmarks.timing import interleaved, ratio

TAKES = "15 min"
QUICK = ("--quick",)
TOLERANCE = 1e-4
ALLOWED = {"spans": (), "tails": ("linear", "taylor", "compensation")}
SIZES = Sizes((1024, 2048, 4096), 4096, 2, 2, windows=(32, 128))
SHORT = Sizes((256, 512), 512, 1, 1, features=(16,), ranks=(4,), windows=(32,), steps=20)
# Plans that are measured at each length and set of families, closing in on the largest predicted damage that holds.
TRIES = 7


def cheapest(subject: Subject, allowed: Sequence[str], length: int, most: float) -> tuple[Choices, Outcome]:
    """The plan with the least cache of those measured to lose at most `most` percent at `length`; dense if none did."""
    problem = subject.problem(length, "memory", allowed)
    sweep = front(problem)
    damages = sweep.damage[sweep.damage > 0]
    best: tuple[Choices, Outcome] = ({s.name: (DENSE,) * s.heads for s in subject.sites}, Outcome(0.0, 0.0))
    if not len(damages):
        return best
    low, high, least = math.log(float(damages.min())) - 1.0, math.log(float(damages.max())), problem.dense.cost
    at = min(max(math.log(most / 100 * subject.dense_loss(length, subject.sizes.final)), low), high)
    for _ in range(TRIES):
        solution = sweep.pick(max_damage=math.exp(at))
        if solution is None:
            break
        choices = choices_from(problem, solution)
        outcome = subject.measure(choices, length, subject.sizes.final)
        subject.say(f"  {length} tokens, {', '.join(allowed) or 'spans'}: cost {solution.cost / problem.dense.cost:.4f} "
                    f"of dense, loss {outcome.increase:+.3f} %")  # fmt: skip
        if outcome.increase <= most:
            low = at
            if solution.cost < least:
                least, best = solution.cost, (choices, outcome)
        else:
            high = at
        if high - low < 0.05:
            break
        at = (low + high) / 2
    return best


class Decoding:
    """One query of every layer under several plans, after `length` tokens of a held-out document."""

    def __init__(self, subject: Subject, length: int, plans: dict[str, Choices]) -> None:
        self.subject, self.length, self.plans = subject, length, plans
        given = subject.inputs(subject.split("final", length, 1))
        self.tokens = {name: Token(q[:, :, -1:].contiguous(), k, v) for name, (q, k, v) in given.items()}
        self.layers = {name: self.made(plan) for name, plan in plans.items()}

    def made(self, plan: Choices) -> list[tuple[Layer, Tensor]]:
        return [
            (Layer(s, self.tokens[s.name], plan[s.name], self.subject.fitted), self.tokens[s.name].q)
            for s in self.subject.sites
        ]

    def error(self, name: str) -> float:
        """The largest relative error of a layer's step, on a cache as the tokens before left it."""
        worst = 0.0
        for site, (layer, q) in zip(self.subject.sites, self.made(self.plans[name]), strict=True):
            wanted = expected(site, self.tokens[site.name], self.plans[name][site.name], self.subject.fitted)
            worst = max(worst, relative_error(layer.step(q), wanted))
        return worst

    def calls(self) -> dict[str, Callable[[], object]]:
        packed = []
        for site in self.subject.sites:
            token = self.tokens[site.name]
            rows = token.q.view(1, site.kv_heads, -1, site.head_dim)
            packed.append((rows, token.k.contiguous(), token.v.contiguous(), site.scale))

        def run_packed() -> None:
            for q, k, v, scale in packed:
                F.scaled_dot_product_attention(q, k, v, scale=scale)

        def run(layers: list[tuple[Layer, Tensor]]) -> None:
            for layer, q in layers:
                layer.step(q)

        ids = self.subject.split("final", 8, 1)[:, :1]
        return {
            "packed": run_packed,
            **{name: (lambda layers=layers: run(layers)) for name, layers in self.layers.items()},
            # All that does not grow with the length: one token of the model, whose attention sees one key.
            "rest": lambda: self.subject.model(ids, use_cache=False),
        }

    def bytes(self, name: str) -> int:
        return sum(cache_bytes(s, self.plans[name][s.name], self.length) for s in self.subject.sites)


def rows_of(subject: Subject, length: int, most: float, repeats: int) -> tuple[list[Row], list[str], dict[str, Outcome]]:
    """One row for each plan at `length`, sentences on what the plans are, and what they lose."""
    dense = {s.name: (DENSE,) * s.heads for s in subject.sites}
    found = {name: cheapest(subject, allowed, length, most) for name, allowed in ALLOWED.items()}
    plans = {"dense": dense, **{name: choices for name, (choices, _) in found.items()}}
    decoding = Decoding(subject, length, plans)
    times = interleaved(decoding.calls(), repeats, "thread", seconds=20)
    rest = times["rest"]
    rows = []
    for name in plans:
        whole = [[a + b for a, b in zip(times[n], rest, strict=True)] for n in ("packed", name)]
        bounds = {"attention": ratio(times["packed"], times[name]), "token": ratio(*whole)}
        ratios = {what: value for what, (value, _) in bounds.items()}
        ratios["cache"] = decoding.bytes("dense") / decoding.bytes(name)
        if name == "tails":
            ratios["attention, over spans"], low = ratio(times["spans"], times[name])
            ratios["cache, over spans"] = decoding.bytes("spans") / decoding.bytes(name)
            bounds["attention, over spans"] = (ratios["attention, over spans"], low)
        shown = {"attention": 1e3 * statistics.median(times[name]), "rest": 1e3 * statistics.median(rest)}
        facts = {"model": subject.name, "length": length, "plan": name}
        lower = {what: low for what, (_, low) in bounds.items()}
        rows.append(Row(facts, decoding.error(name), TOLERANCE, ratios, lower, shown))
    said = []
    for name, (choices, outcome) in found.items():
        counts = Counter(str(c) for of_site in choices.values() for c in of_site)
        heads = ", ".join(f"{n} {choice}" for choice, n in sorted(counts.items()))
        said.append(f"{length} tokens, {name}: loss {outcome.increase:+.2f} %, KL {outcome.kl:.4f}, "
                    f"{decoding.bytes(name) / 1024:.0f} KiB of {decoding.bytes('dense') / 1024:.0f}: {heads}")  # fmt: skip
    return rows, said, {name: outcome for name, (_, outcome) in found.items()}


def aims(rows: Sequence[Row]) -> list[Aim]:
    """At the longest length; met where tails beat the best plan of spans at equal loss."""
    right = [row for row in rows if row.case["plan"] == "tails" and not row.wrong]
    if not right:
        return []
    last = max(right, key=lambda row: row.case["length"])
    return [
        Aim(f"decode at {last.case['length']}, tails over spans at equal loss, {what}", 1.0, last.ratios[f"{what}, over spans"])
        for what in ("attention", "cache")
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("diffuse", "recall"), default="diffuse")
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 8192, 16384, 32768])
    parser.add_argument("--increase", type=float, default=1.0, help="percent of the dense loss")
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--quick", action="store_true", help="one short length")
    parser.add_argument("--out", type=Path, help="write the rows there as JSON")
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sizes, lengths = (SHORT, [512]) if args.quick else (SIZES, args.lengths)
    subject = Subject(args.model, sizes, lambda line: print(line, flush=True))
    rows, notes = [], subject.offers()
    with torch.inference_mode():
        for length in lengths:
            found, said, _ = rows_of(subject, length, args.increase, args.repeats)
            rows, notes = rows + found, notes + said
            print("\n".join([*map(str, found), *said]), flush=True)
    done = Run("linear_decode", rows, environment(), [] if args.quick else aims(rows), notes)
    for line in (*done.aims, *done.notes):
        print(line)
    for path in [args.out, RESULTS / "linear_decode-cpu.json" if args.keep else None]:
        if path is not None:
            done.save(path)


if __name__ == "__main__":
    main()
