"""One attention whose heads are replaced by different things: spans, spans with a part for far keys, constants.

    out, lse = span_attention_lse(q, k, v, ...)                  all heads, each its own sinks and window
    far_out, far_lse = linear_far(q, k, v, heads, ...)           heads whose far keys are stood in for alike
    out[:, heads] = merge(out, lse at these heads, far_out, far_lse)

Only these heads are read and written again: no kernel wants q, k or v regrouped, whichever heads it serves. `compose`
says this as calls, which `attend` makes at once and attnopt/passes/planned.py inserts into a graph: what is measured is
what is shipped.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnopt import ops
from attnopt.board import Board, selecting, write_rows
from attnopt.errors import FittedError, PlanError
from attnopt.ir import DENSE, Choice, Site
from attnopt.ops.span import IDLE
from attnopt.registry import CANDIDATES

if TYPE_CHECKING:
    from attnopt.fitted import Fitted

aten = torch.ops.aten
# call(target, *args) computes, or inserts a node that will.
Call = Callable[..., Any]
# A window no length reaches.
UNBOUNDED = 2**30
# The span of a head that another operator serves. Four of 8 heads over 4 so and the others with windows of 256, 64
# features, 2048 tokens, one thread of an EPYC: .14 of dense attention in float32 and .22 in bfloat16, and .16 and .31
# where each of the four is beside one with a window; with one key in the place of nothing .17 .32 .17 .51.
NOTHING = (0, IDLE, 0.0)


def tables(choices: Sequence[Choice] | None, heads: int) -> dict[str, Tensor]:
    """sinks, alphas (int32) and betas (float64) of a site's choices; None means every head is dense."""
    rules = [(0, UNBOUNDED, 0.0)] * heads
    if choices is not None:
        rules = [NOTHING if far_of(c)[0] == "selected" else _rule(c) for c in choices]
    sinks, alphas, betas = zip(*rules, strict=True)
    return {
        "sinks": torch.tensor(sinks, dtype=torch.int32),
        "alphas": torch.tensor(alphas, dtype=torch.int32),
        "betas": torch.tensor(betas, dtype=torch.float64),
    }


def _rule(choice: Choice) -> tuple[int, int, float]:
    rule: tuple[int, int, float] = CANDIDATES[choice.candidate].rule(dict(choice.params))
    return rule


def far_of(choice: Choice) -> tuple[str, str]:
    """What stands in for a head's far keys, and the name of the maps it needs: ("", ""), ("linear", "linear/64"). Of a
    head whose keys are selected, the method and the size of its blocks: ("selected", "pooled/64")."""
    candidate, params = CANDIDATES[choice.candidate], dict(choice.params)
    return candidate.far, candidate.method(params) if candidate.far == "selected" else candidate.map_name(params)


def gone(choices: Sequence[Choice]) -> tuple[int, ...]:
    """Positions of the choices that leave no attention."""
    return tuple(at for at, choice in enumerate(choices) if far_of(choice)[0] == "gone")


@dataclass(frozen=True)
class FarPart:
    """Heads that one operator serves beside their spans: `far` and `map_name` as `far_of` gives them, `heads`
    ascending; settings: of each head, where its keys are selected."""

    far: str
    map_name: str
    heads: tuple[int, ...]
    settings: tuple[tuple[float, ...], ...] = ()

    def __str__(self) -> str:
        if self.far == "selected":
            return f"{self.map_name.partition('/')[0]} selection on {len(self.heads)} head{'s' * (len(self.heads) > 1)}"
        return f"{self.far} tail on {len(self.heads)} head{'s' * (len(self.heads) > 1)}"


def far_parts(choices: Sequence[Choice]) -> tuple[FarPart, ...]:
    """The heads with far parts, those of equal maps together whatever their windows, in the order of first heads."""
    found: dict[tuple[str, str], list[int]] = {}
    for head, choice in enumerate(choices):
        far, map_name = far_of(choice)
        if far not in ("", "gone"):
            found.setdefault((far, map_name), []).append(head)
    return tuple(
        FarPart(far, name, tuple(heads), tuple(settings_of(choices[h]) for h in heads) if far == "selected" else ())
        for (far, name), heads in found.items()
    )


def settings_of(choice: Choice) -> tuple[float, ...]:
    """The parameters of a head whose keys are selected, as a row of its operator's table."""
    row: tuple[float, ...] = CANDIDATES[choice.candidate].settings(dict(choice.params))
    return row


@dataclass(frozen=True)
class HeldPart:
    """What the calls of a far part read: tensors, or nodes that stand for them. heads: int32 on the CPU; index: int64
    beside q, None where the part has every head; maps: those of a FeatureMap of `kind`, in its order. Where keys are
    selected `kind` is the method, and settings float64 (h, P) on the CPU."""

    far: str
    heads: Any
    index: Any
    maps: tuple[Any, ...] = ()
    kind: str = ""
    settings: Any = None


def hold(
    part: FarPart, total: int, fitted: Fitted | None, site: str, of: Sequence[int], device: torch.device
) -> HeldPart:
    """The tensors of a far part among `total` heads, which are the heads `of` of the site. PlanError where its maps
    were never fitted."""
    heads = torch.tensor(part.heads, dtype=torch.int32)
    index = None if len(part.heads) == total else torch.tensor(part.heads, device=device)
    if part.far == "selected":
        table = torch.tensor(part.settings, dtype=torch.float64)
        return HeldPart(part.far, heads, index, kind=part.map_name, settings=table)
    if not part.map_name:
        return HeldPart(part.far, heads, index)
    if fitted is None:
        said = f"{part.map_name} at {site} needs feature maps, and there are none."
        raise PlanError(said, "Give what `attnopt distill` fitted.")
    try:
        maps = fitted.map_of(site, part.map_name, [of[head] for head in part.heads]).to(device)
    except FittedError as error:
        raise PlanError(error.problem, error.remedy) from error
    return HeldPart(part.far, heads, index, maps.tensors, maps.kind)


def compose(
    call: Call, q: Any, k: Any, v: Any, rules: Sequence[Any], parts: Sequence[HeldPart], pad: Any,
    scale: float, model_window: int = 0, min_length: int = 0, grad: bool = False, site: str = "",
) -> Any:  # fmt: skip
    """The calls for q (B, H, N, D), k (B, G, N, D), v (B, G, N, Dv): (B, H, N, Dv). rules: sinks, alphas, betas of all
    heads; grad: whether the result must have gradients, which heads whose keys are selected have not; site: what their
    blocks are counted under."""
    chosen = [part for part in parts if part.far == "selected"]
    out = compose_near(call, q, k, v, rules, parts, pad, scale, model_window, min_length, grad)
    for part in chosen:
        given = q, k, v, out, part.heads, part.kind, part.settings, pad, scale, model_window, min_length, site
        out = call(torch.ops.attnopt.selected_attention.default, *given)
    return out


def compose_near(
    call: Call, q: Any, k: Any, v: Any, rules: Sequence[Any], parts: Sequence[HeldPart], pad: Any,
    scale: float, model_window: int, min_length: int, grad: bool,
) -> Any:  # fmt: skip
    """`compose` of all heads but those whose keys are selected; None where these are all."""
    fixed = [part for part in parts if part.far != "selected"]
    if any(part.far == "selected" and part.index is None for part in parts):
        return None
    arguments = q, k, v, *rules, pad, scale, model_window, min_length
    if not fixed and not grad:
        return call(torch.ops.attnopt.span_attention.default, *arguments)
    out, lse = both(call, torch.ops.attnopt.span_attention_lse.default, *arguments)
    for part in fixed:
        far = both(call, *far_call(q, k, v, rules, part, pad, scale, min_length))
        if part.index is None:
            return ops.merge(out, lse, *far, call=call)
        # What putting heads back adds to a span kernel of 45 and 27 ms, 2 heads and 4 of 8 over 2 of 64, 8192 keys,
        # compiled, one thread of a Xeon, torch 2.13, float32 and bfloat16: index_put 3.6 3.5 and 3.5 3.0 ms; index_copy
        # 5.0 7.7 and 2.8 5.2; one pass over all heads that gathers their far parts 7.6 5.9 and 5.3 5.7; heads that lie
        # side by side, as slices, 4.8 5.6 and 3.4 2.6: to move heads together saves nothing.
        # Read from what was written last: parts have heads of their own, and one buffer serves them all.
        taken, sums = (call(aten.index_select.default, x, 1, part.index) for x in (out, lse))
        merged = ops.merge(taken, sums, *far, call=call)
        out = call(aten.index_put.default, out, [None, part.index], merged)
    return out


def both(call: Call, *args: Any) -> tuple[Any, Any]:
    """The two results of an operator."""
    found = call(*args)
    return call(operator.getitem, found, 0), call(operator.getitem, found, 1)


def far_call(
    q: Any, k: Any, v: Any, rules: Sequence[Any], part: HeldPart, pad: Any, scale: float, min_length: int
) -> tuple[Any, ...]:
    """The operator of a far part, and its arguments."""
    given = q, k, v, part.heads, *rules, pad
    if part.far == "mean":
        return torch.ops.attnopt.mean_far.default, *given, scale, min_length
    if part.far == "linear":
        # The scale is in the maps.
        return torch.ops.attnopt.linear_far.default, *given, *part.maps, part.kind, min_length
    raise ValueError(f"no operator stands in for far keys by {part.far!r}")


@dataclass(eq=False)
class Mixture:
    """A site's attention under `choices`, one for every query head; call it with (q, k, v, pad). board: of heads that
    select tokens while decoding, whose every row is computed as its step would be."""

    choices: tuple[Choice, ...]
    site: Site
    fitted: Fitted | None = None
    min_length: int = 0
    board: Board | None = None
    _held: dict[torch.device, tuple[HeldPart, ...]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.rules = tuple(tables(self.choices, len(self.choices)).values())
        self.parts, self.gone = far_parts(self.choices), gone(self.choices)
        self.selecting = selecting(self.choices)
        if any(part.far != "selected" for part in self.parts) and self.site.mask.window is not None:
            said = f"{self.site.name} has a window of its own, outside of which there are no keys to stand in for."
            raise PlanError(said, "Choose spans there.")
        if self.gone and self.fitted is None:
            said = f"Head {self.gone[0]} of {self.site.name} is to be its mean output, and there is none."
            raise PlanError(said, "Give what `attnopt distill` measured.")

    @property
    def spanned(self) -> bool:
        """Whether any head is something else than dense or gone: what only a kernel of spans serves."""
        return any(c != DENSE for at, c in enumerate(self.choices) if at not in self.gone)

    def held(self, device: torch.device) -> tuple[HeldPart, ...]:
        if device not in self._held:
            heads = range(len(self.choices))
            self._held[device] = tuple(
                hold(part, len(heads), self.fitted, self.site.name, heads, device) for part in self.parts
            )
        return self._held[device]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, pad: Tensor | None = None) -> Tensor:
        """q (B, H, N, D), k (B, G, N, D), v (B, G, N, Dv), pad bool (B, N) true where a key counts -> (B, H, N, Dv)."""
        if q.shape[1] != len(self.choices):
            said = f"There are {len(self.choices)} choices for the {q.shape[1]} heads of {self.site.name}."
            raise PlanError(said, "Give every query head one.")
        grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        numbers = self.site.scale, self.site.mask.window or 0, self.min_length, grad, self.site.name
        out = compose(ops.compute, q, k, v, self.rules, self.held(q.device), pad, *numbers)
        if self.selecting and q.shape[2] >= self.min_length:
            out = out.clone() if grad else out
            write_rows(out, q, k, v, self.choices, self.site, pad, self.board)
        return self.constants(out)

    def constants(self, out: Tensor) -> Tensor:
        """`out` (B, H, N, Dv) with the heads that are gone in the place of whatever stands there: their means, at
        every length, since their weights are no more."""
        if not self.gone:
            return out
        assert self.fitted is not None
        means = self.fitted.mean_of(self.site.name, self.gone).to(out.device, out.dtype)
        index = torch.tensor(self.gone, device=out.device)
        return out.index_copy(1, index, means[None, :, None].expand(out.shape[0], -1, out.shape[2], -1))


def attend(
    q: Tensor, k: Tensor, v: Tensor, choices: Sequence[Choice], site: Site, fitted: Fitted | None = None,
    pad: Tensor | None = None, min_length: int = 0, board: Board | None = None,
) -> Tensor:  # fmt: skip
    """The attention of a site whose query heads have these choices, computed by the operators that graphs call.

    Shapes as in `Mixture`; fitted: maps and means, where a choice needs them; below `min_length` every head that is not
    gone is dense; board: where a head reads what an earlier attention selected. Differentiable at q, k and v.
    """
    return Mixture(tuple(choices), site, fitted, min_length, board)(q, k, v, pad)
