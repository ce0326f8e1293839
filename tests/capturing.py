"""What the tests of the capture share: the captured graph of a function, and equality to the last bit."""

from __future__ import annotations

import torch

from attnopt.capture import capture
from attnopt.ir import Refusal


def captured(fn, *inputs, grad=False, dynamic=False):
    """The captured graph of `fn` and its result on `inputs`; no graph may be refused."""
    seen = []

    def backend(gm, _):
        seen.append(capture(gm))
        assert not isinstance(seen[-1], Refusal), seen[-1]
        return seen[-1].forward

    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        out = torch.compile(fn, backend=backend, dynamic=dynamic)(*inputs)
    (gm,) = seen
    return gm, out


def equal(a, b):
    torch.testing.assert_close(a, b, atol=0, rtol=0)
