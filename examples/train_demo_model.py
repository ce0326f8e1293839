"""Train attnopt's embedded demo model from scratch.

A Llama-architecture transformer (GQA, RoPE, context 8192) on the source of Python's standard library,
mixed with long-range recall: a name bound far above must be reproduced. Everything comes from this machine.

    python examples/train_demo_model.py --out runs/demo --tokens 10_000_000     # hours on two cores
    python examples/train_demo_model.py --out runs/demo                          # resumes where it stopped
    python examples/train_demo_model.py --out runs/mha --shape mha --context 2048 --tokens 8_000_000
    python examples/train_demo_model.py --out /tmp/t --tokens 20_000 --tiny      # a minute: checks the script

Writes into OUT: tokenizer.json, checkpoint.safetensors (weights and optimiser), state.json, loss.png and, at the
end, model/ in transformers format (bf16 safetensors).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from attnopt.corpus import bind_line, binding, library_texts, query_line, single_token_words

VOCABULARY = 4096
CONTEXT = 8192
# Layers, hidden size, query heads, KV heads. The demo model, the one that --tiny takes, and two to compare planners on
# as well (benchmarks/planner.py): every query head with keys of its own, and more layers with three heads to a KV head.
SHAPES = {"demo": (6, 256, 8, 4), "tiny": (2, 64, 4, 2), "mha": (4, 256, 8, 8), "deep": (9, 192, 6, 2)}
# Letters, digits one by one, punctuation runs, indentation: a name's parts stay whole tokens.
SPLIT = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}_]+| ?_+|\n+ *|\s+"
# (until this share of the run, sequence length, sequences a step, largest position): most training is at short
# lengths. The third stage keeps the cost of 2048 tokens but spreads their positions over the whole context.
CURRICULUM = ((0.50, 512, 16, 512), (0.70, 2048, 4, 2048), (0.90, 2048, 4, CONTEXT), (1.0, CONTEXT, 1, CONTEXT))
# Up to a shorter context: the same without the stages that are longer.
SHORT_CURRICULUM = ((0.65, 512, 16, 512), (1.0, 2048, 4, 2048))
PEAK_LR = 3e-3
# Files that --tiny reads.
TINY_FILES = 40
WARMUP = 0.02
COOLDOWN = 0.35


def train_tokenizer(path: Path, files: int | None = None) -> PreTrainedTokenizerFast:
    if not path.exists():
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(SPLIT), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<|file|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=sys.stderr.isatty(),
        )
        bpe.train_from_iterator(itertools.islice(library_texts("train"), files), trainer)
        path.parent.mkdir(parents=True, exist_ok=True)
        bpe.save(str(path))
    return PreTrainedTokenizerFast(
        tokenizer_file=str(path), bos_token="<|file|>", eos_token="<|file|>", clean_up_tokenization_spaces=False
    )


def encode_library(tokenizer: PreTrainedTokenizerFast, cache: Path, files: int | None = None) -> np.ndarray:
    """All training text as one array of token ids, file boundaries marked by the bos token."""
    if not cache.exists():
        ids: list[int] = []
        for text in itertools.islice(library_texts("train"), files):
            ids.append(tokenizer.bos_token_id)
            ids.extend(tokenizer.encode(text, add_special_tokens=False))
        partial = cache.with_suffix(".partial.npy")
        np.save(partial, np.asarray(ids, dtype=np.uint16))
        partial.replace(cache)
    return np.load(cache)


def positions(rng: random.Random, length: int, reach: int) -> list[int]:
    """`length` rising positions below `reach`: up to three runs with gaps between them.

    Distances up to `reach` are learned at the cost of `length` tokens (PoSE, Zhu et al. 2023).
    """
    spare = rng.randrange(reach - length + 1)
    cuts = sorted(rng.randrange(1, length) for _ in range(rng.choice((1, 2))))
    marks = [*sorted(rng.randrange(spare + 1) for _ in cuts[1:]), spare]
    places = list(range(length))
    for cut, (low, high) in zip(cuts, itertools.pairwise([0, *marks]), strict=True):
        places[cut:] = [p + high - low for p in places[cut:]]
    return places


class Batches:
    """Random windows of the library with recall lines set between its lines; deterministic in (seed, step)."""

    def __init__(self, ids: np.ndarray, tokenizer: PreTrainedTokenizerFast, seed: int = 0):
        self.ids, self.tokenizer, self.seed = ids, tokenizer, seed
        self.words = single_token_words(tokenizer)
        vocabulary = tokenizer.get_vocab()
        self.line_end = np.zeros(len(vocabulary), dtype=bool)
        for token, index in vocabulary.items():
            self.line_end[index] = token.startswith("Ċ")

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def sequence(self, rng: random.Random, length: int) -> tuple[list[int], list[float]]:
        """Token ids and loss weights of one training sequence of `length` + 1 tokens."""
        kind = rng.random()
        if kind < 0.35:
            return self.plain(rng, length)
        # Dense recall teaches the mechanism, sparse recall teaches it to reach through code.
        share = 0.8 if kind < 0.60 and length <= 2048 else rng.choice((0.1, 0.25, 0.4))
        return self.with_recall(rng, length, share)

    def plain(self, rng: random.Random, length: int) -> tuple[list[int], list[float]]:
        start = rng.randrange(len(self.ids) - length - 1)
        return self.ids[start : start + length + 1].tolist(), [1.0] * (length + 1)

    def with_recall(self, rng: random.Random, length: int, share: float) -> tuple[list[int], list[float]]:
        cursor = rng.randrange(len(self.ids) - length - 1)
        ids: list[int] = []
        weights: list[float] = []
        bound: list[tuple[str, str]] = []
        ceiling = max(4, rng.randrange(length // 24 + 2))
        inserted = 0
        while len(ids) <= length:
            if inserted < share * len(ids) or not ids:
                if not bound or (len(bound) < ceiling and rng.random() < 0.4):
                    bound.append(binding(rng, self.words))
                    line = self.encode(bind_line(*bound[-1]))
                    ids += line
                    # Nothing can be learned of a random name: its tokens are context only.
                    weights += [0.0] * len(line)
                    inserted += len(line)
                else:
                    # Half of the questions lean towards the names bound first, which are the farthest away.
                    named = bound[int(len(bound) * rng.random() ** rng.choice((1, 3)))]
                    question, answer = (self.encode(part) for part in query_line(*named))
                    ids += question + answer
                    weights += [0.0] * len(question) + [2.0] * len(answer)
                    inserted += len(question) + len(answer)
            else:
                stop = cursor + 1
                while stop < min(cursor + 40, len(self.ids) - 1) and not self.line_end[self.ids[stop - 1]]:
                    stop += 1
                run = self.ids[cursor:stop].tolist()
                cursor = stop if stop < len(self.ids) - 2 else 0
                ids += run
                weights += [1.0] * len(run)
        return ids[: length + 1], weights[: length + 1]

    def batch(self, step: int, length: int, size: int, reach: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token ids and loss weights (size, length + 1), positions (size, length) below `reach`."""
        rng = random.Random(self.seed * 1_000_003 + step)
        rows = [self.sequence(rng, length) for _ in range(size)]
        places = [positions(rng, length, reach) for _ in range(size)]
        return torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows]), torch.tensor(places)


def build_model(shape: str, context: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    layers, hidden, heads, kv_heads = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def build_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon on the hidden matrices, AdamW on the embedding and the norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=PEAK_LR, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def lr_factor(progress: float) -> float:
    return max(0.01, min(1.0, progress / WARMUP, (1 - progress) / COOLDOWN))


def save_checkpoint(out: Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer], state: dict) -> None:
    tensors = {f"model.{k}": v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    for i, optimizer in enumerate(optimizers):
        for index, values in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{index}.{k}": torch.as_tensor(v) for k, v in values.items()}
    partial = out / "checkpoint.partial"
    # The state travels in the file's header, so that weights and step can never disagree.
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, partial, metadata={"state": json.dumps(state)})
    partial.replace(out / "checkpoint.safetensors")


def load_checkpoint(out: Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer]) -> dict | None:
    path = out / "checkpoint.safetensors"
    if not path.exists():
        return None
    from safetensors import safe_open

    with safe_open(path, "pt") as f:
        state = json.loads(f.metadata()["state"])
    tensors = load_file(path)
    weights = {k[len("model.") :]: v for k, v in tensors.items() if k.startswith("model.")}
    model.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    for i, optimizer in enumerate(optimizers):
        filled: dict[int, dict] = {}
        for key, value in tensors.items():
            if key.startswith(f"optimizer.{i}."):
                index, name = key.split(".", 3)[2:]
                filled.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict(optimizer.state_dict() | {"state": filled})
    return state


def draw_loss(out: Path, history: list[list[float]]) -> None:
    if not history:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tokens, code, recall, length = (np.asarray(column) for column in zip(*history, strict=True))
    figure, axes = plt.subplots(figsize=(8, 4.5))
    axes.plot(tokens / 1e6, code, lw=1.2, label="library code")
    axes.plot(tokens / 1e6, recall, lw=1.2, label="recalled answers")
    for change in np.flatnonzero(np.diff(length)):
        axes.axvline(tokens[change + 1] / 1e6, color="0.7", ls=":")
        axes.text(tokens[change + 1] / 1e6, axes.get_ylim()[1], f" {int(length[change + 1])}", va="top", color="0.4")
    axes.set(xlabel="tokens seen (millions)", ylabel="training loss (nats per token)", title="attnopt demo model")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out / "loss.png", dpi=110)
    plt.close(figure)


def train(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    files = TINY_FILES if args.tiny else None
    curriculum = CURRICULUM if args.context == CONTEXT else SHORT_CURRICULUM
    tokenizer = train_tokenizer(args.out / "tokenizer.json", files)
    batches = Batches(encode_library(tokenizer, args.out / "library.npy", files), tokenizer)
    model = build_model("tiny" if args.tiny else args.shape, args.context).to(device)
    optimizers = build_optimizers(model)
    state = load_checkpoint(args.out, model, optimizers) or {
        "step": 0,
        "tokens": 0,
        "budget": args.tokens or 10_000_000,
        "history": [],
    }
    if args.tokens:
        state["budget"] = args.tokens
    step_model = torch.compile(model, dynamic=False) if args.compile else model
    model.train()
    recent: list[tuple[float, float]] = []
    saved = time.monotonic()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>5.1f}%"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("training", total=state["budget"], completed=state["tokens"])
        while state["tokens"] < state["budget"]:
            progress = state["tokens"] / state["budget"]
            length, size, reach = next(stage for end, *stage in curriculum if progress < end)
            started = time.monotonic()
            ids, weights, places = (t.to(device) for t in batches.batch(state["step"], length, size, reach))
            factor = lr_factor(progress)
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = PEAK_LR * factor
            with torch.autocast(device, dtype=torch.bfloat16):
                # With an explicit mask a gap between positions is not taken for a border between documents.
                seen = torch.ones_like(places)
                logits = step_model(ids[:, :-1], attention_mask=seen, position_ids=places, use_cache=False).logits
            losses = torch.nn.functional.cross_entropy(
                logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
            )
            target = weights[:, 1:].flatten()
            loss = (losses * target).sum() / target.sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            losses = losses.detach()
            recent.append((losses[target == 1].mean().item(), losses[target == 2].mean().item()))
            state["step"] += 1
            state["tokens"] += length * size
            bar.update(
                task,
                completed=state["tokens"],
                description=f"n={length} code {recent[-1][0]:.2f} recall {recent[-1][1]:.2f}",
            )
            if state["step"] % 10 == 0:
                code, recall = (
                    float(np.nanmean([r[i] for r in recent])) if not all(math.isnan(r[i]) for r in recent) else 0.0
                    for i in (0, 1)
                )
                state["history"].append([state["tokens"], code, recall, length])
                rate = length * size / (time.monotonic() - started)
                print(
                    f"step {state['step']} tokens {state['tokens']} n {length} "
                    f"code {code:.3f} recall {recall:.3f} {rate:.0f} tokens/s",
                    flush=True,
                )
                recent.clear()
            if time.monotonic() - saved > args.save_every:
                save_checkpoint(args.out, model, optimizers, state)
                draw_loss(args.out, state["history"])
                saved = time.monotonic()
    save_checkpoint(args.out, model, optimizers, state)
    draw_loss(args.out, state["history"])
    model.to(torch.bfloat16).save_pretrained(args.out / "model")
    tokenizer.save_pretrained(args.out / "model")
    print(f"wrote {args.out / 'model'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=None, help="train until this many tokens were seen")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="demo", help="layers, width and heads")
    parser.add_argument("--context", type=int, choices=(2048, CONTEXT), default=CONTEXT)
    parser.add_argument("--tiny", action="store_true", help="a two-layer model on a few files, to check the script")
    parser.add_argument("--compile", action="store_true", help="compile the training step with inductor")
    parser.add_argument("--save-every", type=float, default=240, help="seconds between checkpoints")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
