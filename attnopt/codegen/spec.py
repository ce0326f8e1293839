"""KernelSpec: everything an emitted kernel is specialised on. Equal specs share one emitted file.

Per-head spans are not part of it: they are tensor arguments, so that a new plan emits and recompiles nothing. A kernel
family is a subclass, with the fields it has beside the common ones.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import asdict, dataclass
from typing import ClassVar

# Rows of queries, and keys, of a block that selection at run time keeps or drops: 16 is the least a matrix unit takes.
BLOCKS = (16, 32, 64, 128)


@dataclass(frozen=True)
class KernelSpec:
    """What the kernels of every family are specialised on.

    kernel: the family; with the target it names the emitter, ``TARGETS[f"{target} {kernel}"]``. target: "cpu", "triton"
    or "reference"; dtype: torch's name of q, k, v and the output, e.g. "bfloat16".
    """

    kernel: ClassVar[str]

    target: str
    dtype: str
    heads: int
    kv_heads: int
    head_dim: int
    head_dim_v: int

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads do not divide into {self.kv_heads} KV heads")

    @property
    def share(self) -> int:
        """Query heads of a KV head."""
        return self.heads // self.kv_heads

    @property
    def flags(self) -> str:
        """What a family says beside sizes and dtype, joined by ", ": part of the key and of the text."""
        return ""

    def key(self) -> str:
        """A file name stem: readable first, then a hash over every field."""
        digest = hashlib.sha256(repr(sorted(asdict(self).items())).encode()).hexdigest()[:10]
        sizes = f"h{self.heads}k{self.kv_heads}d{self.head_dim}"
        words = [self.kernel, self.target, sizes, self.dtype, *filter(None, self.flags.split(", ")), digest]
        return re.sub(r"\W", "_", "_".join(words))

    def __str__(self) -> str:
        dims = f"dim {self.head_dim}/{self.head_dim_v}"
        name = self.kernel.replace("_", " ")
        flags = f", {self.flags}" if self.flags else ""
        return f"{name} for {self.target}: {self.heads}/{self.kv_heads} heads, {dims}, {self.dtype}{flags}"


@dataclass(frozen=True)
class SpanPrefill(KernelSpec):
    """A causal prefill with per-head sinks and windows: key j is kept by query i of head h where
    ``j <= i and (j < sink[h] or i - j < window[h])`` and, if padded, ``pad[b, j]``. Query and key length are equal.
    """

    kernel: ClassVar[str] = "span_prefill"

    padded: bool

    @property
    def flags(self) -> str:
        return "padded" if self.padded else ""


@dataclass(frozen=True)
class SpanBackward(KernelSpec):
    """The gradients of a `SpanPrefill` at q, k and v, from its output and the logsumexp of its rows."""

    kernel: ClassVar[str] = "span_backward"

    padded: bool

    @property
    def flags(self) -> str:
        return "padded" if self.padded else ""


@dataclass(frozen=True)
class SpanDecode(KernelSpec):
    """A few new queries against a ragged cache, in which every KV head has a segment of slots of its own.

    Every query head of KV head g reads the first ``filled[b, g]`` slots of the segment; which token a slot holds does
    not matter to soft-max. tokens: queries of a head, usually 1. positioned: slots have positions, and query head h at
    position i keeps the key at position p where ``p <= i and (p < sinks[h] or i - p < windows[h])``.
    """

    kernel: ClassVar[str] = "span_decode"

    tokens: int = 1
    positioned: bool = False

    @property
    def flags(self) -> str:
        counted = f"{self.tokens} tokens" if self.tokens != 1 else ""
        return ", ".join(filter(None, (counted, "positioned" if self.positioned else "")))


@dataclass(frozen=True)
class CacheStep(KernelSpec):
    """New tokens against a cache in which KV head g has a sink and a ring of its own, and into it.

    Query head h at position i keeps key p, old or new, where ``p <= i and (p < sink[h] or i - p < window[h])``; then
    the new keys that a later token may ask for are written. How many tokens there are is not part of it: a prompt, a
    chunk of one and a single token run in one file. The slots are those of attnopt/codegen/slots.py.
    """

    kernel: ClassVar[str] = "cache_step"


@dataclass(frozen=True)
class TokenStep(KernelSpec):
    """One new token of each row against a cache that already holds it, for query heads that attend to tokens they
    select (attnopt/codegen/reference_tokens.py). How each selects is a table, no part of it.
    """

    kernel: ClassVar[str] = "token_step"


@dataclass(frozen=True)
class MaskedPrefill(KernelSpec):
    """A prefill under any recovered mask and score modifiers, query and key lengths at will.

    form: the text of an `attnopt.masks.kernel_form.Form`, which says which keys are kept, what is added to the scores,
    their soft-cap and their sink.
    """

    kernel: ClassVar[str] = "masked_prefill"

    form: str


@dataclass(frozen=True)
class Linear(KernelSpec):
    """Fields of the families of linear attention to far keys, whose weights are products of feature maps.

    served: query heads that have a far part, of the model's `heads`; kind and rank: of the maps, a
    `attnopt.feature_maps.FeatureMap` with wq and wk (served, rank, head_dim).
    """

    served: int
    kind: str
    rank: int

    @property
    def flags(self) -> str:
        return f"{self.served} {self.kind}/{self.rank}"


@dataclass(frozen=True)
class LinearPrefill(Linear):
    """Linear attention of query i of a served head to its far keys, s <= j <= i - w where its sink is s and its window
    w, and, if padded, ``pad[b, j]``: a mean of their values, and the logarithm of the sum of their weights.
    """

    kernel: ClassVar[str] = "linear_prefill"

    padded: bool

    @property
    def flags(self) -> str:
        return super().flags + (", padded" if self.padded else "")


@dataclass(frozen=True)
class LinearBackward(LinearPrefill):
    """The gradients of a `LinearPrefill` at q, k and v, from its two results and the gradients at both."""

    kernel: ClassVar[str] = "linear_backward"


@dataclass(frozen=True)
class LinearDecode(Linear):
    """One new query of each served head against a state, to which the key and value that leave its window are added.

    Keys come one row for each served head, so that `kv_heads` says nothing: it is 1.
    """

    kernel: ClassVar[str] = "linear_decode"


@dataclass(frozen=True)
class BlockPrefill(KernelSpec):
    """A causal prefill of some query heads, each block of whose rows visits the blocks of keys that a list names.

    N queries are the last of M >= N keys. Row block r holds the queries from r * block on, column block c the keys from
    c * block on. Which blocks are listed is decided at run time and is no part of it; within a listed block query i, at
    position p = i + M - N, keeps key j where ``j <= p`` and, within a model's own window w > 0, ``p - j < w`` and, if
    padded, ``pad[b, j]``.
    """

    kernel: ClassVar[str] = "block_prefill"

    block: int
    padded: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block not in BLOCKS:
            raise ValueError(f"blocks of {self.block} keys, expected one of {BLOCKS}")

    @property
    def flags(self) -> str:
        return f"blocks of {self.block}" + (", padded" if self.padded else "")
