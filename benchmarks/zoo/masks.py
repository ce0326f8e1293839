"""Masks by value: what a realised mask is, and whether a recovered formula says the same of every position."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from attnopt.ir import Bias, Load, Mask
from benchmarks.zoo.watch import MASKED


class NotChecked(Exception):
    """The formula cannot be compared with the realised mask, and why."""


def name_of(keep: Tensor) -> str:
    """What a realised mask is, by its values: keep is bool (..., Sq, Sk)."""
    flat = keep.reshape(-1, *keep.shape[-2:])
    if bool(flat.all()):
        return "all"
    columns = flat.any(-2, keepdim=True)
    # A row that keeps nothing says nothing of the mask: it is padding.
    rows = flat.any(-1, keepdim=True)
    whole = flat[int(torch.argmax(flat.flatten(1).sum(1)))]
    padded = not bool(columns.all())
    base = shape_of_one(whole)
    explained = (whole & columns) == flat
    if base == "data" or not bool((explained | ~rows).all()):
        return "data"
    return " and ".join(term for term in (base if base != "all" else "", "padding" if padded else "") if term) or "all"


def shape_of_one(keep: Tensor) -> str:
    """The name of one (Sq, Sk) mask: causal and sliding masks may be aligned to the end."""
    queries, keys = keep.shape
    distance = torch.arange(queries)[:, None] - torch.arange(keys)
    if bool(keep.all()):
        return "all"
    kept = distance[keep]
    if not len(kept):
        return "data"
    low, high = int(kept.min()), int(kept.max())
    if torch.equal(keep, (distance >= low) & (distance <= high)):
        reaches_start = high >= queries - 1
        offset = f" offset {-low}" if low else ""
        if reaches_start:
            return f"causal{offset}"
        return f"window |{high}|" if low == -high else f"sliding {high - low + 1}{offset}"
    if bool((keep == keep[:1]).all()):
        return "padding"
    for chunk in range(2, keys):
        same = torch.arange(queries)[:, None] // chunk == torch.arange(keys) // chunk
        if torch.equal(keep, same & (distance >= 0)):
            return f"causal chunks {chunk}"
        if torch.equal(keep, same):
            return f"chunks {chunk}"
    return "data"


BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod, ast.BitAnd: operator.and_, ast.BitOr: operator.or_,
}  # fmt: skip
COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}  # fmt: skip


def smaller(a: Any, b: Any) -> Tensor:
    return torch.minimum(torch.as_tensor(a), torch.as_tensor(b))


def larger(a: Any, b: Any) -> Tensor:
    return torch.maximum(torch.as_tensor(a), torch.as_tensor(b))


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs, "Abs": abs, "min": smaller, "Min": smaller, "max": larger, "Max": larger,
}  # fmt: skip


def evaluate(text: str, names: Mapping[str, Any]) -> Any:
    """The value of a formula over tensors and numbers: arithmetic, comparisons, and, or, not, |x| and reads."""
    pieces = text.split("|")
    if len(pieces) % 2:
        # |x| as the records print it.
        text = "".join(f"abs({piece})" if n % 2 else piece for n, piece in enumerate(pieces))
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise NotChecked(f"the formula is no expression: {text}") from error
    return walk(tree, names)


def walk(node: ast.expr, names: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value=value):
            # 1e30 is printed as an integer, which no tensor of integers holds.
            return float(value) if isinstance(value, int) and abs(value) >= 2**62 else value
        case ast.Name(id=name):
            if name not in names:
                raise NotChecked(f"{name} is known to the formula only")
            return names[name]
        case ast.BoolOp(op=op, values=values):
            parts = [walk(v, names) for v in values]
            result = parts[0]
            for part in parts[1:]:
                result = result & part if isinstance(op, ast.And) else result | part
            return result
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return ~torch.as_tensor(walk(operand, names)).bool()
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -walk(operand, names)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in BINARY:
            return BINARY[type(op)](walk(left, names), walk(right, names))
        case ast.Compare(left=left, ops=ops, comparators=others):
            values = [walk(v, names) for v in (left, *others)]
            result = torch.tensor(True)
            for how, a, b in zip(ops, values, values[1:], strict=False):
                if type(how) not in COMPARE:
                    raise NotChecked(f"the formula holds {ast.unparse(node)}")
                result = result & torch.as_tensor(COMPARE[type(how)](a, b))
            return result
        case ast.Call(func=ast.Name(id=name), args=args) if name in FUNCTIONS:
            return FUNCTIONS[name](*(walk(a, names) for a in args))
        case ast.Subscript(value=value, slice=index):
            held = walk(value, names)
            parts = [walk(p, names) for p in (index.elts if isinstance(index, ast.Tuple) else [index])]
            return read(held, parts)
    raise NotChecked(f"the formula holds {ast.unparse(node)}")


def read(held: Any, index: list[Any]) -> Tensor:
    """``held[index]``; dimensions of size one that the index leaves out are dropped first."""
    if not isinstance(held, Tensor):
        raise NotChecked("the value of a load was not recorded")
    while held.ndim > len(index) and 1 in held.shape:
        held = held.squeeze(held.shape.index(1))
    if held.ndim != len(index):
        raise NotChecked(f"a load of shape {tuple(held.shape)} is read at {len(index)} indices")
    parts = [torch.zeros_like(p) if n == 1 else p for p, n in zip(map(torch.as_tensor, index), held.shape, strict=True)]
    # The records promise that a read outside the tensor is masked by another term.
    return held[tuple(p.long().clamp(0, n - 1) for p, n in zip(parts, held.shape, strict=True))]


def kept_by(mask: Mask, sizes: tuple[int, int, int, int], values: Mapping[str, Any]) -> Tensor:
    """The positions (B, H, Sq, Sk) that a recovered mask keeps; `values` holds what its loads and symbols are."""
    names = dict(values)
    for position, (name, size) in enumerate(zip("bhij", sizes, strict=True)):
        names[name] = torch.arange(size).reshape([size if d == position else 1 for d in range(4)])
    offset = mask.offset if isinstance(mask.offset, int) else evaluate(mask.offset, names)
    distance = names["i"] + offset - names["j"]
    keep = torch.ones(sizes, dtype=torch.bool)
    if mask.causal:
        keep = keep & (distance >= 0)
    if mask.window is not None:
        keep = keep & ((distance.abs() if mask.symmetric else distance) < mask.window)
    if mask.chunk:
        keep = keep & ((names["i"] + offset) // mask.chunk == names["j"] // mask.chunk)
    for term in mask.terms:
        keep = keep & torch.as_tensor(evaluate(term, names)).bool()
    for load in (*mask.loads, *mask.opaque):
        keep = keep & kept_by_load(load, names)
    return keep


def kept_by_load(load: Load, names: Mapping[str, Any]) -> Tensor:
    if load.name not in names:
        raise NotChecked(f"the value of {load.name} was not recorded")
    held = evaluate(str(load), names)
    return held > MASKED if held.is_floating_point() else held.bool()


def kept_by_bias(bias: Bias, sizes: tuple[int, int, int, int], values: Mapping[str, Any]) -> Tensor:
    """The positions (B, H, Sq, Sk) that a bias does not hide: data that is added may be a mask by its values."""
    names = dict(values)
    for position, (name, size) in enumerate(zip("bhij", sizes, strict=True)):
        names[name] = torch.arange(size).reshape([size if d == position else 1 for d in range(4)])
    return (torch.as_tensor(evaluate(bias.text, names)) > MASKED).expand(sizes)


def disagreement(
    mask: Mask, realised: Tensor, sizes: tuple[int, int, int, int], values: Mapping[str, Any], bias: Bias | None = None
) -> str:
    """The first position where a recovered mask differs from the realised one, or "" where there is none.

    realised: bool (..., Sq, Sk, or Sk + 1 with a sink's column last); sizes: (B, H, Sq, Sk). A row that the run masked
    completely is no position: what it computes is nobody's result. bias: data whose values mask as well.
    """
    batch, heads, queries, keys = sizes
    if realised.shape[-1] == keys + 1:
        realised = realised[..., :keys]
    if queries == 1 and realised.shape[-2] > 1:
        # One query a head, packed by KV head: the rows are heads.
        realised = realised.unsqueeze(-2)
    if tuple(realised.shape[-2:]) != (queries, keys):
        raise NotChecked(f"scores of shape {tuple(realised.shape)} are not laid out as {queries} queries, {keys} keys")
    rest = realised.numel() // max(1, queries * keys)
    if rest != batch * heads:
        raise NotChecked(f"scores of shape {tuple(realised.shape)} are not laid out as {batch} by {heads} heads")
    realised = realised.reshape(batch, heads, queries, keys)
    expected = kept_by(mask, sizes, values)
    if bias is not None:
        expected = expected & kept_by_bias(bias, sizes, values)
    differs = (expected != realised) & realised.any(-1, keepdim=True)
    if not bool(differs.any()):
        return ""
    b, h, i, j = (int(x) for x in differs.nonzero()[0])
    says = "keeps" if bool(expected[b, h, i, j]) else "drops"
    where = f"key {j} of query {i} (head {h}, sequence {b})"
    return f"{mask} {says} {where}, the model does not; {int(differs.sum())} positions"
