"""Run one cell of one class and say in plain JSON what was seen."""

from __future__ import annotations

import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from attnopt.hf.inputs import NoInput
from attnopt.ir import Miss
from benchmarks.zoo.build import NotBuilt, NotOffered, build, summary
from benchmarks.zoo.cells import CELLS, COUNT, Cell, NotApplicable, call_of, cast, distance_between, error_between
from benchmarks.zoo.masks import NotChecked, disagreement, name_of
from benchmarks.zoo.observe import Observed, Seen, backend_of
from benchmarks.zoo.watch import Call, Watch

Record = dict[str, Any]
# How much farther from float32 than eager a low-precision output may be: another order of the same roundings.
ROUNDING = 1.5


def run_cell(name: str, cell_name: str, inductor: bool = False) -> Record:
    """The record of a cell; `status` says how it ended:

    "ok"; "missed" (a site or a mask was not recognised, with reasons); "wrong" (a mask that is not the model's, or
    another output); "broken" (an exception of ours, or extra graphs); "untraceable" (plain torch.compile fails as
    well); "not built", "not offered", "not applicable".
    """
    cell, started = CELLS[cell_name], time.perf_counter()
    record: Record = {"class": name, "cell": cell_name}
    try:
        model = built(name, cell)
        record.update(counted(model) if cell == COUNT else observed(model, cell, inductor))
    except NotOffered as error:
        record.update(status="not offered", reason=f"attn_implementation={error}")
    except NotApplicable as error:
        record.update(status="not applicable", reason=str(error))
    except (NotBuilt, NoInput) as error:
        record.update(status="not built", reason=str(error))
    record["seconds"] = round(time.perf_counter() - started, 2)
    return record


def built(name: str, cell: Cell) -> nn.Module:
    """The model of a cell; a cell about the cache takes eager attention where the class has no other."""
    try:
        return build(name, cell.attention, cell.dtype)
    except NotOffered:
        if not cell.cache:
            raise
    return build(name, "eager", cell.dtype)


def observed(model: nn.Module, cell: Cell, inductor: bool) -> Record:
    with torch.set_grad_enabled(cell.training):
        try:
            call = call_of(model, cell)
            expected, calls = reference(model, call)
        except (NotApplicable, NoInput):
            raise
        except Exception as error:
            raise NotBuilt(f"it does not run: {summary(error)}") from error
        base: Record = {"calls": len(calls), "realised": dict(Counter(name_of(c.keep) for c in calls)),
                        "biased": sum(c.biased for c in calls)}  # fmt: skip
        try:
            plain = traced(model, cell, call, "inductor" if inductor else "eager")
        except Exception as error:
            return {**base, "status": "untraceable", "reason": summary(error)}
        if inductor:
            return {**base, **through_inductor(model, cell, call, expected, len(calls), plain)}
        met = Observed()
        try:
            found = traced(model, cell, call, backend_of(met))
        except Exception as error:
            return {**base, "status": "broken", "reason": summary(error), "exceptions": met.exceptions}
        if found["graphs"] > plain["graphs"]:
            # An export makes guards of its own: inductor's does as well, and inductor is what is compared with.
            with contextlib.suppress(Exception):
                plain = traced(model, cell, call, "aot_eager")
        difference = error_between(found["output"], expected)
        if not difference <= cell.bound and not error_between(call(model), expected) <= cell.bound:
            raise NotApplicable("two eager runs of it differ: something in it is drawn at random")
        bound = cell.bound
        if cell.dtype != torch.float32 and not difference <= bound:
            # Rounding alone moves this model so far: both are compared with the same weights in float32.
            exact = call(widened(model))
            difference, bound = distance_between(found["output"], exact), ROUNDING * distance_between(expected, exact)
    counts = {"graphs": [plain["graphs"], found["graphs"]], "breaks": [plain["breaks"], found["breaks"]]}
    return judged({**base, **counts, "error": difference, "bound": bound}, met, calls)


def widened(model: nn.Module) -> Callable[..., Any]:
    """`model` with its rounded weights and inputs, computed in float32. The model itself is changed."""
    wide = model.float()
    return lambda **inputs: wide(**cast(inputs, torch.float32))


def reference(model: nn.Module, call: Callable[[Any], list[Any]]) -> tuple[list[Any], list[Call]]:
    """The eager outputs, and the attention calls on the way."""
    seen = Watch(model)
    try:
        with seen:
            output = call(model)
    finally:
        calls = seen.close()
    return output, calls


def traced(model: nn.Module, cell: Cell, call: Callable[[Any], list[Any]], backend: Any) -> Record:
    """Outputs under torch.compile, with the graphs and breaks that Dynamo made for them."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    output = call(torch.compile(model, backend=backend, dynamic=cell.dynamic))
    breaks = sum(counters["graph_break"].values())
    fused = counters["inductor"]["fuse_attention"]
    return {"output": output, "graphs": counters["stats"]["unique_graphs"], "breaks": breaks, "fused": fused}


def through_inductor(
    model: nn.Module, cell: Cell, call: Callable[[Any], list[Any]], expected: list[Any], calls: int, plain: Record
) -> Record:
    """The shipped backend, compiled by inductor. Sites are counted by graph here, and masks are not compared."""
    from attnopt.backend import clear_reports, reports

    clear_reports()
    found = traced(model, cell, call, "attnopt")
    made = reports()
    misses = [plain_miss(m) for r in made for m in r.misses]
    error = error_between(found["output"], expected)
    extra = found["graphs"] > plain["graphs"] or found["breaks"] > plain["breaks"]
    sites = sum(len(r.sites) for r in made)
    status = "wrong" if not error <= cell.bound else "broken" if extra else "ok" if sites == calls else "missed"
    return {
        "status": status, "error": error, "bound": cell.bound, "sites": sites, "misses": misses,
        "fused": plain["fused"],
        "graphs": [plain["graphs"], found["graphs"]], "breaks": [plain["breaks"], found["breaks"]],
        "fallbacks": [r.fallback for r in made if r.fallback],
        "rewrites": dict(Counter(w.lowering for r in made for w in r.rewrites)),
    }  # fmt: skip


def counted(model: nn.Module) -> Record:
    """How many sites inductor's own patterns fuse: its joint-graph passes on the AOT graph, without compiling it."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes

    def passes(gm: torch.fx.GraphModule, _: list[Any]) -> Any:
        joint_graph_passes(gm)
        return gm.forward

    backend = aot_autograd(fw_compiler=passes, inference_compiler=passes, decompositions=select_decomp_table())
    with torch.no_grad():
        try:
            call = call_of(model, COUNT)
            _, calls = reference(model, call)
            found = traced(model, COUNT, call, backend)
        except NoInput:
            raise
        except Exception as error:
            return {"status": "untraceable", "reason": summary(error)}
    return {"status": "ok", "calls": len(calls), "fused": found["fused"]}


def judged(record: Record, met: Observed, calls: list[Call]) -> Record:
    """The verdict over a cell from what the matcher met and what the eager run realised."""
    wrong, unchecked, hidden = compared(met.seen, calls)
    if not record["error"] <= record["bound"]:
        wrong.append(f"the output differs by {record['error']:.2g} of its scale")
    if len(met.seen) > len(calls):
        wrong.append(f"{len(met.seen)} sites where the model calls attention {len(calls)} times")
    # Eager computes also what nothing reads.
    expected = len(calls) - min(met.unread, max(0, len(calls) - len(met.seen)))
    graphs, breaks = record["graphs"], record["breaks"]
    extra = graphs[1] > graphs[0] or breaks[1] > breaks[0]
    broken = [*met.exceptions, *([f"{graphs[1]} graphs where plain has {graphs[0]}"] if extra else [])]
    complete = len(met.seen) == expected
    status = "wrong" if wrong else "broken" if broken else "ok" if complete else "missed"
    misses = [plain_miss(m) for m in met.missed]
    return {
        **record, "calls": expected, "status": status, "sites": len(met.seen),
        "outside": max(0, expected - max(met.reached - met.unread, len(met.seen))),
        "closed": sum(one.site.mask.closed for one in met.seen) - hidden,
        "wrong": wrong, "unchecked": unchecked, "broken": broken, "misses": misses,
        "masks": dict(Counter(str(s.site.mask) for s in met.seen)),
        "patterns": dict(Counter(s.site.pattern for s in met.seen)),
        "refusals": dict(Counter(r.reason for r in met.refusals)), "rewrites": dict(Counter(met.rewrites)),
        "fallbacks": met.fallbacks,
    }  # fmt: skip


def plain_miss(miss: Miss) -> Record:
    """A miss in JSON; the source without the folder that packages are installed in."""
    return {"reason": miss.reason, "path": miss.path, "source": miss.source.rsplit("site-packages/", 1)[-1]}


def paired(seen: list[Seen], calls: list[Call]) -> tuple[list[tuple[Seen, Call]], list[Seen]]:
    """Sites with their calls: in order where there are as many, else by module where it has as many; and the rest."""
    if len(seen) == len(calls):
        return list(zip(seen, calls, strict=True)), []
    sites: dict[str, list[Seen]] = defaultdict(list)
    for one in seen:
        sites[one.site.path].append(one)
    pairs: list[tuple[Seen, Call]] = []
    rest: list[Seen] = []
    for path, held in sites.items():
        there = [c for c in calls if c.path == path]
        if len(there) == len(held):
            pairs += zip(held, there, strict=True)
        else:
            rest += held
    return pairs, rest


def compared(seen: list[Seen], calls: list[Call]) -> tuple[list[str], list[str], int]:
    """Recovered masks that are not the realised ones; those that could not be compared, with the reason; and how many
    of the closed ones are right only with the data that is added to the scores, which hides keys by its values."""
    pairs, rest = paired(seen, calls)
    wrong: list[str] = []
    unchecked = [f"{one.site.name}: no call of the eager run belongs to it for certain" for one in rest]
    hidden = 0
    for one, call in pairs:
        site, given = one.site, (call.keep, one.sizes, one.values)
        try:
            found = disagreement(site.mask, *given)
            if found and site.bias is not None:
                found = disagreement(site.mask, *given, site.bias)
                hidden += not found and site.mask.closed
        except NotChecked as reason:
            unchecked.append(f"{site.name}: {reason}")
            continue
        if found:
            wrong.append(f"{site.name}: {found}")
    return wrong, unchecked, hidden
