"""How a layer's cache is laid out: what each KV head has room for, where tokens lie, and how large it all is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attnopt.cache import Layout, layouts_of
from attnopt.errors import OptionError, PlanError
from attnopt.ir import DENSE, Choice, Mask, Site


def site(heads: int = 4, kv_heads: int = 2, window: int | None = None, name: str = "layers.0.attn") -> Site:
    return Site(name, 0, "sdpa", heads, kv_heads, 64, 64, 0.125, "float32", Mask(causal=True, window=window))


def span(sink: int, alpha: int, beta: float = 0.0) -> Choice:
    return Choice.of("sink_window", {"sink": sink, "alpha": alpha, "beta": beta})


def plan(choices: dict[str, tuple[Choice, ...]], min_length: int = 0) -> Any:
    """As much of a plan as a layout reads."""
    return SimpleNamespace(choices=choices, min_length=min_length)


def test_a_kv_head_has_room_for_the_widest_of_its_query_heads() -> None:
    layout = Layout.of([span(4, 100), span(2, 200), span(0, 0, 1 / 64), DENSE], site(), 4096, slack=30)
    # 4 + 200 + 30 = 234, and the next multiple of 16.
    assert layout.capacities == (240, 4096) and layout.starts == (0, 240) and layout.slots == 4336
    assert layout.sinks == (4, 0) and layout.rings == (236, 4096) and layout.whole == (False, True)
    assert layout.head_sinks == (4, 2, 0, 0) and layout.head_windows == (100, 200, 64, 4096)
    table, spans = layout.tables()
    assert table.tolist() == [[0, 240, 4, 200], [240, 4096, 0, 1 << 30]] and table.dtype == torch.int32
    assert spans.tolist() == [[4, 100], [2, 200], [0, 64], [0, 4096]] and spans.dtype == torch.int32


def test_spans_that_nearly_cover_the_length_hold_every_token() -> None:
    layout = Layout.of([span(4, 90)] * 4, site(), 100)
    # 94 slots become 96 of at most 112, which is short of 100.
    assert layout.capacities == (96, 96) and layout.whole == (False, False)
    layout = Layout.of([span(4, 94)] * 4, site(), 100)
    assert layout.capacities == (112, 112) and layout.whole == (True, True) and layout.sinks == (0, 0)
    assert Layout.of(None, site(), 1).capacities == (16, 16)


def test_the_models_own_window_and_no_plan() -> None:
    dense = Layout.of(None, site(), 1000)
    assert dense.capacities == (1008, 1008) and dense.head_windows == (1000,) * 4
    sliding = Layout.of(None, site(window=128), 1000)
    assert sliding.capacities == (128, 128) and sliding.head_windows == (128,) * 4
    narrowed = Layout.of([span(4, 64)] * 2 + [DENSE] * 2, site(window=128), 1000)
    # Sinks further away than the model's own window were never seen.
    assert narrowed.head_sinks == (0,) * 4 and narrowed.capacities == (64, 128)


@pytest.mark.parametrize("sink", [0, 3])
def test_slots_and_positions_are_those_of_a_cache_that_is_kept_by_hand(sink: int) -> None:
    layout = Layout.of_spans([0, 0, sink, 0], [40, 40, 5, 7], 2, 40, slack=4)
    for head in range(2):
        capacity, kept = layout.capacities[head], layout.sinks[head]
        slots = [-1] * capacity
        for position in range(40):
            assert layout.positions_of(torch.tensor(position), head).tolist() == slots
            free = position if position < kept else kept + (position - kept) % (capacity - kept)
            slots[free] = position
            assert layout.slot_of(torch.tensor(position), head) == layout.starts[head] + free
    seen = torch.tensor([[3, 9], [0, 40]])
    assert layout.positions_of(seen, 1).shape == (2, 2, layout.capacities[1])
    assert (layout.positions_of(seen, 1) >= 0).sum(-1).tolist() == [[3, 9], [0, 16]]


@pytest.mark.parametrize(("share", "whole", "least"), [(1, 1 / 4, 2.5), (4, 1 / 2, 1.65)])
def test_bytes_are_what_the_spans_need(share: int, whole: float, least: float) -> None:
    """Some KV heads whole, the others with 64 sinks and 256 keys: DuoAttention's splits for MHA and GQA, of which it
    reports 2.55 and 1.67 times less memory (Xiao et al., arXiv:2410.10819, figure 9), at lengths from 4096 on."""
    groups = 8
    for length in (4096, 5000, 65536):
        choices = [DENSE if h // share < whole * groups else span(64, 256) for h in range(groups * share)]
        planned, dense = (Layout.of(c, site(groups * share, groups), length) for c in (choices, None))
        sizes = 64, 32, torch.bfloat16, 3
        assert planned.nbytes(*sizes) == 3 * planned.slots * 96 * 2
        assert planned.nbytes(*sizes) <= 1.05 * planned.ideal_bytes(*sizes)
        assert planned.ideal_bytes(*sizes) == 3 * 96 * 2 * groups * (whole * length + (1 - whole) * 320)
        assert dense.nbytes(*sizes) >= least * planned.nbytes(*sizes)


def test_rounding_costs_little_even_for_windows_of_one_token_more() -> None:
    for window in (129, 257, 1025):
        layout = Layout.of([span(4, window), DENSE] * 2, site(4, 4), 4096)
        sizes = 128, 128, torch.float16
        assert layout.nbytes(*sizes) <= 1.05 * layout.ideal_bytes(*sizes)


def test_the_layouts_of_a_plan() -> None:
    one, two = site(name="a"), site(name="b", window=32)
    made = layouts_of(plan({"a": (span(4, 60),) * 4}, min_length=100), [one, two], 200)
    assert made["a"].capacities == (64, 64) and made["b"].capacities == (32, 32)
    short = layouts_of(plan({"a": (span(4, 60),) * 4}, min_length=201), [one], 200)
    assert short["a"] == Layout.of(None, one, 200)
    assert layouts_of(None, [one], 200) == short
    assert "128 slots for 2 KV heads of 200 tokens (32 %)" in str(made["a"])


def test_what_a_cache_does_not_hold_is_refused_by_name() -> None:
    gone, far = Choice("pruned"), Choice.of("linear", {"sink": 4, "alpha": 60, "beta": 0.0, "rank": 16})
    for choice, words in (gone, "is gone"), (far, "needs linear"), (Choice("compensation"), "needs compensation"):
        for made in (plan({"a": (DENSE, choice, DENSE, DENSE)}), plan({"a": (DENSE, choice, DENSE, DENSE)}, 1000)):
            with pytest.raises(PlanError, match=f"Head 1 of a {words}") as raised:
                layouts_of(made, [site(name="a")], 200)
            assert "--allow" in raised.value.remedy
    with pytest.raises(PlanError, match="has 3 heads at a, this model has 4"):
        layouts_of(plan({"a": (DENSE,) * 3}), [site(name="a")], 200)
    for length, slack in (0, 0), (10, -1):
        with pytest.raises(OptionError, match="cannot be made"):
            Layout.of(None, site(), length, slack)
