"""One class, three instances: patterns, candidates and targets are found by discovery in their folders."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """Named items registered by the modules of one package, imported on first use.

    Order is (-priority, name), never import order. A duplicate name is an error; so is a module that fails to import.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind, self.package = kind, package
        self._items: dict[str, tuple[int, T]] = {}
        self._loaded = False

    def register(self, name: str, priority: int = 0) -> Callable[[T], T]:
        def add(item: T) -> T:
            if name in self._items:
                raise ValueError(f"two {self.kind}s are called {name!r}")
            self._items[name] = (priority, item)
            return item

        return add

    def _load(self) -> None:
        if self._loaded:
            return
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")
        self._loaded = True

    def __iter__(self) -> Iterator[tuple[str, T]]:
        self._load()
        for name, (_, item) in sorted(self._items.items(), key=lambda kv: (-kv[1][0], kv[0])):
            yield name, item

    def __getitem__(self, name: str) -> T:
        self._load()
        if name not in self._items:
            import difflib

            near = difflib.get_close_matches(name, self._items, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(sorted(self._items))}"
            raise KeyError(f"no {self.kind} is called {name!r}{hint}")
        return self._items[name][1]

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._items


PATTERNS: Registry = Registry("pattern", "attnopt.patterns")
CANDIDATES: Registry = Registry("candidate", "attnopt.candidates")
TARGETS: Registry = Registry("target", "attnopt.codegen")
