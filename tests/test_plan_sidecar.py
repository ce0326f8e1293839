"""The file beside a plan: what was fitted for its heads, checked against the plan that needs it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from attnopt.errors import PlanError
from attnopt.feature_maps import FeatureMap, shapes
from attnopt.fingerprint import Fingerprint
from attnopt.fitted import Fitted, Header, HeadFit
from attnopt.ir import DENSE, Choice, Mask, Site
from attnopt.plan import Budget, Constraints, Lengths, Plan, Predicted
from attnopt.statistics.trials import Trials

HEADS, DIM = 4, 8
MODEL = Fingerprint("0123456789abcdef", (0.125, 1e-05))
LINEAR = Choice.of("linear", {"sink": 4, "window": 64, "features": 16})
COMPENSATED = Choice.of("compensation", {"sink": 4, "alpha": 64, "beta": 0.0})
PRUNED = Choice.of("pruned")
FIRST = (DENSE, LINEAR, COMPENSATED, LINEAR)


def fits(fingerprint: Fingerprint = MODEL) -> Fitted:
    """Of two sites, all that a plan may need and more: another map, and trials."""
    made, drawn = Fitted(Header(fingerprint, lengths=(64,))), torch.Generator().manual_seed(0)
    for site in ("a", "b"):
        for rank in (8, 16):
            tensors = [torch.randn(s, generator=drawn) for s in shapes(HEADS, rank, DIM).values()]
            made.add_map(site, f"linear/{rank}", FeatureMap("exp", *tensors), [HeadFit("random", 0.5)] * HEADS)
        made.means[site] = torch.randn(HEADS, DIM, generator=drawn)
    sums = torch.ones(HEADS, 1, dtype=torch.float64)
    made.trials["a", 64] = Trials((LINEAR,), sums, sums.clone(), sums.clone(), 63.0)
    return made


def plan_of(choices: dict[str, tuple[Choice, ...]], fingerprint: Fingerprint = MODEL) -> Plan:
    return Plan(
        "demo", fingerprint, Budget("kl", 0.1), Lengths((64,), 64), choices,
        Predicted(0.0, "bytes", "MiB of cache", 1.0, 0.5, 2.0, 0.5),
        constraints=Constraints(allow=("linear", "prune")), min_length=32, fitted=fits(fingerprint).part_of(choices),
    )  # fmt: skip


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    plan_of({"a": FIRST, "b": (DENSE, PRUNED, PRUNED, DENSE)}).save(path)
    return path


def test_what_a_plan_needs_lies_beside_it_and_comes_back(saved: Path) -> None:
    assert sorted(p.name for p in saved.parent.iterdir()) == ["plan.fitted.safetensors", "plan.json"]
    plan = Plan.load(saved)
    assert plan.dump() == saved.read_text(encoding="utf-8")
    again = saved.parent / "again" / "plan.json"
    plan.save(again)
    plan.save(again)  # over one's own
    for name in ("plan.json", "plan.fitted.safetensors"):
        assert (again.parent / name).read_bytes() == (saved.parent / name).read_bytes()
    held = plan.fitted
    assert held is not None and set(held.maps) == {("a", "linear/16")} and set(held.means) == {"b"} and not held.trials
    assert held.map_of("a", "linear/16", [3]).wq.equal(fits().maps["a", "linear/16"].wq[[3]])
    assert plan.constraints.allow == ("linear", "prune")


def test_a_plan_that_needs_nothing_has_no_second_file(tmp_path: Path) -> None:
    plan = plan_of({"a": (DENSE, COMPENSATED, COMPENSATED, DENSE)})
    replace(plan, fitted=None).save(tmp_path / "plan.json")
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    assert Plan.load(tmp_path / "plan.json").fitted is None


def test_gone_heads_keep_nothing_at_any_length(saved: Path) -> None:
    plan = Plan.load(saved)
    assert plan.tables("b", 64) == ([0, 0, 0, 0], [64, 0, 0, 64])
    assert plan.tables("b", 16) == ([0, 0, 0, 0], [16, 0, 0, 16])  # under min_length the others are dense
    assert plan.tables("a", 16)[1] == [16] * HEADS


Change = Callable[[Path, dict[str, Any]], Any]


def other(path: Path) -> None:
    plan_of({"a": (LINEAR,) * HEADS}).save(path.parent / "other.json")
    (path.parent / "other.fitted.safetensors").replace(path.parent / "plan.fitted.safetensors")


def sidecar(path: Path) -> Path:
    return path.parent / "plan.fitted.safetensors"


def heads_of(data: dict[str, Any], site: str = "a") -> dict[str, Any]:
    return data["sites"][site]["choices"]


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


BAD: dict[str, tuple[Change, tuple[str, ...]]] = {
    "missing": (lambda p, d: sidecar(p).unlink(), ("fitted: the plan needs plan.fitted.safetensors", "--fitted")),
    "another's": (lambda p, d: other(p), ("not the file that this plan was written with", "--fitted")),
    "one bit": (lambda p, d: flipped(sidecar(p)), ("not the file that this plan was written with",)),
    "a folder": (lambda p, d: (sidecar(p).unlink(), sidecar(p).mkdir()), ("cannot be read",)),
    "forgotten": (lambda p, d: d.update(fitted=None), ("choices.1: linear(", "needs a feature map linear/16")),
    "another head": (
        lambda p, d: heads_of(d).update({"0": {"candidate": "linear", "sink": 4, "window": 64, "features": 16}}),
        ("choices.0: linear(", "needs a feature map linear/16 of this head", "Choose another replacement"),
    ),
    "another map": (lambda p, d: heads_of(d)["1,3"].update(features=8), ("needs a feature map linear/8",)),
    "no mean": (lambda p, d: heads_of(d).update({"0": {"candidate": "pruned"}}), ("choices.0: pruned needs",)),
    "another model's": (
        lambda p, d: d["model"]["fingerprint"].update(structure="fedcba9876543210"),
        ("fitted for another model", "fedcba9876543210"),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_or_missing_file_is_refused(name: str, saved: Path) -> None:
    change, texts = BAD[name]
    data = json.loads(saved.read_text())
    change(saved, data)
    saved.write_text(json.dumps(data))
    with pytest.raises(PlanError) as caught:
        Plan.load(saved)
    assert caught.value.remedy and all(text in str(caught.value) for text in (str(saved.with_suffix("")), *texts)), (
        caught.value
    )


def test_an_edit_that_needs_nothing_new_loads(saved: Path) -> None:
    data = json.loads(saved.read_text())
    heads_of(data)["0"] = {"candidate": "compensation", "sink": 0, "alpha": 32, "beta": 0.5}
    heads_of(data)["1,3"]["window"] = 32  # a map is of far keys, whatever the window
    saved.write_text(json.dumps(data))
    assert Plan.load(saved).choices["a"][3]["window"] == 32


def test_another_file_in_its_place_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "plan.fitted.safetensors"
    for write in (lambda: fits().save(path), lambda: path.write_text("mine")):
        write()
        before = path.read_bytes()
        with pytest.raises(PlanError, match="is there as another file"):
            plan_of({"a": FIRST}).save(tmp_path / "plan.json")
        assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_check_refuses_fits_of_other_sizes(saved: Path) -> None:
    plan = Plan.load(saved)

    def sites(dim: int, wide: int) -> list[Site]:
        return [Site(n, 0, "sdpa", HEADS, 2, dim, wide, 0.3, "float32", Mask(causal=True)) for n in ("a", "b")]

    plan.check(sites(DIM, DIM))
    with pytest.raises(PlanError, match="feature map linear/16 of a: it maps 8 numbers"):
        plan.check(sites(2 * DIM, DIM))
    with pytest.raises(PlanError, match=r"mean outputs of b are \(4, 8\), expected \(4, 16\)"):
        plan.check(sites(DIM, 2 * DIM))
