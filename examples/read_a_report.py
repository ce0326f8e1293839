"""What attnopt did to a model, read from Python: what was saved, what was left alone and why, and which pass did it.

    python examples/read_a_report.py

A stock Llama with random weights, and a function with an attention that attnopt leaves alone. In a notebook, the last
line of a cell need only be `attnopt.explain(model)`.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

import attnopt

PAGE = "report.html"
LENGTH = 128


def llama() -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, use_cache=False, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def over_queries(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention with a soft-max over the queries: none that attnopt knows."""
    return (q @ k.transpose(-2, -1)).softmax(-2) @ v


@torch.no_grad()
def main() -> None:
    model = llama()
    compiled = torch.compile(model, backend="attnopt", options={"history": True})
    compiled(torch.randint(0, 1000, (1, LENGTH)))
    found = attnopt.explain(compiled)

    print(found)

    for report in found.graphs:
        for rewrite in report.rewrites:
            print(f"{rewrite.path}: {len(rewrite.before)} nodes -> {len(rewrite.after)}, keeps {rewrite.site.mask}")

    longest = max(found.history, key=lambda change: change.milliseconds)
    print(f"the longest pass: {longest.name}, {longest.milliseconds:.0f} ms")
    for change in found.history:
        if change.name == "lower_exact":
            print("\n".join(change.diff().splitlines()[:12]))

    odd = torch.compile(over_queries, backend="attnopt")
    odd(*torch.randn(3, 1, 2, 16, 8))
    for report in attnopt.explain(odd).graphs:
        for miss in report.misses:
            print(f"not recognised: {miss.reason} ({miss.code})")

    page = found.write(Path(PAGE))
    print(f"{page}: {page.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
