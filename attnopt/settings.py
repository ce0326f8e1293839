"""Environment switches, read at each use so that a test or a shell can change them."""

from __future__ import annotations

import os
from pathlib import Path

from attnopt.errors import OptionError

# name -> (default, meaning); `attnopt env` and docs/env.md print this table.
VARIABLES = {
    "ATTNOPT_STRICT": (
        "0",
        "1 raises where something of attnopt's own fails and it would otherwise leave a graph or a site alone",
    ),
    "ATTNOPT_VERIFY": ("0", "1 compares every recognised site with its original on random inputs while compiling"),
    "ATTNOPT_ALWAYS": ("0", "1 makes every rewrite that is right, also where it was measured not to pay"),
    "ATTNOPT_TARGET": ("auto", "kernel target: auto, cpu, triton or reference"),
    "ATTNOPT_NATIVE": ("1", "0 compiles no C++ for CPU attention, which then runs out of torch's own operators"),
    "ATTNOPT_DEBUG": ("0", "1 to 5: how much is told of each graph on standard error (see debugging.md)"),
    "ATTNOPT_DUMP": ("none", "folder in which each compiled graph leaves its texts, its report and its kernels"),
    "ATTNOPT_FUEL": ("none", "number of replacements this process may make; every site after them is left alone"),
    "ATTNOPT_DISABLE": ("none", "passes, patterns, candidates or targets to do without, by name, or all"),
    "ATTNOPT_CACHE": ("~/.cache/attnopt", "folder of emitted kernels and cost tables"),
}


def _value(name: str) -> str:
    """What is set, or the default; "" where that is none at all."""
    value = os.environ.get(name, VARIABLES[name][0])
    return "" if value == "none" else value


def strict() -> bool:
    return _value("ATTNOPT_STRICT") == "1"


def verify() -> bool:
    return _value("ATTNOPT_VERIFY") == "1"


def always() -> bool:
    return _value("ATTNOPT_ALWAYS") == "1"


def native() -> bool:
    return _value("ATTNOPT_NATIVE") == "1"


def debug() -> int:
    """How much is told of each graph, 0 to 5."""
    value = _value("ATTNOPT_DEBUG")
    if value not in ("", "0", "1", "2", "3", "4", "5"):
        raise OptionError(f"ATTNOPT_DEBUG={value!r} is no level.", "Use 0 (nothing) to 5 (everything).")
    return int(value or 0)


def dump() -> Path | None:
    """Folder that compiled graphs leave their texts in, if they are to; not created here."""
    value = _value("ATTNOPT_DUMP")
    return Path(value).expanduser() if value else None


def keeps_texts() -> bool:
    """Whether the text of each graph is kept after every pass that changes it."""
    return dump() is not None or debug() >= 3


def fuel() -> int | None:
    """How many replacements this process may make; None for any number."""
    value = _value("ATTNOPT_FUEL")
    if not value:
        return None
    if not (value.isascii() and value.isdigit()):
        raise OptionError(f"ATTNOPT_FUEL={value!r} is no number of replacements.", "Use a whole number, 0 for none.")
    return int(value)


def disabled() -> frozenset[str]:
    """Names of passes, patterns, candidates and targets to do without; {"all"} for everything."""
    return frozenset(filter(None, (name.strip() for name in _value("ATTNOPT_DISABLE").split(","))))


def cache_dir() -> Path:
    """Folder of emitted kernels and cost tables; not created here."""
    return Path(_value("ATTNOPT_CACHE")).expanduser()


def target(device_type: str) -> str:
    """The kernel target for tensors on `device_type`."""
    value = _value("ATTNOPT_TARGET")
    if value not in ("auto", "cpu", "triton", "reference"):
        raise OptionError(f"ATTNOPT_TARGET={value!r} is no target.", "Use auto, cpu, triton or reference.")
    chosen = {"cpu": "cpu", "cuda": "triton"}.get(device_type, "reference") if value == "auto" else value
    return "reference" if chosen in disabled() else chosen
