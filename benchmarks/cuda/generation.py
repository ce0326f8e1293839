"""Tokens per second of `model.generate` at equal memory: attnopt's cache of half the bytes has twice the sequences.

A Llama of random weights in bfloat16, 8 layers of the size of an 8B model's. The other side is transformers with its
fastest attention that is installed and, of its caches, the faster one. No step is compiled on either side. Also told:
whether transformers repeats keys and values in a step with a padding mask over a StaticCache.
"""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnopt.fingerprint import fingerprint_of
from attnopt.ir import DENSE, Choice
from attnopt.plan import Budget as PlanBudget
from attnopt.plan import Lengths, Plan, Predicted
from attnopt.profiler import discover
from benchmarks.cuda.baselines import installed
from benchmarks.cuda.cache import HALF
from benchmarks.cuda.device import Budget, Device
from benchmarks.record import Aim, Row
from benchmarks.spans import SINK, Sizes

EQUAL_MEMORY, SAME_BATCH = "tokens per second at equal memory", "tokens per second at the same batch"
# (tokens, sequences of the dense cache); in a dry run the last alone, of a small model.
CASES = ((16384, 16), (16384, 1))
DRY_CASE = (96, 1)
NEW, LAYERS = 16, 8
# Of logits after the prompt, the exact cache's against DynamicCache.
TOLERANCE = 3e-2


def model_of(sizes: Sizes, device: Device) -> Any:
    import transformers

    heads, dim = sizes.heads, sizes.dims[0]
    dry = {"num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 64}
    real = {"num_hidden_layers": LAYERS, "intermediate_size": 14336, "vocab_size": 32768}
    config = transformers.LlamaConfig(
        hidden_size=heads * dim, num_attention_heads=heads, num_key_value_heads=sizes.kv_heads, bos_token_id=None,
        eos_token_id=None, max_position_embeddings=2 * CASES[0][0], **(dry if device.dry else real),
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    with torch.device(device.where):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    # On CUDA, generation would compile a StaticCache's steps, for a minute.
    model.generation_config.disable_compile = True
    return model


def plan_of(model: Any, sizes: Sizes, length: int) -> Plan:
    """KV heads that keep `HALF` of the tokens."""
    share, sink = sizes.heads // sizes.kv_heads, max(1, SINK // sizes.shrink)
    kept = [HALF[g % len(HALF)] for g in range(sizes.kv_heads) for _ in range(share)]
    choices = tuple(
        DENSE if part == 1 else Choice.of("sink_window", {"sink": sink, "alpha": -sink, "beta": part}) for part in kept
    )
    sites = discover(model, torch.arange(8, device=model.device)[None]).sites
    return Plan(
        model="random",
        fingerprint=fingerprint_of(model, list(sites.values())),
        budget=PlanBudget("kl", 1.0),
        lengths=Lengths((length,), length),
        choices=dict.fromkeys(sites, choices),
        predicted=Predicted(0.0, "density", "million kept pairs", 1.0, 1.0, 1.0, 1.0),
    )


def milliseconds(model: Any, variant: str, plan: Plan | None, ids: Tensor, new: int) -> float:
    """Of a decode step of all sequences, the median of one generation, after its first steps."""
    from attnopt.hf import benchmark

    prefix = benchmark.Prefix(variant, plan)
    with benchmark.running(model, prefix):
        prefix.cache = benchmark.empty_cache(model, prefix, ids.shape[1] + new)
        # In pieces: the activations of a whole prompt would take more than its cache.
        for piece in ids[:, :-1].split(max(1, 2**17 // len(ids)), 1):
            model(piece, past_key_values=prefix.cache, logits_to_keep=1)
        clock = benchmark.Clock()
        benchmark.decode(model, ids, None, prefix.cache, new, clock)
    return 1e3 * statistics.median(clock.steps[new // 4 :])


@torch.no_grad()
def measure(model: Any, device: Device, sizes: Sizes, length: int, batch: int, notes: list[str]) -> Row:
    from attnopt.hf import benchmark

    attention = model.config._attn_implementation
    generator = torch.Generator(device.where).manual_seed(1)
    ids = torch.randint(0, 64, (2 * batch, length), device=device.where, generator=generator)
    times, new = {}, 4 if device.dry else NEW
    for variant in (benchmark.DYNAMIC, benchmark.STATIC):
        try:
            times[f"{variant}, {attention}"] = milliseconds(model, variant, None, ids[:batch], new)
        except Exception as error:  # not every attention takes every cache
            notes.append(f"{variant}, {attention}: {(str(error).splitlines() or [''])[0][:160]}")
    best = min(times.values())
    plan = plan_of(model, sizes, length + new)
    for name, rows in (("attnopt", batch), ("attnopt, twice the sequences", 2 * batch)):
        times[name] = milliseconds(model, benchmark.PLANNED, plan, ids[:rows], new)
    ratios = {
        EQUAL_MEMORY: 2 * best / times["attnopt, twice the sequences"],
        SAME_BATCH: best / times["attnopt"],
    }
    few = ids[:1, : min(length, 1024)]
    prefixes = [benchmark.Prefix(variant, None) for variant in (benchmark.DYNAMIC, benchmark.EXACT)]
    benchmark.fill(model, prefixes, few, None, 1, lambda _: None)
    case = {"kernel": "generation", "batch": batch, "context": length, "attention": attention}
    return Row(case, prefixes[1].error, TOLERANCE, ratios, {}, times)


class Largest(TorchDispatchMode):
    """The most bytes that one operation's result takes, which is no view of what was there before."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.operator = 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        held = {x.untyped_storage().data_ptr() for x in torch.utils._pytree.tree_leaves(args) if torch.is_tensor(x)}
        found = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(found):
            if torch.is_tensor(x) and x.untyped_storage().data_ptr() not in held:
                size = x.untyped_storage().nbytes()
                self.bytes, self.operator = max((self.bytes, self.operator), (size, str(func)))
        return found


@torch.no_grad()
def told_repeats(model: Any, device: Device, sizes: Sizes) -> str:
    """What a decode step over a StaticCache makes beside it, in keys of a layer, with a padding mask and without."""
    import transformers

    slots, told = 96 if device.dry else 8192, []
    for masked in (False, True):
        cache = transformers.StaticCache(config=model.config, max_cache_len=slots)
        mask = torch.ones(2, 33, dtype=torch.long, device=device.where)
        mask[0, :7] = int(not masked)
        ids = torch.arange(2 * 33, device=device.where).view(2, 33) % 64
        given = {"past_key_values": cache, "attention_mask": None}
        model(ids[:, :32], **given | ({"attention_mask": mask[:, :32]} if masked else {}))
        with Largest() as largest:
            model(ids[:, 32:], **given | ({"attention_mask": mask} if masked else {}))
        times = largest.bytes / cache.layers[0].keys.nbytes
        told.append(f"{'with' if masked else 'without'} a padding mask {times:.2f} times its keys ({largest.operator})")
    version, where = transformers.__version__, device.where.type
    return (
        f"transformers {version} on {where}, one token over a StaticCache, {sizes.heads} over {sizes.kv_heads} heads: "
        f"the largest tensor that a layer makes is {'; '.join(told)}"
    )


def section(device: Device, sizes: Sizes, budget: Budget) -> list[Row]:
    """Rows of every case that there is time for, and the note on repeated keys."""
    rows: list[Row] = []
    if installed("transformers", budget.notes) is None:
        return rows

    def one(length: int, batch: int) -> None:
        rows.append(measure(made[0], device, sizes, length, batch, budget.notes))
        print(f"  {rows[-1]}", flush=True)

    made: list[Any] = []
    budget.attempt("the model", lambda: made.append(model_of(sizes, device)))
    if not made:
        return rows
    budget.attempt("repeated keys", lambda: budget.notes.append(told_repeats(made[0], device, sizes)))
    if not device.dry and installed("flash_attn", budget.notes) is not None:
        made[0].set_attn_implementation("flash_attention_2")
    for length, batch in (DRY_CASE,) if device.dry else CASES:
        budget.attempt(f"{batch} sequences of {length}", partial(one, length, batch))
    return rows


def aims(rows: list[Row]) -> list[Aim]:
    """At the larger batches, where a step is reading the cache; one sequence alone is launches."""
    large = [r.ratios[EQUAL_MEMORY] for r in rows if not r.wrong and r.case["batch"] >= 8]
    # MoA's own claim, 5.5 to 6.7, for whole models against transformers with FlashAttention 2.
    return [Aim("generation, half of the bytes: tokens per second at equal memory", 5.5, min(large, default=None))]
