"""Roofline tables: monotone, divided by tensor parallelism, up to a million tokens; and files of one's own."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from problems import LENGTH

from attnopt.cost import Roofline, device, devices
from attnopt.cost.roofline import FIGURES, PRESETS
from attnopt.errors import OptionError
from attnopt.planner import Limits, front, make_problem, predicted_of
from benchmarks.planner_front import synthetic_profile

PRESET_NAMES = ("a100", "h100", "h200", "b200", "mi300x")


def table(name: str = "h100", parallel: int = 1, dtype: str = "bfloat16", kv_heads: int = 8) -> Roofline:
    return Roofline(device(name), dtype, 32, kv_heads, 128, 128, parallel)


def test_every_preset_has_its_figures_and_names_where_they_are_from() -> None:
    found = devices()
    assert tuple(found) == PRESET_NAMES
    for one in found.values():
        # Sanity, as units are easily a thousand off: between 10 TFLOP/s and 10 PFLOP/s, 1 and 10 TB/s, 40 and 300 GB.
        assert 1e13 <= one.float32 < one.bfloat16 == one.float16 <= 1e16
        assert 1e12 <= one.bandwidth <= 1e13 and 4e10 <= one.memory <= 3e11
    for line in PRESETS.read_text(encoding="utf-8").splitlines():
        assert line.split(" = ")[0] not in FIGURES or " # " in line or "  # " in line, line


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_costs_are_monotone_up_to_a_million_tokens(name: str) -> None:
    of = table(name)
    lengths = [1 << n for n in range(8, 20)] + [1_000_000]
    for window in (64, 4096):
        costs = [of.cost(n, 4, window) for n in lengths]
        assert costs == sorted(costs) and costs[0] > 0
    for n in lengths:
        costs = [of.cost(n, 0, w) for w in (1, 16, 256, 4096, 65536, n) if w <= n]
        assert costs == sorted(costs)
    assert of.cost(1_000_000, 0, 1_000_000) > 50 * of.cost(1_000_000, 4, 4096)
    assert of.group_cost(8192) == 0 and of.kind == "roofline"


def test_the_figures_are_what_a_roofline_says() -> None:
    of, n = table(), 1 << 17
    assert of.cost(n, 0, n) == pytest.approx(1e3 * 4 * 128 * (n * (n + 1) / 2) / 989.5e12)
    # A window of 1 is bound by memory: q and o of each head, k and v of a quarter of them.
    assert of.cost(n, 0, 1) == pytest.approx(1e3 * 2 * 256 * n * 1.25 / 3.35e12)
    assert of.key_time == pytest.approx(1e3 * 256 * 2 / 3.35e12)


def test_tensor_parallelism_divides_the_heads() -> None:
    for n, w in ((4096, 4096), (4096, 64), (1 << 20, 2048)):
        assert table(parallel=4).cost(n, 4, w) == pytest.approx(table().cost(n, 4, w) / 4)
    assert table(parallel=4).key_time == pytest.approx(table().key_time / 4)
    # Fewer KV heads than devices are repeated: their cache is not divided further.
    assert table(parallel=32, kv_heads=8).key_time == pytest.approx(table(kv_heads=8).key_time / 8)
    with pytest.raises(OptionError, match="cannot be shared out among 3"):
        table(parallel=3)
    assert len({table().id, table(parallel=4).id, table("h200").id}) == 3


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        (("bandwidth =", "bandwith ="), ("h100: unknown key 'bandwith'", "Did you mean 'bandwidth'?")),
        (("memory = 80e9  #", "memory = -1  #"), ("memory", "at least 0")),
        (("float32 = 67e12", "float32 = 0"), ("h100.float32", "above 0")),
        (("float32 = 67e12", 'float32 = "fast"'), ("h100.float32", "'fast'")),
        (("[h100]", "[h100"), ("not TOML", "devices.toml")),
    ],
)
def test_a_file_of_ones_own_is_checked(change: tuple[str, str], texts: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    shutil.copy(PRESETS, path)
    assert devices(path) == devices()
    section = path.read_text().index("[h100]")
    text = path.read_text()
    path.write_text(text[:section] + text[section:].replace(*change, 1))
    with pytest.raises(OptionError) as caught:
        devices(path)
    assert all(part in str(caught.value) for part in texts) and caught.value.remedy
    assert caught.value.exit_code == 2


def test_unknown_devices_and_dtypes_are_refused() -> None:
    with pytest.raises(OptionError, match="Did you mean 'h100'"):
        device("h10")
    with pytest.raises(OptionError, match="no file of devices"):
        devices("nowhere.toml")
    with pytest.raises(OptionError, match="float64"):
        table(dtype="float64")


@pytest.mark.parametrize("objective", ["prefill", "decode", "memory", "mixed"])
def test_a_plan_from_it_says_so(objective: str) -> None:
    profile, sites = synthetic_profile(2, 8, 2, (1024, LENGTH))
    of = Roofline(device("h200"), "bfloat16", 8, 2, 64, 64, 2)
    problem = make_problem(profile, of, sites, 1 << 20, objective=objective)
    sweep = front(problem, Limits())
    expected = predicted_of(problem, sweep.point(len(sweep) // 2))
    assert expected.cost == ("bytes" if objective == "memory" else "roofline")
    assert expected.speedup > 1 and 0 < expected.kv_memory <= 1
    again = make_problem(profile, replace(of, tensor_parallel=1), sites, 1 << 20, objective=objective)
    if objective in ("prefill", "decode"):
        assert again.dense.cost == pytest.approx(2 * problem.dense.cost)
