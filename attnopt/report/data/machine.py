"""Versions, hardware, compiler and settings: what a report of a mistake needs."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from typing import Any

import torch

from attnopt import __version__, settings
from attnopt.cost import device_name

PACKAGES = ("torch", "triton", "transformers", "numpy", "scipy", "safetensors")


def environment() -> dict[str, Any]:
    """Versions, hardware, compiler and attnopt's variables as they are now."""
    cuda = torch.cuda.is_available()
    return {
        "attnopt": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: _version(name) for name in PACKAGES},
        "cpu": device_name("cpu"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())] if cuda else [],
        "cuda": torch.version.cuda if cuda else None,
        "compiler": _compiler(),
        "variables": {name: os.environ.get(name, default) for name, (default, _) in settings.VARIABLES.items()},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _compiler() -> str | None:
    """The C++ compiler that inductor would find, by the first line of its --version."""
    for name in (os.environ.get("CXX", ""), "g++", "c++", "clang++"):
        if name and shutil.which(name):
            try:
                run = subprocess.run([name, "--version"], capture_output=True, text=True, timeout=10, check=True)
            except (OSError, subprocess.SubprocessError):
                continue
            return run.stdout.splitlines()[0] if run.stdout else name
    return None
