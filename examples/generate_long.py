"""A question about a line 4,000 tokens above, asked of the model with its whole KV cache and with a fifth of it.

    python examples/generate_long.py

The trained model that ships with attnopt, on one text, in a minute on a core. Beside this file lies a plan for it, by

    attnopt profile demo --lengths 1024,2048,4096 --samples 3 --probe 2 --out profile.safetensors
    attnopt plan demo --profile profile.safetensors --objective memory --length 4096 --retrieval 0.5 \\
        --verify-lengths 4096 --samples 16 --probe 6 --out examples/demo_decode_plan.json

at most 1 % of the loss, and 98 % of such questions still answered (99 % with the whole cache).
"""

from __future__ import annotations

from pathlib import Path

import torch

import attnopt
from attnopt import hf
from attnopt.hf.benchmark import compare_decoding
from attnopt.plan import Plan
from attnopt.probe import Probe

PLAN = Path(__file__).parent / "demo_decode_plan.json"
LENGTH, DISTANCE, ANSWER, TIMED, ROUNDS = 4608, 4000, 8, 32, 3


def prompt(probe: Probe) -> tuple[torch.Tensor, str]:
    """Ids (1, N) that end in the question farthest from its answer, and that answer."""
    document = probe.document(LENGTH, seed="example")
    farthest = max(range(len(document.answers)), key=document.distances.__getitem__)
    assert document.distances[farthest] >= DISTANCE
    positions = document.answers[farthest]
    return document.ids[:, : positions[0]], probe.tokenizer.decode(document.ids[0, positions])


def main() -> None:
    loaded, plan = hf.load("demo"), Plan.load(PLAN)
    model, tokenizer = loaded.model, loaded.tokenizer
    ids, answer = prompt(Probe(tokenizer, split="final"))
    question = tokenizer.decode(ids[0, -12:]).splitlines()[-1]
    print(f"after {ids.shape[1]} tokens: {question!r}, bound to {answer.strip()!r} {DISTANCE} tokens above and more")

    def answered() -> str:
        """What the model goes on with, up to the end of the line."""
        found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER, do_sample=False)
        return str(tokenizer.decode(found[0, ids.shape[1] :])).splitlines()[0]

    said = {"dense": answered()}
    attnopt.enable(model, plan)
    said["planned"] = answered()
    print(attnopt.explain(model))
    attnopt.disable(model)
    for which, text in said.items():
        print(f"{which}: {question}{text}  ({'right' if text == answer.strip() else 'wrong'})")
    for row in compare_decoding(model, ids, plan=plan, new_tokens=TIMED, rounds=ROUNDS):
        print(f"{row.variant:16} {row.tokens_per_second:6.1f} tokens/s  {row.cache_mib:6.2f} MiB of cache")


if __name__ == "__main__":
    main()
