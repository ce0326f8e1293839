"""The model that ships: it loads, knows Python, recalls over a long stretch of code, and its card says how well."""

from __future__ import annotations

import itertools
import random
import re
from typing import Any

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

import torch
import torch.nn.functional as F

from attnopt.corpus import bind_line, binding, library_texts, query_line, single_token_words
from attnopt.hf import Loaded, demo_model_path, load

FOLDER = demo_model_path()
DISTANCE = 1500


@pytest.fixture(scope="module")
def demo() -> Loaded:
    return load("demo", torch.bfloat16)


def encode(demo: Loaded, text: str) -> list[int]:
    return demo.tokenizer.encode(text, add_special_tokens=False)


def held_out(demo: Loaded, tokens: int) -> list[int]:
    ids: list[int] = []
    for text in library_texts("final"):
        if len(ids) >= tokens:
            break
        ids += [demo.tokenizer.bos_token_id, *encode(demo, text)]
    return ids[:tokens]


@torch.no_grad()
def logits_of(demo: Loaded, ids: list[int]) -> torch.Tensor:
    return demo.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


def test_the_architecture_that_everything_else_counts_on(demo: Loaded) -> None:
    config: Any = demo.model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (6, 8, 4)
    assert (config.head_dim, config.vocab_size, config.max_position_embeddings) == (32, 4096, 8192)
    assert len(demo.tokenizer) == config.vocab_size


def test_the_tokenizer_gives_text_back(demo: Loaded) -> None:
    text = "def häuser(x_1):\n    return {x_1: 'a\\n', 12: None}  # …\n"
    assert demo.tokenizer.decode(encode(demo, text)) == text


def test_it_knows_held_out_code(demo: Loaded) -> None:
    ids = held_out(demo, 2049)
    loss = F.cross_entropy(logits_of(demo, ids[:-1]), torch.tensor(ids[1:])).item()
    # Chance is log(4096) = 8.3 nats. Which file comes first depends on the build of Python: 2.3 to 2.7 were seen.
    assert loss < 3.2


def recall_document(demo: Loaded, queries: int, known: bool) -> tuple[list[int], list[list[int]]]:
    """Bindings, DISTANCE tokens of held-out code, and a query of each; the bound values are others unless `known`."""
    rng = random.Random(3)
    words = single_token_words(demo.tokenizer)
    bound = [binding(rng, words) for _ in range(queries)]
    other = [value if known else binding(rng, words)[1] for _, value in bound]
    ids = [demo.tokenizer.bos_token_id]
    for (name, _), value in zip(bound, other, strict=True):
        ids += encode(demo, bind_line(name, value))
    ids += [*held_out(demo, 6000)[-DISTANCE:], *encode(demo, "\n")]
    answers = []
    for name, value in bound:
        question, answer = (encode(demo, part) for part in query_line(name, value))
        answers.append(list(range(len(ids) + len(question), len(ids) + len(question) + len(answer))))
        ids += question + answer
    return ids, answers


@pytest.mark.parametrize("known", [True, False])
def test_it_recalls_names_bound_far_above_and_only_those(demo: Loaded, known: bool) -> None:
    ids, answers = recall_document(demo, 12, known)
    guesses = logits_of(demo, ids).argmax(-1).tolist()
    right = [all(guesses[p - 1] == ids[p] for p in positions) for positions in answers]
    assert sum(right) >= 0.8 * len(right) if known else not any(right)


def test_the_folder_is_small() -> None:
    sizes = {p.name: p.stat().st_size for p in FOLDER.rglob("*") if p.is_file()}
    assert sum(sizes.values()) <= 20 * 2**20
    assert sum(size for name, size in sizes.items() if name.endswith(".png")) < 400_000


def test_the_card_says_what_was_measured() -> None:
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for wanted in ("PSF License", "split", "bits per byte", "15.8 million tokens", "Use and limits"):
        assert wanted in " ".join(card.split())
    measured = {int(c): float(b) for c, b in re.findall(r"^\| (2048|8192) \| (\d\.\d{3}) \|", card, re.MULTILINE)}
    assert set(measured) == {2048, 8192} and all(0 < bits <= 1.6 for bits in measured.values())
    recalled = re.findall(r"^\| (\d+) \| (\d+\.\d)% \((\d+) of (\d+)\)", card, re.MULTILINE)
    assert [int(row[0]) for row in recalled] == [256, 512, 1024, 2048, 4096, 7500]
    assert all(int(asked) >= 60 for *_, asked in recalled)
    for distance, percent, *_ in recalled:
        # An aim that is missed is said to be missed.
        if int(distance) >= 2000 and float(percent) < 95:
            assert re.search(rf"missed at .*{distance} \({percent}%\)", card)
    for picture in itertools.chain(re.findall(r"\]\((\w+\.png)\)", card), ("loss.png", "heads.png", "recall.png")):
        assert (FOLDER / picture).exists() and f"({picture})" in card
