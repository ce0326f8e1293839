"""attnopt.explain: what it says of models, functions, plans and profiles, as text, as HTML, as data and as a page."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import attnopt
from attnopt import backend
from attnopt.errors import OptionError
from attnopt.fingerprint import Fingerprint
from attnopt.ir import DENSE, Choice, GraphReport, Miss, Step
from attnopt.plan import Budget, Lengths, Plan, Predicted
from attnopt.profile_file import Profile
from attnopt.report.explained import NEVER_COMPILED, NOT_YET, SHARED, Explanation
from attnopt.report.history import HOW_TO_KEEP
from attnopt.statistics import Grid

X = torch.randn(1, 8, 16)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        n = torch.arange(x.shape[1])
        scores = (q @ k.transpose(-2, -1)).masked_fill(n[None, :] > n[:, None], -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def plan() -> Plan:
    narrow = Choice.of("sink_window", {"sink": 4, "alpha": 128, "beta": 0.0})
    return Plan(
        "demo", Fingerprint("0123456789abcdef", (0.125,)), Budget("loss", 1.0), Lengths((512,), 4096, (2048,)),
        {"layers.0.attn": (narrow,) * 3 + (DENSE,)}, Predicted(0.0125, "measured", "ms", 12.5, 5.0, 2.5, 0.4),
    )  # fmt: skip


class Seen(HTMLParser):
    """The tags and the text of a page or a piece of one."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        assert not any(name.startswith("on") or name == "src" for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_model_before_and_after_its_first_call(eagerly: list[Any], tmp_path: Path) -> None:
    backend.clear_reports()
    model = Attention()
    assert NEVER_COMPILED in str(attnopt.explain(model))
    compiled = torch.compile(model, backend="attnopt")
    assert NOT_YET in str(attnopt.explain(compiled)) and not attnopt.explain(compiled).graphs
    compiled(X)
    found = attnopt.explain(compiled)
    assert found.graphs == tuple(backend.reports()) and found.name == "Attention" and found.generation is None
    assert "1 attention in 1 graph: 1 rewritten" in " ".join(str(found).split())
    assert (
        str(found).startswith("Attention: compiled by attnopt")
        and "\x1b" not in str(found)
        and repr(found) == str(found)
    )
    data = json.loads(json.dumps(found.to_json()))
    assert data["graphs"]["counts"]["rewritten"] == 1 and len(data["pictures"]) == 1 and "environment" in data
    assert [step["name"] for step in data["history"]] == [
        step["name"] for step in data["graphs"]["graphs"][0]["passes"]
    ]
    html = found._repr_html_()
    seen = Seen(html)
    assert "1 attention in 1 graph: 1 rewritten" in seen.text and "SDPA is_causal" in seen.text
    assert not {"script", "link", "img", "iframe"} & set(seen.tags)
    # Everything of the style is of this piece alone.
    selectors = re.findall(r"([^{}]+)\{", re.findall(r"<style>(.*?)</style>", html, re.S)[0])
    assert all(one.strip().startswith(".attnopt") for selector in selectors for one in selector.split(","))
    page = found.write(tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>") and "SDPA is_causal" in page
    copied = torch.compile(copy.deepcopy(model), backend="attnopt")
    copied(X)
    assert attnopt.explain(copied).notes == (SHARED,) and len(attnopt.explain(copied).graphs) == 1


def test_plans_and_profiles_are_shown_as_the_command_line_shows_them() -> None:
    made = plan()
    found = attnopt.explain(made)
    assert found.plan is made and f"plan {made.id}" in str(found) and "layers.0.attn" in str(found)
    assert found.to_json()["plan"]["id"] == made.id
    assert "layers.0.attn" in Seen(found._repr_html_()).text and "background-color" in found._repr_html_()
    profile = Profile.empty(Fingerprint("0123456789abcdef", (0.125,)), Grid((0, 4), (8, 16)), ["text"], ["float32"])
    seen = profile.observation("layers.0.attn", 4, 32)
    seen.rows, seen.samples = 64, 2
    for name in seen.sums:
        seen.sums[name] += torch.rand(seen.sums[name].shape, dtype=torch.float64)
    assert "layers.0.attn" in str(attnopt.explain(profile)) and "profile" in attnopt.explain(profile).to_json()


def test_what_cannot_be_explained() -> None:
    with pytest.raises(OptionError, match="A dict cannot be explained"):
        attnopt.explain({})


def report(texts: bool) -> GraphReport:
    before, after = "x = input\ny = aten.relu.default(x)\nreturn [y]\n", "x = input\nreturn [x]\n"
    history = (
        Step("capture", 20.0, 4, 3),
        Step("normalise", 1.5, 3, 2, after if texts else ""),
        Step("match_attention", 0.25, 2, 2),
    )
    return GraphReport(history=history, source=before if texts else "")


def test_the_history_is_a_log_with_what_changed() -> None:
    history = Explanation("net", (report(True), report(True))).history
    assert [(c.graph, c.name, c.changed) for c in history][1:4] == [
        (0, "normalise", True), (0, "match_attention", False), (1, "capture", False),
    ]  # fmt: skip
    assert "-y = aten.relu.default(x)" in history[1].diff().splitlines() and history[2].diff() == ""
    lines = str(history).splitlines()
    assert lines[0] == "graph 0" and "graph 1" in lines
    assert lines[2].split() == ["normalise", "1.5", "ms", "3", "->", "2", "nodes"]
    assert "    -y = aten.relu.default(x)" in lines and HOW_TO_KEEP not in str(history)
    assert "<del>    -y = aten.relu" in Explanation("net", (report(True),))._repr_html_()


def test_without_texts_the_history_says_how_to_keep_them() -> None:
    history = Explanation("net", (report(False),)).history
    assert str(history).endswith(HOW_TO_KEEP) and not history[1].diff() and history[1].changed
    assert str(Explanation("net").history) == "No pass has run."


def test_text_of_a_model_is_only_text() -> None:
    odd = Miss("no <img src=x onerror=alert(1)> known", "layers.<script>alert(1)</script>", "model.py:1")
    found = Explanation("<script>", (replace(report(True), misses=(odd,), source="<b>\udc80</b>\n"),), notes=("<i>",))
    seen = Seen(found._repr_html_())
    assert not {"script", "img", "b", "i"} & set(seen.tags)
    assert "layers.<script>alert(1)</script>" in seen.text and "no <img src=x onerror=alert(1)> known" in seen.text
    assert "[red]" in str(Explanation("[red]", (report(True),)))
