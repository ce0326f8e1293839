"""Compare what is said of a site, and what replaces it, with the original by running them on random inputs.

    q, k, v, mask inputs  ->  original subgraph  ->  a
    q, k, v, mask inputs  ->  the site's formula ->  b       a == b wherever a query keeps a key
    q, k, v, mask inputs  ->  what replaces it   ->  c       a == c likewise

With ``options={"verify": True}`` or ATTNOPT_VERIFY=1, and in the tests: the pass looks at every region, its mask and
bias at random positions as well; `Program.replace` at every rewrite but those of a plan, which are to differ. A site
that fails is refused, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from attnopt import settings
from attnopt.errors import VerificationError, first_line
from attnopt.ir import Refusal, Region
from attnopt.masks.documents import counted, equalities
from attnopt.masks.interpret import MASKED
from attnopt.masks.probe import probe
from attnopt.passes.arrange import canonical, rearrange, term_dims
from attnopt.passes.program import Program
from attnopt.passes.recover_masks import term_of, variables
from attnopt.patterns import Match, alike, checked

aten = torch.ops.aten
# Largest error of an output whose values are averages of standard normal ones.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}


def run(program: Program) -> None:
    """Refuse every region whose record and graph disagree; nothing is done where verification is off."""
    if not (program.verify or settings.verify()):
        return
    for region in program.pending:
        try:
            check_meaning(program.gm, region)
            check_formula(program.gm, region)
        except Exception as error:
            if settings.strict():
                raise
            said = f"{type(error).__name__} in verification: {first_line(error)}"
            program.refuse(region, Refusal(said, code="rewrite-failed"))


def check_meaning(gm: GraphModule, region: Region) -> None:
    """Raise VerificationError where the mask and bias that were recovered are not the graph's."""
    match, generator = region.match, torch.Generator().manual_seed(0)
    terms = [term_of(t, match) for t in match.terms if not checked(t)]
    extents = {name: hint(size) for name, size in variables(match)[2].items()}
    values = sampled_loads(region, generator)
    assumed = bool(region.meaning.assumptions)
    with torch.no_grad():
        probe(
            region.meaning, terms, extents, lambda node: evaluate(gm, node, values, generator, assumed),
            causal=match.causal, size=hints(match),
        )  # fmt: skip


def check_formula(gm: GraphModule, region: Region) -> None:
    """Raise VerificationError where the output is not the site's soft-max of its scale, soft-cap, terms and sink."""
    generator = torch.Generator().manual_seed(0)
    values = operands_and_loads(region, generator)
    with torch.no_grad():
        expected = evaluate(gm, region.out, values, generator)
        keep = kept(gm, region, values, generator)
        found = formula(gm, region, values, generator).to(expected.dtype)
    compare("what was recognised", found, expected, keep)


def check_region(gm: GraphModule, region: Region, new: Node) -> None:
    """Raise VerificationError where `new` computes something else than ``region.out``.

    Both are cut off at the operands and the mask's loads and fed random values; a symbolic size is its hint.
    """
    generator = torch.Generator().manual_seed(0)
    values = operands_and_loads(region, generator)
    with torch.no_grad():
        expected = evaluate(gm, region.out, values, generator)
        found = evaluate(gm, new, values, generator)
        keep = kept(gm, region, values, generator)
    compare("the rewrite", found, expected, keep)


def compare(what: str, found: Tensor, expected: Tensor, keep: Tensor) -> None:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        shapes = f"{found.dtype} {tuple(found.shape)}", f"{expected.dtype} {tuple(expected.shape)}"
        raise VerificationError(f"{what} yields {shapes[0]}, the original {shapes[1]}")
    difference = (found - expected).double().abs().masked_fill(~keep, 0.0)
    limit = TOLERANCE.get(expected.dtype, 1e-4)
    largest = float(difference.max()) if difference.numel() else 0.0
    if not largest <= limit:
        limits = f"{largest:.3g} on random inputs (limit {limit:g})"
        raise VerificationError(f"{what} differs from the original by {limits}")


def operands_and_loads(region: Region, generator: torch.Generator) -> dict[Node, Any]:
    """Random values where the region is cut off from the rest of the graph."""
    match = region.match
    values: dict[Node, Any] = {o.node: sample(o.node, generator) for o in (match.q, match.k, match.v)}
    for node, value in sampled_loads(region, generator).items():
        values.setdefault(node, value)
    for term in (t for t in match.terms if checked(t)):
        # The same mask computed once more must not be sampled apart.
        twin = next((o.node for o in match.terms if o.node in values and alike(o.node, term.node)), None)
        if twin is not None:
            values[term.node] = values[twin]
    return values


def sampled_loads(region: Region, generator: torch.Generator) -> dict[Node, Any]:
    """Random values of the loads that alone stand between the inputs and the terms.

    A load whose own inputs the terms read by another way too is computed from those, or the two would not agree.
    """
    terms = [t.node for t in region.match.terms]
    read = set().union(*map(ancestors, terms))
    loads = set(original(node, read) for node in region.loads.values())
    seen, stack = set(terms), [t for t in terms if t not in loads]
    while stack:
        new = [n for n in stack.pop().all_input_nodes if n not in seen]
        seen.update(new)
        stack += [n for n in new if n not in loads]
    inputs = {n for n in seen | loads if depends_on_data(n)}
    alone = [n for n in loads if not (ancestors(n) - {n}) & inputs]
    values = {n: sample(n, generator, bool(region.meaning.assumptions)) for n in sorted(alone, key=str)}
    for _, read_at, _ in equalities(region.meaning.keep):
        if (node := original(read_at.node, read)) in alone:
            values[node] = numbers(node, generator)
        elif (positions := counted(node)) is not None:
            values[source(positions)] = restarting(source(positions), generator)
    return values


def numbers(node: Node, generator: torch.Generator) -> Tensor:
    """Numbers of a few documents, in no order."""
    like = node.meta["val"]
    return torch.randint(0, 4, [hint(s) for s in like.shape], generator=generator).to(like.device, like.dtype)


def restarting(node: Node, generator: torch.Generator) -> Tensor:
    """Positions that count on, and begin anew after every few tokens."""
    like = node.meta["val"]
    shape = [hint(s) for s in like.shape]
    index = torch.arange(shape[-1]).expand(shape)
    begins = torch.rand(shape, generator=generator) < 0.2
    return (index - (index * begins).cummax(-1).values).to(like.device, like.dtype)


def source(node: Node) -> Node:
    while node.target in (aten.expand.default, aten.alias.default):
        node = node.args[0]  # type: ignore[assignment]
    return node


def depends_on_data(node: Node) -> bool:
    return any(n.op == "placeholder" and isinstance(n.meta.get("val"), Tensor) for n in ancestors(node))


def ancestors(node: Node) -> set[Node]:
    found, stack = {node}, [node]
    while stack:
        new = [n for n in stack.pop().all_input_nodes if n not in found]
        found.update(new)
        stack += new
    return found


def original(node: Node, read: set[Node]) -> Node:
    """The node itself, or what a comparison made for a load reads."""
    while node not in read:
        node = node.all_input_nodes[0]
    return node


def hint(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def hints(match: Match) -> Callable[[Any], int]:
    """The value of a size or of an expression of sizes, as the record holds it."""
    r = match.roles
    symbolic = [a.size for a in (*r.batch, *r.queries, *r.keys) if not isinstance(a.size, int)]
    symbolic += [s for t in match.terms for n in ancestors(t.node) for s in sizes_in(n) if not isinstance(s, int)]

    def value(size: Any) -> int:
        if isinstance(size, (int, torch.SymInt)):
            return hint(size)
        return hint(symbolic[0].node.shape_env.create_symintnode(size, hint=None))

    return value


def sizes_in(node: Node) -> tuple[Any, ...]:
    held = node.meta.get("val")
    return tuple(held.shape) if isinstance(held, Tensor) else (held,) if isinstance(held, torch.SymInt) else ()


def sample(node: Node, generator: torch.Generator, zero_or_one: bool = False) -> Any:
    """A random value like the node's fake one; flags keep their first key, so that causal rows keep one.

    A single integer is a position or a length: never 0, at which a wrong sign would not show.
    """
    like = node.meta["val"]
    if not isinstance(like, Tensor):
        return hint(like) if isinstance(like, (int, torch.SymInt)) else like
    shape = [hint(s) for s in like.shape]
    if like.dtype.is_floating_point and not zero_or_one:
        return torch.randn(shape, generator=generator).to(like.device, like.dtype)
    if not shape and like.dtype in (torch.int32, torch.int64):
        return torch.randint(1, 4, (), generator=generator).to(like.device, like.dtype)
    made = torch.rand(shape, generator=generator) < 0.7
    if made.ndim:
        made[..., 0] = True
    return made.to(like.device, like.dtype)


def evaluate(
    gm: GraphModule, target: Node, values: dict[Node, Any], generator: torch.Generator, zero_or_one: bool = False
) -> Tensor:
    """The value of `target`, computed from `values`; whatever else the cut reads is sampled and added to them."""
    done = dict(values)
    stack = [target]
    while stack:
        node = stack[-1]
        if node in done:
            stack.pop()
            continue
        missing = [n for n in node.all_input_nodes if n not in done]
        if missing:
            stack += missing
            continue
        stack.pop()
        if node.op == "placeholder":
            done[node] = values[node] = sample(node, generator, zero_or_one)
        elif node.op == "get_attr":
            done[node] = attribute(gm, str(node.target))
        elif node.op == "call_function":
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), done.__getitem__)
            done[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        else:
            raise VerificationError(f"{node.op} nodes cannot be run on their own")
    return done[target]


def attribute(gm: GraphModule, path: str) -> Any:
    held: Any = gm
    for name in path.split("."):
        held = getattr(held, name)
    return held


def sizes_of(match: Match) -> dict[Any, int]:
    r = match.roles
    return {a: hint(a.size) for a in (*r.batch, *r.heads, *r.queries, *r.keys, *r.features, *r.values)}


def at_once(tensor: Tensor, have: Any, want: Any, match: Match) -> Tensor:
    return rearrange(lambda target, *args: target(*args), tensor, have, want, sizes_of(match))


def terms_of(
    gm: GraphModule, region: Region, values: dict[Node, Any], generator: torch.Generator
) -> list[tuple[Any, Tensor]]:
    """The terms that mask or add, and their values as (B | 1, H | 1, Sq | 1, Sk | 1)."""
    found = []
    for term in (t for t in region.match.terms if not checked(t)):
        tensor = evaluate(gm, term.node, values, generator)
        found.append((term, at_once(tensor, *term_dims(region.match, term), region.match)))
    return found


def kept_scores(gm: GraphModule, region: Region, values: dict[Node, Any], generator: torch.Generator) -> Tensor:
    """(B, H, Sq, Sk): true where a query keeps a key."""
    q, k = (evaluate(gm, node, values, generator) for node in (region.q, region.k))
    keep = torch.ones(q.shape[0], q.shape[1], q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    if region.match.causal:
        keep = keep.tril()
    for term, tensor in terms_of(gm, region, values, generator):
        if term.kind == "add":
            keep = keep & (tensor > MASKED)
        else:
            keep = keep & (tensor.bool() if term.kind == "keep" else ~tensor.bool())
    return keep


def kept(gm: GraphModule, region: Region, values: dict[Node, Any], generator: torch.Generator) -> Tensor:
    """Where the output is defined, in its own layout: the rows whose query keeps at least one key."""
    match = region.match
    keep = kept_scores(gm, region, values, generator)
    dim_v = hint(region.v.meta["val"].shape[3])
    rows = keep.any(-1, keepdim=True).expand(-1, -1, -1, dim_v)
    return at_once(rows, canonical(match)[3], match.out.dims, match)


def formula(gm: GraphModule, region: Region, values: dict[Node, Any], generator: torch.Generator) -> Tensor:
    """softmax(softcap * tanh(scale * q k^T / softcap) + bias, masked) v in double precision, in the output's layout."""
    match, site = region.match, region.site
    q, k, v = (evaluate(gm, node, values, generator).double() for node in (region.q, region.k, region.v))
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = q @ k.mT * site.scale
    if site.softcap:
        scores = site.softcap * (scores / site.softcap).tanh()
    for term, tensor in terms_of(gm, region, values, generator):
        if term.kind == "add":
            scores = scores + tensor.double() * term.factor
    scores = scores.masked_fill(~kept_scores(gm, region, values, generator), float("-inf"))
    if match.sink is not None:
        column = evaluate(gm, match.sink.node, values, generator).double()
        r = match.roles
        column = at_once(column, match.sink.dims, (r.batch, r.heads, r.queries, ()), match)
        scores = torch.cat([scores, column.expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1)[..., : k.shape[2]]
    return at_once(weights @ v, canonical(match)[3], match.out.dims, match)
