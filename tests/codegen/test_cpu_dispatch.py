"""Operators of the cache on the CPU go straight to the compiled kernel where it serves, and to Python where not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attnopt import ops
from attnopt.cache import Layout
from attnopt.codegen import live_cpu, native
from attnopt.codegen.reference_cache import step as reference
from attnopt.codegen.reference_live import attend as looked
from attnopt.errors import CacheFull

LENGTH = 40
Change = Callable[[dict[str, Any]], None]


def update(dtype: torch.dtype = torch.float32, tokens: int = 3) -> dict[str, Any]:
    """Arguments of attend_update: six of at most forty tokens seen, one of the new ones padding."""
    generator = torch.Generator().manual_seed(0)
    length = max(LENGTH, tokens)
    layout = Layout.of_spans([0, 2, 0, 0], [length, 8, 16, 5], 2, length)
    table, spans = layout.tables()

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    valid = torch.ones(2, tokens, dtype=torch.bool)
    valid[1, -1] = False
    return dict(
        q=normal(2, tokens, 4, 32).transpose(1, 2), k=normal(2, tokens, 2, 32).transpose(1, 2),
        v=normal(2, 2, tokens, 64), keys=normal(2, layout.slots, 32), values=normal(2, layout.slots, 64),
        n=torch.tensor([6, 4], dtype=torch.int32), valid=valid, table=table, spans=spans, scale=0.3, fresh=False,
    )  # fmt: skip


def changed(**of: object) -> Change:
    return lambda given: given.update(of)


def turned(*names: str) -> Change:
    """As views whose features are not one after the other."""
    return lambda given: given.update({x: given[x].mT.contiguous().mT for x in names})


STRAIGHT = {
    "as projections give them": changed(),
    "all valid": changed(valid=None),
    "valid as a view": lambda given: given.update(valid=torch.ones(2, 9, dtype=torch.bool)[:, 4:7]),
}
ROUND = {
    "features apart": turned("q"),
    "slots apart": turned("values"),
    "scale": lambda given: given.update(update(tokens=1), scale=-0.2),
    "a long prompt": lambda given: given.update(update(tokens=1024), n=torch.zeros(2, dtype=torch.int32), fresh=True),
    "valid apart": lambda given: given.update(valid=torch.ones(3, 2, dtype=torch.bool).t()),
    "float64": lambda given: given.update(update(torch.float64)),
    "odd sizes": lambda given: given.update({x: given[x][..., :31] for x in ("q", "k", "keys")}),
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What went through Python."""
    if reason := native.unusable():
        pytest.skip(reason)
    found: list[str] = []

    def telling(name: str, call: Callable[..., object]) -> Callable[..., object]:
        def told(*args: object) -> object:
            found.append(name)
            return call(*args)

        return told

    monkeypatch.setattr(ops.cache, "_kernel", telling("attend_update", ops.cache._kernel))
    monkeypatch.setattr(live_cpu, "attend", telling("live_attention", live_cpu.attend))
    return found


@pytest.mark.parametrize("name", [*STRAIGHT, *ROUND])
def test_attend_update(name: str, asked: list[str]) -> None:
    given = update()
    (STRAIGHT | ROUND)[name](given)
    wide = {x: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for x, t in given.items()}
    wide["n"] = given["n"].clone()
    found = torch.ops.attnopt.attend_update(*given.values())
    assert asked == ["attend_update"] * (name in ROUND)
    expected = reference(**wide)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert found.transpose(1, 2).is_contiguous()
    for x in ("keys", "values", "n"):
        torch.testing.assert_close(given[x].double(), wide[x].double(), rtol=0, atol=0)


def test_mistakes_are_said_by_python(asked: list[str]) -> None:
    for change, error, said in (
        (
            changed(n=torch.tensor([6, 46], dtype=torch.int32)),
            CacheFull,
            "holds 48 tokens of a row, and this would be 49",
        ),
        (changed(n=torch.tensor([6, -1], dtype=torch.int32)), ValueError, "n is negative"),
        (changed(n=torch.tensor([6, 4])), ValueError, "int64"),
        (changed(v=torch.zeros(2, 2, 3, 64).bfloat16()), ValueError, "expected one dtype"),
        (changed(k=torch.zeros(2, 2, 4, 32)), ValueError, "expected q"),
        (changed(table=torch.zeros(2, 4, dtype=torch.int32)), ValueError, "slots"),
        (changed(q=torch.zeros(2, 4, 3, 32, requires_grad=True)), RuntimeError, "no gradient"),
    ):
        given = update() | dict(valid=None)
        change(given)
        before = [given[x].clone() for x in ("keys", "values", "n")]
        with pytest.raises(error, match=said):
            torch.ops.attnopt.attend_update(*given.values())
        assert all(torch.equal(given[x], old) for x, old in zip(("keys", "values", "n"), before, strict=True))


def test_inference_tensors_go_round(asked: list[str]) -> None:
    with torch.inference_mode():
        given = update()
        torch.ops.attnopt.attend_update(*given.values())
    assert not asked
    for names in (["keys"], ["values"], ["n"]):
        one = update() | {x: given[x] for x in names}
        with pytest.raises(RuntimeError, match="Inplace update to inference tensor outside InferenceMode"):
            torch.ops.attnopt.attend_update(*one.values())
    assert len(asked) == 3
    assert torch.equal(given["n"], torch.tensor([9, 6], dtype=torch.int32))


@pytest.mark.parametrize(("variable", "value"), [("ATTNOPT_NATIVE", "0"), ("ATTNOPT_TARGET", "reference")])
def test_settings_hold(variable: str, value: str, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, value)
    torch.ops.attnopt.attend_update(*update().values())
    assert asked == ["attend_update"]
    monkeypatch.delenv(variable)
    torch.ops.attnopt.attend_update(*update().values())
    assert asked == ["attend_update"]


def test_live_attention(asked: list[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, t, 32, generator=generator) for h, t in ((4, 3), (2, 50), (2, 50)))
    keep = (torch.arange(50) < 20 + torch.arange(3)[:, None])[None, None].repeat(2, 1, 1, 1)
    keep[1, ..., :7] = False
    least = torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)
    nothing = keep & torch.tensor([True, False])[:, None, None, None]
    hidden = torch.zeros(keep.shape).masked_fill(~nothing, -torch.inf)
    for mask, is_round in (
        (keep, False), (None, False), (least, False), (keep[:1], False), (keep[:, :, :1], False), (nothing, False),
        (hidden, True), (least.double(), True),
    ):  # fmt: skip
        asked.clear()
        found = torch.ops.attnopt.live_attention(q, k, v, mask, 0.2)
        assert asked == ["live_attention"] * is_round
        shown = mask if mask is None or mask.dtype == torch.bool else mask.masked_fill(mask < -1e30, -torch.inf)
        expected = looked(q.double(), k.double(), v.double(), shown, 0.2)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="the mask has 49 columns"):
        torch.ops.attnopt.live_attention(q, k, v, keep[..., 1:], 0.2)
