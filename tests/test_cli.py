"""The command line: help, exit codes, JSON, one clear message for each mistake, nothing half-written, Ctrl-C."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from attnopt.cli import EXAMPLES, main
from attnopt.cost import CostTable, kept_pairs
from attnopt.hf import demo_model_path
from attnopt.profile_file import Profile

LENGTHS, LENGTH = "128,256", 256
SITE = "model.layers.0.self_attn"


def save_model(folder: Path, seed: int = 0, **changes: Any) -> None:
    """A random Llama in transformers format with the demo model's tokenizer."""
    import transformers

    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2} | changes
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=96, max_position_embeddings=8192, **sizes
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model_path() / name, folder)


def density_as_time(spec: Any, lengths: Any, windows: Any, sinks: Any, **_: Any) -> CostTable:
    """A cost table in place of a measured one: the search does not depend on how busy the machine is."""
    spans = {(n, s, w) for n in lengths for s in sinks for w in windows if w < n} | {(n, 0, n) for n in lengths}
    entries = tuple((span, kept_pairs(*span) / 1e4) for span in sorted(spans))
    return CostTable((("target", spec.target),), entries, tuple((n, 0.0) for n in lengths))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Models, a text, and a profile and a plan of the first model."""
    folder = tmp_path_factory.mktemp("cli")
    save_model(folder / "model")
    save_model(folder / "heads", num_attention_heads=8)
    save_model(folder / "shallow", num_hidden_layers=1)
    save_model(folder / "weights", seed=1)
    source = "".join(Path(str(m.__file__)).read_text(encoding="utf-8") for m in (argparse, typing))
    (folder / "text.py").write_text(source, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("attnopt.planner.make.load_or_measure", density_as_time)
        run = ["--text", str(folder / "text.py"), "--out"]
        profile = [
            "profile",
            str(folder / "model"),
            "--lengths",
            LENGTHS,
            "--samples",
            "2",
            *run,
            str(folder / "profile"),
        ]
        assert main(profile) == 0
        assert main(plan_command(folder, folder / "plan.json")) == 0
        torch._dynamo.reset()
        yield folder


def plan_command(work: Path, out: Path, **changes: str) -> list[str]:
    options = {
        "profile": str(work / "profile"), "text": str(work / "text.py"), "length": str(LENGTH), "samples": "8",
        "max-loss-increase": "50%", "verify-lengths": str(LENGTH), "probe": "1", "out": str(out),
    } | changes  # fmt: skip
    model = options.pop("model", str(work / "model"))
    return ["plan", model, *(part for name, value in options.items() for part in (f"--{name}", value))]


def bench_command(work: Path, model: str = "model", plan: Path | None = None) -> list[str]:
    command = ["bench", str(work / model), "--text", str(work / "text.py"), "--lengths", "128", "--rounds", "1"]
    return [*command, "--plan", str(plan or work / "plan.json")]


Fails = Callable[..., str]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """Runs a command that must fail with `code`: its message, which has a remedy and no traceback."""

    def check(command: list[str], code: int = 2) -> str:
        capsys.readouterr()
        try:
            found = main(command)
        except SystemExit as ended:
            found = int(str(ended.code))
        out, err = capsys.readouterr()
        assert found == code, err
        assert out == "" and "Traceback" not in err
        problem, remedy = err.strip().split("\n")
        assert problem.strip() and remedy.startswith("  ") and remedy.strip()
        return err

    return check


@pytest.mark.parametrize("command", EXAMPLES)
def test_help_shows_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "examples:" in out and all(line in out for line in EXAMPLES[command].split("\n"))


def test_from_profile_to_bench(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(*command: str) -> Any:
        capsys.readouterr()
        assert main([*command, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    examined = json.dumps(answer("examine", str(work / "model"), "--length", "64"))
    assert "model.layers.0.self_attn" in examined and "model.layers.1.self_attn" in examined
    profile, plan = tmp_path / "profile", tmp_path / "plan.json"
    model, words = str(work / "model"), str(work / "text.py")
    made = answer("profile", model, "--lengths", LENGTHS, "--samples", "1", "--text", words,
                  "--out", str(profile))  # fmt: skip
    assert made["profile"] == str(profile) and profile.exists()
    found = answer(*plan_command(work, plan, profile=str(profile)))
    assert found["plan"] == str(plan) and found["search"]
    assert answer("show", str(plan))["plan"] and answer("show", str(profile))["profile"]
    rows = answer("explain", str(plan), f"{SITE}.3", "--profile", str(profile))["candidates"]
    assert [r["why"] for r in rows if r["chosen"]] == ["chosen"] and all(r["why"] for r in rows)
    timed = answer(*bench_command(work, plan=plan))["bench"]
    assert {"eager", "inductor", "attnopt exact", "attnopt planned"} <= {r["variant"] for r in timed}
    assert all(r["milliseconds"] > 0 for r in timed)
    assert answer("env")


def test_profiles_are_merged(work: Path, fails: Fails, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def profiled(model: str, seed: int) -> str:
        out = str(tmp_path / f"{model}-{seed}")
        command = ["profile", str(work / model), "--lengths", "128", "--samples", "1", "--seed", str(seed)]
        assert main([*command, "--text", str(work / "text.py"), "--out", out]) == 0
        return out

    one, two, other = profiled("model", 0), profiled("model", 1), profiled("weights", 2)
    capsys.readouterr()
    assert main(["merge", one, two, "--out", str(tmp_path / "both"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["profile"] == str(tmp_path / "both")
    assert Profile.load(tmp_path / "both").samples == {128: 2}
    before = snapshot(tmp_path)
    assert "observed the same text" in fails(["merge", one, two, one, "--out", str(tmp_path / "both")])
    assert "different weights" in fails(["merge", one, other, "--out", str(tmp_path / "new")])
    assert "no profile" in fails(["merge", one, str(tmp_path / "none"), "--out", str(tmp_path / "both")])
    assert snapshot(tmp_path) == before


def test_the_plan_that_was_written_runs(work: Path) -> None:
    from attnopt import backend, hf

    model = hf.load(str(work / "model")).model
    backend.clear_reports()
    planned = torch.compile(model, backend="attnopt", options={"plan": str(work / "plan.json")})
    ids = torch.arange(LENGTH)[None]
    with torch.no_grad():
        logits = planned(ids, use_cache=False).logits
    assert logits.isfinite().all()
    (report,) = backend.reports()
    assert [r.path for r in report.rewrites] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert all("span kernel" in r.lowering and r.choices for r in report.rewrites)


WRONG_LINES = {
    "examin demo": "Did you mean examine?",
    "examine demo --lenght 3": "Did you mean --length?",
    "examine demo --dtype fp8": "fp8",
    "examine demo --length 1": "--length must be at least 2",
    "examine demo --device nowhere": "nowhere",
    "profile demo --out x --lengths 64,many": "64,many",
    "profile demo --out x --samples 0": "'0' is not a positive whole number",
    "plan demo --profile p --out x --max-loss-increase none": "'none' is not a positive percentage",
    "plan demo --profile p --out x --max-kl -1": "--max-kl",
    "plan demo --profile p --out x --min-speedup 0.5": "'0.5' is not a speed-up of at least 1",
    "plan demo --profile p --out x --max-kv-memory 140%": "'140%' is not a share",
    "plan demo --profile p --out x --objective speed": "invalid choice: 'speed'",
    "plan demo --profile p --out x --tensor-parallel 2": "Name it with --device-preset",
    "plan demo --profile p --out x --device-preset h10": "Did you mean 'h100'?",
    "plan demo --profile p --out x --device-preset h100 --devices no.toml": "There is no file of devices",
    "calibrate": "Give --model, or --heads and --head-dim",
    "calibrate --heads 6 --kv-heads 4 --head-dim 8": "do not share",
    "calibrate --model demo --heads 6": "--model has sizes of its own",
    "plan demo --out x": "--profile",
}


@pytest.mark.parametrize("line", WRONG_LINES)
def test_a_wrong_command_line_ends_with_2(
    line: str, fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert WRONG_LINES[line] in fails(line.split())
    assert not list(tmp_path.iterdir())


def test_models_that_are_not_there(fails: Fails, tmp_path: Path) -> None:
    assert f"There is no model at {tmp_path}/none" in fails(["examine", f"{tmp_path}/none"])
    assert "could not be loaded" in fails(["examine", "no-such-model"])
    assert "no config.json" in fails(["examine", str(tmp_path)])
    assert "could not be called" in fails(["examine", "no_such_module:model"])


def test_texts_that_do_not_do(work: Path, fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "short").write_text("def f(): pass")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    before = snapshot(tmp_path)
    for name, message in {
        "empty": "The text is empty", "short": "too short for one sequence of 64", "none": "There is no text file",
        "binary": "cannot be read as UTF-8",
    }.items():  # fmt: skip
        command = ["profile", str(work / "model"), "--lengths", "64", "--out", str(tmp_path / "p"), "--text"]
        assert message in fails([*command, str(tmp_path / name)])
    assert "too short" in fails(plan_command(work, tmp_path / "x", text=str(tmp_path / "short")))
    assert snapshot(tmp_path) == before


def snapshot(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("model", ["heads", "shallow", "weights"])
def test_another_models_profile_and_plan_are_refused(model: str, work: Path, fails: Fails, tmp_path: Path) -> None:
    assert "another model" in fails(plan_command(work, tmp_path / "x", model=str(work / model)))
    message = fails(bench_command(work, model))
    assert {"heads": "4 heads", "shallow": "model.layers.1.self_attn", "weights": "another model"}[model] in message
    assert not list(tmp_path.iterdir())


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
def test_a_badly_edited_plan_is_refused(edit: Any, work: Path, fails: Fails, tmp_path: Path) -> None:
    data = json.loads((work / "plan.json").read_text())
    edit(data)
    broken = tmp_path / "plan.json"
    broken.write_text(json.dumps(data))
    for command in (["show", str(broken)], bench_command(work, plan=broken)):
        message = fails(command)
        assert EDITS[edit] in message and str(broken.name) in message


def test_truncated_files_are_refused(work: Path, fails: Fails, tmp_path: Path) -> None:
    for name in ("plan.json", "profile"):
        whole = (work / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        assert name in fails(["show", str(tmp_path / name)])
    before = snapshot(tmp_path)
    assert "truncated" in fails(plan_command(work, tmp_path / "x", profile=str(tmp_path / "profile")))
    assert "plan.json" in fails(
        ["explain", str(tmp_path / "plan.json"), f"{SITE}.0", "--profile", str(work / "profile")]
    )
    assert snapshot(tmp_path) == before


def test_heads_that_are_not_there(work: Path, fails: Fails) -> None:
    command = ["--profile", str(work / "profile")]
    assert f"{SITE}.0" in fails(["explain", str(work / "plan.json"), f"{SITE}.4", *command])
    assert f"{SITE}.0" in fails(["explain", str(work / "plan.json"), "model.layers.0.self_atn.1", *command])
    assert "no file" in fails(["show", str(work / "none.json")])


def test_an_output_that_cannot_be_written_is_found_out_first(work: Path, fails: Fails, tmp_path: Path) -> None:
    """Below a regular file no folder can be made, whoever runs the test."""
    (tmp_path / "file").write_text("")
    inside = tmp_path / "file" / "sub" / "out"
    assert "cannot be written" in fails(plan_command(work, inside), code=1)
    assert "cannot be written" in fails(["profile", "no-such-model", "--out", str(inside)], code=1)
    assert "cannot be written" in fails(["examine", "no-such-model", "--html", str(inside)], code=1)
    assert "cannot be written" in fails(["demo", "--out", str(inside)], code=1)
    assert "is a folder" in fails(["profile", "no-such-model", "--out", str(tmp_path)], code=1)
    assert snapshot(tmp_path) == {"file": b""}


def test_a_budget_that_no_plan_keeps_writes_nothing(work: Path, fails: Fails, tmp_path: Path) -> None:
    options = plan_command(work, tmp_path / "plan.json")
    at = options.index("--max-loss-increase")
    assert "budget" in fails([*options[:at], "--max-kl", "1e-300", *options[at + 2 :]], code=1)
    assert not list(tmp_path.iterdir())


def test_a_contradiction_is_refused_with_2_and_leaves_the_old_plan(work: Path, fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("the old one")
    options = plan_command(work, tmp_path / "plan.json", **{"max-loss-increase": "0"})
    message = fails([*options, "--min-speedup", "1.5"])
    assert "A budget of 0 percent of the dense loss contradicts a speed-up of 1.5" in message
    assert "The budget binds" in message and "a speed-up of 1.00" in message
    message = fails([*options, "--min-speedup", "1000"])
    assert "A speed-up of 1000 cannot be had" in message and "at the most" in message
    message = fails([*options, "--protect", "model.layers.7"])
    assert "--protect model.layers.7: there is no such layer" in message and "Did you mean" in message
    assert snapshot(tmp_path) == {"plan.json": b"the old one"}


def test_a_plan_for_a_device_that_is_not_at_hand_says_so(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = {"length": "1000000", "device-preset": "h100", "tensor-parallel": "2", "protect": "0.1", "max-rules": "2"}
    command = plan_command(work, tmp_path / "plan.json", **wanted)
    capsys.readouterr()
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["predicted"]["cost"] == "roofline" and found["cost_table"].startswith("roofline-h100-tp2-")
    assert found["constraints"]["protect"] == ["0.1"] and found["sites"][SITE][1]["dense"]
    final = next(m for m in found["measured"] if m["split"] == "final")
    assert final["kl"] >= 0 and 0 < final["top1"] <= 1 and 0 <= final["planned_retrieval"] <= 1
    assert main(["show", str(tmp_path / "plan.json")]) == 0
    assert "a roofline, not measured" in " ".join(capsys.readouterr().out.split())


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


def test_missing_triton_is_one_message(work: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['triton'] = None; from attnopt.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *plan_command(work, tmp_path / "plan.json")]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"ATTNOPT_TARGET": "triton"})
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert "needs the package triton" in ended.stderr and "pip install triton" in ended.stderr
    assert not list(tmp_path.iterdir())


CHAT = [
    {"prompt": "def add(a, b):\n    ", "answer": "return a + b\n" * 12},
    {"prompt": "# the sum of all\n" * 9, "answer": "total = sum(values)\n" * 3},
]


def test_supervision_from_the_command_line(work: Path, fails: Fails, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps(CHAT[n % 2]) for n in range(24)))
    base = ["profile", str(work / "model"), "--lengths", "128", "--samples", "1", "--json", "--probe", "0"]

    def header(name: str, *options: str) -> Any:
        capsys.readouterr()
        assert main([*base, *options, "--out", str(tmp_path / name)]) == 0
        found = json.loads(capsys.readouterr().out)
        return found["supervision"], found["lengths"][0]["tokens"]

    words = ["--text", str(work / "text.py")]
    assert header("text", *words, "--draws", "2") == (["model labels on text"], 256)
    assert header("data", *words, "--labels", "data") == (["data labels on text"], 127)
    assert header("own", *words, "--labels", "continuation") == (["model labels on its own sampled continuation"], 32)
    supervision, tokens = header("chat", "--text", str(tmp_path / "chat.jsonl"), "--labels", "data")
    assert supervision == ["data labels on chat answers"] and 10 < tokens < 100
    few = ["--text", str(tmp_path / "chat.jsonl"), "--samples", "99", "--out", str(tmp_path / "few")]
    assert main([*base, *few]) == 0
    assert "of the 99 sequences of 128 tokens" in capsys.readouterr().err
    both = header("both", *words, "--probe", "1")
    assert both == (["model labels on probe answers, softened 4 times", "model labels on text"], 128)
    merged = ["merge", str(tmp_path / "text"), str(tmp_path / "chat"), "--out", str(tmp_path / "mixed")]
    assert "--mixed" in fails(merged) and not (tmp_path / "mixed").exists()
    assert main([*merged, "--mixed"]) == 0


def test_a_profile_without_a_backward_pass_is_not_planned_from(
    work: Path, fails: Fails, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    out = tmp_path / "quick"
    command = ["profile", str(work / "model"), "--lengths", LENGTHS, "--samples", "1", "--text", str(work / "text.py")]
    assert main([*command, "--out", str(out), "--forward-only"]) == 0
    assert "no backward pass" in capsys.readouterr().out
    monkeypatch.setattr("attnopt.planner.make.load_or_measure", density_as_time)
    message = fails(plan_command(work, tmp_path / "plan.json", profile=str(out)))
    assert "does not hold t2" in message and "without --forward-only" in message
    assert "do not add" in fails(["merge", str(out), str(work / "profile"), "--out", str(tmp_path / "both")])
    assert "no labels" in fails([*command, "--out", str(out), "--forward-only", "--labels", "data"])
    assert [p.name for p in tmp_path.iterdir()] == ["quick"]


def test_supervision_that_cannot_be(work: Path, fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "silent.jsonl").write_text('{"prompt": "a", "answer": ""}\n')
    (tmp_path / "broken.jsonl").write_text(json.dumps(CHAT[0]) + "\n{")
    (tmp_path / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    (tmp_path / "out").write_text("kept")
    before = snapshot(tmp_path)
    options = ["--lengths", "64", "--samples", "1", "--out", str(tmp_path / "out"), "--text"]
    base = ["profile", str(work / "model"), *options]
    for words, message in {
        ("silent.jsonl",): "Line 1 of",
        ("broken.jsonl",): "is not JSON",
        ("chat.jsonl",): "no chat template",
    }.items():
        assert message in fails([*base, str(tmp_path / words[0]), *words[1:]])
    text = str(work / "text.py")
    for others, message in {
        ("--lengths", "8", "--probe", "1"): "no room", ("--forward-only", "--probe", "1"): "backward pass",
        ("--labels", "data", "--draws", "2"): "not drawn",
    }.items():  # fmt: skip
        assert message in fails([*base, text, *others])
    broken = tmp_path / "model"
    save_model(broken)
    import safetensors.torch

    weights = safetensors.torch.load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    safetensors.torch.save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    assert "not finite" in fails(["profile", str(broken), *options, str(work / "text.py"), "--dtype", "bf16"])
    shutil.rmtree(broken)
    assert snapshot(tmp_path) == before


def test_an_interrupted_profile_goes_on(work: Path, tmp_path: Path) -> None:
    samples, draws, out = 12, 10, tmp_path / "profile"
    partial = tmp_path / "profile.partial"
    command = ["profile", str(work / "model"), "--lengths", "256", "--samples", str(samples), "--text",
               str(work / "text.py"), "--draws", str(draws), "--probe", "0", "--out", str(out)]  # fmt: skip
    # A shell runs its background jobs with SIGINT ignored, and children inherit that; a handler they do not.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, "-m", "attnopt", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 120
    while not partial.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in err
    assert "Interrupted." in err and "run the same command again" in err
    assert [p.name for p in tmp_path.iterdir()] == [partial.name]
    done = Profile.load(partial).header.data
    assert 0 < len(done) < samples * draws

    assert main(command) == 0
    assert [p.name for p in tmp_path.iterdir()] == [out.name]
    again = Profile.load(out).header.data
    assert set(done) < set(again) and len(again) == samples * draws
