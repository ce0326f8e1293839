"""What several heads damage together: their losses in the same rows add before they are squared.

    KL(dense || plan)  ~  1/2 sum_i (sum_h t_hi)^2  =  1/2 sum_h sum_g  rho_hg z_h z_g        z_h = (sum_i t_hi^2)^(1/2)

rho, the correlation of two heads' losses over rows, hardly depends on what the heads are replaced by. So it is
estimated once, from the sketches of a profile over all observed windows, and the damage of a single head, which is
known exactly, is kept: a plan costs H^2 products. Adding heads as if rho were 0 gives 0.65 of the measured divergence
on mixtures of the demo model that raise its loss by up to 5 %, this sum 1.0 of it (docs/planner.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from attnopt.planner.knapsack import Array
from attnopt.statistics import SKETCH

if TYPE_CHECKING:
    from attnopt.profile_file import Profile


def correlations(profile: Profile, sites: Sequence[str], length: int) -> Array:
    """rho (H, H) of all heads of `sites` in order, at a profiled length; 1 on the diagonal."""
    seen = [profile.observations[site, length] for site in sites]
    sketch = torch.cat([o.sketch for o in seen]).permute(1, 0, 2) / SKETCH**0.5
    size = torch.cat([o.t2[:, -1] for o in seen]).clamp_min(0).sqrt().T
    products = torch.einsum("whk,wgk->hg", sketch, sketch)
    sizes = torch.einsum("wh,wg->hg", size, size)
    # A head that loses nothing is correlated with none.
    rho = torch.where(sizes > 0, products / sizes.clamp_min(torch.finfo(sizes.dtype).tiny), 0.0).clamp(-1.0, 1.0)
    return rho.fill_diagonal_(1.0).numpy()


def together(damage: Array, rho: Array) -> float:
    """The damage of all heads at once, from that of each alone (H,); at least 0, in the unit of `damage`."""
    z = np.sqrt(damage)
    return max(float(z @ rho @ z), 0.0)
