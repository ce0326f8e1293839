"""Kernels on a GPU: correctness, the card's ceilings; prefill by spans and by lists of blocks, decoding, a step of the
ragged cache, one of selected tokens, generation and linear heads against what others have.

    python -m benchmarks.gpu                   # less than ten minutes on an H200; what there was no time for is said
    python -m benchmarks.gpu --out gpu.json    # the rows with hardware and versions, and gpu.svg beside it
    python -m benchmarks.gpu --keep            # also benchmarks/results and docs/figures
    python -m benchmarks.gpu --dry-run         # the same steps in small on the CPU: whether the script still runs

A kernel with one wrong result is not timed. Calls of a case run in turn, from a cold L2, timed by CUDA events, all of
them CUDA graphs in decoding; a figure is the median of paired ratios with its lower 95 % bound. Every result is checked
once more at the size that is timed. An aim is printed with what was found: met, missed, or unmeasured.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from benchmarks.block_mask import many_shapes
from benchmarks.cuda import blocks, cache, checks, decode, generation, linear, prefill, tokens
from benchmarks.cuda.device import Budget, Device
from benchmarks.record import RESULTS, Aim, Row, Run, environment
from benchmarks.spans import DRY, Sizes

TAKES = "10 min"
NEEDS = "a GPU"
QUICK = ("--dry-run",)
# Wall seconds of each section; with the ceilings' ten and what importing takes less than ten minutes.
SECONDS = {
    "checks": 120.0,
    "prefill": 150.0,
    "blocks": 50.0,
    "decode": 70.0,
    "linear": 50.0,
    "cache": 50.0,
    "tokens": 30.0,
    "generation": 50.0,
}
FIGURES = Path(__file__).parents[1] / "docs/figures"


def measured(
    device: Device, sizes: Sizes, share: float = 1.0
) -> tuple[list[Row], list[Aim], list[str], dict[str, float]]:
    """Rows, aims, notes and ceilings. share: of the time that each section has."""
    notes: list[str] = []

    def budget(section: str) -> Budget:
        return Budget(section, share * SECONDS[section], notes)

    print("correctness, against float64", flush=True)
    checked = checks.section(device, sizes, budget("checks"))
    wrong = {r.case["check"] for r in checked if r.wrong}
    notes += [f"{kernel}: a check failed, so it was not timed" for kernel in sorted(wrong)]
    ceilings = device.ceilings()
    print(
        f"ceilings: matmul {ceilings['matmul'] / 1e12:.0f} TFLOP/s, copy {ceilings['copy'] / 1e12:.2f} TB/s", flush=True
    )
    timed: dict[str, list[Row]] = {"prefill": [], "blocks": [], "decode": [], "linear": [], "cache": [], "tokens": []}
    with many_shapes():
        for name, of, ceiling in (
            ("prefill", prefill, "matmul"),
            ("blocks", blocks, "matmul"),
            ("decode", decode, "copy"),
            ("linear", linear, "copy"),
            ("cache", cache, "copy"),
            ("tokens", tokens, "copy"),
        ):
            if name not in wrong:
                print(name, flush=True)
                timed[name] = of.section(device, sizes, ceilings[ceiling], budget(name))
    print("generation", flush=True)
    generated = generation.section(device, sizes, budget("generation")) if "cache" not in wrong else []
    rows = timed["prefill"]
    least = 16384 if 16384 in sizes.lengths else min(sizes.lengths)
    aims = [aim for dim in sizes.dims for aim in prefill.aims(rows, dim, least)] + decode.aims(timed["decode"])
    aims += blocks.aims(timed["blocks"], least) + linear.aims(timed["linear"]) + cache.aims(timed["cache"])
    aims += tokens.aims(timed["tokens"])
    found = [*checked, *(row for rows in timed.values() for row in rows), *generated]
    return found, aims + generation.aims(generated), notes, ceilings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU; its times mean nothing")
    parser.add_argument("--out", type=Path, help="write the rows there as JSON, and a figure beside it")
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results and docs/figures")
    args = parser.parse_args()
    if args.dry_run and args.keep:
        parser.error("a dry run measures nothing to keep")
    if not args.dry_run and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here; --dry-run goes through the same steps in small on the CPU")
    if args.dry_run:
        print("dry run: tiny, on the CPU; only what is right or wrong below means anything, no time does")
    begin = time.perf_counter()
    device = Device(args.dry_run)
    rows, aims, notes, ceilings = measured(device, DRY if args.dry_run else Sizes())
    machine = {**environment(), "matmul_flops": ceilings["matmul"], "copy_bytes_per_s": ceilings["copy"]}
    machine["seconds"] = round(time.perf_counter() - begin)
    run = Run("gpu-dry-run" if args.dry_run else "gpu", rows, machine, [] if args.dry_run else aims, notes)
    print("\n".join(["", *map(str, run.aims), *(f"note: {n}" for n in notes)]))
    name = device_slug(machine["device"])
    for path, figure in [
        *([(args.out, args.out.with_suffix(".svg"))] if args.out else []),
        *([(RESULTS / f"gpu-{name}.json", FIGURES / f"gpu-{name}.svg")] if args.keep else []),
    ]:
        run.save(path)
        timed = Run(run.name, [r for r in rows if not r.wrong and r.ratios], machine)
        timed.figure(figure, [prefill.BEST, prefill.FLEX])
        print(f"wrote {path.name} and {figure.name}")
    if any(row.wrong for row in rows) or any(note.startswith("FAILED") for note in notes):
        raise SystemExit(1)


def device_slug(device: str) -> str:
    """A file name of a device's: "NVIDIA H200" -> "h200"."""
    return "-".join(device.lower().replace("nvidia", "").split())


if __name__ == "__main__":
    main()
