"""The reference of masked attention against a plain soft-max, written down for each form apart from the algebra."""

from __future__ import annotations

import math

import pytest
import torch
from forms import CASES, B, H, doubled, error, inputs_of

from attnopt.codegen import emit
from attnopt.codegen.spec import MaskedPrefill
from attnopt.errors import AttnoptError
from attnopt.masks.kernel_form import form_from

N = 37


def spec_of(name: str) -> MaskedPrefill:
    return MaskedPrefill("reference", "float64", 4, 2, 16, 16, CASES[name].form.text)


def by_hand(name: str, tensors: list, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(keep, scores) of a form, spelled out."""
    i, j = torch.arange(scores.shape[2])[:, None], torch.arange(scores.shape[3])
    t = tensors[0] if tensors else None
    causal = j <= i
    keeps = {
        "all, soft-capped": lambda: torch.ones_like(causal),
        "causal behind a cache, sink 0": lambda: j <= i + 30,
        "window and padding": lambda: causal & (i - j < 30) & t[:, None, None],
        "causal and padding on the left, soft-capped": lambda: causal & t[:, None, None],
        "first keys and a window, sink of a head": lambda: causal & ((j < 4) | (i - j < 20)),
        "both sides": lambda: (i - j).abs() <= 20,
        "chunked, sink of a row": lambda: causal & (i // 24 == j // 24),
        "packed documents": lambda: causal & (t[:, None, :, None] == t[:, None, None]),
        "documents in any order, both sides": lambda: t[:, None, :, None] == t[:, None, None],
        "prefix": lambda: causal | (j < t[:, None, None, None]),
        "the next entry's start": lambda: causal & (j < t[1:, None, None, None]),
        "rows and keys padded": lambda: t[:, None, None] & t[:, None, :, None],
        "table of distances": lambda: causal & (i - j < 40),
        "flags over pairs": lambda: ~t,
        "table read from its end": lambda: torch.ones_like(causal),
        "one row of flags": lambda: t[:, None, 2:3],
    }
    added = {
        "alibi": lambda: scores + t * (j - i),
        "table of distances": lambda: scores + t[:, (i - j + 40).clamp(0, 89)],
        "table read from its end": lambda: scores + t[:, i - j],
        "data over pairs": lambda: scores + 2 * t,
        "all, soft-capped": lambda: 3 * torch.tanh(scores / 3),
        "causal and padding on the left, soft-capped": lambda: 3 * torch.tanh(scores / 3),
        "causal, soft-capped": lambda: 3 * torch.tanh(scores / 3),
    }
    keep = keeps.get(name, lambda: causal)()
    return keep.expand(scores.shape), added.get(name, lambda: scores)()


@pytest.mark.parametrize("name", [n for n in CASES if CASES[n].dtype == "float32"])
def test_agrees_with_a_plain_softmax(name: str) -> None:
    torch.manual_seed(0)
    inputs = doubled(inputs_of(CASES[name], N))
    q, k, v, tensors, _, sink, scale = inputs
    out = emit.load(spec_of(name)).attend(*inputs)
    scores = q @ k.repeat_interleave(2, 1).mT * scale
    keep, scores = by_hand(name, tensors, scores)
    scores = scores.masked_fill(~keep, -math.inf)
    if CASES[name].form.sink:
        held = {"0": torch.zeros(1), "h": sink[:, None] if sink is not None else None, "bhi": sink}
        column = held[CASES[name].form.sink].expand(B, H, N)[..., None]
        scores = torch.cat([scores, column], -1)
    weights = scores.softmax(-1)[..., : keep.shape[-1]]
    expected = (weights @ v.repeat_interleave(2, 1)).masked_fill(~keep.any(-1, keepdim=True), 0.0)
    assert error(out, expected) < 1e-6
    near = emit.load(MaskedPrefill("reference", "float64", 4, 2, 16, 16, CASES[name].near.text)).attend(*inputs)
    assert error(near, expected) > 1e-4


@pytest.mark.parametrize("name", CASES)
def test_a_form_survives_as_text(name: str) -> None:
    form = CASES[name].form
    assert form_from(form.text) == form
    assert form_from(form.text).text == form.text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ('{"keep": [], "added": [], "softcap": 0}', "'sink' is missing"),
        ('{"keep": [], "added": [], "softcap": 0, "sink": "x"}', "no sink"),
        ('{"keep": [[["ge", [0, [1, "k"]]]]], "added": [], "softcap": 0, "sink": ""}', "no position"),
        ('{"keep": [[["ge", [0, [1.5, "i"]]]]], "added": [], "softcap": 0, "sink": ""}', "whole number"),
        ('{"keep": [[["maybe", [0]]]], "added": [], "softcap": 0, "sink": ""}', "a literal is needed"),
        ('{"keep": [[["ge", [0, [1, ["div", 0, [0]]]]]]], "added": [], "softcap": 0, "sink": ""}', "at least 1"),
    ],
)
def test_a_text_that_is_no_form_is_named(text: str, said: str) -> None:
    with pytest.raises(AttnoptError, match=said):
        form_from(text)
