"""Program: one traced graph on its way through the pipeline, with everything the passes learn of it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule, Node

from attnopt import settings
from attnopt.errors import first_line
from attnopt.ir import Attempt, Choice, GraphReport, Miss, Refusal, Region, Rewrite, Step
from attnopt.passes.cutout import cutout, operands, reached
from attnopt.passes.fuel import Fuel
from attnopt.passes.graph_text import graph_text
from attnopt.patterns import Match
from attnopt.reasons import located

if TYPE_CHECKING:
    from attnopt.passes.append import Append
    from attnopt.plan import Plan


@dataclass
class Program:
    """A graph and what is known of it. `needs_grad`: gradients will be asked of it; `plan`: None is exact mode.

    `observer` is called with (region) by the observe pass and returns the callable that stands in for it; `watch` with
    (site's name, its tables by name, the query heads they are of) of every span that is inserted. `room`: the caller
    gives `appends` their room, and `recorded`: it records calls as CUDA graphs. `texts`: the graph's text is kept after
    each pass that changes it. `fuel`: what replacements are rationed by, if they are.
    """

    gm: GraphModule
    needs_grad: bool = False
    device: str = "cpu"
    plan: Plan | None = None
    verify: bool = False
    observer: Callable[[Region], Callable[..., torch.Tensor]] | None = None
    watch: Callable[[str, Mapping[str, torch.Tensor], Sequence[int]], None] | None = None
    room: bool = False
    recorded: bool = False
    texts: bool = False
    fuel: Fuel | None = None
    matches: list[Match] = field(default_factory=list)
    regions: list[Region] = field(default_factory=list)
    done: set[str] = field(default_factory=set)
    # Sites that the plan names and that stay exact all the same, for a reason that stands in `notes`.
    exact: set[str] = field(default_factory=set)
    rewrites: list[Rewrite] = field(default_factory=list)
    # What computes the output of a rewritten site, by its name.
    replaced: dict[str, Node] = field(default_factory=dict)
    refusals: list[Refusal] = field(default_factory=list)
    # Said of a site that was dealt with all the same: planned, but left exact.
    notes: list[Refusal] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)
    # How often each named rule of the normaliser and of the walk back from a soft-max applied.
    hits: Counter[str] = field(default_factory=Counter)
    # What each pattern answered at each of its anchors.
    attempts: list[Attempt] = field(default_factory=list)
    # Inputs that are continued in place.
    appends: list[Append] = field(default_factory=list)
    # Constant inputs (placeholder names) whose value a rewrite relies on: the backend guards them.
    relied_on: set[str] = field(default_factory=set)
    history: list[Step] = field(default_factory=list)

    def run(self, passes: Iterable[Callable[[Program], None]]) -> Program:
        """Run the passes in order, but for those in `ATTNOPT_DISABLE`, and note what each took and changed."""
        off, text = settings.disabled(), graph_text(self.gm.graph) if self.texts else ""
        for step in passes:
            name = step.__module__.rsplit(".", 1)[-1]
            if name in off:
                continue
            before, started = len(self.gm.graph.nodes), time.perf_counter()
            step(self)
            self.gm.graph.lint()
            milliseconds = (time.perf_counter() - started) * 1e3
            old, text = text, graph_text(self.gm.graph) if self.texts else ""
            changed = text if text != old else ""
            self.history.append(Step(name, milliseconds, before, len(self.gm.graph.nodes), changed))
        self.gm.recompile()
        return self

    def affords(self, region: Region) -> bool:
        """Whether there is fuel to replace the region's site; where there is none, it is refused."""
        name, replaced = region.site.name, {rewrite.site.name for rewrite in self.rewrites}
        if self.fuel is None or name in replaced or self.fuel.left(len(replaced)):
            return True
        if not any(no.path == name and no.code == "out-of-fuel" for no in self.refusals):
            said = f"ATTNOPT_FUEL={settings.fuel()} sites are replaced, and this would be one more"
            self.refuse(region, Refusal(said, code="out-of-fuel"))
        return False

    @property
    def pending(self) -> list[Region]:
        """Regions no lowering has dealt with yet."""
        return [r for r in self.regions if r.site.name not in self.done]

    def report(self) -> GraphReport:
        sites = tuple(r.site for r in self.regions)
        return GraphReport(
            sites, tuple(self.rewrites), tuple(self.refusals + self.notes), tuple(self.misses), tuple(self.history),
            self.plan.id if self.plan is not None else "", rules=tuple(self.hits.most_common()),
            attempts=tuple(self.attempts),
        )  # fmt: skip

    def refuse(self, region: Region, no: Refusal) -> None:
        """Leave the region as it was; `no` need not say where."""
        self.refusals.append(located(replace(no, path=region.site.name, source=region.site.source), region.anchor))
        self.done.add(region.site.name)

    def replace(
        self,
        region: Region,
        build: Callable[[Region], Node],
        lowering: str,
        choices: tuple[Choice, ...] = (),
        note: str = "",
        equal: bool = True,
    ) -> None:
        """Put what `build` makes in the place of the region's output; a failure leaves the site as it was.

        equal: whether it computes what the original did, which verification then compares; a plan's choices do not.
        """
        if not self.affords(region):
            return
        graph = self.gm.graph
        existing = set(graph.nodes)
        try:
            with graph.inserting_before(region.out):
                new = build(region)
                if region.match is not None:
                    from attnopt.passes.arrange import restored

                    new = restored(Builder(self.gm, region.out), region.match, new)
            check_same_meta(new, region.out)
            if equal and (self.verify or settings.verify()):
                from attnopt.passes.verify import check_region

                check_region(self.gm, region, new)
        except Exception as error:
            for node in reversed([n for n in graph.nodes if n not in existing]):
                graph.erase_node(node)
            if settings.strict():
                raise
            said = f"{type(error).__name__} while rewriting: {first_line(error)}"
            self.refuse(region, Refusal(said, code="rewrite-failed"))
            return
        inputs = operands(region)
        before = reached(region.out, inputs)
        after = reached(new, inputs, existing - before.keys())
        pictured = cutout(before, inputs), cutout(after, inputs)
        region.out.replace_all_uses_with(new)
        for other in self.regions:
            other.renew(region.out, new)
        relax_views(graph)
        self.done.add(region.site.name)
        self.replaced[region.site.name] = new
        self.rewrites.append(Rewrite(region.site, lowering, choices, note, *pictured))


def relax_views(graph: torch.fx.Graph) -> None:
    """view -> reshape: a view may rely on the strides of what was replaced; a reshape is right for any."""
    for node in graph.nodes:
        if node.target == torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default


def check_same_meta(new: Node, old: Node) -> None:
    a, b = new.meta["val"], old.meta["val"]
    if a.dtype != b.dtype or a.device != b.device or a.ndim != b.ndim:
        raise TypeError(f"the rewrite yields {a.dtype} {tuple(a.shape)}, the original {b.dtype} {tuple(b.shape)}")


class Builder:
    """Inserts calls with their metadata (fake value, module path, source line) taken from the original output."""

    def __init__(self, gm: GraphModule, like: Node) -> None:
        self.gm, self.like = gm, like

    def size(self, node: Node, dim: int) -> Any:
        """A static size as an int, one known at run time as a node."""
        held = node.meta["val"].shape[dim]
        return held if isinstance(held, int) else self.call(torch.ops.aten.sym_size.int, node, dim)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        node = self.gm.graph.call_function(target, args, kwargs)
        node.meta = {k: v for k, v in self.like.meta.items() if k not in ("val", "tensor_meta", "example_value")}

        def fake(item: Any) -> Any:
            return item.meta["val"] if isinstance(item, Node) else item

        values = torch.fx.node.map_aggregate((args, kwargs), fake)
        with self.like.meta["val"].fake_mode, torch.no_grad():
            if target is torch.ops.aten.scaled_dot_product_attention.default:
                # Said, not traced: choosing a kernel for symbolic sizes would add guards, and so recompiles.
                q, _, v = values[0][:3]
                node.meta["val"] = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
            else:
                node.meta["val"] = target(*values[0], **values[1])
        return node
