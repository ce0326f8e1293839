"""Read JSON that people edit: every value is checked, and an error says where it stands and what to do.

Keys that stand twice, unknown keys, NaN and numbers of the wrong kind are errors.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from attnopt.errors import AttnoptError


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen = dict(pairs)
    if len(seen) != len(pairs):
        names = [k for k, _ in pairs]
        raise ValueError(f"the key {next(k for k in names if names.count(k) > 1)!r} stands twice in one record")
    return seen


def no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number that a file can hold")


@dataclass(frozen=True)
class Place:
    """Where in which file a value stands, and the error that says what is wrong with it.

    again: the remedy where there is no better one.
    """

    file: str
    error: type[AttnoptError]
    again: str
    path: str = ""

    def at(self, key: str | int) -> Place:
        path = f"{self.path}[{key}]" if isinstance(key, int) else f"{self.path}.{key}".lstrip(".")
        return replace(self, path=path)

    def fail(self, problem: str, remedy: str = "") -> NoReturn:
        raise self.error(f"{self.file}: {self.path + ': ' if self.path else ''}{problem}", remedy or self.again)

    def record(self, value: Any, required: Iterable[str], optional: Iterable[str] = ()) -> dict[str, Any]:
        if not isinstance(value, dict):
            self.fail(f"a record is needed here, not {show(value)}")
        required = list(required)
        known = [*required, *optional]
        for key in value:
            if key not in known:
                self.fail(f"unknown key {key!r}", nearest(key, known, "Remove it; the keys are"))
        for key in required:
            if key not in value:
                self.fail(f"{key!r} is missing")
        return value

    def number(self, value: Any, kind: type, least: float = -math.inf) -> Any:
        right = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
        if not right or not abs(value) < 1e18 or value < least:
            wanted = "a whole number" if kind is int else "a number"
            self.fail(f"{wanted}{f' of at least {least:g}' if least > -math.inf else ''} is needed, not {show(value)}")
        return kind(value)

    def string(self, value: Any) -> str:
        return value if isinstance(value, str) else self.fail(f"a string is needed, not {show(value)}")

    def items(self, value: Any) -> Iterator[tuple[Place, Any]]:
        if not isinstance(value, list):
            self.fail(f"a list is needed here, not {show(value)}")
        return ((self.at(i), v) for i, v in enumerate(value))


def show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def nearest(word: str, known: Iterable[str], otherwise: str) -> str:
    known = list(known)
    near = difflib.get_close_matches(word, known, 1)
    return f"Did you mean {near[0]!r}?" if near else f"{otherwise} {', '.join(known)}."


def parsed(text: str, place: Place) -> Any:
    """The data of a file's text."""
    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=no_constant)
    except json.JSONDecodeError as e:
        place.fail(f"not JSON at line {e.lineno}: {e.msg}; is the file cut off?")
    except RecursionError:
        place.fail("records are nested too deeply")
    except ValueError as e:
        place.fail(str(e), "Remove the wrong entry, or " + place.again[0].lower() + place.again[1:])
