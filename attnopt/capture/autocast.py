"""Write the casts of autocast into the graph, exactly those that ATen makes.

    with autocast("cpu", bfloat16):  linear(x, w)   ->   linear(_to_copy(x, bfloat16), _to_copy(w, bfloat16))

The export records operations before autocast sees them: the values it notes have the right dtypes, the casts
themselves are nowhere. ATen is asked for them: each operation is run once on fake tensors, with autocast and without,
and what the dispatcher does is compared. An operation in which autocast does more than cast inputs leaves the graph
alone, and so does one whose kernel calls others, which autocast would meet again out of sight. The explicit graph
switches autocast off for itself, so nothing is cast twice.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from attnopt.ir import Refusal
from attnopt.reasons import located

# (device type, dtype) of every device whose autocast is on.
State = tuple[tuple[str, torch.dtype], ...]
# What ran, its arguments without their nesting, what it returned.
Call = tuple[Any, tuple[Any, ...], Any]
MARK = "attnopt_autocast"
ENTER, EXIT = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast
DEVICES = ("cpu", "cuda", "xpu")
EINSUM_VIEWS = tuple(
    getattr(torch.ops.aten, name).default
    for name in ("unsqueeze", "permute", "view", "expand", "_unsafe_view", "clone", "alias")
)
# Composite kernels that only make, move or choose values.
MOVING = {
    getattr(torch.ops.aten, name).default
    for name in (
        "_assert_tensor_metadata", "_unsafe_view", "lift_fresh_copy", "new_empty", "new_full", "new_ones", "new_zeros",
        "empty_like", "ones_like", "zeros_like", "rand_like", "randn_like", "_safe_softmax", "sum", "rot90",
        "unsafe_split_with_sizes", "bernoulli", "count_nonzero",
    )
}  # fmt: skip
MOVING |= {torch.ops.aten.masked_fill.Tensor, torch.ops.aten.fill.Tensor, torch.ops.aten.unsafe_split.Tensor}


def current() -> State:
    return tuple((d, torch.get_autocast_dtype(d)) for d in DEVICES if torch.is_autocast_enabled(d))


def switch(device: str, enabled: bool, dtype: torch.dtype) -> None:
    """Set the state itself: the context manager would be traced instead of entered."""
    torch.set_autocast_enabled(device, enabled)
    torch.set_autocast_dtype(device, dtype)


def settings_of() -> dict[str, tuple[bool, torch.dtype]]:
    return {d: (torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in DEVICES}


@contextmanager
def restored() -> Iterator[None]:
    """Put the autocast state back afterwards, also after a failure between an entry and its exit."""
    before, cached = settings_of(), torch.is_autocast_cache_enabled()
    # A cast that is remembered from elsewhere would be missing in the trace.
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)
        for device, (enabled, dtype) in before.items():
            switch(device, enabled, dtype)


@contextmanager
def off() -> Iterator[None]:
    with restored():
        for device, dtype in current():
            switch(device, False, dtype)
        yield


def enter(device: str, dtype: torch.dtype | None, enabled: bool, _cache: bool | None) -> tuple[str, bool, torch.dtype]:
    """Enter a region while tracing; returns what its exit puts back."""
    before = (device, *settings_of()[device])
    switch(device, enabled, dtype or torch.get_autocast_dtype(device))
    return before


def leave(before: tuple[str, bool, torch.dtype]) -> None:
    switch(*before)


def mark(graph: Graph) -> None:
    """Note on each node of a Dynamo graph under which state it runs, and enter regions for real while tracing."""
    with restored():
        opened: dict[Node, Any] = {}
        for node in graph.nodes:
            if node.target is ENTER:
                opened[node] = enter(*node.args)
                node.target = enter
            elif node.target is EXIT:
                leave(opened[node.args[0]])
                node.target = leave
            elif opened or current():
                node.meta["custom"] = {**(node.meta.get("custom") or {}), MARK: current()}


class Recorder(TorchDispatchMode):
    """Every operation that reaches the dispatcher's end, with the dtypes it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        # Autocast asks fake tensors for their device, which is such a call too.
        if func.namespace != "prim":
            self.calls.append((func, tuple(pytree.tree_leaves((args, kwargs or {}))), out))
        return out


def concrete(item: Any) -> Any:
    """A fake value of the same kind without symbols: asking about symbols would add guards, and so recompiles."""
    if isinstance(item, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return item.node.hint
    if not isinstance(item, Tensor):
        return item
    sizes, strides = [concrete(s) for s in item.shape], [concrete(s) for s in item.stride()]
    return torch.empty_strided(sizes, strides, dtype=item.dtype, device=item.device)


def shows_all(func: Any, device: str) -> bool:
    """Whether autocast does nothing inside the kernel of `func`: it calls nothing, or does so with autocast off."""
    backend, name = device.upper(), func.name()
    if torch.Tag.core in func.tags or torch.Tag.pointwise in func.tags or func in MOVING:
        return True
    if any(result.alias_info is not None for result in func._schema.returns):
        return True
    held = torch._C._dispatch_has_kernel_for_dispatch_key
    # A kernel behind one of autocast's own runs with autocast off; those of a device compute, but for linear algebra.
    return held(name, f"Autocast{backend}") or (
        held(name, backend) and "linalg" not in name and func.namespace == "aten"
    )


@contextmanager
def quiet() -> Iterator[None]:
    """No log of operations that fail on fake tensors: that they do is one of the answers."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def observe(target: Any, args: Any, kwargs: Any, state: State) -> list[Call] | None:
    """What runs in the end when `target` is called under `state`; None where it cannot be called."""
    with restored(), quiet(), torch.no_grad(), Recorder() as recorder:
        for device in DEVICES:
            switch(device, device in dict(state), dict(state).get(device, torch.get_autocast_dtype(device)))
        try:
            target(*args, **kwargs)
        except Exception:
            return None
    return recorder.calls


def signature(calls: list[Call] | None) -> list[Any] | None:
    """What ran, on which dtypes; the tensors themselves differ between two runs."""
    if calls is None:
        return None
    return [(func, tuple(a.dtype if isinstance(a, Tensor) else str(a) for a in flat)) for func, flat, _ in calls]


Casts = tuple[tuple[torch.dtype | None, ...], dict[str, torch.dtype]]


def casts_of(target: Any, args: Any, kwargs: Any, state: State) -> Casts | None:
    """The dtype that autocast gives each tensor among the arguments, and the keyword arguments it adds.

    None where autocast does anything else to this operation: what is returned has been compared with what it does.
    """
    tensors = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
    mixed = observe(target, args, kwargs, state)
    if mixed is None or not autocast_shows(target, mixed, state):
        return None
    if signature(observe(target, args, kwargs, ())) == signature(mixed):
        return (None,) * len(tensors), {}

    def casts_input(call: Call) -> bool:
        return call[0] is torch.ops.aten._to_copy.default and any(call[1][0] is t for t in tensors)

    made = {id(flat[0]): out.dtype for func, flat, out in reversed(list(filter(casts_input, mixed)))}
    copies = tuple(made.get(id(t)) for t in tensors)
    wanted = signature([call for call in mixed if not casts_input(call)])
    given = iter(copies)
    with off():
        cast_args, cast_kwargs = pytree.tree_map(
            lambda a: cast(a, next(given)) if isinstance(a, Tensor) else a, (args, kwargs)
        )
    if target is torch.ops.aten.einsum.default:
        return einsum_casts(mixed, tensors)
    for extra in ({}, {"dtype": torch.float32}):
        if signature(observe(target, cast_args, {**cast_kwargs, **extra}, ())) == wanted:
            return copies, extra
    return None


def autocast_shows(target: Any, calls: list[Call], state: State) -> bool:
    """Whether the calls seen are all that autocast could cast, on every device whose autocast is on."""
    for device in dict(state):

        def touched(call: Call, device: str = device) -> bool:
            return any(isinstance(a, Tensor) and a.is_floating_point() and a.device.type == device for a in call[1])

        if not shows_all(target, device) and not all(shows_all(c[0], device) for c in calls if touched(c)):
            return False
    return True


def einsum_casts(calls: list[Call], tensors: list[Tensor]) -> Casts | None:
    """Autocast casts inside an einsum: views of the inputs, just before a product. Before the views is the same, where
    there is nothing but views, casts to one dtype and products in it."""
    moved = [c for c in calls if c[0] not in EINSUM_VIEWS]
    to = {c[2].dtype for c in moved if c[0] is torch.ops.aten._to_copy.default}
    products = [c for c in moved if c[0] is not torch.ops.aten._to_copy.default]
    same = all(c[0] is torch.ops.aten.bmm.default and {t.dtype for t in c[1]} == to for c in products)
    if len(to) != 1 or len(products) != 1 or not same:
        return None
    (dtype,) = to
    return tuple(dtype if t.dtype != dtype else None for t in tensors), {}


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None else torch.ops.aten._to_copy.default(tensor, dtype=dtype)


def kind_of(leaf: Any) -> Any:
    """What of an argument may decide how autocast treats an operation."""
    if isinstance(leaf, Tensor):
        return leaf.dtype, leaf.device, leaf.ndim
    return leaf if leaf is None or isinstance(leaf, (bool, str, torch.dtype)) else type(leaf)


def make_explicit(gm: GraphModule) -> Refusal | None:
    """Insert the casts of every marked node; returns why the graph cannot be used, None if it can."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    graph, around = gm.graph, current()
    known: dict[Any, Casts | None] = {}
    cast_nodes: dict[tuple[Node, torch.dtype], Node] = {}
    fake = FakeTensorMode()
    for node in list(graph.nodes):
        marks = node.meta.get("custom") or {}
        state = marks.get(MARK, around)
        if MARK in marks:
            node.meta["custom"] = {name: mark for name, mark in marks.items() if name != MARK}
        if not state or not isinstance(node.target, torch._ops.OpOverload):
            continue
        held = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        leaves = pytree.tree_leaves(held)
        if not any(isinstance(leaf, Tensor) for leaf in leaves):
            continue
        key = (node.target, state, *map(kind_of, leaves))
        if key not in known:
            with fake:
                args, kwargs = pytree.tree_map(concrete, held)
                known[key] = casts_of(node.target, args, kwargs, state)
        found = known[key]
        if found is None:
            no = Refusal(f"autocast does more to {node.target} than cast its inputs", code="autocast-does-more")
            return located(no, node)
        insert_casts(node, found, cast_nodes)
    if around:
        switch_off(graph, around)
    gm.recompile()
    return None


def insert_casts(node: Node, casts: Casts, made: dict[tuple[Node, torch.dtype], Node]) -> None:
    """Give `node` cast inputs; a cast that an earlier node needed as well is shared."""
    dtypes = iter(casts[0])

    def explicit(item: Any) -> Any:
        if not isinstance(item, Node) or not isinstance(item.meta["val"], Tensor):
            return item
        dtype = next(dtypes)
        if dtype is None:
            return item
        if (item, dtype) not in made:
            with node.graph.inserting_before(node):
                new = node.graph.call_function(torch.ops.aten._to_copy.default, (item,), {"dtype": dtype})
            new.meta = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")}
            with torch.no_grad(), off():
                new.meta["val"] = cast(item.meta["val"], dtype)
            made[item, dtype] = new
        return made[item, dtype]

    args, kwargs = torch.fx.node.map_aggregate((node.args, node.kwargs), explicit)
    node.args, node.kwargs = args, {**kwargs, **casts[1]}


def switch_off(graph: Graph, around: State) -> None:
    """Run the whole graph without the autocast that is on around it."""
    first = next(n for n in graph.nodes if n.op != "placeholder")
    (output,) = (n for n in graph.nodes if n.op == "output")
    for device, dtype in around:
        with graph.inserting_before(first):
            entered = graph.call_function(ENTER, (device, dtype, False, None))
        with graph.inserting_before(output):
            graph.call_function(EXIT, (entered,))
