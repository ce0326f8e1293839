"""A step of decoding of heads that select tokens, out of torch's operators: what every kernel is compared with.

One product for query heads that select alike and whose KV heads lie side by side. On a GPU nothing waits for the
device: there every step looks at all keys, and what was selected before is put back where it still serves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from attnopt.codegen.reference_tokens import asking, best, grouped, heaviest, wide
from attnopt.codegen.self_check import footer
from attnopt.codegen.spec import TokenStep
from attnopt.codegen.work_list import read_table
from attnopt.registry import TARGETS

# Columns of a table of rules: keys that are selected (0: the head does not select), sink, recent keys, steps that a
# selection serves, features of the scores (0: all), and which of the sources it reads (-1: it selects itself).
COUNT, SINK, RECENT, EVERY, CHANNELS, SOURCE = range(6)


@dataclass(frozen=True)
class Part:
    """Query heads of one rule: `heads`, in KV heads from `group` on that have `share` of them each, whose slots are
    `groups` segments of `capacity` from `start` on."""

    heads: tuple[int, ...]
    group: int
    groups: int
    start: int
    capacity: int
    rule: tuple[int, ...]

    @property
    def share(self) -> int:
        return len(self.heads) // self.groups


def parts_of(rules: Tensor, table: Tensor) -> tuple[Part, ...]:
    """The heads that select, those alike together; rules int32 (H, 6), table int32 (G, 4)."""
    return _parts(read_table(rules), read_table(table), rules.shape[0] // table.shape[0])


# Kept: a step of every layer asks anew.
@lru_cache(maxsize=1024)
def _parts(flat: tuple[int, ...], segments: tuple[int, ...], share: int) -> tuple[Part, ...]:
    width = SOURCE + 1
    found: list[Part] = []
    for group in range(len(segments) // 4):
        start, capacity = segments[4 * group : 4 * group + 2]
        alike: dict[tuple[int, ...], list[int]] = {}
        for head in range(group * share, (group + 1) * share):
            rule = flat[width * head : width * (head + 1)]
            if rule[COUNT]:
                alike.setdefault(rule, []).append(head)
        for rule, heads in alike.items():
            part, last = Part(tuple(heads), group, 1, start, capacity, rule), found[-1] if found else None
            next_to = last is not None and last.group + last.groups == group and len(heads) == last.share == share
            if last is not None and next_to and (last.rule, last.capacity) == (rule, capacity):
                both, groups = (*last.heads, *heads), last.groups + 1
                found[-1] = Part(both, last.group, groups, last.start, capacity, rule)
            else:
                found.append(part)
    return tuple(found)


@lru_cache(maxsize=1024)
def _index(heads: tuple[int, ...], device: torch.device) -> Tensor:
    """int64, sent to the device once."""
    with torch.inference_mode(False):
        return torch.tensor(heads, device=device)


def step(
    q: Tensor, keys: Tensor, values: Tensor, n: Tensor, valid: Tensor | None, table: Tensor, rules: Tensor,
    similar: Tensor, picked: Tensor, asked: Tensor, age: Tensor, sources: Sequence[Tensor], chosen: Tensor,
    labels: Tensor, scale: float, out: Tensor,
) -> None:  # fmt: skip
    """q (B, H, 1, D): the query of the newest token, which keys (B, S, D) and values (B, S, Dv) hold already and n
    int32 (B,) counts; valid bool (B, 1), false where there is no such token, None where there is one in every row.
    Written to the rows of out (B, H, 1, Dv) of the heads that select; 0 where there is no token.

    table int32 (G, 4): start and capacity of each KV head's slots; those of these heads hold the token at position p in
    slot p. rules int32 (H, 6) and similar float32 (H,): how each head selects. The state is written: picked int32 (B,
    H, K), positions ascending and -1 behind them; asked (B, H, D), the query that selected; age int32 (B, H), steps
    since, -1 where nothing is selected. sources: `picked` of earlier layers, of at least as many positions. chosen
    int64 (B, G, R): the features of a KV head, the heaviest first; labels (B, R, S): these of every key, to which the
    newest is added.
    """
    counts = torch.ones_like(n, dtype=torch.bool) if valid is None else valid[:, 0]
    if chosen.shape[2]:
        label(keys, n, counts, table, chosen, labels)
    for part in parts_of(rules, table):
        stop = part.start + part.groups * part.capacity
        shape = (len(n), part.groups, part.capacity, -1)
        held = keys[:, part.start : stop].view(shape), values[:, part.start : stop].view(shape)
        count, source = part.rule[COUNT], part.rule[SOURCE]
        # As index, which copies; the parts of most plans are all heads.
        mine = slice(None) if len(part.heads) == q.shape[1] else _index(part.heads, q.device)
        queries = q[:, mine]
        if source >= 0:
            tokens = sources[source][:, mine, :count]
        else:
            due = _due(queries[:, :, 0], part, similar[mine], asked[:, mine], age[:, mine]) & counts[:, None]
            if not may_ask(q.device) or bool(due.any()):
                scored = _scored(queries, held[0], part, chosen, labels)
                taken = select(*scored, n, count)
                tokens = torch.where(due[..., None], taken, picked[:, mine, :count])
                picked[:, mine, :count] = tokens
                asked[:, mine] = torch.where(due[..., None], queries[:, :, 0], asked[:, mine])
            else:
                tokens = picked[:, mine, :count]
            age[:, mine] = torch.where(due, 0, age[:, mine] + counts[:, None]).to(age.dtype)
        found = attend(queries, *held, tokens, n, part.rule[SINK], part.rule[RECENT], scale)
        out[:, mine] = found.masked_fill(~counts[:, None, None, None], 0.0)


def may_ask(device: torch.device) -> bool:
    """Whether the host may look at what a tensor holds."""
    return device.type == "cpu"


def label(keys: Tensor, n: Tensor, counts: Tensor, table: Tensor, chosen: Tensor, labels: Tensor) -> None:
    """Write the features of the newest key of each row that has one. Nobody selects by features in a ring, whose slots
    may be fewer: there they stay within its own."""
    starts, capacities = table[:, :2].long().unbind(1)
    slot = starts + (n.long()[:, None] - 1).clamp(min=0).minimum(capacities - 1)
    new = keys.gather(1, slot[..., None].expand(-1, -1, keys.shape[2])).gather(2, chosen).mT
    where = slot[:, None].expand(new.shape)
    labels.scatter_(2, where, torch.where(counts[:, None, None], new, labels.gather(2, where)))


def relabel(
    q: Tensor, valid: Tensor | None, keys: Tensor, n: Tensor, table: Tensor, chosen: Tensor, labels: Tensor
) -> None:
    """Weigh features anew, by the queries q (B, H, T, D) of a prompt or a chunk and all keys there are, and write those
    of every key. A row of which no query counts keeps what it has."""
    count = chosen.shape[2]
    segments, found = read_table(table), []
    for group in range(table.shape[0]):
        start, capacity = segments[4 * group : 4 * group + 2]
        here = keys[:, start : start + capacity]
        empty = torch.arange(capacity, device=keys.device) >= n[:, None]
        found.append(wide(here).abs().masked_fill(empty[..., None], 0.0).sum(1))
    of_q = asking(q, valid)
    fresh = heaviest(of_q, torch.stack(found, 1), count)
    chosen.copy_(torch.where(of_q.any(-1).any(-1)[:, None, None], fresh, chosen))
    for group in range(table.shape[0]):
        start, capacity = segments[4 * group : 4 * group + 2]
        here = keys[:, start : start + capacity]
        labels[:, :, start : start + capacity] = here.gather(2, chosen[:, group, None].expand(-1, capacity, -1)).mT


def _due(q: Tensor, part: Part, similar: Tensor, asked: Tensor, age: Tensor) -> Tensor:
    """Which heads select at this step: bool (B, h)."""
    query, then = wide(q), wide(asked)
    apart = (query * then).sum(-1) < similar * query.norm(dim=-1) * then.norm(dim=-1)
    return (age < 0) | (age + 1 >= part.rule[EVERY]) | ((similar > 0) & apart)


def _scored(q: Tensor, held: Tensor, part: Part, chosen: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Queries (B, h, 1, r) and keys (B, g, C, r) that scores are made of."""
    count = part.rule[CHANNELS]
    if not count:
        return wide(q), wide(held)
    groups, stop = slice(part.group, part.group + part.groups), part.start + part.groups * part.capacity
    index = chosen[:, groups, :count].repeat_interleave(part.share, 1)
    here = labels[:, :count, part.start : stop].unflatten(2, (part.groups, part.capacity))
    return wide(q).gather(3, index[:, :, None]), wide(here.permute(0, 2, 3, 1))


def select(q: Tensor, k: Tensor, n: Tensor, count: int) -> Tensor:
    """The positions of the `count` largest scores of q (B, h, 1, D) and the first n of k (B, g, C, D): int32 (B, h,
    count), ascending, -1 behind them."""
    position = torch.arange(k.shape[2], device=q.device)
    scores = grouped(q, k)[:, :, 0].masked_fill(position >= n[:, None, None], -torch.inf)
    beyond = k.shape[2]
    places = torch.where(best(scores, count), position, beyond)
    found = places.topk(min(count, beyond), -1, largest=False, sorted=True).values
    found = found.masked_fill_(found == beyond, -1).to(torch.int32)
    return torch.nn.functional.pad(found, (0, count - found.shape[2]), value=-1)


def attend(
    q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, n: Tensor, sink: int, recent: int, scale: float
) -> Tensor:  # fmt: skip
    """Attention of q (B, h, 1, D) at the position n - 1 to the sink, the recent keys and `tokens` int32 (B, h, K) of k
    (B, g, C, D), v (B, g, C, Dv): (B, h, 1, Dv). Only these keys are read; 0 where n is 0."""
    batch, heads, capacity = q.shape[0], q.shape[1], k.shape[2]
    begin = torch.arange(min(sink, capacity), device=q.device).expand(batch, heads, -1)
    end = n[:, None, None] - 1 - torch.arange(min(recent, capacity), device=q.device)
    length = n[:, None, None]
    keep = torch.cat(
        (
            begin < length,
            (end >= sink).expand(batch, heads, -1),
            (tokens >= sink) & (tokens < length - recent),
        ), -1,
    )  # fmt: skip
    place = torch.cat((begin, end.expand(batch, heads, -1), tokens), -1).masked_fill(~keep, 0).long()
    index = place.view(batch, k.shape[1], -1, 1)
    shape = (batch, heads, place.shape[2], -1)
    keys, there = (wide(x.gather(2, index.expand(-1, -1, -1, x.shape[3]))).view(shape) for x in (k, v))
    scores = (wide(q) * keys).sum(-1) * scale
    weights = scores.masked_fill(~keep, -torch.inf).softmax(-1).masked_fill(~keep, 0.0)
    # A slot that holds nothing may hold NaN.
    mixed = (weights[..., None] * there.masked_fill(~keep[..., None], 0.0)).sum(2, keepdim=True)
    return mixed.to(q.dtype)


TEMPLATE = '"""{spec}."""\n\nfrom attnopt.codegen.{home} import step\n\n__all__ = ["step"]\n'


@TARGETS.register("reference token_step")
class Reference:
    @staticmethod
    def emit(spec: TokenStep) -> str:
        text = TEMPLATE.format(spec=spec, home="reference_token_step")
        return text + footer(spec, "self_check_tokens", "step")
