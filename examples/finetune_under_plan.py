"""Fine-tune the trained model that ships with attnopt under a plan that is too aggressive for it.

    python examples/finetune_under_plan.py

Every head but two of each layer keeps 2 sinks and a window of 4 tokens. The loss on held-out text rises by 0.77 nats;
24 steps of training under the plan, whose windows the gradients follow, win 0.10 of them back. It takes 40 seconds of
CPU time, most of it inductor's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from attnopt import hf, text
from attnopt.commands import examine_model
from attnopt.fingerprint import fingerprint_of
from attnopt.ir import DENSE, Choice, Site
from attnopt.plan import Budget, Lengths, Plan, Predicted

LENGTH, BATCH, STEPS = 128, 4, 24
DENSE_HEADS = 2


def plan_of(model: torch.nn.Module, sites: list[Site]) -> Plan:
    """Made by hand: nothing of it is predicted or verified, which `attnopt plan` would do."""
    window = Choice.of("sink_window", {"sink": 2, "alpha": 4, "beta": 0.0})
    choices = {s.name: (DENSE,) * DENSE_HEADS + (window,) * (s.heads - DENSE_HEADS) for s in sites}
    kept = Predicted(0.0, "density", "million kept pairs", 1.0, 1.0, 1.0, 1.0)
    return Plan("demo", fingerprint_of(model, sites), Budget("loss", 100.0), Lengths((), LENGTH), choices, kept)


def loss_of(call: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next tokens of ids (batch, length), in nats."""
    logits = call(ids, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def main() -> None:
    loaded = hf.load("demo")
    model = loaded.model
    (graph,) = examine_model(loaded, LENGTH)
    planned = torch.compile(model, backend="attnopt", options={"plan": plan_of(model, list(graph.sites))})

    def sequences(split: str, count: int) -> torch.Tensor:
        return text.sequences(text.stream([], loaded.tokenizer, split, 2 * count * LENGTH), LENGTH, count, split)

    held_out = sequences("final", 4 * BATCH).split(BATCH)

    def measured(call: torch.nn.Module) -> float:
        return sum(loss_of(call, ids).item() for ids in held_out) / len(held_out)

    dense, before = measured(model), measured(planned)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for step, ids in enumerate(sequences("calibrate", STEPS * BATCH).split(BATCH)):
        optimiser.zero_grad()
        loss = loss_of(planned, ids)
        loss.backward()
        optimiser.step()
        if step % 8 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    after = measured(planned)
    print(f"held-out loss: {dense:.3f} dense, {before:.3f} under the plan, {after:.3f} fine-tuned under it")
    print(f"won back: {before - after:.3f} of {before - dense:.3f} nats")


if __name__ == "__main__":
    main()
