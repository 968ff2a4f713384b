"""Texts from elsewhere in messages: nothing that a terminal obeys, and no password."""

from __future__ import annotations

import pytest

from srccore.config import load_config
from srccore.errors import UserError
from srccore.shown import has_credentials, visible, without_credentials


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("\x1b[2J\x1b[31mred", "⟨U+001B⟩[2J⟨U+001B⟩[31mred"),
        ("\x9b31m", "⟨U+009B⟩31m"),
        ("done\rfake", "done⟨U+000D⟩fake"),
        ("a\u202eb", "a⟨U+202E⟩b"),
        ("a\udc80", "a⟨U+DC80⟩"),
        ("two\r\nlines\tand ümläuts 👩\u200d🔬", "two\r\nlines\tand ümläuts 👩\u200d🔬"),
    ],
)
def test_what_a_terminal_would_obey_is_made_visible(text: str, seen: str) -> None:
    assert visible(text) == seen


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("https://ann:s3cret@host/v1", "https://host/v1"),
        (
            "at https://token@host:8000 and s3://key:secret@bucket/a@b",
            "at https://host:8000 and s3://bucket/a@b",
        ),
        ("http://:p@h", "http://h"),
    ],
)
def test_user_and_password_are_taken_out_of_urls(text: str, rest: str) -> None:
    assert has_credentials(text)
    assert without_credentials(text) == rest


@pytest.mark.parametrize(
    "text",
    ["s3://bucket/a@b", "https://host/?mail=ann@x.org", "ann@x.org", "see https://a and b@c"],
)
def test_other_texts_with_an_at_sign_have_none(text: str) -> None:
    assert not has_credentials(text)
    assert without_credentials(text) == text


def test_an_error_quotes_texts_from_elsewhere_without_both() -> None:
    error = UserError("https://a:b@host said \x1b[2J.", "Fix \x07 it.")
    assert str(error) == "https://host said ⟨U+001B⟩[2J. Fix ⟨U+0007⟩ it."
    assert f"{error.what} {error.fix}" == str(error)


@pytest.mark.parametrize(
    "name",
    [
        "augmentation.endpoint.url",
        "annotation.endpoint.url",
        "evaluation.endpoint.url",
        "data.source",
        "model.path",
        "rating_model.path",
    ],
)
def test_a_configuration_with_a_password_in_a_url_is_refused_without_quoting_it(name: str) -> None:
    with pytest.raises(UserError, match=rf"{name}: a URL must not have a user name") as caught:
        load_config("tiny", [f"{name}=https://ann:s3cret@host/v1"])
    assert "s3cret" not in str(caught.value)


def test_a_key_instead_of_the_name_of_its_variable_is_refused_without_quoting_it() -> None:
    with pytest.raises(UserError, match="must be the name of an environment variable") as caught:
        load_config("tiny", ["annotation.endpoint.api_key_env=sk-4711"])
    assert "4711" not in str(caught.value)


def test_a_password_in_a_value_that_is_wrong_anyway_is_not_quoted() -> None:
    long = "x" * 80
    with pytest.raises(UserError, match="must be an integer") as caught:
        load_config("tiny", [f"seed=https://ann:s3cret{long}@host/v1"])
    assert "s3cret" not in str(caught.value)
