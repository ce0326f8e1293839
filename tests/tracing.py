"""What the tests of patterns, masks and passes share: trace a function as the backend would, and run the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnopt.capture import capture, needs_grad
from attnopt.ir import Refusal
from attnopt.passes import PIPELINE, Program


@dataclass
class Traced:
    """Every Program a call went through, in order, and what the call returned."""

    programs: list[Program] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    output: Any = None

    @property
    def program(self) -> Program:
        assert len(self.programs) == 1, [str(r) for r in self.refusals]
        return self.programs[0]

    @property
    def sites(self) -> list[Any]:
        return [r.site for p in self.programs for r in p.regions]

    @property
    def misses(self) -> list[str]:
        return [m.reason for p in self.programs for m in p.misses]

    @property
    def rewrites(self) -> list[str]:
        return [r.lowering for p in self.programs for r in p.rewrites]

    @property
    def left(self) -> list[str]:
        return [r.reason for p in self.programs for r in (*p.refusals, *p.notes)]


def trace(
    fn: Callable[..., Any], *args: Any, passes: Sequence[Any] = PIPELINE, dynamic: bool | None = False,
    grad: bool = False, verify: bool = True, plan: Any = None, **kwargs: Any,
) -> Traced:  # fmt: skip
    """Run `fn` through Dynamo, capture and the passes; the rewritten graphs run eagerly."""
    traced = Traced()

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        captured = capture(gm)
        if isinstance(captured, Refusal):
            traced.refusals.append(captured)
            return gm.forward
        program = Program(captured, needs_grad=needs_grad(inputs), plan=plan, verify=verify).run(passes)
        traced.programs.append(program)
        return captured.forward

    torch._dynamo.reset()
    compiled = torch.compile(fn, backend=backend, dynamic=dynamic)
    with torch.set_grad_enabled(grad):
        traced.output = compiled(*args, **kwargs)
    return traced


def qkv(
    batch: int = 2, heads: int = 4, kv_heads: int | None = None, length: int = 13, keys: int | None = None,
    dim: int = 8, dim_v: int | None = None, dtype: torch.dtype = torch.float32, seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Random q, k and v of pairwise different sizes."""
    generator = torch.Generator().manual_seed(seed)
    groups, keys, dim_v = kv_heads or heads, keys or length, dim_v or dim

    def normal(*shape: int) -> Tensor:
        return (2 * torch.randn(shape, generator=generator)).to(dtype)

    return normal(batch, heads, length, dim), normal(batch, groups, keys, dim), normal(batch, groups, keys, dim_v)


def operators(traced: Traced) -> list[str]:
    """The operators of attnopt that the graph calls, in order."""
    graph = traced.program.gm.graph
    names = [str(n.target) for n in graph.nodes if n.op == "call_function"]
    return [name.removeprefix("attnopt.").removesuffix(".default") for name in names if name.startswith("attnopt.")]
