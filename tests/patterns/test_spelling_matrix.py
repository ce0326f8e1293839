"""One attention, many spellings: each is found once, with its family's record, and computes what it computed.

A cell is shapes (static, two lengths one after the other, dynamic) x dtype x batch x inference or training. Unless
FULL_MATRIX=1 is in the environment, every spelling runs in the plainest cell and in one other, which rotates.
"""

from __future__ import annotations

import itertools
import os
import re
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from tracing import Traced, trace

from attnopt.capture import capture, needs_grad
from attnopt.ir import Refusal
from attnopt.passes import PIPELINE, Program

# Each registers its spellings.
from . import (  # noqa: F401
    biased_spellings,
    grouped_spellings,
    masked_spellings,
    plain_spellings,
    tempered_spellings,
)
from .spellings import FAMILIES, SPELLINGS, Spelling, normalised

LENGTHS = (13, 17)


class Cell(NamedTuple):
    shapes: str
    dtype: torch.dtype
    batch: int
    training: bool

    def __str__(self) -> str:
        use = "training" if self.training else "inference"
        return f"{self.shapes}-{str(self.dtype).removeprefix('torch.')}-{self.batch}-{use}"


PLAINEST = Cell("static", torch.float32, 2, False)
CELLS = [
    Cell(*c)
    for c in itertools.product(
        ("static", "two lengths", "dynamic"), (torch.float32, torch.bfloat16), (1, 2), (False, True)
    )
]
OTHERS = [cell for cell in CELLS if cell != PLAINEST]


def cells(number: int) -> list[Cell]:
    """The cells of the n-th spelling: of every sixth one more than the plainest. The number of others has no divisor in
    common with six or seven, so that neighbours get unlike cells, and each cell is met."""
    if os.environ.get("FULL_MATRIX") == "1":
        return CELLS
    return [PLAINEST] if number % 6 else [PLAINEST, OTHERS[number * 7 % len(OTHERS)]]


# By name: which file of spellings is imported first depends on which tests run.
ORDERED = sorted(SPELLINGS, key=str)
CASES = [pytest.param(s, c, id=f"{s}-{c}") for n, s in enumerate(ORDERED) for c in cells(n)]


def cast(inputs: tuple[Tensor, ...], dtype: torch.dtype, training: bool) -> tuple[Tensor, ...]:
    return tuple(
        t.detach().clone().to(dtype).requires_grad_(training) if t.is_floating_point() else t.clone() for t in inputs
    )


def inputs_of(spelling: Spelling, cell: Cell, length: int) -> tuple[Tensor, ...]:
    """Rounded to the cell's dtype first, so that the float64 reference reads the same numbers."""
    base = cast(FAMILIES[spelling.family].inputs(cell.batch, length), cell.dtype, False)
    return cast(spelling.layout(*base), cell.dtype, cell.training)


def mark(inputs: tuple[Tensor, ...], cell: Cell) -> tuple[Tensor, ...]:
    """As in a model, only the batch and the lengths vary: heads and features are the weights', and those are static."""
    for tensor in inputs:
        for dim, size in enumerate(tensor.shape):
            if size not in (cell.batch, *LENGTHS, *(n - 8 for n in LENGTHS)):
                torch._dynamo.mark_static(tensor, dim)
    return inputs


def trace_both(fn: Any, calls: list[tuple[Tensor, ...]], grad: bool) -> tuple[Traced, list[Tensor]]:
    """Like `trace`, for one compiled function called several times, automatic dynamic shapes on."""
    traced, outputs = Traced(), []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        captured = capture(gm)
        if isinstance(captured, Refusal):
            traced.refusals.append(captured)
            return gm.forward
        program = Program(captured, needs_grad=needs_grad(inputs), verify=True).run(PIPELINE)
        traced.programs.append(program)
        return captured.forward

    torch._dynamo.reset()
    compiled = torch.compile(fn, backend=backend)
    with torch.set_grad_enabled(grad):
        outputs = [compiled(*call) for call in calls]
    return traced, outputs


def expected(spelling: Spelling, cell: Cell) -> str:
    """The family's record; of a single sample a load may be read without saying which."""
    canonical = FAMILIES[spelling.family].canonical
    return canonical.replace(r"\[b, ", r"\[(b, )?") if cell.batch == 1 else canonical


def gradients(output: Tensor, inputs: tuple[Tensor, ...], weight: Tensor) -> list[Tensor]:
    leaves = [t for t in inputs if t.requires_grad]
    return list(torch.autograd.grad(output, leaves, weight.to(output.dtype)))


def close(ours: Tensor, plain: Tensor, exact: Tensor, what: str) -> None:
    """Ours is as near to the float64 value as the plain function is, within a factor and a few roundings.

    A fused backward makes the weights anew from their row's log-sum-exp: about ten roundings were seen, and eighteen in
    the gradient of a temperature, which is a sum over all scores.
    """
    roundings = 24 if what.startswith("gradient") else 4
    limit = 2 * (plain.double() - exact).abs().max()
    limit = limit + roundings * torch.finfo(plain.dtype).eps * (1 + exact.abs().max())
    error = (ours.double() - exact).abs().max()
    assert ours.dtype == plain.dtype and ours.shape == plain.shape
    assert error <= limit, f"{what}: error {error:.3g}, limit {limit:.3g}"


def check_numbers(spelling: Spelling, cell: Cell, inputs: tuple[Tensor, ...], ours: Tensor) -> None:
    doubles = cast(inputs, torch.float64, cell.training)
    with torch.set_grad_enabled(cell.training):
        plain, exact = spelling.fn(*inputs), spelling.fn(*doubles)
    close(ours.detach(), plain.detach(), exact.detach(), "output")
    if cell.training:
        weight = torch.randn(plain.shape, generator=torch.Generator().manual_seed(2))
        triples = (gradients(o, i, weight) for o, i in ((ours, inputs), (plain, inputs), (exact, doubles)))
        for n, (a, b, c) in enumerate(zip(*triples, strict=True)):
            close(a, b, c, f"gradient of input {n}")


@pytest.mark.parametrize("spelling", ORDERED, ids=str)
def test_a_spelling_is_of_its_family(spelling: Spelling) -> None:
    """The plain function computes its family's formula."""
    family = FAMILIES[spelling.family]
    base = cast(family.inputs(2, 13), torch.float64, False)
    found = spelling.restore(spelling.fn(*spelling.layout(*base)))
    torch.testing.assert_close(found, family.reference(*base), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("spelling", "cell"), CASES)
def test_a_spelling_is_one_site_of_its_family(spelling: Spelling, cell: Cell) -> None:
    calls = [
        mark(inputs_of(spelling, cell, n), cell) for n in (LENGTHS if cell.shapes == "two lengths" else LENGTHS[:1])
    ]
    if cell.shapes == "two lengths":
        traced, outputs = trace_both(spelling.fn, calls, cell.training)
        assert len(traced.programs) == 2, "a length of its own, then any length"
    else:
        traced = trace(spelling.fn, *calls[0], dynamic=cell.shapes == "dynamic", grad=cell.training)
        outputs = [traced.output]
    for inputs, output in zip(calls, outputs, strict=True):
        check_numbers(spelling, cell, inputs, output)
    assert not traced.refusals, [str(r) for r in traced.refusals]
    for program in traced.programs:
        assert len(program.regions) == 1, [str(m) for m in program.misses]
        record = normalised(program.regions[0].site.canonical)
        assert re.fullmatch(expected(spelling, cell), record), record
    assert not traced.misses


@pytest.mark.parametrize("family", [name for name, f in FAMILIES.items() if ".+" in f.canonical])
def test_spellings_of_a_family_agree(family: str) -> None:
    """Where the family leaves a part of the record open, its spellings have the same one."""
    records = {}
    for spelling in ORDERED:
        if spelling.family == family:
            traced = trace(spelling.fn, *inputs_of(spelling, PLAINEST, LENGTHS[0]))
            records[spelling.name] = [normalised(site.canonical) for site in traced.sites]
    first = next(iter(records.values()))
    assert len(first) == 1 and all(record == first for record in records.values()), records
