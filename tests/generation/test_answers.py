"""The text of an answer while it is generated: as the whole is decoded, and never a character of a stop string."""

import pytest
import torch

from rmt_hf.answers import Answer
from rmt_hf.data import train_tokenizer


TEXT = "Größe: 12 €, naïve 😀 text.\nUser: and then more, naïve text"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT.replace("😀", "") * 9], 270)  # bytes: some characters are several tokens


def follow(tokenizer, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[Answer, list[str]]:
    words: list[str] = []
    answer = Answer(tokenizer, 2, words.append, stop)
    for end in range(1, len(ids) + 1):
        if answer(torch.tensor([[0, 0, *ids[:end]]]), None).item():
            break
    answer.finish()
    return answer, words


def test_the_words_are_the_text_as_it_is_decoded(tokenizer) -> None:
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    for end in range(1, len(ids) + 1):
        answer, words = follow(tokenizer, ids[:end])
        assert "".join(words) == answer.text == tokenizer.decode(ids[:end])
        assert all("\ufffd" not in word for word in words[:-1])
    assert len(ids) > len(words) > 20 and answer.forget_stop() == 0


@pytest.mark.parametrize("stop", ["\nUser:", "😀", "€", "n", ":", "text.\nUser: and then"])
def test_nothing_of_a_stop_string_is_said(tokenizer, stop: str) -> None:
    ids, expected = tokenizer.encode(TEXT, add_special_tokens=False), TEXT[: TEXT.index(stop)]
    answer, words = follow(tokenizer, ids, (stop, "not there", stop + "."))
    assert answer.is_stopped and "".join(words) == answer.text == expected
    number = len(answer.ids)
    gone = answer.forget_stop()
    assert gone > 0 and len(answer.ids) == number - gone and ids[: len(answer.ids)] == answer.ids
    assert expected.startswith(tokenizer.decode(answer.ids))
    assert not expected.startswith(tokenizer.decode(ids[: len(answer.ids) + 1])) or "\ufffd" in expected


def test_what_might_begin_a_stop_string_is_held_back_until_it_does_not(tokenizer) -> None:
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    answer, words = follow(tokenizer, ids, ("\nUser: and nobody",))
    assert not answer.is_stopped and "".join(words) == TEXT
    assert not any(word.endswith(("\n", "\nUser", "\nUser:")) for word in words)


def test_an_answer_ends_when_it_is_cancelled(tokenizer) -> None:
    answer = Answer(tokenizer, 0, is_cancelled=lambda: len(answer.ids) >= 2)
    assert [answer(torch.tensor([[5] * number]), None).item() for number in (1, 2)] == [False, True]
