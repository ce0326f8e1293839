"""StaticCache of transformers, compiled in place: generation with left padding, a sliding window's buffers, beams."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import build, tokens
from tracing import Traced

from attnopt.capture import capture
from attnopt.passes import PIPELINE, Program, pays


def generated(model: Any, pads: int = 3, **options: Any) -> Any:
    """Two prompts, one of them with pads on its left."""
    shown = torch.ones(2, 10, dtype=torch.long)
    shown[0, :pads] = 0
    return model.generate(
        tokens(2, 10), attention_mask=shown, max_new_tokens=6, cache_implementation="static", disable_compile=True,
        return_dict_in_generate=True, output_logits=True, do_sample=False, pad_token_id=0, **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("family", "changes", "options", "forms"),
    [
        ("llama", {}, {}, [pays.LIVE] * 2),
        # Four query heads over one KV head, scores with an additive mask; every beam's cache is another's at times.
        ("llama", {"attention": "eager", "num_key_value_heads": 1}, {"num_beams": 3}, [pays.LIVE] * 2),
        # A window of twelve: written to up to the twelfth token, rolled from then on.
        ("mistral", {"sliding_window": 12}, {}, [pays.LIVE] * 3),
    ],
    ids=["llama", "eager, beams", "mistral"],
)
def test_generation_from_a_static_cache(family, changes, options, forms) -> None:
    """The logits of every token, as uncompiled; each graph reads the filled slots in its layer."""
    model, traced = build(family, num_hidden_layers=1, **changes), Traced()
    expected = generated(model, **options)

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        captured = capture(gm)
        program = Program(captured, verify=True).run(PIPELINE)
        traced.programs.append(program)
        return captured.forward

    torch._dynamo.reset()
    model.compile(backend=backend)
    found = generated(model, **options)
    logits, wanted = torch.stack(found.logits), torch.stack(expected.logits)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(logits, wanted, atol=2e-5, rtol=1e-4)
    # Not of a model to which it hardly matters what it attends to.
    other = generated(model, pads=2, **options)
    assert (other.logits[0] - wanted[0])[:, 0].abs().max() > 0.02
    assert traced.rewrites == forms, traced.left
    assert {site.kv for site in traced.sites} <= {"write", "ring"}
