"""What several heads damage together: their losses in the same rows add before they are squared.

    KL(dense || plan)  ~  1/2 sum_i (sum_h t_hi)^2  =  1/2 sum_h sum_g  rho_hg z_h z_g        z_h = (sum_i t_hi^2)^(1/2)

A head whose far keys something stands in for is taken to be correlated as with its window: of what is left of its
losses no sketch is kept.

rho, the correlation of two heads' losses over rows, is estimated once, over all pairs of observed windows, from the
sketches of a profile; the damage of a single head, which is known exactly, is kept. A plan costs H^2 products
(`Problem.expected`). How much closer that comes to what is measured than heads added as if they were independent
(rho = 0), and than a correlation of equal windows: docs/planner.md, `python -m benchmarks.prediction`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from attnopt.statistics import SKETCH

if TYPE_CHECKING:
    from attnopt.profile_file import Profile

Array = np.ndarray[Any, Any]


def correlations(profile: Profile, sites: Sequence[str], lengths: Sequence[int]) -> Array:
    """rho (H, H) of all heads of `sites` in order, over the profiled `lengths`; 1 on the diagonal. (0, 0) where a
    profile without a backward pass holds no sketches."""
    if "sketch" not in profile.header.held:
        return np.zeros((0, 0))
    products = sizes = torch.zeros((), dtype=torch.float64)
    for length in lengths:
        seen = [profile.observations[site, length] for site in sites]
        sketch = torch.cat([o.sketch for o in seen]) / SKETCH**0.5
        size = torch.cat([o.t2[:, -1] for o in seen]).clamp_min(0).sqrt().sum(-1)
        products = products + sketch @ sketch.T
        sizes = sizes + size[:, None] * size
    # A head that loses nothing is correlated with none.
    rho = torch.where(sizes > 0, products / sizes.clamp_min(torch.finfo(sizes.dtype).tiny), 0.0).clamp(-1.0, 1.0)
    return rho.fill_diagonal_(1.0).numpy()
