"""Sites of which no head can leave the graph: asked of the pass that would remove them, before a plan counts on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from attnopt.capture import capture
from attnopt.instrument import logits_of, many_graphs
from attnopt.ir import DENSE, Choice, Refusal, Site
from attnopt.passes import RECOGNISE, Program, prune
from attnopt.plan import Budget, Lengths, Plan, Predicted

if TYPE_CHECKING:
    from attnopt.fingerprint import Fingerprint
    from attnopt.fitted import Fitted

NOTHING = Predicted(0.0, "density", "million kept pairs", 1.0, 1.0, 1.0, 1.0)


def not_cuttable(
    model: nn.Module, ids: Tensor, sites: Sequence[Site], fingerprint: Fingerprint, fitted: Fitted
) -> dict[str, str]:
    """Why no head of a site can be removed, by site name: what the pass says of one head of each. ids (B, N): what the
    model is traced with. Sites that are not in it can be cut."""
    choices = {s.name: (Choice.of("pruned"), *(DENSE,) * (s.heads - 1)) for s in sites if s.heads}
    asked = Plan("", fingerprint, Budget("loss", 0.0), Lengths((), 1), choices, NOTHING, fitted=fitted)
    found: dict[str, str] = {}

    def backend(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        captured = capture(gm)
        if not isinstance(captured, Refusal):
            program = Program(captured, plan=asked).run(RECOGNISE)
            for region in program.pending:
                name = region.site.name
                no = prune.remove_heads(program, region, choices[name]) if name in choices else None
                if no is not None:
                    found[name] = no.reason
        return gm.forward

    with torch.no_grad(), many_graphs():
        logits_of(torch.compile(model, backend=backend, dynamic=False), ids, model)
    return found
