"""Data: every byte of a text is in its tokens, and no row crosses from one text to another."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from helpers import tiny_ids, tiny_model
from rmt_hf.data import (
    END_OF_TEXT,
    cut_into_rows,
    pack,
    token_byte_counts,
    tokenize,
    tokenize_chats,
    tokenize_completions,
    train_tokenizer,
)


TEXTS = ["To be, or not to be: that is the question. ¿Qué? 東京 " * 3, "Whether 'tis nobler in the mind to suffer " * 4]


def test_tokenizer_counts_every_byte(tmp_path):
    train_tokenizer(TEXTS, 300).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.is_fast and len(tokenizer) == 300
    counts = token_byte_counts(tokenizer)
    for text in [*TEXTS, "Unseen: ☃ \n\n\t bytes"]:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.convert_tokens_to_ids(END_OF_TEXT) and counts[ids[0]] == 0
        assert tokenizer.decode(ids[1:]) == text
        assert counts[torch.tensor(ids)].sum() == len(text.encode("utf-8"))


def test_rows_stay_within_their_text():
    tokenizer = train_tokenizer(TEXTS, 300)
    documents = tokenize(Dataset.from_dict({"title": ["a", "b"], "text": TEXTS}), tokenizer)
    rows = cut_into_rows(documents, 10)
    assert documents.column_names == ["title", "input_ids"]
    expected = [ids[start : start + 10] for ids in documents["input_ids"] for start in range(0, len(ids), 10)]
    missing = [10 - len(ids) for ids in expected]
    assert sum(missing) > 0
    wanted = {
        "input_ids": [[*ids, *[0] * number] for ids, number in zip(expected, missing, strict=True)],
        "attention_mask": [[1] * (10 - number) + [0] * number for number in missing],
        "labels": [[-100, *ids[1:], *[-100] * number] for ids, number in zip(expected, missing, strict=True)],
    }
    assert rows.to_dict() == wanted
    streamed = list(cut_into_rows(documents.to_iterable_dataset(), 10))
    assert streamed == list(rows)


def test_too_small_vocabulary():
    with pytest.raises(ValueError, match="258"):
        train_tokenizer(TEXTS, 257)


# Pairs, chats and packing


def as_stream(data: Dataset, streaming: bool):
    return data.to_iterable_dataset() if streaming else data


@pytest.mark.parametrize("streaming", [False, True])
def test_prompts_are_not_learned(streaming: bool):
    tokenizer = train_tokenizer(TEXTS, 300)
    pairs = Dataset.from_dict({"prompt": ["To be or", "Qué?"], "completion": [" not to be", " 東京"]})
    rows = list(tokenize_completions(as_stream(pairs, streaming), tokenizer))
    for row, pair in zip(rows, pairs, strict=True):
        assert row["input_ids"] == [*tokenizer(pair["prompt"] + pair["completion"])["input_ids"], 0]
        learned = [label for label in row["labels"] if label != -100]
        assert (
            tokenizer.decode(learned) == pair["completion"] + END_OF_TEXT and row["labels"][-len(learned) :] == learned
        )
    with pytest.raises(ValueError, match=r"must have the columns \['prompt', 'completion'\], got \['text'\]"):
        tokenize_completions(as_stream(Dataset.from_dict({"text": ["a"]}), streaming), tokenizer)


MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}!{% endgeneration %}"
    "{% else %}<{{ m['content'] }}>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("streaming", [False, True])
def test_only_the_assistant_is_learned(streaming: bool):
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.chat_template = MARKED
    said = [["be or not", "that is it", "why", "to suffer"], ["question", "nobler"]]
    chats = [
        [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(chat)] for chat in said
    ]
    data = as_stream(Dataset.from_dict({"messages": chats}), streaming)
    for row, chat in zip(tokenize_chats(data, tokenizer), said, strict=True):
        assert (
            tokenizer.decode([label for label in row["labels"] if label != -100])
            == "".join(f"{text}!" for text in chat[1::2]) + END_OF_TEXT
        )  # the template has no end of its own
        assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))
        assert all(f"<{text}>" in tokenizer.decode(row["input_ids"]) for text in chat[::2])
    assert all(row["labels"] == row["input_ids"] for row in tokenize_chats(data, tokenizer, all_turns=True))
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(
        ValueError, match=r"must mark the turns of the assistant with \{% generation %\}.*all_turns=True"
    ):
        tokenize_chats(data, tokenizer)
    assert next(iter(tokenize_chats(data, tokenizer, all_turns=True)))["labels"]


@pytest.mark.parametrize("streaming", [False, True])
def test_packed_rows_hold_every_document_at_segment_starts(streaming: bool):
    lengths = [5, 60, 1, 24, 7, 33, 8, 16, 0, 100, 3, 48, 9]
    ids = [[1000 * number + position for position in range(n)] for number, n in enumerate(lengths)]
    labels = [[-100 if position % 3 == 1 else token for position, token in enumerate(document)] for document in ids]
    rows = list(pack(as_stream(Dataset.from_dict({"input_ids": ids, "labels": labels}), streaming), 48, 8))
    assert all(len(column) == 48 for row in rows for column in row.values())
    wanted = [
        (own[start : start + 48], [-100, *their[start + 1 : start + 48]])
        for own, their in zip(ids, labels, strict=True)
        for start in range(0, len(own), 48)
    ]
    found = []
    for row in rows:
        real = [column for column in range(48) if row["attention_mask"][column]]
        starts = [column for column in real if row["position_ids"][column] == 0]
        for start, stop in zip(starts, [*starts[1:], 48], strict=True):
            columns = [column for column in real if start <= column < stop]
            assert start % 8 == 0 and [row["position_ids"][column] for column in columns] == list(range(len(columns)))
            found.append(tuple([row[name][column] for column in columns] for name in ("input_ids", "labels")))
        assert all(row["labels"][column] == -100 for column in range(48) if column not in real)
    assert sorted(found) == sorted(wanted)
    assert len(rows) == 8  # 45 segments of 8 columns; six to a row


def test_packed_rows_train_as_documents_alone():
    model, lengths = tiny_model(), [5, 17, 24, 31, 8]
    ids = [tiny_ids(1, n, seed=n)[0] for n in lengths]
    rows = pack(Dataset.from_dict({"input_ids": [document.tolist() for document in ids]}), 48, 8).with_format("torch")
    loss = model(**rows[:]).loss
    alone = sum(model(document[None], labels=document[None], num_items_in_batch=1).loss for document in ids)
    torch.testing.assert_close(loss, alone / sum(n - 1 for n in lengths))


def test_rows_that_are_no_whole_segments_are_refused():
    with pytest.raises(ValueError, match=r"row_length must be a multiple of segment_length \(8\).*got 20"):
        pack(Dataset.from_dict({"input_ids": [[1]]}), 20, 8)
