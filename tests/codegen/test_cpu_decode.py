"""The CPU's decoding against the reference in float64: lengths, layouts of segments, head sharing, spans, threads."""

from __future__ import annotations

import pytest
import torch
from ragged import CASES, TOLERANCE, Case, arguments, drawn, relative

from attnopt.codegen import decode_cpu
from attnopt.codegen.decode_cpu import Call, Run, calls, runs
from attnopt.codegen.emit import load
from attnopt.codegen.reference_decode import decode as reference
from attnopt.codegen.spec import SpanDecode


def run(case: Case, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """What the target gives and what is right, in float64."""
    q, k, v, starts, filled, *spans = arguments(case, dtype)
    found = decode_cpu.decode(q, k, v, starts, filled, case.scale, *spans)
    assert found.dtype == dtype and found.is_contiguous()
    return found, reference(q.double(), k.double(), v.double(), starts, filled, case.scale, *spans)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_matches_the_reference(name: str, dtype: torch.dtype) -> None:
    found, expected = run(CASES[name], dtype)
    assert relative(found, expected) < TOLERANCE[dtype]
    assert (found[expected.abs().sum(-1) == 0] == 0).all()


def test_random_caches() -> None:
    """Segments, counts, head sharing, tokens and spans drawn at random: what nobody thought of."""
    for seed in range(80):
        case = drawn(seed)
        found, expected = run(case, torch.float32)
        assert relative(found, expected) < 1e-5, case


@pytest.mark.parametrize("name", ["one dense head of four", "spans", "left padding"])
def test_one_slot_more_or_less_is_out_of_tolerance(name: str) -> None:
    case = CASES[name]
    q, k, v, starts, filled, *spans = arguments(case, torch.float32)
    expected = reference(q.double(), k.double(), v.double(), starts, filled, case.scale, *spans)
    if spans:
        spans[1] = spans[1] - 1
    else:
        filled = filled - 1
    assert relative(decode_cpu.decode(q, k, v, starts, filled, case.scale, *spans), expected) > 1e-2


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("threads,used,batch", [(2, 33, 1), (2, 34, 1), (8, 77, 1), (8, 100, 3)])
def test_a_head_shared_among_threads(threads: int, used: int, batch: int, dtype, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(decode_cpu, "SPLIT_FROM", 33)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    split, parts = decode_cpu._split, []
    monkeypatch.setattr(decode_cpu, "_split", lambda *a: parts.append(a[-1]) or split(*a))
    case = Case([120, 8, 8], batch=batch, filled=[[used, 8, 8]] * batch, share=4)
    found, expected = run(case, dtype)
    assert parts == [threads // batch] and relative(found, expected) < TOLERANCE[dtype]


def test_two_heads_of_one_entry_shared_among_threads(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(decode_cpu, "SPLIT_FROM", 33)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    found, expected = run(Case([50, 50, 8], batch=1), torch.float32)
    assert relative(found, expected) < 1e-5


def test_heads_are_grouped_by_capacity_and_distance() -> None:
    assert runs((0, 9, 18, 27)) == (Run(0, 1, 3, 0, 9, 9),)
    # one dense head of four, twice: the dense ones are four heads apart
    dense, short = Run(0, 4, 2, 0, 36, 30), Run(1, 1, 3, 30, 2, 2)
    assert runs((0, 30, 32, 34, 36, 66, 68, 70, 72)) == (dense, short, Run(5, 1, 3, 66, 2, 2))


def test_one_call_for_heads_and_entries_of_one_length() -> None:
    starts = (0, 30, 32, 34)
    both, long, short = slice(0, 2), slice(0, 1, 1), slice(1, 3, 1)
    windows = Call((both, short), (2, 2, 2), 0, 30, 2)
    assert calls(starts, ((30, 2, 2), (30, 2, 2))) == (Call((both, long), (2, 1, 30), 0, 0, 30), windows)
    assert calls(starts, ((30, 2, 2), (21, 2, 2))) == (
        Call((slice(0, 1), long), (1, 1, 30), 0, 0, 30),
        Call((slice(1, 2), long), (1, 1, 21), 1, 0, 30),
        windows,
    )


def test_nothing_of_the_cache_is_copied(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Keys and values reach SDPA as views of the cache, whatever the segments."""
    q, k, v, starts, filled = arguments(CASES["left padding"])
    seen, sdpa = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **kw: seen.append(a[1:3]) or sdpa(*a, **kw)
    )
    decode_cpu.decode(q, k, v, starts, filled, 0.25)
    assert seen and all(x._base is k and y._base is v for x, y in seen)


@pytest.mark.parametrize("starts,reason", [([0, 4, 9], "ends at 9"), ([0, 6, 4, 8], "follow"), ([1, 4, 8], "begin")])
def test_segments_outside_the_cache_are_refused(starts: list[int], reason: str) -> None:
    groups = len(starts) - 1
    q, k = torch.zeros(1, groups, 1, 16), torch.zeros(1, 8, 16)
    with pytest.raises(ValueError, match=reason):
        decode_cpu.decode(q, k, k, torch.tensor(starts), torch.ones(1, groups).int(), 1.0)


def test_emitted_module(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("ATTNOPT_CACHE", str(tmp_path))
    for name in ("uneven", "spans"):
        case = CASES[name]
        q, k, v, starts, filled, *spans = arguments(case)
        spec = SpanDecode("cpu", "float32", q.shape[1], len(case.capacities), 16, 16, 1, bool(spans))
        module = load(spec)
        found = module.decode(q, k, v, starts, filled, 0.25, *spans)
        assert torch.equal(found, decode_cpu.decode(q, k, v, starts, filled, 0.25, *spans))
        with pytest.raises(ValueError, match="emitted for"):
            module.decode(q[:, :1], k, v, starts, filled, 0.25, *spans)
