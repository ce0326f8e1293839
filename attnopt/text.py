"""Text to measure on: files, standard input or the standard library's own source, split in three and cut in lengths.

A source is a text file, "-" for standard input, or a `.jsonl` file of conversations (attnopt/conversations). Random
key-value lines and late questions (attnopt/probe) are profiled beside any of them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnopt import conversations
from attnopt.corpus import library_texts
from attnopt.errors import TextError
from attnopt.probe import FILLER_TOKENS, Probe, lines_of
from attnopt.supervision import Sample

CHATS = ".jsonl"
# Tokens that a model goes on with, of a sequence of four times as many or more.
CONTINUATION = 256
PARTS = ("calibrate", "verify", "final")


def read(sources: Sequence[str]) -> list[str]:
    """The text of files ("-" is standard input), each checked."""
    texts: list[str] = []
    for source in sources:
        if source == "-":
            texts.append(sys.stdin.read())
            continue
        try:
            texts.append(Path(source).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise TextError(
                f"There is no text file {source}.", "Give existing files, or - for standard input."
            ) from None
        except (UnicodeDecodeError, OSError) as error:
            raise TextError(f"{source} cannot be read as UTF-8 text: {error}.", "Give plain text files.") from None
    if not any(t.strip() for t in texts):
        raise TextError("The text is empty.", "Give files with text, or pipe text into standard input.")
    return texts


def tokens_of(texts: Sequence[str], tokenizer: Any) -> Tensor:
    """One stream of token ids int64 (tokens,)."""
    if tokenizer is None:
        raise TextError("This model comes without a tokenizer.", "Use a directory or hub name that has one.")
    ids: list[int] = []
    for text in texts:
        ids += tokenizer.encode(text, add_special_tokens=False)
    return torch.tensor(ids, dtype=torch.long)


def part(ids: Tensor, which: str) -> Tensor:
    """The tokens of one of the three splits of a stream: the first half calibrates, the rest verifies and decides."""
    begin, end = _bounds(ids.numel(), which)
    return ids[begin:end]


def _bounds(size: int, which: str) -> tuple[int, int]:
    bounds = (0, size // 2, 3 * size // 4, size)
    k = PARTS.index(which)
    return bounds[k], bounds[k + 1]


def stream(sources: Sequence[str], tokenizer: Any, which: str, most: int = 600_000) -> Tensor:
    """Token ids of one split: of `sources` cut in three, or without sources of the library's own split by path. Of
    conversations all that is said."""
    if any(s.endswith(CHATS) for s in sources):
        return Sources(sources, tokenizer, which, most).stream()
    if sources:
        return part(tokens_of(read(sources), tokenizer), which)
    texts: list[str] = []
    size = 0
    for text in library_texts(which):
        texts.append(text)
        size += len(text)
        # Three characters a token is typical of code; more than is needed is only tokenised in vain.
        if size > 4 * most:
            break
    return tokens_of(texts, tokenizer)


def sequences(ids: Tensor, length: int, samples: int, which: str) -> Tensor:
    """`samples` sequences (samples, length), evenly spread over the stream; TextError if there is not one."""
    available = ids.numel() // length
    if available == 0:
        raise TextError(
            f"The text has {ids.numel()} tokens for the {which} split, too short for one sequence of {length}.",
            "Give more text, or use shorter lengths.",
        )
    count = min(samples, available)
    stride = available // count
    return torch.stack([ids[n * stride * length : n * stride * length + length] for n in range(count)])


class Sources:
    """What `--text` names, for one of the three splits: plain text and conversations apart."""

    def __init__(self, sources: Sequence[str], tokenizer: Any, which: str, most: int = 600_000) -> None:
        if tokenizer is None:
            raise TextError("This model comes without a tokenizer.", "Use a directory or hub name that has one.")
        self.tokenizer, self.which = tokenizer, which
        chats = [s for s in sources if s.endswith(CHATS)]
        plain = [s for s in sources if s not in chats]
        self.tokens = stream(plain, tokenizer, which, most) if plain or not sources else None
        self.turns: list[conversations.Turns] = []
        for name, text in zip(chats, (read([s])[0] for s in chats), strict=True):
            found = conversations.parsed(text, name, tokenizer)
            begin, end = _bounds(len(found), which)
            self.turns += found[begin:end]
        if chats and not self.turns:
            raise TextError(
                f"The conversations leave none for the {which} split.", "Give at least four; half of them calibrate."
            )

    def stream(self) -> Tensor:
        """All token ids, one after the other."""
        said = torch.tensor([token for turns in self.turns for token in turns.ids], dtype=torch.long)
        return said if self.tokens is None else torch.cat((self.tokens, said))

    def samples(self, length: int, count: int) -> list[Sample]:
        """At most `count` sequences of `length` tokens of each kind there is."""
        found: list[Sample] = []
        if self.tokens is not None:
            found += [Sample(row[None]) for row in sequences(self.tokens, length, count, self.which)]
        if self.turns:
            found += conversations.packed(self.turns, length, count)
        return found

    @cached_property
    def probe(self) -> Probe:
        """Facts hidden in this text; in Python's library where there are conversations alone."""
        own = [] if self.tokens is None else [self.tokenizer.decode(self.tokens[:FILLER_TOKENS].tolist())]
        return Probe(self.tokenizer, filler=lines_of(self.tokenizer, own), split=self.which)

    def prompts(self, length: int, count: int) -> list[Tensor]:
        """At most `count` prompts int64 (1, P), for the model to go on with up to `length` tokens."""
        size = length - min(CONTINUATION, length // 4)
        found: list[Tensor] = []
        if self.tokens is not None:
            rows = sequences(self.tokens, length, count, self.which)
            found += [conversations.as_question(row.tolist(), size, self.tokenizer) for row in rows]
        if self.turns:
            found += conversations.prompts_of(self.turns, size, count)
        return found
