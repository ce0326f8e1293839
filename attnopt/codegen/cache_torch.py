"""A step of the ragged cache out of torch's operators and the span prefill kernels: the CPU's where its own does not
serve."""

from __future__ import annotations

from torch import Tensor

from attnopt.codegen import reference_cache
from attnopt.codegen.cache_chunk import chunk
from attnopt.codegen.cache_prefill import prefill
from attnopt.codegen.cache_write import write
from attnopt.codegen.self_check import footer
from attnopt.codegen.spec import CacheStep
from attnopt.registry import TARGETS


def step(
    target: str, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, n: Tensor, valid: Tensor | None,
    table: Tensor, spans: Tensor, scale: float, fresh: bool,
) -> Tensor:  # fmt: skip
    """The contract of attnopt/codegen/reference_cache.py, with the prefill kernel of `target`."""
    if fresh and q.shape[2] > 1:
        out = prefill(target, q, k, v, valid, spans, scale)
    elif q.device.type == "cpu":
        out = chunk(q, k, v, keys, values, n, valid, table, spans, scale)
    else:
        return reference_cache.step(q, k, v, keys, values, n, valid, table, spans, scale, fresh)
    write(k, v, keys, values, n, valid, table)
    return out


@TARGETS.register("cpu cache_step")
class Torch:
    @staticmethod
    def emit(spec: CacheStep) -> str:
        text = f'"""{spec}: out of torch\'s operators."""\n\n'
        text += "from functools import partial\n\nfrom attnopt.codegen import cache_torch\n\n"
        text += f'step = partial(cache_torch.step, "{spec.target}")\n'
        return text + footer(spec, "self_check_cache", "step")
