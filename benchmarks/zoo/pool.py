"""Workers in processes of their own: a cell that hangs or crashes costs its worker, never the run."""

from __future__ import annotations

import contextlib
import json
import queue
import select
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]
# A worker is replaced after so many cells: compiled graphs and modules of hundreds of models pile up in it.
CELLS_A_WORKER = 60
ROOT = Path(__file__).resolve().parents[2]


class Worker:
    """One process of benchmarks.zoo.worker, started when first asked; `patience` is its wall time by its CPU time."""

    patience = 10

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.served = 0

    def run(self, asked: Record) -> Record:
        """The record of one cell; a worker that dies or stays silent too long is ended and named."""
        if self.process is None or self.served >= CELLS_A_WORKER:
            self.close()
            command = [sys.executable, "-m", "benchmarks.zoo.worker"]
            self.process = subprocess.Popen(
                command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            self.served = 0
        self.served += 1
        process = self.process
        assert process.stdin is not None and process.stdout is not None
        base = {"class": asked["class"], "cell": asked["cell"]}
        limit = self.patience * asked["timeout"]
        try:
            process.stdin.write(json.dumps(asked) + "\n")
            process.stdin.flush()
            ready, _, _ = select.select([process.stdout], [], [], limit)
            line = process.stdout.readline() if ready else ""
        except OSError:
            line, ready = "", [process.stdout]
        if line:
            return json.loads(line)
        self.close(kill=True)
        if not ready:
            return {**base, "status": "timed out", "seconds": limit}
        return {**base, "status": "broken", "reason": f"the worker died with {process.returncode}", "seconds": 0.0}

    def close(self, kill: bool = False) -> None:
        if self.process is None:
            return
        if kill:
            self.process.kill()
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.process.wait()
        self.process = None


def run_all(asked: list[Record], jobs: int) -> Iterator[Record]:
    """The records of the asked cells as they finish, over `jobs` workers."""
    todo: queue.SimpleQueue[Record | None] = queue.SimpleQueue()
    done: queue.SimpleQueue[Record | None] = queue.SimpleQueue()
    for request in asked:
        todo.put(request)
    for _ in range(jobs):
        todo.put(None)

    def serve() -> None:
        worker = Worker()
        try:
            while (request := todo.get()) is not None:
                done.put(worker.run(request))
        finally:
            worker.close()
            done.put(None)

    threads = [threading.Thread(target=serve, daemon=True) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    running = jobs
    while running:
        record = done.get()
        if record is None:
            running -= 1
        else:
            yield record
