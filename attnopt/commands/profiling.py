"""`attnopt profile` and `attnopt merge`."""

from __future__ import annotations

import argparse

from attnopt import text
from attnopt.commands.common import emit, load, stages, writable
from attnopt.profile_file import Profile, merged
from attnopt.report import terminal
from attnopt.report.data import profile_json


def profile(args: argparse.Namespace) -> None:
    from attnopt.profiler import DEFAULT_GRID, profile_model
    from attnopt.statistics import Grid

    out = writable(args.out)
    loaded = load(args)
    tokens = text.stream(args.text, loaded.tokenizer, "calibrate", 2 * args.samples * max(args.lengths))
    rows = [r for n in args.lengths for r in text.sequences(tokens, n, args.samples, "calibrate")]
    grid = DEFAULT_GRID if args.windows is None else Grid(DEFAULT_GRID.sinks, tuple(args.windows))
    partial = out.with_name(out.name + ".partial")
    device = next(loaded.model.parameters()).device
    with stages() as progress:
        made = profile_model(
            loaded.model, [r[None].to(device) for r in rows], grid, args.seed,
            lambda done, of: progress("profiling", done, of), partial,
        )  # fmt: skip
    made.save(out)
    partial.unlink(missing_ok=True)
    emit(args, {"profile": str(out), **profile_json(made)}, lambda: terminal.print_profile(made))


def merge(args: argparse.Namespace) -> None:
    out = writable(args.out)
    made = merged((name, Profile.load(name)) for name in args.profiles)
    made.save(out)
    emit(args, {"profile": str(out), **profile_json(made)}, lambda: terminal.print_profile(made))
