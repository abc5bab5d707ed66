"""Training checkpoints that are whole or absent: written aside, renamed into place, checked before use.

A whole checkpoint holds a record of the hashes of its files, which is written last.
"""

import json
import shutil
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints
from transformers.utils import logging

from ..files import digest, write_whole


RECORD_NAME = "rmt_checkpoint.json"
UNFINISHED = ".unfinished"  # folder for checkpoints that are being written; Trainer does not take it for one

logger = logging.get_logger(__name__)


def seal_checkpoint(folder: Path) -> None:
    """Writes the record that makes a checkpoint whole."""
    files = {name: digest(folder / name) for name in _file_names(folder)}
    text = json.dumps({"format_version": 1, "sha256": files}, indent=1) + "\n"
    write_whole(folder / RECORD_NAME, lambda path: path.write_text(text, "utf-8"))


def publish_checkpoint(folder: Path, target: Path) -> None:
    """Renames a sealed checkpoint into place, and replaces one of the same name."""
    if target.exists():
        target.replace(folder.parent / f"{folder.name}-replaced")
    folder.replace(target)
    shutil.rmtree(folder.parent, ignore_errors=True)


def damage(folder: Path) -> str | None:
    """The first thing that is wrong with a checkpoint; None if every file is as it was written."""
    if not folder.is_dir():
        return "there is no such folder"
    try:
        files: dict[str, str] = json.loads((folder / RECORD_NAME).read_text("utf-8"))["sha256"]
        for name, written in files.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if digest(folder / name) != written:
                return f"{name} is not as it was written"
    except FileNotFoundError:
        return f"it has no {RECORD_NAME}, which RMTTrainer writes last"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{RECORD_NAME} cannot be read ({type(error).__name__}: {error})"
    return None


def last_whole_checkpoint(output_dir: str) -> str:
    """The newest whole checkpoint of a run; it warns of newer ones that are damaged.

    Raises:
        ValueError: If there is none.
    """
    for folder in reversed(sort_checkpoints(output_dir)):
        wrong = damage(Path(folder))
        if wrong is None:
            return folder
        logger.warning(f"Checkpoint {folder} is skipped: {wrong}. Looking for the one before.")
    raise ValueError(
        f"resume_from_checkpoint=True needs a whole {PREFIX_CHECKPOINT_DIR}-* in {output_dir}, and there is none: "
        "begin with resume_from_checkpoint=False."
    )


def _file_names(folder: Path) -> list[str]:
    files = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    return sorted(file.as_posix() for file in files if file.name != RECORD_NAME)
