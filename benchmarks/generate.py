"""Tokens by `model.generate` under a plan, over transformers' caches and over attnopt's exact one, end to end.

    python -m benchmarks.generate [--quick] [--keep] [--dtype float32 bfloat16] [--threads 1] [--out results.json]

A Llama of random weights, 8 layers, hidden size 512, heads of 64, eager. Under the plan a quarter of the KV heads keep
everything (half of them where 8 query heads share 2), the rest 64 sinks and a window of N/8: the split at which
DuoAttention gives 2.55 and 1.67 times less memory. Rounds are interleaved; on one thread the clock is the process's
CPU time, on more it is wall time. The exact cache's logits have to be those of DynamicCache.

    static, dynamic, exact     times as fast, a token, as StaticCache of just this length, DynamicCache, attnopt exact
    memory                     times as few bytes of cache as StaticCache
    ideal                      bytes held over bytes that the spans need
    python                     percent of a token's time spent in attnopt's own Python, under a profiler
"""

from __future__ import annotations

import argparse
import copy
import cProfile
import pstats
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import attnopt
from attnopt.fingerprint import fingerprint_of
from attnopt.hf.benchmark import DYNAMIC, EXACT, PLANNED, STATIC, Clock, decode, mib_of, running, timed_decoding
from attnopt.ir import DENSE, Choice
from attnopt.plan import Budget, Lengths, Plan, Predicted
from attnopt.profiler import discover
from benchmarks.record import RESULTS, Aim, Row, Run, environment
from benchmarks.timing import ratio

TAKES, QUICK = "15 min", ("--quick",)
LAYERS, HEADS, DIM = 8, 8, 64
SINK, NEW = 64, 24
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
PACKAGE = str(Path(attnopt.__file__).parent)


@dataclass(frozen=True)
class Case:
    kv_heads: int
    batch: int
    length: int
    dtype: str
    threads: int

    @property
    def model(self) -> Any:
        import transformers

        config = transformers.LlamaConfig(
            vocab_size=1024, hidden_size=HEADS * DIM, intermediate_size=1024, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, num_key_value_heads=self.kv_heads, max_position_embeddings=2 * self.length,
        )  # fmt: skip
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).to(getattr(torch, self.dtype)).eval()

    def plan(self, model: Any) -> Plan:
        full = self.kv_heads // (2 if self.kv_heads < HEADS else 4)
        window = Choice.of("sink_window", {"sink": SINK, "alpha": 0, "beta": 0.125})
        share = HEADS // self.kv_heads
        choices = (DENSE,) * (full * share) + (window,) * ((self.kv_heads - full) * share)
        sites = discover(model, torch.arange(64)[None]).sites
        return Plan(
            model="random",
            fingerprint=fingerprint_of(model, list(sites.values())),
            budget=Budget("kl", 1.0),
            lengths=Lengths((self.length,), self.length),
            choices=dict.fromkeys(sites, choices),
            predicted=Predicted(0.0, "density", "million kept pairs", 1.0, 1.0, 1.0, 1.0),
        )


def own_python(model: Any, ids: torch.Tensor, prefix: Any) -> float:
    """Percent of the time of `generate` that functions of attnopt take themselves, what they call in C left out."""
    profiler = cProfile.Profile()
    with running(model, prefix):
        cache = copy.deepcopy(prefix.cache)
        profiler.enable()
        decode(model, ids, None, cache, NEW, Clock())
        profiler.disable()
    held: dict[Any, Any] = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    own = sum(figures[2] for (file, *_), figures in held.items() if file.startswith(PACKAGE))
    return 100 * own / sum(figures[2] for figures in held.values())


def measure(case: Case, rounds: int) -> Row:
    model = case.model
    ids = torch.randint(0, 1024, (case.batch, case.length), generator=torch.Generator().manual_seed(1))
    plan = case.plan(model)
    now = time.process_time if case.threads == 1 else time.perf_counter
    prefixes, seconds = timed_decoding(
        model, ids, None, plan, NEW, rounds, now, lambda what: print(f"  {what}", flush=True)
    )
    by_name = {p.variant: p for p in prefixes}
    planned = seconds[PLANNED]
    found = {
        "static": ratio(seconds[STATIC], planned),
        "dynamic": ratio(seconds[DYNAMIC], planned),
        "exact": ratio(seconds[EXACT], planned),
        "exact over static": ratio(seconds[STATIC], seconds[EXACT]),
        "exact over dynamic": ratio(seconds[DYNAMIC], seconds[EXACT]),
    }
    ratios, lower = ({name: pair[side] for name, pair in found.items()} for side in (0, 1))
    held = by_name[PLANNED].cache
    ratios["memory"] = mib_of(by_name[STATIC].cache) / mib_of(held)
    ratios["ideal"] = held.nbytes / held.ideal_nbytes
    ratios["python"] = own_python(model, ids, by_name[PLANNED])
    medians = {name: 1e3 * float(torch.tensor(t).median()) for name, t in seconds.items()}
    error = max(by_name[EXACT].error, by_name[STATIC].error)
    return Row(asdict(case), error, TOLERANCE[case.dtype], ratios, lower, medians)


def cases(dtypes: list[str], threads: list[int], quick: bool) -> Iterator[Case]:
    for count in threads:
        for dtype in dtypes:
            if quick:
                yield Case(2, 2, 512, dtype, count)
                continue
            yield Case(8, 1, 16384, dtype, count)
            yield Case(2, 1, 16384, dtype, count)
            yield Case(8, 1, 4096, dtype, count)
            yield Case(8, 8, 4096, dtype, count)


def aims_of(rows: list[Row]) -> list[Aim]:
    """Speed at 16384 tokens on one thread, in each dtype; bytes, which are counted, at every length."""
    right = [row for row in rows if not row.wrong]
    long = [r for r in right if r.case["length"] == 16384 and r.case["threads"] == 1]

    def least(rows: list[Row], name: str) -> float | None:
        return min((r.lower.get(name, r.ratios[name]) for r in rows), default=None)

    found = []
    for dtype in TOLERANCE:
        own = [r for r in long if r.case["dtype"] == dtype and r.case["kv_heads"] == HEADS]
        where = f"8 layers, 16384 tokens, {dtype}"
        found.append(Aim(f"planned, over a StaticCache of just the length, {where}", 1.8, least(own, "static")))
        found.append(Aim(f"planned, over DynamicCache, {where}", 6.0, least(own, "dynamic")))
    single, grouped = ([r for r in right if (r.case["kv_heads"] == HEADS) is which] for which in (True, False))
    ideal = max((r.ratios["ideal"] for r in right), default=None)
    python = max((r.ratios["python"] for r in long), default=None)
    return [
        *found,
        Aim("cache of a model without groups, a quarter of its heads full, over dense", 2.5, least(single, "memory")),
        Aim("cache with groups, half of the KV heads full, over dense", 1.65, least(grouped, "memory")),
        Aim("bytes of cache over what the spans need", 1.05, ideal, at_most=True),
        Aim("attnopt's own Python, percent of generate at 16384 tokens", 5.0, python, at_most=True),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="512 tokens, one case for each dtype, one round")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=list(TOLERANCE))
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the run to this file")
    parser.add_argument("--keep", action="store_true", help=f"write it to {RESULTS.name}/generate-cpu.json")
    args = parser.parse_args()
    rows: list[Row] = []
    for case in cases(args.dtype, args.threads, args.quick):
        torch.set_num_threads(case.threads)
        rows.append(measure(case, 1 if args.quick else args.rounds))
        print(rows[-1], flush=True)
    aims = [] if args.quick else aims_of(rows)
    print("\n".join(map(str, aims)))
    run = Run("generate", rows, environment(), aims)
    for path in filter(None, (args.out, RESULTS / "generate-cpu.json" if args.keep else None)):
        run.save(path)
    if any(row.wrong for row in rows):
        raise SystemExit("WRONG results: no speed-up of theirs was given")


if __name__ == "__main__":
    main()
