"""`attnopt::attend_tokens`: `attnopt::attend_update` for layers some of whose heads attend to tokens that they select.

A prompt, or several tokens at once, is that operator's and every head dense; what was selected before counts no more. A
single token is written, heads with spans attend to it as there, and those that select by the kernel of `TokenStep`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from attnopt import settings
from attnopt.codegen import cache_cpu
from attnopt.codegen.emit import load
from attnopt.codegen.reference_token_step import relabel
from attnopt.codegen.slots import refuse_overflow
from attnopt.codegen.spec import TokenStep
from attnopt.codegen.work_list import read_table
from attnopt.ops import cache
from attnopt.ops.span import empty_tokens_first, launches

_library = torch.library.Library("attnopt", "FRAGMENT")
_library.define(
    "attend_tokens(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor(c!) n, Tensor? valid, "
    "Tensor table, Tensor quick, Tensor spans, Tensor rules, Tensor similar, Tensor(d!) picked, Tensor(e!) asked, "
    "Tensor(f!) age, Tensor[] sources, Tensor(g!) chosen, Tensor(h!) labels, float scale, bool fresh) -> Tensor"
)


def attend_tokens(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, n: Tensor, valid: Tensor | None, table: Tensor,
    quick: Tensor, spans: Tensor, rules: Tensor, similar: Tensor, picked: Tensor, asked: Tensor, age: Tensor,
    sources: Sequence[Tensor], chosen: Tensor, labels: Tensor, scale: float, fresh: bool,
) -> Tensor:  # fmt: skip
    """q (B, H, T, D), k (B, G, T, D), v (B, G, T, Dv) of T new tokens -> (B, H, T, Dv), laid out as (B, T, H, Dv).

    Arguments as those of `attnopt::attend_update` and of attnopt/codegen/reference_token_step.py, and `quick`, int32
    (G, 4): the table with which a single token's spans are looked at, of the same slots, in which KV heads none of
    whose query heads has a span have a window of 1. Written are the cache, n and the state: picked, asked, age, chosen
    and labels.

    CacheFull, with nothing written, as there; ValueError for sizes, dtypes or devices that do not fit.
    """
    cache.refuse_gradient(q, k, v, keys, values)
    target = settings.target(q.device.type)
    given = [(x.shape, x.dtype, x.device) for x in (q, v, keys, rules, similar, picked, asked, age, chosen, labels)]
    module, key = _kernel(target, *given)
    single = q.shape[2] == 1
    here = single and q.device.type == "cpu" and q.numel()
    if here and int(n.max()) + 1 > int(table[:, 1].min()):
        # Of `quick`, no head may be said to hold every token.
        refuse_overflow(1, keys.shape[1], n, valid, table)
    if here and all(read_table(rules)[:: rules.shape[1]]):
        # No spans: nothing but the kernel below looks at the cache.
        cache.check(q, k, v, keys, values, n, valid, table, spans)
        cache_cpu.store(k, v, keys, values, n, valid, table, spans)
        out = empty_tokens_first(q, v.shape[3])
    else:
        out = cache.attend_update(q, k, v, keys, values, n, valid, quick if single else table, spans, scale, fresh)
    if chosen.shape[2] and (fresh or not single):
        relabel(q, valid, keys, n, table, chosen, labels)
    if not single:
        age.fill_(-1)
        return out
    launches[key] += 1
    state = rules, similar, picked, asked, age, sources, chosen, labels
    module.step(q, keys, values, n, valid, table, *state, scale, out)
    return out


@lru_cache(maxsize=1024)
def _kernel(
    target: str, q: cache.Given, v: cache.Given, keys: cache.Given, rules: cache.Given, similar: cache.Given,
    picked: cache.Given, asked: cache.Given, age: cache.Given, chosen: cache.Given, labels: cache.Given,
) -> tuple[ModuleType, str]:  # fmt: skip
    """The emitted module and its key. ValueError unless the state belongs to the heads and the cache."""
    (batch, heads, _, dim), groups, slots = q[0], chosen[0][1], keys[0][1]
    most, features = picked[0][-1], chosen[0][-1]
    wanted = dict(
        rules=(heads, 6), similar=(heads,), picked=(batch, heads, most), asked=(batch, heads, dim), age=(batch, heads),
        chosen=(batch, groups, features), labels=(batch, features, slots),
    )  # fmt: skip
    given = dict(rules=rules, similar=similar, picked=picked, asked=asked, age=age, chosen=chosen, labels=labels)
    for name, (shape, _, device) in given.items():
        if tuple(shape) != wanted[name] or device != q[2]:
            raise ValueError(f"{name} is {tuple(shape)} on {device}, expected {wanted[name]} on {q[2]}")
    kinds = dict(rules=torch.int32, similar=torch.float32, picked=torch.int32, age=torch.int32, chosen=torch.int64)
    for name, kind in (kinds | dict(asked=q[1], labels=keys[1])).items():
        if given[name][1] != kind:
            raise ValueError(f"{name} is {given[name][1]}, expected {kind}")
    spec = TokenStep(target, str(q[1]).removeprefix("torch."), heads, groups, dim, v[0][3])
    return load(spec), spec.key()


def _fake(q, k, v, *rest):  # type: ignore[no-untyped-def]
    cache.refuse_gradient(q, k, v)
    return empty_tokens_first(q, v.shape[3])


_library.impl("attend_tokens", attend_tokens, "CompositeExplicitAutograd")
torch.library.register_fake("attnopt::attend_tokens", _fake, lib=_library)
