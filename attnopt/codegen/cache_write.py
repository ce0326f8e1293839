"""What is left of new keys and values goes to its slots, out of torch's operators.

A run of tokens is at most three copies for a KV head: its part below the sink, and its end in the ring, before and
behind the ring's seam. Tokens with padding between them go one by one.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from attnopt.codegen.padding_cpu import Run, real_runs
from attnopt.codegen.slots import slots, survives


def write(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, n: Tensor, valid: Tensor | None, table: Tensor) -> None:
    """k (B, G, T, D), v (B, G, T, Dv) into keys (B, S, D), values (B, S, Dv); n int32 (B,), then more by what counts.

    valid bool (B, T), table int (G, 4): as those of attnopt/codegen/reference_cache.py. Reads them on the host.
    """
    batch, _, tokens, _ = k.shape
    rows = table.tolist()
    runs = [Run(0, batch, 0, tokens)] if valid is None else real_runs(valid) if valid.numel() else []
    if runs is None:
        assert valid is not None
        _write_one_by_one(k, v, keys, values, n, valid, rows)
    else:
        seen = n.tolist()
        for first, last, start, stop in runs:
            for entries, at in _equal(seen, first, last):
                new = (x[entries, :, start:stop] for x in (k, v))
                for cache, fed in zip((keys, values), new, strict=True):
                    _write_run(cache[entries], fed, at, rows)
    n += tokens if valid is None else valid.sum(1, dtype=n.dtype)


def _equal(seen: list[int], first: int, last: int) -> Iterator[tuple[slice, int]]:
    """Neighbouring batch entries that have seen equally many tokens, and how many."""
    while first < last:
        end = first + 1
        while end < last and seen[end] == seen[first]:
            end += 1
        yield slice(first, end), seen[first]
        first = end


def _write_run(cache: Tensor, new: Tensor, at: int, rows: list[list[int]]) -> None:
    """new (b, G, t, D), whose first token is at position `at`, into cache (b, S, D)."""
    after = at + new.shape[2]
    for group, (start, capacity, sink, _) in enumerate(rows):
        ring = capacity - sink
        if at < sink:
            stop = min(sink, after)
            cache[:, start + at : start + stop] = new[:, group, : stop - at]
        position = max(at, sink, after - ring)
        while position < after:
            place = (position - sink) % ring
            count = min(ring - place, after - position)
            slot = start + sink + place
            cache[:, slot : slot + count] = new[:, group, position - at : position - at + count]
            position += count


def _write_one_by_one(
    k: Tensor, v: Tensor, keys: Tensor, values: Tensor, n: Tensor, valid: Tensor, rows: list[list[int]]
) -> None:
    place = n[:, None] + valid.cumsum(1) - 1
    after = place[:, -1:] + 1
    for group, (start, capacity, sink, _) in enumerate(rows):
        entry, token = (valid & survives(place, after, capacity, sink)).nonzero().unbind(1)
        slot = start + slots(place[entry, token], capacity, sink)
        keys[entry, slot], values[entry, slot] = k[entry, group, token], v[entry, group, token]
