"""`attnopt::masked_attention` as an operator: a text and tensors are all it needs."""

from __future__ import annotations

import pytest
import torch
from forms import CASES, error, inputs_of

from attnopt import ops
from attnopt.codegen.reference_masked import attend
from attnopt.errors import AttnoptError

OPERATOR = torch.ops.attnopt.masked_attention.default


@pytest.fixture(autouse=True)
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNOPT_TARGET", "reference")


def arguments(name: str, length: int = 11) -> tuple:
    q, k, v, tensors, sizes, sink, scale = inputs_of(CASES[name], length)
    return q, k, v, tensors, sizes, sink, CASES[name].form.text, scale


@pytest.mark.parametrize("name", ["causal behind a cache, sink 0", "window and padding", "chunked, sink of a row"])
def test_the_fake_says_what_comes(name: str) -> None:
    given = arguments(name)
    torch.library.opcheck(OPERATOR, given, test_utils=("test_schema", "test_faketensor"))
    out = OPERATOR(*given)
    assert out.shape == given[0].shape and out.transpose(1, 2).is_contiguous() and out.dtype == given[0].dtype


def test_it_counts_its_launches_and_keeps_nothing_of_the_inputs() -> None:
    given = arguments("window and padding")
    ops.launches.clear()
    out = OPERATOR(*given)
    ((key, count),) = ops.launches.items()
    assert key.startswith("masked_prefill_reference_h4k2d16_float32") and count == 1
    expected = attend(*(x.double() for x in given[:3]), *given[3:6], given[7], form=CASES["window and padding"].form)
    assert error(out, expected) < 1e-6
    assert all(out.data_ptr() != x.data_ptr() for x in given[:3])


def test_a_target_without_the_family_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNOPT_TARGET", "cpu")
    with pytest.raises(ValueError, match="cpu target has no masked prefill"):
        OPERATOR(*arguments("window and padding"))


def test_a_text_that_is_no_form_is_refused() -> None:
    q, k, v, tensors, sizes, sink, _, scale = arguments("window and padding")
    with pytest.raises(AttnoptError, match="not JSON"):
        OPERATOR(q, k, v, tensors, sizes, sink, "j <= i", scale)
