"""What `attnopt.enable` installed on a model for generation, layer by layer, or why nothing can be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attnopt.cache import Layout, layouts_of, tokens_of
from attnopt.hf import sites
from attnopt.hf.generation import MARK, Installed, bucket
from attnopt.ir import DENSE
from attnopt.plan import Plan
from attnopt.units import bytes_text

# The length that caches are described at where neither the plan nor the model was given one.
TYPICAL = 4096


@dataclass(frozen=True)
class LayerFacts:
    """One layer of a cache: its site, its own window, the layout, bytes of one row, and of the dense cache of a row;
    selecting: query heads that select what a step reads."""

    name: str
    window: int | None
    planned: bool
    layout: Layout
    nbytes: int
    dense: int
    selecting: int = 0

    def __str__(self) -> str:
        own = f", own window {self.window}" if self.window else ""
        how = "" if self.planned else ", not in the plan: exact"
        if self.selecting:
            how += f", {self.selecting} of {len(self.layout.head_sinks)} query heads select what they read"
        return f"{self.name}: {self.layout}, {bytes_text(self.nbytes)} of {bytes_text(self.dense)}{own}{how}"


@dataclass(frozen=True)
class Generation:
    """What `attnopt.enable` did to a model. enabled: whether it did; refused: why it cannot, one line a reason."""

    model: str
    enabled: bool
    refused: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    layers: tuple[LayerFacts, ...] = ()
    length: int = 0
    plan: Plan | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of one row's cache."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def dense(self) -> int:
        """Bytes of one row's cache if every head kept every token."""
        return sum(layer.dense for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        """The same as plain data; `nbytes` and `dense` are those of one row's cache at `length` tokens."""
        layers = [
            {"name": layer.name, "window": layer.window, "planned": layer.planned, "layout": str(layer.layout),
             "nbytes": layer.nbytes, "dense": layer.dense, "selecting": layer.selecting}
            for layer in self.layers
        ]  # fmt: skip
        return {
            "enabled": self.enabled, "refused": list(self.refused), "changes": list(self.changes), "layers": layers,
            "length": self.length, "nbytes": self.nbytes, "dense": self.dense,
        }  # fmt: skip

    def __str__(self) -> str:
        if self.refused:
            return "\n".join([f"{self.model}: cannot be enabled", *(f"  {reason}" for reason in self.refused)])
        if not self.enabled:
            return f"{self.model}: not enabled\n  attnopt.enable(model, plan) would serve it"
        share = f"{bytes_text(self.nbytes)} of {bytes_text(self.dense)}"
        return "\n".join(
            [f"{self.model}: enabled", *(f"  {change}" for change in self.changes)]
            + [f"  cache of one row at {self.length} tokens: {share}"]
            + [f"    {layer}" for layer in self.layers]
        )


def generation_of(model: Any) -> Generation:
    """What is installed on a model by `attnopt.enable`, layer by layer; or what keeps it from being enabled."""
    inner = sites.generator(model)
    name = type(inner).__name__
    installed = vars(inner).get(MARK)
    if not isinstance(installed, Installed):
        return Generation(name, False, tuple(sites.problems(inner)))
    plan = installed.plan
    length = installed.max_length or bucket(plan.lengths.planned if plan is not None else TYPICAL)
    layouts = layouts_of(plan, [a.site for a in installed.attentions], length)
    tables = tokens_of(plan, [a.site for a in installed.attentions], length)
    layers = []
    for site, table in zip((a.site for a in installed.attentions), tables, strict=True):
        widths = site.head_dim, site.head_dim_v, inner.dtype
        choices = plan.choices.get(site.name) if plan is not None else (DENSE,)
        nbytes = layouts[site.name].nbytes(*widths)
        dense = site.kv_heads * length * (site.head_dim + site.head_dim_v) * inner.dtype.itemsize
        selecting = 0 if table is None else sum(rule is not None for rule in table.rules)
        nbytes += 0 if table is None else table.nbytes(layouts[site.name], site.head_dim, inner.dtype)
        facts = site.name, site.mask.window, choices is not None, layouts[site.name], nbytes, dense, selecting
        layers.append(LayerFacts(*facts))
    return Generation(name, True, (), tuple(changes(inner, installed)), tuple(layers), length, plan)


def changes(model: Any, installed: Installed) -> list[str]:
    """What is another than before, as lines."""
    before = installed.configs[0][1].get("_attn_implementation_internal")
    plan = f"plan {installed.plan.id}" if installed.plan is not None else "no plan: exact"
    length = installed.max_length or "rounded up to what each call needs"
    said = [f"{plan}", f"attention implementation: attnopt (was {before})", f"caches made by generate(): {length}"]
    if installed.compiled:
        how = "forward, by model.compile" if "_compiled_call_impl" in vars(model) else "decoding steps, by generate()"
        said.append(f"compiled by attnopt: {how}")
    if installed.pool:
        ((key, held),) = installed.pool
        size = bytes_text(sum(layer.nbytes for layer in held))
        said.append(f"a cache of {size} is kept for the next call: {key.rows} rows of {key.length} tokens")
    if installed.plan is not None and installed.plan.min_length:
        said.append(f"every head dense in caches shorter than {installed.plan.min_length} tokens")
    return said
