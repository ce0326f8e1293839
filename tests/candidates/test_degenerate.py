"""Every candidate equals dense where it should change nothing. A candidate inherits this test by naming those settings
in its own: ``DEGENERATE`` of tests/candidates/test_NAME.py."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from candidates.degenerate import HEADS, LENGTH, SCALE, Degenerate

from attnopt.registry import CANDIDATES


def settings_of(name: str) -> list[Degenerate]:
    return list(getattr(importlib.import_module(f"candidates.test_{name}"), "DEGENERATE", []))


NAMES = [name for name, _ in CANDIDATES]


@pytest.mark.parametrize("name", NAMES)
def test_every_candidate_says_where_it_changes_nothing(name: str) -> None:
    assert settings_of(name), f"tests/candidates/test_{name}.py lists no DEGENERATE settings"


@pytest.mark.parametrize(
    ("name", "at"), [pytest.param(n, d, id=f"{n}: {d.why}") for n in NAMES for d in settings_of(n)]
)
def test_it_equals_dense_there(name: str, at: Degenerate) -> None:
    q, k, v = at.inputs()
    candidate = CANDIDATES[name]
    assert not candidate.problem(at.params)
    found = candidate.reference(q, k, v, at.params, SCALE, at.own_window, given=at.given())
    i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    keep = (j <= i) & (i - j < (at.own_window or LENGTH))
    keys, values = (x.repeat_interleave(HEADS // x.shape[1], 1) for x in (k, v))
    expected = F.scaled_dot_product_attention(q, keys, values, keep, scale=SCALE)
    # Maps are float32.
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
