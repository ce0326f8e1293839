"""Sizes known at run time only, heads among them, as where every size is dynamic: exact for any, in one graph."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from attentions import alibi, padded, positions, written
from models import make_plan
from tracing import qkv

from attnopt.capture import capture
from attnopt.ir import Choice
from attnopt.passes import PIPELINE, Program, pays

LENGTH = 15
call = F.scaled_dot_product_attention


def masked(attend, keep):
    def fn(q, k, v):
        return attend(q, k, v, keep(*positions(q, k)))

    return fn


def padding():
    pad = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(5)) > 0.4
    pad[:, 0] = True
    return pad


CASES = {
    "nothing masked": (written, (), "SDPA without a mask"),
    "causal": (masked(written, lambda i, j: j <= i), (), "SDPA is_causal"),
    "padding": (padded(written, False), (padding(),), pays.PADDING),
    "causal padding": (padded(call, True), (padding(),), pays.FEATURE),
    "chunks": (masked(call, lambda i, j: (j <= i) & (i // 5 == j // 5)), (), "SDPA, chunks of 5 as a batch"),
    # The kernel of windows has a table of heads.
    "window": (masked(written, lambda i, j: (j <= i) & (i - j < 4)), (), pays.AS_IT_WAS),
}


def run(fn, inputs, programs, plan=None):
    """`fn` on every set of `inputs` through one compiled function, the head dimension marked dynamic."""

    def backend(gm, _):
        captured = capture(gm)
        programs.append(Program(captured, verify=True, plan=plan).run(PIPELINE))
        return captured.forward

    torch._dynamo.reset()
    compiled, found = torch.compile(fn, backend=backend), []
    for tensors in inputs:
        for tensor in tensors[:3]:
            torch._dynamo.mark_dynamic(tensor, 1)
        with torch.no_grad():
            found.append(compiled(*tensors))
    return found


@pytest.mark.parametrize("name", CASES)
def test_every_number_of_heads_is_served_by_one_graph(name):
    fn, more, lowering = CASES[name]
    inputs = [(*qkv(length=LENGTH, heads=heads, seed=heads), *more) for heads in (4, 2, 7)]
    programs: list[Program] = []
    outputs = run(fn, inputs, programs)
    assert [[r.lowering for r in p.rewrites] for p in programs] == [[lowering]], [str(m) for m in programs[0].misses]
    (site,) = [r.site for r in programs[0].regions]
    assert (site.heads, site.kv_heads) == (0, 0) and site.canonical.startswith("heads=? dim=8")
    for tensors, output in zip(inputs, outputs, strict=True):
        expected = fn(*(t.double() if t.is_floating_point() else t for t in tensors))
        assert (output.double() - expected).norm() <= 2e-6 * expected.norm()


def test_fewer_heads_of_k_than_of_q_are_left():
    def fn(q, k, v):
        k, v = (x[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for x in (k, v))
        return torch.softmax(q @ k.transpose(2, 3), -1) @ v

    programs: list[Program] = []
    (output,) = run(fn, [qkv(heads=6, kv_heads=3)], programs)
    assert [m.code for p in programs for m in p.misses] == ["symbolic-heads"]
    assert torch.allclose(output, fn(*qkv(heads=6, kv_heads=3)))


def test_a_plan_leaves_it_exact_and_says_so():
    fn, inputs = masked(call, lambda i, j: j <= i), qkv(length=LENGTH)
    choice = Choice.of("sink_window", {"sink": 0, "alpha": 2, "beta": 0.0})
    programs: list[Program] = []
    named = make_plan({"attention": (choice,) * 4})
    (output,) = run(fn, [inputs], programs, named)
    assert torch.allclose(output, fn(*inputs), atol=1e-6)
    assert [r.lowering for r in programs[0].rewrites] == ["SDPA is_causal"]
    (note,) = programs[0].notes
    assert "a number of heads known when compiling" in note.reason and "stays exact" in note.reason


def projected(attend, kv_heads=4, wide=8):
    """q, k and v as parts of one tensor (3, B, 4, S, 8), so that their lengths are one symbol."""

    def fn(x, *more):
        q, k, v = x.unbind()
        return attend(q, k[:, :kv_heads], v[:, :kv_heads, :, :wide], *more)

    return fn


def grouped(q, k, v, mask):
    return call(q, k, v, mask, enable_gqa=True)


FREE = {
    "nothing masked": (projected(written), False, "SDPA without a mask"),
    "causal": (projected(CASES["causal"][0]), False, "SDPA is_causal"),
    "padding": (projected(padded(written, False)), True, pays.PADDING),
    "causal padding": (projected(padded(call, True)), True, pays.RUNS),
    "causal padding, grouped": (projected(padded(grouped, True), 2), True, pays.RUNS),
    "causal padding, values of another size": (projected(padded(call, True), wide=6), True, pays.RUNS),
    "values of another size": (projected(call, wide=6), False, "SDPA without a mask"),
    "window": (projected(CASES["window"][0]), False, f"{pays.SPAN}, window 4"),
    "alibi": (projected(alibi), False, pays.AS_IT_WAS),
}


@pytest.mark.parametrize("name", FREE)
def test_no_lowering_guards_on_batch_or_length(name):
    """Marked dynamic, a size that anything turns into a number is an error of Dynamo's."""
    fn, is_padded, lowering = FREE[name]
    programs: list[Program] = []

    def backend(gm, _):
        captured = capture(gm)
        programs.append(Program(captured, verify=True).run(PIPELINE))
        return captured.forward

    compiled = torch.compile(fn, backend=backend)
    for batch, length in ((2, 15), (3, 9), (5, 31)):
        x = torch.stack(qkv(batch=batch, length=length))
        pads = [torch.arange(length) >= torch.arange(batch)[:, None]] if is_padded else []
        torch._dynamo.mark_dynamic(x, (1, 3))
        for pad in pads:
            torch._dynamo.mark_dynamic(pad, (0, 1))
        with torch.no_grad():
            found = compiled(x, *pads)
        expected = fn(x.double(), *pads)
        # Rows before the first key that is no padding may hold anything.
        seen = pads[0] if pads and "causal" in name else torch.ones(batch, length, dtype=torch.bool)
        found, expected = (out.transpose(1, 2)[seen] for out in (found, expected))
        assert (found.double() - expected).norm() <= 2e-6 * expected.norm()
    assert [[r.lowering for r in p.rewrites] for p in programs] == [[lowering]], [p.refusals for p in programs]
