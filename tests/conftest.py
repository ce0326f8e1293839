"""What every test stands on: a fixed seed, few threads, no network, a cache folder of its own, a fresh Dynamo."""

from __future__ import annotations

import gc
import logging
import os
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before any library reads them.
for name in [name for name in os.environ if name.startswith("ATTNOPT_")]:
    del os.environ[name]
os.environ["HF_HUB_OFFLINE"] = "1"
# Test processes side by side: a thread that waits must not hold the core of another.
PARALLEL = "PYTEST_XDIST_WORKER" in os.environ
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Inductor starts processes to compile Triton in as soon as it is imported, here and in every child: on a CPU they
# import torch, and wait.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
# Rewrites are tested at sizes at which most of them do not pay.
os.environ["ATTNOPT_ALWAYS"] = "1"

import hypothesis
import numpy as np
import pytest
import torch

# pytest listens to loggers that do not propagate; for a listener of this one torch writes down all that it compiles.
logging.getLogger("torch.__trace").propagate = True
torch.set_num_threads(1 if PARALLEL else min(2, os.cpu_count() or 1))
hypothesis.settings.register_profile("attnopt", deadline=None, derandomize=True)
hypothesis.settings.load_profile("attnopt")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow files first, then those with many tests: of files dealt out to processes, the last is waited for."""
    slow, tests = {item.path for item in items if item.get_closest_marker("slow")}, Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path not in slow, -tests[item.path]))


def pytest_collection_finish() -> None:
    """What imports left stays: reading it through again and again took a tenth of the time of tests that trace."""
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)


def pytest_unconfigure() -> None:
    """What stays frozen to the end is not torn down, and Triton says so at length."""
    gc.unfreeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What is proved elsewhere on a smaller scale, or is a program of `benchmarks/`, waits for FULL_MATRIX=1."""
    if item.get_closest_marker("full") and os.environ.get("FULL_MATRIX") != "1":
        pytest.skip("runs with FULL_MATRIX=1 in the environment")


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ATTNOPT_CACHE of the whole run, so that no kernel or cost table of the user's is read or written."""
    folder = tmp_path_factory.mktemp("attnopt-cache")
    os.environ["ATTNOPT_CACHE"] = str(folder)
    return folder


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Forget compiled code after each test, or the recompile limit of one test would be spent by another."""
    yield
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()


@pytest.fixture
def eagerly(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Inductor replaced by the rewritten graph itself; what it would have been given is recorded."""
    import torch._inductor.compile_fx

    seen: list[Any] = []

    def compile_fx(gm: Any, inputs: Any, *, config_patches: Any = None, **_: Any) -> Any:
        seen.append((gm, config_patches))
        return gm.forward

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", compile_fx)
    return seen
