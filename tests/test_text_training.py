"""From texts to a trainer: where texts come from, what is held out, and bits per byte that can be counted by hand."""

import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from rmt_hf import RMTTrainingArguments
from rmt_hf.data import token_byte_counts, train_tokenizer
from rmt_hf.evaluation import token_bits
from rmt_hf.text_training import hold_out, plain_rows, read_texts, text_trainer, tokenize_texts
from tiny import tiny_model


S = 8  # segment_length of the tiny configuration
TEXTS = ["Zwölf Boxkämpfer jagen Viktor. " * 9, "What's in a name? " * 5, "one", "two words"]


def tokenized(texts: list[str], vocab_size: int = 300) -> tuple[Dataset, torch.Tensor]:
    """Documents, and the bytes of each token id."""
    tokenizer = train_tokenizer(TEXTS, vocab_size)
    return tokenize_texts(Dataset.from_dict({"text": texts}), tokenizer), token_byte_counts(tokenizer)


def trainer(documents, tmp_path, held_out=None, model=None, row_length=None, **arguments):
    defaults = {"use_cpu": True, "disable_tqdm": True, "stream_length": None if row_length else 2 * S, "max_steps": 2}
    args = RMTTrainingArguments(str(tmp_path), **(defaults | {"save_strategy": "no"} | arguments))
    model = tiny_model(vocab_size=300, dtype=torch.float32) if model is None else model
    return text_trainer(model, documents, args, held_out, row_length)


def test_texts_are_found_in_files_folders_and_data_sets(tmp_path: Path) -> None:
    files = {"b.txt": "second", "a.txt": "first", "c/d.txt": "third", "c/empty.txt": " \n", "notes.md": "no"}
    (tmp_path / "texts" / "c").mkdir(parents=True)
    for name, text in files.items():
        (tmp_path / "texts" / name).write_text(text, "utf-8")
    assert read_texts(str(tmp_path / "texts" / "notes.md"))["text"][:] == ["no"]
    assert read_texts(str(tmp_path / "texts"))["text"][:] == ["first", "second", "third"]
    (tmp_path / "data").mkdir()
    Dataset.from_dict({"body": TEXTS, "n": [1, 2, 3, 4]}).to_json(tmp_path / "data" / "train.jsonl")
    found = read_texts(str(tmp_path / "data"), column="body")
    assert found.column_names == ["text"] and found["text"][:] == TEXTS
    with pytest.raises(ValueError, match=r"must have the column 'text', got \['body', 'n'\]"):
        read_texts(str(tmp_path / "data"))
    with pytest.raises(ValueError, match=r"must have the split 'test', got \['train'\]"):
        read_texts(str(tmp_path / "data"), split="test", column="body")
    with pytest.raises(ValueError, match="must hold text, got none"):
        read_texts(str(tmp_path / "texts" / "c" / "empty.txt"))


def test_what_is_held_out_is_not_trained_on() -> None:
    def split(texts: list[str], share: float) -> list[list[str]]:
        return [part["text"][:] for part in hold_out(Dataset.from_dict({"text": texts}), share)]

    assert split(["a", "b", "c", "d"], 0.5) == [["a", "b"], ["c", "d"]]
    assert split(["a", "b"], 0.01) == [["a"], ["b"]]
    assert split(["0123456789"], 0.2) == [["01234567"], ["89"]]
    for share in (0, 1):
        with pytest.raises(ValueError, match="share that is held out must be between 0 and 1"):
            split(["a"], share)


def test_bits_per_byte_are_those_of_all_bytes(tmp_path: Path) -> None:
    documents, token_bytes = tokenized(TEXTS)
    model = tiny_model(vocab_size=300, dtype=torch.float32)
    bits = count = 0
    for ids in documents["input_ids"]:
        ids = torch.tensor([ids])
        bits += token_bits(model, ids).sum().item()
        count += token_bytes[ids[0, 1:]].sum().item()
    assert count == sum(len(text.encode()) for text in TEXTS) > sum(map(len, TEXTS))
    run = trainer(documents, tmp_path, documents, model, per_device_eval_batch_size=3)
    assert run.evaluate()["eval_bits_per_byte"] == pytest.approx(bits / count, rel=1e-5)
    assert run.predict(documents).metrics["test_bits_per_byte"] == pytest.approx(bits / count, rel=1e-5)
    assert run.state.log_history[0]["eval_bits_per_byte"] == pytest.approx(bits / count, rel=1e-5)

    model.lm_head.weight.data.zero_()
    num_predicted = sum(len(ids) - 1 for ids in documents["input_ids"])
    assert run.evaluate()["eval_bits_per_byte"] == pytest.approx(math.log2(300) * num_predicted / count, rel=1e-5)


def test_plain_rows_have_no_bits_per_byte_of_whole_documents(tmp_path: Path) -> None:
    documents, _ = tokenized(TEXTS)
    rows = plain_rows(documents, 3 * S)
    assert {len(ids) for ids in rows["input_ids"]} == {3 * S} and rows["labels"][:] == rows["input_ids"][:]
    run = trainer(documents, tmp_path, documents, row_length=3 * S)
    run.train()
    assert "eval_bits_per_byte" not in run.evaluate()


def test_rows_or_lanes(tmp_path: Path) -> None:
    documents, _ = tokenized(TEXTS)
    for lengths in ({"stream_length": None}, {"row_length": S, "stream_length": S}):
        with pytest.raises(ValueError, match="Exactly one of stream_length and row_length is wanted"):
            trainer(documents, tmp_path, **lengths)
    with pytest.raises(ValueError, match=r"row_length must be at most .* got 100000"):
        trainer(documents, tmp_path, row_length=100_000)
