"""Environment switches, read at each use so that a test or a shell can change them."""

from __future__ import annotations

import os
from pathlib import Path

from attnopt.errors import OptionError

# name -> (default, meaning); `attnopt env` and docs/env.md print this table.
VARIABLES = {
    "ATTNOPT_STRICT": ("0", "1 raises where attnopt would otherwise leave a graph or a site alone"),
    "ATTNOPT_VERIFY": ("0", "1 compares every recognised site with its original on random inputs while compiling"),
    "ATTNOPT_ALWAYS": ("0", "1 makes every rewrite that is right, also where it was measured not to pay"),
    "ATTNOPT_TARGET": ("auto", "kernel target: auto, cpu, triton or reference"),
    "ATTNOPT_NATIVE": ("1", "0 compiles no C++ for CPU attention, which then runs out of torch's own operators"),
    "ATTNOPT_DEBUG": ("0", "1 prints every report line to standard error, 2 also the graphs before and after"),
    "ATTNOPT_CACHE": ("~/.cache/attnopt", "folder of emitted kernels and cost tables"),
}


def _value(name: str) -> str:
    return os.environ.get(name, VARIABLES[name][0])


def strict() -> bool:
    return _value("ATTNOPT_STRICT") == "1"


def verify() -> bool:
    return _value("ATTNOPT_VERIFY") == "1"


def always() -> bool:
    return _value("ATTNOPT_ALWAYS") == "1"


def native() -> bool:
    return _value("ATTNOPT_NATIVE") == "1"


def debug() -> int:
    value = _value("ATTNOPT_DEBUG")
    return int(value) if value.isdigit() else 0


def cache_dir() -> Path:
    """Folder of emitted kernels and cost tables; not created here."""
    return Path(_value("ATTNOPT_CACHE")).expanduser()


def target(device_type: str) -> str:
    """The kernel target for tensors on `device_type`."""
    value = _value("ATTNOPT_TARGET")
    if value not in ("auto", "cpu", "triton", "reference"):
        raise OptionError(f"ATTNOPT_TARGET={value!r} is no target.", "Use auto, cpu, triton or reference.")
    if value != "auto":
        return value
    return {"cpu": "cpu", "cuda": "triton"}.get(device_type, "reference")
