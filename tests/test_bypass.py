"""What is said where torch.compile wraps a model that generates, as nothing compiled runs in its generate()."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.backends import registry

from attnopt import backend
from attnopt.backend import bypass


class Generating(nn.Module):
    """As far as a transformers model can be told from any other."""

    generation_config = object()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1

    def generate(self, x: torch.Tensor) -> torch.Tensor:
        return self(x)


@pytest.fixture(autouse=True)
def unsaid(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(bypass, "_said", False)
    yield


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == bypass.log.name]


def enabled(model: nn.Module) -> nn.Module:
    model._attnopt = object()  # type: ignore[assignment]
    return model


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def test_it_is_said_once_of_models_that_generate(caplog: pytest.LogCaptureFixture) -> None:
    quiet = [None, nn.Linear(2, 2), Generating().train(), enabled(Generating().eval())]
    for model in [*quiet, compiled_in_place(Generating().eval())]:
        bypass.say(model)
    assert not said(caplog)
    for _ in range(2):
        bypass.say(Generating().eval())
    (text,) = said(caplog)
    assert "attnopt.enable(model)" in text and 'model.compile(backend="attnopt")' in text


def test_a_graph_of_a_wrapped_model(caplog: pytest.LogCaptureFixture) -> None:
    """Where the wrapping was not seen: not while training, and not of the model's own compiled forward."""

    def backend(gm: Any, inputs: Any) -> Any:
        bypass.called()
        return gm.forward

    model, x = Generating().eval(), torch.zeros(2)
    torch.compile(model, backend=backend)(x)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model.forward, backend=backend)(x)
        assert not said(caplog)
        torch._dynamo.reset()
        torch.compile(model, backend=backend)(x)
    assert len(said(caplog)) == 1


def test_it_is_said_where_the_backend_is_looked_up(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch imports a backend where it is first asked for by its name: here a copy of it, by another name."""

    class EntryPoint:
        def load(self) -> Any:
            spec = importlib.util.spec_from_file_location("imported_again", backend.__file__)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            monkeypatch.setitem(sys.modules, "imported_again", module)
            spec.loader.exec_module(module)
            return module.attnopt

    for names in (registry._BACKENDS, registry._COMPILER_FNS):
        for name in ("found_once", "found_late"):
            monkeypatch.setitem(names, name, None)
            del names[name]
    registry._BACKENDS.update(found_once=EntryPoint(), found_late=EntryPoint())  # type: ignore[arg-type]
    torch.compile(nn.Linear(2, 2), backend="found_once")
    assert not said(caplog)
    torch.compile(Generating().eval(), backend="found_late", dynamic=False)
    assert len(said(caplog)) == 1


def test_commands_that_compile_models_to_time_them_are_quiet(caplog: pytest.LogCaptureFixture) -> None:
    bypass.keep_quiet()
    bypass.say(Generating().eval())
    assert not said(caplog)
