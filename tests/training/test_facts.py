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
    forms = [*facts.TOLD, *facts.TOLD_AGAIN, *facts.ASKED, *facts.KINDS, *facts.OWNERS, *facts.WORDS]
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
        assert not any(kind in rest for kind in facts.KINDS)


def test_of_a_changed_fact_the_last_value_counts(tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(facts, "CHANGED_SHARE", 1.0)
    (document,) = fact_documents([PROSE], tokenizer, 6000, 1)
    parts = tokenizer.decode(document.input_ids).split("\n\n")
    pattern = "|".join(re.sub(r"\\{\w+\\}", ".+", re.escape(form)) for form in facts.TOLD_AGAIN)
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


def test_too_little_text_and_too_short_rows_are_refused(tokenizer) -> None:
    with pytest.raises(ValueError, match="texts must have at least"):
        fact_documents(["The sea."], tokenizer, 1000, 1)
    with pytest.raises(ValueError, match="length must be at least twice the"):
        fact_documents([PROSE], tokenizer, 40, 1)
    with pytest.raises(ValueError, match="Each group must have a text of 8,000 characters"):
        next(teaching_rows([[PROSE], ["short"]], tokenizer, [(1000, 1)]))
