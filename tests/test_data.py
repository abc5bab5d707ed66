"""Data: every byte of a text is in its tokens, and no row crosses from one text to another."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from rmt_hf.data import END_OF_TEXT, cut_into_rows, token_byte_counts, tokenize, train_tokenizer


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
    assert documents.column_names == ["title", "input_ids"] and rows.column_names == ["input_ids"]
    expected = [
        ids[start : start + 10] for ids in documents["input_ids"] for start in range(0, len(ids) // 10 * 10, 10)
    ]
    assert rows["input_ids"][:] == expected


def test_too_small_vocabulary():
    with pytest.raises(ValueError, match="257"):
        train_tokenizer(TEXTS, 256)
