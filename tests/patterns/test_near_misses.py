"""Near misses: nothing is found in what is no attention, and what is one is recorded as the one it is.

Nothing is verified by running while compiling: the matcher itself must refuse, not the check after it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from tracing import qkv, trace

from . import near_misses_of_masks, near_misses_of_scores, tempered_spellings  # noqa: F401  (register theirs)
from .near_misses import NEAR_MISSES, NearMiss
from .spellings import normalised

# Where these are tried, all that coincides in another of its sizes does.
ALL_ALIKE = {"heads": 8, "length": 8}


def case(near_miss: NearMiss, sizes: Mapping[str, int]) -> Any:
    name = "-".join([str(near_miss), *(f"{name}{size}" for name, size in sizes.items())])
    seldom = ALL_ALIKE in near_miss.sizes and set(sizes) == {"length"}
    return pytest.param(near_miss, sizes, id=name, marks=[pytest.mark.full] * seldom)


CASES = [case(n, sizes) for n in NEAR_MISSES for sizes in n.sizes]


@pytest.mark.parametrize(("near_miss", "sizes"), CASES)
def test_near_misses(near_miss: NearMiss, sizes: Mapping[str, Any]) -> None:
    q, k, v = qkv(**sizes)
    inputs = (q, k, v, *near_miss.more(q))
    traced = trace(near_miss.fn, *inputs, verify=False)
    assert not traced.refusals, [str(r) for r in traced.refusals]
    for site in traced.sites:
        record = normalised(site.canonical)
        assert near_miss.right and re.fullmatch(near_miss.right, record), record
    if near_miss.says and not traced.sites:
        assert any(re.search(near_miss.says, reason) for reason in traced.misses), traced.misses
    torch.testing.assert_close(traced.output, near_miss.fn(*inputs), atol=5e-5, rtol=1e-4, equal_nan=True)
