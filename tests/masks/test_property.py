"""Random masks in random spellings: recovered to what the graph computes, and equal masks to one record."""

from __future__ import annotations

import operator
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from masks.recovering import SK, SQ, B, meaning_of

INPUTS = {
    "pad": torch.rand(B, SK, generator=torch.Generator().manual_seed(1)) > 0.4,
    "doc": torch.randint(0, 3, (B, SK), generator=torch.Generator().manual_seed(2)),
    "prefix": torch.tensor([2, 5]),
    "length": torch.tensor(2),
    "pairs": torch.rand(B, 1, SQ, SK, generator=torch.Generator().manual_seed(3)) > 0.3,
}
# A mask is a tree: ("lower", 1), ("not", tree), ("and", (tree, tree)) …
LEAVES = st.one_of(
    st.tuples(st.just("lower"), st.integers(-2, 3)),
    st.tuples(st.just("upper"), st.integers(-1, 4)),
    st.tuples(st.just("chunk"), st.integers(2, 4)),
    st.tuples(st.just("near"), st.integers(1, 4)),
    st.tuples(st.just("first"), st.integers(1, 4)),
    st.tuples(st.just("cached"), st.integers(0, 1)),
    *(st.tuples(st.just(name), st.just(0)) for name in ("pad", "rows", "doc", "prefix")),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.tuples(st.just("not"), inner),
        st.tuples(st.sampled_from(("and", "or")), st.tuples(inner, inner)),
    ),
    max_leaves=4,
)
SPELLINGS = st.lists(st.integers(0, 11), min_size=24, max_size=24)
QUICK = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)


class Writer:
    """Writes a tree with torch's operations; `choices` picks the spelling of every node in turn."""

    def __init__(self, choices: list[int], data: dict[str, torch.Tensor]) -> None:
        self.choices, self.data, self.at = choices, data, 0

    def pick(self, *spellings: Any) -> Any:
        self.at += 1
        return spellings[self.choices[self.at % len(self.choices)] % len(spellings)]()

    def indices(self) -> tuple[torch.Tensor, torch.Tensor]:
        i, j = torch.arange(SQ), torch.arange(SK)
        return self.pick(
            lambda: (i[:, None], j[None, :]),
            lambda: (i.view(1, 1, SQ, 1), j.view(1, 1, 1, SK)),
            lambda: (torch.arange(3, SQ + 3)[:, None] - 3, torch.arange(2 * SK)[:SK]),
            lambda: (i.repeat(2, 1)[1][:, None], torch.cat([j[:4], j[4:]])),
            lambda: (torch.ones(SQ, dtype=torch.long).cumsum(0)[:, None] - 1, j.expand(SQ, SK)),
            lambda: (torch.arange(SQ * SK).reshape(SQ, SK) // SK, torch.arange(SQ * SK).reshape(SQ, SK) % SK),
        )

    def at_least(self, a: Any, b: Any) -> torch.Tensor:
        """a >= b"""
        return self.pick(
            lambda: a >= b,
            lambda: b <= a,
            lambda: ~(a < b),
            lambda: torch.logical_not(b > a),
            lambda: a - b + 1 > 0,
            lambda: torch.ge(2 * a - 2 * b, -1),
            lambda: torch.where(a < b, 0.0, 1.0) > 0.5,
            lambda: (b - a <= 0).to(torch.int32).bool(),
            lambda: torch.zeros(1).masked_fill(b > a, -1e9) == 0,
            lambda: (a >= b).float() * 2 == 2,
        )

    def join(self, a: torch.Tensor, b: torch.Tensor, both: bool) -> torch.Tensor:
        plain, other = (operator.and_, operator.or_) if both else (operator.or_, operator.and_)
        return self.pick(
            lambda: plain(a, b),
            lambda: plain(b, a),
            lambda: ~other(~a, ~b),
            lambda: torch.where(a, b, False) if both else torch.where(a, True, b),
            lambda: (a.masked_fill(~b, False)) if both else a.masked_fill(b, True),
            lambda: (torch.logical_and if both else torch.logical_or)(a, b),
            lambda: a * b if both else a + b,
        )

    def write(self, tree: Any) -> torch.Tensor:
        kind, value = tree
        i, j = self.indices()
        if kind == "not":
            return ~self.write(value)
        if kind in ("and", "or"):
            spread = [self.write(part).expand(B, 1, SQ, SK) for part in value]
            return self.join(*spread, kind == "and")
        data = self.data
        if kind == "lower":
            return self.pick(lambda: self.at_least(i - j, value), lambda: torch.ones(SQ, SK).tril(-value) == 1)
        if kind == "upper":
            return self.pick(
                lambda: self.at_least(value, i - j), lambda: torch.ones(SQ, SK, dtype=torch.bool).triu(-value)
            )
        if kind == "chunk":
            return self.pick(
                lambda: i // value == j // value,
                lambda: torch.div(i, value, rounding_mode="floor") - torch.div(j, value, rounding_mode="floor") == 0,
            )
        if kind == "near":
            return self.pick(lambda: (i - j).abs() < value, lambda: self.at_least(value - 1, (j - i).abs()))
        if kind == "first":
            return self.at_least(value, j + i * 0)
        if kind == "cached":
            return self.at_least(i + data["length"], j + value)
        if kind == "prefix":
            return self.pick(
                lambda: j < data["prefix"].view(B, 1, 1, 1), lambda: data["prefix"][:, None, None, None] - j >= 1
            )
        if kind == "doc":
            rows, columns = data["doc"][:, None, :SQ, None], data["doc"][:, None, None, :]
            return self.pick(lambda: rows == columns, lambda: ~(rows - columns != 0), lambda: (columns - rows).eq(0))
        if kind == "rows":
            return data["pad"][:, None, :SQ, None]
        return self.pick(
            lambda: data["pad"][:, None, None, :],
            lambda: data["pad"].long()[:, None, None] != 0,
            lambda: torch.where(data["pad"].view(B, 1, 1, SK), 0.0, float("-inf")) == 0,
        )


def written(tree: Any, choices: list[int], form: int) -> Any:
    """A function that builds the mask: as booleans, added, or filled."""

    def build(*values: torch.Tensor) -> torch.Tensor:
        keep = Writer(choices, dict(zip(INPUTS, values, strict=True))).write(tree).expand(B, 1, SQ, SK)
        if form == 0:
            return keep
        if form == 1:
            return torch.where(keep, 0.0, float("-inf"))
        if form == 2:
            return torch.zeros(B, 1, SQ, SK).masked_fill(~keep, torch.finfo(torch.float32).min)
        return (1.0 - keep.float()) * -10000.0

    return build


@QUICK
@given(TREES, SPELLINGS, st.integers(0, 3))
def test_what_is_recovered_is_what_the_graph_computes(tree, choices, form):
    """Every position is compared; nothing of the algebra may end as data over pairs."""
    meaning = meaning_of(written(tree, choices, form), *INPUTS.values())
    assert meaning.bias is None and not meaning.mask.opaque, (tree, str(meaning.mask))


@QUICK
@given(TREES, SPELLINGS, SPELLINGS)
def test_equal_masks_give_equal_records(tree, one, other):
    first, second = (meaning_of(written(tree, c, 0), *INPUTS.values()).mask for c in (one, other))
    assert first == second, tree


@QUICK
@given(TREES, SPELLINGS, SPELLINGS)
def test_data_over_pairs_leaves_the_rest_closed(tree, one, other):
    """``closed and data``: the data alone is opaque, the rest is as it is without it."""

    def build(*values: torch.Tensor) -> torch.Tensor:
        return written(tree, one, 0)(*values) & values[-1]

    plain = meaning_of(written(tree, other, 0), *INPUTS.values()).mask
    mask = meaning_of(build, *INPUTS.values()).mask
    if plain.terms == ("none",):
        assert mask == plain
    else:
        assert [x.dims for x in mask.opaque] == [("b", "i", "j")]
        assert (mask.causal, mask.window, mask.offset, mask.chunk, mask.loads, mask.terms) == (
            plain.causal, plain.window, plain.offset, plain.chunk, plain.loads, plain.terms,
        )  # fmt: skip
