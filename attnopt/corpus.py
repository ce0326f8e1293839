"""The text every machine has: Python's own library source, split by path, and a long-range recall probe.

The split is a hash of a file's path inside the library, so it is the same on every machine and for every
Python version: a file that was held out when the demo model was trained is held out everywhere.
"""

from __future__ import annotations

import hashlib
import random
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Of 20 buckets: 0 is "verify", 1 is "final", 2 is "calibrate"; none of the three is ever trained on.
SPLITS = {"verify": (0,), "final": (1,), "calibrate": (2,), "train": tuple(range(3, 20))}
# Larger files are tables (codecs, documentation topics), not code.
MAX_FILE_BYTES = 400_000


def library_root() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def split_of(relative_path: str) -> str:
    """The split a library file belongs to, from its POSIX path relative to the library's root."""
    bucket = int(hashlib.sha256(relative_path.encode()).hexdigest()[:8], 16) % 20
    return next(name for name, buckets in SPLITS.items() if bucket in buckets)


def _modules(root: Path) -> Iterator[Path]:
    """Python files, with no look into what was installed beside the library: that is many times as much."""
    for path in root.iterdir():
        if path.is_dir() and not path.is_symlink() and path.name not in ("site-packages", "dist-packages"):
            yield from path.rglob("*.py")
        elif path.suffix == ".py":
            yield path


def library_files(split: str, root: Path | None = None) -> list[Path]:
    """Source files of one split, in a fixed shuffled order (by hash of the path, so that topics mix)."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; use one of {', '.join(SPLITS)}")
    root = root or library_root()
    found: list[tuple[str, Path]] = []
    for path in _modules(root):
        relative = path.relative_to(root).as_posix()
        if "__pycache__" in relative:
            continue
        if 200 <= path.stat().st_size <= MAX_FILE_BYTES and split_of(relative) == split:
            found.append((hashlib.sha256(relative.encode()).hexdigest(), path))
    return [path for _, path in sorted(found)]


def library_texts(split: str, root: Path | None = None) -> Iterator[str]:
    """The text of each file of a split; files that are not UTF-8 are passed over."""
    for path in library_files(split, root):
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def single_token_words(tokenizer: Any) -> list[str]:
    """Lower-case words of 3 to 8 letters that are one token each: names and values of the recall probe."""
    vocabulary = tokenizer.get_vocab()
    return sorted(w for w in vocabulary if w.isascii() and w.isalpha() and w.islower() and 3 <= len(w) <= 8)


def binding(rng: random.Random, words: Sequence[str]) -> tuple[str, str]:
    """A random name and value of two words each."""
    return "_".join(rng.sample(words, 2)), "_".join(rng.sample(words, 2))


def bind_line(name: str, value: str) -> str:
    return f"{name}={value}\n"


def query_line(name: str, value: str) -> tuple[str, str]:
    """The question and its answer: the answer must be recalled from a ``bind_line`` above."""
    return f"assert {name}==", f"{value}\n"
