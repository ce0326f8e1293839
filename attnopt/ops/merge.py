"""Two attentions of the same rows over different keys, put together under one normaliser."""

from __future__ import annotations

import torch
from torch import Tensor


def merge(out: Tensor, lse: Tensor, far_out: Tensor, far_lse: Tensor) -> Tensor:
    """The attention over both parts' keys: out, far_out (..., N, Dv) and their rows' logsumexp lse, far_lse (..., N).

    out' = (e^lse out + e^far_lse far_out) / (e^lse + e^far_lse), of which the far part's share is
    sigmoid(far_lse - lse): nothing overflows, whatever the two are. A logsumexp of -inf is a part without a key, and a
    row in which both are keeps `out`. In the dtype of the logsumexps, returned in that of `out`; differentiable at all
    four, without a NaN where one is -inf.
    """
    # Selected and not computed where the far part is empty: -inf less -inf has no value, and no gradient.
    ahead = torch.where(far_lse == -torch.inf, -torch.inf, far_lse - lse)
    share = torch.sigmoid(ahead)[..., None]
    near = out.to(lse.dtype)
    return (near + share * (far_out.to(lse.dtype) - near)).to(out.dtype)
