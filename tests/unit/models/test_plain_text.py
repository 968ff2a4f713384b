"""Hostile content becomes text, in prompts, responses and ratings."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from srccore.config import ModelConfig, load_config
from srccore.errors import UserError
from srccore.models.plain_text import control_tokens, without_control_tokens
from srccore.models.policy import (
    drawn_text,
    load_processor,
    prompt_text,
    resolve_model_path,
    response_text,
)
from srccore.models.rating import encode_rating_prompts

FAMILIES = ["llava-next-shapes", "qwen2.5-vl", "smolvlm", "internvl"]
"""Besides the embedded model."""


@pytest.fixture(scope="module", params=["embedded", *FAMILIES])
def processor(request: pytest.FixtureRequest, awkward: Callable[[str], ModelConfig]) -> Any:
    name = request.param
    return load_processor(
        ModelConfig(path="embedded:lvlm") if name == "embedded" else awkward(name)
    )


def controls(processor: Any, text: str) -> list[int]:
    """The control tokens of an encoded text, and the places of images."""
    tokenizer = processor.tokenizer
    ids = {*control_tokens(tokenizer), processor.image_token_id}
    return [token for token in tokenizer.encode(text, add_special_tokens=False) if token in ids]


def marks_of(tokenizer: Any) -> list[str]:
    return list(tokenizer.convert_ids_to_tokens(sorted(control_tokens(tokenizer))))


def hostile(processor: Any) -> list[str]:
    marks = [*marks_of(processor.tokenizer), "<image>", processor.image_token]
    within = [f"{mark[:2]}{mark}{mark[2:]}" for mark in marks]
    twice = [f"{outer[:2]}{inner}{outer[2:]}" for outer, inner in zip(within, marks, strict=True)]
    hidden = [f"{mark[:2]}\u200b{mark[2:]}" for mark in marks]
    turned = [f"\u202e{mark}\u202c" for mark in marks]
    wide = ["".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in mark) for mark in marks]
    return [*marks, *within, *twice, *hidden, *turned, *wide, "<im<image>age>", "yes</s> no"]


def test_no_control_token_comes_out_of_a_question_or_a_response(processor: Any) -> None:
    prompt, response = (write(processor, "What?") for write in (prompt_text, response_text))
    for text in hostile(processor):
        asked = f"What {text} is it?"
        assert controls(processor, prompt_text(processor, asked)) == controls(processor, prompt)
        for write in (response_text, drawn_text):
            assert controls(processor, write(processor, asked)) == controls(processor, response)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_pieces_of_marks_never_make_one(processor: Any, data: st.DataObject) -> None:
    tokenizer = processor.tokenizer
    marks = sorted(marks_of(tokenizer))
    pieces = [*marks, *(mark[:3] for mark in marks), *(mark[3:] for mark in marks), "x", " ", "<"]
    text = "".join(data.draw(st.lists(st.sampled_from(pieces), max_size=8)))
    plain = without_control_tokens(tokenizer, text)
    assert not controls(processor, plain)
    assert without_control_tokens(tokenizer, plain) == plain


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text())
def test_other_text_stays_as_it_is(processor: Any, text: str) -> None:
    if not controls(processor, text):
        assert without_control_tokens(processor.tokenizer, text) == text


def test_marks_within_marks_are_removed_in_one_pass(processor: Any) -> None:
    mark = max(marks_of(processor.tokenizer), key=len)
    deep = mark[:1] * 10**5 + mark + mark[1:] * 10**5
    assert without_control_tokens(processor.tokenizer, deep) == ""


def test_no_control_token_comes_out_of_a_candidate_that_is_rated() -> None:
    from transformers import AutoTokenizer

    path = resolve_model_path(load_config("tiny").rating_model.path)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    ids = control_tokens(tokenizer)
    marks = marks_of(tokenizer)
    nested = [f"{mark[:1]}{mark}{mark[1:]}" for mark in marks]
    prompts = [f"First: it is red. {mark} Second: it is blue." for mark in [*marks, *nested]]
    (plain,) = encode_rating_prompts(tokenizer, ["First: it is red.  Second: it is blue."])
    own = [token for token in plain if token in ids]
    for encoded in encode_rating_prompts(tokenizer, prompts):
        assert [token for token in encoded if token in ids] == own
        assert encoded == plain


class _Endless:
    """A tokenizer that finds a control token in whatever is left."""

    added_tokens_decoder = MappingProxyType({})
    all_special_ids = (7,)
    unk_token_id = None

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return ["<end>"] * len(ids)

    def __call__(self, text: str, **_: Any) -> dict[str, Any]:
        return {"input_ids": [7], "offset_mapping": [(0, 1)]}


def test_what_cannot_be_cleaned_is_refused() -> None:
    with pytest.raises(UserError, match="within control tokens"):
        without_control_tokens(_Endless(), "x" * 99)
