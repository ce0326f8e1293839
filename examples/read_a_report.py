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

PAGE = Path("report.html")
LAYERS, LENGTH = 3, 128


def llama() -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=128, intermediate_size=256, num_hidden_layers=LAYERS, num_attention_heads=8,
        num_key_value_heads=2, use_cache=False, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def over_queries(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Not quite an attention: its soft-max is over the queries."""
    return (q @ k.transpose(-2, -1)).softmax(-2) @ v


@torch.no_grad()
def main() -> None:
    model = llama()
    model.compile(backend="attnopt", options={"history": True})
    model(torch.randint(0, 1000, (1, LENGTH)))
    found = attnopt.explain(model)
    print(found)

    print("\nEach site, and what is left of it:")
    for report in found.graphs:
        for rewrite in report.rewrites:
            print(f"  {rewrite.path}: {len(rewrite.before)} nodes -> {len(rewrite.after)}, keeps {rewrite.site.mask}")

    print("\nThe passes that changed something, and what lowering put in:")
    for change in found.history:
        if change.changed:
            print(f"  {change}")
    lowering = next(change for change in found.history if change.name == "lower_exact")
    print("\n".join(f"    {line}" for line in lowering.diff().splitlines() if line.startswith("+scaled_dot")))

    print("\nWhat is left alone, and why:")
    odd = torch.compile(over_queries, backend="attnopt")
    odd(*torch.randn(3, 1, 2, 16, 8))
    for report in attnopt.explain(odd).graphs:
        for reason in (*report.misses, *report.refusals):
            print(f"  {reason.code}: {reason.reason}")

    page = found.write(PAGE)
    print(f"\n{page}: {page.stat().st_size / 1000:.0f} kB, one file that loads nothing")


if __name__ == "__main__":
    main()
