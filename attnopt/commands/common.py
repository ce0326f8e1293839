"""What several commands share: where to write, what to print, how to show progress and load a model."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from attnopt import hf
from attnopt.errors import AttnoptError, OptionError
from attnopt.report import terminal

Progress = Callable[[str, int, int], None]


def emit(args: argparse.Namespace, data: Any, show: Callable[[], None]) -> None:
    """The JSON document, or what people read."""
    if args.json:
        print(json.dumps(data, indent=2))
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


@contextmanager
def stages() -> Iterator[Progress]:
    """One progress bar after the other: a new one whenever the named stage changes."""
    current: list[Any] = ["", None, None, 0]

    def close() -> None:
        if current[1] is not None:
            current[1].__exit__(None, None, None)

    def report(what: str, done: int, of: int) -> None:
        if what != current[0]:
            close()
            bar = terminal.progress(what, of)
            current[:] = [what, bar, bar.__enter__(), 0]
        current[2](done - current[3])
        current[3] = done

    try:
        yield report
    finally:
        close()


def checked_device(name: str) -> None:
    """OptionError where no tensor can be made on a device."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        raise OptionError(f"The device {name!r} cannot be used: {reason}", "Use cpu, or cuda where a GPU is.") from None


def load(args: argparse.Namespace, as_saved: bool = False) -> hf.Loaded:
    checked_device(args.device)
    return hf.load(args.model, hf.dtype_of(args.dtype), args.device, args.attention, as_saved)


def token_ids(loaded: hf.Loaded, length: int) -> torch.Tensor:
    """Any ids (1, length): their values do not matter to what is recognised."""
    config = getattr(loaded.model, "config", None)
    size = getattr(config, "vocab_size", None) or 100
    return (torch.arange(length)[None] * 7 + 11) % size


def say(line: str) -> None:
    print(line, flush=True)
    sys.stderr.flush()
