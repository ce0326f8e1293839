"""Random predicates and sums: printed as a kernel's source they say what the algebra says, and their live ranges hold.

The printed text is run with integers that divide as Triton's do, towards zero, so that a plain // of what may be
negative is seen.
"""

from __future__ import annotations

import operator
import random
from typing import Any

import pytest
import torch
from forms import CASES

from attnopt.codegen.equal_runs import equal_runs
from attnopt.masks.evaluate import Evaluation
from attnopt.masks.expressions import Affine, Distance, Quotient, Read, Remainder
from attnopt.masks.kernel_form import Form, NoForm, Slot, form_from, form_of, positions_of
from attnopt.masks.kernel_text import KernelText
from attnopt.masks.live_range import Bound, Extreme, live_range
from attnopt.masks.predicates import FALSE, TRUE, AtLeastZero, BoolLoad, Conjunction, EqualZero
from attnopt.masks.values import Sum

B, H, SQ, SK = 2, 3, 17, 23
SIZES = [-5, 4]
GENERATOR = torch.Generator().manual_seed(0)
DATA = [
    torch.randint(-6, 7, (B, SK), generator=GENERATOR),
    torch.rand(B, SK, generator=GENERATOR) > 0.4,
    torch.randn(H, generator=GENERATOR),
]
POSITION = {
    name: torch.arange(size).view([-1 if d == n else 1 for d in range(4)]).expand(B, H, SQ, SK)
    for n, (name, size) in enumerate(zip("bhij", (B, H, SQ, SK), strict=True))
} | {f"s{n}": torch.full((B, H, SQ, SK), size) for n, size in enumerate(SIZES)}


class Machine:
    """Integers and booleans of a GPU: quotients and remainders are rounded towards zero."""

    def __init__(self, value: Any) -> None:
        self.value = value.value if isinstance(value, Machine) else value

    def __floordiv__(self, other: int) -> Machine:
        return Machine(torch.div(self.value, other, rounding_mode="trunc"))

    def __mod__(self, other: int) -> Machine:
        return Machine(torch.fmod(self.value, other))

    def __invert__(self) -> Machine:
        return Machine(~self.value)

    def __neg__(self) -> Machine:
        return Machine(-self.value)


def lifted(name: str) -> Any:
    def apply(self: Machine, other: Any) -> Machine:
        return Machine(getattr(operator, name)(self.value, other.value if isinstance(other, Machine) else other))

    return apply


for plain in ("add", "sub", "mul", "rshift", "and_", "or_", "ge", "le", "lt", "eq", "ne"):
    setattr(Machine, f"__{plain.strip('_')}__", lifted(plain))
for swapped, own in (("radd", "add"), ("rmul", "mul")):
    setattr(Machine, f"__{swapped}__", lifted(own))
Machine.__rsub__ = lambda self, other: Machine(other - self.value)  # type: ignore[attr-defined]


class Language:
    """Of ``tl`` what printed text uses."""

    abs = staticmethod(lambda x: Machine(x.value.abs()))


class Writer:
    """Random algebra over i, j, b, h, two sizes and data."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def expression(self, depth: int = 2) -> Affine:
        total = Affine((), self.random.randint(-7, 7))
        for _ in range(self.random.randint(1, 2)):
            total = total + Affine.var(self.atom(depth)) * self.random.choice((-3, -2, -1, 1, 1, 2))
        return total

    def atom(self, depth: int) -> Any:
        kind = self.random.randint(0, 8 if depth else 4)
        if kind < 4:
            return self.random.choice(("i", "j", "j", "b", "h", "s0", "s1"))
        if kind == 4:
            return Read(Slot(0, "int64"), (Affine.var("b"), Affine.var(self.random.choice("ij"))))
        inner = self.expression(depth - 1)
        if kind == 8:
            return Distance(inner)
        return (Quotient if kind < 7 else Remainder)(inner, self.random.choice((2, 3, 5, 8)))

    def literal(self) -> Any:
        kind = self.random.randint(0, 7)
        if kind < 5:
            return AtLeastZero(self.expression())
        if kind < 7:
            return EqualZero(self.expression(), kind == 6)
        index = (Affine.var("b"), Affine.var(self.random.choice("ij")))
        return BoolLoad(Slot(1, "bool"), index, self.random.random() < 0.5)

    def predicate(self) -> Conjunction:
        clauses = [[self.literal() for _ in range(self.random.choice((1, 1, 2)))] for _ in range(2)]
        return Conjunction(frozenset(map(frozenset, clauses)))

    def bounds(self) -> Conjunction:
        """Clauses of the kinds that bound keys by positions."""
        clauses = []
        for _ in range(self.random.randint(1, 3)):
            clause = []
            for _ in range(self.random.choice((1, 1, 2))):
                sign, size = self.random.choice((-1, 1)), self.random.choice((1, 1, 2))
                value = Affine.of({"j": sign * size}, self.random.randint(-4, 12))
                if self.random.random() < 0.3:
                    value = Affine.var(Quotient(Affine.var("j") + self.random.randint(0, 3), 4)) * sign
                other = self.random.choice(
                    ("i", "i", Quotient(Affine.var("i"), 5), "s1", Remainder(Affine.var("i"), 3))
                )
                value = value + Affine.var(other) * self.random.choice((-sign, -sign, sign))
                clause.append(EqualZero(value) if self.random.random() < 0.15 else AtLeastZero(value))
            clauses.append(frozenset(clause))
        return Conjunction(frozenset(clauses))


def machine(form: Form, names: dict[Read, str], evaluation: Evaluation) -> dict[str, Any]:
    held: dict[str, Any] = {name: Machine(x) for name, x in POSITION.items()}
    return held | {name: Machine(evaluation.read(read)) for read, name in names.items()} | {"tl": Language}


def run(text: str, names: dict[str, Any]) -> torch.Tensor:
    found = eval(text, {"__builtins__": {}}, names)
    return found.value if isinstance(found, Machine) else torch.tensor(found)


@pytest.mark.parametrize("seed", range(60))
def test_a_printed_predicate_is_the_predicate(seed: int) -> None:
    form = Form(Writer(seed).predicate())
    assert form_from(form.text) == form
    evaluation = Evaluation(POSITION, lambda slot: DATA[slot.number])
    names = {read: f"read{n}" for n, read in enumerate(form.reads)}
    held, text = machine(form, names, evaluation), KernelText(names)
    keep = torch.ones(B, H, SQ, SK, dtype=torch.bool)
    for clause in form.clauses:
        keep &= run(" | ".join(f"({part})" for part in text.clause(clause)), held)
    assert torch.equal(keep, evaluation.predicate(form.keep)), form


@pytest.mark.parametrize("seed", range(20))
def test_a_printed_sum_is_the_sum(seed: int) -> None:
    writer, slope = Writer(seed), Read(Slot(2, "float32"), (Affine.var("h"),))
    added = Sum.of({(slope, writer.atom(1)): -0.5, (writer.atom(2), "j"): 1.0, (writer.atom(0),): 2.0, (): 3.0})
    form = Form(TRUE, added)
    assert form_from(form.text) == form
    evaluation = Evaluation(POSITION, lambda slot: DATA[slot.number])
    names = {read: f"read{n}" for n, read in enumerate(form.reads)}
    held = machine(form, names, evaluation)
    total = torch.zeros(B, H, SQ, SK, dtype=torch.float64)
    for sign, text in KernelText(names).sum(added, "1.0"):
        total = total + (1 if sign == "+" else -1) * run(text, held)
    assert torch.allclose(total, evaluation.sum(added), atol=1e-4), form


def bound_value(bound: Bound | None, first: int, last: int, otherwise: int, more: dict[str, int] | None = None) -> int:
    if bound is None:
        return otherwise
    if isinstance(bound, Extreme):
        values = [bound_value(part, first, last, otherwise, more) for part in bound.of]
        return max(values) if bound.kind == "max" else min(values)
    named = {"first": first, "last": last, "b": 0, "h": 0, **(more or {})}
    position = {name: torch.tensor(x) for name, x in named.items()}
    position |= {f"s{n}": torch.tensor(size) for n, size in enumerate(SIZES)}
    return int(Evaluation(position, lambda slot: DATA[slot.number]).expression(bound))


def check_range(form: Form, keep: torch.Tensor) -> tuple[int, int]:
    """Keys outside the live range, and keys kept whole, over all tiles; AssertionError where the range is wrong."""
    live, outside, inside = live_range(form), 0, 0
    for first in range(0, keep.shape[0], 4):
        rows = keep[first : first + 4]
        last, count = first + len(rows) - 1, keep.shape[1]
        low, high = bound_value(live.live.low, first, last, 0), bound_value(live.live.high, first, last, count)
        assert not rows[:, : max(low, 0)].any() and not rows[:, max(high, 0) :].any(), (form, first)
        outside += count - len(range(max(low, 0), min(high, count)))
        if live.gap is not None:
            a, b = (bound_value(x, first, last, 0) for x in (live.gap.low, live.gap.high))
            assert not rows[:, max(a, 0) : max(b, 0)].any(), (form, first)
            outside += len(range(max(a, 0), min(b, count)))
        if live.whole is not None:
            a, b = bound_value(live.whole.low, first, last, 0), bound_value(live.whole.high, first, last, count)
            assert rows[:, max(a, 0) : max(b, 0)].all(), (form, first)
            inside += len(range(max(a, 0), min(b, count)))
    return outside, inside


def test_live_ranges_hold_and_are_of_use() -> None:
    counts = []
    for seed in range(200):
        form = Form(Writer(seed).bounds())
        keep = Evaluation(POSITION, lambda slot: DATA[slot.number]).predicate(form.keep)[0, 0]
        counts.append(check_range(form, keep))
    assert sum(out > 0 for out, _ in counts) > 60 and sum(whole > 0 for _, whole in counts) > 60


@pytest.mark.parametrize(
    ("name", "dead", "whole"),
    [
        # Of 64 rows in tiles of 4 against 64 keys: keys that no row keeps, and keys that every row keeps, per tile.
        ("causal, soft-capped", 60 * 16 // 2, 64 * 15 // 2 + 16),
        ("both sides", None, None),
        ("first keys and a window, sink of a head", None, None),
    ],
)
def test_ranges_of_common_masks_are_tight(name: str, dead: int | None, whole: int | None) -> None:
    form = CASES[name].form
    i, j = torch.arange(64)[:, None].expand(64, 64), torch.arange(64).expand(64, 64)
    keep = Evaluation({"i": i, "j": j}, lambda slot: DATA[slot.number]).predicate(form.keep)
    found = check_range(form, keep)
    tiles = keep.view(16, 4, 64)
    lost = int((~tiles.any(1)).sum())
    assert found[0] == lost if dead is None else found[0] == lost == dead
    # One interval of those kept whole: the first keys, below the window, are not in it.
    kept = int(tiles.all(1).sum())
    if "first keys" not in name:
        assert found[1] == kept if whole is None else found[1] == kept == whole


@pytest.mark.parametrize("causal", [True, False])
def test_ranges_of_documents_are_tight(causal: bool) -> None:
    """Side by side, the first and the last keys of the rows' documents are all there is to know."""
    ids = torch.randint(0, 9, (64,), generator=GENERATOR).sort().values
    i, j = torch.arange(64)[:, None], torch.arange(64)
    keep = (ids[:, None] == ids) & ((j <= i) if causal else torch.ones(64, 64, dtype=torch.bool))
    clause = CASES["documents in any order, both sides"].form.keep
    live = live_range(Form(CASES["causal, soft-capped"].form.keep & clause if causal else clause))
    runs = dict(zip(("first", "last", "whole"), equal_runs(ids), strict=True))
    for first in range(0, 64, 4):
        rows, tile = keep[first : first + 4], slice(first, first + 4)
        ends = {"first": torch.amin, "last": torch.amax, "whole": torch.amax}
        more = {f"t0_{name}": int(reduce(runs[name][tile])) for name, reduce in ends.items()}
        low, high = (bound_value(x, first, first + 3, 64, more) for x in (live.live.low, live.live.high))
        assert [low, high - 1] == [f(torch.nonzero(rows.any(0))).item() for f in (torch.amin, torch.amax)]
        start, end = (bound_value(x, first, first + 3, 64, more) for x in (live.whole.low, live.whole.high))
        whole = rows.all(0) & (j <= first)
        assert whole[start:end].all() and int(whole.sum()) == max(end - start, 0)


def test_parts_of_an_axis_are_named_by_the_whole() -> None:
    names = positions_of({"b": [("b", 2)], "h": [("h0", 2), ("h1", 3), ("h2", 4)], "i": [], "j": [("j", 5)]})
    at = Evaluation({"h": torch.arange(24)}, lambda slot: slot)
    found = torch.stack([at.expression(names[f"h{n}"]) for n in range(3)])
    assert torch.equal(found, torch.cartesian_prod(*(torch.arange(n) for n in (2, 3, 4))).T)
    with pytest.raises(NoForm, match="run time"):
        positions_of({"h": [("h0", 2), ("h1", None)]})


def test_what_no_kernel_gets_is_named() -> None:
    names = positions_of({})
    with pytest.raises(NoForm, match="no key"):
        form_of(FALSE, Sum(), names)
    with pytest.raises(NoForm, match="varies over t1"):
        form_of(Conjunction(frozenset({frozenset({AtLeastZero(Affine.var("t1"))})})), Sum(), names)
