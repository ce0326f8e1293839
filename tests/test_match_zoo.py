"""The zoo: twenty classes through the matcher, and that the zoo itself would see what is wrong."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

transformers = pytest.importorskip("transformers")

from attnopt.hf.inputs import inputs_of
from attnopt.hf.shrink import HEAD_DIM, HEADS, HIDDEN, shrink
from attnopt.ir import Bias, Load, Mask, Site
from benchmarks.zoo import run_cell as cell_runner
from benchmarks.zoo.build import build
from benchmarks.zoo.cells import CELLS, cells_of, error_between, floats
from benchmarks.zoo.classes import FAST, FULL, entries
from benchmarks.zoo.masks import NotChecked, disagreement, name_of
from benchmarks.zoo.observe import Observed, Seen, attention_calls
from benchmarks.zoo.run_cell import judged, run_cell
from benchmarks.zoo.watch import Call, Watch

# What the matcher does not recognise in the fast subset, with the reason it gives; SILENT where it gives none.
SILENT = "no site and no reason"
KNOWN: dict[str, str] = {}


# One of two by default, so that each kind of model, in its turn eager or SDPA, is among them.
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.full] * (at % 4 in (1, 2))) for at, n in enumerate(FAST)]
)
def test_fast_subset(name: str) -> None:
    """Each class in the cell with most in it that it has: padded where it takes tokens, eager and SDPA by turns."""
    turn = ("eager padded", "sdpa padded")[FAST.index(name) % 2]
    record = run_cell(name, turn)
    for other in ("eager padded", "eager"):
        if record["status"] in ("not offered", "not applicable"):
            record = run_cell(name, other)
    assert record["status"] in ("ok", "missed"), record
    assert record["calls"] > 0
    if record["status"] == "missed":
        assert ({m["reason"] for m in record["misses"]} or {SILENT}) == {KNOWN.get(name)}, record["misses"]
    else:
        assert name not in KNOWN, "it is recognised now: take it off the list"


@pytest.mark.full
@pytest.mark.slow
def test_the_shipped_backend() -> None:
    record = run_cell("LlamaForCausalLM", "eager padded", inductor=True)
    assert record["status"] == "ok", record
    assert record["sites"] == record["calls"] == 2


def test_classes_are_named_once() -> None:
    names = [e.name for e in entries()]
    assert len(names) == len(set(names)) >= 260
    assert set(FAST) <= set(FULL) <= set(names) and len(FAST) == 20 and len(FULL) == 40


def test_every_class_outside_the_full_grid_has_one_cell_of_it() -> None:
    assert len(cells_of("LlamaForCausalLM", set(FULL), 0)) == 9
    turns = {cells_of("Other", set(), n)[-1].name for n in range(5)}
    assert turns == {"bf16", "dynamic", "training", "decode", "decode static"}


def test_shrunk_sizes_are_consistent() -> None:
    config = shrink(transformers.LlamaConfig(num_key_value_heads=8))
    assert (config.num_hidden_layers, config.hidden_size) == (2, HIDDEN) and config.num_attention_heads == HEADS
    assert config.num_attention_heads * config.head_dim == config.hidden_size and config.num_key_value_heads == 2
    assert max(config.bos_token_id, config.eos_token_id) < config.vocab_size


def test_shrinking_keeps_a_layer_of_every_type() -> None:
    config = shrink(transformers.Gemma3TextConfig())
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    assert len(config.layer_types) == config.num_hidden_layers == 2


def test_nested_configurations_shrink_too() -> None:
    config = shrink(transformers.CLIPConfig())
    assert config.text_config.num_hidden_layers == config.vision_config.num_hidden_layers == 2
    assert config.text_config.hidden_size == config.vision_config.hidden_size == HIDDEN
    assert config.vision_config.image_size % config.vision_config.patch_size == 0


def test_latent_attention_shrinks() -> None:
    config = shrink(transformers.DeepseekV3Config())
    assert config.num_key_value_heads == config.num_attention_heads == HEADS
    assert config.v_head_dim == HEAD_DIM != config.qk_rope_head_dim


class Attention(nn.Module):
    """A causal attention beside a router: one soft-max of each."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.route = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).view(*x.shape[:2], 2, 12).transpose(1, 2).chunk(3, -1)
        scores = q @ k.transpose(-1, -2) / 2
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        weights = torch.softmax(scores.masked_fill(later, float("-inf")), -1)
        gate = torch.softmax(self.route(x), -1)[..., :1]
        return (weights @ v).transpose(1, 2).flatten(2) * gate


def test_the_watch_counts_attention_and_no_router() -> None:
    model = Attention()
    seen = Watch(model)
    with seen, torch.no_grad():
        output = model(torch.randn(2, 7, 8))
    (call,) = seen.close()
    assert output.shape == (2, 7, 8) and call.form == "soft-max" and not call.biased
    assert torch.equal(call.keep, torch.ones(7, 7, dtype=torch.bool).tril().expand(2, 2, 7, 7))
    assert name_of(call.keep) == "causal"


def test_the_watch_sees_a_mask_through_the_rows_maximum() -> None:
    """A row that is masked completely is one of zeros after its maximum was subtracted."""

    class Shifted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            keep = torch.ones(5, 5, dtype=torch.bool).tril()
            keep[:2] = False
            scores = (x @ x.mT).masked_fill(~keep, torch.finfo(x.dtype).min)
            sinks = torch.cat([scores, torch.zeros(2, 3, 5, 1)], -1)
            return torch.softmax(sinks - sinks.max(-1, keepdim=True).values, -1)[..., :-1] @ x + (
                torch.softmax(scores.sub(scores.amax(-1, keepdim=True)), -1) @ x
            )

    seen = Watch(model := Shifted())
    with seen, torch.no_grad():
        model(torch.randn(2, 3, 5, 4))
    expected = torch.ones(5, 5, dtype=torch.bool).tril()
    expected[:2] = False
    assert [torch.equal(call.keep, expected.expand(2, 3, 5, 5)) for call in seen.close()] == [True, True]


def test_padding_is_at_the_front_of_what_generates() -> None:
    for name, training, left in (
        ("LlamaForCausalLM", False, True), ("LlamaForCausalLM", True, False), ("BertForMaskedLM", False, False),
        ("T5ForConditionalGeneration", False, False),
    ):  # fmt: skip
        mask = inputs_of(build(name), padded=True, training=training)["attention_mask"]
        assert mask[0].all() and bool(mask[1, 0]) is not left and bool(mask[1, -1]) is left


def test_the_watch_opens_multi_head_attention() -> None:
    model = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    for weights, form in ((True, "soft-max"), (False, "sdpa")):
        seen = Watch(model)
        with seen:
            model(x, x, x, need_weights=weights)
        assert [call.form for call in seen.close()] == [form]


def test_masks_are_named_by_value() -> None:
    i, j = torch.arange(12)[:, None], torch.arange(12)
    pad = torch.ones(2, 1, 1, 12, dtype=torch.bool)
    pad[1, ..., :3] = False
    cases = {
        "all": i >= i, "causal": i >= j, "sliding 4": (i >= j) & (i - j < 4), "window |2|": (i - j).abs() <= 2,
        "causal chunks 4": (i >= j) & (i // 4 == j // 4), "chunks 4": i // 4 == j // 4,
        "causal and padding": (i >= j) & pad, "padding": (i >= -j) & pad, "data": (i * 7 + j * j) % 5 < 2,
        "causal offset 5": i + 5 >= j,
    }  # fmt: skip
    for name, keep in cases.items():
        assert name_of(keep.expand(2, 3, 12, 12)) == name


def causal(batch: int = 2, heads: int = 3) -> Tensor:
    return torch.ones(9, 9, dtype=torch.bool).tril().expand(batch, heads, 9, 9)


def test_a_wrong_mask_is_seen() -> None:
    assert disagreement(Mask(causal=True), causal(), (2, 3, 9, 9), {}) == ""
    for wrong in (Mask(), Mask(causal=True, offset=1), Mask(causal=True, window=8), Mask(causal=True, chunk=8)):
        assert disagreement(wrong, causal(), (2, 3, 9, 9), {})


def test_columns_of_sinks_and_packed_rows() -> None:
    with_sink = torch.cat([causal(), torch.ones(2, 3, 9, 1, dtype=torch.bool)], -1)
    assert disagreement(Mask(causal=True), with_sink, (2, 3, 9, 9), {}) == ""
    packed = (torch.arange(9) < 5).expand(2, 3, 2, 9)
    assert disagreement(Mask(causal=True, offset=4), packed, (2, 6, 1, 9), {}) == ""
    assert disagreement(Mask(causal=True, offset=5), packed, (2, 6, 1, 9), {})
    with pytest.raises(NotChecked, match="laid out"):
        disagreement(Mask(causal=True), causal(), (2, 3, 9, 8 + 2), {})


def test_loads_and_terms_are_evaluated() -> None:
    doc = torch.tensor([[0] * 4 + [1] * 5, [0] * 9])
    pad = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    pad[1, ..., -2:] = False
    realised = causal() & (doc[:, None, :, None] == doc[:, None, None, :]) & pad
    mask = Mask(causal=True, terms=("doc[b, i] == doc[b, j]",), loads=(Load("pad", ("b", "j")),))
    assert disagreement(mask, realised, (2, 3, 9, 9), {"doc": doc, "pad": pad}) == ""
    assert disagreement(mask, realised, (2, 3, 9, 9), {"doc": doc, "pad": torch.ones_like(pad)})
    assert disagreement(mask, realised, (2, 3, 9, 9), {"doc": doc.flip(1), "pad": pad})
    with pytest.raises(NotChecked, match="doc"):
        disagreement(mask, realised, (2, 3, 9, 9), {"pad": pad})


def test_data_that_is_added_may_be_a_mask() -> None:
    added = causal(2, 1).double()
    bias = Bias("data", f"held[b, i, j]*{10**30} - {10**30}", (Load("held", ("b", "i", "j")),))
    assert disagreement(Mask(), causal(), (2, 3, 9, 9), {"held": added})
    assert disagreement(Mask(), causal(), (2, 3, 9, 9), {"held": added}, bias) == ""
    assert disagreement(Mask(), causal(), (2, 3, 9, 9), {"held": added.roll(1, -1)}, bias)


def test_symbols_and_signs_of_a_formula() -> None:
    realised = torch.ones(4, 9, dtype=torch.bool).tril(5).expand(1, 1, 4, 9)
    assert disagreement(Mask(causal=True, offset="t - s"), realised, (1, 1, 4, 9), {"t": 9, "s": 4}) == ""
    assert disagreement(Mask(causal=True, offset="t - s"), realised, (1, 1, 4, 9), {"t": 9, "s": 5})
    assert disagreement(Mask(terms=("not (j > i + 5) or |i - j| < 0",)), realised, (1, 1, 4, 9), {}) == ""


def observed_with(mask: Mask) -> Observed:
    site = Site("a", 0, "sdpa", 3, 3, 8, 8, 0.35, "float32", mask)
    return Observed(graphs=1, seen=[Seen(site, {}, (2, 3, 9, 9))])


def test_the_verdict_of_a_cell() -> None:
    base: dict[str, Any] = {"error": 1e-6, "bound": 1e-4, "graphs": [1, 1], "breaks": [0, 0]}
    calls = [Call("sdpa", "a", causal())]
    assert judged(base, observed_with(Mask(causal=True)), calls)["status"] == "ok"
    assert judged(base, observed_with(Mask()), calls)["status"] == "wrong"
    assert judged({**base, "error": 1e-3}, observed_with(Mask(causal=True)), calls)["status"] == "wrong"
    assert judged({**base, "error": float("nan")}, observed_with(Mask(causal=True)), calls)["status"] == "wrong"
    assert judged({**base, "graphs": [1, 2]}, observed_with(Mask(causal=True)), calls)["status"] == "broken"
    assert judged(base, observed_with(Mask(causal=True)), calls * 2)["status"] == "missed"
    assert judged(base, observed_with(Mask(causal=True)), [])["status"] == "wrong"


def test_the_error_is_relative_and_sees_nans() -> None:
    a, b = torch.tensor([1.0, 100.0]), torch.tensor([1.0, 101.0])
    assert error_between([[("x", b)]], [[("x", a)]]) == pytest.approx(0.01)
    assert error_between([[("x", torch.tensor([1.0, float("nan")]))]], [[("x", a)]]) == float("inf")
    assert error_between([[("y", a)]], [[("x", a)]]) == float("inf")


def test_attention_that_nothing_reads_is_not_asked_for() -> None:
    counts: list[tuple[int, int]] = []

    def backend(gm: torch.fx.GraphModule, _: list[Any]) -> Any:
        counts.append(attention_calls(gm))
        return gm.forward

    def fn(x: Tensor) -> Tensor:
        written, weights = torch.zeros(2, 3, 5, 5), (x @ x.mT).softmax(-1)
        written[:, :2] = F.softmax(x @ x.mT, -1)[:, :2]
        F.scaled_dot_product_attention(x, weights @ x, x).relu()
        return written

    torch.compile(fn, backend=backend)(torch.randn(2, 3, 5, 4))
    assert counts == [(3, 2)]
    base: dict[str, Any] = {"error": 1e-6, "bound": 1e-4, "graphs": [1, 1], "breaks": [0, 0]}
    met, calls = observed_with(Mask(causal=True)), [Call("sdpa", "a", causal())] * 3
    met.reached, met.unread = 3, 2
    assert judged(base, met, calls)["status"] == "ok" and judged(base, met, calls)["calls"] == 1
    assert judged(base, met, calls[:1])["calls"] == 1
    # Six calls of which the graphs hold three.
    assert judged(base, met, calls * 2)["status"] == "missed" and judged(base, met, calls * 2)["outside"] == 3


def test_rows_of_padding_are_left_out() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    ((_, kept),) = floats({"logits": torch.randn(2, 3, 5)}, mask)
    assert kept.shape == (5, 5)


@pytest.mark.parametrize("cell", ["sdpa padded", "bf16"])
def test_a_broken_matcher_shows_in_the_zoo(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask dropped, or scores off by a tenth where outputs are rounded, changes the output, and the cell says so."""
    true_sdpa = F.scaled_dot_product_attention

    def backend_of(met: Observed) -> Any:
        def backend(gm: torch.fx.GraphModule, _: list[Any]) -> Any:
            met.graphs += 1
            for node in gm.graph.nodes:
                if node.target is true_sdpa:
                    node.kwargs = {**node.kwargs, "attn_mask": None, "is_causal": False}
                if node.target is F.softmax:
                    with gm.graph.inserting_before(node):
                        node.args = (gm.graph.call_function(torch.mul, (node.args[0], 0.9)), *node.args[1:])
            gm.recompile()
            return gm.forward

        return backend

    monkeypatch.setattr(cell_runner, "backend_of", backend_of)
    record = run_cell("LlamaForCausalLM", cell)
    assert record["status"] == "wrong" and "the output differs" in record["wrong"][0]


def test_padding_is_on_the_side_where_generation_puts_it() -> None:
    mask = inputs_of(build("LlamaForCausalLM"), padded=True)["attention_mask"]
    assert mask[0].all() and not mask[1, 0] and mask[1, -1]
    assert all(cell.bound <= (4e-2 if cell.dtype == torch.bfloat16 else 1e-4) for cell in CELLS.values())
