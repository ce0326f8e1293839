"""What is run on a class: names of cells, and how each calls the model.

A call is a function of the model (compiled or not) that returns its outputs; a cell fixes the transformers attention,
the dtype and the call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnopt.hf.inputs import inputs_of
from attnopt.hf.shrink import LENGTH

STEPS = 3


class NotApplicable(Exception):
    """The cell asks something of the class that it does not have."""


@dataclass(frozen=True)
class Cell:
    """One way to run a class. bound: largest error, relative to the output's largest value.

    bf16 keeps 8 bits; three roundings in a row in each of two layers move an output by about 1 % of its scale. Over the
    bound, it is compared with float32 instead: its norm's distance from that may be little larger than eager's is
    (`ROUNDING`).
    """

    name: str
    attention: str
    padded: bool = False
    dtype: torch.dtype = torch.float32
    dynamic: bool | None = False
    training: bool = False
    cache: str = ""
    bound: float = 1e-4


BASE = (
    Cell("eager", "eager"),
    Cell("sdpa", "sdpa"),
    Cell("eager padded", "eager", padded=True),
    Cell("sdpa padded", "sdpa", padded=True),
)
GRID = (
    Cell("bf16", "eager", dtype=torch.bfloat16, bound=4e-2),
    Cell("dynamic", "eager", padded=True, dynamic=True),
    Cell("training", "eager", padded=True, training=True),
    Cell("decode", "sdpa", cache="DynamicCache", dynamic=None),
    Cell("decode static", "sdpa", cache="StaticCache", dynamic=None),
)
# Inductor's own matcher on the same model: its joint-graph passes run, nothing is compiled.
COUNT = Cell("inductor count", "eager")
CELLS = {cell.name: cell for cell in (*BASE, *GRID, COUNT)}


def cells_of(name: str, full: set[str], position: int, count: bool = False) -> list[Cell]:
    """The base cells; the whole grid on a class of `full`, else the one whose turn it is."""
    grid = GRID if name in full else (GRID[position % len(GRID)],)
    return [*BASE, *grid, *((COUNT,) if count else ())]


def cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def call_of(model: Any, cell: Cell) -> Callable[[Any], list[Any]]:
    """The call of `cell`: takes the model or its compiled twin, returns what is compared."""
    takes = inspect.signature(model.forward).parameters
    if cell.padded and not ("attention_mask" in takes and "input_ids" in takes):
        raise NotApplicable("it takes no padded tokens")
    if cell.cache:
        if "past_key_values" not in takes or "input_ids" not in takes or model.config.is_encoder_decoder:
            raise NotApplicable("it does not decode with a cache of its own")
        return decoding(model, cell)
    lengths = (LENGTH, LENGTH + 7) if cell.dynamic and "input_ids" in takes else (LENGTH,)
    given = [cast(inputs_of(model, cell.padded, length, training=cell.training), cell.dtype) for length in lengths]

    def plain(run: Any) -> list[Any]:
        return [floats(run(**inputs), inputs.get("attention_mask")) for inputs in given]

    return training(model, given[0]) if cell.training else plain


def training(model: Any, inputs: dict[str, Any]) -> Callable[[Any], list[Any]]:
    """One step: the outputs and the gradient of every parameter."""

    def step(run: Any) -> list[Any]:
        model.zero_grad(set_to_none=True)
        outputs = floats(run(**inputs), inputs.get("attention_mask"))
        sum((t.float() ** 2).mean() for _, t in outputs if t.requires_grad).backward()  # type: ignore[union-attr]
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return [[(n, t.detach()) for n, t in outputs] + [("gradients", torch.cat(gradients))]]

    return step


def decoding(model: Any, cell: Cell) -> Callable[[Any], list[Any]]:
    """A prompt, then STEPS tokens one by one, with a cache of transformers' class ``cell.cache``."""
    import transformers

    ids = inputs_of(model)["input_ids"]
    prompt = ids.shape[1] - STEPS

    def steps(run: Any) -> list[Any]:
        config = model.config.get_text_config(decoder=True)
        length = {"max_cache_len": LENGTH + 8} if cell.cache == "StaticCache" else {}
        cache = getattr(transformers, cell.cache)(config=config, **length)
        pieces = [ids[:, :prompt], *(ids[:, n : n + 1] for n in range(prompt, ids.shape[1]))]
        return [floats(run(input_ids=piece, past_key_values=cache, use_cache=True), None) for piece in pieces]

    return steps


def floats(output: Any, mask: Tensor | None) -> list[tuple[str, Tensor]]:
    """The floating-point tensors of a model's output by name, rows of padding left out; caches are no output."""
    found: list[tuple[str, Tensor]] = []
    items = output.items() if hasattr(output, "items") else enumerate(output if isinstance(output, tuple) else [output])
    for name, value in items:
        if isinstance(value, Tensor) and value.is_floating_point():
            rows = mask is not None and value.shape[:2] == mask.shape
            found.append((str(name), value[mask.bool()] if rows else value))  # type: ignore[union-attr]
        elif hasattr(value, "items") and "past" not in str(name):
            found += [(f"{name}.{n}", t) for n, t in floats(value, mask)]
    return found


def distance_between(found: list[Any], expected: list[Any]) -> float:
    """Largest relative distance of two tensors in the Frobenius norm; one outlier counts less than in `error_between`,
    whose infinity for shapes and NaNs it shares."""
    if error_between(found, expected) == float("inf"):
        return float("inf")
    pairs = [
        (x.double(), y.double())
        for a, b in zip(found, expected, strict=True)
        for (_, x), (_, y) in zip(a, b, strict=True)
    ]
    return max((float((x - y).norm() / y.norm().clamp(min=1e-12)) for x, y in pairs), default=0.0)


def error_between(found: list[Any], expected: list[Any]) -> float:
    """Largest difference relative to the largest value of the tensor; infinite where shapes or NaNs differ."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if [(n, t.shape) for n, t in a] != [(n, t.shape) for n, t in b]:
            return float("inf")
        for (_, x), (_, y) in zip(a, b, strict=True):
            x, y = x.detach().double(), y.detach().double()
            finite = y.isfinite()
            if not torch.equal(x.isfinite(), finite) or not torch.equal(
                x[~finite].nan_to_num(), y[~finite].nan_to_num()
            ):
                return float("inf")
            if finite.any():
                scale = max(float(y[finite].abs().max()), 1e-12)
                worst = max(worst, float((x - y)[finite].abs().max()) / scale)
    return worst
