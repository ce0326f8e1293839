"""Measure attnopt's embedded demo model on text it never saw, and write its model card from the figures.

    python examples/evaluate_demo_model.py                 # every figure, a few minutes on two cores
    python examples/evaluate_demo_model.py --quick         # fewer windows, queries and heads
    python examples/evaluate_demo_model.py --write-card    # also the card and its pictures, beside the model

Held-out text is the "final" split of the standard library (attnopt/corpus.py). Measured are bits per byte, recall of
names bound a known number of tokens above, how far each head looks, and which heads recall depends on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from demo_model_card import ABLATION_DISTANCE, ASKED, LOCAL_WINDOWS, card, draw, show
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from attnopt.corpus import bind_line, binding, library_texts, query_line, single_token_words
from attnopt.hf import demo_model_path, load
from attnopt.instrument import Attention, Instrumented
from attnopt.ir import DENSE, Choice, Site
from attnopt.measure import Spans
from attnopt.probe import Document, Recall, recall
from attnopt.statistics import Grid, Observation, attention, distance_buckets, measure_forward

CONTEXTS = (2048, 8192)
DISTANCES = (256, 512, 1024, 2048, 4096, 7500)
QUERIES, QUICK_QUERIES = 96, 20
# Bindings beside those asked for that never are.
DISTRACTORS = 8
# Tokens from the first binding to the last; a document is this much longer than its distance.
ZONE = 640
NARROW = Choice.of("sink_window", {"sink": 4, "alpha": 64, "beta": 0.0})
Head = tuple[str, int]


class HeldOut:
    """The held-out text as token ids, files set apart by the bos token."""

    def __init__(self, tokenizer: Any, split: str = "final") -> None:
        self.tokenizer = tokenizer
        self.bos = tokenizer.bos_token_id
        ids: list[int] = []
        for text in library_texts(split):
            ids += [self.bos, *tokenizer.encode(text, add_special_tokens=False)]
        self.ids = ids
        self.words = single_token_words(tokenizer)
        names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        # In a byte-level vocabulary every character of a token stands for one byte.
        self.sizes = torch.tensor([0 if n == self.bos else len(name) for n, name in enumerate(names)])
        self.ends_line = [name.startswith("Ċ") for name in names]

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def windows(self, length: int, stretches: int) -> list[Tensor]:
        """Windows (1, length + 1) that tile `stretches` pieces of 8192 tokens, spread evenly: files differ much."""
        longest = max(CONTEXTS)
        gap = (len(self.ids) - longest - 1) // max(1, stretches - 1)
        starts = [n * gap + m for n in range(stretches) for m in range(0, longest, length)]
        return [torch.tensor(self.ids[start : start + length + 1])[None] for start in starts]

    def line(self, cursor: int) -> list[int]:
        stop = cursor + 1
        while stop < min(cursor + 40, len(self.ids)) and not self.ends_line[self.ids[stop - 1]]:
            stop += 1
        return self.ids[cursor:stop]

    def document(
        self, seed: int, distance: int, asked: int = ASKED, distractors: int = DISTRACTORS, zone: int = ZONE
    ) -> Document:
        """Held-out code with `asked` bindings, each asked for once at the first line end `distance` tokens below it."""
        rng = random.Random(f"{seed} {distance}")
        length = distance + zone
        bound = list(
            {
                name: (name, value) for name, value in (binding(rng, self.words) for _ in range(asked + distractors))
            }.values()
        )
        bind_at = sorted(rng.randrange(zone - 160) for _ in bound)
        queried = set(rng.sample(range(len(bound)), min(asked, len(bound))))
        cursor = rng.randrange(len(self.ids) - 2 * length)
        ids, answers, distances = [self.bos], [], []
        due: list[tuple[int, int]] = []
        following = 0
        while len(ids) < length:
            if following < len(bound) and len(ids) >= bind_at[following]:
                if following in queried:
                    due.append((len(ids), following))
                ids += self.encode(bind_line(*bound[following]))
                following += 1
            elif due and len(ids) >= due[0][0] + distance:
                placed, index = due.pop(0)
                question, answer = (self.encode(part) for part in query_line(*bound[index]))
                distances.append(len(ids) - placed)
                answers.append(list(range(len(ids) + len(question), len(ids) + len(question) + len(answer))))
                ids += question + answer
            else:
                run = self.line(cursor)
                cursor += len(run)
                ids += run
        whole = [n for n, positions in enumerate(answers) if positions[-1] < length]
        return Document(torch.tensor(ids[:length])[None], [answers[n] for n in whole], [distances[n] for n in whole])

    def documents(self, distance: int, queries: int) -> list[Document]:
        made: list[Document] = []
        while sum(len(d.answers) for d in made) < queries:
            made.append(self.document(len(made), distance))
        return made

    def without_bindings(self, document: Document) -> Document:
        """The same document with every bound value that is asked for overwritten: what recall is without recalling."""
        ids = document.ids.clone()
        filler = self.encode("foo_bar_" * 8)
        for positions in document.answers:
            value = ids[0, positions[:-1]]
            matches = (ids[0, : positions[0]].unfold(0, len(value), 1) == value).all(-1).nonzero().flatten()
            for start in matches.tolist():
                ids[0, start : start + len(value)] = torch.tensor(filler[: len(value)])
        return Document(ids, document.answers, document.distances)


def progress() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())


@torch.no_grad()
def bits_per_byte(model: nn.Module, text: HeldOut, length: int, stretches: int) -> dict[str, float]:
    """Loss of the text's tokens (file boundaries left out) in nats, over ln 2 and over the UTF-8 bytes they spell."""
    nats, size, counted = 0.0, 0, 0
    for ids in text.windows(length, stretches):
        targets = ids[0, 1:]
        losses = F.cross_entropy(
            model(input_ids=ids[:, :-1], use_cache=False).logits[0].float(), targets, reduction="none"
        )
        counts = targets != text.bos
        nats += float(losses[counts].sum())
        size += int(text.sizes[targets].sum())
        counted += int(counts.sum())
    return {
        "bits_per_byte": nats / math.log(2) / size,
        "nats_per_token": nats / counted,
        "tokens": counted,
        "bytes": size,
    }


def dense_logits(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda ids: model(input_ids=ids, use_cache=False).logits


def attention_distance(model: nn.Module, ids: Tensor) -> dict[str, Observation]:
    """Per site: mean attention mass by distance, and the mass outside sinks and windows; streamed, never N x N."""
    observations: dict[str, Observation] = {}
    grid = Grid((0, 4), LOCAL_WINDOWS)

    def observer(site: Site) -> Attention:
        observations[site.name] = Observation.zeros(site.heads, grid, ids.shape[1])

        def attend(q: Tensor, k: Tensor, v: Tensor, pad: Tensor | None) -> Tensor:
            measure_forward(q, k, v, site.scale, pad, observations[site.name], site.mask.window)
            return attention(q, k, v, site.scale, pad, site.mask.window)

        return attend

    with torch.no_grad():
        Instrumented(model, observer).logits(ids)
    torch._dynamo.reset()
    return observations


def narrowed(sites: Mapping[str, Site], heads: Sequence[Head]) -> dict[str, list[Choice]]:
    """The choices that give `heads` four sinks and a window of 64 and leave every other head dense."""
    return {name: [NARROW if (name, n) in heads else DENSE for n in range(site.heads)] for name, site in sites.items()}


class Ablation:
    """Recall with some heads narrowed, through the kernels that a plan runs through."""

    def __init__(self, model: nn.Module, documents: Sequence[Document]) -> None:
        self.spans, self.documents = Spans(model), documents
        self.dense = self.of([])
        self.heads = [(name, n) for name, site in self.spans.sites.items() for n in range(site.heads)]

    def of(self, heads: Sequence[Head], documents: Sequence[Document] | None = None) -> Recall:
        self.spans.set(narrowed(self.spans.sites, heads) if heads else None)
        return recall(self.spans.instrumented.logits, documents or self.documents)


def retrieval(ablation: Ablation, screen: Sequence[Document], tried: int, done: Callable[[], None]) -> dict[str, Any]:
    """Narrow every head alone, the strongest in pairs, then one more head at a time until recall is below one half."""
    alone: dict[Head, Recall] = {}
    for head in ablation.heads:
        alone[head] = ablation.of([head], screen)
        done()
    # Recall first; the loss of the answers decides among heads that leave recall as it is.
    order = sorted(alone, key=lambda head: (alone[head].share, -alone[head].loss))
    strongest = order[:tried]
    pairs = {}
    for n, first in enumerate(strongest[:4]):
        for second in strongest[n + 1 : 4]:
            pairs[first, second] = ablation.of([first, second], screen)
            done()
    chosen: list[Head] = []
    steps: list[tuple[Head, Recall]] = []
    while len(chosen) < tried and (not steps or steps[-1][1].share >= 0.5):
        options = {head: ablation.of([*chosen, head], screen) for head in strongest if head not in chosen}
        best = min(options, key=lambda head: (options[head].share, -options[head].loss))
        chosen.append(best)
        steps.append((best, ablation.of(chosen)))
        done()
    return {"alone": {h: alone[h] for h in order}, "pairs": pairs, "steps": steps}


def measure(quick: bool, seconds: Callable[[], float]) -> dict[str, Any]:
    """Every figure, as plain numbers under names; what the tables, the pictures and the card are made from."""
    loaded = load("demo", torch.bfloat16)
    model, text = loaded.model, HeldOut(loaded.tokenizer)
    stretches, queries, tried = (3, QUICK_QUERIES, 3) if quick else (16, QUERIES, 6)
    length = 2048 if quick else 4096
    figures: dict[str, Any] = {"quick": quick, "parameters": sum(p.numel() for p in model.parameters())}
    with progress() as bar:
        task = bar.add_task("bits per byte", total=len(CONTEXTS) + len(DISTANCES) + 2)

        def step(next_up: str) -> None:
            bar.update(task, advance=1, description=next_up)

        figures["bits_per_byte"] = {}
        for context in CONTEXTS:
            figures["bits_per_byte"][str(context)] = bits_per_byte(model, text, context, stretches)
            step("recall")
        figures["recall"] = {}
        for distance in DISTANCES:
            found = recall(dense_logits(model), text.documents(distance, queries))
            figures["recall"][str(distance)] = {"right": found.right, "asked": found.asked, "loss": found.loss}
            step("recall")
        unbound = recall(
            dense_logits(model), [text.without_bindings(d) for d in text.documents(ABLATION_DISTANCE, queries)]
        )
        figures["recall_without_binding"] = {"right": unbound.right, "asked": unbound.asked}
        step("attention distance")
        figures["heads"] = head_figures(attention_distance(model, text.windows(length, 3)[1][:, :-1]))
        step("heads alone")
        document = text.document(1000, ABLATION_DISTANCE, asked=24)
        ablation = Ablation(model, text.documents(ABLATION_DISTANCE, queries // 2))
        if quick:
            far = figures["heads"]["outside"]
            ablation.heads = sorted(
                ablation.heads, key=lambda h: -far[list(ablation.spans.sites).index(h[0])][h[1]][-1]
            )[:8]
        bar.update(task, total=len(CONTEXTS) + len(DISTANCES) + 2 + len(ablation.heads) + 6)
        found_heads = retrieval(ablation, [document], tried, lambda: step("heads narrowed"))
    names = list(ablation.spans.sites)

    def plain(heads: Sequence[Head], result: Recall) -> dict[str, Any]:
        return {
            "heads": [[names.index(n), h] for n, h in heads],
            "right": result.right,
            "asked": result.asked,
            "loss": result.loss,
        }

    figures["dense"] = plain([], ablation.dense)
    figures["screen"] = plain([], ablation.of([], [document]))
    figures["alone"] = [plain([h], r) for h, r in found_heads["alone"].items()]
    figures["pairs"] = [plain(pair, r) for pair, r in found_heads["pairs"].items()]
    figures["greedy"] = [plain([h], r) for h, r in found_heads["steps"]]
    figures["seconds"] = seconds()
    return figures


def head_figures(observations: Mapping[str, Observation]) -> dict[str, Any]:
    """Per layer and head: mean mass by distance bucket, and mean mass outside (no sink, 4 sinks) + window."""
    held = list(observations.values())
    return {
        "length": held[0].length,
        "buckets": distance_buckets(held[0].length),
        "mass": [(o.mass_by_distance / o.rows).tolist() for o in held],
        "outside": [(o.mass[:, 0] / o.rows).tolist() for o in held],
        "outside_sinks": [(o.mass[:, 1] / o.rows).tolist() for o in held],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer windows, queries and heads")
    parser.add_argument(
        "--write-card", action="store_true", help="write README.md, heads.png and recall.png beside the model"
    )
    parser.add_argument(
        "--figures", type=Path, default=None, help="keep the figures in this JSON file, or read them if it exists"
    )
    args = parser.parse_args()
    if args.write_card and args.quick:
        parser.error("the card is written from the full measurement, not with --quick")
    started = time.monotonic()
    if args.figures is not None and args.figures.exists():
        figures = json.loads(args.figures.read_text())
    else:
        figures = measure(args.quick, lambda: time.monotonic() - started)
        if args.figures is not None:
            args.figures.write_text(json.dumps(figures))
    show(figures)
    if args.write_card:
        folder = demo_model_path()
        draw(figures, folder)
        (folder / "README.md").write_text(card(figures, json.loads((folder / "config.json").read_text())))
        print(f"wrote {folder / 'README.md'}")


if __name__ == "__main__":
    main()
