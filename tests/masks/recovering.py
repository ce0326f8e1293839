"""What the tests of masks share: recover the meaning of a function's result, and check it at every position."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from attnopt.ir import Mask
from attnopt.masks.expressions import Affine
from attnopt.masks.interpret import Interpreter
from attnopt.masks.probe import probe
from attnopt.masks.recover import recover
from attnopt.masks.terms import Meaning, Term

B, H, SQ, SK = 2, 3, 7, 9
INDEX = tuple(Affine.var(v) for v in "bhij")


def values_of(gm: GraphModule, inputs: Sequence[Any]) -> Callable[[Node], Tensor]:
    """The value of any node, computed by the graph's own operations from these inputs."""
    held: dict[Node, Any] = dict(zip((n for n in gm.graph.nodes if n.op == "placeholder"), inputs, strict=True))

    def value(node: Node) -> Any:
        if node not in held:
            if node.op == "get_attr":
                held[node] = getattr(gm, str(node.target))
            else:
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), value)
                held[node] = node.target(*args, **kwargs)
        return held[node]

    return value


def meaning_of(
    fn: Callable[..., Tensor], *inputs: Any, kind: Any = None, constants: Sequence[int] = (), causal: bool = False,
    extents: dict[str, int] | None = None, factor: float = 1.0, fill: float | None = None,
) -> Meaning:  # fmt: skip
    """Recover what fn's result means as a mask or bias, probed at every position against the graph itself."""
    gm = make_fx(fn, tracing_mode="fake", pre_dispatch=True)(*inputs)
    (output,) = (n for n in gm.graph.nodes if n.op == "output")
    node = output.args[0]
    held = [n for n in gm.graph.nodes if n.op == "placeholder"]
    kind = kind or ("keep" if node.meta["val"].dtype == torch.bool else "add")
    interpreter = Interpreter({held[n]: inputs[n] for n in constants})
    sizes = extents or {"b": B, "h": H, "i": SQ, "j": SK}
    terms = [Term(kind, node, INDEX, fill, factor)]
    meaning = recover(terms, sizes, causal=causal, interpreter=interpreter)
    look = values_of(gm, inputs)
    probe(meaning, terms, sizes, look, causal=causal)
    check_loads(meaning, look, sizes)
    return meaning


def check_loads(meaning: Meaning, look: Callable[[Node], Tensor], sizes: dict[str, int]) -> None:
    """Padding is handed over as booleans over (B, Sk) or (Sk), data over (i, j) as booleans; true is kept."""
    mask = meaning.mask
    for load in mask.loads:
        value = look(meaning.nodes[load.name])
        assert value.dtype == torch.bool
        assert [s for s in value.shape if s != 1] == [sizes[d] for d in load.dims if sizes[d] != 1]
    for load in mask.opaque:
        assert look(meaning.nodes[load.name]).dtype == torch.bool
    for load in (*mask.reads, *(meaning.bias.loads if meaning.bias else ())):
        assert load.name in meaning.nodes


def bounded(mask: Mask, batch: int, queries: int, keys: int) -> Tensor:
    """The record's bounds read literally: bool (batch, queries, keys)."""
    assert isinstance(mask.offset, int)
    i, j = torch.arange(queries)[:, None] + mask.offset, torch.arange(keys)[None, :]
    keep = torch.ones(batch, queries, keys, dtype=torch.bool)
    if mask.causal:
        keep &= j <= i
    if mask.window is not None:
        keep &= ((i - j).abs() if mask.symmetric else i - j) < mask.window
    if mask.chunk:
        keep &= i // mask.chunk == j // mask.chunk
    return keep


def keep_of_record(meaning: Meaning, fn: Callable[..., Tensor], inputs: Sequence[Any]) -> Tensor:
    """The Mask record read literally where it is simple: bool (B, Sq, Sk)."""
    mask = meaning.mask
    assert not mask.loads and not mask.opaque and not mask.terms
    return bounded(mask, B, SQ, SK)
