"""Prefills over lists of blocks on the CPU against the reference in float64: the kernel, and torch's operators."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from listed import CASES, Case, arguments, outputs
from torch import Tensor

from attnopt.codegen import blocks_cpu, native
from attnopt.codegen.reference_blocks import prefill as reference

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}
COMPILED = (torch.float32, torch.bfloat16)


@pytest.fixture(params=["compiled", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "torch":
        monkeypatch.setenv("ATTNOPT_NATIVE", "0")
    elif reason := native.unusable(kernel="blocks"):
        pytest.skip(reason)
    yield request.param


def wide(given: dict[str, Any]) -> dict[str, Any]:
    return {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in given.items()}


def differences(given: dict[str, Any], right: dict[str, Any] | None = None) -> tuple[float, float, bool]:
    """Relative error of out, the largest of lse, and whether the same is skipped, infinite and left alone."""
    (out, lse), (expected, sums) = outputs(given), outputs(wide(given))
    skipped = blocks_cpu.prefill(**given, out=out, lse=lse)
    same = torch.equal(skipped, reference(**wide(right or given), out=expected, lse=sums))
    same &= torch.equal(lse.isinf(), sums.isinf()) and torch.equal(out.isnan(), expected.isnan())
    served, finite = given["heads"].long(), sums.isfinite()
    found, expected = out[:, served].double(), expected[:, served]
    away = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
    return away, float((lse[finite].double() - sums[finite]).abs().amax() if finite.any() else 0), same


def agrees(given: dict[str, Any], right: dict[str, Any] | None = None) -> None:
    away, sums, same = differences(given, right)
    assert same and away <= TOLERANCE[given["q"].dtype] and sums <= max(1e-12, 10 * TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", CASES)
def test_matches_the_reference(name: str, way: str) -> None:
    for dtype in (torch.float32, torch.bfloat16) if way == "compiled" else (torch.float32, torch.float16):
        if way == "torch" or not native.unusable(dtype, "blocks"):
            agrees(arguments(CASES[name], dtype))


def test_other_sizes_and_dtypes() -> None:
    """Torch's operators serve what the kernel does not."""
    agrees(arguments(CASES["threshold, chunk, pads, window"], torch.float64))
    agrees(arguments(Case(90, 100, dims=(24, 40), pads="holes")))
    agrees(arguments(Case(90, 100, dims=(24, 40), bounds=(-1.0, -0.3, -0.1)), torch.float32))


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_scales_that_turn_scores_round(scale: float, way: str) -> None:
    agrees(arguments(CASES["threshold"], torch.float32) | {"scale": scale, "bounds": torch.full((3,), -torch.inf)})


def test_several_goes_of_scores(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More keys than are held at once, and rows whose largest score comes late."""
    monkeypatch.setattr(blocks_cpu, "MOST_HELD", 2**12)
    for block, bounds in ((16, None), (64, None), (64, (-1.0, -0.3, -torch.inf))):
        case = Case(64, 2300, block=block, listed=0.9, batch=1, bounds=bounds, dims=(32, 32))
        given = arguments(case, torch.float32)
        given["k"][:, :, 5] *= 4
        agrees(given)


@pytest.mark.parametrize("dtype", COMPILED, ids=str)
@pytest.mark.parametrize("layout", ["heads first", "sliced", "odd", "features apart", "expanded lists"])
def test_layouts_in_and_out(layout: str, dtype: torch.dtype, way: str) -> None:
    given = arguments(CASES["pads with holes"], dtype)
    if layout == "expanded lists":
        given |= {n: given[n][:1, :1].expand(given[n].shape) for n in ("counts", "blocks")}
    elif layout == "odd":
        given |= {n: torch.cat((given[n], given[n]), -1)[..., 1:][..., : given[n].shape[3]] for n in "qkv"}
    elif layout == "sliced":
        given |= {n: torch.cat((given[n], given[n]), -1)[..., : given[n].shape[3]] for n in "qkv"}
    elif layout == "heads first":
        given |= {n: given[n].contiguous() for n in "qkv"}
    agrees(given)
    if layout == "features apart":
        out, lse = outputs(given)
        apart, sums = (x.mT.contiguous().mT for x in (out, lse))
        assert apart.stride(3) != 1 and not sums.is_contiguous()
        for results in ((out, lse), (apart, sums)):
            blocks_cpu.prefill(**given, out=results[0], lse=results[1])
        assert torch.equal(out.nan_to_num(7), apart.nan_to_num(7)) and torch.equal(lse, sums)


@pytest.mark.parametrize("dtype", COMPILED, ids=str)
def test_nothing_is_read_that_no_list_names(dtype: torch.dtype, way: str) -> None:
    given = arguments(Case(200, 200, listed=0.2, batch=1, heads=(0, 1)), dtype)
    named = {
        c for n in range(2) for r in range(13) for c in given["blocks"][0, n, r, : given["counts"][0, n, r]].tolist()
    }
    assert len(named) < 13
    right = given
    given = given | {n: given[n].clone() for n in "kv"}
    for c in set(range(13)) - named:
        for n in "kv":
            given[n][:, :, 16 * c : 16 * c + 16] = torch.nan
    agrees(given, right)


@pytest.mark.parametrize("name", ["pads with holes", "pads on the left, window", "threshold, chunk, pads, window"])
@pytest.mark.parametrize("dtype", COMPILED, ids=str)
def test_what_stands_at_padding_may_be_no_number(name: str, dtype: torch.dtype, way: str) -> None:
    """Nor in the reference."""
    right = arguments(CASES[name], dtype)
    hole = ~right["pad"][:, None, :, None]
    for value in (torch.nan, torch.inf):
        given = right | {n: right[n].masked_fill(hole, value) for n in "kv"}
        agrees(given, right)
        agrees(right, given)


def test_thresholds_of_each_entry(way: str) -> None:
    given = arguments(CASES["threshold, whole lists"], torch.float32)
    bounds = torch.stack([given["bounds"], given["bounds"].flip(0)])
    agrees(given | {"bounds": bounds})
    # It would be seen if the second had those of the first.
    assert not differences(given, given | {"bounds": bounds})[2]


@pytest.mark.parametrize("dtype", COMPILED, ids=str)
def test_values_of_what_is_skipped_are_not_read(dtype: torch.dtype) -> None:
    """By the kernel: the skip is one."""
    if reason := native.unusable(dtype, "blocks"):
        pytest.skip(reason)
    given = arguments(Case(200, 200, listed=1.0, batch=1, heads=(2,), bounds=(-0.5,)), dtype)
    given["q"][:], given["k"][:, :, :16] = 1, 0.2
    given["k"][:, :, 16:160] *= 0.01
    given["v"][:, :, 16:160] = torch.nan
    out, lse = outputs(given)
    skipped = blocks_cpu.prefill(**given, out=out, lse=lse)
    assert not out[:, 2].isnan().any() and skipped[0, 0].tolist()[:10] == list(range(10))


@pytest.mark.parametrize(
    ("name", "said"), [("heads", "heads are"), ("counts", "counts are"), ("blocks", "is listed"), ("order", "ascend")]
)
def test_lists_of_another_are_refused(name: str, said: str, way: str) -> None:
    """And nothing is written."""
    for value in (-1, 10**6) if name != "order" else (0,):
        given = arguments(CASES["all listed"], torch.float32)
        if name == "order":
            given["blocks"] = given["blocks"].clone()
            given["blocks"][1, 2, 5, 3] = 1
        else:
            given[name] = given[name].clone()
            given[name].view(-1)[0] = value
        out, lse = outputs(given)
        with pytest.raises(ValueError, match=said):
            blocks_cpu.prefill(**given, out=out, lse=lse)
        assert out.isnan().all() and lse.isnan().all()


def test_dtypes_that_differ_are_refused() -> None:
    if reason := native.unusable(kernel="blocks"):
        pytest.skip(reason)
    given = arguments(CASES["square"], torch.float32)
    with pytest.raises(ValueError, match="expected one dtype"):
        blocks_cpu.prefill(**given | {"k": given["k"].double()}, out=outputs(given)[0])


@pytest.mark.parametrize("dtype", COMPILED, ids=str)
def test_a_block_more_or_less_is_out_of_tolerance(dtype: torch.dtype, way: str) -> None:
    right = arguments(Case(64, 64, heads=(0,), batch=1, listed=1.0), dtype)
    assert differences(right)[0] <= TOLERANCE[dtype]
    fewer = right | {"counts": right["counts"].clone()}
    fewer["counts"][0, 0, 3] -= 1
    other = {n: x.clone() for n, x in fewer.items() if n in ("counts", "blocks")}
    # The first three of one list, and the last three.
    other["blocks"][0, 0, 3, :3] = torch.tensor([1, 2, 3])
    assert differences(fewer, right)[0] > 5 * TOLERANCE[dtype]
    assert differences(right | other, fewer)[0] > 5 * TOLERANCE[dtype]


def test_two_threads_change_nothing() -> None:
    if reason := native.unusable(kernel="blocks"):
        pytest.skip(reason)
    given, before = arguments(CASES["threshold, blocks of 64"], torch.float32), torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            out, lse = outputs(given)
            found.append((blocks_cpu.prefill(**given, out=out, lse=lse), out.nan_to_num(7), lse))
        finally:
            torch.set_num_threads(before)
    assert all(map(torch.equal, *found))
