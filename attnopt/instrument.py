"""Run a model with something of one's choosing in the place of every recognised attention: the profiler's and the
verifier's way in. Same capture, same matcher and same mask as the backend; the graphs run eagerly, never compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from attnopt.capture import capture
from attnopt.capture.constants import guarded, relied_at
from attnopt.errors import ModelError
from attnopt.ir import Miss, Refusal, Region, Site
from attnopt.passes import OBSERVE, Program
from attnopt.projection import projection_of
from attnopt.recompute import in_pieces

# (q, k, v, pad) -> output, for one site
Attention = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
# Every length is a graph of its own here.
MAX_GRAPHS = 256


class Instrumented:
    """`model` with ``observer(site)`` standing in for each site; call it like the model.

    After a call, `sites` holds what was recognised (in graph order), `left_alone` what was not and why.
    recompute: keep only what passes between layers and run each again in the backward pass, for long sequences and
    large models.
    """

    def __init__(self, model: nn.Module, observer: Callable[[Site], Attention], recompute: bool = False) -> None:
        self.model, self.observer, self.recompute = model, observer, recompute
        self.sites: dict[str, Site] = {}
        self.left_alone: dict[str, Refusal | Miss] = {}
        # The weight of each site's output projection, where the graph shows it: (out, H * Dv).
        self.projections: dict[str, Tensor | None] = {}
        self._attention: dict[str, Attention] = {}
        # fullgraph stays off: a graph break costs a site's neighbours nothing.
        self._compiled = torch.compile(model, backend=self._backend, dynamic=False)

    def _attend(self, region: Region) -> Attention:
        name = region.site.name
        if name not in self._attention:
            self.sites[name] = region.site
            self._attention[name] = self.observer(region.site)
        return self._attention[name]

    def _backend(self, gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        captured = capture(gm)
        if isinstance(captured, Refusal):
            self.left_alone[f"graph {len(self.left_alone)}"] = captured
            return gm.forward
        program = Program(captured, observer=self._attend).run(OBSERVE)
        name_of = {attend: name for name, attend in self._attention.items()}
        observed = [n for n in program.gm.graph.nodes if n.op == "call_function" and n.target in name_of]
        for node in observed:
            self.projections.setdefault(name_of[node.target], projection_of(node))
        left: list[Refusal | Miss] = [*program.refusals, *program.misses]
        for item in left:
            self.left_alone.setdefault(item.path, item)
        constants = relied_at(captured, program.relied_on)
        run = in_pieces(captured, observed) if self.recompute else captured.forward
        return guarded(run, lambda: changed, constants) if constants else run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with many_graphs():
            return self._compiled(*args, **kwargs)

    def logits(self, ids: Tensor) -> Tensor:
        """Logits (B, N, vocabulary) of token ids (B, N), without a KV cache."""
        return logits_of(self, ids, self.model)

    def need_sites(self) -> None:
        """Raise where nothing could be observed, with the first reasons."""
        if not self.sites:
            reasons = "; ".join(str(r) for r in list(self.left_alone.values())[:3]) or "no attention was found"
            raise ModelError(
                f"No attention of this model can be observed: {reasons}.", "`attnopt examine` lists every site."
            )


def many_graphs() -> AbstractContextManager[Any]:
    """In which Dynamo compiles a function up to `MAX_GRAPHS` times, where it would give up without a word after 8."""
    limits = dict.fromkeys(("recompile_limit", "accumulated_recompile_limit"), MAX_GRAPHS)
    found: AbstractContextManager[Any] = torch._dynamo.config.patch(limits)
    return found


def changed(*_: Any) -> Any:
    raise ModelError(
        "A buffer that says what an attention's mask means was written, moved or replaced since the model was traced.",
        "Observe the model anew, and leave its buffers as they are meanwhile.",
    )


def logits_of(call: Callable[..., Any], ids: Tensor, model: nn.Module | None = None) -> Tensor:
    """Logits (B, N, vocabulary) from a model that returns a tensor, a tuple, or an output with `.logits`."""
    config = getattr(model if model is not None else call, "config", None)
    out = call(ids, use_cache=False) if hasattr(config, "use_cache") else call(ids)
    logits = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    logits = out[0] if logits is None else logits
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        raise ModelError(
            "The model's output is not logits of shape (batch, tokens, vocabulary).", "Wrap it so that it returns them."
        )
    return logits


@contextmanager
def gradients_through(model: nn.Module) -> Iterator[None]:
    """Let gradients reach every attention at the least cost: through norms and biases, not the weight matrices."""
    parameters = dict(model.named_parameters())
    state = {name: (p.requires_grad, p.grad) for name, p in parameters.items()}
    small = [p for p in parameters.values() if p.ndim < 2]
    try:
        for p in parameters.values():
            p.requires_grad_(False)
            p.grad = None
        for p in small or parameters.values():
            p.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for name, p in parameters.items():
            p.requires_grad_(state[name][0])
            p.grad = state[name][1]
