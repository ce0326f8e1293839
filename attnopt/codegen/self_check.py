"""What an emitted file does when it is run, ``python FILE``: agree with the reference, then be timed.

A family says what to compare and what to time (self_check_prefill.py); this prints it and sets the exit code: 0 where
everything agreed, 1 where something did not, 2 where the file cannot run here. A file that disagrees is not timed.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass
from typing import NoReturn, TypeAlias

import torch
from torch import Tensor

from attnopt.codegen.spec import KernelSpec

Results: TypeAlias = Tensor | tuple[Tensor, ...]

# Relative Frobenius norms against float64: some twenty times what rounding the inputs of a product costs.
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
# A timing ends after so many rounds or seconds, but never before three rounds.
ROUNDS, SECONDS = 50, 2.0
# Characters in one line of an emitted file, and of a text that is cut into lines there.
LINE, PIECE = 120, 96


@dataclass(frozen=True)
class Check:
    """found: what the file computes; expected: the same in float64; tolerance: of `error` between the two.

    wrong: what a kernel would compute that is off by as little as the check must notice, such as one key more.
    """

    name: str
    found: Callable[[], Results]
    expected: Callable[[], Results]
    tolerance: float
    wrong: Callable[[], Results] | None = None


@dataclass(frozen=True)
class Race:
    """Calls that are timed side by side, by name: first the file's own, then what it is compared with."""

    name: str
    calls: dict[str, Callable[[], object]]


def footer(spec: KernelSpec, home: str, functions: str) -> str:
    """The last lines of an emitted file: ``check(spec, *functions)`` of the module attnopt.codegen.`home`."""
    values = astuple(spec)
    # A text that is longer than a name, such as a form, has lines of its own.
    long = next((x for x in values if isinstance(x, str) and '"' in x), None)
    fields = ", ".join("FORM" if x is long and long else f'"{x}"' if isinstance(x, str) else repr(x) for x in values)
    return f"""{"" if long is None else _text(long)}

if __name__ == "__main__":
    from attnopt.codegen.{home} import check
    from attnopt.codegen.spec import {type(spec).__name__}

    check({type(spec).__name__}({fields}), {functions})
"""


def _text(value: str) -> str:
    """``FORM = ...``, in pieces of a line each."""
    size = len(value) if len(f"FORM = '{value}'") <= LINE else PIECE
    pieces = [value[n : n + size] for n in range(0, len(value), size)]
    quoted = [f"'{piece}'" if '"' in piece else f'"{piece}"' for piece in pieces]
    held = quoted[0] if len(quoted) == 1 else "(\n" + "".join(f"    {piece}\n" for piece in quoted) + ")"
    return f"\n\n# What is kept and added, as attnopt/masks/kernel_form.py writes it.\nFORM = {held}\n"


def device_of(target: str) -> torch.device:
    """Where a file of `target` is run. Exits with code 2, saying what it needs, where that is not to be had."""
    if target != "triton" or interpreted(target):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        print(
            "This file holds a Triton kernel, which needs a GPU; torch sees none here.\n"
            f"TRITON_INTERPRET=1 python {sys.argv[0]} runs its check on the CPU, in Triton's interpreter.",
            file=sys.stderr,
        )
        raise SystemExit(2)
    return torch.device("cuda")


def interpreted(target: str) -> bool:
    return target == "triton" and os.environ.get("TRITON_INTERPRET") == "1"


def error(found: Results, expected: Results) -> float:
    """The largest relative Frobenius norm of the differences. Infinite for a NaN or an infinity out of place."""
    if isinstance(found, tuple) or isinstance(expected, tuple):
        return max(error(*pair) for pair in zip(found, expected, strict=True))
    if found.shape != expected.shape:
        return float("inf")
    found, expected = found.to(expected.device, torch.float64), expected.double()
    same = found == expected
    difference = (found - expected).masked_fill(same, 0.0).norm().nan_to_num(nan=float("inf"), posinf=float("inf"))
    return float(difference / expected.masked_fill(expected.isinf(), 0.0).norm().clamp(min=1e-30))


def run(spec: KernelSpec, device: torch.device, checks: Iterable[Check], races: Iterable[Race]) -> NoReturn:
    """Compare, time and exit."""
    print(f"{str(spec)[0].upper()}{str(spec)[1:]}\non {_machine(device, interpreted(spec.target))}\n")
    failed = [check.name for check in checks if not _agrees(check)]
    if failed:
        print(f"\n{sys.argv[0]} disagrees with the reference: {'; '.join(failed)}.", file=sys.stderr)
        raise SystemExit(1)
    if interpreted(spec.target):
        print("\nNot timed: the interpreter's times say nothing of a GPU's.")
    else:
        for race in races:
            _time(race, device)
    raise SystemExit(0)


def _machine(device: torch.device, in_interpreter: bool) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    how = "Triton's interpreter on " if in_interpreter else ""
    unit = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return f"{how}{unit}, threads: {torch.get_num_threads()}, torch {torch.__version__}"


def _agrees(check: Check) -> bool:
    """Print one line of the check and say whether it holds: close to what is expected and far from what is wrong."""
    expected = check.expected()
    found = error(check.found(), expected)
    close = found <= check.tolerance
    text = f"error {found:.1e}, allowed {check.tolerance:.0e}"
    if check.wrong is not None:
        least = error(check.wrong(), expected)
        close = close and least > check.tolerance
        text += f", noticed from {least:.1e}"
    print(f"  {'agrees' if close else 'WRONG':8}{check.name:40}{text}", flush=True)
    return close


def _time(race: Race, device: torch.device) -> None:
    """Medians of wall times, the calls in turns."""

    def once(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    for call in race.calls.values():
        once(call)
    times: dict[str, list[float]] = {name: [] for name in race.calls}
    end = time.perf_counter() + SECONDS
    for rounds in range(ROUNDS):
        if rounds >= 3 and time.perf_counter() > end:
            break
        for name, call in race.calls.items():
            times[name].append(once(call))
    medians = {name: statistics.median(values) for name, values in times.items()}
    own = next(iter(medians.values()))
    texts = [f"{name} {1e3 * seconds:.3g} ms ({seconds / own:.2f}×)" for name, seconds in medians.items()]
    print(f"  {'timed':8}{race.name:40}{', '.join(texts)}", flush=True)
