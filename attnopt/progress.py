"""How work that takes long says how far it is."""

from __future__ import annotations

from collections.abc import Callable

# Called with (what, done, of). What stands before ": " in `what` is the stage, what comes after it only where in that
# stage the work is; of 0 is work whose end is not known.
Progress = Callable[[str, int, int], None]
