"""Where keys and values come from: hand-written caches, layers, and near misses."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from models import NanoGPT, tokens
from tracing import trace

attend = F.scaled_dot_product_attention


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def heads(x, count=4):
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def rope(x):
    """Rotary embedding by halves: its concatenation joins features."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2])[:, None] / 100.0 ** (torch.arange(half) / half)
    angle = torch.cat([angle, angle], -1)
    return x * angle.cos() + torch.cat([-x[..., half:], x[..., :half]], -1) * angle.sin()


def complex_rope(x):
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    angle = torch.arange(x.shape[-2])[:, None] / 100.0 ** torch.linspace(0, 1, pairs.shape[-1])
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


X, MEMORY, STEP = normal(2, 13, 32), normal(2, 19, 32, seed=1), normal(2, 1, 32, seed=2)
W, W2, W3 = (normal(32, 32, seed=s) for s in (3, 4, 5))
PAST, PAST_V = normal(2, 4, 11, 8, seed=6), normal(2, 4, 11, 8, seed=7)
POSITION = torch.tensor([6])
NORM = torch.ones(8)


def projected(x, w):
    return heads(F.linear(x, w))


# name -> (kind, function, arguments). Each function gets fresh copies of its arguments.
def fresh(x, w, w2, w3):
    return attend(projected(x, w), projected(x, w2), projected(x, w3))


def fresh_rope(x, w, w2, w3):
    return attend(rope(projected(x, w)), rope(projected(x, w2)), projected(x, w3))


def fresh_complex_rope(x, w, w2, w3):
    return attend(complex_rope(projected(x, w)), complex_rope(projected(x, w2)), projected(x, w3))


def fresh_normed(x, w, w2, w3, norm):
    q, k = (F.rms_norm(projected(x, a), (8,), norm) for a in (w, w2))
    return attend(rope(q), rope(k), projected(x, w3))


def fresh_packed(x, w, w2, w3):
    q, k, v = F.linear(x, torch.cat([w, w2, w3])).chunk(3, -1)
    return attend(heads(q), heads(k), heads(v))


def fresh_last_query(x, w, w2, w3):
    return attend(projected(x[:, -1:], w), projected(x, w2), projected(x, w3))


def fresh_latent(x, w, w2, w3):
    """K of two parts joined along the features, one of them shared by all heads."""
    latent = F.linear(x, w[:16])
    nope, v = heads(F.linear(latent, w2[:, :16])), heads(F.linear(latent, w3[:, :16]))
    shared = F.linear(x, w3[:8])[:, None].expand(-1, 4, -1, -1)
    q = torch.cat([projected(x, w), projected(x, w2)], -1)
    return attend(q, torch.cat([nope, rope(shared)], -1), v)


def fresh_rolled_query(x, w, w2, w3):
    return attend(projected(x, w).roll(1, 2), projected(x, w2), projected(x, w3))


def fresh_joint(x, w, w2, memory):
    """Two sequences attend to one another, as image and text: the joined keys are no cache."""
    q, k, v = (torch.cat([projected(x, a), projected(memory, b)], 2) for a, b in ((w, w2), (w2, w), (w, w)))
    return attend(q, k, v)


def empty_past(x, w, w2, w3):
    return attend(projected(x, w), *(torch.cat([torch.tensor([]), projected(x, a)], -2) for a in (w2, w3)))


def cat(x, w, past, past_v):
    k, v = torch.cat([past, rope(projected(x, w))], 2), torch.cat([past_v, projected(x, w)], 2)
    return attend(projected(x, w), k, v), k, v


def cat_reordered(x, w, past, past_v, beams):
    """Beam search: the past of the best beams."""
    k, v = (torch.cat([p.index_select(0, beams), projected(x, w)], 2) for p in (past, past_v))
    return attend(projected(x, w), k, v)


def cat_positions_first(x, w, past, past_v):
    """Caches as (B, S, H, D)."""
    k, v = (torch.cat([p, F.linear(x, w).unflatten(-1, (4, 8))], 1) for p in (past, past_v))
    return attend(projected(x, w), k.transpose(1, 2), v.transpose(1, 2))


def index_copied(x, w, buffer, buffer_v, position):
    keep = torch.arange(11)[None] <= position
    for b in (buffer, buffer_v):
        b.index_copy_(2, position, projected(x, w))
    return attend(projected(x, w), buffer, buffer_v, attn_mask=keep)


def index_put(x, w, buffer, buffer_v, position):
    buffer[:, :, position] = projected(x, w)
    buffer_v[:, :, position] = projected(x, w)
    return attend(projected(x, w), buffer, buffer_v, attn_mask=torch.arange(11)[None] <= position)


def sliced_write(x, w, buffer, buffer_v):
    buffer[:, :, 6:7] = projected(x, w)
    buffer_v[:, :, 6:7] = projected(x, w)
    return attend(projected(x, w), buffer[:, :, :7], buffer_v[:, :, :7])


def sliced_write_of_a_batch(x, w, buffer, buffer_v):
    """A cache for more sequences than there are."""
    k, v = projected(x, w), projected(x, w)
    buffer[:1, :, 6:7] = k[:1]
    buffer_v[:1, :, 6:7] = v[:1]
    return attend(projected(x, w)[:1], buffer[:1, :, :7], buffer_v[:1, :, :7])


def selected_write(x, w, buffer, buffer_v):
    buffer[:, :, 6] = projected(x, w)[:, :, 0]
    buffer_v[:, :, 6] = projected(x, w)[:, :, 0]
    return attend(projected(x, w), buffer, buffer_v, attn_mask=torch.arange(11)[None] <= 6)


def where_write(x, w, buffer, buffer_v, position):
    here = (torch.arange(11) == position)[:, None]
    k, v = (torch.where(here, projected(x, w), b) for b in (buffer, buffer_v))
    return attend(projected(x, w), k, v, attn_mask=torch.arange(11)[None] <= position)


def zeros_write(x, w, w2):
    k, v = torch.zeros(2, 4, 16, 8), torch.zeros(2, 4, 16, 8)
    k[:, :, :13], v[:, :, :13] = projected(x, w), projected(x, w2)
    keep = torch.arange(13)[:, None] >= torch.arange(16)
    return attend(projected(x, w), k, v, attn_mask=keep)


def ring_cat(x, w, buffer, buffer_v):
    k, v = (torch.cat([b[:, :, 1:], projected(x, w)], 2) for b in (buffer, buffer_v))
    return attend(projected(x, w), k, v), k, v


def ring_roll(x, w, buffer, buffer_v):
    k, v = buffer.roll(-1, 2), buffer_v.roll(-1, 2)
    k[:, :, -1:], v[:, :, -1:] = projected(x, w), projected(x, w)
    return attend(projected(x, w), k, v), k, v


def ring_modular(x, w, buffer, buffer_v, position):
    for b in (buffer, buffer_v):
        b.index_copy_(2, position % 11, projected(x, w))
    return attend(projected(x, w), buffer, buffer_v)


def cross(x, memory, w, w2, w3):
    return attend(projected(x, w), projected(memory, w2), projected(memory, w3))


def cross_same_length(x, memory, w, w2, w3):
    """Lengths say nothing: another input is another sequence."""
    return attend(projected(x, w), projected(memory[:, :13], w2), projected(memory[:, :13], w3))


def cross_given(x, w, past, past_v):
    return attend(projected(x, w), past, past_v)


def cross_learned_queries(x, w, w2, w3, queries):
    return attend(projected(queries.expand(2, -1, -1), w), projected(x, w2), projected(x, w3))


def heads_joined(x, w, past, past_v):
    """Joined along the heads: no cache."""
    k, v = (torch.cat([projected(x, w)[:, :2], projected(x, w)[:, 2:]], 1) for _ in "kv")
    return attend(projected(x, w), k, v)


def heads_of_an_input(x, w, past, past_v):
    """Half of the heads from an input of the same length: neither a cache nor fresh."""
    k, v = (torch.cat([p[:, :2], projected(x[:, :11], w)[:, 2:]], 1) for p in (past, past_v))
    return attend(projected(x, w), k, v)


def slots_written(x, w, buffer, buffer_v, slots):
    """Written along the batch: a slot's whole sequence."""
    k, v = (b.index_copy(0, slots, projected(x[:, :11], w)) for b in (buffer, buffer_v))
    return attend(projected(x, w), k, v)


def blended(x, w, buffer, buffer_v, position):
    here = (torch.arange(11) == position)[:, None].float()
    k, v = (b * (1 - here) + projected(x, w) * here for b in (buffer, buffer_v))
    return attend(projected(x, w), k, v)


def gathered_pages(x, w, buffer, buffer_v, pages):
    return attend(projected(x, w), buffer[:, :, pages], buffer_v[:, :, pages])


def computed_past(x, w, w2, w3):
    """New keys joined to others that were computed here."""
    k, v = (torch.cat([projected(x, a), projected(x, w)], 2) for a in (w2, w3))
    return attend(projected(x, w), k, v)


def learned_key_at_the_end(x, w, past, past_v):
    k, v = (torch.cat([projected(x, w), p[:, :, :1]], 2) for p in (past, past_v))
    return attend(projected(x, w), k, v)


def keys_only(x, w, past, past_v):
    """K from a cache, V not."""
    return attend(projected(x, w), torch.cat([past, projected(x, w)], 2), projected(x.repeat(1, 12, 1), w))


PAIRS = (STEP, W, PAST, PAST_V)
BSHD = (STEP, W, PAST.transpose(1, 2).contiguous(), PAST_V.transpose(1, 2).contiguous())
CASES = {
    "fresh": [
        (fresh, (X, W, W2, W3)), (fresh_rope, (X, W, W2, W3)), (fresh_complex_rope, (X, W, W2, W3)),
        (fresh_normed, (X, W, W2, W3, NORM)), (fresh_packed, (X, W, W2, W3)), (fresh_last_query, (X, W, W2, W3)),
        (fresh_latent, (X, W, W2, W3)), (fresh_rolled_query, (X, W, W2, W3)), (fresh_joint, (X, W, W2, MEMORY)),
        (empty_past, (X, W, W2, W3)), (heads_joined, (X, W, PAST, PAST_V)),
    ],
    "cat": [
        (cat, PAIRS), (cat, (X, W, PAST, PAST_V)), (cat_reordered, (*PAIRS, torch.tensor([1, 0]))),
        (cat_positions_first, BSHD),
    ],
    "write": [
        (index_copied, (*PAIRS, POSITION)), (index_put, (*PAIRS, POSITION)), (sliced_write, PAIRS),
        (sliced_write_of_a_batch, PAIRS), (selected_write, PAIRS), (where_write, (*PAIRS, POSITION)),
        (zeros_write, (X, W, W2)),
    ],
    "ring": [(ring_cat, PAIRS), (ring_roll, PAIRS), (ring_modular, (*PAIRS, torch.tensor([17])))],
    "cross": [
        (cross, (X, MEMORY, W, W2, W3)), (cross, (STEP, MEMORY, W, W2, W3)),
        (cross_same_length, (X, MEMORY, W, W2, W3)), (cross_given, (X, W, PAST, PAST_V)), (cross_given, PAIRS),
        (cross_learned_queries, (X, W, W2, W3, normal(1, 5, 32))),
    ],
    "unknown": [
        (heads_of_an_input, (X, W, PAST, PAST_V)), (slots_written, (X, W, PAST, PAST_V, torch.tensor([1, 0]))),
        (blended, (*PAIRS, POSITION)), (gathered_pages, (*PAIRS, torch.tensor([3, 1, 7]))),
        (learned_key_at_the_end, (X, W, PAST, PAST_V)), (keys_only, PAIRS),
    ],
}  # fmt: skip
ALL = [
    pytest.param(kind, fn, args, id=f"{fn.__name__}-{args[0].shape[1]}")
    for kind, cases in CASES.items()
    for fn, args in cases
]


@pytest.mark.parametrize(("kind", "fn", "args"), ALL)
def test_kinds(kind, fn, args):
    mine, theirs = copy.deepcopy(args), copy.deepcopy(args)
    traced = trace(fn, *mine)
    assert [s.kv for s in traced.sites] == [kind], traced.misses
    assert not any("Verification" in reason for reason in traced.left)
    # The rewritten graph computes, and writes, what the function does.
    torch.testing.assert_close(traced.output, fn(*theirs))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("fn", [cat, index_copied, ring_cat, sliced_write, where_write, ring_roll])
def test_nodes_of_a_cache(fn):
    takes_position = fn in (index_copied, where_write)
    (region,) = trace(fn, *copy.deepcopy(PAIRS), *([POSITION] if takes_position else [])).program.regions
    nodes = region.kv_nodes
    old = [nodes["k_old"], nodes["v_old"]]
    assert len(set(old)) == 2 and all(n.op == "placeholder" and n.meta["val"].shape == PAST.shape for n in old)
    # What is written is as long as the query, and reaches the cache through the writer.
    if fn is not ring_roll:
        assert nodes["k_new"].meta["val"].shape[2] == 1
    assert {nodes["k_old"], nodes["k_writer"]} <= {*ancestors(region.k)}
    if takes_position:
        assert nodes["position"] is nodes["k_position"] is nodes["v_position"]


def ancestors(node):
    found, stack = {node}, [node]
    while stack:
        new = set(stack.pop().all_input_nodes) - found
        found |= new
        stack += new
    return found


def test_sites_that_share_keys():
    def fn(x, w, w2, past, past_v):
        k, v = torch.cat([past, projected(x, w)], 2), torch.cat([past_v, projected(x, w2)], 2)
        first = attend(projected(x, w), k, v)
        second = attend(projected(x, w2), k, v)
        # The same keys with other values: not shared.
        return first, second, attend(projected(x, w2), k, v.sin())

    traced = trace(fn, STEP, W, W2, PAST, PAST_V)
    assert [s.kv for s in traced.sites] == ["cat", "shared", "cat"]
    shared, first = traced.program.regions[1], traced.program.regions[0]
    assert shared.kv_nodes["site"] is first.anchor and shared.kv_nodes["k_writer"] is first.kv_nodes["k_writer"]


def test_layers_deeper_down():
    """The walk ends at the hidden state that q and k share, however deep the layer lies."""
    traced = trace(NanoGPT(flash=False).eval(), tokens())
    assert {s.kv for s in traced.sites} == {"fresh"}
