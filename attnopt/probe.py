"""A long-range probe: random key-value lines above, questions far below them, and how many answers a model recalls.

    tool_river=carbon_plate          a binding, among other text or other bindings
    ...                              as many tokens as the distance
    assert tool_river==carbon_plate  the question, and its answer, whose tokens are what counts

Text alone rarely needs a key thousands of tokens away, so heads that can reach for one look useless on it. Everything
is drawn from a seed, and works with any tokenizer.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.corpus import library_texts, single_token_words
from attnopt.errors import TextError
from attnopt.supervision import Sample

# Bindings that are asked for, and beside them those that never are, in a document with room for them.
ASKED, DISTRACTORS = 16, 8
# Tokens above which bindings stand, and below which their questions; half of it in a document of twice as many.
ZONE = 640
# By which the logits of answers are divided when profiling. On the shipped model, planned for a quarter of the pairs of
# 2048 tokens with as much divergence on text as is told in docs/planner.md: 59 % of answers recalled without a probe,
# 91 % at 1, 100 % at 4 and at 8.
TEMPERATURE = 4.0
# Of so many single-token words names are built; fewer would repeat.
LEAST_WORDS = 200
FILLER_TOKENS = 60_000


@dataclass(frozen=True)
class Form:
    """How a binding, a question and its answer are written, and a name of two words."""

    bind: str = "{name}={value}\n"
    ask: str = "assert {name}=="
    answer: str = "{value}\n"
    join: str = "_"


CODE = Form()
PROSE = Form("The code word of {name} is {value}.\n", "What is the code word of {name}? It is", " {value}.\n", " ")


@dataclass(frozen=True)
class Document:
    """ids int64 (1, N); for each answer the positions of its tokens, and how far above the question its binding is."""

    ids: Tensor
    answers: list[list[int]]
    distances: list[int]

    @property
    def sample(self) -> Sample:
        """For the profiler: the answers' tokens count, softened."""
        weights = torch.zeros(self.ids.shape[1])
        weights[[position for answer in self.answers for position in answer]] = 1.0
        return Sample(self.ids, weights, "probe", TEMPERATURE)


@dataclass(frozen=True)
class Recall:
    """Answers recalled in full, of how many, and the mean loss of their tokens in nats."""

    right: int
    asked: int
    loss: float

    @property
    def share(self) -> float:
        return self.right / max(1, self.asked)

    def __str__(self) -> str:
        return f"{self.share:.1%} ({self.right} of {self.asked})"


@dataclass(frozen=True)
class Fact:
    """Token ids of a binding, of the question for it, and of the answer."""

    binding: tuple[int, ...]
    question: tuple[int, ...]
    answer: tuple[int, ...]


class Probe:
    """Documents for one tokenizer. filler: lines of token ids between bindings and questions; without any, Python's own
    library of the split "calibrate"."""

    def __init__(
        self, tokenizer: Any, form: Form = CODE, filler: Sequence[Sequence[int]] = (), split: str = "calibrate"
    ):
        if tokenizer is None:
            raise TextError("A probe needs the model's tokenizer.", "Use a directory or hub name that has one.")
        self.tokenizer, self.form = tokenizer, form
        self.words = words_of(tokenizer)
        self.filler = [list(line) for line in filler] or lines_of(tokenizer, library_texts(split))
        first = getattr(tokenizer, "bos_token_id", None)
        self.first = [] if first is None else [int(first)]

    def encode(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return found

    def document(self, length: int, seed: int | str = 0, asked: int = ASKED) -> Document:
        """`length` tokens: bindings above, questions as far below as there is room for. TextError without room."""
        rng = random.Random(f"{seed} {length}")
        zone = min(ZONE, length // 2)
        facts = self._facts(rng, asked + DISTRACTORS, int(0.6 * zone))
        questions = facts[: max(1, min(asked, 2 * len(facts) // 3))]
        cut = rng.randrange(len(self.filler))
        lines = itertools.cycle(self.filler[cut:] + self.filler[:cut])
        ids, places = list(self.first), dict[Fact, int]()

        def fill(until: int) -> None:
            # Of a line that is too long its end, which ends the line.
            while len(ids) < until:
                ids.extend(next(lines)[len(ids) - until :])

        for n, fact in enumerate(rng.sample(facts, len(facts))):
            # Some text before each of them, so that they are not one block.
            fill(n * (zone // 2) // len(facts))
            places[fact] = len(ids)
            ids.extend(fact.binding)
        start = length - sum(len(fact.question) + len(fact.answer) for fact in questions)
        if len(ids) > start:
            raise TextError(
                f"A probe of {length} tokens has no room for a binding and its question.", "Probe at a longer length."
            )
        fill(start)
        answers, distances = [], []
        for fact in questions:
            distances.append(len(ids) - places[fact])
            ids.extend(fact.question)
            answers.append(list(range(len(ids), len(ids) + len(fact.answer))))
            ids.extend(fact.answer)
        return Document(torch.tensor(ids)[None], answers, distances)

    def _facts(self, rng: random.Random, most: int, room: int) -> list[Fact]:
        """Facts of different names, at least one, whose questions and answers fit into `room` tokens."""
        found: list[Fact] = []
        used: set[str] = set()
        while len(found) < most:
            name, value = (self.form.join.join(rng.sample(self.words, 2)) for _ in range(2))
            if name in used:
                continue
            used.add(name)
            texts = (self.form.bind, self.form.ask, self.form.answer)
            fact = Fact(*(tuple(self.encode(text.format(name=name, value=value))) for text in texts))
            room -= len(fact.question) + len(fact.answer)
            if room < 0 and found:
                break
            found.append(fact)
        return found

    def documents(self, length: int, count: int, seed: int | str = 0) -> list[Document]:
        """`count` documents of `length` tokens, all different."""
        return [self.document(length, f"{seed} {n}") for n in range(count)]


def words_of(tokenizer: Any) -> list[str]:
    """Lower-case words of one token each; syllables where the vocabulary has too few of them."""
    try:
        found = single_token_words(tokenizer)
    except (AttributeError, NotImplementedError):
        # A tokenizer of one's own need not list its vocabulary.
        found = []
    if len(found) >= LEAST_WORDS:
        return found
    return [
        "".join(pair)
        for pair in itertools.product(*(["".join(s) for s in itertools.product("bdfklmnprt", "aeiou")],) * 2)
    ]


def lines_of(tokenizer: Any, texts: Iterable[str]) -> list[list[int]]:
    """Lines of texts as token ids, as many as make good filler."""
    lines: list[list[int]] = []
    for text in texts:
        lines += [tokenizer.encode(line, add_special_tokens=False) for line in text.splitlines(keepends=True)]
        if sum(map(len, lines)) > FILLER_TOKENS:
            break
    return [line for line in lines if line]


@torch.no_grad()
def recall(logits_of: Callable[[Tensor], Tensor], documents: Sequence[Document]) -> Recall:
    """What `logits_of`, from ids (1, N) to logits (1, N, V), recalls. An answer counts only if every one of its tokens
    is the most likely one, given those before it."""
    right, asked, losses = 0, 0, []
    for document in documents:
        logits = logits_of(document.ids)[0]
        for positions in document.answers:
            targets = document.ids[0, positions].to(logits.device)
            rows = logits[[p - 1 for p in positions]].float()
            right += bool((rows.argmax(-1) == targets).all())
            asked += 1
            losses.append(F.cross_entropy(rows, targets).item())
    return Recall(right, asked, sum(losses) / max(1, len(losses)))


@torch.no_grad()
def longest_reach(
    logits_of: Callable[[Tensor], Tensor], probe: Probe, lengths: Sequence[int], count: int = 4, share: float = 0.9,
    seed: int | str = 0,
) -> int:  # fmt: skip
    """The longest of `lengths`, ascending, up to which at least `share` of the answers is recalled at every length; 0
    if not even at the first. What MoA calls effective context (arXiv:2406.14909)."""
    reached = 0
    for length in sorted(lengths):
        if recall(logits_of, probe.documents(length, count, seed)).share < share:
            break
        reached = length
    return reached
