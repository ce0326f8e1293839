"""Two attentions of the same rows over different keys, put together under one normaliser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

aten = torch.ops.aten


def compute(target: Any, *args: Any, **kwargs: Any) -> Any:
    return target(*args, **kwargs)


def merge(out: Any, lse: Any, far_out: Any, far_lse: Any, call: Callable[..., Any] = compute) -> Any:
    """The attention over both parts' keys: out, far_out (..., N, Dv) and their rows' logsumexp lse, far_lse (..., N).

    out' = (e^lse out + e^far_lse far_out) / (e^lse + e^far_lse), of which the far part's share is
    sigmoid(far_lse - lse): nothing overflows, whatever the two are. A logsumexp of -inf is a part without a key, and a
    row in which both are keeps `out`. In the dtype of the logsumexps, returned in that of `out`; differentiable at all
    four, without a NaN where one is -inf.

    call: ``call(target, *args)``, which computes, or inserts nodes for tensors that are nodes.
    """
    # Filled in and not computed where the far part is empty: -inf less -inf has no value, and no gradient.
    empty = call(aten.eq.Scalar, far_lse, -torch.inf)
    ahead = call(aten.masked_fill.Scalar, call(aten.sub.Tensor, far_lse, lse), empty, -torch.inf)
    share = call(aten.unsqueeze.default, call(aten.sigmoid.default, ahead), -1)
    wide, own = (x.dtype if isinstance(x, torch.Tensor) else x.meta["val"].dtype for x in (lse, out))
    near, far = (call(aten._to_copy.default, x, dtype=wide) for x in (out, far_out))
    # Not lerp, which cannot be traced with lengths that are symbols (torch 2.13).
    moved = call(aten.mul.Tensor, share, call(aten.sub.Tensor, far, near))
    return call(aten._to_copy.default, call(aten.add.Tensor, near, moved), dtype=own)
