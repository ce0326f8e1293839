"""From proved axes to an attention: which atom is a head, which a batch, and the tensors behind a repeat.

    q[b, h, i, d] · k[b, h, j, d] -> scores[b, h, i, j];  scores · v[b, h, j, e] -> out[b, h, i, e]

Rules, in order: `one_axis_of_keys`, `operands_agree`, `unrepeat`, `query_axis`, `heads_axis`. Which shared axis is
called a head and which a batch is a name, not a fact: any choice computes the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import replace

import torch
from torch.fx import Node

from attnopt.ir import Miss
from attnopt.patterns import Factor, Operand, RawTerm, Roles, scalar, value
from attnopt.patterns.layout import Atom, Dims, Space, is_one, shape_of
from attnopt.reasons import described

aten = torch.ops.aten
SCALED = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor)
# Views between a product and the projection behind it: rotary embeddings end the walk earlier.
DEPTH = 10


def flat(dims: Dims) -> list[Atom]:
    return [a for d in dims for a in d]


def axes_text(atoms: Iterable[Atom]) -> str:
    return "an axis of size " + " and ".join(sorted(str(a.size) for a in atoms))


def assign(
    space: Space, scores: Dims, q: Operand, k: Operand, v: Operand, out: Operand, keys: tuple[Atom, ...],
    varying: Set[Atom] = frozenset(),
) -> tuple[Roles, Operand, Operand, Operand, Operand] | Miss:  # fmt: skip
    """Roles of every axis and the operands in terms of them, K and V without their repeats.

    varying: the axes that a mask varies over.
    """
    for operand in (q, k, v):
        if any(isinstance(s, int) and s == 0 for s in shape_of(operand.node)):
            return Miss("q, k or v has a dimension of size 0, expected elements", code="empty-operand")
    k, v = unrepeat_pair(space, scores, keys, k, v)
    split_heads(space, q)
    for side in (k, v):
        split_heads(space, side)
    scores, keys = space.resolve(scores), space.atoms(keys)
    q, k, v, out = (replace(o, dims=space.resolve(o.dims)) for o in (q, k, v, out))
    in_q, in_k, in_v = (set(flat(o.dims)) for o in (q, k, v))
    if not set(keys) <= in_k or set(keys) & in_q:
        seen = "q has it too" if set(keys) <= in_k else "K lacks it"
        return Miss(f"the soft-max axis should be one of K alone: {seen}", code="keys-axis")
    if not set(keys) <= in_v:
        return Miss("V lacks the axis of the soft-max, expected one value for each key", code="values-axis")
    features = tuple(a for a in flat(q.dims) if a in in_k and a not in flat(scores))
    values = tuple(a for a in flat(v.dims) if a in flat(out.dims) and a not in flat(scores))
    shared = [a for a in flat(scores) if a in in_k and a not in keys]
    only_q = [a for a in flat(scores) if a in in_q and a not in in_k]
    if in_k - {*keys, *features, *shared} or in_q - {*features, *shared, *only_q} or in_v - {*keys, *values, *shared}:
        lone = {"q": in_q - {*features, *shared, *only_q}, "K": in_k - {*keys, *features, *shared}}
        lone["V"] = in_v - {*keys, *values, *shared}
        seen = ", ".join(f"{name} has {axes_text(atoms)}" for name, atoms in lone.items() if atoms)
        return Miss(f"{seen}, which no other operand shares as an attention does", code="axes-not-shared")
    if any(a not in in_q for a in shared):
        seen = axes_text([a for a in shared if a not in in_q])
        return Miss(f"K has {seen} that q lacks: one query is compared under several heads", code="key-axis-alone")
    if any(a not in in_v for a in shared):
        seen = axes_text([a for a in shared if a not in in_v])
        return Miss(f"V lacks {seen} that K has, expected the same batch and heads", code="value-axis-missing")
    queries = query_axis(scores, only_q, keys, {b for a in varying for b in space.atoms((a,))})
    group = tuple(a for a in only_q if a not in queries)
    batch, heads = heads_axis(space, scores, shared, q, features, group, queries)
    return Roles(batch, heads + group, len(group), queries, keys, features, values), q, k, v, out


def query_axis(
    scores: Dims, only_q: list[Atom], keys: tuple[Atom, ...], varying: Set[Atom] = frozenset()
) -> tuple[Atom, ...]:
    """The query positions among the axes that only q has: the one that the mask varies over, else that of the
    dimension next to the keys', else the last."""
    masked = [a for a in only_q if a in varying]
    if len(masked) == 1:
        return (masked[0],)
    at = next((n for n, d in enumerate(scores) if d and d[-1] in keys), len(scores) - 1)
    before = [a for a in scores[at - 1]] if at else []
    if at and not before:
        return ()
    found = [a for a in before if a in only_q]
    if not found:
        found = only_q[-1:]
    # A dimension that merges heads and positions: the positions are the inner part.
    return tuple(found[-1:])


def heads_axis(
    space: Space, scores: Dims, shared: list[Atom], q: Operand, features: tuple[Atom, ...], group: tuple[Atom, ...],
    queries: tuple[Atom, ...],
) -> tuple[tuple[Atom, ...], tuple[Atom, ...]]:  # fmt: skip
    """Split the axes that q and k share into batch and heads."""
    others = [d for d in scores if not any(a in queries or a in group for a in d) and (not d or d[0] in shared)]
    if len(scores) >= 4 and len(shared) <= 1 and not group:
        # (1, H, Sq, Sk) or (B, 1, Sq, Sk): the place tells which of the two is there.
        first = next((n for n, d in enumerate(scores) if d and d[0] in shared), None)
        if first == 0 and len(others) > 1:
            return tuple(shared), ()
        return (), tuple(shared)
    if len(scores) >= 4 and group and len(shared) == 1:
        # (B, heads, Sq, Sk) in any order of the three, or (1, KV heads, group, Sq, Sk).
        alone = shared[0] in scores[0] and len(scores) == 4
        return (tuple(shared), ()) if alone else ((), tuple(shared))
    if not shared:
        return (), ()
    if len(scores) < 4:
        alone = len(shared) == 1 and is_head(space, q, shared[0], features)
        return ((), tuple(shared)) if alone else (tuple(shared[:1]), tuple(shared[1:]))
    beside = [a for a in shared if any(a in d and any(f in d for f in features) for d in q.dims)]
    last = next(d for d in reversed(scores) if d and d[0] in shared)
    heads = tuple(beside or (a for a in shared if a in last))
    return tuple(a for a in shared if a not in heads), heads


def is_head(space: Space, operand: Operand, atom: Atom, features: tuple[Atom, ...]) -> bool:
    """Whether a tensor behind a view has four dimensions, the first of size one and `atom` alone in another, or has
    `atom` and the features in one dimension, as a projection leaves them."""
    node, dims = operand.node, operand.dims
    for _ in range(DEPTH):
        dims = space.resolve(dims)
        if len(dims) >= 4 and not dims[0] and (atom,) in dims:
            return True
        if any(atom in d and any(f in d for f in features) for d in dims):
            return True
        step = space.back(node, dims, casts=True)
        if step is None:
            return False
        node, dims = step
    return False


def unrepeat_pair(
    space: Space, scores: Dims, keys: tuple[Atom, ...], k: Operand, v: Operand
) -> tuple[Operand, Operand]:
    """K and V behind the same repeat over consecutive query heads, if both have one; else as they are."""
    k_base, v_base = unrepeat(space, k), unrepeat(space, v)
    if k_base is None or v_base is None:
        return k, v
    held, lost = (
        [set(flat(space.resolve(base.dims))) for base in (k_base, v_base)],
        [set(flat(space.resolve(o.dims))) - set(flat(space.resolve(b.dims))) for o, b in ((k, k_base), (v, v_base))],
    )
    order = [a for a in flat(space.resolve(scores)) if a not in space.atoms(keys)]
    first = next((n for n, a in enumerate(order) if a in lost[0]), len(order))
    # What is lost must be the inner part of the heads: query head h reads KV head h // r.
    consecutive = not any(a in held[0] for a in order[first:])
    return (k_base, v_base) if lost[0] == lost[1] and consecutive else (k, v)


def unrepeat(space: Space, operand: Operand) -> Operand | None:
    """The tensor behind an expand or a repeat: the first on the way back that holds fewer axes."""
    node, dims, found = operand.node, operand.dims, None
    for _ in range(DEPTH):
        step = space.back(node, dims)
        if step is None:
            break
        before = set(flat(space.resolve(dims)))
        node, dims = step
        if set(flat(space.resolve(dims))) < before:
            found = Operand(node, dims)
    return found


def split_heads(space: Space, operand: Operand) -> None:
    """Look behind views for where a merged axis (batch times heads) is two: it is split for everyone."""
    node, dims = operand.node, operand.dims
    for _ in range(DEPTH):
        step = space.back(node, dims, casts=True)
        if step is None:
            return
        node, dims = step


def tidy(space: Space, operand: Operand, wanted: tuple[tuple[Atom, ...], ...]) -> Operand:
    """The nearest node behind transposes whose dimensions are already `wanted`; else the operand itself."""
    node, dims = operand.node, operand.dims
    for _ in range(DEPTH):
        if space.resolve(dims) == wanted and len(dims) == len(wanted):
            return Operand(node, wanted)
        step = space.back(node, dims)
        if step is None:
            break
        node, dims = step
    return operand


def unscaled(space: Space, operand: Operand) -> tuple[Operand, float]:
    """q or k behind a constant factor, and the factor: it belongs to the scale."""
    node, dims = operand.node, operand.dims
    for _ in range(DEPTH):
        factor = scalar(node.args[1]) if node.target in SCALED and len(node.args) == 2 else None
        if factor is not None and factor != 0 and isinstance(node.args[0], Node):
            source = value(node.args[0])
            if source is not None and source.dtype == value(node).dtype:  # type: ignore[union-attr]
                inner, more = unscaled(space, Operand(node.args[0], dims))
                return inner, more * (1 / factor if node.target == aten.div.Tensor else factor)
        step = space.back(node, dims)
        if step is None:
            return operand, 1.0
        node, dims = step
    return operand, 1.0


def before_widening(space: Space, operand: Operand, dtype: torch.dtype) -> Operand:
    """What a cast to a wider type reads, where that has `dtype`; else the operand itself.

    The products of the narrow values are the same ones, and every kernel sums them in float32.
    """
    node, dims = operand.node, operand.dims
    for _ in range(DEPTH):
        held = value(node)
        if held is None or torch.promote_types(held.dtype, dtype) != held.dtype:
            break
        if held.dtype == dtype:
            return Operand(node, dims)
        step = space.back(node, dims, casts=True)
        if step is None:
            break
        node, dims = step
    return operand


def unfoldable(factor: Factor, roles: Roles, q: Operand) -> Miss | None:
    """Why a factor of the scores cannot be one of q; None where it can."""
    held, seen = set(term_atoms(factor)), f"the scores are multiplied by {described(factor.node)}"
    if held - {*roles.batch, *roles.heads, *roles.queries}:
        return Miss(f"{seen}, which varies over an axis that q lacks", code="score-times-tensor")
    if any(held & set(role) and not set(role) <= held for role in (roles.batch, roles.heads, roles.queries)):
        return Miss(f"{seen}, which varies over a part of q's axes, expected all or none", code="score-times-tensor")
    if value(q.node).dtype == torch.float16:  # type: ignore[union-attr]
        return Miss(f"{seen}, and float16 may not hold it times q", code="score-times-tensor")
    return None


def term_atoms(term: RawTerm | Factor) -> list[Atom]:
    """The axes that a mask operand or a factor varies over."""
    sizes = shape_of(term.node)
    tail = term.scores[len(term.scores) - len(sizes) :]
    return [a for s, d in zip(sizes, tail, strict=True) if not is_one(s) for a in d]


__all__ = ["assign", "flat", "term_atoms", "tidy", "unfoldable", "unscaled"]
