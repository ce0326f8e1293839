"""Linear far parts in Triton, run by its interpreter in one child process, against the reference in float64: prefill,
the state it leaves, its gradients and decoding. What else there is to ask of the last two stands in files of their own.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import linears
import pytest
import torch
from emitting import check_clean, check_golden
from interpreting import interpreted_rows

from attnopt.codegen import emit, linear_tables, reference_linear, self_check_linear
from attnopt.codegen.self_check import error
from attnopt.codegen.spec import LinearBackward, LinearDecode, LinearPrefill
from attnopt.codegen.triton_linear_prefill import source
from attnopt.registry import TARGETS

# Relative Frobenius norms against float64, of results and, twice as much, of gradients. lse is float32 always.
TOLERANCE = {"float32": 2e-6, "float16": 5e-4, "bfloat16": 4e-3}
TOLERANCE_LSE = 1e-6


class Case(NamedTuple):
    length: int
    kind: str = "exp"
    dtype: str = "float32"
    padding: str = "none"
    kv_heads: int = 4
    dims: tuple[int, int] = (16, 16)
    batch: int = 2
    served: tuple[int, ...] = linears.SERVED
    gradients: bool = True


CASES = {
    "one token": Case(1, batch=1),
    "length 130, odd dims": Case(130, kv_heads=1, dims=(24, 40), batch=1, served=(0, 2, 7)),
    "taylor": Case(97, "taylor", padding="left", served=(2, 3)),
    "float16": Case(97, dtype="float16", batch=1, served=(1, 5), gradients=False),
    "bfloat16": Case(130, dtype="bfloat16", batch=1, served=(2, 3)),
    "taylor, bfloat16": Case(97, "taylor", "bfloat16", served=(5,), batch=1, gradients=False),
    "every head alone, holes": Case(65, padding="holes", kv_heads=8, served=(0, 3, 6), gradients=False),
    "all of one padded": Case(40, padding="all of one", served=(2,)),
    "nothing far": Case(70, served=(4, 7), batch=1),
    "empty": Case(0),
    "empty batch": Case(9, batch=0),
    "no head": Case(9, served=()),
}


def spec_of(family: type[LinearPrefill], case: Case, rank: int) -> LinearPrefill:
    sizes = linears.HEADS, case.kv_heads, *case.dims, len(case.served)
    return family("triton", case.dtype, *sizes, case.kind, rank, case.padding != "none")


class Recorded:
    """In the place of a kernel: what it is launched with is noted."""

    def __init__(self, name: str, kernel: Any, seen: set[str]) -> None:
        self.name, self.kernel, self.seen = name, kernel, seen

    def __getitem__(self, grid: tuple[int]) -> Any:
        def call(*args: Any, **options: Any) -> None:
            self.seen.add(self.name)
            self.seen.update(str(a.dtype) for a in args if isinstance(a, torch.Tensor))
            self.kernel[grid](*args, **options)

        return call


KERNELS = (
    "key_states",
    "add_up",
    "linear_prefill",
    "row_sums",
    "linear_dq",
    "query_states",
    "linear_dkv",
    "linear_decode",
)


def loaded(spec: Any, seen: set[str]) -> Any:
    """The emitted module, whose kernels note the dtypes of what they are launched with and their own names."""
    module = emit.load(spec)
    for name in KERNELS:
        kernel = getattr(module, name, None)
        if kernel is not None:
            setattr(module, name, Recorded(name, getattr(kernel, "kernel", kernel), seen))
    return module


def noted(seen: set[str]) -> dict[str, list[str]]:
    return {"seen": sorted(x for x in seen if x.startswith("torch.")), "run": sorted(seen & set(KERNELS))}


def inputs(case: Case) -> list[torch.Tensor]:
    """q, k, v."""
    return linears.inputs(
        case.length, getattr(torch, case.dtype), case.batch, case.kv_heads, case.dims[0], case.dims[1]
    )


def run(case: Case) -> dict[str, Any]:
    """In the interpreter: errors of a case, and those of what is wrong by one key."""
    seen: set[str] = set()
    q, k, v = inputs(case)
    maps, pad = linears.maps(case.kind, len(case.served), case.dims[0]), linears.padding(case.padding, case.length)
    heads, sinks, windows = linears.tables(case.served)
    module = loaded(spec_of(LinearPrefill, case, maps.rank), seen)
    wide = [x.double() for x in (q, k, v)]
    expected, sums = reference_linear.prefill(*wide, heads, sinks, windows, maps, pad)
    out, lse = module.prefill(q, k, v, heads, sinks, windows, maps, pad)
    state = module.state(k, v, heads, linears.HEADS, sinks, windows, maps, pad)
    # In a case of several segments the windows differ, and a sink ends inside a block.
    off = [reference_linear.prefill(*wide, heads, *x, maps, pad) for x in ((sinks + 1, windows), (sinks, windows + 1))]
    found = {
        "out": error(out, expected),
        "lse": error(lse, sums),
        "state": error(state, reference_linear.state(*wide[1:], heads, linears.HEADS, sinks, windows, maps, pad)),
        "off": min(error(out, x) for x, _ in off),
        "zero where nothing is far": bool((out[sums == float("-inf")] == 0).all()),
        "layout": out.dtype == v.dtype and out.transpose(1, 2).is_contiguous() and lse.dtype == torch.float32,
    }
    if case.gradients:
        dout, dlse = torch.randn(out.shape).to(v.dtype), torch.randn(lse.shape)
        module = loaded(spec_of(LinearBackward, case, maps.rank), seen)
        given = heads, sinks, windows, maps, pad
        gradients = module.backward(dout, dlse, q, k, v, expected.to(v.dtype), sums.float(), *given)
        exact = dout.double(), dlse.double(), *wide, expected, sums
        found["gradients"] = error(gradients, reference_linear.backward(*exact, *given))
        found["gradients off"] = error(
            gradients, reference_linear.backward(*exact, heads, sinks, windows + 1, maps, pad)
        )
        found["layout"] &= all(x.transpose(1, 2).is_contiguous() and x.dtype == v.dtype for x in gradients)
    return found | noted(seen)


def decode(kind: str, dtype: str) -> dict[str, Any]:
    """In the interpreter: one step of three sequences, of which some heads lose no key."""
    seen: set[str] = set()
    heads, maps = linears.tables()[0], linears.maps(kind, 5, 24)
    q = linears.inputs(1, getattr(torch, dtype), batch=3, dim=24)[0]
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(3, 9, width, generator=generator).to(q.dtype) for width in (24, 40))
    slots = torch.arange(15, dtype=torch.int32).view(3, 5) % 10 - 1
    # A slot that nobody has written.
    k[:, 8], v[:, 8] = float("nan"), float("nan")
    slots[slots == 8] = -1
    state = torch.rand(3, 5, maps.width, 41, generator=generator)
    state[1, 2] = 0.0
    held, wide = state.double(), [x.double() for x in (q, k, v)]
    off = held.clone()
    expected = reference_linear.decode(*wide, slots, heads, held, maps)
    wrong = reference_linear.decode(*wide, slots.flip(1), heads, off, maps)
    module = loaded(LinearDecode("triton", dtype, 8, 1, 24, 40, 5, kind, maps.rank), seen)
    out, lse = module.decode(q, k, v, slots, heads, state, maps)
    return {
        "out": error(out, expected[0]),
        "lse": error(lse, expected[1]),
        "state": error(state, held),
        "off": min(error(out, wrong[0]), error(state, off)),
        "layout": out.dtype == v.dtype and lse.dtype == torch.float32,
        **noted(seen),
    }


STEPS = {f"decode {kind}, {dtype}": (kind, dtype) for kind, dtype in (("exp", "bfloat16"), ("taylor", "float32"))}
OWN_CHECKS = {
    "own check": LinearPrefill("triton", "bfloat16", 2, 1, 16, 16, 1, "exp", 16, False),
    "own check of gradients": LinearBackward("triton", "float32", 1, 1, 16, 16, 1, "exp", 16, True),
    "own check of a step": LinearDecode("triton", "bfloat16", 4, 1, 16, 16, 2, "exp", 16),
}


def main() -> None:
    torch.set_num_threads(1)
    # Several segments of short inputs; a result that nobody wrote would be NaN.
    linear_tables.LEAST = 48
    empty = torch.empty
    torch.empty = lambda *a, **o: (  # type: ignore[assignment]
        x.fill_(float("nan")) if (x := empty(*a, **o)).is_floating_point() else x
    )
    for name, case in CASES.items():
        print(json.dumps({"case": name, **run(case)}), flush=True)
    for name, step in STEPS.items():
        print(json.dumps({"case": name, **decode(*step)}), flush=True)
    for name, spec in OWN_CHECKS.items():
        module = emit.load(spec)
        given = [getattr(module, f) for f in ("prefill", "backward", "decode", "state") if hasattr(module, f)]
        try:
            self_check_linear.check(spec, *given)
        except SystemExit as done:
            print(json.dumps({"case": name, "code": done.code}), flush=True)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return interpreted_rows(__file__, tmp_path_factory.mktemp("kernels"))


def dtype_of(name: str) -> str:
    return CASES[name].dtype if name in CASES else STEPS[name][1]


@pytest.mark.parametrize("name", [*CASES, *STEPS])
def test_agrees_with_the_reference(name: str, interpreted: dict[str, dict[str, Any]]) -> None:
    row, tolerance = interpreted[name], TOLERANCE[dtype_of(name)]
    assert row["out"] <= tolerance and row["lse"] <= TOLERANCE_LSE and row["state"] <= TOLERANCE["float32"]
    assert row.get("gradients", 0.0) <= 2 * tolerance
    assert row.get("zero where nothing is far", True) and row["layout"]


@pytest.mark.parametrize("name", ["length 130, odd dims", "taylor", "bfloat16", *STEPS])
def test_the_tolerance_rejects_one_key_more_or_less(name: str, interpreted: dict[str, dict[str, Any]]) -> None:
    row, tolerance = interpreted[name], TOLERANCE[dtype_of(name)]
    assert row["off"] > 3 * tolerance
    assert row.get("gradients off", float("inf")) > 6 * tolerance


def test_no_bfloat16_reaches_the_interpreter(interpreted: dict[str, dict[str, Any]]) -> None:
    assert "torch.float16" in interpreted["float16"]["seen"]
    for name in ("bfloat16", "taylor, bfloat16", "decode exp, bfloat16"):
        assert interpreted[name]["seen"] == ["torch.float32", "torch.int32"]


def test_several_segments_were_run(interpreted: dict[str, dict[str, Any]]) -> None:
    assert "add_up" in interpreted["length 130, odd dims"]["run"] and "add_up" in interpreted["bfloat16"]["run"]
    assert "add_up" not in interpreted["all of one padded"]["run"]


@pytest.mark.parametrize("name", OWN_CHECKS)
def test_an_emitted_file_checks_itself(name: str, interpreted: dict[str, dict[str, Any]]) -> None:
    assert interpreted[name]["code"] == 0


SPEC = LinearPrefill("triton", "bfloat16", 32, 8, 128, 128, 12, "exp", 64, False)
ODD = [
    SPEC,
    LinearPrefill("triton", "float32", 6, 2, 96, 80, 3, "taylor", 7, True),
    LinearPrefill("triton", "float16", 8, 8, 64, 64, 8, "exp", 24, True),
]


def test_golden_text() -> None:
    check_golden("linear_prefill_bfloat16.py", source(SPEC))


def test_emitted_text_is_clean(tmp_path: Path) -> None:
    check_clean(tmp_path, map(source, ODD))


@pytest.mark.parametrize(
    ("said", "changes"),
    {
        "no float64": {"dtype": "float64"},
        "exceed 256": {"head_dim": 320},
        "plan with maps of fewer features": {"kind": "taylor", "rank": 16},
        "no feature maps of kind 'relu'": {"kind": "relu"},
    }.items(),
)
def test_unsupported_specs_are_refused(said: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=said):
        source(replace(SPEC, **changes))


def test_wrong_arguments_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    assert TARGETS["triton linear_prefill"].emit(SPEC) == source(SPEC)
    module = emit.load(LinearPrefill("triton", "float32", 8, 4, 16, 24, 2, "exp", 24, False))
    q, k, v = linears.inputs(9)
    tables, maps = linears.tables((2, 3)), linears.maps("exp", 2, 16)
    with pytest.raises(ValueError, match="needs a GPU"):
        module.prefill(q, k, v, *tables, maps)
    monkeypatch.setattr(module, "INTERPRETED", True)
    with pytest.raises(ValueError, match="have shapes"):
        module.prefill(q, k[:, :2], v, *tables, maps)
    with pytest.raises(ValueError, match="wants float32"):
        module.prefill(q.half(), k.half(), v.half(), *tables, maps)
    with pytest.raises(ValueError, match="pass no pad"):
        module.prefill(q, k, v, *tables, maps, torch.ones(2, 9, dtype=torch.bool))
    with pytest.raises(ValueError, match="wants 2 maps exp/24"):
        module.prefill(q, k, v, *tables, linears.maps("exp", 3, 16))
    with pytest.raises(ValueError, match="3 heads are served"):
        module.prefill(q, k, v, *linears.tables((1, 2, 3)), maps)
    with pytest.raises(ValueError, match="in ascending order"):
        module.prefill(q, k, v, tables[0].flip(0), *tables[1:], maps)


@pytest.mark.parametrize(
    ("keys", "programs", "found"),
    [(16384, 32, (9, 1856)), (16384, 264, (1, 16384)), (600, 1, (2, 320)), (0, 4, (1, 64))],
)
def test_keys_are_cut_where_heads_are_few(keys: int, programs: int, found: tuple[int, int]) -> None:
    assert linear_tables.segments(keys, programs, 64, torch.device("cpu")) == found
    count, size = found
    assert size % 64 == 0 and (count - 1) * size < max(1, keys) <= count * size


if __name__ == "__main__":
    main()
