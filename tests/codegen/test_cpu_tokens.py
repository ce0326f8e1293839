"""The CPU's step of heads that select tokens against torch's operators, with the compiled kernel and without it."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from selecting_tokens import RULES, decode, inputs
from torch import Tensor

from attnopt.codegen import native, tokens_cpu
from attnopt.codegen.emit import load
from attnopt.codegen.reference_token_step import step as reference
from attnopt.codegen.reference_tokens import TokenRule
from attnopt.codegen.spec import TokenStep


@cache
def case(name: str) -> tuple[list[Tensor], Tensor, Tensor, dict[str, Tensor]]:
    """Inputs, which tokens count, and what is expected."""
    groups, dims = (2, (64, 32)) if len(RULES[name]) < 20 else (1, (32, 160))
    given = inputs(len(RULES[name]), groups, 42, dims, torch.float64)
    valid = torch.rand(2, 42, generator=torch.Generator().manual_seed(1)) < 0.8
    return given, valid, *decode(reference, *given, RULES[name], 30, valid)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", RULES)
def test_it_selects_what_the_reference_does(name: str, dtype: torch.dtype) -> None:
    rules, (given, valid, expected, wanted) = RULES[name], case(name)
    found, held = decode(tokens_cpu.step, *(x.to(dtype) for x in given), rules, 30, valid)
    for state in ("picked", "age", "n", "chosen"):
        assert torch.equal(held[state], wanted[state]), state
    served = [h for h, rule in enumerate(rules) if rule is not None]
    tolerance = 2e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found[:, served].double(), expected[:, served], rtol=0, atol=tolerance)
    assert found[:, [h for h in range(len(rules)) if h not in served]].isnan().all()


@pytest.mark.skipif(bool(native.unusable()), reason="no compiled kernels")
def test_the_compiled_kernel_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_cpu, "by_operators", None)
    q, k, v = inputs(4, 2, 12, (32, 32), torch.float32)
    decode(tokens_cpu.step, q, k, v, RULES["each step"], 4)
    monkeypatch.setenv("ATTNOPT_NATIVE", "0")
    with pytest.raises(TypeError):
        decode(tokens_cpu.step, q, k, v, RULES["each step"], 4)


@pytest.mark.skipif(bool(native.unusable()), reason="no compiled kernels")
def test_many_keys_of_few_scores() -> None:
    """Where nearly all scores are equal, the first are taken, however often the best are cut."""
    q, k, v = inputs(4, 2, 4, (32, 32), torch.float32)
    k, v = (x.repeat(1, 1, 700, 1) for x in (k, v))
    q = q.repeat(1, 1, 700, 1)
    rules = [TokenRule(600, every=5), TokenRule(3), TokenRule(1100, 4, 8), TokenRule(64)]
    found, held = decode(tokens_cpu.step, q, k, v, rules, 2790)
    expected, wanted = decode(reference, *(x.double() for x in (q, k, v)), rules, 2790)
    assert torch.equal(held["picked"], wanted["picked"])
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)


def test_the_emitted_file_says_what_it_was_emitted_for() -> None:
    module = load(TokenStep("cpu", "float32", 4, 2, 32, 32))
    q, k, v = inputs(4, 2, 12, (32, 32), torch.float32)
    expected = decode(tokens_cpu.step, q, k, v, RULES["each step"], 4)[0]
    assert torch.equal(decode(module.step, q, k, v, RULES["each step"], 4)[0], expected)
    with pytest.raises(ValueError, match="emitted for"):
        decode(module.step, q[:, :2], k[:, :1], v[:, :1], RULES["each step"][:2], 4)
