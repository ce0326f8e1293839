"""The value of expressions, predicates and sums at given positions: what a record claims, computed.

For the probe, the reference target and the tests; nothing that a model runs by default goes through here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from attnopt.masks.expressions import Affine, Call, Distance, Quotient, Read, Remainder
from attnopt.masks.predicates import AtLeastZero, BoolLoad, Conjunction, Literal
from attnopt.masks.values import Sum


class Evaluation:
    """Positions and data: `position` maps b, h, i, j to integer tensors of one shape, `look` a node to its value.

    size: the value of a symbolic size; only asked where there is one.
    """

    def __init__(
        self, position: Mapping[str, Tensor], look: Callable[[Any], Tensor], size: Callable[[Any], int] | None = None
    ) -> None:
        self.position, self.look, self.size = position, look, size

    def expression(self, value: Affine) -> Tensor:
        total = self._constant(value.constant)
        for atom, c in value.terms:
            total = total + self.atom(atom) * self._constant(c)
        return total.expand(next(iter(self.position.values())).shape)

    def _constant(self, value: Any) -> Tensor:
        if not isinstance(value, int):
            assert self.size is not None, f"the value of {value} is not known"
            value = self.size(value)
        return torch.tensor(value, device=self._device)

    @property
    def _device(self) -> torch.device:
        return next(iter(self.position.values())).device

    def atom(self, atom: Any) -> Tensor:
        if isinstance(atom, str):
            return self.position[atom]
        if isinstance(atom, (Read, Call)):
            return self.read(atom)
        if isinstance(atom, Quotient):
            return self.expression(atom.argument) // atom.divisor
        if isinstance(atom, Remainder):
            return self.expression(atom.argument) % atom.divisor
        if isinstance(atom, Distance):
            return self.expression(atom.argument).abs()
        return self._constant(atom)

    def read(self, load: Read | Call | BoolLoad) -> Tensor:
        """The data at the load's index; where that leaves the tensor, what is read does not matter."""
        value = self.look(load.node)
        index = [self.expression(e) for e in load.index]
        inside = [x.clamp(-size, size - 1) for x, size in zip(index, value.shape, strict=True)]
        return value[tuple(inside)]

    def literal(self, literal: Literal) -> Tensor:
        if isinstance(literal, BoolLoad):
            return self.read(literal).bool() ^ literal.negated
        value = self.expression(literal.expression)
        return value >= 0 if isinstance(literal, AtLeastZero) else (value == 0) ^ literal.negated

    def predicate(self, predicate: Conjunction) -> Tensor:
        keep = torch.ones(next(iter(self.position.values())).shape, dtype=torch.bool, device=self._device)
        for clause in predicate.clauses:
            holds = torch.zeros_like(keep)
            for literal in clause:
                holds = holds | self.literal(literal)
            keep = keep & holds
        return keep

    def sum(self, value: Sum) -> Tensor:
        total = torch.zeros(next(iter(self.position.values())).shape, dtype=torch.float64, device=self._device)
        for monomial, c in value.terms:
            product = torch.full_like(total, c)
            for atom in monomial:
                product = product * self.atom(atom).double()
            total = total + product
        return total
