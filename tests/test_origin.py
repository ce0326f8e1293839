"""Which model or function a report belongs to: several in a process, shared parts, copies, and those that are gone."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from attnopt import backend
from attnopt.backend import reports_of


class Attention(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.project = nn.Linear(width, 3 * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return ((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).flatten(2)


class Around(nn.Module):
    """An attention, after something else and a break of the graph."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(16, 16), inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).softmax(-1)
        torch._dynamo.graph_break()
        return self.inner(x)


X = torch.randn(1, 8, 16)


@pytest.fixture(autouse=True)
def no_reports(eagerly: list[Any]) -> Iterator[None]:
    backend.clear_reports()
    yield
    backend.clear_reports()


def compiled(what: Any) -> Any:
    made = torch.compile(what, backend="attnopt")
    made(X)
    return made


def paths(subject: Any) -> list[list[str]]:
    return [[site.path for site in report.sites] for report in reports_of(subject)[0]]


def test_each_model_has_its_own_graphs() -> None:
    one, two = Attention(), Around(Attention())
    first, second = compiled(one), compiled(two)
    assert paths(first) == paths(one) == [["attention"]]
    assert paths(second) == paths(two) == [[], ["inner"]]
    assert len(backend.reports()) == 3


def test_a_model_that_compiles_itself() -> None:
    model, other = Attention(), Around(Attention())
    model.compile(backend="attnopt")
    assert reports_of(model) == ([], False)
    other.compile(backend="attnopt")
    other(X), model(X)
    assert paths(model) == [["attention"]] and len(paths(other)) == 2


def test_models_that_share_a_part() -> None:
    """The part is in both; each model has its own graphs alone, though one of them reads the part's parameters only."""
    part = Attention()
    one, two = Around(part), nn.Sequential(nn.Tanh(), part)
    compiled(one)
    assert len(paths(one)) == 2 and paths(two) == [] and len(paths(part)) == 2
    compiled(two)
    assert len(paths(one)) == 2 and paths(two) == [["1"]] and len(paths(part)) == 3


def test_layers_compiled_one_by_one_are_the_model_s() -> None:
    model = nn.Sequential(Around(Attention()), Attention())
    model[1].compile(backend="attnopt")
    model(X)
    assert paths(model) == paths(model[1]) == [["attention"]] and paths(model[0]) == []


def of_closure(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    def step(x: torch.Tensor) -> torch.Tensor:
        return model(x).sum()

    return step


def test_a_function_s_graphs_are_those_of_the_model_whose_parameters_it_reads() -> None:
    one, two = Attention(), Around(Attention())
    first, second = of_closure(one), of_closure(two)
    made = compiled(first)
    compiled(second)
    assert len(paths(one)) == len(paths(first)) == len(paths(made)) == 1
    # The sum after the break is the function's alone.
    assert len(paths(two)) == 2 and len(paths(second)) == 3


def test_a_function_without_parameters_and_a_method() -> None:
    def attend(x: torch.Tensor) -> torch.Tensor:
        return (x @ x.transpose(-2, -1)).softmax(-1) @ x

    class Step:
        @torch.compile(backend="attnopt")
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return attend(x) + 1

        def plain(self, x: torch.Tensor) -> torch.Tensor:
            return attend(x) - 1

    made, step = compiled(attend), Step()
    step(X)
    bound = compiled(step.plain)
    assert len(paths(made)) == len(paths(attend)) == len(paths(Step.__call__)) == len(paths(bound)) == 1
    assert len(backend.reports()) == 3


def test_a_copy_that_dynamo_gives_the_same_code() -> None:
    model = Attention()
    compiled(model)
    twin = compiled(copy.deepcopy(model))
    assert len(backend.reports()) == 1
    found, its_own = reports_of(twin)
    assert len(found) == 1 and not its_own
    # Neither of other sizes, nor what is not compiled at all.
    assert reports_of(torch.compile(Attention(32), backend="attnopt")) == ([], False)
    assert reports_of(copy.deepcopy(model)) == ([], True)


def test_what_is_compiled_again_comes_after() -> None:
    model = compiled(Attention())
    torch._dynamo.reset()
    model(X)
    assert len(paths(model)) == 2


def test_a_report_keeps_no_model_alive() -> None:
    model = Attention()
    made = compiled(model)
    gone = weakref.ref(model)
    held = weakref.ref(model.project.weight)
    torch._dynamo.reset()
    del model, made
    gc.collect()
    assert gone() is None and held() is None and len(backend.reports()) == 1
    assert paths(Attention()) == []


def test_a_parameter_without_a_shape_is_no_failure() -> None:
    """A lazy layer that the call does not reach."""
    model = Around(Attention())
    model.add_module("later", nn.LazyLinear(3))
    found = torch.compile(model, backend="attnopt")(X)
    assert torch.allclose(found, model(X), atol=1e-5)
    reports, own = reports_of(model)
    assert own and reports and not any(report.fallback for report in reports)


def test_what_cannot_be_told_costs_no_graph(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken(*_: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(backend.dump, "graph", broken)
    model = Attention()
    assert torch.allclose(torch.compile(model, backend="attnopt")(X), model(X), atol=1e-5)
    assert [len(report.rewrites) for report in reports_of(model)[0]] == [1]
    assert "could not tell what it did: OSError: the disk is full" in caplog.text
