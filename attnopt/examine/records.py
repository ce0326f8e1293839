"""What examining a model finds out."""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.ir import GraphReport


@dataclass(frozen=True)
class Counted:
    """One attention at a length: query-key pairs of all its heads, for one sequence, before and after.

    lowering: what exact mode would do at that length, "" for nothing, and then `why`. at_most: data (padding,
    documents, how full a cache is) may make it fewer pairs after.
    """

    site: str
    lowering: str
    why: str
    pairs_before: int
    pairs_after: int
    at_most: bool


@dataclass(frozen=True)
class Saving:
    """What a graph would not compute or store any more at a length, for one sequence; all of it is counted.

    length: tokens, or 0 for the sizes that were traced, where they do not follow from tokens. mask_bytes: masks that
    nothing would read, each counted once; repeated_bytes: K and V repeated to every query head; scores_bytes: one
    matrix of scores of every head, where the products are written out. unsized: attentions whose sizes do not follow
    the length, which are not counted.
    """

    length: int
    mask_bytes: int
    repeated_bytes: int
    scores_bytes: int
    sites: tuple[Counted, ...]
    unsized: int = 0

    @property
    def pairs_before(self) -> int:
        return sum(site.pairs_before for site in self.sites)

    @property
    def pairs_after(self) -> int:
        return sum(site.pairs_after for site in self.sites)

    @property
    def at_most(self) -> bool:
        return any(site.at_most for site in self.sites)


@dataclass(frozen=True)
class Timing:
    """Median milliseconds of an attention as it was and as it would be, run operation by operation on random inputs.

    queries, keys: the lengths it was run at; like: sites of the graph that are the same and stand for it; wrong: why it
    was not timed, if the two did not agree.
    """

    site: str
    lowering: str
    queries: int
    keys: int
    before_ms: float
    after_ms: float
    like: int = 1
    wrong: str = ""

    @property
    def ratio(self) -> float:
        """Above 1 is faster; 0 where nothing was timed."""
        return self.before_ms / self.after_ms if self.after_ms else 0.0


@dataclass(frozen=True)
class Graph:
    """A traced graph's report, and the phase it was traced in: "prefill" or "decode", the latter with the class of the
    cache. inputs: what the model calls its inputs, by their positions."""

    report: GraphReport
    phase: str
    cache: str = ""
    savings: tuple[Saving, ...] = ()
    timings: tuple[Timing, ...] = ()
    inputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Break:
    """Where Dynamo ended a graph and began another: its own words, the line of the model, and how often."""

    phase: str
    cache: str
    cause: str
    explanation: str
    remedy: str
    source: str
    times: int = 1


@dataclass(frozen=True)
class Recompile:
    """What a call made Dynamo compile anew. when: what was new of the call; source: the line that the failed guard came
    of, or where the function begins; causes: the guards that failed."""

    phase: str
    cache: str
    when: str
    function: str
    source: str
    causes: tuple[str, ...]


@dataclass(frozen=True)
class Examined:
    """All graphs of a model in the order they were made. notes: what was not traced, and why."""

    graphs: tuple[Graph, ...]
    breaks: tuple[Break, ...] = ()
    recompiles: tuple[Recompile, ...] = ()
    notes: tuple[str, ...] = ()
    device: str = ""

    @property
    def reports(self) -> list[GraphReport]:
        return [graph.report for graph in self.graphs]
