"""The streamed statistics against their N x N twin, the gradients against SDPA."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from attnopt.errors import ProfileError
from attnopt.statistics import (
    Grid,
    Observation,
    Observe,
    attention,
    causal_mask,
    distance_buckets,
    drawn_starts,
    factor_of,
    measure_forward,
    naive_observation,
    stream,
)
from attnopt.statistics.blocks import ROWS

GRID = Grid((0, 1, 4), (1, 3, 8, 20, 64, 500))
CASES = {
    # batch, heads, kv heads, length, head dim, head dim of v, scale of the scores, window, padding, soft-cap
    "plain": (2, 4, 4, 150, 8, 8, 1.0, None, None, 0.0),
    "grouped": (1, 8, 2, 131, 16, 12, 2.0, None, None, 0.0),
    "short": (2, 2, 1, 5, 4, 4, 1.0, None, None, 0.0),
    "one key": (1, 2, 1, 1, 4, 4, 1.0, None, None, 0.0),
    "block edge": (1, 2, 2, 2 * ROWS, 8, 8, 1.0, None, None, 0.0),
    "window": (2, 4, 2, 300, 8, 8, 1.0, 40, None, 0.0),
    "window, far from key 0": (1, 2, 2, 300, 8, 8, 1.0, 8, None, 0.0),
    "padded right": (3, 4, 2, 150, 8, 8, 1.0, None, "right", 0.0),
    "padded left": (3, 4, 2, 150, 8, 8, 1.0, None, "left", 0.0),
    "padded left, window": (2, 4, 2, 200, 8, 8, 1.0, 30, "left", 0.0),
    "peaky": (1, 4, 2, 200, 8, 8, 6.0, None, None, 0.0),
    "capped": (2, 4, 4, 150, 8, 8, 2.0, None, None, 3.0),
    "capped, grouped, wide v": (1, 8, 2, 131, 12, 20, 2.0, None, None, 1.5),
    "capped, padded left": (3, 4, 2, 150, 8, 8, 2.0, None, "left", 3.0),
    "capped, padded right, window": (2, 4, 2, 203, 8, 8, 2.0, 30, "right", 3.0),
    "capped, saturated": (1, 4, 2, 97, 8, 4, 12.0, None, None, 4.0),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These tensors are too small to share between threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def padding(side: str | None, batch: int, length: int) -> Tensor | None:
    if side is None:
        return None
    pad = torch.ones(batch, length, dtype=torch.bool)
    for b in range(batch):
        cut = b * length // 4
        if side == "left":
            pad[b, :cut] = False
        else:
            pad[b, length - cut :] = False
    return pad


def tensors(
    case: str, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], Tensor, float, Tensor | None, int | None]:
    batch, heads, kv_heads, length, dim, dim_v, sharp, window, side, _ = CASES[case]
    torch.manual_seed(len(case))
    shapes = ((batch, heads, length, dim), (batch, kv_heads, length, dim), (batch, kv_heads, length, dim_v))
    qkv = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    pad = padding(side, batch, length)
    grad = torch.randn(batch, heads, length, dim_v).to(dtype)
    if pad is not None:
        grad *= pad[:, None, :, None]
    return qkv, grad, sharp * dim**-0.5, pad, window


def cap_of(case: str) -> float:
    return CASES[case][-1]


def written_out(
    q: Tensor, k: Tensor, v: Tensor, scale: float, pad: Tensor | None, window: int | None, softcap: float
) -> Tensor:
    """Soft-capped attention as a model spells it, N x N."""
    repeat = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(repeat, 1).mT * scale
    keep = causal_mask(q.shape[2], window, pad, q.device)
    weights = torch.softmax((softcap * torch.tanh(scores / softcap)).masked_fill(~keep, -torch.inf), -1)
    return weights.masked_fill(~keep.any(-1, keepdim=True), 0.0) @ v.repeat_interleave(repeat, 1)


def observe(
    case: str, dtype: torch.dtype = torch.float32, delta: bool = False
) -> tuple[Observation, list[Tensor], list[Tensor]]:
    """The observation, its gradients, and those of plain attention in float64."""
    qkv, grad, scale, pad, window = tensors(case, dtype)
    observation = Observation.zeros(qkv[0].shape[1], GRID, qkv[0].shape[2], delta)
    softcap = cap_of(case)
    out = Observe.apply(*qkv, scale, pad, observation, window, softcap)
    out.backward(grad)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    plain = written_out(*exact, scale, pad, window, softcap) if softcap else attention(*exact, scale, pad, window)
    assert (out - plain).norm() <= (4e-3 if dtype == torch.bfloat16 else 1e-5) * plain.norm()
    plain.backward(grad.double())
    return observation, [x.grad for x in qkv], [x.grad for x in exact]


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Every entry within `tolerance` of the expected one, or of a millionth of the largest where that is more."""
    floor = expected.abs().max() * 1e-6
    worst = ((found - expected).abs() / expected.abs().clamp(min=max(float(floor), 1e-12))).max()
    assert worst <= tolerance, f"relative error {float(worst):.2e}"


@pytest.mark.parametrize("case", CASES)
def test_against_the_naive_twin(case: str) -> None:
    observation, _, _ = observe(case, delta=True)
    qkv, grad, scale, pad, window = tensors(case)
    twin = naive_observation(*qkv, grad, GRID, scale, pad, window, softcap=cap_of(case))
    assert (observation.rows, observation.samples) == (twin.rows, twin.samples)
    for name in ("t2", "mass", "delta", "ablation_t2"):
        close(observation.sums[name], twin.sums[name], 1e-4)
    # These cancel or are small: judged against the size of what they sum.
    for name, size in (("t1", (twin.t2 * twin.rows).sqrt()), ("entropy", twin.entropy.new_tensor(float(twin.rows)))):
        assert ((observation.sums[name] - twin.sums[name]).abs() <= 1e-5 * size + 1e-9).all(), name
    assert ((observation.sample_sq - twin.sample_sq).abs() <= 1e-4 * twin.t2 * twin.rows + 1e-12).all()
    assert ((observation.sketch - twin.sketch).abs() <= 1e-4 * twin.t2[:, -1].sqrt().sum(-1, keepdim=True) + 1e-9).all()
    for name in ("mass_by_distance", "mass_at_key"):
        assert (observation.sums[name] - twin.sums[name]).abs().max() <= 1e-5 * twin.rows, name
    assert float(observation.mass_at_key[:, 0].min()) > 0


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_plain_attention(case: str) -> None:
    _, found, exact = observe(case)
    for ours, theirs in zip(found, exact, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-12
    qkv, _, scale, pad, window = tensors(case)
    observation = Observation.zeros(qkv[0].shape[1], GRID, qkv[0].shape[2])
    out = Observe.apply(*qkv, scale, pad, observation, window, cap_of(case))
    assert torch.equal(out, attention(*qkv, scale, pad, window, cap_of(case)))


def far_away(gap: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention whose rows put all but about exp(-gap) of their mass on key 3, which small windows drop."""
    torch.manual_seed(3)
    q, k, v = (torch.randn(1, 2, 180, 8) * s for s in (1.0, 0.3, 1.0))
    q[..., 0], k[..., 0], k[:, :, 3, 0] = 8**0.5, 0.0, gap
    return q, k, v, torch.randn(1, 2, 180, 8)


@pytest.mark.parametrize("gap", [10.0, 14.0, 30.0, 60.0])
def test_little_kept_mass(gap: float) -> None:
    """1 - m by subtraction would have no correct digit left from a gap of 17 nats on."""
    q, k, v, grad = far_away(gap)
    grid = Grid((0, 2, 6), (1, 4, 32, 100))
    observation = Observation.zeros(2, grid, 180, delta=True)
    stream(q, k, v, grad, 8**-0.5, None, observation)
    twin = naive_observation(q, k, v, grad, grid, 8**-0.5)
    dropping = 180 - 100 - 3  # rows that lose key 3 to a window of 100
    assert dropping - float(twin.mass[0, 0, 3]) < dropping * 100 * math.exp(5 - gap) + 1e-12
    close(observation.t2, twin.t2, 1e-4)
    close(observation.delta, twin.delta, 1e-4)


def test_no_kept_mass_counts_as_ablated() -> None:
    q, k, v, grad = far_away(400.0)
    observation = Observation.zeros(2, Grid((0,), (1, 32)), 180, delta=True)
    stream(q, k, v, grad, 8**-0.5, None, observation)
    output = attention(q, k, v, 8**-0.5, None, None).double()
    dots = (grad.double() * output).sum(-1)
    for n, window in enumerate((1, 32)):
        close(observation.t2[:, 0, n], dots[:, :, 3 + window :].square().sum((0, 2)), 0.05)  # other rows: keys 0..2
        assert float(observation.mass[0, 0, n]) == pytest.approx(180 - 3 - window, abs=3)
        assert all(tensor.isfinite().all() for tensor in observation.sums.values())


@pytest.mark.parametrize("case", ["grouped", "capped, grouped, wide v"])
def test_half_precision_inputs_with_float32_sums(case: str) -> None:
    qkv, grad, scale, pad, window = tensors(case, torch.bfloat16)
    observation, found, exact = observe(case, torch.bfloat16)
    assert all(g.dtype == torch.bfloat16 for g in found)
    for ours, theirs in zip(found, exact, strict=True):
        assert (ours - theirs).norm() <= 4e-3 * theirs.norm()  # one rounding to bfloat16
    twin = naive_observation(*qkv, grad, GRID, scale, pad, window, softcap=cap_of(case))
    close(observation.t2, twin.t2, 1e-4)


def test_a_soft_cap_matters() -> None:
    """The cases above would see a cap that is left out, in the scores or in their gradient."""
    for case in (name for name in CASES if cap_of(name)):
        qkv, grad, scale, pad, window = tensors(case)
        found, ours, exact = observe(case)
        without = naive_observation(*qkv, grad, GRID, scale, pad, window)
        assert ((found.t2 - without.t2).norm() / without.t2.norm()) > 0.05, case
        straight = [x.detach().double().requires_grad_() for x in qkv]
        attention(*straight, scale, pad, window).backward(grad.double())
        assert (straight[0].grad - ours[0]).norm() > 0.05 * exact[0].norm(), case


def test_autocast_does_not_lower_the_precision() -> None:
    qkv, grad, scale, _, _ = tensors("plain")
    plain, cast = (Observation.zeros(4, GRID, 150) for _ in range(2))
    stream(*qkv, grad, scale, None, plain)
    with torch.autocast("cpu", torch.bfloat16):
        stream(*qkv, grad, scale, None, cast)
    assert torch.equal(plain.t2, cast.t2)


@pytest.mark.parametrize("rows", [16, 50, 256])
def test_block_size_and_grouping_do_not_matter(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    qkv, grad, scale, pad, window = tensors("padded left")
    one, other = (Observation.zeros(4, GRID, 150, delta=True) for _ in range(2))
    stream(*qkv, grad, scale, pad, one, window)
    monkeypatch.setattr("attnopt.statistics.blocks.CPU_BLOCK", 1)
    stream(*qkv, grad, scale, pad, other, window, rows=rows)
    for name in ("t2", "mass", "delta", "entropy"):
        close(other.sums[name], one.sums[name], 1e-4)


def test_padded_rows_and_padding_length_do_not_count() -> None:
    """A right-padded sample has the sums of the same sample without its padding."""
    qkv, grad, scale, _, _ = tensors("plain")
    pad = torch.ones(2, 150, dtype=torch.bool)
    pad[:, 100:] = False
    noisy, short = Observation.zeros(4, GRID, 150), Observation.zeros(4, GRID, 100)
    stream(*qkv, grad, scale, pad, noisy)  # grad is not zero on the padded rows
    stream(*(x[:, :, :100] for x in (*qkv, grad)), scale, None, short)
    close(noisy.t2, short.t2, 1e-5)
    close(noisy.ablation_t2, short.ablation_t2, 1e-5)
    assert noisy.rows == short.rows == 200


@pytest.mark.parametrize("case", ["padded right", "capped, padded left"])
def test_forward_only_measures_what_needs_no_gradient(case: str) -> None:
    qkv, grad, scale, pad, window = tensors(case)
    full, forward = (Observation.zeros(4, GRID, 150, delta=True) for _ in range(2))
    stream(*qkv, grad, scale, pad, full, window, softcap=cap_of(case))
    measure_forward(*qkv, scale, pad, forward, window, softcap=cap_of(case))
    for name in ("mass", "entropy", "mass_by_distance", "mass_at_key", "delta"):
        assert torch.equal(full.sums[name], forward.sums[name]), name
    assert not forward.t2.any() and not forward.ablation_t2.any()


def test_outputs_move_as_far_as_their_projections_do() -> None:
    """sum ||delta O W_O||^2 through the Gram matrix, against candidates soft-maxed again and projected."""
    qkv, _, scale, _, _ = tensors("grouped")
    heads, width, dim_v = 8, 24, qkv[2].shape[-1]
    weight = torch.randn(width, heads * dim_v)
    found = Observation.zeros(heads, GRID, 131, delta=True, backward=False)
    measure_forward(*qkv, scale, None, found, factor=factor_of(weight, heads))
    q, k, v = (x.detach().double() for x in qkv)
    for head in range(heads):
        through = weight[:, head * dim_v :][:, :dim_v].double()
        # The same head alone, its values projected: what moves is then the projected output.
        one = (q[:, head : head + 1], k[:, head // 4][:, None], (v[:, head // 4] @ through.T)[:, None])
        twin = naive_observation(*one, torch.zeros(1, 1, 131, width), GRID, scale)
        close(found.delta[head], twin.delta[0], 1e-4)


def test_a_part_of_the_rows_estimates_all_of_them() -> None:
    """Every row is drawn equally often, and what is seen of the rows drawn is what those rows are."""
    for length, rows, share in ((1000, 32, 8), (70, 32, 4), (20, 32, 16)):
        seen = torch.zeros(length)
        for seed in range(600):
            for start in drawn_starts(length, rows, share, seed):
                seen[start : start + rows] += 1
        if length > rows * share:
            assert (seen / 600 - 1 / share).abs().max() < 0.06
        assert seen.sum() > 0
    q, k, v, _ = far_away(3.0)
    all_rows, some, twin = (Observation.zeros(2, GRID, 180, delta=True, backward=False) for _ in range(3))
    measure_forward(q, k, v, 8**-0.5, None, all_rows)
    for seed in range(40):
        measure_forward(q, k, v, 8**-0.5, None, some, share=2, seed=seed)
    assert 0.4 < some.rows / (40 * 180) < 0.6
    ratio = (some.delta / some.rows) / (all_rows.delta / all_rows.rows).clamp(min=1e-9)
    assert ((ratio - 1).abs() < 0.25)[all_rows.delta > 1e-3].all()
    starts = drawn_starts(180, 32, 2, 7)
    stream(q, k, v, None, 8**-0.5, None, twin, rows=32, starts=starts)
    other = Observation.zeros(2, GRID, 180, delta=True, backward=False)
    measure_forward(q, k, v, 8**-0.5, None, other, share=2, seed=7)
    assert torch.equal(other.delta, twin.delta) and other.rows == sum(min(32, 180 - s) for s in starts)
    with pytest.raises(ValueError, match="every row"):
        stream(q, k, v, v, 8**-0.5, None, twin, starts=[0])


def test_observations_add() -> None:
    qkv, grad, scale, _, _ = tensors("plain")
    both, first, second = (Observation.zeros(4, GRID, 150) for _ in range(3))
    stream(*qkv, grad, scale, None, both)
    for n, part in enumerate((first, second)):
        stream(*(x[n : n + 1] for x in (*qkv, grad)), scale, None, part)
    total = first + second
    assert (total.rows, total.samples) == (both.rows, both.samples) == (300, 2)
    for name in both.sums:
        # The signs of a batch are not those of its samples.
        expected = first.sketch + second.sketch if name == "sketch" else both.sums[name]
        close(total.sums[name], expected, 1e-5)
    assert first.samples == 1, "adding leaves the terms as they were"
    assert total.damage(1, 4, 8) == 0.5 * float(total.t2[1, 2, 2])
    with pytest.raises(ValueError, match="do not add"):
        first + Observation.zeros(4, Grid((0,), (1,)), 150)
    with pytest.raises(ValueError, match="do not fit"):
        stream(*(x[:, :, :50] for x in (*qkv, grad)), scale, None, both)
    with pytest.raises(ProfileError, match="does not hold delta") as missing:
        _ = first.delta
    assert "--forward-only" in missing.value.remedy
    with pytest.raises(AttributeError, match="no 'epsilon'"):
        _ = first.epsilon


def test_what_was_not_gathered_is_not_read_as_zero() -> None:
    forward = Observation.zeros(4, GRID, 150, delta=True, backward=False)
    assert "t2" not in forward.held and "delta" in forward.held
    with pytest.raises(ProfileError, match="does not hold t2") as missing:
        forward.damage(0, 0, 1)
    assert "without --forward-only" in missing.value.remedy
    with pytest.raises(ValueError, match="do not add"):
        forward + Observation.zeros(4, GRID, 150, delta=True)


def test_tokens_counted_by_weight_add_to_rows_that_all_count() -> None:
    every, some = Observation.zeros(4, GRID, 150), Observation.zeros(4, GRID, 150)
    every.rows, some.rows, some.counted = 150, 150, 12.5
    assert every.tokens == 150 and some.tokens == 12.5
    assert (every + some).tokens == (some + every).tokens == 162.5 and (every + every).counted is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_does_not_count_twice(reentrant: bool) -> None:
    qkv, grad, scale, _, _ = tensors("plain")
    plain, again = (Observation.zeros(4, GRID, 150) for _ in range(2))
    Observe.apply(*qkv, scale, None, plain).backward(grad)
    out = torch.utils.checkpoint.checkpoint(
        lambda *x: Observe.apply(*x, scale, None, again), *qkv, use_reentrant=reentrant
    )
    out.backward(grad)
    assert again.samples == plain.samples == 2
    assert torch.equal(again.t2, plain.t2)


def test_distance_buckets() -> None:
    assert distance_buckets(1) == [0]
    assert distance_buckets(2) == [0, 1]
    assert distance_buckets(9) == [0, 1, 2, 4, 8]


@pytest.mark.parametrize(
    "sinks, windows", [((), (1,)), ((0,), ()), ((-1,), (1,)), ((0,), (0,)), ((0,), (4, 2)), ((0, 0), (1,))]
)
def test_grid_refuses(sinks: tuple[int, ...], windows: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="ascending"):
        Grid(sinks, windows)
