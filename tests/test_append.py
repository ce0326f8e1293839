"""A cache that grows by concatenation is continued in place: every result is that of `cat` to the bit, whoever else
holds an older state, and nothing is copied but what has to be."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.graph import GraphLowering

from attnopt import backend
from attnopt.backend import append, inductor
from attnopt.passes import pays

State = tuple[Tensor, Tensor]
DIM = 8


def step(past: State, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, State]:
    """What a layer of transformers' DynamicCache does; keys are computed before they are cached."""
    keys, values = torch.cat([past[0], 2 * k], -2), torch.cat([past[1], v], -2)
    return F.scaled_dot_product_attention(q, keys, values, enable_gqa=True), (keys, values)


class Tokens:
    """The same random q, k and v for whoever asks in the same order."""

    def __init__(self, batch: int = 2, heads: int = 2, groups: int = 2, dim: int = DIM) -> None:
        self.sizes, self.dim, self.generator = (batch, heads, groups), dim, torch.Generator().manual_seed(0)

    def normal(self, heads: int, length: int) -> Tensor:
        return torch.randn(self.sizes[0], heads, length, self.dim, generator=self.generator)

    def past(self, length: int) -> State:
        return self.normal(self.sizes[2], length), self.normal(self.sizes[2], length)

    def next(self, length: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        _, heads, groups = self.sizes
        return self.normal(heads, length), self.normal(groups, length), self.normal(groups, length)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    backend.clear_reports()
    append.counts.appended = append.counts.copied = 0
    with torch.no_grad():
        yield


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`step`, its rewritten graphs run by torch: what is tested is who owns which memory."""
    for module in (backend, inductor):
        monkeypatch.setattr(module, "to_inductor", lambda graph, inputs, patches: graph.forward)
    return torch.compile(step, backend="attnopt")


def equal(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, atol=0, rtol=0)


def warmed(compiled: Callable[..., Any], tokens: Tokens, length: int = 5, steps: int = 3) -> tuple[State, State]:
    """A state that `compiled` made, which is open to be continued, and what it should be."""
    found = wanted = tokens.past(length)
    for _ in range(steps):
        new = tokens.next()
        found, wanted = compiled(found, *new)[1], step(wanted, *new)[1]
    equal(found, wanted)
    return found, wanted


def test_each_token_is_written_behind_the_others(compiled: Callable[..., Any]) -> None:
    """Past the end of the first buffer; every state that there was keeps its contents."""
    tokens, steps = Tokens(), 330
    found = wanted = tokens.past(5)
    history = []
    for _ in range(steps):
        new = tokens.next()
        (out, found), (expected, wanted) = compiled(found, *new), step(wanted, *new)
        equal(out, expected)
        history.append((found, wanted))
    for state, expected in history:
        equal(state, expected)
    # The first call finds a packed past; the second has other strides and lengths; then nothing is compiled anew.
    assert counters["stats"]["unique_graphs"] == 2
    assert [len(r.rewrites) for r in backend.reports()] == [1, 1]
    # Keys and values: into the first buffer, and into a larger one when that is full.
    assert (append.counts.copied, append.counts.appended) == (4, 2 * (steps - 1))
    memory = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in found}
    assert sum(memory.values()) <= 1.2 * sum(t.nbytes for t in found) + 2 * 272 * found[0][:, :, 0].nbytes


def test_heads_further_apart_than_their_slots_take(compiled: Callable[..., Any]) -> None:
    """A past with room whose heads lie 100 numbers apart, in twelves of slots: its copy has these strides, which
    were compiled."""
    tokens = Tokens()
    wanted = tokens.past(5)
    apart = [torch.zeros(2, 2, 100).as_strided((2, 2, 5, DIM), (200, 100, DIM, 1)).copy_(x) for x in wanted]
    new = tokens.next()
    (out, found), (expected, longer) = compiled((apart[0], apart[1]), *new), step(wanted, *new)
    equal((out, found), (expected, longer))
    assert [x.stride() for x in found] == [(200, 100, DIM, 1)] * 2
    assert append.counts.copied == 2


ROWS = torch.tensor([1, 1])
FORKS: dict[str, Callable[[State], State]] = {
    "the same state again": lambda state: state,
    "a copy of the holder": lambda state: copy.copy(state),
    "a deepcopy": copy.deepcopy,
    "a crop": lambda state: (state[0][..., :-2, :], state[1][..., :-2, :]),
    "an empty crop": lambda state: (state[0][:, :, :], state[1][:, :, :]),
    "rows in another order": lambda state: (state[0].index_select(0, ROWS), state[1].index_select(0, ROWS)),
    "fewer rows": lambda state: (state[0][:1], state[1][:1]),
    "keys in the place of values": lambda state: (state[1], state[0]),
    "a detached alias": lambda state: (state[0].detach(), state[1].detach()),
}


def forked(compiled: Callable[..., Any], fork: Callable[[State], State]) -> None:
    """A state is continued, then a fork of it, then each on its own; all are compared in the end."""
    tokens = Tokens()
    found, wanted = warmed(compiled, tokens)
    pairs = []
    for make in (lambda state: state, fork, fork):
        ours, theirs = make(found), make(wanted)
        pairs.append((ours, theirs))
        for _ in range(3):
            new = tuple(t[: ours[0].shape[0]] for t in tokens.next())
            (out, ours), (expected, theirs) = compiled(ours, *new), step(theirs, *new)
            equal(out, expected)
            pairs.append((ours, theirs))
    for ours, theirs in pairs:
        equal(ours, theirs)
    equal(found, wanted)


@pytest.mark.parametrize("fork", FORKS)
def test_forks_share_nothing_that_is_written_to(fork: str, compiled: Callable[..., Any]) -> None:
    forked(compiled, FORKS[fork])


@pytest.mark.parametrize("fork", ["the same state again", "a crop", "a detached alias"])
def test_to_append_to_any_state_is_seen(
    fork: str, compiled: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mistake that all of this is against: memory behind an older state is another state's."""
    monkeypatch.setattr(append, "claimed", lambda past: True)
    with pytest.raises(AssertionError):
        forked(compiled, FORKS[fork])


def test_other_memory_behind_the_same_tensor(compiled: Callable[..., Any]) -> None:
    """A tensor that was returned here and was then given the memory of another state."""
    tokens = Tokens()
    found, wanted = warmed(compiled, tokens)
    older, theirs = found, wanted
    new = tokens.next()
    found, wanted = compiled(found, *new)[1], step(wanted, *new)[1]
    for mine, old in zip(found, older, strict=True):
        mine.data = old.data
    new = tokens.next()
    changed = compiled(found, *new)[1]
    equal(changed, step(theirs, *new)[1])
    assert changed[0].untyped_storage().data_ptr() != older[0].untyped_storage().data_ptr()


def test_chunks_and_turns(compiled: Callable[..., Any]) -> None:
    """Any number of tokens at once, also more than there is room for."""
    tokens = Tokens()
    found = wanted = tokens.past(5)
    for length in (3, 4, 5, 1, 1, 6, 600, 1, 1, 2):
        new = tokens.next(length)
        (out, found), (expected, wanted) = compiled(found, *new), step(wanted, *new)
        equal(out, expected)
        equal(found, wanted)
    assert append.counts.appended >= 10
    assert counters["stats"]["unique_graphs"] <= 5


def test_inference_mode_and_back(compiled: Callable[..., Any]) -> None:
    """A tensor made in inference mode may not be written to outside of it."""
    tokens = Tokens()
    found, wanted = warmed(compiled, tokens)
    for inference in (True, True, False, False):
        new = tokens.next()
        with torch.inference_mode(inference):
            found = compiled(found, *new)[1]
        wanted = step(wanted, *new)[1]
        equal(found, wanted)
        assert found[0].is_inference() == inference


def test_a_call_that_fails_leaves_the_past_as_it_was(
    compiled: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = Tokens()
    found, wanted = warmed(compiled, tokens)
    new, failing = tokens.next(), iter([True])
    kept = append.kept

    def fails_once(full: Tensor, added: int) -> Tensor:
        if next(failing, False):
            raise MemoryError
        return kept(full, added)

    monkeypatch.setattr(append, "kept", fails_once)
    with pytest.raises(MemoryError):
        compiled(found, *tokens.next())
    equal(found, wanted)
    equal(compiled(found, *new)[1], step(wanted, *new)[1])


def test_gradients_leave_it_alone(compiled: Callable[..., Any]) -> None:
    tokens = Tokens()
    past, new = tokens.past(5), tokens.next()
    with torch.enable_grad():
        new[0].requires_grad_()
        out, state = compiled(past, *new)
        out.sum().backward()
    equal(state, step(past, *new)[1])
    assert new[0].grad is not None
    assert "append-gradient" in {no.code for r in backend.reports() for no in r.refusals}


def window(past, q, k, v):
    keys, values = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    return F.scaled_dot_product_attention(q, keys, values, enable_gqa=True), (keys[:, :, -7:], values[:, :, -7:])


def three_parts(past, q, k, v):
    keys, values = torch.cat([past[0], k, k], 2), torch.cat([past[1], v, v], 2)
    return F.scaled_dot_product_attention(q, keys, values, enable_gqa=True), (keys, values)


def continued_twice(past, q, k, v):
    out, state = step(past, q, k, v)
    return out, state, torch.cat([past[0], v], 2)


def past_returned(past, q, k, v):
    return *step(past, q, k, v), past


def past_written(past, q, k, v):
    found = step(past, q, k, v)
    past[0].mul_(2)
    return found


def past_read(past, q, k, v):
    out, state = step(past, q, k, v)
    return out + past[0].amax() + past[1].shape[2], state


def promoted(past, q, k, v):
    """Only the first call finds a past of another dtype."""
    return step(past, q.double(), k.double(), v.double())


@pytest.mark.parametrize(
    "fn, code",
    [
        (window, "append-window"), (three_parts, "append-layout"),
        (continued_twice, "append-shared"), (past_written, "append-shared"), (past_returned, ""), (past_read, ""),
        (promoted, "append-layout"),
    ],
)  # fmt: skip
def test_what_is_no_append(fn: Callable[..., Any], code: str, compiled: Callable[..., Any]) -> None:
    tokens = Tokens()
    found = tokens.past(5)
    wanted = found[0].clone(), found[1].clone()
    other = torch.compile(fn, backend="attnopt")
    for _ in range(4):
        new = tokens.next()
        ours, theirs = other(found, *new), fn(wanted, *new)
        equal(ours, theirs)
        found, wanted = ours[1], theirs[1]
    codes = {no.code for r in backend.reports() for no in r.refusals}
    assert {c for c in codes if c.startswith("append")} == ({code} if code else set())
    assert bool(append.counts.appended) == (not code or fn is promoted)


def test_recorded_calls_are_left_alone(compiled: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "recorded", lambda chosen, device: True)
    tokens = Tokens()
    warmed(compiled, tokens)
    assert {"append-recorded"} <= {no.code for r in backend.reports() for no in r.refusals}
    assert not append.counts.appended


@pytest.mark.parametrize("heads, padded", [(4, True), (2, False)])
def test_one_query_over_keys_that_grow(heads: int, padded: bool, compiled: Callable[..., Any]) -> None:
    """The compiled kernel, also where heads share keys and rows have pads of different length, against float64."""

    def attend(past: State, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, State]:
        keys, values = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True), (keys, values)

    tokens, fn = Tokens(heads=heads, dim=64), torch.compile(attend, backend="attnopt")
    found, real = tokens.past(5), torch.tensor([0, 3])[:, None, None, None]
    wanted = found[0].double(), found[1].double()
    for n in range(6, 10):
        q, k, v = tokens.next()
        mask = (torch.arange(n) >= real) if padded else None
        out, found = fn(found, q, k, v, mask)
        expected, wanted = attend(wanted, q.double(), k.double(), v.double(), mask)
        torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=1e-5)
    assert all(r.lowering == pays.GROWN for report in backend.reports() for r in report.rewrites)
    assert append.counts.appended == 6


def test_a_mask_that_says_the_same_of_every_key(compiled: Callable[..., Any]) -> None:
    """It has one column, which is none of the keys'."""

    def attend(past: State, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, State]:
        keys, values = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        return F.scaled_dot_product_attention(q, keys, values, mask), (keys, values)

    tokens, fn = Tokens(dim=64), torch.compile(attend, backend="attnopt", dynamic=True)
    found, mask = tokens.past(5), torch.ones(2, 1, 1, 1, dtype=torch.bool)
    for _ in range(3):
        new = tokens.next()
        expected, _ = attend(found, *new, mask)
        out, found = fn(found, *new, mask)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_what_inductor_makes_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """One write of what is new, under sizes and strides known at run time; grouped heads, which are packed."""
    codes: list[str] = []
    monkeypatch.setattr(GraphLowering, "save_output_code", staticmethod(codes.append))
    tokens, fn = Tokens(heads=4), torch.compile(step, backend="attnopt")
    found = wanted = tokens.past(100)
    for _ in range(300):
        new = tokens.next()
        (out, found), (expected, wanted) = fn(found, *new), step(wanted, *new)
        torch.testing.assert_close(out, expected)
    equal(found, wanted)
    assert counters["stats"]["unique_graphs"] == 2
    assert append.counts.copied == 4, append.counts
    # What the graph allocates is as long as what is new.
    made = [line for code in codes for line in code.splitlines() if "= empty_strided_cpu(" in line]
    assert codes and not any("101" in line or re.search(r"\bs\d+", line) for line in made), made
