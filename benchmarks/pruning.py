"""What removed heads save: multiplications, memory of activations, keys and values, and CPU time of the graph.

    python -m benchmarks.pruning
    python -m benchmarks.pruning --length 512 --rounds 2

One Llama of random weights is captured and rewritten under plans that remove different heads, and each graph runs as it
is, operation by operation, beside the graph that removes none. Before anything is counted, the result is compared with
the model in which the inputs of the output projection are written over by the means. CPU time is of one thread, both
graphs in turn, the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from attnopt.capture import capture
from attnopt.fingerprint import Fingerprint
from attnopt.fitted import Fitted, Header
from attnopt.ir import DENSE, Choice, Refusal
from attnopt.passes import PIPELINE, Program
from attnopt.plan import Budget, Lengths, Plan, Predicted

TAKES, QUICK = "1 minute", ("--length", "128", "--rounds", "1", "--layers", "1")
HEADS, GROUPS, DIM, WIDTH = 8, 4, 64, 512
PRUNED = Choice("pruned")
# Which heads go, in which layers (all, or every other one). Two consecutive heads share keys.
CASES = {
    "1 of 8": (range(1), 1),
    "2 of 8, with a KV head": (range(2), 1),
    "4 of 8, with 2 KV heads": (range(4), 1),
    "4 of 8, one of each KV head": (range(0, 8, 2), 1),
    "5 of 8, unequal numbers left": ((0, 1, 2, 4, 5), 1),
    "all, every other layer": (range(8), 2),
}


@dataclass(frozen=True)
class Counted:
    """One graph: floating-point operations; bytes of the activations alive at its attentions at most, and anywhere; of
    all keys and values; and of constants that the graph holds beside the model's parameters."""

    flops: int
    alive: int
    peak: int
    keys: int
    constants: int


class Alive(Interpreter):
    """Runs a graph and notes the bytes of the values alive after each operation, without inputs and constants."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=True)
        self.alive, self.peak, self.keys = 0, 0, 0
        self.given: set[int] = set()

    def run_node(self, n: Node) -> Any:
        found = super().run_node(n)
        if n.op in ("placeholder", "get_attr"):
            self.given |= {x.untyped_storage().data_ptr() for x in (found,) if isinstance(x, Tensor)}
        held = {}
        for value in (found, *self.env.values()):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                held[storage.data_ptr()] = storage.nbytes()
        alive = sum(size for at, size in held.items() if at not in self.given)
        self.peak = max(self.peak, alive)
        if n.op == "call_function" and n.target is torch.ops.aten.scaled_dot_product_attention.default:
            self.keys += sum(self.env[x].nbytes for x in n.args[1:3])  # type: ignore[index, union-attr]
            self.alive = max(self.alive, alive)
        return found


def llama(layers: int) -> nn.Module:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=1024, hidden_size=WIDTH, intermediate_size=1376, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=GROUPS, max_position_embeddings=8192,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def plan_of(model: nn.Module, removed: Sequence[int], every: int) -> Plan:
    names = [name for name, _ in model.named_modules() if name.endswith("self_attn")]
    heads = tuple(PRUNED if h in removed else DENSE for h in range(HEADS))
    choices = {n: heads if at % every == 0 else (DENSE,) * HEADS for at, n in enumerate(names)}
    fingerprint = Fingerprint("0" * 16, ())
    means = {n: torch.randn(HEADS, DIM, generator=torch.Generator().manual_seed(at)) / 50 for at, n in enumerate(names)}
    predicted = Predicted(0.0, "density", "million kept pairs", 1.0, 1.0, 1.0, 1.0)
    plan = Plan("random", fingerprint, Budget("kl", 1.0), Lengths((64,), 64), choices, predicted)
    return replace(plan, fitted=Fitted(Header(fingerprint), means=means))


def traced(model: nn.Module, ids: Tensor, plan: Plan | None) -> tuple[GraphModule, list[Any], Tensor]:
    """The rewritten graph, its inputs and the logits."""
    found: list[tuple[GraphModule, list[Any]]] = []

    def backend(gm: GraphModule, inputs: list[Any]) -> Any:
        captured = capture(gm)
        assert not isinstance(captured, Refusal), captured
        program = Program(captured, plan=plan).run(PIPELINE)
        removed = [r for r in program.rewrites if "removed" in r.lowering]
        pruned = [c for c in plan.choices.values() if PRUNED in c] if plan is not None else []
        assert len(removed) == len(pruned), program.report().lines()
        found.append((captured, []))

        def run(*args: Any) -> Any:
            found[0][1][:] = args
            return captured(*args)

        return run

    torch._dynamo.reset()
    logits = torch.compile(model, backend=backend)(ids, use_cache=False).logits
    return *found[0], logits


def expected(model: nn.Module, ids: Tensor, plan: Plan) -> Tensor:
    """The model's logits with the means in front of the output projections."""
    with ExitStack() as hooks:
        for name, choices in plan.choices.items():
            assert plan.fitted is not None
            means, gone = plan.fitted.means[name], [h for h, c in enumerate(choices) if c == PRUNED]

            def write_over(_: nn.Module, inputs: tuple[Tensor], means: Tensor = means, gone: Any = gone) -> Any:
                x = inputs[0].unflatten(-1, (HEADS, DIM)).clone()
                x[..., gone, :] = means[gone]
                return (x.flatten(-2),)

            handle = model.get_submodule(name).o_proj.register_forward_pre_hook(write_over)  # type: ignore[union-attr]
            hooks.callback(handle.remove)
        return model(ids, use_cache=False).logits


def counted(gm: GraphModule, inputs: list[Any]) -> Counted:
    """The products of the attention are counted as written out, all N x N of them."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        gm(*inputs)
    alive = Alive(gm)
    alive.run(*inputs)
    constants = sum(b.nbytes for n, b in gm.named_buffers() if n.startswith("attnopt_weight"))
    return Counted(counter.get_total_flops(), alive.alive, alive.peak, alive.keys, constants)


def ratio(dense: tuple[GraphModule, list[Any]], cut: tuple[GraphModule, list[Any]], rounds: int) -> float:
    """CPU time of the cut graph over that of the other."""
    found = []
    for n in range(rounds + 1):
        times = []
        for gm, inputs in (dense, cut):
            started = time.thread_time()
            gm(*inputs)
            times.append(time.thread_time() - started)
        found += [times[1] / times[0]] * (n > 0)
    return statistics.median(found)


def row(name: str, now: Counted, base: Counted, took: float) -> str:
    mib = " | ".join(f"{size / 2**20:.1f}" for size in (now.alive, now.peak, now.keys, now.constants))
    return f"| {name} | {now.flops / 1e9:.1f} G ({now.flops / base.flops:.2f}) | {mib} | {took:.2f} |"


HEADER = (
    "heads removed",
    "operations",
    "MiB alive at attentions",
    "MiB at most",
    "keys, values",
    "constants",
    "CPU time",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    model, ids = llama(asked.layers), torch.randint(0, 1024, (1, asked.length))
    with torch.no_grad():
        whole = traced(model, ids, None)[:2]
        base = counted(*whole)
        print(f"| {' | '.join(HEADER)} |")
        print("|---|---:|---:|---:|---:|---:|---:|")
        print(row("none", base, base, 1.0))
        for name, (removed, every) in CASES.items():
            plan = plan_of(model, removed, every)
            gm, inputs, logits = traced(model, ids, plan)
            torch.testing.assert_close(logits, expected(model, ids, plan), atol=1e-3, rtol=1e-3)
            now = counted(gm, inputs)
            took = ratio(whole, (gm, inputs), asked.rounds)
            print(row(name, now, base, took))


if __name__ == "__main__":
    main()
