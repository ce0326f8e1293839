"""The file of finished cells: one JSON line each, appended whole, so that an interrupted run goes on where it was.

A cell's key is its class, its name, how it was compiled, the matcher's own sources and the versions of the libraries.
A line that was cut off, and a line of other versions, is as if it were not there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# The units of attnopt that decide what a cell says.
MATCHER = {"capture", "ir", "masks", "patterns", "passes", "candidates", "backend"}
Record = dict[str, Any]
Key = tuple[str, str, bool]


def versions() -> dict[str, str]:
    """What a result depends on beside the class: library versions, and a digest of attnopt's sources."""
    from importlib.metadata import version

    import attnopt

    digest = hashlib.sha256()
    root = Path(attnopt.__file__).parent
    for path in sorted(root.rglob("*.py")):
        if path.relative_to(root).with_suffix("").parts[0] in MATCHER:
            digest.update(path.read_bytes())
    return {
        "torch": version("torch"),
        "transformers": version("transformers"),
        "matcher": digest.hexdigest()[:12],
    }


class Store:
    """The records of one file that were made under `versions`, by (class, cell, inductor).

    older: also those of the same libraries under other sources of the matcher, where there are none of these.
    """

    def __init__(self, path: Path, versions: dict[str, str], fresh: bool = False, older: bool = False) -> None:
        self.path, self.versions = path, versions
        self.records: dict[Key, Record] = {}
        if fresh:
            path.unlink(missing_ok=True)
        found = list(read(path))
        if older:
            libraries = {**versions, "matcher": ""}
            same = (r for r in found if {**r.get("versions", {}), "matcher": ""} == libraries)
            self.records = {key(r): r for r in same}
        self.records |= {key(r): r for r in found if r.get("versions") == versions}

    def __contains__(self, wanted: object) -> bool:
        """Whether a cell is finished; one that ran out of time is tried again."""
        return wanted in self.records and self.records[wanted]["status"] != "timed out"  # type: ignore[index]

    def add(self, record: Record) -> None:
        """Append one line in a single write: a reader sees the whole line or none of it."""
        record = {**record, "versions": self.versions}
        self.records[key(record)] = record
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A line cut off by an interrupted run must not swallow the next one.
        cut = self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n")
        line = ("\n" if cut else "") + json.dumps(record) + "\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)


def key(record: Record) -> Key:
    return record["class"], record["cell"], bool(record.get("inductor"))


def read(path: Path) -> Iterable[Record]:
    """Every whole line of the file."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "class" in record and "cell" in record:
            yield record
