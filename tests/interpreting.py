"""Runs a test module as a script in Triton's interpreter: python interpreting.py FILE, with TRITON_INTERPRET=1.

Around every call of a device function the interpreter looks through Triton's whole language for what to replace, even
though what it replaced at the launch is still in place. Here it does so once a launch: a third of the time less. For
every sum and product of integers it computes whether it overflows, for an assertion that it then leaves out: a quarter
of what is left.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def interpreted(file: str, folder: Path, **settings: str) -> str:
    """What `file`, a test module run as a script, prints in Triton's interpreter; its kernels are in `folder`."""
    # The interpreter of triton 3.6 fails on loops with run-time bounds under numpy 2.4.
    pytest.importorskip("triton", minversion="3.7")
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    changes = {"TRITON_INTERPRET": "1", "PYTHONPATH": path, "ATTNOPT_CACHE": str(folder), **settings}
    child = subprocess.run([sys.executable, __file__, file], env=os.environ | changes, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-4000:]
    return child.stdout


def interpreted_rows(file: str, folder: Path, key: str = "case", **settings: str) -> dict[str, dict[str, Any]]:
    """The JSON objects that it prints, by their `key`."""
    rows = [json.loads(line) for line in interpreted(file, folder, **settings).splitlines() if line.startswith("{")]
    return {row[key]: row for row in rows}


def replace_once_a_launch(interpreter: Any) -> None:
    """Triton restores the language after a launch only; a device function of the same module finds it replaced."""
    replace, done = interpreter._patch_lang, set[int]()

    def once(function: Any) -> Any:
        module = id(function.__globals__)
        if module in done:
            return interpreter._LangPatchScope()
        outermost, scope = not done, replace(function)
        done.add(module)
        if outermost:
            restore = scope.restore

            def restored() -> None:
                done.clear()
                restore()

            scope.restore = restored
        return scope

    interpreter._patch_lang = once


def compute_what_is_read(interpreter: Any) -> None:
    """No overflow for assertions that are there in debug mode only; numpy's type of a number once."""
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    found = interpreter._get_np_dtype
    known = functools.cache(found)  # pointers have no hash
    interpreter._get_np_dtype = lambda of: found(of) if of.scalar.is_ptr() else known(of.scalar)


if __name__ == "__main__":
    from triton.runtime import interpreter

    replace_once_a_launch(interpreter)
    compute_what_is_read(interpreter)
    runpy.run_path(sys.argv[1], run_name="__main__")
