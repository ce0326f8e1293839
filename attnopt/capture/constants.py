"""Buffers and parameters whose values a pass may rely on, under a check at every call.

Dynamo makes them inputs of its graph. A mask kept as a buffer (``tril`` in GPT-2 and GPT-Neo) is then opaque data; its
value at compile time says what it means, for as long as nobody writes to it. Small buffers are held for all passes; a
pass that computes with another one's values holds that one itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import Parameter

KEY = "attnopt_constants"
# Elements: a mask of 4096 x 4096. Above that, reading the values would take longer than what may come of it.
LIMIT = 1 << 24


def is_buffer(node: Node, dictionaries: Sequence[str] = ("_buffers",)) -> bool:
    """Whether Dynamo's source for a placeholder is a module's dictionary of buffers."""
    source = getattr(node, "_dynamo_source", None) or getattr(node.meta.get("grapharg"), "source", None)
    base = getattr(source, "base", None)
    return getattr(source, "index", None) is not None and getattr(base, "member", None) in dictionaries


def held_tensor(node: Node) -> Tensor | None:
    """The tensor that a placeholder stands for in the call being compiled, if Dynamo still has it."""
    try:
        found = node.meta["grapharg"].example
    except (KeyError, AttributeError, TypeError, AssertionError):
        return None
    # A subclass may compute its values, and a fake tensor has none.
    return found if type(found) is Tensor else None


def small_buffers(placeholders: Sequence[Node], exported: Sequence[Node]) -> dict[str, Tensor]:
    """Boolean and float buffers without gradients, of at most `LIMIT` elements, by the exported placeholder's name."""
    found = {}
    for old, new in zip(placeholders, exported, strict=True):
        held = held_tensor(old) if is_buffer(old) else None
        if held is None or held.requires_grad or held.numel() > LIMIT or held.device.type == "meta":
            continue
        # Such a tensor counts no writes.
        if held.is_inference():
            continue
        if held.dtype == torch.bool or held.dtype.is_floating_point:
            found[new.name] = held
    return found


def parameter_of(node: Node) -> Tensor | None:
    """The parameter or buffer of a module that a captured graph's placeholder stands for; None for an argument."""
    try:
        found: Any = node.meta["grapharg"].example
    except (KeyError, AttributeError, TypeError, AssertionError):
        return None
    if isinstance(found, Parameter) or (isinstance(found, Tensor) and is_buffer(node, ("_buffers", "_parameters"))):
        return found
    return None


def owned(node: Node) -> Tensor | None:
    """The same without its gradient; None where its values are computed, or its writes cannot be told."""
    found = parameter_of(node)
    if found is None or type(found) not in (Tensor, Parameter) or found.is_inference() or found.device.type == "meta":
        return None
    return found.detach()


def hold(gm: GraphModule, node: Node) -> None:
    """Add a parameter or buffer to the constants of a captured graph, so that one can rely on it."""
    gm.meta.setdefault(KEY, {}).setdefault(node.name, node.meta["grapharg"].example)


def relied_at(gm: GraphModule, names: Iterable[str]) -> dict[int, Tensor]:
    """The constants among a captured graph's inputs that were relied on, by position. The graph, which a compiled
    function may keep, lets go of them all: no pass may ask for them any more."""
    positions = {n.name: at for at, n in enumerate(n for n in gm.graph.nodes if n.op == "placeholder")}
    held = gm.meta.pop(KEY, {})
    return {positions[name]: held[name] for name in names}


def guarded(
    run: Callable[..., Any], untouched: Callable[[], Callable[..., Any]], relied: dict[int, Tensor]
) -> Callable[..., Any]:
    """`run` for as long as the arguments at the positions of `relied` are those tensors, never written to since;
    else what `untouched` compiles, at the first such call.

    Writes are told by autograd's own count of them, which, like autograd, does not see those made through ``.data``
    or another library that shares the memory.
    """
    # Weakly: a compiled function must not keep a model's buffers alive.
    watched = [(at, weakref.ref(tensor), (tensor._version, tensor.data_ptr())) for at, tensor in relied.items()]
    other: list[Callable[..., Any]] = []

    def same(tensor: Tensor, state: tuple[int, int]) -> bool:
        return not tensor.is_inference() and (tensor._version, tensor.data_ptr()) == state

    def checked(*args: Any) -> Any:
        if all(args[at] is held() and same(args[at], state) for at, held, state in watched):
            return run(*args)
        if not other:
            other.append(untouched())
        return other[0](*args)

    return checked
