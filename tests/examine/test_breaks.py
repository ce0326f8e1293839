"""Graph breaks and recompilations: Dynamo's own, with cause and line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from attnopt.errors import ModelError, OptionError
from attnopt.examine import examine
from attnopt.examine.breaks import guard_of, parts_of
from attnopt.hf import Loaded

LINES = Path(__file__).read_text(encoding="utf-8").splitlines()


def line_with(text: str) -> str:
    return f"{__file__}:{next(n for n, line in enumerate(LINES, 1) if text in line)}"


class Attention(nn.Module):
    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        self.embed, self.broken = nn.Embedding(100, 16), broken

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).unflatten(-1, (2, 8)).transpose(1, 2)
        if self.broken and int(ids.max()) > 3:  # here
            x = x * 2
        return torch.softmax(x @ x.mT, -1) @ x


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(ids)


def test_a_graph_break_has_its_cause_and_its_line() -> None:
    found = examine(Loaded(Attention(broken=True), None, "x"), 16)
    (seen,) = found.breaks
    assert "Tensor.item()" in seen.cause and seen.source == line_with("# " + "here") and seen.phase == "prefill"
    assert len(found.graphs) == 2 and sum(len(report.sites) for report in found.reports) == 1
    assert found.notes == ("Decoding was not traced: only models of transformers say which cache they take.",)


def test_recompilations_say_what_was_new_and_which_guard_failed() -> None:
    found = examine(Loaded(Attention(), None, "x"), 16)
    length, batch = found.recompiles
    assert (length.when, batch.when) == ("another length", "another batch") and not found.breaks
    assert length.causes == ("tensor 'ids' size mismatch at index 1. expected 16, actual 15",)
    assert batch.causes == ("tensor 'ids' size mismatch at index 0. expected 1, actual 2",)
    assert length.function.endswith("Attention.forward") and length.source == line_with("def forward(self, ids")
    assert len(found.graphs) == 1


def test_symbolic_lengths_are_not_compiled_anew() -> None:
    found = examine(Loaded(Attention(), None, "x"), 16, dynamic=True, lengths=(64,))
    assert all(seen.when != "another length" for seen in found.recompiles)
    assert found.graphs[0].savings[0].pairs_before == 2 * 64 * 64


def test_a_forward_that_fails_is_said_to_fail() -> None:
    with pytest.raises(
        ModelError, match=r"(?s)The forward of Failing fails on token ids: RuntimeError.*nothing was traced"
    ):
        examine(Loaded(Failing(), None, "x"), 16)


def test_padding_is_refused_where_none_is_taken() -> None:
    with pytest.raises(OptionError, match="Attention takes no attention_mask"):
        examine(Loaded(Attention(), None, "x"), 16, padded=True)


def test_dynamo_s_words_are_taken_apart() -> None:
    text = "Data-dependent branch\n  Explanation: Told by a value.\n  Hint: Use torch.cond.\n\n  Developer context: x"
    assert parts_of(text) == ("Data-dependent branch", "Told by a value.", "Use torch.cond.")
    assert parts_of("call_function id") == ("call_function id", "", "") and parts_of("")[0]
    said = "0/1: L['n'] == 8  # y = f(n) # a[0]  # pkg/m.py:3 in forward\nUser stack trace:\nx"
    assert guard_of(said) == ("L['n'] == 8", "pkg/m.py:3")
    assert guard_of("1/0_1: tensor 'x' size mismatch") == ("tensor 'x' size mismatch", "")
