"""Tiny random models whose attention matters, plans for them, and what tests of generation do again and again.

Weights are scaled up and the head's logits brought to a spread of about one, so that a key that is missing or one too
many moves logits by far more than rounding does, which a test of this folder asserts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import transformers
from generation import oracle
from torch import Tensor

import attnopt
from attnopt.fingerprint import Fingerprint, fingerprint_of
from attnopt.ir import DENSE, Choice, Mask, Site
from attnopt.plan import Budget, Lengths, Plan, Predicted

VOCABULARY, HIDDEN, LAYERS, HEADS, KV_HEADS = 61, 64, 2, 4, 2
HEAD_DIM = HIDDEN // HEADS
OWN_WINDOW = 8
MAX_LENGTH = 64
# Largest difference of a logit from the oracle's; logits have a spread of about one.
TOLERANCE = 1e-5
FAMILIES = ("llama", "qwen3", "mistral", "mixed", "partial")
SHARED = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
MIXED = {
    "use_sliding_window": True,
    "sliding_window": OWN_WINDOW,
    "layer_types": ["full_attention", "sliding_attention"],
}
# Class prefix and what each family's configuration adds: q/k norm, own windows of all or some layers, part of a head
# rotated.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen3": ("Qwen3", {"head_dim": HEAD_DIM}),
    "mistral": ("Mistral", {"sliding_window": OWN_WINDOW}),
    "mixed": ("Qwen3", {"head_dim": HEAD_DIM, **MIXED}),
    "partial": ("StableLm", {"partial_rotary_factor": 0.25, "use_qkv_bias": True}),
}
Rule = tuple[int, int, float]  # sink, alpha, beta
FULL: Rule = (0, 1 << 20, 0.0)
# Per layer, per query head. Heads of a group differ, one window grows with the length, one head is dense.
RULES: tuple[tuple[Rule, ...], ...] = (
    ((2, 5, 0.0), (1, 9, 0.0), (0, 0, 0.125), (3, 4, 0.0)),
    ((0, 6, 0.0), (4, 3, 0.0), FULL, (1, 7, 0.0)),
)
ALL_FULL: tuple[tuple[Rule, ...], ...] = ((FULL,) * HEADS,) * LAYERS
# Of layers with a window of their own, spans below and above it.
NARROW: tuple[tuple[Rule, ...], ...] = (
    ((0, 5, 0.0), (0, 3, 0.0), (0, 0, 0.0625), (0, 20, 0.0)),
    ((0, 6, 0.0), (0, 2, 0.0), FULL, (0, 4, 0.0)),
)


def build(family: str, layers: int = LAYERS, seed: int = 0, **changes: Any) -> Any:
    """A causal model in float32 that runs on SDPA; generation never stops before its limit."""
    prefix, own = KINDS[family]
    if layers != LAYERS and "layer_types" in own:
        own = own | {"layer_types": own["layer_types"][:layers]}
    config = getattr(transformers, f"{prefix}Config")(**SHARED | own | {"num_hidden_layers": layers} | changes)
    config._attn_implementation = "sdpa"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    # Norms that differ from one and biases from zero.
                    parameter.add_(0.1 * torch.randn_like(parameter))
                elif "embed" not in name and "lm_head" not in name:
                    parameter.mul_(8.0 if "self_attn" in name else 4.0)
            logits = model(torch.randint(1, config.vocab_size, (2, 32))).logits
            model.lm_head.weight.div_(logits.std())
    return model


@cache
def shared(family: str) -> Any:
    """One model of a family for all tests; nobody changes it, and what a test enables it disables."""
    return build(family)


def windows_of(model: Any) -> list[int | None]:
    """The own sliding window of each layer."""
    config = model.config
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in types]


def rules_for(model: Any) -> tuple[tuple[Rule, ...], ...]:
    """RULES, or without sinks where a layer has a window of its own."""
    return tuple(
        full if own is None else narrow for own, full, narrow in zip(windows_of(model), RULES, NARROW, strict=True)
    )


def spans_of(model: Any, rules: tuple[tuple[Rule, ...], ...], length: int = MAX_LENGTH) -> list[list[tuple[int, int]]]:
    """What the rules mean in a cache of this length, for the oracle."""
    return [
        [oracle.span(*rule, length, own) for rule in layer] for layer, own in zip(rules, windows_of(model), strict=True)
    ]


def site(name: str, heads: int, kv_heads: int, dim: int, window: int | None = None) -> Site:
    mask = Mask(causal=True, window=window)
    return Site(name, 0, "sdpa", heads, kv_heads, dim, dim, dim**-0.5, "float32", mask)


def sites_of(model: Any) -> list[Site]:
    config = model.config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = config.num_attention_heads, config.num_key_value_heads
    return [site(f"model.layers.{n}.self_attn", *heads, dim, own) for n, own in enumerate(windows_of(model))]


def plan_of(model: Any, rules: tuple[tuple[Rule, ...], ...], **changes: Any) -> Plan:
    """A plan of these rules for a model of the families above, with nothing predicted or measured."""
    return dataclasses.replace(plan_at(model, sites_of(model), rules), **changes)


def plan_at(model: Any, sites: list[Site], rules: tuple[tuple[Rule, ...], ...]) -> Plan:
    choices = {
        site.name: tuple(
            DENSE if rule == FULL else Choice.of("sink_window", dict(zip(("sink", "alpha", "beta"), rule, strict=True)))
            for rule in layer
        )
        for site, layer in zip(sites, rules, strict=True)
    }
    return Plan(
        model="tiny",
        fingerprint=fingerprint_of(model, sites),
        budget=Budget("kl", 1.0),
        lengths=Lengths((MAX_LENGTH,), MAX_LENGTH),
        choices=choices,
        predicted=Predicted(0.0, "density", "million kept pairs", 1.0, 1.0, 1.0, 1.0),
    )


def foreign(plan: Plan) -> Plan:
    """The same plan, of another model."""
    return dataclasses.replace(plan, fingerprint=Fingerprint("0" * 16, plan.fingerprint.samples))


def prompts(batch: int = 3, length: int = 21, seed: int = 1) -> Tensor:
    """Token ids (batch, length), none of them the padding's."""
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(batch: int = 3, length: int = 21, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask: the rows begin with 0, 5, 10, ... pads, more than any sink."""
    ids, mask = prompts(batch, length, seed), torch.ones(batch, length, dtype=torch.long)
    for row in range(batch):
        mask[row, : 5 * row] = 0
    return ids.where(mask.bool(), torch.zeros_like(ids)), mask


def generate(model: Any, ids: Tensor, mask: Tensor | None = None, new: int = 24, **options: Any) -> Any:
    """`model.generate` with its sequences, logits and scores."""
    wanted = {"do_sample": False, "output_logits": True, "output_scores": True, "return_dict_in_generate": True}
    if mask is None:
        mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, **wanted | options)


def produced_logits(out: Any) -> Tensor:
    """(rows, new tokens, V)."""
    return torch.stack(out.logits, 1)


def difference(a: Tensor, b: Tensor) -> float:
    """The largest, in float64; NaN and infinities are differences too."""
    found = (a.double() - b.double()).abs().max().item()
    return found if found == found else float("inf")


@contextmanager
def enabled(model: Any, rules: tuple[tuple[Rule, ...], ...] | None, **options: Any) -> Iterator[Any]:
    """The model under `attnopt.enable` and a plan of these rules; None: without a plan."""
    attnopt.enable(model, None if rules is None else plan_of(model, rules), **options)
    try:
        yield model
    finally:
        attnopt.disable(model)


@contextmanager
def attending(model: Any) -> Iterator[Any]:
    """The model with the attention of attnopt and nothing else of it: the route on public interfaces alone."""
    assert attnopt.SpanCache, "importing it registers the attention"
    before = model.config._attn_implementation
    model.set_attn_implementation("attnopt")
    try:
        yield model
    finally:
        model.set_attn_implementation(before)


def assert_follows(
    model: Any, rules: tuple[tuple[Rule, ...], ...], ids: Tensor, mask: Tensor | None, out: Any,
    length: int | None = None,
) -> None:  # fmt: skip
    """Every logit of a call of `generate` is the oracle's, along the sequences it produced.

    length: what elastic windows are a share of; None: the length its cache was made for.
    """
    mask = torch.ones_like(ids) if mask is None else mask
    length = length or out.past_key_values.max_length
    expected = oracle.following(model, ids, mask, out, spans_of(model, rules, length))
    found = produced_logits(out)
    assert found.shape == expected.shape
    off = difference(found, expected)
    assert off < TOLERANCE, f"off by {off:.2g}, at a spread of {expected.std():.2g}"
