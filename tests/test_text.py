"""Text is read, checked, and cut into three splits that do not overlap."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch

from attnopt import text
from attnopt.errors import TextError


class Letters:
    """A tokenizer of one token per character."""

    def encode(self, given: str, add_special_tokens: bool = False) -> list[int]:
        return [ord(c) for c in given]


def test_splits_are_disjoint_and_complete() -> None:
    ids = torch.arange(103)
    parts = [text.part(ids, which) for which in text.PARTS]
    assert torch.equal(torch.cat(parts), ids)
    assert parts[0].numel() == 51


def test_files_and_standard_input_are_one_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("abcd", encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.StringIO("efgh"))
    ids = text.stream([str(tmp_path / "a"), "-"], Letters(), "calibrate")
    assert "".join(map(chr, ids.tolist())) == "abcd"


def test_without_sources_the_library_is_read_only_as_far_as_needed() -> None:
    ids = text.stream([], Letters(), "verify", most=100)
    assert ids.numel() > 400


def test_sequences_are_spread_over_the_stream() -> None:
    found = text.sequences(torch.arange(100), 10, 3, "verify")
    assert found[:, 0].tolist() == [0, 30, 60] and found.shape == (3, 10)
    assert text.sequences(torch.arange(25), 10, 8, "verify").shape == (2, 10)
    with pytest.raises(TextError, match="9 tokens for the final split"):
        text.sequences(torch.arange(9), 10, 1, "final")


def test_a_model_without_a_tokenizer_is_told() -> None:
    with pytest.raises(TextError, match="without a tokenizer"):
        text.tokens_of(["a"], None)
