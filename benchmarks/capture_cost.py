"""What attnopt adds to a cold compile: processor time of export and of its own passes beside inductor's.

    python benchmarks/capture_cost.py [--layers 12] [--repeat 3] [--out FILE]

A Llama of the given number of layers with hidden size 256, in evaluation mode. Inductor's caches are off. Processor
time counts the compilers that inductor starts; wall time depends on what else the machine does. Each figure is the
least of the repeats. The output is compared with eager's.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

TAKES = "3 min"
QUICK = ("--layers", "2", "--repeat", "1")


def model_of(layers: int) -> Any:
    import transformers

    sizes = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()


def processor_seconds() -> float:
    """Of this process and of the ones it has waited for."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def timed(step: Callable[..., Any], into: list[float]) -> Callable[..., Any]:
    """`step`, noting the processor time of each call."""

    def call(*args: Any, **kwargs: Any) -> Any:
        started = time.process_time()
        try:
            return step(*args, **kwargs)
        finally:
            into.append(time.process_time() - started)

    return call


def compile_once(model: Any, ids: torch.Tensor, backend: Any) -> tuple[float, float]:
    """Processor and wall seconds of the first call, checked against eager."""
    torch._dynamo.reset()
    call = torch.compile(model, backend=backend)
    with torch.no_grad():
        before, started = processor_seconds(), time.perf_counter()
        found = call(ids, use_cache=False).logits
        seconds = processor_seconds() - before, time.perf_counter() - started
        torch.testing.assert_close(found, model(ids, use_cache=False).logits, atol=1e-3, rtol=1e-3)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", help="write the figures to this file, as JSON")
    chosen = parser.parse_args()

    import torch._inductor.config as inductor

    from attnopt import backend, passes
    from attnopt.report.data import environment

    inductor.force_disable_caches = True
    torch.set_num_threads(1)
    model, ids = model_of(chosen.layers), torch.randint(0, 512, (1, chosen.length))
    export: list[float] = []
    own: list[float] = []
    backend.capture = timed(backend.capture, export)
    passes.Program.run = timed(passes.Program.run, own)  # type: ignore[method-assign]
    whole = [compile_once(model, ids, backend.attnopt) for _ in range(chosen.repeat)]
    report = backend.reports()[-1]
    assert len(report.rewrites) == chosen.layers, report.lines()
    alone = [compile_once(model, ids, "inductor") for _ in range(chosen.repeat)]
    base = min(alone)[0]
    figures = {
        # Without variables: one is a folder of this machine.
        **{k: v for k, v in environment().items() if k != "variables"},
        "layers": chosen.layers,
        "inductor_cpu_s": base,
        "inductor_wall_s": min(wall for _, wall in alone),
        "attnopt_cpu_s": min(whole)[0],
        "attnopt_wall_s": min(wall for _, wall in whole),
        "export_cpu_s": min(export),
        "export_percent": 100 * min(export) / base,
        "passes_cpu_s": min(own),
        "passes_percent": 100 * min(own) / base,
    }
    text = json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in figures.items()}, indent=2)
    print(text)
    if chosen.out:
        Path(chosen.out).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
