"""Files that are whole or absent, and their hashes."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file or a folder under a temporary name, then renames it. If writing fails, the old one stays.

    Args:
        path: Target, replaced if it exists.
        write: Called with the temporary name, which has the same suffix.
    """
    temporary = path.with_name(f".unfinished-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_folder(temporary)
    try:
        write(temporary)
    except BaseException:
        remove_folder(temporary)
        temporary.unlink(missing_ok=True)
        raise
    remove_folder(path)  # a folder is not renamed over another
    temporary.replace(path)


def remove_folder(path: Path) -> None:
    """Removes a folder and its content, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)


def digest(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
