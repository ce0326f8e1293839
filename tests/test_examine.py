"""`attnopt examine` traces and does not run what it need not; what it says of sites, reasons, breaks and savings."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from attnopt import hf
from attnopt.cli import main
from attnopt.commands import examine_model
from attnopt.errors import OptionError
from attnopt.examine import Break, Examined, Graph, Recompile
from attnopt.ir import GraphReport, Mask, Miss, Site
from attnopt.report import terminal
from attnopt.report.data import examined_json, graphs_json

pytestmark = pytest.mark.slow

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


def test_code_that_used_up_its_recompile_limit_is_examined_all_the_same() -> None:
    model = Attention()
    plain = torch.compile(model, backend="eager", dynamic=False)
    for length in range(4, 13):
        plain(torch.zeros(1, length, dtype=torch.int64))
    (report,) = examine_model(hf.Loaded(model, None, "x"), 20)
    assert len(report.sites) == 1


def test_a_miss_is_shown_with_operation_line_and_page(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    torch._dynamo.reset()
    reports = examine_model(hf.Loaded(Attention(dim=-2), None, "x"), 16)
    (row,) = graphs_json(reports)["rows"]
    assert (row["op"], row["page"]) == ("aten.softmax.int", "docs/reasons.md#softmax-axis")
    terminal.print_graphs(reports)
    said = capsys.readouterr().out
    assert "the soft-max is over dim 2 and the product sums over dim 3" in said
    assert f"{row['node']} at {row['source']}, docs/reasons.md#softmax-axis" in said and "test_examine.py:" in said
    assert row["node"].endswith("(aten.softmax.int)")


def test_the_page_has_what_was_rewritten_before_and_after(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    torch._dynamo.reset()
    page = tmp_path / "page.html"
    given = ("--config", "llama", "--tiny", "--set", "num_hidden_layers=1", "--length", "32", "--prompt-only")
    assert main(["examine", *given, "--html", str(page)]) == 0
    assert "Before and after" in page.read_text(encoding="utf-8")


def test_an_unknown_attention_is_the_option_s_fault() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    with pytest.raises(OptionError, match=r"(?s)--attention no-such.*Use eager or sdpa"):
        hf.load("demo", attention="no-such")


def answer(capsys: pytest.CaptureFixture[str], *command: str) -> Any:
    capsys.readouterr()
    torch._dynamo.reset()
    assert main(["examine", *command, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def shown(data: Any, width: int = 80, **options: Any) -> str:
    out = io.StringIO()
    terminal.print_examined(data, Console(file=out, width=width, markup=False, highlight=False, **options))
    return out.getvalue()


def test_a_prompt_and_steps_with_both_caches_are_examined(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    tiny = ("--config", "llama", "--tiny", "--set", "num_hidden_layers=1", "--length", "32")
    data = answer(capsys, *tiny, "--lengths", "64", "--time")
    assert [(p["phase"], p["cache"], p["sites"]) for p in data["phases"]] == [
        ("prefill", "", 1), ("decode", "DynamicCache", 1), ("decode", "StaticCache", 1)
    ]  # fmt: skip
    prompt, *_ = data["rows"]
    assert (prompt["heads"], prompt["dim"], prompt["mask"], prompt["done"]) == ("4/2", "16", "j <= i", "SDPA is_causal")
    counts = {(row["phase"], row["cache"]): row for row in data["savings"]}
    assert counts["prefill", ""]["pairs_before"] == 4 * 64 * 64
    assert counts["prefill", ""]["pairs_after"] == 4 * 64 * 65 // 2
    assert counts["decode", "DynamicCache"]["pairs_before"] == 4 * 64
    assert [(r["phase"], r["when"]) for r in data["recompiles"]] == [
        ("prefill", "another length"), ("prefill", "another batch"), ("decode", "the next token")
    ]  # fmt: skip
    assert all(t["ratio"] > 0 and not t["wrong"] for graph in data["graphs"] for t in graph["timings"])
    static = next(row for row in data["rows"] if row["cache"] == "StaticCache")
    assert static["mask"] == "j <= cumulative_length"
    assert data["machine"] and not data["breaks"] and not data["notes"]
    said = shown(data)
    assert said.index("3 attentions in 3 graphs") < said.index("prefill:") < said.index("decode, DynamicCache:")
    assert "j ≤ i" in said and "No graph breaks." in said and "3 recompilations" in said and data["machine"] in said
    assert max(map(len, said.splitlines())) <= 80 and "\x1b" not in said


@pytest.mark.parametrize(("name", "sites"), [
    ("gpt2", {"transformer.h.0.attn": "j <= i"}),
    ("t5", {"encoder.block.0.layer.0.SelfAttention": "all", "decoder.block.0.layer.0.SelfAttention": "j <= i",
            "decoder.block.0.layer.1.EncDecAttention": "all"}),
])  # fmt: skip
def test_other_kinds_of_models_are_examined(name: str, sites: dict[str, str], capsys) -> None:
    pytest.importorskip("transformers")
    layers = {"gpt2": ("n_layer=1",), "t5": ("num_layers=1", "--set", "num_decoder_layers=1")}[name]
    data = answer(capsys, "--config", name, "--tiny", "--set", *layers, "--length", "32", "--prompt-only")
    (graph,) = data["graphs"]
    assert {site["path"]: site["mask"] for site in graph["sites"]} == sites and not data["recompiles"]
    kinds = {site["kv"] for site in graph["sites"]}
    assert kinds == ({"fresh", "cross"} if name == "t5" else {"fresh"})


@pytest.mark.parametrize(("command", "said"), [
    ((), "Neither MODEL nor --config"),
    (("demo", "--config", "llama"), "MODEL and --config are both given"),
    (("demo", "--tiny"), "--tiny is for a model that --config names"),
    (("demo", "--set", "num_hidden_layers=1"), "--set is for a model that --config names"),
    (("--config", "lama", "--tiny"), "Did you mean llama"),
    (("--config", "llama", "--tiny", "--device", "nowhere"), "nowhere"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused(command: tuple[str, ...], said: str, capsys) -> None:
    pytest.importorskip("transformers")
    assert main(["examine", *command]) == 2
    assert said in capsys.readouterr().err


def examined() -> Any:
    """Of records made by hand, with text that looks like markup."""
    causal = Mask(causal=True, window=4096)
    sites = tuple(Site(f"layers.{n}.attn[red]", 0, "sdpa", 8, 2, 64, 64, 0.1, "float32", causal) for n in range(3))
    miss = Miss("the [bold]mask cannot be proved", "other", "/a/b/m.py:3", "mask-unproved", "mul_3 (aten.mul.Tensor)")
    report = GraphReport(sites=sites, misses=(miss,))
    graphs = (Graph(report, "prefill"), Graph(GraphReport(fallback="no"), "decode", "StaticCache"))
    breaks = (Break("prefill", "", "print(x)", "It prints.", "", "/a/b/m.py:7", 2),)
    recompiles = (Recompile("prefill", "", "another batch", "f", "m.py:1", ("x.size(0) == 1", "y")),)
    return examined_json(Examined(graphs, breaks, recompiles, ("nothing else",)))


def test_what_is_found_reads_at_any_width_and_without_markup() -> None:
    for width in (60, 140):
        said = " ".join(shown(examined(), width).split())
        assert "layers.0-2.attn[red] ×3" in said and "j ≤ i and i − j < 4096" in said and "left alone" in said
        assert "other: not recognised, the [bold]mask cannot be proved mul_3 (aten.mul.Tensor) at b/m.py:3" in said
        assert "1 graph break prefill: print(x), 2 times. It prints. b/m.py:7" in said
        assert "1 recompilation prefill, another batch: x.size(0) == 1; y f, m.py:1" in said
        assert "decode, StaticCache: 0 attentions" in said and "note: nothing else" in said
    # Where the stream takes no other signs, formulas are as files have them.
    plain = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="replace")
    terminal.print_examined(examined(), Console(file=plain, width=140, markup=False, highlight=False))
    plain.seek(0)
    assert "j <= i and i - j < 4096" in plain.read()
