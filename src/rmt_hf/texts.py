"""Reads people's text files: plain text, JSON lines, CSV and Parquet, compressed or not."""

import codecs
import gzip
import io
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from transformers.utils import logging


logger = logging.get_logger(__name__)

TEXT_ENDINGS = (".txt", ".text", ".md")
# The reader of `datasets` for each ending. In a CSV file a text may be NA, or a number, and is still a text.
READERS: dict[str, Callable[..., Dataset]] = {
    ".jsonl": Dataset.from_json,
    ".json": Dataset.from_json,
    ".csv": Dataset.from_csv,
    ".parquet": Dataset.from_parquet,
}
ENDINGS = (*TEXT_ENDINGS, *READERS)
# UTF-32 first: its mark begins with that of UTF-16.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_texts(source: str | Path, column: str = "text") -> list[str]:
    """The texts of a file, of a folder with all that is below it, or of a data set, each of them one document.

    The ending says what a file is: .txt, .text and .md hold one text; .jsonl, .json, .csv and .parquet hold one in each
    row. All may be compressed (.gz), and upper case is the same. Text is UTF-8, or has a byte order mark. In a folder
    that holds files with rows, text files beside them are left out, such as README.md. Blank texts are left out.

    Args:
        source: File, folder, folder of `Dataset.save_to_disk`, or name of a data set on the Hub (split "train").
        column: Of the texts, where there are rows.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the source holds no text, or a file cannot be read: with its name, and what to do.
    """
    path = Path(source)
    if path.is_file():
        texts = _texts_of_file(path, column)
    elif path.is_dir():
        texts = _texts_of_folder(path, column)
    elif _ending(path) in ENDINGS or path.is_absolute() or len(path.parts) > 2:
        raise FileNotFoundError(f"There is no file or folder {source}.")
    else:
        texts = _column(load_dataset(str(source), split="train"), column, source)
    texts = [text for text in texts if text.strip()]
    if (number := sum(map(len, texts))) < 2:
        raise ValueError(f"{source} must hold two characters of text or more, got {number}: nothing can be learned.")
    return texts


def _ending(path: Path) -> str:
    """The last ending in lower case, below that of compression."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def _texts_of_folder(folder: Path, column: str) -> list[str]:
    if (folder / "dataset_dict.json").is_file():
        raise ValueError(f"{folder} holds several splits: give the folder of one of them.")
    if (folder / "state.json").is_file():
        return _column(Dataset.load_from_disk(str(folder)), column, folder)
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    files = sorted(folder / name for name in names if not any(part.startswith(".") for part in name.parts))
    found = [file for file in files if _ending(file) in READERS]
    found = found or [file for file in files if _ending(file) in TEXT_ENDINGS]
    if not found:
        raise ValueError(f"{folder} must hold files that end in one of {', '.join(ENDINGS)}, got none: rename them.")
    if left_out := [file.name for file in files if file not in found]:
        logger.warning(f"{len(left_out)} files of {folder} are not read: {', '.join(left_out[:5])}.")
    return [text for file in found for text in _texts_of_file(file, column)]


def _texts_of_file(file: Path, column: str) -> list[str]:
    ending, content = _ending(file), file.read_bytes()
    if ending not in ENDINGS:
        raise ValueError(f"{file} must end in one of {', '.join(ENDINGS)}, or these and .gz: rename or convert it.")
    if file.name.lower().endswith(".gz"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{file} is no whole gzip file ({error}): compress it again.") from error
    if ending == ".parquet":
        return _rows(content, file, column)
    text = _decoded(content, file)
    if ending in TEXT_ENDINGS:
        return [io.StringIO(text, newline=None).read()]  # every line ends with one character
    return _rows(text.encode(), file, column) if text.strip() else []


def _decoded(content: bytes, file: Path) -> str:
    encoding = next((name for mark, name in MARKS.items() if content.startswith(mark)), "utf-8-sig")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        what, remedy = f"byte {error.start:,} is {content[error.start]:#04x}", "iconv -f LATIN1 -t UTF-8"
        raise ValueError(
            f"{file} must be UTF-8, or begin with the byte order mark of its encoding, got one in which {what}, "
            f"which is not {encoding.removesuffix('-sig')}: convert it, for example with `{remedy}`."
        ) from error
    if "\0" in text:
        raise ValueError(
            f"{file} must be UTF-8, or begin with the byte order mark of its encoding, got the character U+0000: if it "
            "is UTF-16 without a mark, convert it with `iconv -f UTF-16LE -t UTF-8`; otherwise it is no text."
        )
    return text


def _rows(content: bytes, file: Path, column: str) -> list[str]:
    """The texts of a file with rows, whose content is uncompressed, and UTF-8 where it is text."""
    ending, options = _ending(file), dict[str, Any]()
    if ending == ".csv":
        options = {"converters": {column: str}, "na_filter": False}
    with tempfile.TemporaryDirectory() as folder:  # nothing of it stays in the cache of `datasets`
        copy = Path(folder) / f"rows{ending}"
        copy.write_bytes(content)
        try:
            rows = READERS[ending](str(copy), cache_dir=f"{folder}/cache", keep_in_memory=True, **options)
        except Exception as error:  # of datasets, pyarrow or pandas
            reason = " ".join(str(error.__cause__ or error).split())
            raise ValueError(f"{file} cannot be read as {ending[1:]} ({reason}): mend it, or rename it.") from error
        return _column(rows, column, file)


def _column(rows: Dataset, column: str, source: str | Path) -> list[str]:
    if column not in rows.column_names:
        raise ValueError(
            f"{source} must have a column {column!r}, got {rows.column_names}: rename one, or name that of the texts."
        )
    texts: list[Any] = rows[column][:]
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            got = "null" if text is None else type(text).__name__
            raise ValueError(f"{source} must have a text in every row, got {got} in row {number}: leave the row out.")
    return texts
