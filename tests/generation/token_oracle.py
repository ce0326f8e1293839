"""What generation with selected tokens must equal: all tokens at once, and what each step keeps found by a loop.

Nothing of attnopt is imported: how a head selects is stated a second time, in `kept`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from generation import oracle
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "token oracle"
Head = Mapping[str, float]  # the parameters of top_tokens or channels, or sink and window; nothing for a dense head
# Of channels: queries of the prompt that say what matters.
LAST = 64


def kept(head: Head, step: int, state: dict[str, Any], q: Tensor, keys: Tensor, held: list[int] | None) -> list[int]:
    """The positions that a step at position `step` keeps. q (N, D): the row's queries, keys (N, D); held: what an
    earlier layer's head holds at this step; state: of the head and row, written."""
    if "k" not in head:
        return [j for j in range(step + 1) if j < head.get("sink", 0) or step - j < head.get("window", math.inf)]
    if head.get("behind"):
        assert held is not None
        state["held"] = held
    else:
        now, then = q[step], q[state["at"]] if state else None
        apart = then is not None and bool(now @ then < head.get("similar", 0) * now.norm() * then.norm())
        if then is None or step - state["at"] >= head["every"] or (head.get("similar", 0) > 0 and apart):
            features = head.get("features")
            scores = keys[: step + 1] @ now if features is None else keys[: step + 1][:, features] @ now[features]
            order = sorted(range(step + 1), key=lambda j: (-float(scores[j]), j))
            state.update(at=step, held=order[: int(head["k"])])
    here = state["held"]
    return [j for j in range(step + 1) if j < head["sink"] or step - j < head["recent"] or j in here]


def features_of(q: Tensor, k: Tensor, prompt: int, count: int) -> list[int]:
    """q (share, N, D), k (N, D), of which `prompt` tokens are the prompt's."""
    weight = q[:, max(0, prompt - LAST) : prompt].abs().sum((0, 1)) * k[:prompt].abs().sum(0)
    return sorted(range(len(weight)), key=lambda d: (-float(weight[d]), d))[:count]


def attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """q (B, H, N, D), k and v (B, G, N, D) of all tokens: (B, N, H, D), 0 in rows that are pads."""
    batch, heads, length, _dim = q.shape
    share, config = heads // k.shape[1], module.config
    real = torch.ones(batch, length, dtype=torch.bool) if valid is None else valid[:, 0, 0]
    out, layer = torch.zeros_like(q), module.layer_idx
    for b in range(batch):
        at = real[b].nonzero()[:, 0]
        prompt, dense = int((at < config.oracle_prompt).sum()), config.oracle_dense[at]
        for h, head in enumerate(config.oracle_heads[layer]):
            queries, keys, values = q[b, h, at], k[b, h // share, at], v[b, h // share, at]
            state: dict[str, Any] = {}
            if "r" in head:
                group = q[b, h // share * share : (h // share + 1) * share][:, at]
                # Without a prompt, the text stands for it.
                head = {**head, "features": features_of(group, keys, prompt or len(at), int(head["r"]))}
            for i in range(len(at)):
                source = config.oracle_held.get((layer - int(head.get("behind", 0)), b, h, i))
                if dense[i] or int(at[i]) in config.oracle_anew:
                    state.clear()
                keep = list(range(i + 1))
                if not dense[i] or "k" not in head:
                    keep = kept(head, i, state, queries, keys, source)
                config.oracle_held[layer, b, h, i] = state.get("held")
                out[b, h, at[i]] = (keys[keep] @ queries[i] * scaling).softmax(0) @ values[keep]
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, oracle.whole_padding_mask)


def following(
    model: Any, ids: Tensor, mask: Tensor, sequences: Tensor, heads: Sequence[Sequence[Head]],
    dense: Sequence[int] = (), anew: Sequence[int] = (),
) -> Tensor:  # fmt: skip
    """Logits (rows, new tokens, V) along `sequences`, which begin with the prompt ids, mask (B, L); float64. dense:
    later columns that came several at once; anew: columns at which nothing is selected yet."""
    mask = mask.repeat_interleave(len(sequences) // len(mask), 0)
    mask = torch.cat([mask, mask.new_ones(len(mask), sequences.shape[1] - ids.shape[1])], 1)
    return logits(model, sequences, mask, heads, ids.shape[1], dense, anew)[:, ids.shape[1] - 1 : -1]


def logits(
    model: Any, sequences: Tensor, mask: Tensor, heads: Sequence[Sequence[Head]], prompt: int = 0,
    dense: Sequence[int] = (), anew: Sequence[int] = (),
) -> Tensor:  # fmt: skip
    """Logits (rows, N, V) of sequences, mask (rows, N), of which the first `prompt` columns came at once."""
    config = copy.deepcopy(model.config)
    config._attn_implementation = NAME
    with torch.random.fork_rng():
        twin = type(model)(config)
    twin.load_state_dict(model.state_dict())
    twin = twin.double().eval()
    columns, config = torch.arange(sequences.shape[1]), twin.config
    config.oracle_heads, config.oracle_prompt, config.oracle_held, config.oracle_anew = heads, prompt, {}, anew
    config.oracle_dense = (columns < prompt) | torch.isin(columns, torch.tensor(list(dense), dtype=torch.int64))
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        found: Tensor = twin(sequences, attention_mask=mask, position_ids=positions, use_cache=False).logits
    return found
