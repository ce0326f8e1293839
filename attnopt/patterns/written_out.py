"""Attention written out: product -> scale, soft-cap, mask, bias, sink in any order that means the same -> softmax ->
product, in any layout.

Anchored at the soft-max, whose axis is by definition the keys'. Forward through casts, views and inactive dropout to
the product that sums over just that axis; backward through the rules of `scores.Walk` to the product that made it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import Node

from attnopt.ir import Miss
from attnopt.patterns import Match, Operand, RawTerm, inactive_dropout, scalar, shape_of, value
from attnopt.patterns.constants import zero_or_one
from attnopt.patterns.layout import CASTS, COPIES, Atom, Dims, Space, same
from attnopt.patterns.product import Product, operands_of, product_of, result_of
from attnopt.patterns.roles import assign, before_widening, term_atoms, tidy, unfoldable, unscaled
from attnopt.patterns.scores import Walk, activations, carries, leads_back, obstacle, product_behind
from attnopt.reasons import located
from attnopt.registry import PATTERNS

aten = torch.ops.aten
SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)


class Forward:
    """From the weights to their product with V, `towards`, with every node on the way."""

    def __init__(
        self, space: Space, keys: tuple[Atom, ...], extra: tuple[Atom, ...], first: bool, towards: Node
    ) -> None:
        self.space, self.keys, self.extra, self.first, self.towards = space, keys, extra, first, towards
        self.inner: list[Node] = []
        self.read: list[Node] = []
        self.terms: list[RawTerm] = []

    def run(self, node: Node, dims: Dims) -> tuple[Product, Node, Dims] | Miss:
        """The product, the operand of it that holds the weights, and that operand's dims."""
        while True:
            arrivals = {u: products_after(u) for u in node.users}
            onward = [u for u, found in arrivals.items() if self.towards in found]
            if len(onward) > 1:
                return Miss("the weights are multiplied with themselves, expected with V", code="weights-squared")
            (user,) = onward
            tests = [u for u in node.users if u.target == aten.isnan.default and set(u.users) <= {*arrivals}]
            self.inner += [u for u in tests if set(u.users) == {user}]
            # What goes into another product is that one's attention.
            if any(not found and u not in tests for u, found in arrivals.items()):
                self.read.append(node)
            product = product_of(user)
            if summed(user):
                self.inner.append(user)
                (user,) = user.users
                product = product_of(user)
            if product is not None:
                if product.lhs is product.rhs:
                    return Miss("the weights are multiplied with themselves, expected with V", code="weights-squared")
                return product, node, self.space.resolve(dims)
            step = self.step(user, dims)
            if isinstance(step, Miss):
                return located(step, user)
            self.inner.append(user)
            node, dims = user, step

    def step(self, user: Node, dims: Dims) -> Dims | Miss:
        if inactive_dropout(user):
            return dims
        if user.target == aten.dropout.default:
            return Miss(f"dropout of the weights is active, p = {user.args[1]}; expected none", code="dropout-active")
        if user.target == aten.slice.Tensor:
            return self.sliced(user, dims)
        if (found := zeroing(user)) is not None:
            self.terms += [RawTerm(kind, node, dims) for kind, node in found]  # type: ignore[arg-type]
            return dims
        if user.target in CASTS:
            held = value(user)
            if held is None or not held.dtype.is_floating_point:
                seen = "nothing" if held is None else held.dtype
                return Miss(f"the weights are cast to {seen}, expected a float type", code="weights-cast")
        seen = f"the weights pass {user.target} to {list(shape_of(user))}"
        return self.space.forward(user, dims) or Miss(f"{seen}, whose axes were not proved", code="weights-view")

    def sliced(self, user: Node, dims: Dims) -> Dims | Miss:
        """Dropping the column of the sink again."""
        rank = len(dims)
        dim = (user.args[1] if len(user.args) > 1 else 0) % rank
        start = user.args[2] if len(user.args) > 2 else 0
        kept = shape_of(user)[dim]
        if not self.extra or dims[dim] != self.extra or (start or 0) != int(self.first) or len(user.args) > 4:
            expected = "no slice" if not self.extra else f"the sink's column off, from {int(self.first)}"
            return Miss(f"the weights are sliced on dim {dim} from {start}, expected {expected}", code="weights-sliced")
        if not (same(kept, self.keys[0].size) if self.keys else same(kept, 1)):
            seen = f"the weights are sliced to {kept} columns"
            return Miss(f"{seen}, expected the {self.keys[0].size if self.keys else 1} keys", code="weights-sliced")
        return (*dims[:dim], self.keys, *dims[dim + 1 :])


def products_after(user: Node, depth: int = 8) -> tuple[Node, ...]:
    """The products that weights reach through `user`, in the order of their use."""
    if product_of(user) is not None:
        return (user,)
    if summed(user):
        return tuple(user.users)
    if depth == 0 or not passes(user):
        return ()
    return tuple(dict.fromkeys(p for u in user.users for p in products_after(u, depth - 1)))


def passes(user: Node) -> bool:
    """Whether the node's result holds the weights of its operand, or the walk can say why that is not proved."""
    return user.target in (aten.dropout.default, aten.slice.Tensor) or zeroing(user) is not None or viewlike(user)


def summed(user: Node) -> bool:
    """Whether the node is the inside of a product written as sum(a * b, d)."""
    if user.target != aten.mul.Tensor or len(user.users) != 1:
        return False
    (outer,) = user.users
    return outer.target == aten.sum.dim_IntList and product_of(outer) is not None


def zeroing(user: Node) -> list[tuple[str, Node]] | None:
    """The mask that sets weights to zero, as [(kind of term, mask)]; a guard against rows of NaN needs none.

    masked_fill(w, drop, 0), where(keep, w, 0), where(drop, 0, w), w * keep, nan_to_num(w)
    """
    target, args = user.target, user.args
    if target == aten.nan_to_num.default:
        return [] if len(args) < 2 or args[1] in (None, 0) else None
    if target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        weights, kind, mask, fill = args[0], "zeroes", args[1], args[2]
    elif target in (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf):
        mask, kind = args[0], "times" if scalar(args[2]) is not None else "zeroes"
        weights, fill = args[1:] if kind == "times" else args[:0:-1]
    elif target == aten.mul.Tensor and all(isinstance(a, Node) for a in args):
        ones = [zero_or_one(a) for a in args]
        weights, mask = args if ones[1] else args[::-1]
        kind, fill = "times", 0 if any(ones) else None
    else:
        return None
    if scalar(fill) != 0 or not isinstance(weights, Node):
        return None
    if len(shape_of(weights)) != len(shape_of(user)) or not all(map(same, shape_of(weights), shape_of(user))):
        return None
    return [] if mask.target == aten.isnan.default and mask.args[0] is weights else [(kind, mask)]


def beyond(node: Node, depth: int = 8) -> Node | None:
    """The first user of the weights that no rule follows, where what carries them leads on to a product."""
    for user in node.users:
        if user.op != "call_function" or depth == 0:
            continue
        if not passes(user):
            if carries(user) and arrives(user, depth):
                return user
        elif (found := beyond(user, depth - 1)) is not None:
            return found
    return None


def arrives(node: Node, depth: int) -> bool:
    """Whether views, moves and elementwise operations lead from `node` to a product of two activations."""
    nodes, seen = [node], set[Node]()
    for _ in range(depth + 1):
        users = dict.fromkeys(u for n in nodes for u in n.users if u not in seen)
        if any(map(activations, users)):
            return True
        seen.update(users)
        nodes = [u for u in users if viewlike(u) or carries(u)]
    return False


def viewlike(node: Node) -> bool:
    from attnopt.patterns.layout import BACK

    known = node.target in BACK or node.target in COPIES or node.target in CASTS
    return known and bool(node.args) and isinstance(node.args[0], Node) and value(node.args[0]) is not None


@PATTERNS.register("written-out")
class WrittenOut:
    anchors = SOFTMAX

    @staticmethod
    def match(node: Node) -> Match | Miss | tuple[Match | Miss, ...] | None:
        weights = value(node)
        if weights is None:
            return None
        if not product_behind(node.args[0]):
            stop = obstacle(node.args[0]) if beyond(node) is not None or arrives(node, 8) else None
            reason = f"the scores pass {stop and stop.target}, which no rule follows"
            return None if stop is None else located(Miss(reason, code="score-operation"), stop)
        products = tuple(dict.fromkeys(p for u in node.users for p in products_after(u)))
        if not products and leads_back(node.args[0]) and (stop := beyond(node)) is not None:
            reason = f"the weights pass {stop.target}, which no rule follows"
            return located(Miss(reason, code="weight-operation"), stop)
        if len(products) <= 1:
            return prove(node, products[0]) if products else None
        found = tuple(prove(node, product, len(products)) for product in products)
        if any(found):
            return found
        misses = [one for one in found if isinstance(one, Miss)]
        if len({miss.reason for miss in misses}) == 1:
            return misses[0]
        reason = f"the weights go into {len(products)} products, none of them an attention: {misses[0].reason}"
        return Miss(reason, code="weights-in-several-products")


def prove(node: Node, towards: Node, shared: int = 1) -> Match | Miss:
    """The attention between a soft-max and one product; `shared` of them have the same scores."""
    space = Space()
    dims = space.dims_of(node)
    axis = node.args[1] % max(1, len(dims))
    walk = Walk(space, dims, axis)
    product = walk.back(node.args[0])
    forward = Forward(space, walk.keys, dims[axis] if walk.sink is not None else (), walk.sink_first, towards)
    reached = forward.run(node, dims)
    if isinstance(reached, Miss):
        return reached
    if isinstance(product, Miss):
        return product
    if not dims[axis]:
        return Miss(f"the soft-max is over dim {axis} of size 1, expected two keys or more", code="one-key")
    found = finish(node, space, walk, product, forward, reached)
    return replace(found, shared=shared) if isinstance(found, Match) else found


def axes_text(space: Space, keys: tuple[Atom, ...], gone: tuple[Atom, ...], weights: Dims) -> str:
    """Over which dimension of the weights the soft-max runs, and over which the product sums."""

    def at(atoms: tuple[Atom, ...]) -> str:
        wanted = set(space.atoms(atoms))
        return ", ".join(str(n) for n, d in enumerate(space.resolve(weights)) if wanted & set(d)) or "none"

    return f"the soft-max is over dim {at(keys)} and the product sums over dim {at(gone)}, expected one axis for both"


def finish(
    anchor: Node, space: Space, walk: Walk, product: Product, forward: Forward, reached: tuple[Product, Node, Dims]
) -> Match | Miss:
    """Prove that both products share their axes as an attention does."""
    second, weights, weights_dims = reached
    keys = space.atoms(walk.keys)
    v_dims, out_dims, gone = result_of(space, second, weights, weights_dims)
    if set(space.atoms(gone)) != set(keys):
        return Miss(axes_text(space, keys, gone, weights_dims), code="softmax-axis")
    lhs_dims, rhs_dims = operands_of(space, product, space.resolve(walk.dims))
    lhs, rhs = Operand(product.lhs, lhs_dims), Operand(product.rhs, rhs_dims)
    held = {a for d in space.resolve(lhs_dims) for a in d}
    q, k = (rhs, lhs) if set(keys) <= held else (lhs, rhs)
    v, out = Operand(second.other(weights), v_dims), Operand(second.node, out_dims)
    if len(k.dims) < 3 or len(v.dims) < 3:
        # A router or a codebook has this form: softmax(x @ weight) @ other_weight.
        seen = f"K has {len(k.dims)} dimensions and V {len(v.dims)}"
        return Miss(f"{seen}, expected 3 or more: a matrix holds no keys of a batch", code="keys-are-a-matrix")
    (q, q_factor), (k, k_factor) = unscaled(space, q), unscaled(space, k)
    terms = (*walk.resolved_terms(), *(replace(t, scores=space.resolve(t.scores)) for t in forward.terms))
    varying = {a for t in walk.resolved_terms() for a in term_atoms(t)}
    found = assign(space, space.resolve(walk.rows), q, k, v, out, keys, varying)
    if isinstance(found, Miss):
        return found
    roles, q, k, v, out = found
    factors = tuple(replace(f, scores=space.resolve(f.scores)) for f in walk.factors)
    for factor in factors:
        if (refused := unfoldable(factor, roles, q)) is not None:
            return refused
    if not factors:
        # A factor put into q is rounded with it: to the wide type then, as the scores were.
        q, k = (before_widening(space, o, value(v.node).dtype) for o in (q, k))  # type: ignore[union-attr]
    dtypes = {value(o.node).dtype for o in (q, k, v, out)}  # type: ignore[union-attr]
    if len(dtypes) != 1:
        seen = ", ".join(sorted(map(str, dtypes)))
        return Miss(f"q, k, v and the output have the dtypes {seen}, expected one", code="mixed-dtypes")
    q = tidy(space, q, (roles.batch, roles.heads, roles.queries, roles.features))
    k = tidy(space, k, (roles.batch, roles.kv_heads, roles.keys, roles.features))
    v = tidy(space, v, (roles.batch, roles.kv_heads, roles.keys, roles.values))
    inner = (product.node, *walk.inner, anchor, *forward.inner)
    scale = walk.scale * (walk.softcap or 1.0) * q_factor * k_factor
    sink = walk.sink and replace(walk.sink, dims=space.resolve(walk.sink.dims))
    return Match(
        "written-out", anchor, out, q, k, v, roles, scale, walk.softcap, False, terms, sink, inner,
        tuple(forward.read), space.places, tuple(walk.rules), factors,
    )  # fmt: skip
