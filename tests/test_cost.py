"""Cost tables: counting, interpolation that never goes below what was measured, storage, and measuring itself."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from attnopt.codegen.reference_prefill import prefill, span_mask
from attnopt.codegen.spec import SpanPrefill
from attnopt.cost import (
    CostTable,
    break_even,
    device_key,
    kept_pairs,
    layer_cost,
    load_or_measure,
    measure,
    path_of,
    timing,
)
from attnopt.errors import AttnoptError

KEY = device_key("cpu", "float32", 4, 2, 16)


def power_law(lengths: tuple[int, ...] = (1024, 4096), overhead: float = 0.0) -> CostTable:
    """Cost n * w / 1e6, and `overhead` for windows."""
    entries = {}
    for n in lengths:
        entries[n, 0, n] = n * n / 1e6
        for sink in (0, 4):
            for w in (64, 256):
                entries[n, sink, w] = n * w / 1e6 * (1 + 0.1 * (sink > 0)) + overhead
    return CostTable(KEY, tuple(entries.items()), tuple((n, 0.5 * n / 1024) for n in lengths))


@pytest.mark.parametrize("length", [1, 2, 7, 40])
def test_kept_pairs_counts_the_mask(length: int) -> None:
    for sink in (0, 1, 5, 60):
        for window in (1, 3, 7, 39, 40, 100):
            mask = span_mask(length, torch.tensor([sink]), torch.tensor([window]))
            assert kept_pairs(length, sink, window) == int(mask.sum())


def test_measured_points_are_returned_as_they_are() -> None:
    table = power_law()
    for (length, sink, window), ms in table.entries:
        assert table.cost(length, sink, window) == ms


def test_between_points_it_follows_the_power_law() -> None:
    table = power_law()
    assert table.cost(1024, 0, 128) == pytest.approx(1024 * 128 / 1e6)
    assert table.cost(2048, 0, 128) == pytest.approx(2048 * 128 / 1e6)
    assert table.cost(2048, 0, 2048) == pytest.approx(2048**2 / 1e6)
    assert table.cost(1024, 2, 64) == table.cost(1024, 4, 64)  # the next larger sink that was measured
    assert table.cost(1024, 9, 64) == table.cost(1024, 4, 64)


def test_nothing_costs_less_than_the_least_that_was_measured() -> None:
    table = power_law()
    assert table.cost(1024, 0, 1) == table.cost(1024, 0, 64)
    assert table.cost(16, 0, 16) == table.cost(1024, 0, 1024)
    assert table.cost(16, 0, 8) == table.cost(1024, 0, 64)


def test_above_the_longest_length_kept_pairs_scale_it() -> None:
    table = power_law()
    assert table.cost(8192, 0, 64) == pytest.approx(2 * table.cost(4096, 0, 64), rel=0.01)
    assert table.cost(8192, 0, 8192) == pytest.approx(4 * table.cost(4096, 0, 4096), rel=0.01)


def test_wider_windows_and_longer_lengths_cost_no_less() -> None:
    table = power_law()
    for length in (500, 1024, 1500, 4096, 6000):
        costs = [table.cost(length, 0, w) for w in range(1, length + 1, 13)]
        assert costs == sorted(costs)
    lengths = [table.cost(n, 0, 100) for n in range(1024, 9000, 100)]
    assert lengths == sorted(lengths)


def test_a_layer_pays_for_each_distinct_span() -> None:
    table = power_law()
    one, two = table.cost(1024, 0, 64), table.cost(1024, 0, 256)
    assert layer_cost(table, 1024, [(0, 64)] * 3) == pytest.approx(3 * one)
    assert layer_cost(table, 1024, [(0, 64), (0, 256), (0, 64)]) == pytest.approx(2 * one + two + 0.5)
    assert layer_cost(table, 1024, [(4, 2000), (0, 1024)]) == pytest.approx(2 * table.cost(1024, 0, 1024))  # one span


def test_by_density_counts_pairs_and_says_so() -> None:
    table = CostTable.by_density()
    assert not table.measured and table.id == "density" and "pairs" in table.unit
    assert table.cost(4096, 4, 128) == kept_pairs(4096, 4, 128) / 1e6
    assert table.group_cost(4096) == 0 and break_even(table) == 0
    assert power_law().measured and power_law().unit == "ms" and len(power_law().id) == 12


def test_break_even() -> None:
    assert break_even(power_law()) == 1024
    assert break_even(power_law(overhead=2.0)) == 4096
    assert break_even(power_law(overhead=1e3)) == 4097


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    table = power_law()
    table.save(tmp_path / "table.json")
    loaded = CostTable.load(tmp_path / "table.json")
    assert loaded == table and loaded.id == table.id
    assert power_law(overhead=1.0).id != table.id


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t[: len(t) // 2],
        lambda t: "",
        lambda t: "[]",
        lambda t: t.replace('"schema": 1', '"schema": 9'),
        lambda t: t.replace('"groups"', '"group"'),
        lambda t: t.replace("[1024, 0, 1024, 1.048576]", "[1024, 0, 1024, -1.0]"),
        lambda t: t.replace("[1024, 0, 1024, 1.048576]", "[1024, 0, 1024, NaN]"),
        lambda t: t.replace("[1024, 0, 1024, 1.048576]", '[1024, 0, 1024, "fast"]'),
        lambda t: t.replace("[1024, 0, 1024, 1.048576],", ""),
    ],
)
def test_a_damaged_file_is_refused(change, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    power_law().save(tmp_path / "table.json")
    text = (tmp_path / "table.json").read_text()
    assert change(text) != text
    (tmp_path / "table.json").write_text(change(text))
    with pytest.raises(AttnoptError, match=r"table\.json is damaged") as caught:
        CostTable.load(tmp_path / "table.json")
    assert "Delete it" in caught.value.remedy


class Clock:
    """A clock that only its kernel moves: 1 ms for every distinct span and 50 us for every head and 64 keys of its
    window, so that what is derived from times is exact on a machine of any load."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    thread_time = perf_counter

    def kernel(self, q, k, v, sinks, windows, scale, pad=None):  # type: ignore[no-untyped-def]
        spans = windows.clamp(max=q.shape[2]).tolist()
        self.now += 1e-3 * len(set(spans)) + sum(5e-5 * w / 64 for w in spans)
        return q


def test_measuring_finds_the_time_per_head_and_per_group(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int, str]] = []
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    table = measure(
        clock.kernel, 4, 2, 8, "float32", [128, 256], [64, 128], [0], rounds=3, progress=lambda *a: seen.append(a)
    )
    assert table.lengths == (128, 256) and [s[:2] for s in seen] == [(1, 2), (2, 2)]
    expected = {(128, 0, 128), (128, 0, 64), (256, 0, 256), (256, 0, 64), (256, 0, 128)}
    assert {entry for entry, _ in table.entries} == expected
    # Milliseconds of one head of four that share a span.
    for length, window in ((256, 64), (256, 128), (256, 256), (128, 64)):
        assert table.cost(length, 0, window) == pytest.approx(1 / 4 + 0.05 * window / 64, rel=1e-9)
    # Spans a token apart, three more of them: a token of window is nearly nothing.
    assert table.group_cost(256) == pytest.approx(1.0, rel=0.01)
    assert dict(table.key)["heads"] == "4" and dict(table.key)["device"]


def test_one_thread_is_not_charged_for_what_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """While it sleeps as while it waits for a processor; several threads are timed by the wall."""
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 0.0)
    for threads, waited in ((1, False), (2, True)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        (found,) = timing.interleaved([lambda: time.sleep(0.02)], 1, "cpu")
        assert (found > 15) == waited


def test_measuring_restores_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    table = measure(prefill, 2, 1, 8, "float32", [32], [8], [0, 4], threads=1, rounds=1)
    assert torch.get_num_threads() == before and dict(table.key)["threads"] == "1"


def test_a_measured_table_is_stored_and_found_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ATTNOPT_CACHE", str(tmp_path))
    spec = SpanPrefill("reference", "float32", 2, 1, 8, 8, False)
    table = load_or_measure(spec, [32, 64], [8], [0], rounds=1)
    path = path_of(table.key)
    assert path.parent == tmp_path / "costs" and path.exists()
    assert load_or_measure(spec, [32], [8], [0], rounds=1) == table
    wider = load_or_measure(spec, [32, 64], [8, 16], [0], rounds=1)
    assert len(wider.entries) > len(table.entries) and CostTable.load(path) == wider
    path.write_text("{")
    with pytest.raises(AttnoptError, match="damaged"):
        load_or_measure(spec, [32], [8], [0])
