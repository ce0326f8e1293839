"""Supervised text: conversations and question-answer lines as token ids, with what the answers are.

A `.jsonl` file has one JSON object a line, of either form:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}
    {"prompt": "...", "answer": "..."}

Messages go through the tokenizer's own chat template, and what assistants say counts. Prompt and answer are taken as
they are, one directly after the other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnopt.errors import TextError, first_line
from attnopt.supervision import Sample

FORMS = 'Write {"messages": [...]} or {"prompt": "...", "answer": "..."} on every line.'


@dataclass(frozen=True)
class Turns:
    """One conversation: runs of token ids, and whether each is an answer. The last run is one."""

    runs: tuple[tuple[tuple[int, ...], bool], ...]

    @property
    def ids(self) -> list[int]:
        return [token for run, _ in self.runs for token in run]

    @property
    def counted(self) -> list[float]:
        return [float(answer) for run, answer in self.runs for _ in run]

    @property
    def prompt(self) -> list[int]:
        """Everything before the last answer."""
        return [token for run, _ in self.runs[:-1] for token in run]


def parsed(text: str, name: str, tokenizer: Any) -> list[Turns]:
    """The conversations of a file's text; TextError names the line that is at fault."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
        except ValueError:
            raise TextError(f"Line {number} of {name} is not JSON.", FORMS) from None
        try:
            found.append(turns_of(data, tokenizer))
        except TextError as error:
            raise TextError(f"Line {number} of {name}: {error.problem}", error.remedy) from None
    if not found:
        raise TextError(f"{name} holds no conversation.", FORMS)
    return found


def turns_of(data: Any, tokenizer: Any) -> Turns:
    if not isinstance(data, Mapping):
        raise TextError("it is not an object.", FORMS)
    if isinstance(data.get("prompt"), str) and isinstance(data.get("answer"), str):
        pieces = [(data["prompt"], False), (data["answer"], True)]
    elif isinstance(data.get("messages"), list) and all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in data["messages"]
    ):
        pieces = templated(data["messages"], tokenizer)
    else:
        raise TextError("it has neither messages nor a prompt and an answer.", FORMS)
    runs = [(tuple(encoded(tokenizer, piece)), answer) for piece, answer in pieces if piece]
    if not any(answer and run for run, answer in runs):
        raise TextError("it has no answer.", "Give every conversation something that the assistant says.")
    while not runs[-1][1]:
        runs.pop()
    return Turns(tuple(runs))


def encoded(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a piece of text. Prompt and answer are encoded apart, as they are when a model answers."""
    found: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return found


def templated(messages: Sequence[Mapping[str, str]], tokenizer: Any) -> list[tuple[str, bool]]:
    """What the chat template makes of messages, cut before and after each thing that the assistant says.

    Before: what the template ends with where the assistant is asked to speak. Where a template changes earlier turns
    once later ones are there, only the last answer counts.
    """
    if not has_template(tokenizer):
        raise TextError(
            "the tokenizer has no chat template, so messages cannot be written as the model knows them.",
            'Give {"prompt": "...", "answer": "..."} lines, or a tokenizer with a template.',
        )

    def rendered(count: int, ask: bool) -> str:
        try:
            text = tokenizer.apply_chat_template(list(messages[:count]), tokenize=False, add_generation_prompt=ask)
        except Exception as error:  # whatever the template raises: jinja2's errors, or its own
            raise TextError(
                f"the chat template refuses it: {first_line(error)}", "Mend the messages of this line."
            ) from error
        return str(text)

    spoken = [n for n, m in enumerate(messages) if m["role"] == "assistant" and n > 0]
    if not spoken:
        raise TextError("it has no answer.", "Give every conversation something that the assistant says.")
    whole = rendered(spoken[-1] + 1, False)
    spans = []
    for n in spoken:
        asked, answered = rendered(n, True), rendered(n + 1, False)
        if answered.startswith(asked) and whole.startswith(answered):
            spans.append((len(asked), len(answered)))
    if not spans:
        raise TextError(
            "the chat template writes an answer differently from how it asks for one.",
            'Give {"prompt": "...", "answer": "..."} lines, written as the model expects them.',
        )
    pieces, at = [], 0
    for begin, end in spans:
        pieces += [(whole[at:begin], False), (whole[begin:end], True)]
        at = end
    return pieces


def has_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None)) and hasattr(tokenizer, "apply_chat_template")


def packed(conversations: Sequence[Turns], length: int, count: int) -> list[Sample]:
    """At most `count` sequences of `length` tokens: conversations one after the other, the last one cut short. Of one
    that is longer its end, where the answer is. TextError if there are no tokens or no answers for one sequence."""
    samples: list[Sample] = []
    ids: list[int] = []
    counted: list[float] = []
    for turns in conversations:
        ids += turns.ids[-length:]
        counted += turns.counted[-length:]
        if len(ids) < length:
            continue
        # No row predicts the first token.
        if any(counted[1:length]):
            samples.append(Sample(torch.tensor(ids[:length])[None], torch.tensor(counted[:length]), "chat"))
        ids, counted = [], []
        if len(samples) == count:
            break
    if not samples:
        total = sum(len(turns.ids) for turns in conversations)
        raise TextError(
            f"{len(conversations)} conversations of {total} tokens in all make no sequence of {length} with an answer.",
            "Give more of them, or profile at shorter lengths.",
        )
    return samples


def prompts_of(conversations: Sequence[Turns], size: int, count: int) -> list[Tensor]:
    """At most `count` prompts int64 (1, `size`): the end of what leads to an answer, after other conversations."""
    found: list[Tensor] = []
    before: list[int] = []
    for turns in conversations:
        ids = [*before, *turns.prompt]
        if len(ids) >= size:
            found.append(torch.tensor(ids[-size:])[None])
            before = []
        else:
            before += turns.ids
        if len(found) == count:
            break
    if not found:
        raise TextError(
            f"The conversations make no prompt of {size} tokens.", "Give more of them, or profile at shorter lengths."
        )
    return found


def as_question(piece: Sequence[int], size: int, tokenizer: Any) -> Tensor:
    """A prompt int64 (1, at most `size`) of a piece of text: what a user says, or the text as it is where the tokenizer
    has no chat template. Of a text that is too long its end is left out."""
    kept = list(piece)[:size]
    if not has_template(tokenizer):
        return torch.tensor(kept)[None]
    for _ in range(8):
        message = [{"role": "user", "content": tokenizer.decode(kept)}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        ids = encoded(tokenizer, text)
        if len(ids) <= size:
            return torch.tensor(ids)[None]
        kept = kept[: len(kept) - (len(ids) - size)]
        if not kept:
            break
    raise TextError(f"The chat template alone is longer than a prompt of {size} tokens.", "Profile at longer lengths.")
