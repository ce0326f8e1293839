"""The benchmark of profiles: its fit, its table, and the figures that the documentation shows."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import profile_cost


def row(length: int, peak: int, layers: int = 0, parameters: int = 0) -> dict[str, int]:
    return {"length": length, "layers": layers, "parameters": parameters, "before_mib": 100, "peak_mib": peak}


def test_the_fit_tells_a_line_from_a_parabola() -> None:
    lengths = (1024, 2048, 4096, 8192)
    line = profile_cost.fitted([row(n, 150 + n // 16) for n in lengths])
    assert line == {"start_mib": 50.0, "kib_per_token": 64.0, "r2": 1.0}
    assert profile_cost.fitted([row(n, 150 + n * n // 2**14) for n in lengths])["r2"] < 0.97


def test_peaks_are_measured() -> None:
    """Of what is held at once, also after something larger was given back."""

    def hold(mib: int) -> None:
        torch.ones(mib * 2**18).sum()

    hold(300)
    before, peak = profile_cost.peak_of(lambda: hold(100))
    assert 95 < (peak - before) / profile_cost.MIB < 140


def test_memory_of_a_layer_is_measured_in_a_process_of_its_own() -> None:
    (found,) = profile_cost.memory("layer", [256])
    # q, k, v, the output and their gradients alone are 8 MiB.
    assert 8 < found["peak_mib"] - found["before_mib"] < 200


def test_the_documentation_shows_the_figures_that_were_kept() -> None:
    kept = json.loads(profile_cost.KEPT.read_text())
    page = profile_cost.PAGE.read_text(encoding="utf-8")
    shown = page.split(profile_cost.BEGIN)[1].split(profile_cost.END)[0].strip()
    assert shown == profile_cost.table(kept).strip()
    # Linear in the length, and within what was asked of it.
    assert all(profile_cost.fitted(kept[part])["r2"] > 0.98 for part in ("layer", "model"))
    for timed in kept["time"]:
        assert timed["ratios"]["profile / forward and backward"][0] <= 3
        assert timed["ratios"]["forward only / forward"][0] <= 1.5


@pytest.mark.parametrize("missing", ["time", "layer", "billion"])
def test_a_table_of_what_there_is(missing: str) -> None:
    rows = [row(1024, 200), row(2048, 300)]
    found = {"time": [], "layer": rows, "model": rows, "billion": [row(512, 3000, 2, 10**9)]}
    del found[missing]
    text = profile_cost.table(found)
    assert ("billion" in text) is (missing != "billion") and ("fitted" in text) is (missing != "layer")
