"""Write an emitted kernel to a file named by its key and import it (Triton needs real files; so do people)."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from attnopt import settings
from attnopt.codegen.spec import KernelSpec
from attnopt.registry import TARGETS

_loaded: dict[tuple[str, str], ModuleType] = {}
# Called with (spec, source, path) of each kernel when this process first uses it.
on_load: list[Callable[[KernelSpec, str, Path], None]] = []


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write text (as UTF-8) or bytes through a temporary file beside it: no reader ever sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(content.encode() if isinstance(content, str) else content)
        # A temporary file is private; the finished one follows the umask like any other.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def kernel_folder() -> Path:
    return settings.cache_dir() / "kernels"


def load(spec: KernelSpec) -> ModuleType:
    """The emitted module of `spec`: source from its target, written if it is not there already, imported once.

    What the module has is the family's contract (docs/add-a-target.md); a prefill has
    ``prefill(q, k, v, sinks, windows, scale, pad=None) -> out``. The reference's, where `ATTNOPT_DISABLE` names the
    kernel. ValueError where the target has no such kernel.
    """
    if f"{spec.target} {spec.kernel}" in settings.disabled():
        spec = replace(spec, target="reference")
    if f"{spec.target} {spec.kernel}" not in TARGETS:
        raise ValueError(f"the {spec.target} target has no {spec.kernel.replace('_', ' ')} kernel")
    source = TARGETS[f"{spec.target} {spec.kernel}"].emit(spec)
    folder = kernel_folder()
    cached = _loaded.get((str(folder), spec.key()))
    if cached is not None:
        return cached
    path = folder / f"{spec.key()}.py"
    if not path.exists() or path.read_text(encoding="utf-8") != source:
        write_atomically(path, source)
    module_spec = importlib.util.spec_from_file_location(f"attnopt_emitted.{spec.key()}", path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module
    module_spec.loader.exec_module(module)
    _loaded[str(folder), spec.key()] = module
    for tell in on_load:
        tell(spec, source, path)
    return module
