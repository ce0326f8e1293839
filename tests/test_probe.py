"""The long-range probe: answers stand above, far enough, in any tokenizer; the shipped model recalls them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from attnopt import hf
from attnopt.errors import TextError
from attnopt.ir import Choice
from attnopt.measure import Spans
from attnopt.probe import CODE, PROSE, Form, Probe, longest_reach, recall, words_of

pytestmark = pytest.mark.slow


class Letters:
    """One token per character, no vocabulary to ask for words, no first token."""

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, ids: Any) -> str:
        return "".join(map(chr, ids))


@pytest.fixture(scope="module")
def demo() -> hf.Loaded:
    return hf.load("demo")


@pytest.mark.parametrize("form", [CODE, PROSE, Form("{name}:{value};", "{name}?", "{value}!", "")])
@pytest.mark.parametrize("which", ["demo", "letters"])
@pytest.mark.parametrize("length", [160, 700])
def test_every_answer_stands_above_its_question(form: Form, which: str, length: int, demo: hf.Loaded) -> None:
    tokenizer = demo.tokenizer if which == "demo" else Letters()
    document = Probe(tokenizer, form).document(length, 5)
    ids = document.ids[0].tolist()
    assert len(ids) == length and len(document.answers) == len(document.distances) >= 1
    counted = document.sample.weights
    assert counted is not None and counted.nonzero()[:, 0].tolist() == [p for a in document.answers for p in a]
    for positions, distance in zip(document.answers, document.distances, strict=True):
        answer = tokenizer.decode([ids[p] for p in positions])
        value = answer.strip().rstrip(".!")
        above = tokenizer.decode(ids[: length // 2])
        assert value in above, "the binding is in the upper half"
        asked = tokenizer.decode(ids[: positions[0]])
        assert distance > length // 4 and asked.count(value) == 1, "and nowhere else"


def test_documents_are_drawn_from_the_seed(demo: hf.Loaded) -> None:
    probe = Probe(demo.tokenizer)
    one, two = probe.documents(300, 2, seed=1)
    assert torch.equal(one.ids, probe.document(300, "1 0").ids) and not torch.equal(one.ids, two.ids)
    assert torch.equal(Probe(demo.tokenizer).documents(300, 2, seed=1)[1].ids, two.ids)
    assert not torch.equal(probe.documents(300, 1, seed=2)[0].ids, one.ids)


def test_what_cannot_be_probed(demo: hf.Loaded) -> None:
    with pytest.raises(TextError, match="no room"):
        Probe(demo.tokenizer).document(12)
    with pytest.raises(TextError, match="tokenizer"):
        Probe(None)
    assert len(set(words_of(Letters()))) == 2500


def test_an_answer_counts_only_in_full(demo: hf.Loaded) -> None:
    """A model that knows the text is right; one that misses the last token of one answer is not."""
    document = Probe(demo.tokenizer).document(400, 0)
    certain = F.one_hot(document.ids.roll(-1, 1), 4096).float() * 40
    assert recall(lambda ids: certain, [document]).share == 1.0
    certain[0, document.answers[0][-1] - 1] = 0.0
    found = recall(lambda ids: certain, [document])
    assert (found.right, found.asked) == (len(document.answers) - 1, len(document.answers)) and found.loss > 0


def test_the_shipped_model_recalls_and_a_window_does_not(demo: hf.Loaded) -> None:
    """What the probe is for: a window that text forgives takes the answers away."""
    probe, spans = Probe(demo.tokenizer, split="final"), Spans(demo.model)
    documents = probe.documents(700, 2)
    assert recall(spans.instrumented.logits, documents).share >= 0.9
    narrow = Choice.of("sink_window", {"sink": 4, "alpha": 128, "beta": 0.0})
    spans.set({name: [narrow] * site.heads for name, site in spans.sites.items()})
    assert recall(spans.instrumented.logits, documents).share <= 0.1
    # Within the window the answers are there; beyond it they are not.
    assert longest_reach(spans.instrumented.logits, probe, (120, 700), 2) == 120
