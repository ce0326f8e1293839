"""`attnopt distill`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import torch

from attnopt import hf, text
from attnopt.commands.common import check_forward, emit, load, note, stages, writable
from attnopt.commands.profiling import PROBES
from attnopt.distill import distill_model
from attnopt.errors import TextError
from attnopt.fitting.menu import DEFAULT, Menu
from attnopt.probe import Probe
from attnopt.profile_file import Profile
from attnopt.report.fits import fitted_json, print_fitted
from attnopt.supervision import Sample

# Of the calibration text, what is fitted on; the rest is tried on.
SHARE = 1 / 3


def distill(args: argparse.Namespace) -> None:
    out = writable(args.out)
    seen = Profile.load(args.profile)
    families = DEFAULT if args.families is None else tuple(args.families)
    menu = Menu(tuple(args.features), tuple(args.ranks), tuple(args.windows), tuple(args.sinks), args.steps, families)
    loaded = load(args)
    check_forward(loaded)
    partial = out.with_name(out.name + ".partial")
    with stages(args.progress) as progress:
        progress("reading text", 0, 0)
        fit, tried = texts(args, loaded, seen.lengths, menu.fits)
        tried += probed(args, loaded, seen)
        made = distill_model(loaded.model, fit, tried, menu, args.seed, progress, partial, seen, note)
    made.save(out)
    partial.unlink(missing_ok=True)
    found = fitted_json(made)
    emit(args, {"fitted_file": str(out), "fitted": found}, lambda: print_fitted(found))


def texts(
    args: argparse.Namespace, loaded: hf.Loaded, lengths: Sequence[int], fits: bool
) -> tuple[list[torch.Tensor], list[Sample]]:
    """Sequences to fit on, of the longest profiled length that the text has two of, none unless something `fits`; and
    to try on, of every length, the same whether or not; on the model's device."""
    longest, device = max(lengths), next(loaded.model.parameters()).device
    ids = text.stream(args.text, loaded.tokenizer, "calibrate", 4 * args.samples * longest)
    end = int(ids.numel() * SHARE)
    fit_length = next((n for n in sorted(lengths, reverse=True) if 2 * n <= end), 0)
    if fits and not fit_length:
        raise TextError(
            f"A third of the text for calibration, {end} tokens, does not hold two sequences of {min(lengths)}.",
            "Give more text, or a profile of shorter lengths.",
        )
    fit = text.sequences(ids[:end], fit_length, max(2, args.samples), "calibrate") if fits else []
    tried = [row for n in lengths for row in text.sequences(ids[end:], n, args.samples, "calibrate")]
    return [row[None].to(device) for row in fit], [Sample(row[None].to(device)) for row in tried]


def probed(args: argparse.Namespace, loaded: hf.Loaded, seen: Profile) -> list[Sample]:
    """Documents of the retrieval probe, at every length at which the profile was asked for far lines: what a head's
    replacement loses of them is measured like what its spans do."""
    asked = sorted({n for (_, n), o in seen.observations.items() if o.asked})
    if loaded.tokenizer is None or not asked:
        return []
    device, probe = next(loaded.model.parameters()).device, Probe(loaded.tokenizer)
    documents = [d for n in asked for d in probe.documents(n, PROBES, f"try {args.seed}")]
    return [replace(d.sample, ids=d.sample.ids.to(device)) for d in documents]
