"""What exact mode saves when a model decodes from a DynamicCache, which is copied whole at every token, on the CPU.

    python -m benchmarks.exact_append                 # the table, fifteen minutes
    python -m benchmarks.exact_append --quick         # 1k tokens and two layers, to check the script
    python -m benchmarks.exact_append --keep          # also benchmarks/results and docs/exact.md

Random Llama models of eight layers, hidden size 512, heads of 64, batch 1. The caches hold random keys and values in
place of a prefill, and then grow by a token at every step, on all sides alike. A ratio says how many times as fast
attnopt is as

    eager     the model as it is
    inductor  torch.compile(model)
    cat       attnopt on the same graphs, where keys and values are concatenated

Ahead of every step 128 MB of something else are read. Logits are compared with those of the uncompiled model in
float32, which half of the keys hidden must change, and may be a quarter farther from them than those of the same model
uncompiled or by inductor; and logits, keys and values with those of `cat`, where every bit has to be the same.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from attnopt.backend import append, attnopt
from attnopt.ir import Refusal
from benchmarks.exact_decode import HEADS, HIDDEN, VOCAB, model_of
from benchmarks.record import RESULTS, Aim, Row, Run, environment, relative_error
from benchmarks.timing import interleaved, ratio

TAKES = "15 min"
QUICK = ("--quick",)
# Relative errors of logits.
TOLERANCE = {"float32": 1e-4, "bfloat16": 6e-2}
BETWEEN = 2**27
# Wall seconds spent on the times of one model.
SECONDS = 40.0
# Steps before times are taken: the first two compile.
STEPS = 4


@dataclass(frozen=True)
class Case:
    layers: int
    kv_heads: int
    dtype: str
    tokens: int

    def record(self) -> dict[str, Any]:
        heads = f"{HEADS}/{self.kv_heads}"
        return {"layers": self.layers, "heads": heads, "dtype": self.dtype, "tokens": self.tokens}


def cases(tokens: list[int], layers: int) -> Iterator[Case]:
    for length in tokens:
        for dtype in TOLERANCE:
            for kv_heads in (HEADS, 2):
                yield Case(layers, kv_heads, dtype, length)


class Decoding:
    """A model and a cache of its own, which holds `tokens` random tokens and grows by one a step."""

    def __init__(self, case: Case, model: Callable[..., Any], dtype: torch.dtype) -> None:
        from transformers import DynamicCache

        self.model, self.cache, self.tokens = model, DynamicCache(), case.tokens
        generator = torch.Generator().manual_seed(1)
        for layer in range(case.layers):
            shape = 1, case.kv_heads, case.tokens, HIDDEN // HEADS
            k, v = (torch.randn(shape, generator=generator).to(getattr(torch, case.dtype)) for _ in "kv")
            self.cache.update(k.to(dtype), v.to(dtype), layer)

    def step(self, mask: Tensor | None = None) -> Tensor:
        """Logits (1, 1, vocabulary) of the next token, which is made up."""
        ids = torch.tensor([[self.tokens % VOCAB]])
        given = {"input_ids": ids, "position_ids": torch.tensor([[self.tokens]]), "attention_mask": mask}
        found: Tensor = self.model(**given, past_key_values=self.cache, use_cache=True).logits
        self.tokens += 1
        return found

    @property
    def state(self) -> list[Tensor]:
        return [held for layer in self.cache.layers for held in (layer.keys, layer.values)]


def expected(case: Case, model: Any) -> list[Tensor]:
    """Logits of the first steps of the uncompiled model in float32. ValueError where the keys hardly matter to them."""
    wide = copy.deepcopy(model).float()
    decoding = Decoding(case, wide, torch.float32)
    found = [decoding.step() for _ in range(STEPS)]
    mask = (torch.arange(case.tokens + 1) % 2 == 0)[None, None, None]
    moved = relative_error(Decoding(case, wide, torch.float32).step(mask), found[0])
    if not moved > 3 * TOLERANCE["bfloat16"]:
        raise ValueError(f"without half of the keys the logits differ by {moved:.2g} only")
    return found


def sides(case: Case, model: Any) -> dict[str, Decoding]:
    backends = {"inductor": "inductor", "cat": concatenating, "attnopt": "attnopt"}
    compiled = {"eager": model} | {name: torch.compile(model, backend=backend) for name, backend in backends.items()}
    return {name: Decoding(case, side, getattr(torch, case.dtype)) for name, side in compiled.items()}


def first_steps(decodings: dict[str, Decoding], wanted: list[Tensor]) -> tuple[dict[str, float], dict[str, int]]:
    """Of each side the largest error of the steps that compile, and how many graphs it took."""
    errors, graphs = {}, {}
    for name, decoding in decodings.items():
        counters.clear()
        errors[name] = max(relative_error(decoding.step(), logits) for logits in wanted)
        graphs[name] = counters["stats"]["unique_graphs"]
    return errors, graphs


def concatenating(graph: Any, inputs: list[Any]) -> Callable[..., Any]:
    """The backend, but nothing is appended to."""
    no = Refusal("it is compared with", code="append-layout")
    with mock.patch("attnopt.passes.append.obstacle", lambda program, writer: no):
        return attnopt(graph, inputs)


def apart(one: Decoding, other: Decoding) -> float:
    """The largest difference of the next logits, and of all keys and values, in any element."""
    pairs = [(one.step(), other.step()), *zip(one.state, other.state, strict=True)]
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs)


def measured(case: Case, seconds: float) -> tuple[Row, str]:
    """The row, and what was counted."""
    torch._dynamo.reset()
    model = model_of(case)
    append.counts.appended = append.counts.copied = 0
    with torch.no_grad():
        wanted = expected(case, model)
        decodings = sides(case, model)
        errors, graphs = first_steps(decodings, wanted)
        counters.clear()
        between = torch.ones(BETWEEN // 4)
        calls: dict[str, Callable[[], object]] = {name: d.step for name, d in decodings.items()}
        times = interleaved(calls, 200, "thread", seconds, between.sum)
        differs = apart(decodings["attnopt"], decodings["cat"])
    error = float("inf") if differs else errors["attnopt"]
    # Eight layers of random weights in bfloat16 are up to 0.14 from float32 before anyone compiles them.
    tolerance = max(TOLERANCE[case.dtype], 1.25 * errors["eager"], 1.25 * errors["inductor"])
    found = {name: ratio(taken, times["attnopt"]) for name, taken in times.items() if name != "attnopt"}
    medians = {name: 1e3 * statistics.median(taken) for name, taken in times.items()}
    said = (
        f"{Row(case.record(), 0, 0, {}, {}, {}).label}: {graphs['attnopt']} graphs, inductor {graphs['inductor']}, "
        f"compiled anew in the steps timed {counters['stats']['unique_graphs']}; {append.counts.appended} appends, "
        f"{append.counts.copied} copies; largest difference from cat {differs:g}"
    )
    ratios, lower = {n: r for n, (r, _) in found.items()}, {n: low for n, (_, low) in found.items()}
    return Row(case.record(), error, tolerance, ratios, lower, medians), said


def aims(rows: list[Row], tokens: int) -> list[Aim]:
    """Against the faster of the uncompiled model and inductor; in float32 the first, and never slower anywhere."""

    def least(*heads: str, dtypes: tuple[str, ...] = ("float32",), over: int = 0) -> float | None:
        kept = [r for r in rows if not r.wrong and r.case["heads"] in heads and r.case["dtype"] in dtypes]
        found = [min(r.ratios["eager"], r.ratios["inductor"]) for r in kept if r.case["tokens"] >= over]
        return min(found, default=None)

    return [
        Aim(f"8/8 heads, {tokens} tokens", 4.0, least("8/8", over=tokens)),
        Aim("at any length and dtype", 1.0, least("8/8", "8/2", dtypes=tuple(TOLERANCE))),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1024 tokens, two layers")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 1024])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--dtype", choices=list(TOLERANCE))
    parser.add_argument("--kv-heads", type=int, choices=[2, HEADS])
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for the times of one model")
    parser.add_argument("--out", type=Path, help="write the run here")
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results and docs/exact.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, notes = [], []
    for case in cases([1024], 2) if args.quick else cases(args.tokens, args.layers):
        if args.dtype in (None, case.dtype) and args.kv_heads in (None, case.kv_heads):
            row, said = measured(case, 3.0 if args.quick else args.seconds)
            rows.append(row)
            notes.append(said)
            print(f"{row}\n  {said}", flush=True)
            gc.collect()
    run = Run("exact_append", rows, environment(), [] if args.quick else aims(rows, max(args.tokens)), notes)
    for aim in run.aims:
        print(aim)
    if args.out is not None:
        run.save(args.out)
    if args.keep:
        from benchmarks.decode_document import keep

        run.save(RESULTS / "exact_append-cpu.json")
        keep(run)


if __name__ == "__main__":
    main()
