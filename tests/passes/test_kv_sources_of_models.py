"""Where keys and values come from in whole models: encoder and decoder, pooling, transformers with their caches."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import HEAD_DIM, HEADS, HIDDEN, build, tokens
from torch import nn
from tracing import Traced, trace

from attnopt.capture import capture
from attnopt.ir import Refusal
from attnopt.passes import PIPELINE, Program

attend = F.scaled_dot_product_attention


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Decoder(nn.Module):
    """Two layers, each of self-attention and attention to what an encoder of the same graph makes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.source, self.target = nn.Embedding(17, HIDDEN), nn.Embedding(17, HIDDEN)
        self.w = nn.ParameterList(normal(HIDDEN, HIDDEN, seed=s) / HIDDEN**0.5 for s in range(12))

    def attention(self, x, memory, w):
        q, k, v = (
            F.linear(t, a).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
            for t, a in zip((x, memory, memory), w, strict=True)
        )
        return x + attend(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, source, target):
        # Dynamo before 2.13 breaks the graph where a ParameterList is sliced.
        w = [self.w[n] for n in range(12)]
        memory = self.source(source)
        memory = self.attention(memory, memory, w[:3])
        x = self.target(target)
        for layer in (0, 1):
            x = self.attention(x, x, w[3 * layer : 3 * layer + 3])
            x = self.attention(x, memory, w[6 + 3 * layer : 9 + 3 * layer])
        return x


@pytest.mark.parametrize("length", [9, 20, 1])
def test_an_encoder_and_a_decoder_in_one_graph(length):
    traced = trace(Decoder().eval(), tokens(2, 20) % 17, tokens(2, length) % 17)
    decoder = ["cross", "cross"] if length == 1 else ["fresh", "cross"] * 2
    assert [s.kv for s in traced.sites] == ["fresh", *decoder]


class Pooling(nn.Module):
    """One learned query, repeated for every sample of a batch whose size is a symbol."""

    def __init__(self):
        super().__init__()
        self.probe, self.w = nn.Parameter(normal(1, 1, HIDDEN, seed=1)), nn.Parameter(normal(HIDDEN, HIDDEN, seed=2))

    def forward(self, x):
        q = (self.probe.repeat(x.shape[0], 2, 1) @ self.w).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
        k = x.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
        return attend(q, k, k)


def test_a_query_repeated_over_a_symbolic_batch():
    model, x = Pooling().eval(), normal(3, 11, HIDDEN, seed=3)
    torch._dynamo.mark_static(x, 2)
    traced = trace(model, x, dynamic=True)
    assert [s.kv for s in traced.sites] == ["cross"]
    torch.testing.assert_close(traced.output, model(x))


def generate(model, cache, lengths, dynamic):
    """Both ways of running, step by step: the programs of each step that was compiled, the kinds of its sites."""
    steps = []

    def backend(gm, inputs):
        captured = capture(gm)
        assert not isinstance(captured, Refusal), captured
        program = Program(captured, verify=True).run(PIPELINE)
        steps[-1].programs.append(program)
        return captured.forward

    torch._dynamo.reset()
    call = torch.compile(model, backend=backend, dynamic=dynamic)
    mine, theirs = cache(), cache()
    ids, start = tokens(2, sum(lengths)), 0
    for length in lengths:
        steps.append(Traced())
        now, start = ids[:, start : start + length], start + length
        with torch.no_grad():
            found = call(now, past_key_values=mine, use_cache=True).logits
            expected = model(now, past_key_values=theirs, use_cache=True).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        for a, b in zip(mine.layers, theirs.layers, strict=True):
            torch.testing.assert_close(a.keys, b.keys, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(a.values, b.values, atol=1e-5, rtol=1e-4)
    return steps


def model_and_cache(family, cache, attention="sdpa", capacity=16):
    import transformers

    if family == "gemma2":
        sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        grouped = {"num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8, "sliding_window": 7}
        torch.manual_seed(0)
        config = transformers.Gemma2Config(**sizes, **grouped)
        config._attn_implementation = attention
        model = transformers.Gemma2ForCausalLM(config).eval()
    else:
        model = build(family, attention, num_hidden_layers=1)
    if cache == "dynamic":
        return model, lambda: transformers.DynamicCache(config=model.config)
    return model, lambda: transformers.StaticCache(config=model.config, max_cache_len=capacity)


# Lengths of the calls, and the kinds of the layers in each graph that was compiled: one where all layers are alike.
GENERATION = {
    ("llama", "dynamic"): ((5, 1, 1, 1, 1), [["fresh"], ["cat"]]),
    ("llama", "static"): ((5, 1, 1), [["write"], ["write"]]),
    ("mistral", "dynamic"): ((5, 1, 1, 1, 1), [["fresh"], ["cat"]]),
    # A window of seven: two steps before the buffer is full, two after.
    ("mistral", "static"): ((5, 1, 1, 1, 1), [["write"], ["write"], ["ring"]]),
    ("gemma2", "static"): ((5, 1, 1, 1, 1), [["write"] * 2, ["write"] * 2, ["ring", "write"]]),
}


STEPWISE = [
    # Gemma 2 caps its scores, which it does in eager attention only.
    pytest.param(
        *(family, cache, "eager" if family == "gemma2" else "sdpa", dynamic),
        # With room for every token a window changes no cache: test_append has that of one model.
        marks=[pytest.mark.full] if (family, cache) == ("mistral", "dynamic") else [],
    )
    for (family, cache) in GENERATION
    # A growing cache with symbols, and one that is there with numbers.
    for dynamic in ((None,) if cache == "dynamic" else (False,))
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "cache", "attention", "dynamic"), STEPWISE)
def test_generation(family, cache, attention, dynamic):
    lengths, kinds = GENERATION[family, cache]
    steps = generate(*model_and_cache(family, cache, attention), lengths, dynamic)
    programs = [p for s in steps for p in s.programs]
    found = [[r.site.kv for r in p.regions] for p in programs]
    # A shape may be compiled more than once, first as it is and then with symbols.
    assert [k for n, k in enumerate(found) if n == 0 or k != found[n - 1]] == squeezed(kinds)
    assert not any(p.misses for p in programs)
    assert all(r.site.mask.closed for p in programs for r in p.regions)
    assert not any("Verification" in r.reason for p in programs for r in p.refusals)


def squeezed(kinds):
    return [k for n, k in enumerate(kinds) if n == 0 or k != kinds[n - 1]]


def test_several_tokens_at_a_full_window():
    model, cache = model_and_cache("mistral", "static")
    steps = generate(model, cache, (4, 5, 1, 2), None)
    assert [[r.site.kv for r in p.regions] for s in steps for p in s.programs] == [
        ["write"], ["cat"], ["ring"], ["ring"],
    ]  # fmt: skip


def test_cross_attention_of_t5():
    import transformers

    config = transformers.T5Config(
        vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    traced = trace(lambda a, b: model(input_ids=a, decoder_input_ids=b, use_cache=False).logits, tokens(), tokens(2, 9))
    kinds = {s.path.split(".")[-1]: set() for s in traced.sites}
    for site in traced.sites:
        kinds[site.path.split(".")[-1]].add(site.kv)
    assert kinds == {"SelfAttention": {"fresh"}, "EncDecAttention": {"cross"}} and len(traced.sites) == 6
    torch.testing.assert_close(
        traced.output, model(input_ids=tokens(), decoder_input_ids=tokens(2, 9)).logits, atol=1e-4, rtol=1e-4
    )


def test_layers_of_gemma3n_that_share():
    import transformers

    if not hasattr(transformers, "Gemma3nTextConfig"):
        pytest.skip("no Gemma3n in this version of transformers")
    config = transformers.Gemma3nTextConfig(
        vocab_size=96, vocab_size_per_layer_input=96, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=7, num_kv_shared_layers=2,
        hidden_size_per_layer_input=8, laurel_rank=4, altup_num_inputs=2, activation_sparsity_pattern=None,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Gemma3nForCausalLM(config).eval()
    traced = trace(lambda ids: model(ids, use_cache=True).logits, tokens())
    assert [s.kv for s in traced.sites] == ["fresh", "fresh", "shared", "shared"], traced.misses
