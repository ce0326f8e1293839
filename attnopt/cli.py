"""The command line: parse, run one command, turn every known mistake into one message and an exit code.

Exit codes: 0 done; 1 the task could not be done (no plan keeps the budget, a missing package, an interruption); 2 what
was given is at fault (the command line, a model, text, profile or plan).
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from types import FrameType

from attnopt.errors import AttnoptError
from attnopt.escapes import visible
from attnopt.options import EXAMPLES, INTERRUPTED, START, build_parser
from attnopt.parsing import HELP

__all__ = ["EXAMPLES", "HELP", "build_parser", "interruptible", "main"]

REMEDIES = {
    errno.ENOSPC: "Make room there, or choose another place.",
    errno.EDQUOT: "Make room there, or choose another place.",
    errno.ENOENT: "Check the name.",
    errno.EACCES: "Check who may read and write there.",
    errno.EPERM: "Check who may read and write there.",
    errno.EISDIR: "Give the name of a file.",
}
NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (`sys.argv` without one) and return its exit code; `--help` and `--version` raise
    SystemExit."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["help"]:
        given = [*given[1:], "--help"]
    # What stands after "--" is a command line of somebody else's.
    as_json = "--json" in given[: given.index("--") if "--" in given else None]
    with interruptible():
        try:
            try:
                return answered(given, as_json)
            finally:
                sys.stdout.flush()
        except OSError as error:
            # What is still buffered must not be tried again at the end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if isinstance(error, BrokenPipeError):
                # Whoever read the output has seen enough.
                return 0
            return fail(of_system(error), as_json)


def answered(given: list[str], as_json: bool) -> int:
    """The exit code of a command that was run, with its mistake told on standard error."""
    command = ""
    try:
        args = build_parser().parse_args(given)
        command = args.command or ""
        perform(args)
    except BrokenPipeError:
        raise
    except AttnoptError as error:
        return fail(error, as_json)
    except KeyboardInterrupt:
        return fail(AttnoptError("Interrupted.", INTERRUPTED.get(command, "Nothing was written.")), as_json)
    except OSError as error:
        return fail(of_system(error), as_json)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error).lower() for words in NO_MEMORY):
            raise
        reason = (str(error).strip() or "an allocation failed").splitlines()[0]
        return fail(
            AttnoptError(f"There is not enough memory: {reason}", "Use shorter lengths, or --dtype bf16."), as_json
        )
    return 0


def of_system(error: OSError) -> AttnoptError:
    """What the operating system refused, and what may help."""
    where = f"{error.filename}: " if error.filename else ""
    remedy = REMEDIES.get(error.errno or 0, "Choose a place that exists and can be written.")
    return AttnoptError(f"{where}{error.strerror or error}.", remedy)


def perform(args: argparse.Namespace) -> None:
    """Run the command of a parsed line. With --json, whatever else is printed on the way goes to standard error."""
    if args.command is None:
        print(START)
        return
    if args.command == "completion":
        from attnopt import completion

        print(completion.script(build_parser(), args.shell))
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if args.command == "demo":
        # The model is here; nothing is to be looked up.
        os.environ["HF_HUB_OFFLINE"] = "1"
    args.stdout = sys.stdout
    with redirect_stdout(sys.stderr) if args.json else nullcontext():
        from attnopt import commands
        from attnopt.backend import bypass

        bypass.keep_quiet()
        if args.command == "demo":
            from attnopt import demo

            demo.command(args)
        else:
            commands.run(args)


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM interrupts as Ctrl-C does, so that what is done so far is kept; a second one of either ends the process
    at once. Signals that the parent had switched off stay off. Afterwards each is handled as it was before."""

    def stop(number: int, frame: FrameType | None) -> None:
        for name in before:
            signal.signal(name, signal.SIG_DFL)
        raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
        before = {name: handler for name, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for name in before:
        signal.signal(name, stop)
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def fail(error: AttnoptError, as_json: bool = False) -> int:
    """Tell a mistake on standard error, as one line of JSON where that was asked for; its exit code."""
    if as_json:
        told = {"error": error.problem, "remedy": error.remedy, "exit_code": error.exit_code}
        print(json.dumps(told), file=sys.stderr)
    else:
        from rich.console import Console
        from rich.text import Text

        # Not by the console of reports: that would load torch to say that an option is misspelt.
        to = Console(stderr=True, markup=False, emoji=False, highlight=False)
        to.print(Text(visible(error.problem), style="bold red"), soft_wrap=True)
        if error.remedy:
            to.print(Text("  " + visible(error.remedy)), soft_wrap=True)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
