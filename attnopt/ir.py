"""The records that travel between the stages: frozen, hashable, each with a one-line text form.

    Mask     what an attention's mask means, as bounds on i - j and opaque loads
    Site     the facts of one attention, found by a pattern
    Region   a Site plus the fx nodes that hold it; lives for one compile
    Choice   what one head is replaced by
    Miss     something that looks like attention and was not recognised, and why
    Refusal  a site that was recognised and left alone, and why
    Op       one node of a rewritten site, for pictures of what was there before and after

Conventions, used everywhere: b batch, h query head, i query position, j key position; a window of w keys keeps
``0 <= i + offset - j < w`` (the query's own key counts); s sinks keep ``j < s`` (outside the window's count).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from attnopt.units import number_text

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Load:
    """An opaque tensor that a mask or bias reads, and the index it reads it at, printed: ``pad[b, j]``.

    A boolean one is true where the key is kept. `dims` are expressions over b, h, i, j in canonical text.
    """

    name: str
    dims: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name}[{', '.join(self.dims)}]" if self.dims else self.name


@dataclass(frozen=True)
class Mask:
    """Keys j that query i keeps: all of the bounds, loads and terms hold.

    causal, window: bounds on i + offset - j; window is None for no bound, `symmetric` bounds |i - j| instead.
    offset: key length minus query length for a mask aligned to the end, 0 for one aligned to the start; text where it
    is only known at run time.
    chunk: 0, or keys are kept in the query's own chunk of that many positions, ``i // c == j // c``.
    loads: boolean key padding, at [b, j] or [j].
    terms: further proved terms in canonical text, e.g. ``doc[b, i] == doc[b, j]``; `reads` are the loads in them.
    opaque: boolean or additive data that varies with both i and j and has no closed form.
    fill: what a masked score was replaced by, "-inf" or "finite" (a fully masked row then averages all keys).
    """

    causal: bool = False
    window: int | None = None
    symmetric: bool = False
    offset: int | str = 0
    loads: tuple[Load, ...] = ()
    fill: str = "-inf"
    chunk: int = 0
    terms: tuple[str, ...] = ()
    reads: tuple[Load, ...] = ()
    opaque: tuple[Load, ...] = ()

    @property
    def kind(self) -> str:
        """The mask's name, without its padding: "none", "causal", "sliding", "band", "chunked", "other" or "data"."""
        if self.opaque:
            return "data"
        if self.terms:
            return "other"
        if self.chunk:
            return "chunked"
        if self.window is not None:
            return "sliding" if self.causal else "band"
        return "causal" if self.causal else "none"

    @property
    def closed(self) -> bool:
        """Whether every position is decided by a formula, over lengths and data of one index at a time."""
        return not self.opaque

    @property
    def simple(self) -> bool:
        """Whether the bounds and the padding are all there is, with sizes known while compiling."""
        return not (self.opaque or self.terms or self.chunk) and isinstance(self.offset, int)

    @property
    def padded(self) -> bool:
        return bool(self.loads)

    def __str__(self) -> str:
        if isinstance(self.offset, str):
            i = f"i + {self.offset}"
        else:
            i = "i" if self.offset == 0 else f"i + {self.offset}" if self.offset > 0 else f"i - {-self.offset}"
        terms = []
        if self.causal:
            terms.append(f"j <= {i}")
        if self.window is not None:
            terms.append(f"|{i} - j| < {self.window}" if self.symmetric else f"{i} - j < {self.window}")
        if self.chunk:
            terms.append(f"{i if i == 'i' else f'({i})'} // {self.chunk} == j // {self.chunk}")
        data = [str(load) for load in (*self.loads, *self.opaque)]
        return " and ".join([*terms, *self.terms, *data]) or "all"


@dataclass(frozen=True)
class Bias:
    """What is added to the scaled scores: `text` over b, h, i, j and loads.

    kind: "alibi" (a slope per head times a distance), "table" (looked up by a closed index) or "data".
    """

    kind: str
    text: str
    loads: tuple[Load, ...] = ()

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Site:
    """The facts of one attention. Lengths are not part of it: one site serves every sequence length.

    out = softmax(softcap * tanh(scale * q k^T / softcap) + bias, masked) v, the tanh only where softcap > 0.

    path: module path in the model, the closure prefix stripped; ordinal: n-th attention of that module in its graph.
    heads, kv_heads, head_dim, head_dim_v: sizes, where both counts are 0 if they are equal and known at run time only
    (exact mode serves such a site, a plan does not); scale: factor on q·k; dtype: of q, k and v, e.g. "bfloat16".
    sink: "" or what one more column of the soft-max holds: "logit[h]", "logit[b, h, i]" or "0" (off-by-one).
    kv: where K and V come from: "fresh", "cat" (past and new), "write" (a buffer at a position), "ring", "shared"
    (with another site), "cross" (another sequence) or "unknown".
    """

    path: str
    ordinal: int
    pattern: str
    heads: int
    kv_heads: int
    head_dim: int
    head_dim_v: int
    scale: float
    dtype: str
    mask: Mask
    source: str = ""
    softcap: float = 0.0
    bias: Bias | None = None
    sink: str = ""
    kv: str = "fresh"

    @property
    def name(self) -> str:
        """What plans, profiles and reports call the site: its path, with #n where one module holds several."""
        return self.path if self.ordinal == 0 else f"{self.path}#{self.ordinal}"

    @property
    def simple(self) -> bool:
        """Nothing but a scale, a soft-cap and a simple mask stands between the products: what the profiler observes."""
        return self.mask.simple and self.bias is None and not self.sink

    @property
    def plain(self) -> bool:
        """Simple and not soft-capped: what kernels and candidates serve."""
        return self.simple and not self.softcap

    @property
    def canonical(self) -> str:
        """The attention's mathematics in one line: equal for every spelling of the same attention."""
        heads = f"{self.heads or '?'}" if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        dims = f"{self.head_dim}" if self.head_dim == self.head_dim_v else f"{self.head_dim}/{self.head_dim_v}"
        return " ".join([f"heads={heads} dim={dims} scale={self.scale:.6g}", *self.extras, f"keep {self.mask}"])

    @property
    def extras(self) -> list[str]:
        """What stands between the products beside a scale and a mask, as ``name=value``."""
        parts = {"softcap": f"{self.softcap:.6g}" if self.softcap else "", "bias": self.bias, "sink": self.sink}
        return [f"{name}={value}" for name, value in parts.items() if value]

    def __str__(self) -> str:
        return f"{self.name}: {self.pattern} {self.dtype} {self.canonical}"


@dataclass(eq=False)
class Region:
    """A Site and its fx nodes. q, k, v have shapes (B, heads, Sq, D), (B, kv_heads, Sk, D), (B, kv_heads, Sk, Dv).

    out is the original output, in the graph's own layout; what computes (B, heads, Sq, Dv) is viewed back to it by
    `Program.replace`, which reads `match`, the proof. `loads` maps a Load's name to the fx node it reads; `meaning`
    holds the predicate behind the site's mask. `kv_nodes` are the nodes behind ``site.kv``: "k_writer" and "v_writer",
    "k_old" (past keys or buffer), "k_new", "k_position", the same of V, and "position" where both have one."""

    site: Site
    q: torch.fx.Node
    k: torch.fx.Node
    v: torch.fx.Node
    out: torch.fx.Node
    anchor: torch.fx.Node
    loads: dict[str, torch.fx.Node] = field(default_factory=dict)
    match: Any = None
    meaning: Any = None
    kv_nodes: dict[str, torch.fx.Node] = field(default_factory=dict)

    def renew(self, old: torch.fx.Node, new: torch.fx.Node) -> None:
        """Read `new` wherever `old` was read: one attention's result may be the next one's operand as it is."""
        self.q, self.k, self.v = (new if node is old else node for node in (self.q, self.k, self.v))
        for nodes in (self.loads, self.kv_nodes):
            nodes.update({name: new for name, node in nodes.items() if node is old})
        if self.match is not None:
            self.match = self.match.reading(old, new)


@dataclass(frozen=True)
class Choice:
    """What one head is replaced by: a candidate's name and its parameters, as they stand in a plan file."""

    candidate: str
    params: tuple[tuple[str, int | float], ...] = ()

    @classmethod
    def of(cls, candidate: str, params: Mapping[str, int | float] | None = None) -> Choice:
        return cls(candidate, tuple(sorted((params or {}).items())))

    def __getitem__(self, key: str) -> int | float:
        return dict(self.params)[key]

    def __str__(self) -> str:
        params = ", ".join(f"{name}={number_text(value)}" for name, value in self.params)
        return f"{self.candidate}({params})" if params else self.candidate


DENSE = Choice("dense")


@dataclass(frozen=True)
class Share:
    """What a head whose keys are selected did. visited: of the blocks it could visit, those listed, or, where single
    tokens are selected while decoding, of the steps those that selected anew (0 where another layer does); skipped: of
    the blocks listed, those left out by their scores; recalled: of the dense soft-max mass what was attended to, the
    mean over rows."""

    visited: float = 1.0
    skipped: float = 0.0
    recalled: float = 1.0


# Of a head about which nothing is known: it visits everything.
WHOLE = Share()


def page(code: str) -> str:
    """The section of the documentation that explains a code."""
    return f"docs/reasons.md#{code}" if code else ""


@dataclass(frozen=True)
class Miss:
    """Something that looks like attention and was not recognised. Falsy, so a matcher can return it for "no".

    reason: what was seen, and what was expected; code: its name in docs/reasons.md; path, source, node: the module, the
    model's line and the node it was seen at, which `reasons.located` fills in.
    """

    reason: str
    path: str = ""
    source: str = ""
    code: str = ""
    node: str = ""

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return f"{self.path or 'graph'}: not recognised, {self.reason}{place(self)}"


@dataclass(frozen=True)
class Refusal:
    """A recognised site, or a whole graph, that was left as it was. Falsy, so a rewriter can return it for "no".

    Its fields are those of a Miss.
    """

    reason: str
    path: str = ""
    source: str = ""
    code: str = ""
    node: str = ""

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return f"{self.path or 'graph'}: left alone, {self.reason}{place(self)}"


def place(reason: Miss | Refusal) -> str:
    """Where a reason was seen and where it is explained: `` [softmax (aten.softmax.int) at model.py:7, docs/...]``."""
    at = " at ".join(filter(None, (reason.node, reason.source)))
    said = ", ".join(filter(None, (at, page(reason.code))))
    return f" [{said}]" if said else ""


# The name of the last Op of a site that has too many: its op says how many are missing.
REST = "..."


@dataclass(frozen=True, slots=True)
class Op:
    """One node of a site. op: its target, such as "aten.add.Tensor", or "input" for what the site starts from; name: of
    the node, or "q", "k", "v"; inputs: names of other Ops; shape: sizes, such as "2, 8, s0, 64", with the dtype where
    that is no floating one."""

    name: str
    op: str
    inputs: tuple[str, ...] = ()
    shape: str = ""


@dataclass(frozen=True)
class Rewrite:
    """A site that was rewritten: by what, and how its tensors are laid out there.

    before, after: the nodes from q, k, v and what the mask is made of to the output, in the graph's order.
    """

    site: Site
    lowering: str
    choices: tuple[Choice, ...] = ()
    note: str = ""
    before: tuple[Op, ...] = ()
    after: tuple[Op, ...] = ()

    @property
    def path(self) -> str:
        return self.site.name

    def __str__(self) -> str:
        return f"{self.site.name}: {self.lowering}" + (f" ({self.note})" if self.note else "")


@dataclass(frozen=True)
class Step:
    """What one pass did: its name, milliseconds, and node counts before and after.

    text: the graph after it, where texts are kept and it changed something.
    """

    name: str
    milliseconds: float
    before: int
    after: int
    text: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.before} -> {self.after} nodes in {self.milliseconds:.1f} ms"


@dataclass(frozen=True)
class Attempt:
    """What one pattern answered at one of its anchors, a node of the graph: by which rules, or why not."""

    pattern: str
    node: str
    matched: bool
    answer: str

    def __str__(self) -> str:
        return f"{self.pattern} at {self.node}: {self.answer}"


@dataclass(frozen=True)
class GraphReport:
    """What was done to one traced graph, site by site. `fallback`: why the whole graph was left alone, if it was;
    `fallback_code`: the code of that reason; `rules`: how often each named rule applied, most often first; `attempts`:
    what each pattern answered at each of its anchors; `source`: the graph as captured, where texts are kept."""

    sites: tuple[Site, ...] = ()
    rewrites: tuple[Rewrite, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    misses: tuple[Miss, ...] = ()
    history: tuple[Step, ...] = ()
    plan: str = ""
    fallback: str = ""
    notes: tuple[str, ...] = ()
    fallback_code: str = ""
    rules: tuple[tuple[str, int], ...] = ()
    attempts: tuple[Attempt, ...] = ()
    source: str = ""

    @property
    def whole(self) -> Refusal | None:
        """Why the whole graph was left alone, if it was."""
        return Refusal(self.fallback, code=self.fallback_code) if self.fallback else None

    def lines(self) -> list[str]:
        """One line per fact, in the order graph, rewrite, refusal, miss, note."""
        whole = [self.whole] if self.fallback else []
        facts: list[Any] = [*whole, *self.rewrites, *self.refusals, *self.misses, *self.notes]
        return [str(fact) for fact in facts]
