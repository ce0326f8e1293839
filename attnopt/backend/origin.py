"""Which model or function a graph was compiled for: what the running call of torch.compile was made of.

Dynamo gives one compiled graph to every model of the same class and sizes, so a report can be of a twin, too.
Everything is held weakly: a report outlives no model.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType, FunctionType, MethodType
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy


@dataclass(frozen=True)
class Origin:
    """called: the modules and functions that torch.compile was given and that are running, the innermost first;
    parameters: those that the graph reads; shapes: hashes that equal ones of another model or function share."""

    called: tuple[weakref.ref[Any], ...] = ()
    parameters: tuple[weakref.ref[Any], ...] = ()
    shapes: frozenset[int] = frozenset()

    def is_of(self, asked: Any) -> bool:
        """Whether the graph was compiled while `asked`, a module around it or one inside it was called; or, where
        what was called is no module, whether all parameters that the graph reads are of `asked`."""
        called = [held for ref in self.called if (held := ref()) is not None]
        if any(held is asked for held in called):
            return True
        if not isinstance(asked, nn.Module):
            return False
        modules = [held for held in called if isinstance(held, nn.Module)]
        inside = {id(module) for module in asked.modules()}
        if any(id(held) in inside or any(m is asked for m in held.modules()) for held in modules):
            return True
        own = {id(parameter) for parameter in asked.parameters()}
        read = [ref() for ref in self.parameters]
        return not modules and bool(read) and all(id(parameter) in own for parameter in read)

    def is_of_a_twin(self, asked: Any) -> bool:
        """Whether the code that Dynamo compiled serves `asked` as well, if a call of it meets the same guards."""
        return shape_of(asked) in self.shapes


def origin(inputs: Sequence[Any]) -> Origin:
    """Of the graph that is being compiled now, with these inputs."""
    called = list({id(item): item for item in running()}.values())
    parameters = tuple(weakref.ref(x) for x in inputs if isinstance(x, nn.Parameter))
    return Origin(tuple(held_weakly(called)), parameters, frozenset(filter(None, map(shape_of, called))))


def held_weakly(items: Sequence[Any]) -> Iterator[weakref.ref[Any]]:
    for item in items:
        try:
            yield weakref.ref(item)
        except TypeError:
            # An object with slots: its graphs are found by their parameters, or by its code.
            continue


def running() -> Iterator[Any]:
    """What every call of torch.compile on the stack was given, and the modules it is called with.

    No interface of torch says so; a frame of another layout says nothing.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.replace("\\", "/").endswith("torch/_dynamo/eval_frame.py"):
            held = frame.f_locals
            if "callback" in held and "fn" in held:
                yield from parts(held["fn"])
                given = (*held.get("args", ()), *held.get("kwargs", {}).values())
                yield from (item for item in given if isinstance(item, nn.Module))
        frame = frame.f_back


def parts(compiled: Any) -> Iterator[Any]:
    """What a callable stands for: the module that a method is bound to, or the object and its function."""
    while (inner := unwrapped(compiled)) is not compiled:
        compiled = inner
    if isinstance(compiled, MethodType):
        yield compiled.__self__
        if not isinstance(compiled.__self__, nn.Module):
            yield compiled.__func__
    else:
        yield compiled


def inside(subject: Any) -> Any:
    """The module or function itself, of what torch.compile returned or was given."""
    return next(parts(subject))


def unwrapped(compiled: Any) -> Any:
    """What torch.compile was given, out of the module or the function that it returned; else the same."""
    held = getattr(compiled, "__dict__", {})
    inner = held.get("_modules", {}).get("_orig_mod")
    return next((x for x in (inner, held.get("__wrapped__")) if x is not None), compiled)


def is_compiled(subject: Any) -> bool:
    """Whether calls of a module or function go through torch.compile."""
    held = getattr(subject, "__dict__", {})
    return "_torchdynamo_orig_callable" in held or held.get("_compiled_call_impl") is not None


def shape_of(called: Any) -> int | None:
    """Equal for two models of one class and sizes, and for a function made twice; None for anything else."""
    if isinstance(called, nn.Module):
        # A lazy parameter has no shape yet.
        sizes = tuple((name, None if is_lazy(p) else tuple(p.shape), p.dtype) for name, p in called.named_parameters())
        return hash((type(called), sizes))
    return hash(called.__code__) if isinstance(called, FunctionType) else None
