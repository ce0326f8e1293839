"""What holds for every candidate that selects blocks, at each setting that distilling tries: nothing waits for the
device, what always lives is visited, and no input is too short, too padded or too narrow a type for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from candidates.degenerate import KV_HEADS, SCALE, any_inputs
from candidates.selecting import padded
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from attnopt.candidates import Params
from attnopt.candidates._selected import Selected, asked_of
from attnopt.registry import CANDIDATES
from attnopt.selection import Asked, keep_of

LENGTH = 4096
KINDS = [kind for _, kind in CANDIDATES if isinstance(kind, Selected)]
SETTINGS = [
    pytest.param(kind, {**dict(choice.params), "block": 16}, id=str(choice))
    for kind in KINDS
    for choice in kind.menu(LENGTH)
]
every_setting = pytest.mark.parametrize("kind, params", SETTINGS)


def asked_by(
    kind: Selected, params: Params, q: Tensor, k: Tensor, pad: Tensor | None = None, window: int = 0
) -> Asked:  # fmt: skip
    heads = torch.arange(q.shape[1])
    table = torch.tensor([kind.settings(params)] * len(heads), dtype=torch.float64)
    fixed = [int(params[name]) for name in (*kind.fixed, "block")]
    return asked_of(kind, q, k, heads, table, SCALE, pad, window, fixed)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_few_settings_are_tried_and_each_is_accepted(kind: Selected) -> None:
    for length in (128, 1024, LENGTH):
        menu = kind.menu(length)
        assert len(menu) <= 5 and len(set(menu)) == len(menu)
        assert not any(kind.problem(dict(choice.params)) for choice in menu)


@every_setting
def test_its_shapes_are_known_beforehand_and_nothing_waits(kind: Selected, params: Params) -> None:
    """On tensors without values, which whatever depends on one cannot have."""
    with FakeTensorMode():
        q, k = torch.empty(2, 4, 70, 8), torch.empty(2, KV_HEADS, 100, 8)
        lists = kind.select(asked_by(kind, params, q, k, torch.empty(2, 100, dtype=torch.bool), 50))
    assert lists.counts.shape == (2, 4, 5) and lists.blocks.shape == (2, 4, 5, 7)


def hard(dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """q, k, v and pad: short prompts, chunks, padding on either side and everywhere; there stands what is no number."""
    whole = any_inputs()
    right = torch.arange(45).expand(2, -1) < torch.tensor([[45], [20]])
    for queries, keys in ((45, 45), (20, 45), (1, 45), (7, 7), (1, 1)):
        q, k, v = (x[:, :, :keys].to(dtype) for x in whole)
        for pad in (None, padded()[:, :keys], right[:, :keys], torch.zeros(2, keys, dtype=torch.bool)):
            hole = torch.zeros(2, 1, keys, 1, dtype=torch.bool) if pad is None else ~pad[:, None, :, None]
            hidden = [x.masked_fill(hole, torch.nan) for x in (q, k, v)]
            yield hidden[0][:, :, keys - queries :], hidden[1], hidden[2], pad


@every_setting
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_prompt_is_too_short_or_too_padded(kind: Selected, params: Params, dtype: torch.dtype) -> None:
    for q, k, _, pad in hard(dtype):
        asked = asked_by(kind, params, q, k, pad)
        visited = keep_of(kind.select(asked), asked.columns)
        assert not bool((visited & ~asked.possible).any())
        assert bool((visited | ~(asked.always & asked.possible)).all())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_what_comes_out_is_finite(kind: Selected) -> None:
    params = {**dict(kind.menu(LENGTH)[-1].params), "block": 16}
    for q, k, v, pad in hard(torch.bfloat16):
        out = kind.reference(q.nan_to_num(), k, v, params, SCALE, None, pad=pad)
        assert out.shape == q.shape and out.dtype == torch.bfloat16 and bool(out.isfinite().all())


@every_setting
def test_whole_blocks_of_padding_on_the_left_change_nothing(kind: Selected, params: Params) -> None:
    drawn, length = torch.Generator().manual_seed(1), 8 * 16 + 5
    q, k, v = (torch.randn(1, heads, length, 8, generator=drawn, dtype=torch.float64) for heads in (2, 1, 1))
    pad = torch.arange(48 + length)[None] >= 48
    hidden = [F.pad(x, (0, 0, 48, 0), value=torch.nan) for x in (8 * q, k, v)]
    for window in (0, 50):
        alone = kind.reference(8 * q, k, v, params, SCALE, window)
        beside = kind.reference(*hidden, params, SCALE, window, pad=pad)
        torch.testing.assert_close(beside[:, :, 48:], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if "mass" in {p.name for p in kind.params}], ids=lambda k: k.name
)
def test_all_of_the_mass_is_every_block_that_may_be_seen(kind: Selected) -> None:
    """Where most of the weights are 0 as numbers, and scores of the last queries are as far apart."""
    params = {**dict(kind.menu(LENGTH)[0].params), "block": 16, "mass": 1.0}
    for trust in (0.0, 1.0):
        q, k, _ = any_inputs()
        asked = asked_by(kind, {**params, "trust": trust} if "trust" in params else params, 1e4 * q, k, padded())
        assert torch.equal(keep_of(kind.select(asked), 3), asked.possible.expand(2, 4, -1, -1))


@every_setting
def test_prompts_of_a_batch_are_selected_apart(kind: Selected, params: Params) -> None:
    """As if each were alone: heads and prompts share no threshold. Groups of heads may share a selection."""
    q, k, _ = any_inputs()
    pad = padded()
    both = kind.select(asked_by(kind, params, q, k, pad))
    for b in range(2):
        alone = kind.select(asked_by(kind, params, q[b : b + 1], k[b : b + 1], pad[b : b + 1]))
        assert torch.equal(keep_of(alone, 3)[0], keep_of(both, 3)[b])
