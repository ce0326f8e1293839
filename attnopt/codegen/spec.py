"""KernelSpec: everything an emitted kernel is specialised on. Equal specs share one emitted file.

Per-head spans are not part of it: they are tensor arguments, so that a new plan emits and recompiles nothing.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class KernelSpec:
    """A causal prefill with per-head sinks and windows: key j is kept by query i of head h where
    ``j <= i and (j < sink[h] or i - j < window[h])`` and, if padded, ``pad[b, j]``. Query and key length are equal.

    target: "cpu", "triton" or "reference"; dtype: torch's name of q, k, v and the output, e.g. "bfloat16".
    """

    target: str
    dtype: str
    heads: int
    kv_heads: int
    head_dim: int
    head_dim_v: int
    padded: bool

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads do not divide into {self.kv_heads} KV heads")

    def key(self) -> str:
        """A file name stem: readable first, then a hash over every field."""
        digest = hashlib.sha256(repr(sorted(asdict(self).items())).encode()).hexdigest()[:10]
        sizes = f"h{self.heads}k{self.kv_heads}d{self.head_dim}"
        return f"span_{self.target}_{sizes}_{self.dtype}{'_pad' if self.padded else ''}_{digest}"

    def __str__(self) -> str:
        return (
            f"span prefill for {self.target}: {self.heads}/{self.kv_heads} heads, "
            f"dim {self.head_dim}/{self.head_dim_v}, "
            f"{self.dtype}{', padded' if self.padded else ''}"
        )
