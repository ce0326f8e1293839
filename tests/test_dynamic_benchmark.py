"""The benchmark of selections: equal blocks for all ways, an oracle that none surpasses, and nothing lost where all is
kept."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import build, tokens

from attnopt.ir import Choice
from attnopt.registry import CANDIDATES
from attnopt.supervision import Sample
from benchmarks import dynamic

EVERY = {"mass": 1.0, "count": 1 << 20, "alike": -1.0, "block": 16, "skip": 0.0}
WHOLE, BOLD = (Choice.of("pooled", {**EVERY, "mass": mass}) for mass in (1.0, 0.25))
LINES = Choice.of("vertical_slash", {"vertical": 1, "slash": 2, "block": 16, "skip": 0.0})


def inputs(length: int = 75) -> tuple[torch.Tensor, ...]:
    drawn = torch.Generator().manual_seed(0)
    return tuple(2 * torch.randn(1, n, length, 8, generator=drawn) for n in (4, 2, 2))


@pytest.mark.parametrize("window", [0, 20])
def test_true_mass_is_that_of_dense_attention(window: int) -> None:
    q, k, _ = inputs()
    mass, lse = dynamic.true_mass(dynamic.asked_at(WHOLE, q, k, 0.3, window))
    i, j = torch.arange(75)[:, None], torch.arange(75)
    keep = (j <= i) & (i - j < (window or 75))
    scores = (q @ k.repeat_interleave(2, 1).mT * 0.3).masked_fill(~keep, -torch.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    weights = scores.softmax(-1)
    for r in range(5):
        for c in range(5):
            rows, columns = (slice(16 * n, 16 * n + 16) for n in (r, c))
            torch.testing.assert_close(mass[..., r, c], weights[:, :, rows, columns].sum((2, 3)))


@pytest.mark.parametrize("way", ["window", "oracle"])
def test_each_row_of_each_head_has_as_many_blocks(way: str) -> None:
    q, k, v = inputs()
    asked = dynamic.asked_at(BOLD, q, k, 0.3, 0)
    mass, _ = dynamic.true_mass(asked)
    visits = dynamic.run_operator(BOLD, q, k, v, 0.3, 0)[2]
    counts = visits.counts - visits.skipped
    keep = dynamic.as_many(way, counts, asked, mass)
    assert torch.equal(keep.sum(-1), counts.long()) and not bool((keep & ~asked.possible).any())
    assert bool((keep | ~asked.always)[:, :, 1:].all())
    out, lse = dynamic.run_blocks(keep, asked, v)
    hidden = ~keep.repeat_interleave(16, 2).repeat_interleave(16, 3)[:, :, :75, :75]
    hidden |= torch.arange(75) > torch.arange(75)[:, None]
    scores = (q @ k.repeat_interleave(2, 1).mT * 0.3).masked_fill(hidden, -torch.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    torch.testing.assert_close(out, scores.softmax(-1) @ v.repeat_interleave(2, 1))


def test_a_wrong_operator_has_no_times(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs()
    for choice in (WHOLE, BOLD, LINES):
        dynamic.check(choice, q, k, v, 0.3, 0)
        dynamic.check(choice, q, k, v, 0.3, 20)
    right = dynamic.run_operator
    monkeypatch.setattr(dynamic, "run_operator", lambda *of: (right(*of)[0] * 1.001, *right(*of)[1:]))
    with pytest.raises(dynamic.WrongResult, match="WRONG: pooled"):
        dynamic.check(BOLD, q, k, v, 0.3, 0)


def test_what_is_recalled_and_lost(capsys: pytest.CaptureFixture[str]) -> None:
    subject: Any = SimpleNamespace(model=build("llama", num_hidden_layers=1))
    ids = tokens(1, 80)
    counted = torch.zeros(80)
    counted[70:] = 1.0
    samples = [Sample(ids), Sample(ids, counted, "probe", 4.0)]
    whole, bold, lines = dynamic.tried(subject, "text", samples, [WHOLE, BOLD, LINES], 0)
    assert whole.density == 1.0 and all(abs(x - 1) < 1e-5 for x in whole.recalled.values())
    assert all(x < 1e-9 for x in whole.damage.values())
    for row in (bold, lines):
        assert 0.4 < row.density < 1.0 and row.recalled["method"] < 0.999 and row.damage["method"] > 1e-6
        assert row.recalled["oracle"] > max(row.recalled["method"], row.recalled["window"]) - 0.01
    assert (bold.setting, lines.setting) == ("mass 0.25", "slash 2, vertical 1")
    assert "text 2 of 2: " in capsys.readouterr().out


def test_every_method_is_tried_as_distilling_tries_it() -> None:
    found = dynamic.settings_of([], 4096, 32)
    assert {"pooled", "threshold", "vertical_slash", "query_aware"} <= {c.candidate for c in found}
    assert all(c["block"] == 32 and not CANDIDATES[c.candidate].problem(dict(c.params)) for c in found)
    assert {c.candidate for c in dynamic.settings_of(["pooled"], 4096, 32)} == {"pooled"}


@pytest.mark.full
@pytest.mark.slow
def test_the_shipped_model_is_measured_and_drawn(tmp_path, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["dynamic", "--quick", "--methods", "pooled", "threshold", "--json", str(out)])
    dynamic.main()
    data = json.loads(out.read_text())
    rows = [dynamic.Row(**row) for row in data["rows"]]
    assert {row.text for row in rows} == {"ordinary text", "recall prompts"}
    assert all(0 < row.density <= 1 and 0 < row.recalled["method"] <= 1 and row.selecting > 0 for row in rows)
    dynamic.figure(rows, tmp_path / "figure.svg")
    assert "<svg" in (tmp_path / "figure.svg").read_text()
    assert dynamic.described(data, rows).count("| threshold |") == 2 * 5
    assert "recall prompts" in capsys.readouterr().out
