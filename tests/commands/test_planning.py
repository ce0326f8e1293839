"""`attnopt plan`, `calibrate`, `show`, `explain`, `bench`: from a profile to a plan that runs, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from attnopt.cli import main
from attnopt.cost import CostTable

from .lines import LENGTH, LENGTHS, SITE, Fails, bench_command, plan_command, snapshot


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["eagerly", pytest.param("inductor", marks=pytest.mark.full)])
def test_from_profile_to_bench(
    compiler: str, planned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    def answer(*command: str) -> Any:
        capsys.readouterr()
        assert main([*command, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    if compiler == "eagerly":
        request.getfixturevalue(compiler)
    profile, plan = tmp_path / "profile", tmp_path / "plan.json"
    model, words = str(planned / "shallow"), str(planned / "text.py")
    made = answer("profile", model, "--lengths", LENGTHS, "--samples", "1", "--text", words,
                  "--out", str(profile))  # fmt: skip
    assert made["profile_file"] == str(profile) and profile.exists()
    found = answer(*plan_command(planned, plan, model=model, profile=str(profile)))
    assert found["plan_file"] == str(plan) and found["search"]
    assert answer("show", str(plan))["plan"] and answer("show", str(profile))["profile"]
    explained = answer("explain", str(plan), f"{SITE}.3", "--profile", str(profile))
    rows = explained["candidates"]
    assert [r["why"] for r in rows if r["chosen"]] == ["chosen"] and all(r["why"] for r in rows)
    # The table that stands in for a measured one is in no folder, and that is said.
    assert explained["reason"] and any("not stored" in note for note in explained["notes"])
    timed = answer(*bench_command(planned, "shallow", plan))["bench"]
    assert {"eager", "inductor", "attnopt exact", "attnopt planned"} <= {r["variant"] for r in timed}
    assert all(r["milliseconds"] > 0 for r in timed)
    assert answer("env")


def test_generation_is_timed_with_every_cache(planned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    given = [str(planned / "shallow"), "--plan", str(planned / "plan.json"), "--text", str(planned / "text.py")]
    sizes = ["--lengths", "64", "--generate", "3", "--batch", "2", "--padded", "--rounds", "1"]
    assert main(["bench", *given, *sizes, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["bench"]
    assert [r["variant"] for r in rows] == ["DynamicCache", "StaticCache", "attnopt exact", "attnopt planned"]
    dynamic, static, exact, _ = rows
    assert dynamic["error"] == 0.0 and static["error"] < 1e-5 and exact["error"] < 1e-5
    assert all(r["batch"] == 2 and r["tokens_per_second"] > 0 and r["cache_mib"] > 0 for r in rows)
    assert dynamic["times_dynamic"] == static["times_static"] == 1.0


def test_the_plan_that_was_written_runs(planned: Path, eagerly: list[Any]) -> None:
    from attnopt import backend, hf

    (final,) = [m for m in json.loads((planned / "plan.json").read_text())["measured"] if m["split"] == "final"]
    assert 0 <= final["planned_retrieval"] <= 1
    model = hf.load(str(planned / "shallow")).model
    backend.clear_reports()
    call = torch.compile(model, backend="attnopt", options={"plan": str(planned / "plan.json")})
    ids = torch.arange(LENGTH)[None]
    with torch.no_grad():
        logits = call(ids, use_cache=False).logits
    assert logits.isfinite().all()
    (report,) = backend.reports()
    assert [r.path for r in report.rewrites] == [SITE]
    assert all("span kernel" in r.lowering and r.choices for r in report.rewrites)


@pytest.mark.parametrize("model", ["heads", "model", "weights"])
def test_another_models_profile_and_plan_are_refused(model: str, planned: Path, fails: Fails, tmp_path: Path) -> None:
    assert "another model" in fails(plan_command(planned, tmp_path / "x", model=str(planned / model)))
    message = fails(bench_command(planned, model))
    assert {"heads": "4 heads", "model": "model.layers.1.self_attn", "weights": "another model"}[model] in message
    assert not list(tmp_path.iterdir())


def test_a_text_too_short_to_verify_on(planned: Path, fails: Fails, tmp_path: Path) -> None:
    assert "--samples 2 are too few sequences" in fails([*plan_command(planned, tmp_path / "x"), "--samples", "2"])
    (tmp_path / "short").write_text("def f(): pass")
    assert "too short" in fails(plan_command(planned, tmp_path / "x", text=str(tmp_path / "short")))
    assert [p.name for p in tmp_path.iterdir()] == ["short"]


def first_choices(plan: dict[str, Any]) -> dict[str, Any]:
    return plan["sites"][SITE]["choices"]


def negative_sink(plan: dict[str, Any]) -> None:
    first_choices(plan).clear()
    first_choices(plan)["0-3"] = {"candidate": "sink_window", "sink": -1, "alpha": 64, "beta": 0.0}


def unknown_key(plan: dict[str, Any]) -> None:
    plan["fastest"] = True


def missing_head(plan: dict[str, Any]) -> None:
    first_choices(plan).clear()
    first_choices(plan)["0-2"] = {"candidate": "dense"}


def unknown_candidate(plan: dict[str, Any]) -> None:
    first_choices(plan).clear()
    first_choices(plan)["0-3"] = {"candidate": "sink_windw"}


EDITS = {negative_sink: "sink", unknown_key: "fastest", missing_head: "head 3", unknown_candidate: "sink_windw"}


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_a_badly_edited_plan_is_refused(edit: Any, planned: Path, fails: Fails, tmp_path: Path) -> None:
    data = json.loads((planned / "plan.json").read_text())
    edit(data)
    broken = tmp_path / "plan.json"
    broken.write_text(json.dumps(data))
    for command in (["show", str(broken)], bench_command(planned, plan=broken)):
        message = fails(command)
        assert EDITS[edit] in message and str(broken.name) in message


def test_truncated_files_are_refused(planned: Path, fails: Fails, tmp_path: Path) -> None:
    for name in ("plan.json", "profile"):
        whole = (planned / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        assert name in fails(["show", str(tmp_path / name)])
    before = snapshot(tmp_path)
    assert "truncated" in fails(plan_command(planned, tmp_path / "x", profile=str(tmp_path / "profile")))
    assert "plan.json" in fails(
        ["explain", str(tmp_path / "plan.json"), f"{SITE}.0", "--profile", str(planned / "profile")]
    )
    assert snapshot(tmp_path) == before


def test_heads_that_are_not_there(planned: Path, fails: Fails) -> None:
    command = ["--profile", str(planned / "profile")]
    assert f"{SITE}.0" in fails(["explain", str(planned / "plan.json"), f"{SITE}.4", *command])
    assert f"{SITE}.0" in fails(["explain", str(planned / "plan.json"), "model.layers.0.self_atn.1", *command])
    assert "no file" in fails(["show", str(planned / "none.json")])


def test_a_budget_that_no_plan_keeps_writes_nothing(planned: Path, fails: Fails, tmp_path: Path) -> None:
    options = plan_command(planned, tmp_path / "plan.json")
    at = options.index("--max-loss-increase")
    page = tmp_path / "page.html"
    said = fails([*options[:at], "--max-kl", "1e-300", *options[at + 2 :], "--html", str(page)], code=1)
    partial = tmp_path / "plan.json.partial"
    assert "budget" in said and f"What was measured is kept in {partial}" in said
    assert sorted(tmp_path.iterdir()) == [page, partial]
    assert f"{page} has the search and the profile." in said
    # The page has the refusal, every point that was tried and the map of the profile.
    told = page.read_text(encoding="utf-8")
    assert "No plan was found within the budget of 1e-300 nats" in told and "misses" in told and "point " in told
    assert "Local heads" in told and 'role="grid"' in told


def test_a_contradiction_is_refused_with_2_and_leaves_the_old_plan(planned: Path, fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("the old one")
    options = plan_command(planned, tmp_path / "plan.json", **{"max-loss-increase": "0"})
    message = fails([*options, "--min-speedup", "1.5"])
    assert "A budget of 0 percent of the dense loss contradicts a speed-up of 1.5" in message
    assert "The budget binds" in message and "a speed-up of 1.00" in message
    message = fails([*options, "--min-speedup", "1000"])
    assert "A speed-up of 1000 cannot be had" in message and "at the most" in message
    message = fails([*options, "--protect", "model.layers.0.self_atn"])
    assert "--protect model.layers.0.self_atn: there is no such layer" in message and "Did you mean" in message
    assert snapshot(tmp_path) == {"plan.json": b"the old one"}


def test_a_profile_without_a_backward_pass_is_not_planned_from(
    planned: Path, fails: Fails, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "quick"
    command = [
        "profile",
        str(planned / "shallow"),
        "--lengths",
        "128",
        "--samples",
        "1",
        "--text",
        str(planned / "text.py"),
    ]
    assert main([*command, "--out", str(out), "--forward-only"]) == 0
    assert "squared change of the output" in " ".join(capsys.readouterr().out.split())
    message = fails(plan_command(planned, tmp_path / "plan.json", profile=str(out)))
    assert "does not hold t2" in message and "without --forward-only" in message
    assert "do not add" in fails(["merge", str(out), str(planned / "profile"), "--out", str(tmp_path / "both")])
    assert "no labels" in fails([*command, "--out", str(out), "--forward-only", "--labels", "data"])
    assert [p.name for p in tmp_path.iterdir()] == ["quick"]


def test_a_plan_for_a_device_that_is_not_at_hand_says_so(
    planned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = {"length": "1000000", "device-preset": "h100", "tensor-parallel": "2", "protect": "0.1", "max-rules": "2"}
    command = plan_command(planned, tmp_path / "plan.json", **wanted)
    capsys.readouterr()
    assert main([*command, "--json", "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"attnopt plan {planned / 'shallow'}" in page and "Before and after" in page
    found = json.loads(capsys.readouterr().out)["plan"]
    assert found["predicted"]["cost"] == "roofline" and found["cost_table"].startswith("roofline-h100-tp2-")
    assert found["constraints"]["protect"] == ["0.1"] and found["sites"][SITE][1]["dense"]
    final = next(m for m in found["measured"] if m["split"] == "final")
    assert final["kl"] >= 0 and 0 < final["top1"] <= 1
    assert main(["show", str(tmp_path / "plan.json")]) == 0
    assert "predicted (by a roofline, nothing timed)" in " ".join(capsys.readouterr().out.split())


def test_kernels_are_timed_once_and_after_an_interruption_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ATTNOPT_CACHE", str(tmp_path))
    monkeypatch.setenv("ATTNOPT_TARGET", "reference")
    from attnopt.cost import timing

    timed: list[list[int]] = []
    measure = timing.measure

    def counted(*args: Any, **kwargs: Any) -> CostTable:
        timed.append(list(args[5]))
        if len(timed) == 2:
            raise KeyboardInterrupt
        return measure(*args, **kwargs)

    monkeypatch.setattr(timing, "measure", counted)
    command = ["calibrate", "--heads", "2", "--head-dim", "8", "--lengths", "64,96", "--rounds", "1", "--json"]
    assert main(command) == 1 and "run the same command again" in capsys.readouterr().err
    assert main(command) == 0
    (table,) = json.loads(capsys.readouterr().out)["tables"]
    assert timed == [[64], [96], [96]] and [at["length"] for at in table["lengths"]] == [64, 96]
    assert Path(table["path"]).is_relative_to(tmp_path) and CostTable.load(Path(table["path"])).id == table["id"]
    assert main(command[:-1]) == 0 and len(timed) == 3
    assert table["path"] in capsys.readouterr().out


def test_verified_lengths_are_those_profiled_and_one_beyond() -> None:
    from types import SimpleNamespace

    from attnopt.commands.planning import verified_lengths

    plain: Any = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=4096))
    assert verified_lengths((256, 1024), 2048, plain) == [256, 1024, 2048]
    assert verified_lengths((256, 1024), 512, plain) == [256, 1024, 2048]
    assert verified_lengths((256, 1024), 1_000_000, plain) == [256, 1024, 2048]
    assert verified_lengths((1024, 4096), 8192, plain) == [1024, 4096]
    assert verified_lengths((1024, 4096), 8192, SimpleNamespace()) == [1024, 4096, 8192]  # type: ignore[arg-type]


def test_missing_triton_is_one_message(tmp_path: Path) -> None:
    code = "import sys; sys.modules['triton'] = None; from attnopt.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "calibrate", "--heads", "2", "--head-dim", "8", "--lengths", "64"]
    settings = os.environ | {"ATTNOPT_TARGET": "triton", "ATTNOPT_CACHE": str(tmp_path)}
    ended = subprocess.run(command, capture_output=True, text=True, env=settings)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert "needs the package triton" in ended.stderr and "pip install triton" in ended.stderr
    assert not list(tmp_path.iterdir())


def test_what_was_fitted_is_weighed_named_and_kept_beside_the_plan(
    planned: Path, tmp_path: Path, fails: Fails, capsys: pytest.CaptureFixture[str]
) -> None:
    fits, plan, words = tmp_path / "f.safetensors", tmp_path / "p.json", str(planned / "text.py")
    fitting = ["distill", str(planned / "shallow"), "--profile", str(planned / "profile"), "--text", words]
    menu = ["--features", "4", "--ranks", "2", "--windows", "16", "--steps", "0", "--samples", "1"]
    assert main([*fitting, *menu, "--out", str(fits)]) == 0
    command = plan_command(planned, plan, fitted=str(fits), objective="memory")
    before = snapshot(tmp_path)
    assert "Did you mean 'prune'?" in fails([*command, "--allow", "linear,prun"])
    assert "Nothing was fitted for linear" in fails([*plan_command(planned, plan), "--allow", "linear"])
    clash = plan_command(planned, plan, fitted=str(tmp_path / "p.fitted.safetensors"))
    assert "Give another --out" in fails(clash)
    assert "holds no fits" in fails(plan_command(planned, plan, fitted=str(planned / "profile")))
    assert snapshot(tmp_path) == before
    capsys.readouterr()
    assert main([*command, "--allow", "linear,taylor,compensation,prune", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["plan"]
    assert found["constraints"]["allow"] == ["compensation", "linear", "prune", "taylor"]
    assert sum(found["candidates"].values()) == 4 and all(
        "far" in h for heads in found["sites"].values() for h in heads
    )
    explained = ["explain", str(plan), f"{SITE}.3", "--profile", str(planned / "profile")]
    assert main([*explained, "--fitted", str(fits), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["candidates"]
    assert {r["choice"].split("(")[0] for r in rows} >= {"linear", "taylor", "compensation", "pruned", "sink_window"}
    assert all(r["damage"] is not None and r["why"] for r in rows) and rows[0]["cost"] == 0


def test_narrow_dumb_and_colourless_terminals(
    planned: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = [["show", str(planned / "plan.json")], ["show", str(planned / "profile")]]
    shown.append(["explain", str(planned / "plan.json"), f"{SITE}.3", "--profile", str(planned / "profile")])
    for variables in ({"COLUMNS": "40"}, {"COLUMNS": "12"}, {"TERM": "dumb", "FORCE_COLOR": "1"}, {"NO_COLOR": "1"}):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            for command in shown:
                capsys.readouterr()
                assert main(command) == 0
                captured = capsys.readouterr()
                assert captured.out and captured.err == ""
                if "FORCE_COLOR" not in variables:
                    assert "\x1b" not in captured.out


def test_a_reader_that_has_gone_ends_a_report(planned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", buffering=1) as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(["show", str(planned / "plan.json")]) == 0


def test_an_interrupted_plan_keeps_what_was_measured_until_it_is_done(
    planned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from attnopt.measure import Spans

    losses, calls = Spans.losses, [0]

    def stopped(self: Spans, *given: Any) -> Any:
        calls[0] += 1
        if calls[0] == 12:
            raise KeyboardInterrupt
        return losses(self, *given)

    command = plan_command(planned, tmp_path / "plan.json", probe="0")
    with monkeypatch.context() as patch:
        patch.setattr(Spans, "losses", stopped)
        assert main(command) == 1
    assert "run the same command again to go on" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json.partial"]
    assert main([*command, "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["plan"] and "10 sequences are measured" in captured.err
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    again = json.loads((tmp_path / "plan.json").read_text())
    whole = json.loads((planned / "plan.json").read_text())
    assert again["sites"] == whole["sites"]
