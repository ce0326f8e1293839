"""`attnopt examine`: what would be done to a model, with nothing changed."""

from __future__ import annotations

import argparse

from attnopt import hf
from attnopt.commands.common import check_device, emit, load, note, stages, writable, wrote
from attnopt.errors import OptionError
from attnopt.examine import examine as examine_calls
from attnopt.examine import examine_model
from attnopt.report import terminal
from attnopt.report.data import examined_json, page_data
from attnopt.report.page import write_page
from attnopt.report.pictures import pictures_json

__all__ = ["examine", "examine_model"]

# Tokens traced where nothing else is asked for.
LENGTH = 256


def examine(args: argparse.Namespace) -> None:
    length = LENGTH if args.length is None else args.length
    check(args, length)
    page = writable(args.html) if args.html else None
    loaded = load(args, as_saved=True) if args.config is None else from_config(args, length)
    if args.length is None:
        length = fitting(loaded, length)
    with stages(args.progress) as progress:
        found = examine_calls(
            loaded, length, padded=args.padded, lengths=args.lengths, timing=args.time,
            dynamic=True if args.dynamic else None, prompt_only=args.prompt_only, progress=progress,
        )  # fmt: skip
    data = examined_json(found)
    if page is not None:
        pictures = pictures_json([graph.report for graph in found.graphs])
        parts = {"graphs": data, "pictures": pictures, "notes": list(found.notes)}
        write_page(page, page_data(f"attnopt examine {loaded.name}", parts))

    def told() -> None:
        terminal.print_examined(data)
        wrote(page)

    emit(args, data, told)


def check(args: argparse.Namespace, length: int) -> None:
    if (args.model is None) == (args.config is None):
        said = "MODEL and --config are both given." if args.model else "Neither MODEL nor --config is given."
        raise OptionError(said, "Give a model, or --config llama --tiny for one with random weights.")
    for given, name in ((args.tiny, "--tiny"), (args.set, "--set")):
        if given and args.config is None:
            raise OptionError(f"{name} is for a model that --config names.", f"Add --config, or leave {name} out.")
    if length < 2:
        raise OptionError("--length must be at least 2.", "Attention over one token has nothing to save.")


def from_config(args: argparse.Namespace, length: int) -> hf.Loaded:
    """A model of random weights; a few more positions than tokens, for those that are generated."""
    from attnopt.hf.tiny import change_of, from_config

    check_device(args.device)
    transformers = hf.transformers()
    transformers.logging.set_verbosity_error()
    changes = dict(change_of(text) for text in args.set)
    made = from_config(
        args.config, tiny=args.tiny, attention=args.attention, dtype=hf.dtype_of(args.dtype), device=args.device,
        changes=changes, positions=length + 16,
    )  # fmt: skip
    if made.note:
        note(made.note)
    return made


def fitting(loaded: hf.Loaded, length: int) -> int:
    """`length`, or less where a model of transformers has fewer positions."""
    from attnopt.hf.tiny import positions_of

    config = getattr(loaded.model, "config", None)
    positions = positions_of(config) if hasattr(config, "sub_configs") else []
    return min([length, *(n - 16 for n in positions if n > 32)])
