"""Text to measure on: files, standard input or the standard library's own source, split in three and cut in lengths."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnopt.corpus import library_texts
from attnopt.errors import TextError

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
    bounds = (0, ids.numel() // 2, 3 * ids.numel() // 4, ids.numel())
    k = PARTS.index(which)
    return ids[bounds[k] : bounds[k + 1]]


def stream(sources: Sequence[str], tokenizer: Any, which: str, most: int = 600_000) -> Tensor:
    """Token ids of one split: of `sources` cut in three, or without sources of the library's own split by path."""
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
