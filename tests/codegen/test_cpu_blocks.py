"""The CPU target of prefills over lists of blocks: what it emits, and that an emitted file checks itself."""

from __future__ import annotations

import runpy
from dataclasses import replace
from typing import Any

import pytest
import torch
from listed import CASES, arguments, outputs
from torch import Tensor

from attnopt.codegen import emit, self_check, self_check_blocks
from attnopt.codegen.blocks_cpu import prefill
from attnopt.codegen.cpu_blocks import Cpu
from attnopt.codegen.reference_blocks import prefill as reference
from attnopt.codegen.spec import BlockPrefill

SPEC = BlockPrefill("cpu", "float32", 4, 2, 64, 32, 16, True)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "SECONDS", 0.0)
    monkeypatch.setitem(self_check_blocks.TIMED, "cpu", 256)


def test_emitted_module() -> None:
    given = arguments(CASES["pads with holes"], torch.float32)
    assert given.pop("block") == 16
    (out, lse), (expected, sums) = outputs(given), outputs(given)
    skipped = emit.load(SPEC).prefill(**given, out=out, lse=lse)
    assert torch.equal(skipped, prefill(**given, block=16, out=expected, lse=sums))
    assert torch.equal(out.nan_to_num(7), expected.nan_to_num(7)) and torch.equal(lse, sums)
    for wrong in ({"q": given["q"].bfloat16()}, {"k": given["k"][:, :1]}):
        with pytest.raises(ValueError, match="emitted for"):
            emit.load(SPEC).prefill(**given | wrong, out=out)
    with pytest.raises(ValueError, match="padding"):
        emit.load(replace(SPEC, padded=False)).prefill(**given, out=out)
    assert max(map(len, Cpu.emit(SPEC).splitlines())) <= 120


def test_blocks_and_padding_are_of_the_key() -> None:
    assert len({replace(SPEC, block=b, padded=p).key() for b in (16, 64) for p in (False, True)}) == 4
    assert str(SPEC) == "block prefill for cpu: 4/2 heads, dim 64/32, float32, blocks of 16, padded"


@pytest.mark.parametrize(
    ("target", "dtype", "block", "padded"),
    [("cpu", "float32", 64, True), ("cpu", "bfloat16", 16, False), ("cpu", "float16", 32, True),
     ("reference", "bfloat16", 16, True)],
)  # fmt: skip
def test_a_right_file_agrees_and_is_timed(
    target: str, dtype: str, block: int, padded: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run as a script, as `python FILE` does."""
    spec = BlockPrefill(target, dtype, 4, 2, 64, 32, block, padded)
    emit.load(spec)
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(emit.kernel_folder() / f"{spec.key()}.py"), run_name="__main__")
    told = capsys.readouterr().out
    assert done.value.code == 0
    assert told.count("  agrees  ") == 10 and "WRONG" not in told
    assert ("× fewer blocks" in told and "dense SDPA" in told) == (target == "cpu")


def last_block_missing(*arguments: Any) -> Tensor:
    q, k, v, heads, counts, *rest, out, lse = arguments
    return reference(q, k, v, heads, (counts - 1).clamp(min=0), *rest, 16, out, lse)


def ascending(*arguments: Any) -> Tensor:
    """The order of the contract, from a list turned round: the last first, and then from the left."""
    q, k, v, heads, counts, blocks, *rest, out, lse = arguments
    turned = blocks.clone()
    for b in range(counts.shape[0]):
        for n in range(counts.shape[1]):
            for r, size in enumerate(counts[b, n].tolist()):
                turned[b, n, r, :size] = blocks[b, n, r, :size].flip(0)
    return reference(q, k, v, heads, counts, turned, *rest, 16, out, lse)


def nothing_counted(*arguments: Any) -> Tensor:
    *rest, out, lse = arguments
    return reference(*rest, 16, out, lse) * 0


@pytest.mark.parametrize(
    ("wrong", "named"),
    [(last_block_missing, "1 of 1 tokens"), (ascending, "65 of 65 tokens, threshold"),
     (nothing_counted, "65 of 65 tokens, threshold")],
)  # fmt: skip
def test_a_wrong_file_is_named_and_not_timed(wrong: Any, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        self_check_blocks.check(SPEC, wrong)
    told = capsys.readouterr()
    assert done.value.code == 1 and f"out, {named}" in told.err and "timed" not in told.out


@pytest.mark.parametrize("heads", [1, 2])
def test_few_heads(heads: int, capsys: pytest.CaptureFixture[str]) -> None:
    """The check serves all but one, and bounds every other."""
    with pytest.raises(SystemExit) as done:
        self_check_blocks.check(
            replace(SPEC, heads=heads, kv_heads=1), emit.load(replace(SPEC, heads=heads, kv_heads=1)).prefill
        )
    assert done.value.code == 0
