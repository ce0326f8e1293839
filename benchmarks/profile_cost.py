"""What profiling costs: time against the model's own passes, and peak memory as the length grows.

    python -m benchmarks.profile_cost                          # time and memory of the shipped model and of one layer
    python -m benchmarks.profile_cost --parts billion --layers 2 --lengths 1024,2048
    python -m benchmarks.profile_cost --keep                   # also into benchmarks/results and docs/profile.md

time: the shipped model, float32, one thread. Every variant runs once in each round, in turn; a ratio is taken within a
round, of processor time, which does not count what else the machine does. The median and the range of the rounds.
layer, model: peak resident memory of a child process over what it held before, of one observed attention (32 heads on
8, 64 wide, float32) forward and backward, and of a whole profile pass of the shipped model.
billion: the same for a Llama of 2048 wide, 8192 in its MLP, 32 heads on 8, 128256 words, float32 random weights, with
`--recompute`; the weights count.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnopt import hf
from attnopt.codegen.emit import write_atomically
from attnopt.instrument import Instrumented, gradients_through
from attnopt.profile_file import Profile
from attnopt.profiler import DEFAULT_GRID, Method, _Recorder, discover, factors_of, moved_outputs, one_sequence
from attnopt.statistics import Observation, Observe
from attnopt.supervision import Sample

TAKES = "15 min"
QUICK = ("--parts", "time", "--times", "512", "--rounds", "2")

ROOT = Path(__file__).parents[1]
KEPT, PAGE = ROOT / "benchmarks/results/profile_cost-cpu.json", ROOT / "docs/profile.md"
BEGIN, END = "<!-- profile_cost: begin -->", "<!-- profile_cost: end -->"
MIB = 2**20


class Pass:
    """Profile passes over one random sequence, nothing kept."""

    def __init__(self, model: Any, length: int, recompute: bool = False) -> None:
        vocabulary = model.config.vocab_size
        self.model, self.sample = model, Sample(torch.arange(length)[None] * 7919 % vocabulary)
        self.instrumented: Instrumented = discover(model, self.sample.ids[:, :64], recompute)
        self.recorder = self.instrumented.observer
        assert isinstance(self.recorder, _Recorder)
        self.recorder.factors = factors_of(self.instrumented)
        dtypes = [site.dtype for site in self.instrumented.sites.values()]
        from attnopt.fingerprint import fingerprint_of

        fingerprint = fingerprint_of(model, list(self.instrumented.sites.values()))
        self.full = Profile.empty(fingerprint, DEFAULT_GRID, [], dtypes)
        self.quick = Profile.empty(fingerprint, DEFAULT_GRID, [], dtypes, True, False)

    def profile(self) -> None:
        one_sequence(self.instrumented, self.recorder, self.full, self.sample, Method())  # type: ignore[arg-type]

    def forward_only(self) -> None:
        moved_outputs(  # type: ignore[arg-type]
            self.instrumented, self.recorder, self.quick, self.sample, Method(forward_only=True)
        )


def times_of(length: int, rounds: int) -> dict[str, Any]:
    """Processor seconds and ratios at one length."""
    model = hf.load("demo").model
    plain, again = Pass(model, length), Pass(model, length, recompute=True)
    ids = plain.sample.ids

    def forward() -> None:
        with torch.no_grad():
            model(ids, use_cache=False)

    def step() -> None:
        model(ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    def through_norms() -> None:
        with gradients_through(model):
            model(ids, labels=ids, use_cache=False).loss.backward()

    variants: dict[str, Callable[[], None]] = {
        "forward": forward, "forward and backward": step, "the same without weights": through_norms,
        "profile": plain.profile, "profile, recompute": again.profile, "forward only": plain.forward_only,
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for n in range(rounds + 1):
        for name, run in variants.items():
            begin = time.process_time()
            run()
            # The first round traces.
            if n:
                seconds[name].append(time.process_time() - begin)
    pairs = {
        "profile / forward and backward": ("profile", "forward and backward"),
        "profile / the same without weights": ("profile", "the same without weights"),
        "recompute / forward and backward": ("profile, recompute", "forward and backward"),
        "forward only / forward": ("forward only", "forward"),
    }
    ratios = {
        name: spread([x / y for x, y in zip(seconds[a], seconds[b], strict=True)]) for name, (a, b) in pairs.items()
    }
    medians = {name: round(statistics.median(values), 4) for name, values in seconds.items()}
    return {"length": length, "seconds": medians, "ratios": ratios}


def spread(values: Sequence[float]) -> list[float]:
    """Median, least and most."""
    return [round(x, 3) for x in (statistics.median(values), min(values), max(values))]


def status(field: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    (line,) = re.findall(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    return int(line) * 1024


def peak_of(run: Callable[[], None]) -> tuple[int, int]:
    """Resident bytes before, and the most while it runs (Linux: the peak is set back first)."""
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    run()
    return before, status("VmHWM")


def one_layer(length: int) -> Callable[[], None]:
    def run() -> None:
        q, k, v = (torch.randn(1, heads, length, 64, requires_grad=True) for heads in (32, 8, 8))
        out: Tensor = Observe.apply(q, k, v, 0.125, None, Observation.zeros(32, DEFAULT_GRID, length), None)
        out.backward(torch.ones_like(out))

    return run


def billion(layers: int) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=131_072, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def child(what: str, length: int, layers: int) -> None:
    """Prints the figures of one process."""
    torch.set_num_threads(1)
    begin = time.process_time()
    parameters = 0
    if what == "layer":
        before, peak = peak_of(one_layer(length))
    else:
        model = hf.load("demo").model if what == "model" else billion(layers)
        parameters = sum(p.numel() for p in model.parameters())
        before, peak = peak_of(Pass(model, length, recompute=what == "billion").profile)
    seconds = round(time.process_time() - begin, 1)
    print(json.dumps({"length": length, "layers": layers, "parameters": parameters, "before_mib": before // MIB,
                      "peak_mib": peak // MIB, "processor_s": seconds}))  # fmt: skip


def memory(what: str, lengths: Sequence[int], layers: int = 0) -> list[dict[str, Any]]:
    rows = []
    for length in lengths:
        command = [sys.executable, "-m", "benchmarks.profile_cost", "--child", what, str(length), str(layers)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}\n{done.stderr[-2000:]}")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(what, rows[-1], flush=True)
    return rows


def fitted(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Least squares of the peak over what was there before, a + b * N: MiB, KiB a token, variance explained."""
    lengths = [row["length"] for row in rows]
    peaks = [row["peak_mib"] - row["before_mib"] for row in rows]
    slope, start = statistics.linear_regression(lengths, peaks)
    rest = sum((p - start - slope * n) ** 2 for n, p in zip(lengths, peaks, strict=True))
    total = sum((p - statistics.fmean(peaks)) ** 2 for p in peaks)
    return {"start_mib": round(start, 1), "kib_per_token": round(1024 * slope, 2), "r2": round(1 - rest / total, 5)}


def table(found: dict[str, Any]) -> str:
    """What docs/profile.md shows."""
    lines = []
    if found.get("time"):
        lines += ["| tokens | profile / forward and backward | without gradients of weights | with `--recompute` "
                  "| forward only / forward |", "|---|---|---|---|---|"]  # fmt: skip
        for row in found["time"]:
            cells = [f"{m:.2f} ({a:.2f} to {b:.2f})" for m, a, b in row["ratios"].values()]
            lines.append(f"| {row['length']} | " + " | ".join(cells) + " |")
        lines.append("")
    if found.get("layer") and found.get("model"):
        lines += ["| tokens | one layer, MiB | the shipped model, MiB |", "|---|---|---|"]
        measured = {r["length"]: r for r in found["model"]}
        for one, whole in ((r, measured[r["length"]]) for r in found["layer"] if r["length"] in measured):
            cells = [str(r["peak_mib"] - r["before_mib"]) for r in (one, whole)]
            lines.append(f"| {one['length']} | " + " | ".join(cells) + " |")
        for name in ("layer", "model"):
            fit = fitted(found[name])
            lines.append(f"| {name}, fitted | {fit['start_mib']} MiB + {fit['kib_per_token']} KiB a token | "
                         f"R² {fit['r2']} |")  # fmt: skip
        lines.append("")
    if found.get("billion"):
        lines += ["| layers | tokens | parameters | peak, GiB | of it weights |", "|---|---|---|---|---|"]
        for row in sorted(found["billion"], key=lambda r: (r["layers"], r["length"])):
            weights = row["parameters"] * 4 / 2**30
            lines.append(f"| {row['layers']} | {row['length']} | {row['parameters'] / 1e9:.2f} billion | "
                         f"{row['peak_mib'] / 1024:.2f} | {weights:.2f} |")  # fmt: skip
    return "\n".join(lines)


def keep(found: dict[str, Any]) -> None:
    """Into the results, beside what other parts left there, and the table into the documentation."""
    from benchmarks.record import environment

    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    together = {}
    for part in MEMORY:
        rows = {(r["layers"], r["length"]): r for r in [*kept.get(part, []), *found.get(part, [])]}
        together[part] = [rows[key] for key in sorted(rows)]
    kept = {**kept, **found, **together, "environment": environment()}
    write_atomically(KEPT, json.dumps(kept, indent=1) + "\n")
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    write_atomically(PAGE, f"{before}{BEGIN}\n\n{table(kept)}\n{END}{rest.partition(END)[2]}")


def whole_numbers(given: str) -> list[int]:
    return sorted(int(n) for n in given.split(","))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", default=["time", "layer", "model"], metavar="PART",
                        help="of time, layer, model, billion; none writes the table of what was kept")  # fmt: skip
    parser.add_argument("--lengths", type=whole_numbers, default=[1024, 2048, 4096, 8192, 16384], help="of memory")
    parser.add_argument("--times", type=whole_numbers, default=[1024, 2048, 4096], help="lengths that are timed")
    parser.add_argument("--layers", type=int, default=16, help="of the billion-parameter configuration")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child[0], int(args.child[1]), int(args.child[2]))
        return
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(unknown)}")
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for part in args.parts:
        if part == "time":
            found[part] = []
            for length in args.times:
                found[part].append(times_of(length, args.rounds))
                torch._dynamo.reset()
                print(found[part][-1], flush=True)
        else:
            found[part] = memory(part, args.lengths, args.layers if part == "billion" else 0)
        if args.keep:
            keep(found)
    if args.keep:
        keep(found)
    print(table(found))


MEMORY = ("layer", "model", "billion")
PARTS = ("time", *MEMORY)

if __name__ == "__main__":
    main()
