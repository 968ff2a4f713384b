"""What the base of R-Scorer is trained on."""

from __future__ import annotations

import random

import pytest
from transformers import AutoTokenizer

from srccore.embedded import pretrain_rating
from srccore.embedded.model import MODELS, RATING_TEMPLATE
from srccore.embedded.world import make_item
from srccore.method import response, sentences


@pytest.mark.parametrize("number", range(12))
def test_every_sentence_and_answer_of_both_responses_has_its_verdict_at_its_last_token(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "lvlm")
    tokenizer.chat_template = RATING_TEMPLATE
    item = make_item(0, "pretrain", number)
    gold = response.write(item.sample.rationale or "", item.sample.answer)
    wrong = response.write("The sky is 9. The sky is 9.", "nothing")
    texts = iter((gold, wrong))
    monkeypatch.setattr(pretrain_rating, "_response", lambda *_: next(texts))
    row = pretrain_rating._row(item, tokenizer, random.Random(0))
    steps = len(sentences.split(item.sample.rationale or ""))
    assert row.verdicts == [1] * (steps + 1) + [0] * 3
    ends = [tokenizer.decode(row.ids[: place + 1]) for place in row.places]
    assert all(end.endswith(".") for end in (*ends[:steps], *ends[steps + 1 : -1]))
    assert ends[steps].endswith(f"Answer: {item.sample.answer}")
    assert ends[-1].endswith("Answer: nothing")
    assert tokenizer.decode([row.rating]) == "5"


def test_a_response_misreads_anything_but_keeps_the_form() -> None:
    rng = random.Random(1)
    items = [make_item(0, "pretrain", number) for number in range(40)]
    texts = [pretrain_rating._response(item, rng) for item in items for _ in range(5)]
    assert all(response.parse(text) for text in texts)
    assert any(pretrain_rating._misseen(item, rng) != item.seen for item in items)
