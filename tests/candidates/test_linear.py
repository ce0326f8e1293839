"""linear: its far part under the shared normaliser, its state, and that it offers nothing that was not tried."""

from __future__ import annotations

import pytest
import torch
from candidates.degenerate import DIM, HEADS, LENGTH, SCALE, Degenerate, any_inputs, keys_of_a_codebook, map_of

from attnopt.feature_maps import key_features, query_features
from attnopt.ir import Mask, Site
from attnopt.registry import CANDIDATES
from attnopt.statistics import Grid, Observation

candidate = CANDIDATES["linear"]
PARAMS = {"sink": 2, "window": 9, "features": DIM}


def codebook() -> object:
    """Feature r of a key is 1 for codeword r and nothing for the others; of a query, exp(scale q.codeword)."""
    eye = torch.eye(DIM)
    return map_of("exp", SCALE * eye, 80.0 * eye, torch.full((DIM,), -80.0), torch.zeros(DIM))


DEGENERATE = [
    Degenerate("a window of every key", {**PARAMS, "window": LENGTH}, given=codebook),  # type: ignore[arg-type]
    Degenerate("sinks reach the window", {**PARAMS, "sink": LENGTH - 9}, given=codebook),  # type: ignore[arg-type]
    Degenerate("keys of a codebook", PARAMS, keys_of_a_codebook, codebook),  # type: ignore[arg-type]
]


def site(window: int | None = None) -> Site:
    return Site("layers.0", 0, "sdpa", HEADS, 2, DIM, DIM, SCALE, "bfloat16", Mask(causal=True, window=window))


def test_reference_shares_one_normaliser() -> None:
    q, k, v = any_inputs()
    drawn = torch.Generator().manual_seed(1)
    wq, wk, bk, u = (0.3 * torch.randn(s, generator=drawn) for s in ((DIM, DIM), (DIM, DIM), (DIM,), (HEADS, DIM)))
    given = map_of("exp", wq, wk, bk, u)
    found = candidate.reference(q, k, v, PARAMS, SCALE, given=given)
    keys, values = (x.repeat_interleave(2, 1) for x in (k, v))
    (of_q, shift), of_k = query_features(q, given), key_features(keys, given)
    for b, h, i in ((0, 0, 0), (0, 1, 10), (1, 2, 11), (1, 3, LENGTH - 1)):
        near = [j for j in range(i + 1) if j < 2 or i - j < 9]
        far = [j for j in range(i + 1) if j not in near]
        weights = {j: torch.exp(SCALE * q[b, h, i] @ keys[b, h, j]) for j in near}
        weights |= {j: torch.exp(shift[b, h, i]) * (of_q[b, h, i] @ of_k[b, h, j]) for j in far}
        expected = sum(w * values[b, h, j] for j, w in weights.items()) / sum(weights.values())
        torch.testing.assert_close(found[b, h, i], expected)
    assert far == list(range(2, LENGTH - 9))


def test_it_names_its_map_and_its_state() -> None:
    assert (candidate.far, candidate.map_name(PARAMS), candidate.far_part(PARAMS)) == ("linear", "linear/8", ("exp", 8))
    assert candidate.state_bytes(PARAMS, site(), 512) == 8 * (DIM + 1) * 4  # float32, whatever the site's dtype
    assert candidate.span(PARAMS, 4096) == (2, 9) and candidate.span(PARAMS, 5) == (2, 5)


def test_without_trials_there_is_no_choice_and_a_profile_knows_its_span_only() -> None:
    grid = Grid((0, 2), (8, 16))
    assert candidate.space(grid, [64, 128]) == []
    seen = Observation.zeros(HEADS, grid, 64)
    seen.t2[:] = torch.tensor([8.0, 4.0])
    plain = CANDIDATES["sink_window"].damage(seen, {"sink": 2, "alpha": 9, "beta": 0.0}, 64)
    assert candidate.damage(seen, PARAMS, 64).equal(plain) and plain.min() > 2


def test_a_sliding_site_has_no_far_keys() -> None:
    refusal = candidate.refuse(site(window=16))
    assert refusal is not None and refusal.code == "far-needs-causal" and "16 keys" in refusal.reason
    assert candidate.refuse(site()) is None


@pytest.mark.parametrize(
    ("changed", "text"), [({"features": 0}, "features must be"), ({"window": 0}, "window must be")]
)
def test_wrong_parameters_are_named(changed: dict[str, int], text: str) -> None:
    assert text in candidate.problem({**PARAMS, **changed})
