"""`attnopt distill`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from attnopt import hf, text
from attnopt.commands.common import check_forward, emit, load, note, stages, writable
from attnopt.distill import FAMILIES, Menu, distill_model
from attnopt.errors import TextError
from attnopt.profile_file import Profile
from attnopt.report.fits import fitted_json, print_fitted
from attnopt.supervision import Sample

# Of the calibration text, what is fitted on; the rest is tried on.
SHARE = 1 / 3


def distill(args: argparse.Namespace) -> None:
    out = writable(args.out)
    seen = Profile.load(args.profile)
    families = FAMILIES if args.families is None else tuple(args.families)
    menu = Menu(tuple(args.features), tuple(args.ranks), tuple(args.windows), tuple(args.sinks), args.steps, families)
    loaded = load(args)
    check_forward(loaded)
    partial = out.with_name(out.name + ".partial")
    with stages(args.progress) as progress:
        progress("reading text", 0, 0)
        fit, tried = texts(args, loaded, seen.lengths)
        made = distill_model(loaded.model, fit, tried, menu, args.seed, progress, partial, seen, note)
    made.save(out)
    partial.unlink(missing_ok=True)
    found = fitted_json(made)
    emit(args, {"fitted_file": str(out), "fitted": found}, lambda: print_fitted(found))


def texts(
    args: argparse.Namespace, loaded: hf.Loaded, lengths: Sequence[int]
) -> tuple[list[torch.Tensor], list[Sample]]:
    """Sequences to fit on, of the longest profiled length that the text has two of, and to try on, of every length; on
    the model's device."""
    longest, device = max(lengths), next(loaded.model.parameters()).device
    ids = text.stream(args.text, loaded.tokenizer, "calibrate", 4 * args.samples * longest)
    end = int(ids.numel() * SHARE)
    fit_length = next((n for n in sorted(lengths, reverse=True) if 2 * n <= end), 0)
    if not fit_length:
        raise TextError(
            f"A third of the text for calibration, {end} tokens, does not hold two sequences of {min(lengths)}.",
            "Give more text, or a profile of shorter lengths.",
        )
    fit = text.sequences(ids[:end], fit_length, max(2, args.samples), "calibrate")
    tried = [row for n in lengths for row in text.sequences(ids[end:], n, args.samples, "calibrate")]
    return [row[None].to(device) for row in fit], [Sample(row[None].to(device)) for row in tried]
