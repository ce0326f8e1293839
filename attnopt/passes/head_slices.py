"""Push a choice of heads through the graph, to the weights that make the heads and to those that read them.

    q[:, heads]   <-  rope  <-  transpose  <-  view(B, N, H, D)  <-  linear(x, W_q, b_q)
    q'            <-  rope  <-  transpose  <-  view(B, N, h, D)  <-  linear(x, W_q[rows], b_q[rows])

Here are the choice (`Heads`) and the rewrite of one site (`Slices`); the rules are in `heads_upward` and
`heads_downward`. At a parameter the chosen entries are taken at compile time and become a constant of the graph. Axes
are atoms (patterns/layout.py): a head is followed through views that merge and split it, never by a dimension's number.

Nothing of the graph changes until `commit`; `undo` takes away what was inserted. What cannot be followed raises
`Unpushed`, which carries the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Graph, Node
from torch.nn import Parameter

from attnopt.capture.constants import hold, owned, parameter_of
from attnopt.ir import Refusal
from attnopt.passes.program import Builder, Program
from attnopt.passes.remove_dead_code import impure
from attnopt.patterns import value
from attnopt.patterns.layout import Atom, Dims, Space, same, shape_of
from attnopt.reasons import described

aten = torch.ops.aten


class Unpushed(Exception):
    """A choice of heads could not be followed; nothing may be changed."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.reason)
        self.refusal = refusal


class Heads:
    """Which entries of some axes stay: entry n keeps ``columns[atom][n]`` along each chosen atom, all of them at once.

    A tensor in which the choice was made has the chosen entries where the first of its chosen atoms was, and nothing at
    the others: of (B, G, R, N, D) with chosen (g, r) stays (B, n, 1, N, D). So any choice has a layout, also one that
    keeps unequal numbers in groups.
    """

    def __init__(self, space: Space, atoms: Sequence[Atom], chosen: Tensor) -> None:
        """chosen: int64 (n,), indices into the row-major product of `atoms`."""
        self.space, self.count = space, len(chosen)
        self.columns: dict[Atom, Tensor] = {}
        self.ranks: dict[Atom, tuple[int, ...]] = {}
        rest = chosen
        for rank, atom in reversed(list(enumerate(atoms))):
            self.columns[atom], rest = rest % atom.size, rest // atom.size
            self.ranks[atom] = (rank,)
        self.entries = Atom("chosen", self.count)
        self._windows = 0

    def resolve(self, dims: Dims) -> Dims:
        """`dims` in the finest atoms known by now; parts of a chosen atom are chosen."""
        fresh = [a for a in self.columns if a in self.space.parts and self.space.parts[a][0] not in self.columns]
        while fresh:
            atom = fresh.pop()
            outer, inner = self.space.parts[atom]
            self.columns[outer], self.columns[inner] = self.columns[atom] // inner.size, self.columns[atom] % inner.size
            self.ranks[outer], self.ranks[inner] = (*self.ranks[atom], 0), (*self.ranks[atom], 1)
            fresh += [a for a in (outer, inner) if a in self.space.parts]
        return self.space.resolve(dims)

    def window(self, size: int, column: Tensor, rank: tuple[int, ...] | None) -> Atom:
        """A new chosen axis; one without a rank of its own comes last."""
        self._windows += 1
        atom = Atom(f"w{self._windows}", size)
        self.columns[atom], self.ranks[atom] = column, rank or (1 << 30, self._windows)
        return atom

    def of(self, dims: Dims) -> list[Atom]:
        """The chosen atoms of resolved `dims`, the one that carries the entries first."""
        return sorted((a for d in dims for a in d if a in self.columns), key=self.ranks.__getitem__)

    def kept(self, dims: Dims) -> Dims:
        """The dims of the tensor in which the choice was made."""
        chosen = self.of(dims)
        into = {a: (self.entries,) if a is chosen[0] else () for a in chosen}
        return tuple(tuple(b for a in d for b in into.get(a, (a,))) for d in dims)

    def key(self, dims: Dims) -> tuple[Any, ...]:
        """Equal for equal choices of one tensor, whatever its atoms are called."""
        order = {a: n for n, a in enumerate(self.of(dims))}
        found = []
        for d in dims:
            parts: list[Any] = [1]
            for a in d:
                if a in order:
                    parts += [(order[a], a.size, tuple(self.columns[a].tolist())), 1]
                else:
                    parts[-1] = parts[-1] * a.size
            found.append(tuple(p if isinstance(p, (int, tuple)) else str(p) for p in parts))
        return tuple(found)


def sizes(dims: Dims) -> list[Any]:
    return [math.prod((a.size for a in d), start=1) for d in dims]


class Slices:
    """One site's rewrite: what was made, what it stands for, and which parameters its constants were made of."""

    def __init__(self, program: Program) -> None:
        self.program, self.gm = program, program.gm
        self.existing = set(self.gm.graph.nodes)
        self.attributes: list[str] = []
        self.made: dict[Any, Node] = {}
        # Nodes that were made anew, which are to die.
        self.followed: set[Node] = set()
        self.replacements: list[tuple[Node, Node]] = []
        # What was made of a node; where it was made in several ways, any of them.
        self.twins: dict[Node, Node] = {}
        # Products made of one product of the graph: (original, new).
        self.products: list[tuple[Node, Node]] = []
        self.fixed = fixed_nodes(self.gm.graph)
        self._weights: dict[Node, Tensor | None] = {}
        self._relied: set[Node] = set()

    # --- weights ------------------------------------------------------------------------------------------------------

    def weight(self, node: Any) -> Tensor | None:
        """The value of what is computed from parameters and buffers alone; None of anything else."""
        if not isinstance(node, Node) or node not in self.fixed:
            return None
        if node not in self._weights:
            self._weights[node] = self._computed(node)
        return self._weights[node]

    def _computed(self, node: Node) -> Tensor | None:
        if node.op == "placeholder":
            return owned(node)
        if node.op == "get_attr":
            held = getattr(self.gm, str(node.target), None)
            return held if type(held) is Tensor else None
        if any(self.weight(n) is None for n in node.all_input_nodes):
            return None
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), self.weight)
        with at_compile_time():
            found = node.target(*args, **kwargs)  # type: ignore[operator]
        return found if isinstance(found, Tensor) else None

    def rely(self, node: Node) -> None:
        """Guard every parameter that a weight is computed from."""
        stack = [node]
        while stack:
            at = stack.pop()
            if at.op == "placeholder":
                self._relied.add(at)
            stack += at.all_input_nodes

    def constant(self, tensor: Tensor, like: Node) -> Node:
        """A node that holds `tensor`, at the graph's point of insertion; like: whose module and line it has."""
        name = f"attnopt_weight_{len(self.attributes)}"
        while hasattr(self.gm, name):
            name += "_"
        self.gm.register_buffer(name, tensor, persistent=False)
        self.attributes.append(name)
        node = self.gm.graph.get_attr(name)
        node.meta = {k: v for k, v in like.meta.items() if k in ("nn_module_stack", "stack_trace")}
        mode = next(n.meta["val"].fake_mode for n in self.gm.graph.nodes if isinstance(value(n), Tensor))
        node.meta["val"] = mode.from_tensor(tensor, static_shapes=True)
        return node

    def taken(self, node: Node, heads: Heads, dims: Dims) -> Node:
        """The chosen entries of a parameter or buffer, as a constant."""
        held = self.weight(node)
        if held is None:
            raise Unpushed(unheld(node))
        chosen = heads.of(dims)
        atoms = [a for d in dims for a in d]
        with at_compile_time():
            apart = held.reshape([a.size for a in atoms])
            rest = [n for n, a in enumerate(atoms) if a not in chosen]
            apart = apart.permute([atoms.index(a) for a in chosen] + rest)
            apart = apart[tuple(heads.columns[a].to(held.device) for a in chosen)]
            # (entries, the others in order) to where the first chosen atom was.
            before = sum(n < atoms.index(chosen[0]) for n in rest)
            new = apart.movedim(0, before).reshape(sizes(heads.kept(dims))).contiguous()
        self.rely(node)
        return self.constant(new, node)

    # --- the end ------------------------------------------------------------------------------------------------------

    def instead(self, make: Callable[[], Node]) -> Node:
        """What `make` yields when it chooses all heads in order; whatever is made on the way and equals what it was
        made of takes its place for every reader."""
        self.twins, before = {}, self.twins
        made = make()
        for old, new in self.twins.items():
            if old.op == "call_function" and [*map(str, shape_of(old))] == [*map(str, shape_of(new))]:
                self.replacements.append((old, new))
        self.twins = {**before, **self.twins}
        return made

    def measured(self) -> list[tuple[Node, Node]]:
        """(size of a node, node made of it that has the same size): read off there, it needs no head that is gone."""
        found = []
        for node, twin in self.twins.items():
            for user in node.users:
                if user.target is aten.sym_size.int and len(shape_of(twin)) == len(shape_of(node)):
                    dim = user.args[1]
                    if same(shape_of(twin)[dim], shape_of(node)[dim]):
                        found.append((user, twin))
        return found

    def dead(self) -> set[Node]:
        """What nothing reads any more once the replacements are made."""
        gone = {old for old, _ in (*self.replacements, *self.measured())}
        for node in reversed(self.gm.graph.nodes):
            if node in self.existing and not impure(node) and all(u in gone for u in node.users):
                gone.add(node)
        return gone

    def survivors(self) -> list[Node]:
        """Nodes that were made anew and that something else needs all the same, in the graph's order."""
        dead = self.dead()
        left = [n for n in self.gm.graph.nodes if n in self.followed and n not in dead]
        return [n for n in left if n.op == "call_function" and n not in self.fixed]

    def commit(self) -> None:
        self.fuse()
        for size, twin in self.measured():
            size.update_arg(0, twin)
        for old, new in self.replacements:
            old.replace_all_uses_with(new)
        for node in self._relied:
            hold(self.gm, node)
            self.program.relied_on.add(node.name)

    def undo(self) -> None:
        for node in reversed([n for n in self.gm.graph.nodes if n not in self.existing]):
            self.gm.graph.erase_node(node)
        for name in self.attributes:
            delattr(self.gm, name)

    def fuse(self) -> None:
        """Products that were one before are one again: linear(x, rows of q), linear(x, rows of k)  ->  two slices."""
        groups: dict[Node, list[Node]] = {}
        for old, new in self.products:
            groups.setdefault(old, []).append(new)
        for nodes in groups.values():
            if len(nodes) > 1 and all(n.target in (aten.linear.default, aten.addmm.default) for n in nodes):
                self.fused(nodes)

    def fused(self, nodes: list[Node]) -> None:
        linear = nodes[0].target is aten.linear.default
        x_at, weight_at, bias_at = (0, 1, 2) if linear else (1, 2, 0)
        x = nodes[0].args[x_at]
        parts = [[n.args[at] if len(n.args) > at else None for n in nodes] for at in (weight_at, bias_at)]
        plain = all(p is None or p.op == "get_attr" for column in parts for p in column)
        if any(n.args[x_at] is not x or n.kwargs for n in nodes) or not plain or len({p is None for p in parts[1]}) > 1:
            return
        order = {n: at for at, n in enumerate(self.gm.graph.nodes)}
        first = min(nodes, key=order.__getitem__)
        with self.gm.graph.inserting_before(first), at_compile_time():
            held = [[getattr(self.gm, p.target) for p in column if p is not None] for column in parts]
            weight = self.constant(torch.cat(held[0], 0 if linear else 1), first)
            bias = self.constant(torch.cat(held[1], 0), first) if held[1] else None
            builder = Builder(self.gm, first)
            args = (x, weight, bias) if linear else (bias, x, weight)
            whole = builder.call(first.target, *(a for a in args if a is not None))
            at = 0
            for node in nodes:
                wide = int(node.meta["val"].shape[-1])
                part = builder.call(aten.slice.Tensor, whole, len(node.meta["val"].shape) - 1, at, at + wide)
                at += wide
                node.replace_all_uses_with(part)
                self.replacements = [(old, part if new is node else new) for old, new in self.replacements]
                self.twins = {old: part if new is node else new for old, new in self.twins.items()}
        for node in nodes:
            self.gm.graph.erase_node(node)


def fixed_nodes(graph: Graph) -> set[Node]:
    """Parameters, buffers, and what plain operations make of these alone."""
    found: set[Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            held = parameter_of(node) is not None
        elif node.op == "call_function" and value(node) is not None:
            schema, tags = getattr(node.target, "_schema", None), getattr(node.target, "tags", ())
            plain = schema is not None and not schema.is_mutable and torch.Tag.nondeterministic_seeded not in tags
            held = plain and bool(node.all_input_nodes) and all(n in found for n in node.all_input_nodes)
        else:
            held = node.op == "get_attr"
        if held:
            found.add(node)
    return found


def at_compile_time() -> ExitStack:
    """For computing with real tensors while a graph is compiled: no fakes, no gradients, no inference tensors."""
    stack = ExitStack()
    stack.enter_context(unset_fake_temporarily())
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.no_grad())
    return stack


def unheld(node: Node) -> Refusal:
    """Why nothing can be taken of what a walk ended at."""
    if node.op != "placeholder":
        return Refusal(f"its heads are made by {described(node)}, expected a parameter", code="prune-no-projection")
    found = parameter_of(node)
    if found is None:
        said = "its heads are an input of the graph, expected a product with a parameter"
        return Refusal(said, code="prune-no-projection")
    how = "made in inference mode" if type(found) in (Tensor, Parameter) else f"a {type(found).__name__}"
    return Refusal(
        f"a weight of its projections is {how}, so that no constant can stand for it", code="prune-opaque-weight"
    )


def shapes_agree(node: Node, dims: Dims) -> bool:
    held = value(node)
    wanted = sizes(dims)
    return (
        held is not None
        and held.ndim == len(wanted)
        and all(same(a, b) for a, b in zip(held.shape, wanted, strict=True))
    )
