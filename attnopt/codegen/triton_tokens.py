"""The Triton target for a step of heads that select tokens: torch's own operators, and nobody waits for the device.

Selecting is a product and torch.topk, attending a gather of the rows that are kept. What a reuse step saves there is
the bytes of the values, not those of the keys: whether a head selects is not known to the host.
"""

from __future__ import annotations

from attnopt.codegen.reference_token_step import TEMPLATE
from attnopt.codegen.self_check import footer
from attnopt.codegen.spec import TokenStep
from attnopt.registry import TARGETS


@TARGETS.register("triton token_step")
class Triton:
    @staticmethod
    def emit(spec: TokenStep) -> str:
        text = TEMPLATE.format(spec=spec, home="reference_token_step")
        return text + footer(spec, "self_check_tokens", "step")
