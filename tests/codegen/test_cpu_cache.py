"""The CPU's step of the ragged cache against the reference in float64: with the compiled kernel and without it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from ragged import relative
from torch import Tensor

from attnopt.cache import Layout
from attnopt.codegen import cache_cpu, native, span_cpu
from attnopt.codegen.emit import load
from attnopt.codegen.reference_cache import step as reference
from attnopt.codegen.spec import CacheStep
from attnopt.errors import CacheFull

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float64: 1e-12, torch.float16: 1e-3}
SCALE = 0.3


@dataclass(frozen=True)
class Case:
    """Spans of the query heads, sizes, and how the tokens come: chunks, some of them padding, rollbacks in between."""

    spans: list[tuple[int, int]]
    kv_heads: int
    chunks: tuple[int, ...]
    length: int
    slack: int = 0
    dims: tuple[int, int] = (32, 64)
    batch: int = 2
    padding: float = 0.0
    taken_back: dict[int, int] | None = None
    first_fresh: bool = True
    seed: int = 0


MIXED = [(0, 90), (3, 5), (4, 30), (0, 1), (0, 17), (2, 64), (16, 16), (0, 0)]
CASES = {
    "tokens": Case(MIXED, 4, (1,) * 90, 90),
    "a prompt and tokens": Case(MIXED, 2, (60, *(1,) * 30), 90, padding=0.2),
    "chunks of all sizes": Case(MIXED, 4, (1, 30, 2, 7, 0, 40, 1, 9), 90, padding=0.3, batch=3),
    "not said to be fresh": Case(MIXED, 8, (70, 20), 90, padding=0.2, first_fresh=False),
    "a prompt longer than the rings": Case(MIXED, 1, (80, 1, 1), 90, padding=0.1, dims=(64, 32)),
    "rolled back": Case(MIXED[1:7], 3, (40, 5, 5, 5, 1, 5, 5), 90, slack=9, taken_back={1: 4, 2: 5, 4: 1, 5: 9}),
    "one row a KV head, long": Case([(0, 1400), (64, 300)], 2, (1300, 1, 1, 30), 1400, batch=1),
    "more rows than one by one": Case([(4, 200)] * 6 + [(0, 700)] * 6, 2, (600, 3, 2, 9, 11), 700, padding=0.1),
    "many query heads": Case([(2, 40)] * 70, 1, (30, 1, 5), 90, batch=1),
}


def drawn(seed: int) -> Case:
    draw = random.Random(seed)
    kv_heads, share, length = draw.choice([1, 2, 3]), draw.choice([1, 2, 3, 5]), draw.choice([1, 17, 48, 130])
    spans = [(draw.choice([0, 0, 1, 7, 20]), draw.randint(1, length)) for _ in range(kv_heads * share)]
    chunks: list[int] = []
    while sum(chunks) < length:
        chunks.append(min(draw.choice([1, 1, 1, 2, 5, 33, 100]), length - sum(chunks)))
    sizes = (draw.choice([32, 64]), draw.choice([32, 96]))
    padding, fresh = draw.choice([0.0, 0.3, 0.8]), draw.random() < 0.5
    return Case(spans, kv_heads, tuple(chunks), length, draw.choice([0, 4]), sizes, 2, padding, None, fresh, seed)


def outcomes(case: Case, dtype: torch.dtype, **changed: int) -> tuple[Tensor, Tensor]:
    """Results of all chunks, and what the cache holds in the end, of the CPU and of the reference in float64."""
    generator = torch.Generator().manual_seed(case.seed)
    layout = Layout.of_spans(*zip(*case.spans, strict=True), case.kv_heads, case.length, case.slack)
    table, spans = layout.tables()
    off = spans + torch.tensor([changed.get("sink", 0), changed.get("window", 0)], dtype=torch.int32)
    heads, (dim, dim_v) = len(case.spans), case.dims
    caches = []
    for kind in (dtype, torch.float64):
        # What was not written may be anything.
        cache = [torch.full((case.batch, layout.slots, d), torch.nan, dtype=kind) for d in case.dims]
        caches.append((*cache, torch.zeros(case.batch, dtype=torch.int32)))
    found: list[list[Tensor]] = [[], []]
    for turn, tokens in enumerate(case.chunks):
        q, k, v = (
            # As projections give them: tokens ahead of heads.
            torch.randn(case.batch, tokens, h, d, generator=generator).to(dtype).transpose(1, 2)
            for h, d in ((heads, dim), (case.kv_heads, dim), (case.kv_heads, dim_v))
        )
        valid = torch.rand(case.batch, tokens, generator=generator) >= case.padding if case.padding else None
        fresh = case.first_fresh and turn == 0
        for (*cache, n), into, run, own in zip(caches, found, (cache_cpu.step, reference), (off, spans), strict=True):
            wide = (x.to(cache[0].dtype) for x in (q, k, v))
            into.append(run(*wide, *cache, n, valid, table, own, SCALE, fresh))
            if case.taken_back:
                n -= case.taken_back.get(turn, 0)
        assert found[0][-1].transpose(1, 2).is_contiguous() and torch.equal(caches[0][2], caches[1][2])
    for ours, theirs in zip(caches[0][:2], caches[1][:2], strict=True):
        assert torch.equal(ours.double().nan_to_num(), theirs.nan_to_num())
    return torch.cat(found[0], 2), torch.cat(found[1], 2)


@pytest.fixture(params=[torch.float32, torch.bfloat16, "torch"], ids=["float32", "bfloat16", "torch's operators"])
def dtype(request, monkeypatch) -> torch.dtype:  # type: ignore[no-untyped-def]
    if request.param == "torch":
        monkeypatch.setenv("ATTNOPT_NATIVE", "0")
        return torch.float32
    if reason := native.unusable(request.param):
        pytest.skip(reason)
    return request.param


@pytest.mark.parametrize("name", CASES)
def test_matches_the_reference(name: str, dtype: torch.dtype) -> None:
    found, expected = outcomes(CASES[name], dtype)
    assert found.isfinite().all() and relative(found, expected) <= TOLERANCE[dtype]
    assert (found[expected.abs().sum(-1) == 0] == 0).all()


def test_random_caches(dtype: torch.dtype) -> None:
    for seed in range(40):
        found, expected = outcomes(drawn(seed), dtype)
        assert relative(found, expected) <= TOLERANCE[dtype], drawn(seed)


def test_two_threads_change_nothing(dtype: torch.dtype) -> None:
    case, before = CASES["one row a KV head, long"], torch.get_num_threads()
    alone, _ = outcomes(case, dtype)
    torch.set_num_threads(2)
    try:
        assert relative(outcomes(case, dtype)[0], alone.double()) <= TOLERANCE[dtype]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["a prompt and tokens", "tokens"])
@pytest.mark.parametrize("changed", [{"window": -1}, {"sink": -1}])
def test_a_span_off_by_one_is_out_of_tolerance(name: str, changed: dict[str, int], dtype: torch.dtype) -> None:
    found, expected = outcomes(CASES[name], dtype, **changed)
    assert relative(found, expected) > 5 * TOLERANCE[dtype]


@pytest.mark.parametrize("kind", [torch.float64, torch.float16])
def test_dtypes_without_a_kernel(kind: torch.dtype) -> None:
    for name in ("chunks of all sizes", "a prompt and tokens", "rolled back"):
        found, expected = outcomes(CASES[name], kind)
        assert relative(found, expected) <= TOLERANCE[kind], name


def given(tokens: int, dtype: torch.dtype, length: int = 20) -> tuple[Tensor, ...]:
    table, spans = Layout.of_spans([0, 2], [length, 8], 2, length).tables()
    slots = int(table[:, 1].sum())
    new = (torch.ones(1, 2, tokens, 32, dtype=dtype) for _ in range(3))
    cache = (torch.zeros(1, slots, 32, dtype=dtype) for _ in range(2))
    return *new, *cache, torch.tensor([30], dtype=torch.int32), None, table, spans


@pytest.mark.parametrize(("tokens", "fresh"), [(3, False), (1, False), (70, True), (1030, True)])
def test_no_room_left(tokens: int, fresh: bool, dtype: torch.dtype) -> None:
    """The dense head has 32 slots for its 20 tokens; what does not fit is refused before anything is written."""
    q, k, v, keys, values, n, *rest = given(tokens, dtype)
    n.fill_(0 if fresh else 33 - tokens)
    with pytest.raises(CacheFull, match="max_length"):
        cache_cpu.step(q, k, v, keys, values, n, *rest, SCALE, fresh)
    assert not keys.any() and not values.any() and n.tolist() == [0 if fresh else 33 - tokens]
    n.fill_(max(0, 32 - tokens))
    cache_cpu.step(*(x[:, :, :32] for x in (q, k, v)), keys, values, n, *rest, SCALE, fresh)
    assert n.tolist() == [32]


@pytest.mark.parametrize(("tokens", "fresh"), [(3, False), (1, False), (20, True), (1030, True)])
def test_a_negative_count_is_refused(tokens: int, fresh: bool, dtype: torch.dtype) -> None:
    """As too much was taken back. Slots before the first are memory of somebody else."""
    q, k, v, keys, values, n, *rest = given(tokens, dtype, 1100)
    with pytest.raises(ValueError, match="n is negative"):
        cache_cpu.step(q, k, v, keys, values, n.fill_(-5), *rest, SCALE, fresh)
    assert not keys.any() and not values.any() and n.tolist() == [-5]


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_head_of_sinks_alone(tokens: int, dtype: torch.dtype) -> None:
    """Its ring has no slots: what comes behind the sinks is not kept, and attends to nothing but them and itself."""
    table = torch.tensor([[0, 4, 4, 0]], dtype=torch.int32)
    spans = torch.tensor([[4, 0]], dtype=torch.int32)
    for seen in (0, 3, 4, 9):
        generator = torch.Generator().manual_seed(seen)
        q, k, v = (torch.randn(1, 1, tokens, 32, generator=generator).to(dtype) for _ in range(3))
        caches = [[torch.ones(1, 4, 32, dtype=kind) for _ in range(2)] for kind in (dtype, torch.float64)]
        counts = [torch.tensor([seen], dtype=torch.int32) for _ in range(2)]
        found = cache_cpu.step(q, k, v, *caches[0], counts[0], None, table, spans, SCALE, seen == 0)
        wide = q.double(), k.double(), v.double()
        expected = reference(*wide, *caches[1], counts[1], None, table, spans, SCALE, seen == 0)
        assert relative(found, expected) <= TOLERANCE[dtype]
        assert all(torch.equal(ours.double(), theirs) for ours, theirs in zip(*caches, strict=True))


def test_inference_tensors_stay_in_inference_mode(dtype: torch.dtype) -> None:
    """Elsewhere torch's own operators refuse to write to them."""
    with torch.inference_mode():
        q, k, v, keys, values, n, *rest = given(1, dtype)
        cache_cpu.step(q, k, v, keys, values, n, *rest, SCALE, False)
        before = keys.clone(), values.clone()
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor outside InferenceMode"):
        cache_cpu.step(q, k, v, keys, values, n, *rest, SCALE, False)
    assert torch.equal(keys, before[0]) and torch.equal(values, before[1]) and n.tolist() == [31]


def test_a_table_of_another_cache_is_refused(dtype: torch.dtype) -> None:
    if native.unusable(dtype):
        pytest.skip("torch's operators trust the operator's own check")
    q, k, v, keys, values, n, valid, table, spans = given(1, dtype)
    for off, said in (([1, 0, 0, 0], "does not divide 48 slots among 2"), ([0, 1, 0, 0], "has 50 slots, the cache 48")):
        with pytest.raises(ValueError, match=said):
            wrong = table + torch.tensor(off, dtype=torch.int32)
            cache_cpu.step(q, k, v, keys, values, n, valid, wrong, spans, SCALE, False)


def test_the_kernel_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token, a chunk, a short prompt: one call. A long one: the span prefill, and one call that writes."""
    if native.unusable():
        pytest.skip(native.unusable())
    asked: list[str] = []
    kernel, prompt = native.step, span_cpu.prefill
    monkeypatch.setattr(native, "step", lambda *a: asked.append("writes" if a[0] is None else "attends") or kernel(*a))
    monkeypatch.setattr(span_cpu, "prefill", lambda *a: asked.append("prefill") or prompt(*a))
    for tokens, fresh in ((1, False), (80, False), (1024, True), (1023, True)):
        q, k, v, keys, values, n, *rest = given(tokens, torch.float32, 1100)
        cache_cpu.step(q, k, v, keys, values, n.zero_(), *rest, SCALE, fresh)
    assert asked == ["attends", "attends", "writes", "prefill", "attends"]


def test_emitted_module(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("ATTNOPT_CACHE", str(tmp_path))
    module = load(CacheStep("cpu", "float32", 2, 2, 32, 32))
    run = partial(module.step, scale=SCALE, fresh=False)
    found = run(*given(1, torch.float32, 40))
    assert torch.equal(found, cache_cpu.step(*given(1, torch.float32, 40), SCALE, False))
    q, *rest = given(1, torch.float32, 40)
    with pytest.raises(ValueError, match="emitted for"):
        run(q[:, :1], *rest)
