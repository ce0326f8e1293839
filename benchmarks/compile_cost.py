"""What compiling costs: a cold start against inductor's, a second process, other lengths, another plan.

    python -m benchmarks.compile_cost                       # twelve layers, three rounds, ten minutes on a core
    python -m benchmarks.compile_cost --layers 2 --rounds 1 --out compile.json
    python -m benchmarks.compile_cost --keep                # also benchmarks/results and docs/figures

A Llama of the given number of layers with hidden size 256. Every start is a process of its own, inductor's and
attnopt's in turn; a cold one has empty cache folders, a warm one those of the cold one before it. What counts is from
`torch.compile` to the end of the first call, as processor time of the process and of the compilers it waits for: wall
time moves with what else the machine does, and is kept beside it. Logits are compared with eager ones first.
Graphs are counted over three lengths, and over a plan that takes the place of another.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
from benchmarks.capture_cost import model_of, processor_seconds
from benchmarks.record import RESULTS, Aim, Row, Run, environment, relative_error

TAKES = "10 min"
QUICK = ("--layers", "2", "--rounds", "1")
ROOT = Path(__file__).parents[1]
NAME = "compile_cost-cpu"
# Relative Frobenius error of the logits against eager, float32.
TOLERANCE = 1e-4
LENGTHS = (64, 96, 160)
# exact: attnopt without a plan; planned: with one, half of whose heads keep spans.
SIDES = ("inductor", "exact", "planned")
SINK, WINDOW, OTHER = 4, 24, 12
Found = dict[str, Any]


def plan_of(layers: int, heads: int, window: int) -> Any:
    """A plan for the model: every second head keeps a span. Made up, not measured."""
    from attnopt.fingerprint import Fingerprint
    from attnopt.ir import DENSE, Choice
    from attnopt.plan import Budget, Lengths, Plan, Predicted

    span = Choice.of("sink_window", {"sink": SINK, "alpha": window, "beta": 0.0})
    choices = {f"model.layers.{n}.self_attn": (DENSE, span) * (heads // 2) for n in range(layers)}
    nothing = Predicted(0.0, "density", "million kept pairs", 1.0, 1.0, 1.0, 1.0)
    return Plan("llama", Fingerprint("0" * 16, ()), Budget("kl", 1.0), Lengths((64,), 64), choices, nothing)


def expected(model: Any, ids: torch.Tensor, window: int | None) -> torch.Tensor:
    """Eager logits; with a window every second head sees its span only, by a mask."""
    if window is None:
        return model(ids, use_cache=False).logits
    from attnopt.codegen.reference_prefill import span_mask

    heads = model.config.num_attention_heads
    sinks = torch.tensor([0, SINK] * (heads // 2))
    keep = span_mask(ids.shape[1], sinks, torch.tensor([2**30, window] * (heads // 2)))
    # Added to the scores, a head its own: as models take masks of four dimensions.
    return model(ids, use_cache=False, attention_mask=torch.where(keep, 0.0, -1e30)[None]).logits


@torch.no_grad()
def start(side: str, layers: int) -> Found:
    """One start, in this process: seconds and logits of the first call, then graphs over lengths and plans."""
    torch.set_num_threads(1)
    model = model_of(layers)
    ids = [torch.randint(0, 512, (1, n), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
    window = WINDOW if side == "planned" else None
    wanted = [expected(model, x, window) for x in ids]
    options = {}
    if side == "planned":
        import attnopt

        options = {"plan": attnopt.LivePlan(plan_of(layers, model.config.num_attention_heads, WINDOW))}
    before, begin = processor_seconds(), time.perf_counter()
    call = torch.compile(model, backend="inductor" if side == "inductor" else "attnopt", options=options or None)
    logits = call(ids[0], use_cache=False).logits
    found: Found = {"side": side, "cpu": processor_seconds() - before, "wall": time.perf_counter() - begin}
    from torch._dynamo.utils import counters

    found["cache"] = {k: v for part in ("inductor", "aot_autograd") for k, v in counters[part].items() if "cache" in k}
    errors = [relative_error(logits, wanted[0])]
    graphs = [counters["stats"]["unique_graphs"]]
    for x, want in zip(ids[1:], wanted[1:], strict=True):
        errors.append(relative_error(call(x, use_cache=False).logits, want))
        graphs.append(counters["stats"]["unique_graphs"])
    if side == "planned":
        options["plan"].change(plan_of(layers, model.config.num_attention_heads, OTHER))
        errors += [relative_error(call(x, use_cache=False).logits, expected(model, x, OTHER)) for x in ids]
        graphs.append(counters["stats"]["unique_graphs"])
    found |= {"error": max(errors), "graphs": graphs}
    if side != "inductor":
        from attnopt import backend

        report = backend.reports()[0]
        found["steps_ms"] = {step.name: step.milliseconds for step in report.history}
        assert len(report.rewrites) == layers, report.lines()
    return found


def child(side: str, layers: int, folder: Path) -> Found:
    """`start` in a new process, whose caches are in `folder`."""
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "ATTNOPT_CACHE": str(folder / "attnopt")}
    # Compiled in the process itself, which then counts the compilers' time as its children's.
    own = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    # Every rewrite that is right: that it does not pay at such sizes is another matter.
    given = {**os.environ, **caches, **own, "ATTNOPT_ALWAYS": "1"}
    command = [sys.executable, "-m", "benchmarks.compile_cost", "--child", side, "--layers", str(layers)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=given, check=False)
    if done.returncode:
        raise SystemExit(f"{side}: the process ended with {done.returncode}\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def rounds(layers: int, count: int, sides: tuple[str, ...] = SIDES) -> dict[tuple[str, str], list[Found]]:
    """(side, "cold" or "warm") -> what each round found."""
    found: dict[tuple[str, str], list[Found]] = defaultdict(list)
    for turn in range(count):
        for side in sides if turn % 2 == 0 else sides[::-1]:
            with tempfile.TemporaryDirectory() as name:
                for kind in ("cold", "warm"):
                    found[side, kind].append(child(side, layers, Path(name)))
                    last = found[side, kind][-1]
                    print(f"{side} {kind}: {last['cpu']:.1f} s of a processor, {last['wall']:.1f} s; {last['cache']}",
                          flush=True)  # fmt: skip
    return found


def own_steps(found: list[Found]) -> dict[str, float]:
    """Median milliseconds of capture and of all passes together."""
    capture = statistics.median(f["steps_ms"]["capture"] for f in found)
    passes = statistics.median(sum(ms for name, ms in f["steps_ms"].items() if name != "capture") for f in found)
    return {"capture": capture, "passes": passes}


def summarised(layers: int, found: dict[tuple[str, str], list[Found]]) -> tuple[list[Row], list[Aim]]:
    """A row for every side and kind of start, and what was aimed at."""
    rows, aims = [], []

    def seconds(side: str, kind: str, clock: str = "cpu") -> list[float]:
        return [f[clock] for f in found[side, kind]]

    for side in ("exact", "planned"):
        for kind in ("cold", "warm"):
            own = found[side, kind]
            ratios, lower = {}, {}
            against = {"inductor": seconds("inductor", kind)}
            if kind == "warm":
                against["its own cold start"] = seconds(side, "cold")
            for name, other in against.items():
                ratios[name], lower[name] = timing.ratio(other, seconds(side, kind))
            times = {name: 1e3 * statistics.median(values) for name, values in against.items()}
            times |= {f"{side} {kind}": 1e3 * statistics.median(seconds(side, kind)), **own_steps(own)}
            times["wall"] = 1e3 * statistics.median(seconds(side, kind, "wall"))
            case = {"layers": layers, "side": side, "start": kind}
            rows.append(Row(case, max(f["error"] for f in own), TOLERANCE, ratios, lower, times))
        right = not any(f["error"] > TOLERANCE for kind in ("cold", "warm") for f in found[side, kind])
        cold = statistics.median(seconds(side, "cold"))
        lengths = len(LENGTHS)
        graphs = max(f["graphs"][lengths - 1] for f in found[side, "cold"])
        aims += [
            Aim(f"{side}: cold start over inductor's", 1.25, 1 / rows[-2].ratios["inductor"] if right else None, True),
            Aim(f"{side}: a second process over the cold start", 0.5,
                statistics.median(seconds(side, "warm")) / cold if right else None, True),
            Aim(f"{side}: recompiles over {lengths} lengths", 1, graphs - 1 if right else None, True),
        ]  # fmt: skip
        if side == "planned":
            more = max(f["graphs"][lengths] - f["graphs"][lengths - 1] for f in found[side, "cold"])
            aims.append(Aim("planned: recompiles for another plan of equal shape", 0, more if right else None, True))
    return rows, aims


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the rows there as JSON")
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results and docs/figures")
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(start(args.child, args.layers)))
        return
    rows, aims = summarised(args.layers, rounds(args.layers, args.rounds))
    run = Run("compile_cost", rows, {**environment(), "threads": 1}, aims)
    print("\n".join([*map(str, rows), *map(str, aims)]))
    if args.out:
        run.save(args.out)
    if args.keep:
        run.save(RESULTS / f"{NAME}.json")
        run.figure(ROOT / f"docs/figures/{NAME}.svg")
    if any(row.wrong for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
