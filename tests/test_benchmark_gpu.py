"""The GPU benchmark without a GPU: its dry run, its masks in closed form, and that it sees what is wrong."""

from __future__ import annotations

import contextlib
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from attnopt.codegen.reference_prefill import prefill as reference
from benchmarks import gpu
from benchmarks.block_mask import block_mask, mask_mod
from benchmarks.cuda import baselines, blocks, cache, checks, decode, generation, linear, prefill, tokens
from benchmarks.cuda.device import Budget, Device, poisoned
from benchmarks.spans import DRY, Sizes, Spans, dense, inputs, mixture, sampled_error, sampled_rows, uniform

CPU = torch.device("cpu")
SMALL = Sizes(32, 8, (16,), (96,), ((96, (1,)),), (50, 1), 64)


def test_the_dry_run_goes_through_every_section(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "DRY", SMALL)
    monkeypatch.setattr(sys, "argv", ["gpu", "--dry-run", "--out", str(tmp_path / "gpu.json")])
    gpu.main()
    said = capsys.readouterr().out
    data = json.loads((tmp_path / "gpu.json").read_text())
    assert data["benchmark"] == "gpu-dry-run" and data["aims"] == []
    assert not any("WRONG" in row for row in data["rows"])
    kinds = {row["case"].get("kernel") or row["case"]["check"] for row in data["rows"]}
    assert kinds == {"prefill", "blocks", "decode", "backward", "masked", "linear", "cache", "tokens", "generation"}
    rows = {row["case"]["heads"]: row for row in data["rows"] if row["case"].get("kernel") == "prefill"}
    assert set(rows) == {"mixture", "W256", "W1024", "W4096"}
    for row in rows.values():
        assert {prefill.BEST, prefill.FLEX, prefill.PER_WORK, prefill.OF_MATMUL} <= set(row["ratios"])
    (row,) = (row for row in data["rows"] if row["case"].get("length") == 64)
    assert set(row["ratios"]) == {linear.OF_FLOOR, linear.WINDOWS} and row["case"]["kernel"] == "linear"
    assert said.index("correctness") < said.index("ceilings") < said.index("prefill mixture 16 96: error")
    (row,) = (row for row in data["rows"] if row["case"].get("lists", "").endswith("thresholds"))
    # Every head visits the first block of a row, and of the two blocks of the second row only the first.
    assert row["case"]["skipped"] == 32 and set(row["ratios"]) == {blocks.BEST, blocks.UNBOUNDED, blocks.PER_WORK}
    # What is not to be had here is said.
    assert any("cudnn" in note for note in data["notes"]) and any("flash_attn" in note for note in data["notes"])
    assert (tmp_path / "gpu.svg").read_text().count("best SDPA") == 1


def test_a_wrong_kernel_is_seen_and_not_timed(monkeypatch, capsys):
    def unwritten(q, k, v, sinks, windows, scale, pad=None):
        out = torch.empty_like(q)
        out[:, :, 1:] = reference(q, k, v, sinks, windows, scale, pad)[:, :, 1:]
        return out

    real = checks.load
    swap = lambda spec: SimpleNamespace(prefill=unwritten) if spec.kernel == "span_prefill" else real(spec)  # noqa: E731
    monkeypatch.setattr(checks, "load", swap)
    monkeypatch.setattr(generation, "section", lambda *_: [])
    rows, aims, notes, _ = gpu.measured(Device(True), SMALL)
    wrong = {row.case["check"] for row in rows if row.wrong}
    assert wrong == {"prefill"} and "prefill: a check failed, so it was not timed" in notes
    assert not [row for row in rows if row.case.get("kernel") == "prefill"]
    assert [row for row in rows if row.case.get("kernel") == "decode"]
    assert {a.verdict for a in aims if "prefill" in a.what or "mixture" in a.what} == {"goal, unmeasured"}


def test_memory_starts_as_nan_only_while_checking():
    with poisoned():
        assert torch.empty(64).isnan().all() and torch.empty_like(torch.ones(8)).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(("queries", "length"), [(512, 512), (1, 512), (300, 300), (1, 300)])
def test_block_masks_in_closed_form_are_those_of_flex_attention(queries, length):
    spans = Spans("some", (0, 5, 130, 64), (2**30, 100, 300, 1))
    found = block_mask(spans, queries, length, CPU)
    wanted = create_block_mask(
        mask_mod(spans, CPU, length - queries), 1, 4, queries, length, device="cpu", BLOCK_SIZE=128
    )
    assert torch.equal(found.to_dense(), wanted.to_dense())
    # A block that is kept whole must be: what it skips is the mask.
    rows = torch.arange(length - queries, length)[:, None]
    columns = torch.arange(length)[None]
    for head, (sink, window) in enumerate(zip(spans.sinks, spans.windows, strict=True)):
        keep = (columns <= rows) & ((columns < sink) | (rows - columns < window))
        for row, count in enumerate(found.full_kv_num_blocks[0, head].tolist()):
            for column in found.full_kv_indices[0, head, row, :count].tolist():
                tile = keep[row * 128 : row * 128 + 128, column * 128 : column * 128 + 128]
                assert tile.all() and tile.shape[1] == 128


def test_a_sampled_error_is_that_of_its_rows_and_sees_one_key_too_many():
    spans = mixture(SMALL)
    q, k, v = inputs(SMALL, 16, 96, CPU, torch.float64)
    sinks, windows = spans.tables(CPU)
    right = reference(q, k, v, sinks, windows, 0.25)
    assert sampled_error(q, k, v, spans, 0.25, right) < 1e-12
    assert sampled_error(q, k, v, spans, 0.25, reference(q, k, v, sinks, windows + 1, 0.25)) > prefill.TOLERANCE
    assert sampled_error(q, k, v, spans, 0.25, right.index_fill(2, torch.tensor([40]), torch.nan)) == float("inf")
    assert {0, 95, 64, 8} <= set(sampled_rows(spans, 96).tolist())


def test_spans_have_the_pairs_of_their_mask():
    for spans in (mixture(SMALL), uniform(1024, SMALL), dense(SMALL)):
        sinks, windows = spans.tables(CPU)
        i, j = torch.arange(70)[:, None], torch.arange(70)[None]
        keep = (j <= i) & ((j < sinks.view(-1, 1, 1)) | (i - j < windows.view(-1, 1, 1)))
        assert spans.pairs(70) == int(keep.sum()) and spans.keys(70) == tuple(keep[:, -1].sum(-1).tolist())


def test_a_call_is_timed_by_events_from_a_cold_cache_and_behind_a_head_start(monkeypatch):
    """The few lines that a dry run does not reach, with stand-ins for CUDA."""
    seen: list[str] = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            seen.append("event")

        def synchronize(self):
            seen.append("wait")

        def elapsed_time(self, end):
            return 250.0

    device = Device(True)
    device.dry, device._flush = False, SimpleNamespace(zero_=lambda: seen.append("flush"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: seen.append("sleep"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    times = device.times({"one": lambda: seen.append("call")}, 0.0)
    assert times == {"one": [0.25] * 3}
    assert seen == ["call", *["flush", "sleep", "event", "call", "event", "wait"] * 4]


def test_a_graph_is_captured_after_warm_calls_and_keeps_its_result(monkeypatch):
    seen: list[str] = []
    stream = SimpleNamespace(wait_stream=lambda other: None)
    graph = SimpleNamespace(replay=lambda: seen.append("replay"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda s: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda g: contextlib.nullcontext())
    device = Device(True)
    device.dry = False
    results = iter(torch.arange(5.0))
    replay = device.graphed(lambda: next(results))
    assert replay() == replay() == 3.0 and seen == ["replay", "replay"]


def test_what_there_is_no_time_for_is_said():
    notes: list[str] = []
    budget = Budget("prefill", 0.0, notes)
    assert prefill.section(Device(True), DRY, 1.0, budget) == []
    assert notes == [f"prefill: D = 16, {n} tokens left out, its 0 seconds were over" for n in DRY.lengths]


def test_a_case_that_fails_costs_no_other_and_is_said(monkeypatch):
    measure, notes = prefill.measure, []

    def failing(device, sizes, dim, length, *rest):
        if length == 128:
            raise RuntimeError("no kernel image\nis available")
        return measure(device, sizes, dim, length, *rest)

    monkeypatch.setattr(prefill, "measure", failing)
    rows = prefill.section(Device(True), DRY, 1e9, Budget("prefill", 60.0, notes))
    assert {row.case["length"] for row in rows} == {96}
    assert "FAILED: prefill, D = 16, 128 tokens: RuntimeError: no kernel image" in notes


def test_aims_are_judged_by_the_worst_case():
    def row(heads, length, per_work, flex):
        case = {"kernel": "prefill", "heads": heads, "dim": 128, "length": length}
        ratios = {prefill.BEST: 3.0, prefill.PER_WORK: per_work, prefill.OF_MATMUL: 0.5, prefill.FLEX: flex}
        return prefill.Row(case, 0.0, 1e-2, ratios, {}, {})

    rows = [row("mixture", 8192, 0.1, 2.0), row("mixture", 16384, 0.72, 2.0), row("mixture", 32768, 0.69, 0.9)]
    found = {a.what.split(": ")[1]: (a.found, a.verdict) for a in prefill.aims(rows, 128, 16384)}
    assert found["times as fast as the best SDPA over the work saved"] == (0.69, "missed")
    assert found["share of the measured matmul rate, kept pairs"] == (0.5, "met")
    assert found["times as fast as FlexAttention, worst case"] == (0.9, "missed")
    assert {a.verdict for a in decode.aims([])} == {"goal, unmeasured"}


def test_linear_heads_are_judged_by_the_worst_length_and_by_their_slope():
    def row(length, time, floor, windows):
        case = {"kernel": "linear", "features": 64, "dim": 128, "length": length}
        return linear.Row(case, 0.0, 1e-2, {linear.OF_FLOOR: floor, linear.WINDOWS: windows}, {}, {"attnopt": time})

    rows = [row(4096, 1.0, 0.5, 1.2), row(65536, 17.6, 0.45, 0.9), row(131072, 99.0, 0.41, 2.0)]
    assert [(a.found, a.verdict) for a in linear.aims(rows)] == [
        (0.41, "met"), (0.9, "missed"), (None, "goal, unmeasured"), (pytest.approx(1.1), "missed")
    ]  # fmt: skip
    assert {a.verdict for a in linear.aims([]) + tokens.aims([])} == {"goal, unmeasured"}
    # bfloat16 q and result of every head, k and v of every KV head, and a float32 a row.
    assert linear.floor_bytes(SMALL, 16, 10) == 10 * (2 * 32 * 16 * 2 + 2 * 8 * 16 * 2 + 32 * 4)


def test_lists_of_blocks_are_judged_by_their_own_work_and_thresholds_by_going_without():
    def row(name, length, **ratios):
        case = {"kernel": "blocks", "lists": name, "dim": 128, "length": length}
        return blocks.Row(case, 0.0, 1e-2, {blocks.BEST: 1.5, **ratios}, {}, {})

    free = [row(case.name, n, **{blocks.PER_WORK: 0.6 + n / 1e5}) for case in blocks.CASES[:3] for n in (8192, 16384)]
    bounded = row(blocks.CASES[3].name, 16384, **{blocks.PER_WORK: 0.1, blocks.UNBOUNDED: 1.6})
    found = [(a.found, a.verdict) for a in blocks.aims([*free, bounded])]
    assert found == [(pytest.approx(0.76384), "met"), (1.5, "missed"), (1.6, "met")]
    assert {a.verdict for a in blocks.aims([])} == {"goal, unmeasured"}


@pytest.mark.parametrize("case", [blocks.Case(16, 2), blocks.Case(16, 1, bounded=True)])
def test_the_error_of_lists_sees_one_block_too_few(case):
    q, k, v = inputs(SMALL, 16, 96, CPU, torch.float64)
    heads = torch.arange(32, dtype=torch.int32)
    counts, lists = blocks.lists_of(16, (1, 32), 96, 96, CPU, case.sparse)
    if case.bounded:
        q, k = blocks.made_loud(q, k, 16)
    bounds = torch.full((32,), -blocks.APART / 2 if case.bounded else -torch.inf)
    out = torch.empty_like(q)
    blocks.reference(q, k, v, heads, counts, lists, bounds, 0.25, None, 0, 16, out)
    assert blocks.error_at(out, q, k, v, case, counts, lists) < 1e-6
    # The last list without its first block, which is the loudest where there are thresholds.
    lists[0, :, -1, 0] = lists[0, :, -1, 1]
    assert blocks.error_at(out, q, k, v, case, counts, lists) > blocks.TOLERANCE_BF16


def test_a_cache_of_half_the_bytes_is_judged_where_it_is_large_by_its_worst_case():
    layout = cache.layout_of(Sizes(), 32768)
    assert layout.slots == pytest.approx(0.5 * 8 * 32768, rel=1e-3)

    def row(batch, size, of_copy, equal):
        ratios = {cache.OF_COPY: of_copy, cache.BEST: 2.0, cache.EQUAL_MEMORY: equal}
        case = {"kernel": "cache", "batch": batch, "context": 32768, "MiB": size}
        return cache.Row(case, 0.0, 1e-2, ratios, {cache.EQUAL_MEMORY: equal - 0.1}, {})

    rows = [row(1, 64, 0.3, 1.0), row(8, 512, 0.82, 3.3), row(64, 4096, 0.85, 3.0)]
    assert [(a.found, a.verdict) for a in cache.aims(rows)] == [(0.82, "met"), (pytest.approx(2.9), "missed")]
    case = {"kernel": "generation", "batch": 1, "context": 16384}
    alone = generation.Row(case, 0.0, 1e-2, {generation.EQUAL_MEMORY: 9.0}, {}, {})
    assert {a.verdict for a in [*cache.aims(rows[:1]), *generation.aims([alone])]} == {"goal, unmeasured"}


def test_a_result_that_is_larger_than_what_it_is_made_of_is_seen():
    keys = torch.zeros(2, 2, 10, 4)
    with generation.Largest() as largest:
        keys[:, :, None].expand(-1, -1, 3, -1, -1).reshape(2, 6, 10, 4).mul_(2)
        keys.transpose(1, 2)
    assert largest.bytes == 3 * keys.nbytes and "clone" in largest.operator


def test_flash_linear_attention_is_called_as_it_wants_and_dropped_where_wrong(monkeypatch):
    """A stand-in with its signature, which takes (B, N, heads, features) and gives (out, state)."""
    q, k, v = inputs(SMALL, 16, 96, CPU)
    maps, notes = linear.maps_of(linear.LinearPrefill("cpu", "bfloat16", 32, 8, 16, 16, 32, "exp", 24, False), CPU), []
    off = 0

    def attend(q, k, v, scale, normalize):
        weights = torch.einsum("bihf,bjhf->bhij", q.float(), k.float()).tril(off) * scale
        return torch.einsum("bhij,bjhd->bihd", weights, v.float()).to(v.dtype), None

    monkeypatch.setattr(baselines.importlib, "import_module", lambda _: SimpleNamespace(chunk_linear_attn=attend))
    assert linear.library(q, k, v, maps, notes) is not None and not notes
    off = -8
    assert linear.library(q, k, v, maps, notes) is None and "in the last row, not timed" in notes[0]


def test_libraries_that_are_there_are_called_as_they_want(monkeypatch):
    """Stand-ins with the signatures of FlashAttention and FlashInfer, which take (B, N, heads, D) and (N, heads, D)."""
    spans, (q, k, v) = uniform(1024, SMALL), inputs(SMALL, 16, 96, CPU, torch.float32)

    def attend(q, k, v, softmax_scale, causal, window_size):
        assert causal and window_size == (15, 0)
        sinks, windows = torch.zeros(32, dtype=torch.int32), torch.full((32,), window_size[0] + 1)
        return reference(*(x.transpose(1, 2) for x in (q, k, v)), sinks, windows, softmax_scale).transpose(1, 2)

    def single(q, k, v, causal, sm_scale, window_left):
        return attend(q[None], k[None], v[None], sm_scale, causal, (window_left, 0))[0]

    made = {
        "flash_attn_interface": SimpleNamespace(flash_attn_func=lambda *x, **y: (attend(*x, **y), None)),
        "flash_attn": SimpleNamespace(flash_attn_func=attend),
        "flashinfer": SimpleNamespace(single_prefill_with_kv_cache=single),
    }
    monkeypatch.setattr(baselines.importlib, "import_module", made.__getitem__)
    notes: list[str] = []
    found = baselines.libraries(q, k, v, 0.25, spans, notes)
    assert [b.name for b in found] == ["FlashAttention 3", "FlashAttention 2", "FlashInfer"] and not notes
    assert [b.name for b in prefill.right(found, q, k, v, 0.25, notes)] == [b.name for b in found]
    assert baselines.libraries(q, k, v, 0.25, mixture(SMALL), notes) == []


def test_kv_heads_whose_queries_differ_cannot_be_decoded():
    with pytest.raises(ValueError, match="KV head 0 have different spans"):
        decode.Cache(Sizes(8, 2, shrink=64), mixture(Sizes(8, 2, shrink=64)), 1, 96, 16, Device(True))
