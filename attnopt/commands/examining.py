"""`attnopt examine`: what would be done to a model, with nothing changed."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from attnopt import backend, hf
from attnopt.commands.common import emit, load, stages, token_ids, writable
from attnopt.errors import OptionError
from attnopt.ir import GraphReport
from attnopt.report import terminal
from attnopt.report.data import environment, graphs_json
from attnopt.report.page import write_page


def unrun(gm: torch.fx.GraphModule) -> Callable[..., Any]:
    """A call that answers with zeros where a traced graph has numbers, or the graph itself where its results may steer
    what comes after it (integers, booleans, sizes known only at run time): a long input then costs no memory."""
    (output,) = (n for n in gm.graph.nodes if n.op == "output")
    results = [n.meta.get("example_value") for n in output.args[0]]
    for held in results:
        static = isinstance(held, torch.Tensor) and all(isinstance(size, int) for size in held.shape)
        if not static or not held.dtype.is_floating_point:
            return gm.forward

    def zeros(held: torch.Tensor) -> torch.Tensor:
        # Small ones are real: code between two graphs may write to them.
        small = held.numel() <= 2**20
        return torch.zeros(held.shape if small else (), dtype=held.dtype, device=held.device).expand(held.shape)

    return lambda *_: tuple(map(zeros, results))


@torch.no_grad()
def examine_model(loaded: hf.Loaded, length: int, padded: bool = False) -> list[GraphReport]:
    """The reports of one traced forward; nothing is compiled by inductor, and nothing is run that need not be."""
    found: list[GraphReport] = []

    def look(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        report = backend.rewrite(gm, inputs, backend.Options()).report
        found.append(report)
        return unrun(gm)

    ids = token_ids(loaded, length).to(next(loaded.model.parameters()).device)
    kwargs: dict[str, Any] = {"use_cache": False} if hasattr(getattr(loaded.model, "config", None), "use_cache") else {}
    if padded:
        kwargs["attention_mask"] = torch.ones_like(ids).index_fill(1, torch.arange(length // 4, device=ids.device), 0)
    torch.compile(loaded.model, backend=look, dynamic=False)(ids, **kwargs)
    return found


def examine(args: argparse.Namespace) -> None:
    if args.length < 2:
        raise OptionError("--length must be at least 2.", "Attention over one token has nothing to save.")
    page = writable(args.html) if args.html else None
    loaded = load(args)
    with stages() as progress:
        progress("tracing", 0, 1)
        reports = examine_model(loaded, args.length, args.padded)
        progress("tracing", 1, 1)
    data = graphs_json(reports)
    if page is not None:
        write_page(page, {"title": f"attnopt examine {args.model}", "graphs": data, "environment": environment()})
    emit(args, data, lambda: terminal.print_graphs(reports))
