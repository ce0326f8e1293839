"""The device that is measured: its clock, its ceilings, memory that starts out as NaN, and the time that is left.

A dry run has the CPU here instead, so that everything else runs line by line where there is no GPU.
"""

from __future__ import annotations

import contextlib
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.registry import TARGETS

# Larger than any L2 cache (50 MB on an H100 or H200).
FLUSH_BYTES = 256 * 2**20
# Clock cycles that the GPU idles before a call, so that the host has queued all of it by then: a millisecond.
HEAD_START = 2_000_000
MOST, LEAST = 20, 3
# Sizes of the ceilings: a product of square matrices, and bytes that are copied.
PRODUCT, COPY_BYTES = 8192, 2**31


@dataclass
class Device:
    """cuda, or in a dry run the CPU. target: of the kernels that are emitted for it."""

    dry: bool

    def __post_init__(self) -> None:
        self.where = torch.device("cpu" if self.dry else "cuda")
        self.target = "cpu" if self.dry else "triton"
        self._flush = None if self.dry else torch.empty(FLUSH_BYTES, dtype=torch.int8, device=self.where)

    def target_of(self, kernel: str) -> str:
        """The target, or in a dry run the reference where a family has no kernel for the CPU."""
        return "reference" if self.dry and f"{self.target} {kernel}" not in TARGETS else self.target

    def wait(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def times(self, calls: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
        """Seconds of every call, in turn, for as many rounds as `seconds` allow; each call from a cold L2."""
        # The first call compiles, the second tells how long one takes.
        for call in calls.values():
            call()
        self.wait()
        begin = time.perf_counter()
        for call in calls.values():
            self._once(call)
        rounds = LEAST if self.dry else max(LEAST, min(MOST, int(seconds / max(1e-6, time.perf_counter() - begin))))
        times: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(rounds):
            for name in list(calls)[:: 1 if turn % 2 == 0 else -1]:
                times[name].append(self._once(calls[name]))
        return times

    def _once(self, call: Callable[[], object]) -> float:
        if self._flush is None:
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        torch.cuda._sleep(HEAD_START)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def graphed(self, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """The same as one launch of a CUDA graph: what is left of a short call is then the GPU's time, not Python's.

        RuntimeError where it cannot be captured. The graph keeps its result alive, in its own memory.
        """
        if self.dry:
            return call
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = call()

        def replay() -> Tensor:
            graph.replay()
            return kept

        return replay

    def ceilings(self) -> dict[str, float]:
        """FLOP/s of a bfloat16 product of random matrices, bytes/s read and written by a copy, medians."""
        size, count = (64, 2**12) if self.dry else (PRODUCT, COPY_BYTES)
        a, b = (torch.randn(size, size, device=self.where, dtype=torch.bfloat16) for _ in range(2))
        source = torch.zeros(count, dtype=torch.int8, device=self.where)
        target = torch.empty_like(source)
        times = self.times({"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}, 2.0)
        medians = {name: statistics.median(values) for name, values in times.items()}
        return {"matmul": 2 * size**3 / medians["matmul"], "copy": 2 * count / medians["copy"]}


@dataclass
class Budget:
    """Wall seconds of a section. What it leaves out for lack of them is said in `notes`."""

    section: str
    seconds: float
    notes: list[str]

    def __post_init__(self) -> None:
        self._begin = time.perf_counter()

    @property
    def left(self) -> float:
        return self.seconds - (time.perf_counter() - self._begin)

    def attempt(self, what: str, step: Callable[[], None]) -> None:
        """Do it if there is time. What fails is a note, FAILED, so that one case does not cost the others."""
        if not self.allows(what):
            return
        try:
            step()
        except Exception as error:
            said = (str(error).strip().splitlines() or [""])[0][:200]
            self.notes.append(f"FAILED: {self.section}, {what}: {type(error).__name__}: {said}")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def allows(self, what: str) -> bool:
        if self.left > 0:
            return True
        self.notes.append(f"{self.section}: {what} left out, its {self.seconds:g} seconds were over")
        return False


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """What torch allocates starts as NaN, so that a result that was not written cannot pass for one."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.utils.deterministic.fill_uninitialized_memory = filled
