"""channels: as top_tokens, with scores of the r most important features alone, which cost r / D of the bytes to read.

    keep j < sink or p - j < recent or j in T,    T: the k largest sums of q_d k_jd over r features d

Double Sparsity's (Yang et al., "Post-Training Sparse Attention with Double Sparsity", arXiv:2408.07092), with two
differences: features are weighed at the end of the prompt, by its last 64 queries and all its keys, where the paper
calibrates them offline; and for a KV head, not for each query head, so that its query heads share one copy of the
features of its keys.
"""

from __future__ import annotations

import torch

from attnopt.candidates import Param, Params
from attnopt.candidates._tokens import MOST_STEPS, Tokens
from attnopt.codegen.reference_tokens import TokenRule
from attnopt.ir import Choice, Site
from attnopt.registry import CANDIDATES

MOST_FEATURES = 1024
# Features that are tried.
OFFERED_FEATURES = (4, 8)


class Channels(Tokens):
    name = "channels"
    params = (*Tokens.kept, Param("r", int, 1, MOST_FEATURES), Param("every", int, 1, MOST_STEPS))

    def menu(self, length: int) -> list[Choice]:
        return [choice for features in OFFERED_FEATURES for choice in self.offered({"r": features, "every": 1}, length)]

    def token_rule(self, params: Params) -> TokenRule:
        count, sink, recent, every, channels = (int(params[name]) for name in ("k", "sink", "recent", "every", "r"))
        return TokenRule(count, sink, recent, every, channels=channels)

    def misfit(self, params: Params, site: Site) -> str:
        most = site.head_dim
        return f"r is {params['r']:g}, and its keys have {most} features" if params["r"] > most else ""

    def state_bytes(self, params: Params, site: Site, length: int) -> int:
        """The features of every key, of which the query heads of a KV head share one copy."""
        return int(params["r"]) * length * getattr(torch, site.dtype).itemsize * site.kv_heads // site.heads


CANDIDATES.register("channels")(Channels())
