"""What a pattern hands over to have its mask understood, and what it gets back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch.fx import Node

from attnopt.ir import Bias, Mask
from attnopt.masks.expressions import Affine


@dataclass(frozen=True)
class Term:
    """One operand of the scores' mask or bias.

    kind: "keep" (bool, true keeps), "drop" (bool, true drops) or "add" (added to the scaled, soft-capped score).
    index: the position read in `node`'s broadcast shape, one expression over b, h, i, j for each dimension of the
    scores where the term meets them (a score laid out as (B·H, Sq, Sk) is read at (h + H·b, i, j)).
    fill: what a dropped score becomes (a keep or drop term of a written-out attention); None for an SDPA mask.
    factor: what the term is multiplied by before the soft-max (a bias added before the scale).
    """

    kind: Literal["keep", "drop", "add"]
    node: Node
    index: tuple[Affine, ...]
    fill: float | None = None
    factor: float = 1.0


@dataclass(frozen=True)
class Meaning:
    """What the terms of one attention mean together.

    nodes: the fx node behind every Load of `mask` and `bias`, by the Load's name.
    keep, added: the predicate behind `mask` and the sum behind `bias`, evaluated by tests and by the probe; their types
    are the algebra's.
    assumptions: what must hold of the data for the record to be exact, e.g. ``attention_mask[b, j] is 0 or 1``.
    """

    mask: Mask
    bias: Bias | None = None
    nodes: dict[str, Node] = field(default_factory=dict)
    keep: Any = None
    added: Any = None
    assumptions: tuple[str, ...] = ()
