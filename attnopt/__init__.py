"""attnopt: a compiler pass that makes the attention of any PyTorch model cheaper.

torch.compile(model, backend="attnopt") needs no import of this package. These names are for profiling, planning and
looking at what was done; each is imported on first use, so that importing attnopt costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnopt.backend import clear_reports, reports
    from attnopt.backend.live import LivePlan
    from attnopt.hf.cache import SpanCache
    from attnopt.hf.generation import disable, enable
    from attnopt.plan import Budget, Plan
    from attnopt.planner.make import make_plan
    from attnopt.profile_file import Profile
    from attnopt.profiler import profile_model
    from attnopt.report.explained import explain

__version__ = "0.1.0"
__all__ = [
    "Budget",
    "LivePlan",
    "Plan",
    "Profile",
    "SpanCache",
    "clear_reports",
    "disable",
    "enable",
    "explain",
    "make_plan",
    "profile_model",
    "reports",
]

_HOMES = {
    "Budget": "attnopt.plan",
    "LivePlan": "attnopt.backend.live",
    "Plan": "attnopt.plan",
    "Profile": "attnopt.profile_file",
    "SpanCache": "attnopt.hf.generation",
    "clear_reports": "attnopt.backend",
    "disable": "attnopt.hf.generation",
    "enable": "attnopt.hf.generation",
    "explain": "attnopt.report.explained",
    "make_plan": "attnopt.planner.make",
    "profile_model": "attnopt.profiler",
    "reports": "attnopt.backend",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"attnopt has no {name!r}; there are {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)
