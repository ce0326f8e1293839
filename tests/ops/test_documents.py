"""`attnopt::document_attention` as an operator: its schema, fakes and gradient, with sizes known only at run time."""

from __future__ import annotations

import pytest
import torch

from attnopt.ops import document_attention


@pytest.mark.parametrize("rule", [(True, 0), (True, 4), (False, 0)], ids=["causal", "window", "both ways"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_operator_is_what_it_says(rule, padded):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 11, 4, 8), (2, 11, 2, 8), (2, 11, 2, 6))
    q, k, v = (torch.randn(s, generator=generator).transpose(1, 2).requires_grad_() for s in shapes)
    ids = torch.randint(0, 3, (1, 2, 11), generator=generator)
    pad = torch.rand(2, 11, generator=generator) > 0.3 if padded else None
    torch.library.opcheck(document_attention, (q, k, v, ids, pad, 0.3, *rule))


def test_the_reference_stands_in_where_it_is_asked_for(monkeypatch):
    q, k, v = (torch.randn(1, 2, 9, 4, generator=torch.Generator().manual_seed(n)) for n in range(3))
    ids = torch.tensor([0, 0, 1, 1, 1, 0, 0, 2, 2])[None, None]
    found = document_attention(q, k, v, ids, None, 0.5, True, 0)[0]
    monkeypatch.setenv("ATTNOPT_TARGET", "reference")
    other = document_attention(q, k, v, ids, None, 0.5, True, 0)[0]
    torch.testing.assert_close(found, other)
    assert other.stride() == found.stride()
