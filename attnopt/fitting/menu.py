"""What is fitted to the heads of a model and tried on them: the choices of `attnopt distill`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from attnopt.errors import OptionError
from attnopt.fitted import families
from attnopt.ir import Choice, Site
from attnopt.registry import CANDIDATES

# What is tried where nothing else is asked for. Selecting families are named: docs/distill.md has what they take.
DEFAULT = ("linear", "taylor", "compensation", "prune")


@dataclass(frozen=True)
class Menu:
    """What is fitted and tried: features of exponential maps, ranks of expansions, windows and sinks beside them, steps
    of training. families: some of `families()`; of those that offer a menu of their own, that is tried."""

    features: tuple[int, ...] = (32, 64)
    ranks: tuple[int, ...] = (8,)
    windows: tuple[int, ...] = (64, 128, 256)
    sinks: tuple[int, ...] = (4,)
    steps: int = 200
    families: tuple[str, ...] = DEFAULT

    def __post_init__(self) -> None:
        for name, least in (("features", 1), ("ranks", 1), ("windows", 1), ("sinks", 0)):
            values = getattr(self, name)
            if list(values) != sorted(set(values)) or (values and values[0] < least):
                raise OptionError(f"{name} {values} are not ascending numbers of at least {least}.", "Correct them.")
        unknown = [name for name in self.families if name not in families()]
        if unknown or not self.families:
            raise OptionError(
                f"There is no family {', '.join(unknown) or 'to fit'}.", f"Name some of {', '.join(families())}."
            )
        if not self.windows or not self.sinks:
            raise OptionError("Without a window and a sink there is no hybrid head.", "Name one of each at least.")

    @property
    def line(self) -> str:
        """In one line, for the header: what of it was used."""
        families = f"families {','.join(self.families)}"
        if not self.far:
            return families
        numbers = {name: getattr(self, name) for name in ("features", "ranks", "windows", "sinks")}
        listed = [f"{name} {','.join(map(str, values))}" for name, values in numbers.items()]
        return " ".join([*listed, f"steps {self.steps}", families])

    def choices(self, site: Site, length: int, before: int = 0) -> tuple[Choice, ...]:
        """What is tried at a site; plain windows too, which the others have to be better than. length: the longest
        text, for which candidates choose their settings: every length tries the same, or none could be compared.
        before: the attentions that run before it, which may be read from."""
        found: list[Choice] = []
        for sink in self.sinks if self.far else ():
            for window in self.windows:
                span = {"sink": sink, "alpha": window, "beta": 0.0}
                near = {"sink": sink, "window": window}
                found += [Choice.of("sink_window", span), Choice.of("compensation", span)]
                found += [Choice.of("linear", {**near, "features": n}) for n in self.features]
                found += [Choice.of("taylor", {**near, "rank": n}) for n in self.ranks]
        found.append(Choice.of("pruned"))
        offered = [choice for _, kind in CANDIDATES for choice in kind.menu(length)]
        found += [choice for choice in offered if dict(choice.params).get("behind", 0) <= before]
        return tuple(
            c
            for c in found
            if CANDIDATES[c.candidate].family in ("", *self.families) and CANDIDATES[c.candidate].refuse(site) is None
        )

    @property
    def fits(self) -> bool:
        """Whether anything is fitted beforehand: maps, or the mean outputs of heads that are to go."""
        return bool({"prune", *(("linear",) if self.features else ()), *(("taylor",) if self.ranks else ())}
                    & {*self.families})  # fmt: skip

    @property
    def far(self) -> bool:
        """Whether anything stands in for the keys behind a window, which then are needed."""
        return self.fits or "compensation" in self.families

    def serves(self, site: Site, length: int) -> bool:
        """Whether anything but a window may stand there."""
        return any(c.candidate != "sink_window" for c in self.choices(site, length))

    def maps(self, site: Site) -> Iterator[tuple[str, int]]:
        """(family, features or rank) of every map that the choices of a site need."""
        for family, sizes in (("linear", self.features), ("taylor", self.ranks)):
            if family in self.families and CANDIDATES[family].refuse(site) is None:
                yield from ((family, size) for size in sizes)
