"""What the tests of the backend share: a plan for the tiny Llama, compiled functions, what was rewritten."""

from __future__ import annotations

import torch
from models import LAYERS

from attnopt import backend
from attnopt.ir import DENSE, Choice

SPANS = (DENSE, *(Choice.of("sink_window", {"sink": s, "alpha": w, "beta": 0.0}) for s, w in ((2, 5), (0, 7), (2, 5))))
LLAMA = {f"model.layers.{n}.self_attn": SPANS for n in range(LAYERS)}


def compiled(model, **options):
    return torch.compile(model, backend=backend.attnopt, options=options or None)


def rewritten():
    return [r.path for report in backend.reports() for r in report.rewrites]


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)
