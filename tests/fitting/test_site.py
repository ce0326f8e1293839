"""All maps of a site: what training is worth on rows held out, and which map a head keeps."""

from __future__ import annotations

import torch

from attnopt.feature_maps import FeatureMap, shapes
from attnopt.fitting.rows import Collected, Rows
from attnopt.fitting.site import SiteFit, best_of

H, G, N, D, DV = 4, 2, 200, 8, 6
SINK, WINDOWS = 2, (8, 32)


def collected() -> Collected:
    """Three sequences of heads that look at a few of many clusters of keys, from sharply to hardly."""
    generator = torch.Generator().manual_seed(0)
    kinds, values = 2 * torch.randn(G, 12, D, generator=generator), torch.randn(G, 12, DV, generator=generator)
    found = Collected(0.5)
    for _ in range(3):
        of = torch.randint(12, (N,), generator=generator)
        keys = kinds[:, of] + 0.5 * torch.randn(G, N, D, generator=generator)
        at = (60 + torch.randperm(N - 60, generator=generator)[:48]).sort().values
        q = torch.tensor([2.0, 1.0, 0.5, 0.1])[:, None, None] * torch.randn(H, 48, D, generator=generator)
        found.rows.append(Rows(q, at, keys, values[:, of]))
    found.fisher, found.outputs = torch.eye(DV, dtype=torch.float64).repeat(H, 1, 1), torch.zeros(H, DV)
    return found


def test_training_helps_on_rows_held_out() -> None:
    def error(steps: int) -> torch.Tensor:
        site = SiteFit(collected(), SINK, WINDOWS, 0)
        map, fits = site.exponential(8, steps)
        errors = torch.tensor([fit.error for fit in fits], dtype=torch.float64)
        torch.testing.assert_close(site.error(map), errors)
        assert not map.problem(D)
        if steps:
            assert sum(fit.method == "learned" for fit in fits) >= 3
        return errors

    closed, learned = error(0), error(100)
    assert (learned <= closed).all() and float((learned / closed).log().mean().exp()) < 0.7
    # A head that hardly tells keys apart is served almost exactly, one that picks some less well, all better than not.
    assert (learned < 1).all() and float(learned[-1]) < 0.05 < float(learned[0])


def test_more_directions_are_better() -> None:
    site = SiteFit(collected(), SINK, WINDOWS, 0)
    one, four = (torch.tensor([fit.error for fit in site.expansion(rank)[1]]) for rank in (1, 4))
    assert (four < one).sum() >= 3 and float(four[-1]) < 0.2


def test_the_best_map_of_each_head_is_kept() -> None:
    maps = [FeatureMap("exp", *(torch.full(s, float(n)) for s in shapes(3, 2, D).values())) for n in range(3)]
    maps[2].bk[1] = torch.nan
    nan = float("nan")
    errors = [torch.tensor([0.5, nan, nan]), torch.tensor([0.2, nan, nan]), torch.tensor([0.9, 0.1, 0.3])]
    map, fits = best_of(list(zip(("random", "learned", "centroids"), maps, errors, strict=True)))
    assert [fit.method for fit in fits][::2] == ["learned", "centroids"] and map.u0.tolist() == [1.0, 0.0, 2.0]
    assert [bool(fit.refused) for fit in fits] == [False, True, False] and not map.problem(D)
