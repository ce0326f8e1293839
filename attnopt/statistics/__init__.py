"""What dropping keys does to the loss, for every sink+window at once, in one streamed pass of O(N) memory.

For query row i of a head: A_ij soft-max weights, v_j values, O_i output, dO_i the gradient of the loss at O_i,
g_ij = dO_i.v_j, D_i = dO_i.O_i. Dropping the keys S(i) = {j : s <= j <= i - w} and renormalising over the kept
keys K(i) moves the output by, exactly, with m = sum_S A_ij,

    delta O_i = (m O_i - sum_S A_ij v_j) / (1 - m)        t_i = dO_i . delta O_i = (m D_i - sum_S A_ij g_ij) / (1 - m)

With labels drawn from the model's own distribution and the loss *summed* over tokens, 1/2 sum_i t_i^2 estimates
KL(dense || dropped) in nats to second order (the Fisher form; the first-order sum cancels).

    records      the candidates, the sums, how they add
    observe      `Observe`, the attention that gathers the sums in its backward pass
    blocks       how: one pass over blocks of rows
    triton_pass  the same pass on a GPU
    rows         what follows from the sums of a row
    deltas       how far outputs move, for runs without a backward pass
    trials       what any other replacement does: its outputs are computed, and t_i taken from them
    reference    the N x N twin that all is tested against
"""

from attnopt.statistics.blocks import drawn_starts, stream
from attnopt.statistics.deltas import factor_of
from attnopt.statistics.observe import Observe, attention, causal_mask, measure_forward
from attnopt.statistics.records import (
    PROBED,
    SINK_KEYS,
    SKETCH,
    Grid,
    Observation,
    distance_buckets,
    row_signs,
    sum_names,
    sum_shapes,
)
from attnopt.statistics.reference import naive_observation

__all__ = [
    "PROBED", "SINK_KEYS", "SKETCH", "Grid", "Observation", "Observe", "attention", "causal_mask", "distance_buckets",
    "drawn_starts", "factor_of", "measure_forward", "naive_observation", "row_signs", "stream", "sum_names",
    "sum_shapes",
]  # fmt: skip
