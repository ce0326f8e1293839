"""What several commands share: where to write, what to print, how to show progress and load a model."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from attnopt import hf
from attnopt.errors import AttnoptError, ModelError, OptionError, first_line
from attnopt.escapes import visible
from attnopt.examine.calls import placed, token_ids
from attnopt.hf.loading import told
from attnopt.ir import Site
from attnopt.plan import Plan
from attnopt.progress import Progress
from attnopt.report import terminal
from attnopt.report.data import finite


def emit(args: argparse.Namespace, data: Any, show: Callable[[], None]) -> None:
    """The JSON document, on the standard output that the command line has set aside for it, or what people read; what
    is not finite is null in the one."""
    if args.json:
        print(json.dumps(finite(data), indent=2, allow_nan=False), file=getattr(args, "stdout", None))
    else:
        show()


def writable(path: str) -> Path:
    """The path, if a file can be made there: found out before the work, not after it."""
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise AttnoptError(
            f"{target} cannot be written: {error.strerror}.", "Choose a folder you may write to."
        ) from None
    if target.is_dir():
        raise AttnoptError(f"{target} is a folder.", "Give the name of a file.")
    return target


def stages(mode: str = "auto") -> AbstractContextManager[Progress]:
    """What to report progress to, as ``report(what, done, of)``; `mode` is that of --progress."""
    return terminal.progress(mode)


def check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
        raise OptionError(f"The device {name!r} cannot be used: {reason}", "Use cpu, or cuda where a GPU is.") from None


def load(args: argparse.Namespace, as_saved: bool = False) -> hf.Loaded:
    """The model that MODEL, --dtype, --device and --attention ask for; as_saved: of the class it was saved from."""
    check_device(args.device)
    with stages(getattr(args, "progress", "auto")) as progress:
        progress(f"loading {args.model}", 0, 0)
        loaded = hf.load(args.model, hf.dtype_of(args.dtype), args.device, args.attention, as_saved)
    if loaded.note:
        note(loaded.note)
    return loaded


def check_forward(loaded: hf.Loaded) -> None:
    """ModelError where a model that somebody's own code made does not take token ids."""
    if ":" not in loaded.name:
        return
    ids = any_ids(loaded, 8)
    try:
        with torch.no_grad():
            loaded.model(ids)
    except Exception as error:
        raise ModelError(
            f"{loaded.name} failed on token ids int64 (1, 8): {told(error)}",
            "Its forward must take token ids alone, and return logits.",
        ) from error


def any_ids(loaded: hf.Loaded, length: int) -> torch.Tensor:
    """Token ids int64 (1, length) where the model is: their values do not matter to what is recognised."""
    return placed(loaded.model, token_ids(loaded.model, length))


def sites_of(loaded: hf.Loaded) -> list[Site]:
    """The attentions of a model, in the order in which they run."""
    from attnopt.profiler import discover

    return list(discover(loaded.model, any_ids(loaded, 64)).sites.values())


def checked_sites(plan: Plan, loaded: hf.Loaded) -> list[Site]:
    """The attentions of a plan's model; PlanError where it is of another, which a backend, that sees no weights, could
    not tell."""
    from attnopt.fingerprint import fingerprint_of

    sites = sites_of(loaded)
    plan.check(sites, fingerprint_of(loaded.model, sites))
    return sites


def say(line: str) -> None:
    print(visible(line), flush=True)
    sys.stderr.flush()


def wrote(*paths: Path | None) -> None:
    """Which files there are now."""
    if names := [str(path) for path in paths if path is not None]:
        say(f"wrote {' and '.join(names)}")


def note(line: str) -> None:
    """What is worth knowing of a run beside its result, on standard error."""
    print(visible(line), file=sys.stderr, flush=True)
