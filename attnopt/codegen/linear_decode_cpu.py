"""One token of linear far parts on the CPU: the state of each head takes what leaves its window, and is read."""

from __future__ import annotations

from attnopt.codegen.reference_linear import decode

__all__ = ["decode"]
