"""`attnopt examine` traces and does not run what it need not; what it says of a reason."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attnopt import hf
from attnopt.commands import examine_model
from attnopt.errors import OptionError
from attnopt.report import terminal
from attnopt.report.data import graphs_json

RAN: list[str] = []


@torch.library.custom_op("attnopt_tests::noted", mutates_args=())
def noted(x: Tensor) -> Tensor:
    """A copy that says that it was made."""
    RAN.append("noted")
    return x.clone()


@noted.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Attention(nn.Module):
    """softmax over `dim` of the scores; broken: an integer result, read by the program, and a second graph."""

    def __init__(self, dim: int = -1, broken: bool = False) -> None:
        super().__init__()
        self.embed, self.dim, self.broken = nn.Embedding(100, 16), dim, broken

    def forward(self, ids: Tensor) -> Tensor:
        x = noted(self.embed(ids).unflatten(-1, (2, 8)).transpose(1, 2))
        if self.broken and int(ids.max()) > 3:
            x = x * 2
        return torch.softmax(x @ x.mT, self.dim) @ x


def test_a_long_input_is_traced_and_not_run() -> None:
    RAN.clear()
    torch._dynamo.reset()
    (report,) = examine_model(hf.Loaded(Attention(), None, "x"), 40_000)
    assert not RAN and len(report.sites) == 1 and report.rewrites


def test_what_may_steer_the_program_is_run() -> None:
    RAN.clear()
    torch._dynamo.reset()
    first, second = examine_model(hf.Loaded(Attention(broken=True), None, "x"), 16)
    assert RAN == ["noted"] and not first.sites and len(second.sites) == 1


def test_a_miss_is_shown_with_operation_line_and_page(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    torch._dynamo.reset()
    reports = examine_model(hf.Loaded(Attention(dim=-2), None, "x"), 16)
    (row,) = graphs_json(reports)["rows"]
    assert (row["op"], row["page"]) == ("aten.softmax.int", "docs/reasons.md#softmax-axis")
    terminal.print_graphs(reports)
    said = capsys.readouterr().out
    assert "the soft-max is over dim 2 and the product sums over dim 3" in said
    assert f"aten.softmax.int at {row['source']}; docs/reasons.md#softmax-axis" in said and "test_examine.py:" in said


def test_an_unknown_attention_is_the_option_s_fault() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    with pytest.raises(OptionError, match=r"(?s)--attention no-such.*Use eager or sdpa"):
        hf.load("demo", attention="no-such")
