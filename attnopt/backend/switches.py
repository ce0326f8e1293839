"""What the environment asks for is checked before a graph is compiled: a switch that is misspelt would do nothing."""

from __future__ import annotations

import difflib

from attnopt import settings
from attnopt.errors import OptionError
from attnopt.passes import PIPELINE
from attnopt.registry import CANDIDATES, PATTERNS, TARGETS

# What comes after rests on it: regions that share a node cannot all be cut out.
NEEDED = ("resolve_regions",)


def check() -> None:
    """OptionError where a level, a number, a target or a name to be switched off does not exist."""
    settings.debug()
    settings.fuel()
    settings.target("cpu")
    off = settings.disabled() - {"all"}
    if not off:
        return
    known = switchable()
    for name in sorted(off):
        if name in NEEDED or name.split()[0] == "reference":
            raise OptionError(f"ATTNOPT_DISABLE: {name!r} cannot be switched off.", "The rest is built on it.")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            remedy = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(known)}."
            raise OptionError(f"ATTNOPT_DISABLE: nothing is called {name!r}.", remedy)


def switchable() -> list[str]:
    """Every name that `ATTNOPT_DISABLE` takes."""
    kernels = [name for name, _ in TARGETS if not name.startswith("reference ")]
    passes = [step.__module__.rsplit(".", 1)[-1] for step in PIPELINE]
    named = [*(name for registry in (PATTERNS, CANDIDATES) for name, _ in registry), *kernels]
    return ["all", *(p for p in passes if p not in NEEDED), *dict.fromkeys(k.split()[0] for k in kernels), *named]
