"""What the models of the mixture benchmarks are trained on, and the benchmarks themselves at their smallest."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.mixtures.documents import DIFFUSE, RECALL, Documents

SMALL = Documents("small", 3, 4, 0.5, 0.7)


@pytest.mark.parametrize("window", [None, 2, 5, 8, 400])
def test_the_best_loss_is_that_of_counting_what_is_seen(window):
    """A query at position 2n sees the `window` positions up to its own."""
    ids = SMALL.sequences("verify", 120, 2)
    found = SMALL.best_losses(ids, window)
    for row, losses in zip(ids.tolist(), found.tolist(), strict=True):
        for n, loss in enumerate(losses):
            first = 0 if window is None else max(0, 2 * n - window + 1)
            seen = [row[at] for at in range(first, 2 * n + 1) if at % 2]
            own = [value for value in seen if (value - 3) // 4 == row[2 * n]]
            share = (own.count(row[2 * n + 1]) + 0.5) / (len(own) + 4 * 0.5)
            assert loss == pytest.approx(-math.log(share))


def test_documents_alternate_and_splits_differ():
    for kind in (SMALL, DIFFUSE, RECALL):
        ids = kind.sequences("calibrate", 201, 2)
        markers, values = ids[:, ::2], ids[:, 1::2]
        assert ids.shape == (2, 201) and ids.dtype == torch.int64
        assert bool((markers < kind.markers).all()) and int(values.max()) < kind.vocabulary
        assert bool(((values - kind.markers) // kind.values == markers[:, :-1]).all())
        assert torch.equal(ids, kind.sequences("calibrate", 201, 2))
        assert not torch.equal(ids, kind.sequences("verify", 201, 2))


def test_far_keys_are_worth_a_histogram_or_a_lookup():
    """What 64 tokens are short of, in nats per value, is what the two kinds of document are made for."""
    worth = {}
    for kind in (DIFFUSE, RECALL):
        ids = kind.sequences("verify", 4096, 1)
        near, everything = (kind.best_losses(ids, w)[:, 1024:].mean().item() for w in (64, None))
        worth[kind.name] = near - everything
    assert worth["diffuse"] > 0.3 and worth["recall"] > 1.2
