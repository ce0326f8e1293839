"""`attnopt profile` and `attnopt merge`."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import replace

import torch

from attnopt import hf, ranks, text
from attnopt.commands.common import check_forward, emit, load, note, stages, writable
from attnopt.errors import OptionError, TextError
from attnopt.profile_file import Profile, merged
from attnopt.progress import Progress
from attnopt.report import terminal
from attnopt.report.data import profile_json
from attnopt.supervision import Sample, check_labels, continued

# Documents of the retrieval probe at each length, where nothing else is asked for.
PROBES = 2


def profile(args: argparse.Namespace) -> None:
    from attnopt.profiler import DEFAULT_GRID, profile_model
    from attnopt.statistics import Grid

    out = writable(args.out)
    ranks.join()
    args.device = ranks.device_of(args.device)
    loaded = load(args)
    check_forward(loaded)
    grid = DEFAULT_GRID if args.windows is None else Grid(DEFAULT_GRID.sinks, tuple(args.windows))
    partial = out.with_name(out.name + ".partial")
    with stages(args.progress) as shown:
        progress = shown if ranks.rank() == 0 else lambda what, done, of: None
        made = profile_model(
            loaded.model, calibration(args, loaded, progress), grid, args.seed,
            progress, partial, labels=args.labels, draws=args.draws,
            forward_only=args.forward_only, recompute=args.recompute, tell=note,
        )  # fmt: skip
    # Every process has the whole sum; one of them writes it.
    if ranks.rank() == 0:
        made.save(out)
        for left in ranks.leftovers(partial):
            left.unlink(missing_ok=True)
        seen = profile_json(made)
        emit(args, {"profile_file": str(out), "profile": seen}, lambda: terminal.print_profile(seen))
    ranks.leave()


def calibration(args: argparse.Namespace, loaded: hf.Loaded, progress: Progress) -> list[Sample]:
    """The sequences to profile on, on the model's device; with `--labels continuation` the model writes their ends."""
    check_labels(args.labels, args.draws)
    most = 2 * args.samples * max(args.lengths)
    progress("reading text", 0, 0)
    sources = text.Sources(args.text, loaded.tokenizer, "calibrate", most)
    device = next(loaded.model.parameters()).device
    probes = [replace(s, ids=s.ids.to(device)) for s in probed(args, sources)]
    if args.labels != "continuation":
        found = [s for n in args.lengths for s in sources.samples(n, args.samples)]
        if ranks.rank() == 0:
            tell_shortage(found, args.samples)
        return [*(replace(s, ids=s.ids.to(device)) for s in found), *probes]
    prompts = [(n, prompt) for n in args.lengths for prompt in sources.prompts(n, args.samples)]
    written: dict[int, Sample] = {}
    for n in range(ranks.rank(), len(prompts), ranks.size()):
        progress("the model writes", n, len(prompts))
        length, prompt = prompts[n]
        written[n] = continued(loaded.model, prompt.to(device), length, args.seed + n, args.greedy)
    others = ranks.gathered_json({n: (s.ids.tolist(), s.kind) for n, s in written.items()})
    for n, (ids, kind) in [(int(key), value) for part in others for key, value in part.items()]:
        weights = torch.zeros(prompts[n][0])
        weights[prompts[n][1].shape[1] :] = 1.0
        written[n] = Sample(torch.tensor(ids, device=device), weights, kind)
    return [*(written[n] for n in sorted(written)), *probes]


def probed(args: argparse.Namespace, sources: text.Sources) -> list[Sample]:
    """Documents of the retrieval probe at every length that has room for one; TextError where they were asked for and
    there is none."""
    if args.forward_only and args.probe:
        raise OptionError("Without a backward pass nothing is learned from a probe.", "Leave --probe away.")
    if args.forward_only or args.probe == 0:
        return []
    count, found = PROBES if args.probe is None else args.probe, []
    for length in args.lengths:
        try:
            found += [d.sample for d in sources.probe.documents(length, count, f"calibrate {args.seed}")]
        except TextError as error:
            if args.probe is not None:
                raise
            if ranks.rank() == 0:
                note(f"Not probed at {length} tokens: {error.problem}")
    return found


def tell_shortage(found: list[Sample], wanted: int) -> None:
    """On standard error, where a text gives fewer sequences than were asked for."""
    counts = Counter((s.kind, s.length) for s in found)
    for (kind, length), count in counts.items():
        if count < wanted:
            note(f"The {kind} has {count} of the {wanted} sequences of {length} tokens that were asked for.")


def merge(args: argparse.Namespace) -> None:
    out = writable(args.out)
    made = merged(((name, Profile.load(name)) for name in args.profiles), args.mixed)
    made.save(out)
    seen = profile_json(made)
    emit(args, {"profile_file": str(out), "profile": seen}, lambda: terminal.print_profile(seen))
