"""People's files: each is read as what it is, or one sentence names the file and what to do."""

import gzip
import re
import time
from functools import partial
from pathlib import Path

import pytest
from datasets import Dataset

from rmt_hf.data import WORD_BYTES, tokenize, tokenize_completions, train_tokenizer
from rmt_hf.texts import read_texts


zipped = partial(gzip.compress, mtime=0)  # the same bytes in every process
ROWS = '{"text": "NA", "n": 1}\n{"text": "12 \\u00e9", "n": 2}\n'


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("A.TXT", "été\r\nb".encode(), ["été\nb"]),
        ("a.md", b"# a\n\nb", ["# a\n\nb"]),
        ("a.txt", b"\xef\xbb\xbfab", ["ab"]),
        ("a.txt", "été".encode("utf-16"), ["été"]),
        ("a.txt", "été".encode("utf-32"), ["été"]),
        ("a.txt.GZ", zipped("été".encode("utf-16")), ["été"]),
        ("a.jsonl", ROWS.encode(), ["NA", "12 é"]),
        ("a.JSONL", ROWS.encode("utf-16"), ["NA", "12 é"]),
        ("a.jsonl.gz", zipped(ROWS.encode()), ["NA", "12 é"]),
        ("a.json", b'[{"text": "a b"},\n {"text": "c"}]', ["a b", "c"]),
        ("a.csv", 'text,n\nNA,1\n"a,\nb",2\n12,3\n,4\n'.encode("utf-16"), ["NA", "a,\nb", "12"]),
        ("a.csv.gz", zipped(b"n,text\n1,nan\n"), ["nan"]),
    ],
)
def test_every_kind_of_file_is_read_as_what_it_is(name: str, content: bytes, texts: list[str], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert read_texts(tmp_path / name) == texts


def test_parquet_folders_and_other_columns(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"text": ["a b", "c"], "body": ["d e", "f"]})
    rows.to_parquet(tmp_path / "data" / "rows.parquet")
    rows.save_to_disk(tmp_path / "saved")
    (tmp_path / "data" / "README.md").write_text("A card, which is no text to learn.")
    (tmp_path / "data" / ".hidden.jsonl").write_text("{")
    (tmp_path / "rows.parquet.gz").write_bytes(zipped((tmp_path / "data" / "rows.parquet").read_bytes()))
    for source in ("data", "data/rows.parquet", "rows.parquet.gz", "saved"):
        assert read_texts(tmp_path / source) == ["a b", "c"]
        assert read_texts(str(tmp_path / source), "body") == ["d e", "f"]
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    for name in ("b.txt", "deep/a.md"):
        (tmp_path / "texts" / name).write_text(name)
    assert read_texts(tmp_path / "texts") == ["b.txt", "deep/a.md"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "été".encode("latin-1"), r"must be UTF-8.*byte 0 is 0xe9.*convert it, for example with `iconv"),
        ("a.csv", "text\nété".encode("latin-1"), r"must be UTF-8.*byte 5 is 0xe9.*convert it"),
        ("a.txt", "ab".encode("utf-16-le"), r"character U\+0000: if it is UTF-16 without a mark, convert it"),
        ("a.txt", b"x", r"two characters of text or more, got 1: nothing can be learned"),
        ("a.txt", b"", r"two characters of text or more, got 0"),
        ("a.jsonl", b"", r"two characters of text or more, got 0"),
        ("a.jsonl", b'{"text": "a b"}\n{"text": null}', r"got null in row 2: leave the row out"),
        ("a.jsonl", b'{"text": "a b"}\n{"n": 1}', r"got null in row 2"),
        ("a.json", b'{"text": 3}', r"must have a text in every row, got int in row 1"),
        ("a.jsonl", b'{"body": "a b"}', r"must have a column 'text', got \['body'\]: rename one, or name"),
        ("a.csv", b"a b c\nd", r"must have a column 'text', got \['a b c'\]"),
        ("a.jsonl", b'{"text": "a', r"cannot be read as jsonl \(JSON parse error.*: mend it, or rename it"),
        ("a.parquet", b"a b c", r"cannot be read as parquet \(.*: mend it, or rename it"),
        ("a.txt.gz", zipped(b"a b c" * 100)[:18], r"is no whole gzip file.*: compress it again"),
        ("a.txt.gz", b"a b c", r"is no whole gzip file"),
        ("a.pdf", b"a b c", r"must end in one of \.txt, .* or these and \.gz: rename or convert it"),
    ],
)
def test_every_refusal_names_the_file_and_what_to_do(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(tmp_path / name))} .*{message}"):
        read_texts(tmp_path / name)


def test_what_is_not_there_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    for name in ("typo.txt", str(tmp_path / "none"), "a/b/c"):
        with pytest.raises(FileNotFoundError, match=rf"There is no file or folder {name}\."):
            read_texts(name)
    (tmp_path / "a.pdf").write_bytes(b"a")
    with pytest.raises(ValueError, match=r"must hold files that end in one of .*got none"):
        read_texts(tmp_path)
    (tmp_path / "dataset_dict.json").write_text("{}")
    with pytest.raises(ValueError, match=r"several splits: give the folder of one"):
        read_texts(tmp_path)


def test_rows_without_a_text_are_refused_by_name() -> None:
    tokenizer = train_tokenizer(["a b"], 258)
    with pytest.raises(
        ValueError, match="The column text must hold a text in every row, got null: leave such rows out"
    ):
        tokenize(Dataset.from_dict({"text": ["a", None]}), tokenizer)
    with pytest.raises(ValueError, match="The column completion must hold a text in every row, got null"):
        tokenize_completions(Dataset.from_dict({"prompt": ["a"], "completion": [None]}), tokenizer)


def test_a_megabyte_without_a_blank_is_learned_from_in_seconds(caplog, monkeypatch) -> None:
    """Uncut, 40,000 letters take half a second, and time grows with the square: 1,000,000 take minutes."""
    import logging

    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    text, start = "acgt" * 250_000, time.perf_counter()
    tokenizer = train_tokenizer([text, text, "a b"], 300)
    assert time.perf_counter() - start < 30
    assert caplog.text.count("Words of more than 1,000 bytes are cut to train a tokenizer: acgtacgt") == 1
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids[1:]) == text
    caplog.clear()
    same = train_tokenizer(["a" * WORD_BYTES, f"{'a' * WORD_BYTES} b"], 270)
    assert not caplog.text and "aaaa" in same.get_vocab()
