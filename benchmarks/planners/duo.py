"""A split of heads into retrieval and streaming, from DuoAttention (Xiao et al., 2024).

Every KV head has a gate a in [0, 1], 1 to begin with, and its query heads compute a * full + (1 - a) * streaming, where
streaming keeps some first and last keys. With the model frozen, the gates learn to keep the last hidden state at the
answer of a retrieval task as it is, under a penalty on their sum:

    mean over labelled tokens of (h - h_dense)^2  +  0.05 * mean of |a|

The heads with the largest gates keep all keys. As published: AdamW at 0.02 without decay, the rate rising over the
first fifth of the steps and falling over the last, 128 sinks and 256 keys streaming. The paper takes 2000 steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from attnopt.instrument import Attention, Instrumented
from attnopt.ir import DENSE, Choice, Site
from attnopt.statistics import attention, causal_mask

Gates = dict[str, Tensor]
PENALTY, RATE, STEPS = 0.05, 0.02, 2000


def streaming(q: Tensor, k: Tensor, v: Tensor, scale: float, sink: int, window: int) -> Tensor:
    """Causal attention over the first `sink` and the last `window` keys; shapes as of SDPA with grouped heads."""
    i = torch.arange(q.shape[2], device=q.device)
    keep = causal_mask(q.shape[2], None, None, q.device) & ((i < sink) | (i[:, None] - i < window))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, keep, scale=scale, enable_gqa=True)


class Gated:
    """A model's body whose sites are gated; `gates` holds one parameter (kv_heads,) for each."""

    def __init__(self, body: nn.Module, sink: int, window: int) -> None:
        self.gates: dict[str, nn.Parameter] = {}
        self.open = False
        self.sink, self.window = sink, window
        self.instrumented = Instrumented(body.eval(), self._attention)

    def _attention(self, site: Site) -> Attention:
        gate = self.gates[site.name] = nn.Parameter(torch.ones(site.kv_heads))

        def attend(q: Tensor, k: Tensor, v: Tensor, pad: Tensor | None) -> Tensor:
            full = attention(q, k, v, site.scale, pad, site.mask.window)
            if self.open or site.mask.window:
                return full
            share = gate.to(full.dtype).repeat_interleave(site.heads // site.kv_heads)[:, None, None]
            return share * full + (1 - share) * streaming(q, k, v, site.scale, self.sink, self.window)

        return attend

    def hidden(self, ids: Tensor) -> Tensor:
        """The last hidden state (1, N, D)."""
        return self.instrumented(ids, use_cache=False).last_hidden_state.float()


def train(
    body: nn.Module, examples: Sequence[tuple[Tensor, Tensor]], sink: int = 128, window: int = 256, steps: int = STEPS,
    penalty: float = PENALTY,
) -> Gates:  # fmt: skip
    """Gates (kv_heads,) of every site of `body`, a model that returns a last hidden state.

    examples: token ids int64 (1, N) and which positions are the answer's, bool (N,); taken in turn.
    """
    gated = Gated(body, sink, window)
    required = {p: p.requires_grad for p in body.parameters()}
    try:
        for p in required:
            p.requires_grad_(False)
        with torch.no_grad():
            gated.hidden(examples[0][0])
        optimiser = torch.optim.AdamW(gated.gates.values(), lr=RATE, weight_decay=0.0)
        ramp = max(1, steps // 5)
        for step in range(steps):
            ids, labelled = examples[step % len(examples)]
            gated.open = True
            with torch.no_grad():
                dense = gated.hidden(ids)
            gated.open = False
            optimiser.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / ramp, (steps - step) / ramp)
            moved = (gated.hidden(ids) - dense)[0, labelled].square().mean()
            (moved + penalty * torch.cat(list(gated.gates.values())).abs().mean()).backward()
            optimiser.step()
            optimiser.zero_grad()
            with torch.no_grad():
                for gate in gated.gates.values():
                    gate.clamp_(0.0, 1.0)
    finally:
        for p, before in required.items():
            p.requires_grad_(before)
    return {name: gate.detach().clone() for name, gate in gated.gates.items()}


def split(
    gates: Mapping[str, Tensor], heads: Mapping[str, int], retrieval: int, sink: int, window: int
) -> Mapping[str, tuple[Choice, ...]]:
    """A plan in which the `retrieval` KV heads with the largest gates keep all keys and the others stream.

    heads: query heads of every site. Of equal gates the earlier head goes first.
    """
    stream = Choice.of("sink_window", {"sink": sink, "alpha": window, "beta": 0.0})
    ranked = sorted(((-float(a), n, g) for n, gate in enumerate(gates.values()) for g, a in enumerate(gate)))
    full = {(n, g) for _, n, g in ranked[:retrieval]}
    return {
        name: tuple(
            DENSE if (n, h // (heads[name] // len(gate))) in full else stream for h in range(heads[name])
        )
        for n, (name, gate) in enumerate(gates.items())
    }  # fmt: skip
