"""Terminal reports of small records built by hand."""

from __future__ import annotations

import io
import itertools
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from attnopt.fingerprint import Fingerprint
from attnopt.ir import DENSE, Choice, GraphReport, Mask, Miss, Refusal, Rewrite, Site, Step
from attnopt.plan import Budget, Lengths, Measured, Plan, Predicted
from attnopt.planner.verify import Record
from attnopt.profile_file import Profile
from attnopt.report import data, page, terminal
from attnopt.report.cells import fold_rows, number_ranges, short_labels, short_source
from attnopt.report.terminal.maps import RAMP, print_map, step_style
from attnopt.statistics import Grid

CAUSAL = Mask(causal=True)


def site(path: str, heads: int = 8) -> Site:
    return Site(path, 0, "sdpa", heads, 2, 64, 64, 0.125, "bfloat16", CAUSAL, "model.py:12")


def report(layers: int = 6) -> GraphReport:
    sites = tuple(site(f"model.layers.{n}.self_attn") for n in range(layers))
    odd = replace(site("model.head[/red].attn"), mask=Mask(window=7))
    return GraphReport(
        sites=(*sites, odd),
        rewrites=tuple(Rewrite(s, "sdpa_causal", note="K and V are not repeated") for s in sites),
        refusals=(Refusal("no exact lowering", odd.name, odd.source),),
        misses=(Miss("the mask cannot be proved", "model.other", "other.py:3"),),
        history=(Step("match_attention", 1.25, 100, 100), Step("lower_exact", 2.5, 100, 60)),
        notes=("the pattern matcher is off",),
    )


def plan() -> Plan:
    narrow = Choice.of("sink_window", {"sink": 4, "alpha": 128, "beta": 0.0})
    made = Plan(
        "demo", Fingerprint("0123456789abcdef", (0.125,)), Budget("loss", 1.0), Lengths((512,), 4096, (2048,)),
        {"layers.0.attn": (narrow,) * 3 + (DENSE,), "layers.1.attn": (DENSE,) * 4},
        Predicted(0.0125, "measured", "ms", 12.5, 5.0, 2.5, 0.4), min_length=256,
    )  # fmt: skip
    return replace(made, measured=(Measured("final", 2048, 32, 65504, 2.0, 2.01, 0.5, 0.75, made.choices_id),))


def profile() -> Profile:
    grid = Grid((0, 4), (8, 16))
    made = Profile.empty(Fingerprint("0123456789abcdef", (0.125,)), grid, ["text"], ["float32"])
    for n in range(2):
        for length in (32, 64):
            seen = made.observation(f"layers.{n}.attn", 4, length)
            seen.rows, seen.samples = 2 * length, 2
            for name in seen.sums:
                seen.sums[name] += torch.rand(seen.sums[name].shape, dtype=torch.float64)
    return made


def records() -> list[Record]:
    one = Measured("verify", 2048, 32, 65504, 2.0, 2.01, 0.5, 0.75, "abc")
    return [
        Record("point 4 of 9", 0.01, 5.0, (one,), True, 0.85),
        Record("point 8 of 9", 0.1, 2.0, (replace(one, increase=2.0, upper_95=float("inf")),), False, 0.85),
    ]


def shown(print_it: object, *args: object, width: int = 160) -> str:
    out = io.StringIO()
    print_it(*args, to=Console(file=out, width=width, markup=False, highlight=False))  # type: ignore[operator]
    return out.getvalue()


def test_equal_layers_fold_into_one_row() -> None:
    text = shown(terminal.print_graphs, [report()])
    assert "model.layers.0-5.self_attn ×6" in text and text.count("self_attn") == 1
    assert "8/2" in text and "j ≤ i" in text and "sdpa_causal [1]" in text
    assert "[1] K and V are not repeated\n" in text
    assert "model.head[/red].attn" in text and "left alone [2]" in text
    assert "[2] no exact lowering\n     model.py:12\n" in text
    assert (
        "not recognised" in text and "model.other: not recognised, the mask cannot be proved\n     other.py:3\n" in text
    )
    assert "passes 3.8 ms: match_attention 1.2, lower_exact 2.5" in text and "note: the pattern matcher is off" in text
    assert "7 attentions in 1 graph: 6 rewritten, 1 left alone, 1 not recognised" in text


def test_what_stands_beside_the_mask_is_shown_with_it() -> None:
    capped = replace(site("layers.0.attn"), softcap=50.0, sink="logit[h]")
    made = replace(report(0), sites=(capped,), misses=(), refusals=())
    assert "j ≤ i, softcap=50, sink=logit[h]" in shown(terminal.print_graphs, [made])


def test_recompiled_graphs_fold_too() -> None:
    text = shown(terminal.print_graphs, [report(), report(), GraphReport(fallback="an unknown op")])
    assert text.count("self_attn") == 1 and "graphs" in text and "an unknown op" in text


def test_nothing_is_said_to_be_nothing() -> None:
    assert "Nothing was compiled" in shown(terminal.print_graphs, [])
    assert "No attention was found" in shown(terminal.print_graphs, [GraphReport()])


def test_only_equal_rows_fold_and_the_number_that_folds_most_counts() -> None:
    rows = [("a.1.b.0", 1), ("a.1.b.1", 1), ("a.2.b.0", 1), ("a.1.b.2", 1), ("a.1.b.3", 2)]
    folded = fold_rows(rows, lambda r: r[0], lambda r: r[1])
    assert [(name, len(members)) for name, members in folded] == [("a.1.b.0-2", 3), ("a.2.b.0", 1), ("a.1.b.3", 1)]
    assert number_ranges([6, 0, 1, 3, 2]) == "0-3,6"
    assert short_labels(["l.0.a", "l.1.a"]) == ("l.*.a", ["0", "1"])
    assert short_labels(["l.0.a", "m.1.a"]) == ("", ["l.0.a", "m.1.a"]) and short_labels([]) == ("", [])


def test_a_source_line_is_shown_without_the_machine() -> None:
    assert short_source("/a/lib/python3/site-packages/pkg/x.py:3") == "pkg/x.py:3"
    assert short_source("/a/b/c/x.py:3") == "c/x.py:3" and short_source("x.py:3") == "x.py:3" and short_source("") == ""


def test_a_plan_is_shown_with_its_figures_and_its_map() -> None:
    text = shown(terminal.print_plan, data.plan_json(plan()))
    assert "1 percent of the dense loss" in text and "2.50x" in text and "at most 0.75" in text
    assert "under 256 tokens every site runs dense" in text
    assert "layers.*.attn × heads" in text and "0 a a a # " in text and "1 # # # # " in text
    assert "window <= 128" in text and "window 128, sink 4" in text
    assert "edited" not in text and "edited" in shown(
        terminal.print_plan, data.plan_json(replace(plan(), choices={"layers.0.attn": (DENSE,)}))
    )


def test_heads_with_far_parts_and_without_attention_are_named() -> None:
    tails = [
        Choice.of("linear", {"sink": 4, "window": 128, "features": 64}),
        Choice.of("taylor", {"sink": 4, "window": 128, "rank": 8}),
        Choice.of("compensation", {"sink": 4, "alpha": 128, "beta": 0.0}),
    ]
    mixed = replace(plan(), choices={"layers.0.attn": (*tails, DENSE), "layers.1.attn": (Choice("pruned"),) * 4})
    text = shown(terminal.print_plan, data.plan_json(mixed))
    assert "0 L T C # " in text and "1 x x x x " in text and " x  pruned" in text and "window <=" not in text
    assert "1 linear, 1 taylor, 1 compensation, 1 dense, 4 pruned" in text
    assert "under 256 tokens every site runs dense but for pruned heads" in text
    (row,) = [line.split() for line in text.splitlines() if line.strip().startswith("pruned")]
    assert row == ["pruned", "4", "0", "none", "0.0", "%"]
    html = page.render({"plan": data.plan_json(mixed)})
    assert html.count('class="choice-gone ') == 4 and html.count('class="choice-linear ') == 2 and "pruned" in html


def test_a_profile_is_shown() -> None:
    text = shown(terminal.print_profile, data.profile_json(profile()))
    assert "windows 8, 16; sinks 0, 4; float32" in text
    assert (
        "Damage of removing the head" in text and "Most damaged beyond a window of 8 (sink 4 kept), of the text" in text
    )
    empty = Profile.empty(Fingerprint("0", ()), Grid((0,), (8,)), [], [])
    assert "holds no site" in shown(terminal.print_profile, data.profile_json(empty))


def test_searches_and_benchmarks_are_shown() -> None:
    text = shown(terminal.print_records, data.records_json(records()))
    assert "point 4 of 9" in text and "holds" in text and "misses" in text and "no bound" in text
    assert "a point holds up to 0.85, the part of the budget" in text
    bench = [{"case": "a", "dense_ms": 1.23456, "ok": True}, {"case": "b", "ratio": 2}]
    text = shown(terminal.print_bench, bench)
    assert "dense ms" in text and "1.235" in text and "yes" in text and "ratio" in text


def test_maps_wrap_under_rulers_and_long_names_lose_their_beginning() -> None:
    rows = {"a." * 30 + "attn": [("x", "")] * 100, "b.7.attn": [("y", "")] * 90}

    def drawn(given: dict[str, list[tuple[str, str]]]) -> str:
        return shown(lambda to: print_map(to, given), width=80)

    text = drawn(rows).splitlines()
    assert max(map(len, text)) <= 80 and len(text) == 9
    assert text[1].split() == ["…" + ("a." * 30 + "attn")[-27:], "x" * 48]
    assert text[2].split() == ["b.7.attn", "y" * 48]
    for start, ruler in ((0, text[0]), (48, text[3]), (96, text[6])):
        margin = len(text[1]) - 48
        numbers = ruler.split()
        assert numbers[0] == str(start) and all(ruler.index(n, margin) == margin + int(n) - start for n in numbers)
    assert text[7].endswith("xxxx") and text[8].strip() == "b.7.attn"
    # Where there is room a head has two columns.
    assert "x x x" in drawn({"a": [("x", "")] * 30})


def test_every_step_of_the_ramp_is_read_without_its_hue() -> None:
    """Lightness rises from step to step, and letters stand out from it."""

    def lightness(colour: str) -> float:
        parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    steps = [lightness(colour) for colour in RAMP]
    assert all(b > a + 0.01 for a, b in itertools.pairwise(steps))
    for n, step in enumerate(steps):
        ink = lightness(step_style(n).split()[0])
        assert (max(ink, step) + 0.05) / (min(ink, step) + 0.05) >= 4.5, n


SPOILT = "a\x1b]0;owned\x07\x1b[31m\x9b2J\x7f"


def test_a_terminal_obeys_no_name(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    choices = {f"{SPOILT}.{name}": heads for name, heads in plan().choices.items()}
    terminal.print_plan(data.plan_json(replace(plan(), model=SPOILT, choices=choices)))
    terminal.print_graphs([replace(report(1), notes=(SPOILT,), sites=(site(SPOILT),))])
    with terminal.progress("always") as told:
        told(SPOILT, 0, 3)
    out, err = capsys.readouterr()
    assert r"a\x1b]0;owned" in out and r"a\x1b]0;owned" in err
    assert not set(out + err) & {"\x1b", "\x07", "\x9b", "\x7f"}


def test_no_colour_where_none_is_wanted(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    terminal.print_plan(data.plan_json(plan()))
    assert "\x1b" not in capsys.readouterr().out
