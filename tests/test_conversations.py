"""Conversations: which tokens are answers, through chat templates and without, and how they become sequences."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from attnopt import conversations, text
from attnopt.conversations import Turns, as_question, packed, parsed, prompts_of
from attnopt.errors import TextError
from attnopt.hf import demo_model_path, tokenizer_of

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# As some models' templates do: an answer that is not the last one loses what it thought.
FORGETFUL = TEMPLATE.replace(
    "{{ m['content'] }}", "{{ m['content'] if loop.last or m['role'] == 'user' else m['content'][-2:] }}"
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "one and one?"},
    {"role": "assistant", "content": "two, I think"},
    {"role": "user", "content": "sure?"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "thanks"},
]


@pytest.fixture
def tokenizer() -> Any:
    made, _ = tokenizer_of(str(demo_model_path()))
    made.chat_template = TEMPLATE
    return made


def answers(turns: Turns, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(list(run)) for run, answer in turns.runs if answer]


def test_what_assistants_say_counts(tokenizer: Any) -> None:
    (turns,) = parsed(json.dumps({"messages": CHAT}), "chat", tokenizer)
    assert answers(turns, tokenizer) == ["two, I think</s>\n", "yes</s>\n"]
    # The tokens are those of the template up to the last answer; nothing is lost between prompts and answers.
    whole = tokenizer.apply_chat_template(CHAT[:5], tokenize=False)
    assert tokenizer.decode(turns.ids) == whole and sum(turns.counted) == len(turns.ids) - turns.counted.count(0.0)
    assert tokenizer.decode(turns.prompt).endswith("sure?</s>\n<assistant>")


def test_a_template_that_changes_earlier_turns_leaves_the_last_answer(tokenizer: Any) -> None:
    tokenizer.chat_template = FORGETFUL
    (turns,) = parsed(json.dumps({"messages": CHAT[:5]}), "chat", tokenizer)
    assert answers(turns, tokenizer) == ["yes</s>\n"]


def test_a_template_that_does_not_ask_as_it_answers_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE.replace("<assistant>", "<please>")
    with pytest.raises(TextError, match="Line 1 of chat: the chat template writes an answer differently"):
        parsed(json.dumps({"messages": CHAT}), "chat", tokenizer)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(TextError, match="roles must alternate"):
        parsed(json.dumps({"messages": CHAT}), "chat", tokenizer)


def test_prompt_and_answer_are_taken_as_they_are(tokenizer: Any) -> None:
    (turns,) = parsed('\n{"prompt": "1 + 1 =", "answer": " 2"}\n\n', "pairs", tokenizer)
    assert tokenizer.decode(turns.ids) == "1 + 1 = 2" and answers(turns, tokenizer) == [" 2"]


@pytest.mark.parametrize(
    "line, problem",
    [
        ("{", "is not JSON"),
        ("[1]", "not an object"),
        ('{"text": "x"}', "neither messages nor"),
        ('{"messages": [{"role": "user"}]}', "neither messages nor"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "no answer"),
        ('{"prompt": "x", "answer": ""}', "no answer"),
    ],
)
def test_a_line_that_does_not_do_is_named(line: str, problem: str, tokenizer: Any) -> None:
    good = '{"prompt": "x", "answer": "y"}'
    with pytest.raises(TextError, match=f"Line 2 of a.jsonl.*{problem}") as caught:
        parsed(f"{good}\n{line}", "a.jsonl", tokenizer)
    assert caught.value.remedy
    with pytest.raises(TextError, match="no conversation"):
        parsed("\n", "a.jsonl", tokenizer)


def test_without_a_template_messages_are_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(TextError, match="no chat template") as caught:
        parsed(json.dumps({"messages": CHAT}), "a", tokenizer)
    assert "prompt" in caught.value.remedy


def turns(prompt: int, answer: int, first: int = 0) -> Turns:
    ids = list(range(first, first + prompt + answer))
    return Turns(((tuple(ids[:prompt]), False), (tuple(ids[prompt:]), True)))


def test_conversations_are_packed_to_one_length() -> None:
    found = packed([turns(4, 2, 0), turns(3, 3, 10), turns(20, 2, 20), turns(1, 1, 50)], 10, 5)
    assert [s.ids.tolist() for s in found] == [[[0, 1, 2, 3, 4, 5, 10, 11, 12, 13]], [list(range(32, 42))]]
    assert [s.weights.tolist() for s in found if s.weights is not None] == [
        [0, 0, 0, 0, 1, 1, 0, 0, 0, 1],
        [0, 0, 0, 0, 0, 0, 0, 0, 1, 1],
    ]
    assert len(packed([turns(4, 6)] * 9, 10, 3)) == 3
    # Its answer is cut off: nothing would count.
    with pytest.raises(TextError, match="make no sequence of 10 with an answer"):
        packed([turns(1, 1), turns(30, 20)][:1] * 2, 10, 1)


def test_prompts_end_where_an_answer_begins() -> None:
    short, long = turns(4, 2, 0), turns(20, 2, 20)
    assert prompts_of([short, long, long], 8, 1)[0].tolist() == [list(range(32, 40))]
    assert prompts_of([short, turns(4, 2, 10)], 8, 3)[0].tolist() == [[2, 3, 4, 5, 10, 11, 12, 13]]
    with pytest.raises(TextError, match="no prompt of 30"):
        prompts_of([short], 30, 1)


def test_a_text_becomes_a_question_within_its_length(tokenizer: Any) -> None:
    piece = tokenizer.encode("import os\nimport sys\n" * 20)
    ids = as_question(piece, 40, tokenizer)
    said = tokenizer.decode(ids[0].tolist())
    assert 30 <= ids.shape[1] <= 40 and said.startswith("<user>import os") and said.endswith("</s>\n<assistant>")
    with pytest.raises(TextError, match="template alone"):
        as_question(piece, 5, tokenizer)
    tokenizer.chat_template = None
    assert torch.equal(as_question(piece, 40, tokenizer), torch.tensor([piece[:40]]))


def test_the_three_splits_share_no_conversation(tmp_path: Any, tokenizer: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"{n} ", "answer": "x"}) for n in range(8)))
    seen = [text.Sources([str(path)], tokenizer, which).turns for which in text.PARTS]
    assert [len(part) for part in seen] == [4, 2, 2]
    assert [t for part in seen for t in part] == conversations.parsed(path.read_text(), "a", tokenizer)
    said = text.stream([str(path)], tokenizer, "verify")
    assert tokenizer.decode(said.tolist()) == "4 x5 x", "to verify on, everything that is said"
    path.write_text(json.dumps({"prompt": "0", "answer": "x"}))
    with pytest.raises(TextError, match="leave none for the calibrate split"):
        text.Sources([str(path)], tokenizer, "calibrate")
