"""The benchmark of decoding from a static cache: its aims, its page, and a run at a size at which it takes no time."""

from __future__ import annotations

import pytest
import torch

from benchmarks import decode_document, exact_append, exact_decode
from benchmarks.exact_decode import Case, aims, expected, model_of
from benchmarks.record import Row, Run, environment


def row(kv_heads: int, dtype: str, buffer: int, error: float = 1e-6, **ratios: float) -> Row:
    record = Case(8, kv_heads, dtype, 16384).record(buffer)
    return Row(record, error, 1e-4, ratios, {name: 0.9 * r for name, r in ratios.items()}, {})


ROWS = [
    row(2, "float32", 1, eager=1.1, inductor=6.0),
    row(2, "float32", 2, eager=1.6, inductor=12.0, tight=0.99),
    row(2, "float32", 4, eager=1.6, inductor=24.0, tight=0.8),
    row(8, "float32", 1, eager=0.9, inductor=0.97),
    row(8, "float32", 2, error=1.0, eager=0.1, inductor=0.1),
]


def test_aims_take_the_worst_and_nothing_that_is_wrong() -> None:
    found = {aim.what: (aim.verdict, aim.found) for aim in aims(ROWS)}
    assert found["8/2 heads over inductor, tight buffers"] == ("met", 6.0)
    assert found["8/2 heads over inductor, buffers of twice the tokens"] == ("met", 12.0)
    assert found["8/8 heads over inductor, tight buffers"] == ("met", 0.97)
    assert found["over the uncompiled model"] == ("missed", 0.9)
    assert found["a step with buffers of four times the tokens over one with none to spare"] == ("missed", 1.25)
    assert all(aim.met is None for aim in aims([]))


def test_the_page_keeps_what_stands_before(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(decode_document, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(decode_document, "RESULTS", tmp_path)
    (tmp_path / "page.md").write_text("# One\n")
    run = Run("exact_decode", ROWS, environment(), aims(ROWS))
    decode_document.keep(run)
    decode_document.keep(run)
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("# One\n\n<!--") and page.count(decode_document.STATIC.begin) == 1
    assert "| 8 | 8/2 | float32 | 16384 | 2x | 1.60 (≥ 1.44) | 12.00 (≥ 10.80) | 0.99 (≥ 0.89) |" in page
    assert "| 8 | 8/2 | float32 | 16384 | 1x | 1.10 (≥ 0.99) | 6.00 (≥ 5.40) |  |" in page
    assert "without a figure: 8 8/8 float32 16384 2x" in page
    assert decode_document.with_section("# Two\n") == "# Two\n"
    run.save(tmp_path / "exact_decode-cpu.json")
    assert decode_document.with_section("# Two\n") == page.replace("# One", "# Two")
    grown = exact_append.Case(8, 8, "float32", 16384).record()
    grown = Row(grown, 0.0, 1e-4, {"eager": 5.0, "inductor": 4.5, "cat": 4.0}, {}, {})
    decode_document.keep(Run("exact_append", [grown], environment(), exact_append.aims([grown], 16384), ["16 copies"]))
    both = (tmp_path / "page.md").read_text()
    assert both.startswith(page) and "| 8 | 8/8 | float32 | 16384 | 5.00 | 4.50 | 4.00 |" in both
    assert "- 8/8 heads, 16384 tokens: 4.5, aim ≥ 4: met" in both and "- 16 copies" in both


def test_keys_that_do_not_matter_are_noticed() -> None:
    """A random model as it comes averages over all keys: any half of them is as good."""
    case = Case(1, 2, "float32", 64)
    with torch.no_grad():
        model = model_of(case)
        expected(case, model)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
        with pytest.raises(ValueError, match="half of the keys"):
            expected(case, model)


def test_cases_have_labels_of_their_own() -> None:
    labels = [str(case.record(n)) for case in exact_decode.cases(1024, [8, 2]) for n in exact_decode.BUFFERS]
    assert len(set(labels)) == len(labels) == 24
