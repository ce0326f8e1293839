"""Every candidate equals dense where it should change nothing, in its reference and in the operators that plans run.

A candidate inherits these tests by naming those settings in its own: ``DEGENERATE`` of tests/candidates/test_NAME.py.
"""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from candidates.degenerate import DIM, HEADS, KV_HEADS, LENGTH, SCALE, Degenerate, Inputs

from attnopt.feature_maps import FeatureMap
from attnopt.fingerprint import Fingerprint
from attnopt.fitted import Fitted, Header, HeadFit
from attnopt.ir import Choice, Mask, Site
from attnopt.mixed import attend
from attnopt.registry import CANDIDATES


def settings_of(name: str) -> list[Degenerate]:
    return list(getattr(importlib.import_module(f"candidates.test_{name}"), "DEGENERATE", []))


NAMES = [name for name, _ in CANDIDATES]
CASES = [pytest.param(name, at, id=f"{name}: {at.why}") for name in NAMES for at in settings_of(name)]


def dense(inputs: Inputs, own_window: int | None) -> torch.Tensor:
    q, k, v = inputs
    i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    keep = (j <= i) & (i - j < (own_window or LENGTH))
    keys, values = (x.repeat_interleave(HEADS // x.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, keys, values, keep, scale=SCALE)


@pytest.mark.parametrize("name", NAMES)
def test_every_candidate_says_where_it_changes_nothing(name: str) -> None:
    assert settings_of(name), f"tests/candidates/test_{name}.py lists no DEGENERATE settings"


@pytest.mark.parametrize(("name", "at"), CASES)
def test_its_reference_equals_dense_there(name: str, at: Degenerate) -> None:
    candidate, inputs = CANDIDATES[name], at.inputs()
    assert not candidate.problem(at.params)
    found = candidate.reference(*inputs, at.params, SCALE, at.own_window, given=at.given())
    # Maps are float32.
    torch.testing.assert_close(found, dense(inputs, at.own_window), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "at"), CASES)
def test_its_operators_equal_dense_there(name: str, at: Degenerate) -> None:
    inputs, given, fitted = at.inputs(), at.given(), Fitted(Header(Fingerprint("x", ())))
    if isinstance(given, FeatureMap):
        fitted.add_map("a", CANDIDATES[name].map_name(at.params), given, [HeadFit("random", 0.0)] * HEADS)
    elif given is not None:
        fitted.means["a"] = given
    mask = Mask(causal=True, window=at.own_window)
    site = Site("a", 0, "sdpa", HEADS, KV_HEADS, DIM, DIM, SCALE, "float32", mask)
    q, k, v = (x.float() for x in inputs)
    found = attend(q, k, v, [Choice.of(name, at.params)] * HEADS, site, fitted)
    torch.testing.assert_close(found.double(), dense(inputs, at.own_window), rtol=1e-5, atol=1e-5)
