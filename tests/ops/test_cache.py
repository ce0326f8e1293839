"""`attnopt::attend_update`: attention of a whole sequence, however it is cut, and the cache beside it."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Self

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attnopt import ops
from attnopt.backend import clear_reports, reports
from attnopt.cache import Layout
from attnopt.errors import CacheFull

SCALE = 0.4


class Cache:
    """A layer's cache, whose empty slots are NaN: whatever reads one is seen."""

    def __init__(self, layout: Layout, batch: int, dim: int = 5, dim_v: int = 7, dtype: torch.dtype = torch.float64):
        self.keys, self.values = (torch.full((batch, layout.slots, d), torch.nan, dtype=dtype) for d in (dim, dim_v))
        self.n = torch.zeros(batch, dtype=torch.int32)
        self.table, self.spans = layout.tables()

    def step(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None, fresh: bool = False) -> Tensor:
        return ops.attend_update(
            q, k, v, self.keys, self.values, self.n, valid, self.table, self.spans, SCALE, fresh
        )  # fmt: skip

    def run(self, qkv: Sequence[Tensor], valid: Tensor | None, cuts: Sequence[int], fresh: bool = False) -> Tensor:
        """The sequence cut at `cuts`; the first part is announced as such if `fresh`."""
        ends = [0, *cuts, qkv[0].shape[2]]
        parts = []
        for a, b in pairwise(ends):
            counts = None if valid is None else valid[:, a:b]
            parts.append(self.step(*(x[:, :, a:b] for x in qkv), counts, fresh and a == 0))
        return torch.cat(parts, 2)


def normal(
    batch: int, heads: int, groups: int, tokens: int, dim: int = 5, dim_v: int = 7, seed: int = 0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = (heads, dim), (groups, dim), (groups, dim_v)
    return [torch.randn(batch, h, tokens, d, generator=generator, dtype=torch.float64) for h, d in sizes]


def oracle(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, sinks: Sequence[int], windows: Sequence[int]) -> Tensor:
    """Dense attention of the whole sequence under a mask by logical positions; knows nothing of slots."""
    share = q.shape[1] // k.shape[1]
    place = valid.cumsum(1) - valid.long()
    back = (place[:, :, None] - place[:, None, :])[:, None]
    order = torch.arange(q.shape[2])
    sink, window = (torch.tensor(x)[None, :, None, None] for x in (sinks, windows))
    keep = (order[:, None] >= order) & ((place[:, None, None, :] < sink) | (back < window))
    keep = keep & valid[:, None, None, :] & valid[:, None, :, None]
    scores = q @ k.repeat_interleave(share, 1).mT * SCALE
    weights = torch.softmax(scores.masked_fill(~keep, -torch.inf), -1).nan_to_num(0.0)
    return weights @ v.repeat_interleave(share, 1)


SINKS, WINDOWS = [s for s in range(4) for _ in range(9)], [w for _ in range(4) for w in range(1, 10)]


def cases() -> Iterator[tuple[int, int, Tensor, list[int], bool]]:
    """Lengths 1 to 40 with one, two or three rows, padding of all kinds, and somewhere to cut."""
    draw = random.Random(0)
    for length in range(1, 41):
        batch = 1 + length % 3
        valid = torch.rand(batch, length, generator=torch.Generator().manual_seed(length)) < (0.5, 0.9, 1.1)[length % 3]
        if length % 4 == 0:  # rows of padding, on the left
            valid = torch.arange(length) >= torch.arange(batch)[:, None] * length // 2
        if batch == 3:
            valid[1] = False
        cuts = sorted(draw.sample(range(1, length), min(length - 1, draw.randint(0, 2))))
        yield length, batch, valid, cuts, length % 2 == 0


def test_every_sink_and_window_at_every_length_and_cut() -> None:
    """36 spans as query heads of 12 KV heads, three unequal ones in each; in float64 out of torch's operators, and in
    float32 in the compiled kernel where there is one."""
    order = torch.randperm(36, generator=torch.Generator().manual_seed(1)).tolist()
    sinks, windows = [SINKS[i] for i in order], [WINDOWS[i] for i in order]
    for length, batch, valid, cuts, fresh in cases():
        layout = Layout.of_spans(sinks, windows, 12, 64, slack=0 if length % 2 else 3)
        assert not any(layout.whole)
        q, k, v = (x / 2 for x in normal(batch, 36, 12, length, 32, 64, seed=length))
        wanted = oracle(q, k, v, valid, sinks, windows)
        for dtype, most in (torch.float64, 1e-12), (torch.float32, 1e-6):
            cache = Cache(layout, batch, 32, 64, dtype)
            found = cache.run([x.to(dtype) for x in (q, k, v)], valid, cuts, fresh)
            assert (found - wanted).abs().max() < most, (length, cuts, dtype)
            assert cache.n.tolist() == valid.sum(1).tolist()
    # What the sweep would notice: one key more or less, and a sink that is counted inside the window.
    for other in ([s + 1 for s in sinks], windows), (sinks, [w + 1 for w in windows]):
        assert (oracle(q, k, v, valid, *other) - wanted).abs().max() > 0.1


def test_a_cache_is_the_same_however_its_tokens_came() -> None:
    sinks, windows = [0, 2, 0, 5], [50, 1, 12, 9]
    layout = Layout.of_spans(sinks, windows, 2, 50, slack=2)
    assert layout.whole == (True, False)
    qkv = normal(2, 4, 2, 40)
    valid = torch.rand(2, 40, generator=torch.Generator().manual_seed(5)) < 0.8
    caches, outputs = [], []
    for size in (1, 3, 12, 13, 40):
        caches.append(Cache(layout, 2))
        outputs.append(caches[-1].run(qkv, valid, range(size, 40, size), fresh=size > 3))
    for cache, out in zip(caches, outputs, strict=True):
        torch.testing.assert_close(out, oracle(*qkv, valid, sinks, windows), atol=1e-12, rtol=0)
        torch.testing.assert_close(cache.keys, caches[0].keys, atol=0, rtol=0, equal_nan=True)
        torch.testing.assert_close(cache.values, caches[0].values, atol=0, rtol=0, equal_nan=True)
    # Laid out tokens first, as the fake promises.
    assert Cache(layout, 2).step(*qkv, valid, True).transpose(1, 2).is_contiguous()
    assert Cache(layout, 2).step(*qkv, valid).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("back", [1, 3, 7])
def test_tokens_can_be_taken_back_up_to_the_slack(back: int) -> None:
    """The newest slots then hold tokens that were taken back; they lie outside every window until written again."""
    sinks, windows = [0, 4, 0, 2], [60, 9, 9, 12]
    layout = Layout.of_spans(sinks, windows, 2, 60, slack=7)
    for seen in (8, 24, 40):
        first, other = normal(2, 4, 2, 60), normal(2, 4, 2, 60, seed=1)
        mixed = [
            torch.cat((a[:, :, : seen - back], b[:, :, seen - back :]), 2) for a, b in zip(first, other, strict=True)
        ]
        cache = Cache(layout, 2)
        cache.run([x[:, :, :seen] for x in first], None, [seen // 2])
        saved = copy.deepcopy(cache)
        cache.n -= back
        found = cache.run([x[:, :, seen - back :] for x in mixed], None, [1, back + 2, 19])
        wanted = oracle(*mixed, torch.ones(2, 60, dtype=torch.bool), sinks, windows)[:, :, seen - back :]
        torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)
        # The copy goes on from where it was made.
        again = saved.run([x[:, :, seen:] for x in first], None, [2])
        wanted = oracle(*first, torch.ones(2, 60, dtype=torch.bool), sinks, windows)[:, :, seen:]
        torch.testing.assert_close(again, wanted, atol=1e-12, rtol=0)


def test_rows_of_a_batch_are_apart_from_each_other() -> None:
    """Rows with unequal numbers of tokens, each as if it were alone, and a row that only pads."""
    sinks, windows = [3, 0, 1, 2], [4, 30, 6, 1]
    layout = Layout.of_spans(sinks, windows, 2, 30)
    qkv = normal(3, 4, 2, 25)
    valid = torch.arange(25) >= torch.tensor([[0], [11], [25]])
    found = Cache(layout, 3).run(qkv, valid, [9, 12, 13, 14, 20], fresh=True)
    for row, start in (0, 0), (1, 11):
        alone = Cache(layout, 1).run([x[row : row + 1, :, start:] for x in qkv], None, [3])
        torch.testing.assert_close(found[row : row + 1, :, start:], alone, atol=1e-12, rtol=0)
    assert not found[2].any() and not found[1, :, :11].any()


def test_nothing_new_and_no_rows() -> None:
    layout = Layout.of_spans([1, 0], [4, 9], 1, 30)
    cache = Cache(layout, 2)
    cache.step(*normal(2, 2, 1, 6))
    before = copy.deepcopy(cache)
    for valid in (None, torch.zeros(2, 0, dtype=torch.bool)):
        assert cache.step(*normal(2, 2, 1, 0), valid).shape == (2, 2, 0, 7)
    assert Cache(layout, 0).step(*normal(0, 2, 1, 3), fresh=True).shape == (0, 2, 3, 7)
    torch.testing.assert_close(cache.keys, before.keys, equal_nan=True, atol=0, rtol=0)
    assert cache.n.tolist() == [6, 6]


def test_a_full_cache_raises_and_stays_as_it_was() -> None:
    layout = Layout.of_spans([0, 2], [16, 3], 2, 16)
    qkv = normal(2, 2, 2, 20)
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[0, :8] = False
    cache = Cache(layout, 2)
    cache.run([x[:, :, :15] for x in qkv], valid[:, :15], [])
    before = copy.deepcopy(cache)
    with pytest.raises(CacheFull, match=r"holds 16 tokens of a row, and this would be 17[\s\S]*larger max_length"):
        cache.step(*(x[:, :, 15:17] for x in qkv), valid[:, 15:17])
    for name in ("keys", "values", "n"):
        torch.testing.assert_close(getattr(cache, name), getattr(before, name), atol=0, rtol=0, equal_nan=True)
    # Padding needs no room, and rings none at all.
    cache.step(*(x[:, :, 15:17] for x in qkv), valid[:, 15:17] & torch.tensor([True, False]))
    rings = Cache(Layout.of_spans([0, 2], [9, 3], 2, 64), 2)
    assert rings.run(qkv, None, range(1, 20)).isfinite().all()


def test_wrong_sizes_dtypes_and_devices_are_named() -> None:
    layout = Layout.of_spans([0, 2], [16, 3], 2, 16)
    q, k, v = normal(1, 2, 2, 1)

    def cache(**changed: Tensor) -> Cache:
        made = Cache(layout, 1)
        vars(made).update(changed)
        return made

    with pytest.raises(ValueError, match=r"expected q \(B, H, T, D\).*found q \(1, 2, 1, 5\), k \(1, 2, 1, 4\)"):
        cache().step(q, k[..., :4], v)
    for wrong in (q[0], k, v), (q, k[:, :0], v[:, :0]), (q[:, :1], k, v):
        with pytest.raises(ValueError, match="found q"):
            cache().step(*wrong)
    with pytest.raises(ValueError, match="valid \\(1, 2\\)"):
        cache().step(q, k, v, torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="float64, float64, float32, float64, float64, expected one dtype"):
        cache().step(q, k, v.float())
    with pytest.raises(ValueError, match=r"n, table and spans are torch.int64, .*expected torch.int32"):
        cache(n=torch.zeros(1, dtype=torch.int64)).step(q, k, v)
    with pytest.raises(ValueError, match=r"valid is torch.int64, expected torch.bool"):
        cache().step(q, k, v, torch.ones(1, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="lie on several devices"):
        cache(keys=torch.empty(1, layout.slots, 5, dtype=torch.float64, device="meta")).step(q, k, v)
    with pytest.raises(ValueError, match="the table has 32 slots, the cache 31"):
        cache(keys=torch.empty(1, 31, 5), values=torch.empty(1, 31, 7)).step(q.float(), k.float(), v.float())
    with pytest.raises(RuntimeError, match=r"attend_update has no gradient: decode under torch.no_grad"):
        cache().step(q.requires_grad_(), k, v)


class Allocations(TorchDispatchMode):
    """Bytes of everything that torch's operators return, but for views."""

    def __enter__(self) -> Self:
        self.sizes: list[int] = []
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage().data_ptr() for x in tree_leaves(args) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        made = [x.untyped_storage() for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.sizes += [x.nbytes() for x in made if x.data_ptr() not in given]
        return out


def test_a_step_allocates_nothing_of_the_size_of_the_cache() -> None:
    """Slots that are not filled, or outside the window, cost neither time nor memory: one token of a row, and a chunk,
    beside 16 MB of slots."""
    layout = Layout.of_spans([0, 4], [2**15, 12], 2, 2**15)
    cache = Cache(layout, 1, 64, 64, torch.float32)
    cache.run([x.float() for x in normal(1, 2, 2, 20, 64, 64)], None, [])
    for tokens in (1, 8):
        new = [x.float() for x in normal(1, 2, 2, tokens, 64, 64)]
        with Allocations() as made:
            cache.step(*new)
        assert 0 < max(made.sizes) < 2**16, max(made.sizes)


def layer(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, n: Tensor, table: Tensor, spans: Tensor
) -> Tensor:
    out = torch.ops.attnopt.attend_update(q * 2, k, v, keys, values, n, None, table, spans, SCALE, False)
    return out.transpose(1, 2).reshape(q.shape[0], 1, -1) + 1


@pytest.mark.slow
def test_a_compiled_step_writes_in_place_and_compiles_once() -> None:
    """20 tokens, and 20 more under another plan of as many slots: one graph, no clone of the cache in its code."""
    torch._dynamo.reset()
    layouts = [Layout.of_spans([0, 2, 4, 4], w, 2, 512) for w in ([512, 9, 12, 3], [12, 3, 512, 9])]
    assert layouts[0].slots == layouts[1].slots and layouts[0] != layouts[1]
    compiled = torch.compile(layer, backend="attnopt", fullgraph=True)
    counter = torch._dynamo.utils.counters
    counter.clear()
    clear_reports()
    for layout in layouts:
        cache, twin = (Cache(layout, 1, 32, 32, torch.float32) for _ in range(2))
        qkv = [x.float() for x in normal(1, 4, 2, 21, 32, 32)]
        addresses = cache.keys.data_ptr(), cache.values.data_ptr(), cache.n.data_ptr()
        with torch.no_grad():
            for t in range(20):
                new = [x[:, :, t : t + 1] for x in qkv]
                one, two = ((*new, c.keys, c.values, c.n, c.table, c.spans) for c in (cache, twin))
                if t == 0 and layout is layouts[0]:
                    found, codes = run_and_get_code(compiled, *one)
                else:
                    found = compiled(*one)
                torch.testing.assert_close(found, layer(*two), atol=1e-5, rtol=1e-5)
        assert addresses == (cache.keys.data_ptr(), cache.values.data_ptr(), cache.n.data_ptr())
        torch.testing.assert_close(cache.keys, twin.keys, equal_nan=True, atol=0, rtol=0)
        assert cache.n.tolist() == [20]
    assert counter["stats"]["unique_graphs"] == 1, counter["stats"]
    assert not [line for report in reports() for line in report.lines()]
    whole = re.compile(rf"empty_strided_cpu\(\(1, {layouts[0].slots}, 32\)")
    assert codes and not any(whole.search(code) for code in codes)
