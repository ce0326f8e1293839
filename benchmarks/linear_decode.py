"""Decoding at equal loss: dense, the best plan of spans, and the best with linear and mean tails; time and cache.

    python -m benchmarks run linear_decode -- [--keep] [--out FILE] [--lengths 4096 16384] [--increase 0.5] [--quick]

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
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.ir import DENSE
from attnopt.planner import choices_from, front
from benchmarks.mixtures.decoding import Layer, Token, cache_bytes, expected
from benchmarks.mixtures.subject import Choices, Outcome, Sizes, Subject
from benchmarks.record import RESULTS, Aim, Row, Run, environment, relative_error
from benchmarks.timing import interleaved, ratio

TAKES = "10 min"
QUICK = ("--quick",)
TOLERANCE = 1e-4
ALLOWED = {"spans": (), "tails": ("linear", "taylor", "compensation")}
SIZES = Sizes((1024, 4096), 4096, 2, 2, windows=(32, 128), steps=200)
SHORT = Sizes((256, 512), 512, 1, 1, features=(16,), ranks=(4,), windows=(32,), steps=20)
# Sizes of caches that are tried at each length and set of families, in equal ratios from the smallest plan's to dense;
# and how often the ratio between the last that missed and the first that held is halved.
STEPS, CLOSER = 6, 3


def cheapest(subject: Subject, allowed: Sequence[str], length: int, most: float) -> tuple[Choices, Outcome]:
    """The plan with the least cache of those measured to lose at most `most` percent at `length`; dense if none did."""
    problem = subject.problem(length, "memory", allowed)
    sweep, samples = front(problem), subject.sizes.final
    best: tuple[Choices, Outcome] = ({s.name: (DENSE,) * s.heads for s in subject.sites}, Outcome(0.0, 0.0))
    if len(sweep) < 2:
        return best
    seen: dict[bytes, Outcome] = {}

    def tried(cost: float) -> tuple[Choices, Outcome, float] | None:
        """The plan of at most this cost, if it holds, and what it costs."""
        solution = sweep.pick(max_cost=cost * (1 + 1e-9))
        if solution is None:
            return None
        choices, key = choices_from(problem, solution), solution.index.tobytes()
        if key not in seen:
            seen[key] = subject.measure(choices, length, samples)
            subject.say(
                f"  {length} tokens, {', '.join(allowed) or 'spans'}: cache {solution.cost / problem.dense.cost:.4f} "
                f"of dense, loss {seen[key].increase:+.3f} %"
            )
        return (choices, seen[key], solution.cost) if seen[key].increase <= most else None

    # From the smallest cache up: what is lost need not fall with every byte, and small plans are soon measured.
    least, dense = float(sweep.cost.min()), problem.dense.cost
    missed = least
    for step in range(STEPS):
        cost = least * (dense / least) ** (step / STEPS)
        found = tried(cost)
        if found is None:
            missed = cost
            continue
        for _ in range(CLOSER if step else 0):
            middle = math.sqrt(missed * found[2])
            closer = tried(middle)
            found, missed = (found, middle) if closer is None else (closer, missed)
        return found[0], found[1]
    return best


class Decoding:
    """One query of every layer under several plans, after a held-out document, in `batch` caches of their own."""

    def __init__(self, subject: Subject, ids: Tensor, batch: int, plans: dict[str, Choices]) -> None:
        self.subject, self.length, self.plans, self.batch = subject, ids.shape[1], plans, batch
        self.tokens = {
            name: Token(*(x.repeat(batch, 1, 1, 1) for x in (q[:, :, -1:], k, v)))
            for name, (q, k, v) in subject.inputs(ids).items()
        }
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
            packed.append((token.q.view(self.batch, site.kv_heads, -1, site.head_dim), token.k, token.v, site.scale))

        def run_packed() -> None:
            for q, k, v, scale in packed:
                F.scaled_dot_product_attention(q, k, v, scale=scale)

        def run(layers: list[tuple[Layer, Tensor]]) -> None:
            for layer, q in layers:
                layer.step(q)

        ids = torch.zeros(self.batch, 1, dtype=torch.long)
        return {
            "packed": run_packed,
            **{name: (lambda layers=layers: run(layers)) for name, layers in self.layers.items()},
            # All that does not grow with the length: one token of the model, whose attention sees one key.
            "rest": lambda: self.subject.model(ids, use_cache=False),
        }

    def bytes(self, name: str) -> int:
        return sum(cache_bytes(s, self.plans[name][s.name], self.length) for s in self.subject.sites)


def rows_of(
    subject: Subject, length: int, most: float, batches: Sequence[int], repeats: int
) -> tuple[list[Row], list[str]]:
    """A row for each plan and batch at `length`; and what the plans are, and lose."""
    found = {name: cheapest(subject, allowed, length, most) for name, allowed in ALLOWED.items()}
    dense = {s.name: (DENSE,) * s.heads for s in subject.sites}
    plans = {"dense": dense, **{name: choices for name, (choices, _) in found.items()}}
    ids, rows = subject.split("final", length, 1), []
    for batch in batches:
        decoding, threads = Decoding(subject, ids, batch, plans), torch.get_num_threads()
        torch.set_num_threads(1)
        times = interleaved(decoding.calls(), repeats, "thread", seconds=20)
        torch.set_num_threads(threads)
        rows += [row(decoding, name, times) for name in plans]
    said = []
    for name, (choices, outcome) in found.items():
        counts = Counter(str(c) for of_site in choices.values() for c in of_site)
        heads = ", ".join(f"{n} {choice}" for choice, n in sorted(counts.items()))
        said.append(
            f"{length} tokens, {name}: loss {outcome.increase:+.2f} %, KL {outcome.kl:.4f}, "
            f"{decoding.bytes(name) / 1024:.0f} of {decoding.bytes('dense') / 1024:.0f} KiB: {heads}"
        )
    return rows, said


def row(decoding: Decoding, name: str, times: dict[str, list[float]]) -> Row:
    """Of one plan, from times of `Decoding.calls`."""
    rest = times["rest"]
    packed, own, spans = ([a + b for a, b in zip(times[n], rest, strict=True)] for n in ("packed", name, "spans"))
    bounds = {"attention": ratio(times["packed"], times[name]), "token": ratio(packed, own)}
    bytes_of = {n: decoding.bytes(n) for n in decoding.plans}
    ratios = {"cache": bytes_of["dense"] / bytes_of[name]}
    if name == "tails":
        bounds |= {"attention, over spans": ratio(times["spans"], times[name]), "token, over spans": ratio(spans, own)}
        ratios["cache, over spans"] = bytes_of["spans"] / bytes_of[name]
    shown = {"attention": 1e3 * statistics.median(times[name]), "rest": 1e3 * statistics.median(rest)}
    facts = {"model": decoding.subject.name, "length": decoding.length, "batch": decoding.batch, "plan": name}
    ratios = {what: value for what, (value, _) in bounds.items()} | ratios
    return Row(facts, decoding.error(name), TOLERANCE, ratios, {what: low for what, (_, low) in bounds.items()}, shown)


def aims(rows: Sequence[Row]) -> list[Aim]:
    """At the longest length and largest batch: tails against the best plan of spans at equal loss."""
    right = [row for row in rows if row.case["plan"] == "tails" and not row.wrong]
    if not right:
        return []
    last = max(right, key=lambda row: (row.case["length"], row.case["batch"]))
    where = f"decode of {last.case['batch']} at {last.case['length']}, tails over spans at equal loss"
    return [Aim(f"{where}: {what}", 1.0, last.ratios[f"{what}, over spans"]) for what in ("attention", "cache")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("diffuse", "recall"), default="diffuse")
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 8192, 16384, 32768])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4], help="sequences decoded together")
    parser.add_argument("--increase", type=float, default=0.5, help="percent of the dense loss")
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--quick", action="store_true", help="one short length")
    parser.add_argument("--out", type=Path, help="write the rows there as JSON")
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results")
    args = parser.parse_args()
    sizes, lengths = (SHORT, [512]) if args.quick else (SIZES, args.lengths)
    subject = Subject(args.model, sizes, lambda line: print(line, flush=True))
    rows: list[Row] = []
    notes = subject.offers()
    with torch.inference_mode():
        for length in lengths:
            found, said = rows_of(subject, length, args.increase, args.batch, args.repeats)
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
