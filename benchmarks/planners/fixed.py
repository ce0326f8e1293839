"""Plans that look at no statistics: one span for all heads, and spans drawn at random."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

from attnopt.cost import kept_pairs
from attnopt.ir import Choice

Choices = Mapping[str, tuple[Choice, ...]]


def span(sink: int, window: int) -> Choice:
    return Choice.of("sink_window", {"sink": sink, "alpha": window, "beta": 0.0})


def density(length: int, sink: int, window: int) -> float:
    """The share of a causal head's query-key pairs that a span keeps."""
    return kept_pairs(length, sink, window) / kept_pairs(length, 0, length)


def window_of(length: int, sink: int, wanted: float) -> int:
    """The largest window whose density is at most `wanted`; 1 if there is none."""
    low, high = 1, length
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if density(length, sink, middle) <= wanted else (low, middle - 1)
    return low


def uniform(
    heads: Mapping[str, int], length: int, wanted: float, share: Callable[[Choices], float], sink: int = 4
) -> Choices | None:
    """The widest span for all heads alike, in the manner of StreamingLLM, whose `share` of dense is at most `wanted`;
    None if none is. heads: query heads of every site."""

    def of(window: int) -> Choices:
        return {name: (span(sink, window),) * count for name, count in heads.items()}

    low, high = 0, length + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if share(of(middle)) <= wanted else (low, middle)
    return of(low) if low else None


def drawn_within(
    heads: Mapping[str, int], length: int, wanted: float, share: Callable[[Choices], float], windows: Sequence[int],
    seed: int,
) -> Choices | None:  # fmt: skip
    """`drawn` at about the largest density whose `share` of dense is at most `wanted`; None if none was found."""
    low, high, best = 0.0, 1.0, None
    for _ in range(8):
        density = (low + high) / 2
        made = drawn(heads, length, density, windows, seed)
        low, high, best = (density, high, made) if share(made) <= wanted else (low, density, best)
    return best


def drawn(
    heads: Mapping[str, int], length: int, wanted: float, windows: Sequence[int], seed: int, sink: int = 4
) -> Choices:
    """A span for every head, drawn at random from `windows`; the last head drawn makes the mean density `wanted`.

    Heads are drawn until what is left could not make up for them: the density is met to within one window's rounding.
    """
    rng, names = random.Random(seed), [(name, h) for name, count in heads.items() for h in range(count)]
    rng.shuffle(names)
    least, most = density(length, sink, 1), 1.0
    left, made = wanted * len(names), {}
    for n, at in enumerate(names):
        rest = len(names) - n - 1
        # What this head may take so that the others can still bring the mean to what is wanted.
        low, high = max(least, left - rest * most), min(most, left - rest * least)
        fitting = [w for w in windows if low <= density(length, sink, w) <= high] if rest else []
        window = rng.choice(fitting) if fitting else window_of(length, sink, min(max(left - rest * wanted, low), high))
        made[at] = span(sink, window)
        left -= density(length, sink, window)
    return {name: tuple(made[name, h] for h in range(count)) for name, count in heads.items()}
