"""The Triton target of a step that selects tokens: torch's operators, of which none waits for the device."""

from __future__ import annotations

import pytest
import torch
from selecting_tokens import RULES, decode, inputs

from attnopt.codegen import reference_token_step
from attnopt.codegen.emit import load
from attnopt.codegen.spec import TokenStep


def test_the_emitted_file_steps_as_the_reference() -> None:
    module = load(TokenStep("triton", "float32", 8, 2, 64, 32))
    q, k, v = inputs(8, 2, 30, (64, 32), torch.float32)
    found = decode(module.step, q, k, v, RULES["of all kinds"], 20)[0]
    expected = decode(reference_token_step.step, *(x.double() for x in (q, k, v)), RULES["of all kinds"], 20)[0]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6, equal_nan=True)


def test_a_step_that_does_not_ask_whether_to_select(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where asking would wait: selected in every step, and put back where it is not due."""
    rules = RULES["of all kinds"]
    q, k, v = inputs(8, 2, 28, (64, 32), torch.float64)
    expected, wanted = decode(reference_token_step.step, q, k, v, rules, 20)
    monkeypatch.setattr(reference_token_step, "may_ask", lambda device: False)
    found, held = decode(reference_token_step.step, q, k, v, rules, 20)
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert all(torch.equal(held[name], wanted[name]) for name in ("picked", "asked", "age"))
