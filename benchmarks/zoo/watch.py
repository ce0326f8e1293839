"""Ground truth without a matcher: the attention calls of an eager run, and the mask that each of them realised.

A soft-max counts as attention where its input came from a product of two activations and its output goes into another
product: a router's soft-max does neither. Tensors are followed by identity while the model runs, through whatever keeps
a score a score (scale, cast, mask, dropout, views). SDPA calls count as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# A score below this was masked: no tiny model scores so low, and every fill value in use is lower (-1e4 and less).
MASKED = -5000.0

SDPA = {torch._C._nn.scaled_dot_product_attention}
SOFTMAX = {torch.softmax, F.softmax, Tensor.softmax, torch.special.softmax}
PRODUCTS = {
    torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, torch.bmm, Tensor.bmm, torch.baddbmm,
    Tensor.baddbmm, torch.einsum, F.linear,
}  # fmt: skip
# Names of what keeps a score a score, or a weight a weight; reductions and selections of experts are not among them.
TRANSPARENT = {
    "to", "type_as", "type", "float", "half", "bfloat16", "double", "clone", "contiguous", "detach", "view", "reshape",
    "transpose", "permute", "unsqueeze", "squeeze", "expand", "expand_as", "flatten", "unflatten", "swapaxes",
    "swapdims", "narrow", "chunk", "split", "unbind", "getitem", "__getitem__", "add", "__add__", "__radd__", "add_",
    "__iadd__", "sub", "__sub__", "__isub__", "sub_", "mul", "__mul__", "__rmul__", "mul_", "__imul__", "div",
    "__truediv__", "div_", "__itruediv__", "tanh", "masked_fill", "masked_fill_", "where", "dropout", "clamp", "max",
    "maximum", "nan_to_num", "cat", "concat", "pad", "_pad", "gather", "take_along_dim", "view_as", "reshape_as", "T",
    "mT", "__get__", "as_strided", "roll", "softmax", "true_divide", "multiply", "subtract", "index_add", "movedim",
    "repeat_interleave", "repeat", "unfold", "stack", "select", "slice", "divide",
}  # fmt: skip

SUBTRACTIONS = {"sub", "__sub__", "sub_", "__isub__", "subtract"}


@dataclass
class Call:
    """One attention of an eager run. keep: bool (..., Sq, Sk), None where nothing was masked by an operand.

    `form` is "sdpa" or "soft-max"; `path` the innermost module; `biased` says that something other than a mask was
    added to the scores.
    """

    form: str
    path: str
    keep: Tensor
    biased: bool = False
    confirmed: bool = False


@dataclass
class Tag:
    """What is known of a tensor: it is a score, or a weight of `call`; `biased` as in Call.

    `sink`: its last column is no key, but was appended for the soft-max. `keep`: what was not masked before the row's
    maximum was subtracted, which makes zeros of a row that is masked completely.
    """

    call: Call | None = None
    biased: bool = False
    sink: bool = False
    keep: Tensor | None = None


@dataclass
class Watch(TorchFunctionMode):
    """Records `calls` while it is entered; `model` gives the names of modules."""

    model: nn.Module
    calls: list[Call] = field(default_factory=list)
    tags: dict[int, Tag] = field(default_factory=dict)
    alive: list[Tensor] = field(default_factory=list)
    stack: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.names = {id(module): name for name, module in reversed(list(self.model.named_modules()))}
        self.hooks: list[Any] = []

    def __enter__(self) -> Any:
        if not self.hooks:
            modules = nn.modules.module
            self.hooks = [
                modules.register_module_forward_pre_hook(self.entered),
                modules.register_module_forward_hook(self.left, always_call=True),
            ]
        return super().__enter__()

    def entered(self, module: nn.Module, _: Any) -> None:
        self.stack.append(self.names.get(id(module), ""))

    def left(self, module: nn.Module, _: Any, __: Any) -> None:
        self.stack.pop()

    def close(self) -> list[Call]:
        """The attention calls; stops following modules."""
        for hook in self.hooks:
            hook.remove()
        return [call for call in self.calls if call.confirmed]

    def tag_of(self, value: Any) -> Tag | None:
        if isinstance(value, Tensor):
            return self.tags.get(id(value))
        if isinstance(value, (list, tuple)):
            return next((tag for v in value if (tag := self.tag_of(v)) is not None), None)
        return None

    def mark(self, value: Any, tag: Tag) -> None:
        for tensor in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(tensor, Tensor):
                self.tags[id(tensor)] = tag
                self.alive.append(tensor)

    @property
    def path(self) -> str:
        return self.stack[-1] if self.stack else ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            # Its soft-max is called inside; by name it would be one opaque call.
            with mock.patch.object(F, "has_torch_function", lambda _: False), self:
                return func(*args, **kwargs)
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "").removeprefix("_softmax_backward")
        if func in SDPA:
            self.saw_sdpa(*args, **kwargs)
        elif func in SOFTMAX or name == "softmax":
            self.saw_softmax(args[0] if args else kwargs["input"], result)
        elif func in PRODUCTS:
            self.saw_product(func, args, result)
        elif name in TRANSPARENT:
            self.saw_transparent(name, (*args, *kwargs.values()), result)
        return result

    def saw_sdpa(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, **_: Any,
    ) -> None:  # fmt: skip
        keep = torch.ones(*query.shape[:-1], key.shape[-2], dtype=torch.bool)
        biased = False
        if is_causal:
            keep = keep.tril()
        if attn_mask is not None:
            allowed = attn_mask if attn_mask.dtype == torch.bool else attn_mask > MASKED
            biased = attn_mask.dtype != torch.bool and bool((attn_mask[allowed] != 0).any())
            keep = keep & allowed
        self.calls.append(Call("sdpa", self.path, keep.detach(), biased, confirmed=True))

    def saw_softmax(self, scores: Tensor, weights: Any) -> None:
        tag = self.tag_of(scores)
        if tag is None or tag.call is not None or scores.ndim < 3:
            return
        keep = tag.keep if tag.keep is not None and tag.keep.shape == scores.shape else (scores > MASKED).detach()
        call = Call("soft-max", self.path, keep[..., :-1] if tag.sink else keep, tag.biased)
        self.calls.append(call)
        self.mark(weights, Tag(call))

    def saw_product(self, func: Any, args: Any, result: Any) -> None:
        tags = [tag for value in args if (tag := self.tag_of(value)) is not None]
        for tag in tags:
            if tag.call is not None and func is not F.linear:
                tag.call.confirmed = True
        if func is not F.linear and not any(tag.call for tag in tags):
            self.mark(result, Tag(biased=func in (torch.baddbmm, Tensor.baddbmm)))

    def saw_transparent(self, name: str, values: Any, result: Any) -> None:
        tag = self.tag_of(list(values))
        if tag is None:
            return
        if "add" in name and tag.call is None and not tag.biased:
            others = [v for v in values if isinstance(v, Tensor) and self.tag_of(v) is None and v.is_floating_point()]
            if any(bool(((v != 0) & (v > MASKED)).any()) for v in others):
                tag = replace(tag, biased=True)
        if name in SUBTRACTIONS and tag.call is None and tag.keep is None and len(values) > 1:
            scores, taken = values[:2]
            if isinstance(taken, Tensor) and taken.shape[-1:] == (1,) and self.tag_of(scores) is tag:
                tag = replace(tag, keep=(scores > MASKED).detach())
        if name in ("cat", "concat") and tag.call is None and isinstance(result, Tensor):
            tag = replace(tag, sink=result.shape[-1] == scored(values).shape[-1] + 1)
        self.mark(result, tag)


def scored(pieces: Any) -> Tensor:
    """The widest of the tensors that a cat joins: the scores, beside a column."""
    flat = [t for piece in pieces for t in (piece if isinstance(piece, (list, tuple)) else [piece])]
    return max((t for t in flat if isinstance(t, Tensor)), key=lambda t: t.shape[-1])
