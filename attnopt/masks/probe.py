"""Compare what was recovered of a mask and bias with the subgraph itself, at random positions.

terms  --(the graph's own operations)-->  kept or masked, and the number added, at (b, h, i, j)
meaning --------------------------------> the same                                          or a VerificationError
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from attnopt.errors import VerificationError
from attnopt.masks.evaluate import Evaluation
from attnopt.masks.terms import Meaning, Term
from attnopt.masks.values import MASKED

POINTS = 512
# Relative error of a bias that the graph computes in its own dtype and the record in double precision.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def positions(extents: Mapping[str, int], generator: torch.Generator) -> dict[str, Tensor]:
    """Every position where there are few, else random ones of which half lie near the diagonal."""
    sizes = [extents[v] for v in "bhij"]
    if torch.Size(sizes).numel() <= 4 * POINTS:
        grids = torch.meshgrid(*(torch.arange(s) for s in sizes), indexing="ij")
        return {v: grid.reshape(-1) for v, grid in zip("bhij", grids, strict=True)}
    found = {v: torch.randint(0, extents[v], (POINTS,), generator=generator) for v in "bhij"}
    near = found["i"] + extents["j"] - extents["i"] + torch.randint(-2, 3, (POINTS,), generator=generator)
    half = torch.arange(POINTS) < POINTS // 2
    found["j"] = torch.where(half, near.clamp(0, extents["j"] - 1), found["j"])
    return found


def with_parts(position: Mapping[str, Tensor], extents: Mapping[str, int]) -> dict[str, Tensor]:
    """The positions, and those along the parts of an axis that has several: h0 and h1 of h, the outer one first."""
    found = dict(position)
    for name, at in position.items():
        parts = sorted((v for v in extents if v[0] == name and v[1:].isdecimal()), key=lambda v: int(v[1:]))
        for part in reversed(parts):
            found[part], at = at % extents[part], at // extents[part]
    return found


def probe(
    meaning: Meaning,
    terms: Sequence[Term],
    extents: Mapping[str, int],
    evaluate: Callable[[Node], Tensor],
    *,
    causal: bool = False,
    size: Callable[[Any], int] | None = None,
    seed: int = 0,
) -> None:
    """Raise VerificationError where `meaning` says something else than the graph.

    extents: {"b": B, "h": H, "i": Sq, "j": Sk} as plain ints, and those of the parts of an axis, {"h0": 2, "h1": 4}.
    evaluate: the value of any node of the graph, all from the same inputs (data that an assumption of the meaning
    speaks of has to keep to it). size: of a symbolic size.
    """
    position = with_parts(positions(extents, torch.Generator().manual_seed(seed)), extents)
    evaluation = Evaluation(position, lambda node: evaluate(node).cpu(), size)
    keep = position["j"] <= position["i"] if causal else torch.ones_like(position["i"], dtype=torch.bool)
    added = torch.zeros(keep.shape, dtype=torch.float64)
    scale, limit = torch.ones(keep.shape, dtype=torch.float64), 1e-9
    for term in terms:
        value = value_at(term, evaluation)
        if term.kind != "add":
            keep = keep & (value if term.kind == "keep" else ~value)
            continue
        value = value.double() * term.factor
        keep = keep & ~(value <= MASKED)
        added, scale = added + value, scale.maximum(value.abs())
        limit = max(limit, TOLERANCE.get(evaluate(term.node).dtype, 1e-4))
    claimed = evaluation.predicate(meaning.keep)
    total = evaluation.sum(meaning.added)
    # An operand that was left whole masks by itself.
    claimed = claimed & ~(total <= MASKED)
    wrong = claimed != keep
    wrong |= keep & ~((total - added).abs() <= limit * scale)
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0, 0])
        where = ", ".join(f"{v}={int(position[v][at])}" for v in "bhij")
        said, is_ = ("kept" if bool(x[at]) else "masked" for x in (claimed, keep))
        raise VerificationError(
            f"the mask recovered as '{meaning.mask}' with bias '{meaning.bias}' is {said}, {float(total[at]):g} at "
            f"{where}; the graph has {is_}, {float(added[at]):g}"
        )


def value_at(term: Term, evaluation: Evaluation) -> Tensor:
    """The operand at the positions, broadcast as the scores broadcast it."""
    value = evaluation.look(term.node)
    index = [evaluation.expression(e) for e in term.index[len(term.index) - value.ndim :]]
    one = [x * 0 if size == 1 else x for x, size in zip(index, value.shape, strict=True)]
    return value[tuple(one)] if one else value.expand(next(iter(evaluation.position.values())).shape)
