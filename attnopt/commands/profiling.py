"""`attnopt profile` and `attnopt merge`."""

from __future__ import annotations

import argparse
from dataclasses import replace

from attnopt import hf, text
from attnopt.commands.common import Progress, emit, load, stages, writable
from attnopt.profile_file import Profile, merged
from attnopt.report import terminal
from attnopt.report.data import profile_json
from attnopt.supervision import Sample, check_labels, continued


def profile(args: argparse.Namespace) -> None:
    from attnopt.profiler import DEFAULT_GRID, profile_model
    from attnopt.statistics import Grid

    out = writable(args.out)
    loaded = load(args)
    grid = DEFAULT_GRID if args.windows is None else Grid(DEFAULT_GRID.sinks, tuple(args.windows))
    partial = out.with_name(out.name + ".partial")
    with stages() as progress:
        made = profile_model(
            loaded.model, calibration(args, loaded, progress), grid, args.seed,
            lambda done, of: progress("profiling", done, of), partial, labels=args.labels, draws=args.draws,
            forward_only=args.forward_only, recompute=args.recompute,
        )  # fmt: skip
    made.save(out)
    partial.unlink(missing_ok=True)
    emit(args, {"profile": str(out), **profile_json(made)}, lambda: terminal.print_profile(made))


def calibration(args: argparse.Namespace, loaded: hf.Loaded, progress: Progress) -> list[Sample]:
    """The sequences to profile on, on the model's device; with `--labels continuation` the model writes their ends."""
    check_labels(args.labels, args.draws)
    most = 2 * args.samples * max(args.lengths)
    sources = text.Sources(args.text, loaded.tokenizer, "calibrate", most, args.probe)
    device = next(loaded.model.parameters()).device
    if args.labels != "continuation":
        found = [s for n in args.lengths for s in sources.samples(n, args.samples, args.seed)]
        return [replace(s, ids=s.ids.to(device)) for s in found]
    prompts = [(n, prompt) for n in args.lengths for prompt in sources.prompts(n, args.samples)]
    written = []
    for done, (n, prompt) in enumerate(prompts):
        progress("the model writes", done, len(prompts))
        written.append(continued(loaded.model, prompt.to(device), n, args.seed + done, args.greedy))
    return written


def merge(args: argparse.Namespace) -> None:
    out = writable(args.out)
    made = merged(((name, Profile.load(name)) for name in args.profiles), args.mixed)
    made.save(out)
    emit(args, {"profile": str(out), **profile_json(made)}, lambda: terminal.print_profile(made))
