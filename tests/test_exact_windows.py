"""The benchmark of windows and documents: what it counts as kept, what it compares, and the page it writes."""

from __future__ import annotations

import pytest
import torch
from tracing import trace

from benchmarks import decode_document, windows_document
from benchmarks.exact_windows import (
    Case,
    aims,
    attention,
    cases,
    kept,
    lengths_of,
    numbers_of,
    pairs,
    reference,
    tensors,
)
from benchmarks.record import Row, Run, environment

CASES = [Case("attention", "float32", 640, *rule) for rule in ((70, 1), (0, 5), (70, 5))]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference_is_the_attention_and_the_ideal_counts_its_pairs(case):
    rows = torch.arange(case.length)
    doc = numbers_of(case)
    keep = kept(case, doc, rows)
    assert pairs(case) == (int(keep.sum()), int(torch.ones(case.length, case.length).tril().sum()))
    assert sum(lengths_of(case)) == case.length and len(lengths_of(case)) == case.documents
    q, k, v = tensors(case)
    some = torch.tensor([0, 1, 71, 300, 639])
    torch.testing.assert_close(
        reference(case, q, k, v, doc, some).float(), attention(case)(q, k, v, doc)[:, :, some], atol=1e-5, rtol=1e-5
    )


def test_every_attention_of_the_benchmark_is_rewritten():
    """Of the same rules at a shorter length: a benchmark of what is left alone would say nothing."""
    for case in CASES[1:]:
        said = trace(attention(case), *tensors(case), numbers_of(case), verify=False).rewrites
        assert said and said[0].startswith("documents apart"), said


def row(case, share=None, causal=None, **ratios):
    found = ratios if share is None else {**ratios, "causal": causal, "share": share}
    return Row(case.record(), 1e-4, 1e-2, found, {n: 0.9 * r for n, r in ratios.items()}, {})


def test_aims_are_judged_by_cases_whose_ideal_was_meant():
    near, far = Case("attention", "bfloat16", 8192, 1024), Case("attention", "bfloat16", 8192, 256)
    wrong = Row(near.record(), 1.0, 1e-2, {}, {}, {})
    found = aims([row(near, 0.6, 2.4, masked=7.0), row(far, 0.3, 6.0, masked=20.0), wrong])
    assert [(a.verdict, a.found) for a in found] == [("goal, unmeasured", None), ("met", 0.6), ("met", 6.3)]
    assert [a.verdict for a in aims([row(near, 0.4, 1.6, masked=0.9)])][1:] == ["missed", "missed"]


def test_the_page_keeps_what_stands_before_and_shows_every_row(tmp_path, monkeypatch):
    some, model = (
        Case("attention", "bfloat16", 8192, 1024),
        Case("LlamaModel", "float32", 2048, documents=16, threads=2),
    )
    wrong = Row(Case("MistralModel", "float32", 64, 8).record(), 1.0, 1e-2, {}, {}, {})
    rows = [row(some, 0.6, 2.4, masked=7.0), row(model, inductor=3.0), wrong]
    run = Run("exact_windows", rows, environment(), aims(rows))
    monkeypatch.setattr(windows_document, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(windows_document, "RESULTS", tmp_path)
    monkeypatch.setattr(decode_document, "RESULTS", tmp_path)
    (tmp_path / "page.md").write_text("# One\n\ntext\n")
    windows_document.keep(run)
    windows_document.keep(run)
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("# One\n\ntext\n\n<!--") and page.count(windows_document.BEGIN) == 1
    assert "| window 1024 | bfloat16 | 8192 | 1 | 7.00 (≥ 6.30) | 2.40 | 4.0 | 0.60 |" in page
    assert "| LlamaModel | 16 documents | float32 | 2048 | 2 | 3.00 (≥ 2.70) |" in page and "MistralModel" in page
    # Written anew by the benchmark of classes, the page gets the recorded section again.
    assert windows_document.with_section("# Two\n") == "# Two\n"
    run.save(tmp_path / "exact_windows-cpu.json")
    assert windows_document.with_section("# Two\n") == "# Two\n" + page.removeprefix("# One\n\ntext\n")


def test_cases_have_labels_of_their_own():
    for quick in (True, False):
        labels = [" ".join(map(str, case.record().values())) for case in cases(quick)]
        assert len(set(labels)) == len(labels)
