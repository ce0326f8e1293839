"""What attnopt adds to a cold compile: seconds of export and of its own passes beside inductor's.

    python benchmarks/capture_cost.py [--layers 12] [--repeat 3]

A Llama of the given number of layers with hidden size 256, in evaluation mode. Inductor's caches are off. Each figure
is the least of the repeats: whatever else runs on the machine only adds. The output is compared with eager's.
"""

from __future__ import annotations

import argparse
import platform
import time
from typing import Any

import torch


def model_of(layers: int) -> Any:
    import transformers

    sizes = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()


def compile_once(model: Any, ids: torch.Tensor, backend: Any) -> float:
    """Seconds of the first call, checked against eager."""
    torch._dynamo.reset()
    call = torch.compile(model, backend=backend)
    with torch.no_grad():
        started = time.perf_counter()
        found = call(ids, use_cache=False).logits
        seconds = time.perf_counter() - started
        torch.testing.assert_close(found, model(ids, use_cache=False).logits, atol=1e-3, rtol=1e-3)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--passes-only", action="store_true", help="do not compile with inductor alone")
    chosen = parser.parse_args()

    import torch._inductor.config as inductor

    from attnopt import backend

    inductor.force_disable_caches = True
    model, ids = model_of(chosen.layers), torch.randint(0, 512, (1, chosen.length))
    whole, runs = [], []
    for _ in range(chosen.repeat):
        backend.clear_reports()
        whole.append(compile_once(model, ids, backend.attnopt))
        (report,) = backend.reports()
        runs.append({step.name: step.milliseconds / 1e3 for step in report.history})
    alone = [] if chosen.passes_only else [compile_once(model, ids, "inductor") for _ in range(chosen.repeat)]
    least = {name: min(run[name] for run in runs) for name in runs[0]}
    base = min(alone, default=float("nan"))
    passes = sum(seconds for name, seconds in least.items() if name != "capture")
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{chosen.layers} layers, {len(report.rewrites)} attentions rewritten, least of {chosen.repeat}")
    print(f"  inductor alone     {base:7.2f} s")
    print(f"  attnopt, all of it {min(whole):7.2f} s")
    print(f"  export             {least['capture']:7.2f} s {100 * least['capture'] / base:6.1f} %")
    print(f"  passes             {passes:7.2f} s {100 * passes / base:6.1f} %")
    for name, seconds in least.items():
        if name != "capture":
            print(f"    {name:18} {seconds * 1e3:7.1f} ms")


if __name__ == "__main__":
    main()
