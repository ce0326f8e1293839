"""The benchmark of compiling: what it concludes from its starts, and what a wrong one is worth. It runs none here."""

from __future__ import annotations

from benchmarks.compile_cost import SIDES, summarised

STEPS = {"capture": 900.0, "match_attention": 60.0, "lower_exact": 40.0}


def found(side, cpu, graphs, error=1e-7):
    held = {"side": side, "cpu": cpu, "wall": 2 * cpu, "error": error, "graphs": graphs}
    return held if side == "inductor" else {**held, "steps_ms": STEPS}


def rounds(planned_error=1e-7, cold=11.0):
    graphs = {"inductor": [1, 2, 2], "exact": [1, 2, 2], "planned": [1, 2, 2, 2]}
    seconds = {"inductor": (10.0, 4.0), "exact": (cold, 5.0), "planned": (12.0, 9.0)}
    return {
        (side, kind): [found(side, seconds[side][at], graphs[side], planned_error if side == "planned" else 1e-7)] * 3
        for side in SIDES
        for at, kind in enumerate(("cold", "warm"))
    }


def test_starts_are_compared_with_inductors_and_with_their_own_cold_ones():
    rows, aims = summarised(12, rounds())
    by_case = {(r.case["side"], r.case["start"]): r for r in rows}
    assert by_case["exact", "cold"].ratios == {"inductor": 10 / 11}
    assert by_case["exact", "warm"].ratios == {"inductor": 0.8, "its own cold start": 2.2}
    assert by_case["exact", "cold"].times_ms["capture"] == 900 and by_case["exact", "cold"].times_ms["passes"] == 100
    verdicts = {a.what: (round(a.found, 3), a.verdict) for a in aims}
    assert verdicts["exact: cold start over inductor's"] == (1.1, "met")
    assert verdicts["exact: a second process over the cold start"] == (0.455, "met")
    assert verdicts["planned: a second process over the cold start"] == (0.75, "missed")
    assert verdicts["exact: recompiles over 3 lengths"] == (1, "met")
    assert verdicts["planned: recompiles for another plan of equal shape"] == (0, "met")
    _, aims = summarised(12, rounds(cold=12.6))
    assert aims[0].verdict == "missed"


def test_another_plan_that_compiles_is_counted():
    held = rounds()
    for one in held["planned", "cold"]:
        one["graphs"] = [1, 2, 2, 3]
    assert summarised(12, held)[1][-1].found == 1


def test_a_side_with_another_output_has_no_figures():
    rows, aims = summarised(12, rounds(planned_error=0.5))
    assert [r.case["side"] for r in rows if r.wrong] == ["planned", "planned"]
    assert {a.verdict for a in aims if a.what.startswith("planned")} == {"goal, unmeasured"}
