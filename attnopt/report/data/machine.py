"""Versions, hardware, compiler, settings and caches: what a report of a mistake needs, and nothing that is private."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from attnopt import __version__, settings
from attnopt.cost import device_name

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "numpy", "scipy", "safetensors", "rich", "matplotlib")
# Of the processor's own list of features, those that kernels ask for.
FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8", "asimd", "sve", "bf16")
# Variables that change what torch, its compiler, OpenMP, CUDA, Triton or the hub do; no others are told.
SWITCHES = re.compile(
    r"(TORCH|TORCHINDUCTOR|TORCHDYNAMO|PYTORCH|TRITON|OMP|KMP|MKL|CUDA|NCCL|GLOO|TRANSFORMERS)_\w+"
    r"|HF_HUB_OFFLINE|HF_HOME|CC|CXX|WORLD_SIZE|NO_COLOR|FORCE_COLOR|COLUMNS|TERM"
)
SECRET = re.compile(r"TOKEN(?!IZERS)|KEY|SECRET|PASSW|CREDENTIAL|AUTH", re.I)


def environment() -> dict[str, Any]:
    """Versions, hardware, compiler and variables as they are now. Paths below the home folder begin with "~"; a value
    that may be a secret is "set"."""
    cuda = torch.cuda.is_available()
    return {
        "attnopt": __version__,
        "commit": commit_of(Path(__file__).parents[3]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: _version(name) for name in PACKAGES},
        "cpu": device_name("cpu"),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "cpu features": features(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())] if cuda else [],
        "cuda": torch.version.cuda if cuda else None,
        "compiler": _compiler(),
        "variables": variables(),
    }


def variables() -> dict[str, str]:
    """attnopt's own, set or by default, and those that are set of SWITCHES."""
    own = {name: os.environ.get(name, default) for name, (default, _) in settings.VARIABLES.items()}
    others = {name: value for name, value in sorted(os.environ.items()) if SWITCHES.fullmatch(name)}
    return {name: "set" if SECRET.search(name) else private(value) for name, value in {**own, **others}.items()}


def private(text: str) -> str:
    """Without the names of the home folder and of the user, and without what a link holds to log in with."""
    home = str(Path.home())
    hidden = re.sub(r"//[^/@\s]+@", "//", text)
    hidden = re.sub(r"torchinductor_\w+", "torchinductor_$USER", hidden)
    return hidden if home == "/" else re.sub(rf"{re.escape(home)}(?=/|\W|$)", "~", hidden)


def features() -> list[str]:
    """Of FEATURES, those this CPU says it has; nothing where it does not say."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return []
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", info.read_text(encoding="utf-8", errors="replace"), re.M)
    words = set(found[1].split()) if found else set()
    return [name for name in FEATURES if name in words]


def commit_of(root: Path) -> str | None:
    """The commit checked out in `root`, and whether files differ from it; None where `root` is no checkout."""
    if not (root / ".git").exists():
        return None
    found = _said(["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"])
    return found.splitlines()[0] if found else None


def cached() -> list[dict[str, Any]]:
    """The folders that kernels and times are kept in: what for, the path, files and bytes."""
    inductor = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or _inductor_folder())
    found = [("attnopt", settings.cache_dir()), ("inductor", inductor)]
    found.append(("triton", Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")))
    return [{"of": of, "path": private(str(path)), **_size(path)} for of, path in found]


def _inductor_folder() -> str:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    return default_cache_dir()


def _size(folder: Path) -> dict[str, int]:
    sizes = []
    for path in folder.rglob("*"):
        try:
            sizes += [path.stat().st_size] if path.is_file() else []
        except OSError:
            # Another process may be clearing the folder.
            continue
    return {"files": len(sizes), "bytes": sum(sizes)}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _said(command: list[str]) -> str | None:
    """What a command prints, or None where it cannot be run or fails."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout


def _compiler() -> str | None:
    """The C++ compiler that inductor would find, by the first line of its --version."""
    for name in (os.environ.get("CXX", ""), "g++", "c++", "clang++"):
        if name and shutil.which(name) and (told := _said([name, "--version"])) is not None:
            return told.splitlines()[0] if told else name
    return None
