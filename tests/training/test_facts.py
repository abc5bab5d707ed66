"""Documents that tell facts and ask for them: lengths, labels, what is told where; rows of several kinds."""

import re

import pytest
import torch

from rmt_hf import facts
from rmt_hf.data import IGNORED, train_tokenizer
from rmt_hf.facts import FactDocument, fact_documents, teaching_rows


PROSE = "The sea was calm. A boat lay still? Nobody spoke! The evening came and went, and so did we. " * 300


@pytest.fixture(scope="module")
def tokenizer():
    forms = [*facts.TOLD, *facts.TOLD_AGAIN, *facts.ASKED, *facts.KINDS, *facts.OWNERS, *facts.WORDS, *facts.NEWS]
    forms += [*facts.QUOTED, *(part for pair in facts.FREE for part in pair)]
    return train_tokenizer([PROSE, " ".join(forms) + "0123456789"], 400)


def answers(document: FactDocument, tokenizer) -> list[str]:
    text = tokenizer.decode([label if label != IGNORED else 0 for label in document.labels.tolist()])
    return [part.strip() for part in text.split(tokenizer.decode([0])) if part.strip()]


def test_answers_were_told_and_are_labels(tokenizer) -> None:
    made = fact_documents([PROSE], tokenizer, 6000, 3, seed=1, told_until=300)
    again = fact_documents([PROSE], tokenizer, 6000, 3, seed=1, told_until=300)
    assert all(torch.equal(*pair) for each in zip(made, again, strict=True) for pair in zip(*each, strict=True))
    assert not torch.equal(made[0].input_ids, made[1].input_ids)
    for document in made:
        assert document.input_ids.shape == document.labels.shape == (6000,)
        is_answer = document.labels != IGNORED
        assert torch.equal(document.labels[is_answer], document.input_ids[is_answer]) and is_answer[-1]
        told = tokenizer.decode(document.input_ids[: 300 + 40 * 2 * facts.NUM_FACTS])
        found = answers(document, tokenizer)
        assert len(found) == facts.NUM_FACTS and all(answer in told for answer in found)
        rest = tokenizer.decode(document.input_ids[300 + 40 * 2 * facts.NUM_FACTS : is_answer.nonzero()[0, 0] - 40])
        assert not any(owner in rest for owner in facts.OWNERS)


def test_sentences_of_their_own_are_asked_for_by_their_owner(tokenizer, monkeypatch) -> None:
    assert all("{owner}" in told and "{value}" in told and "{owner}" in asked for told, asked in facts.FREE)
    monkeypatch.setattr(facts, "FREE_SHARE", 1.0)
    monkeypatch.setattr(facts, "QUOTED_SHARE", 0.0)
    (document,) = fact_documents([PROSE], tokenizer, 6000, 1)
    parts = tokenizer.decode(document.input_ids).split("\n\n")
    patterns = [re.sub(r"\\{\w+\\}", ".+", re.escape(told)) for told, _ in facts.FREE]
    questions = [part for part in parts if part.startswith("Question: ")]
    assert len(questions) == facts.NUM_FACTS
    assert sum(any(re.search(pattern, part) for pattern in patterns) for part in parts) >= facts.NUM_FACTS


def test_a_quoted_sentence_has_a_value_and_is_asked_for_by_its_beginning(tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(facts, "QUOTED_SHARE", 1.0)
    prose = " ".join(f"Then the {letter}boat went over the wide and quiet sea to {letter}." for letter in "abcdef") * 99
    (document,) = fact_documents([prose], tokenizer, 6000, 1)
    parts = tokenizer.decode(document.input_ids).split("\n\n")
    asked, found = parts[-facts.NUM_FACTS :], answers(document, tokenizer)
    for question, answer in zip(asked, found, strict=True):
        lead = next(lead for lead in facts.QUOTED if question.startswith(lead))
        beginning = question.removeprefix(lead)
        assert beginning.startswith("Then the ") and beginning.endswith(f" {answer}") and answer not in prose
        assert any(part.startswith(beginning) for part in parts)


def test_prose_without_sentences_tells_facts_all_the_same(tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(facts, "QUOTED_SHARE", 1.0)
    (document,) = fact_documents(["sea calm boat " * 4000], tokenizer, 6000, 1)
    assert len(answers(document, tokenizer)) == facts.NUM_FACTS


@pytest.mark.parametrize("free_share", [0.0, 1.0])
def test_of_a_changed_fact_the_last_value_counts(tokenizer, monkeypatch, free_share: float) -> None:
    monkeypatch.setattr(facts, "CHANGED_SHARE", 1.0)
    monkeypatch.setattr(facts, "FREE_SHARE", free_share)
    monkeypatch.setattr(facts, "QUOTED_SHARE", 0.0)
    (document,) = fact_documents([PROSE], tokenizer, 6000, 1)
    parts = tokenizer.decode(document.input_ids).split("\n\n")
    pattern = "|".join(re.sub(r"\\{\w+\\}", ".+", re.escape(form)) for form in (*facts.TOLD_AGAIN, *facts.NEWS))
    seen = 0
    for owner in facts.OWNERS:
        told = [part for part in parts if owner in part]
        if told:
            seen += 1
            first, again, asked = told
            answer = next(found for found in answers(document, tokenizer) if asked.endswith(f" {found}"))
            assert re.search(pattern, again) and answer in again and not re.search(pattern, first)
    assert seen == facts.NUM_FACTS


def test_rows_follow_their_stages_and_every_kind_is_drawn(tokenizer) -> None:
    groups = [[PROSE], ["1 2 3 4 5 6 7 8 9 " * 2000, "too short"]]
    rows = list(teaching_rows(groups, tokenizer, [(700, 30), (900, 3)], fact_share=0.4, seed=2))
    assert [len(row["input_ids"]) for row in rows] == [len(row["labels"]) for row in rows] == [700] * 30 + [900] * 3
    asked = [any(label != IGNORED for label in row["labels"]) for row in rows]
    assert 5 < sum(asked) < 25
    plain = [tokenizer.decode(row["input_ids"]) for row, is_asked in zip(rows, asked, strict=True) if not is_asked]
    assert {"sea" in text for text in plain} == {"7 8" in text for text in plain} == {True, False}
    assert rows == list(teaching_rows(groups, tokenizer, [(700, 30), (900, 3)], fact_share=0.4, seed=2))
    assert not any(
        label != IGNORED for row in teaching_rows(groups, tokenizer, [(300, 9)], 0.0) for label in row["labels"]
    )


def test_where_a_long_fact_does_not_fit_a_shorter_one_is_told(tokenizer, monkeypatch) -> None:
    found = iter([facts._Fact(["long " * 200], "Long?", "1"), *[facts._Fact(["Short: 2."], "Short?", "2")] * 20])
    monkeypatch.setattr(facts, "QUOTED_SHARE", 0.0)
    monkeypatch.setattr(facts, "_fact", lambda *_: next(found))
    (document,) = fact_documents([PROSE], tokenizer, 200, 1)
    assert set(answers(document, tokenizer)) == {"2"}


def test_too_little_text_and_too_short_rows_are_refused(tokenizer) -> None:
    with pytest.raises(ValueError, match="texts must have at least"):
        fact_documents(["The sea."], tokenizer, 1000, 1)
    with pytest.raises(ValueError, match="length must be at least twice the"):
        fact_documents([PROSE], tokenizer, 40, 1)
    with pytest.raises(ValueError, match="Each group must have a text of 8,000 characters"):
        next(teaching_rows([[PROSE], ["short"]], tokenizer, [(1000, 1)]))
