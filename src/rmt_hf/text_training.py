"""From texts to a trained model: files, folders or data sets as documents, some held out, and bits per byte of those.

What examples/01_train_on_a_book.py and examples/04_finetune.py share. A home file.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from datasets import Dataset, DatasetDict, load_dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from .data import cut_into_rows, tokenize
from .lanes import Lanes
from .modeling_rmt import RMTForCausalLM
from .training import RMTTrainer
from .training_arguments import RMTTrainingArguments


def read_texts(source: str, configuration: str | None = None, split: str = "train", column: str = "text") -> Dataset:
    """The texts of a source, a whole document in each row of the column `text`.

    Args:
        source: A text file (one document); a folder with `*.txt` files at any depth (a document each, in the order of
            their paths); or what `datasets.load_dataset` takes: a name on the Hub, or a folder of data files.
        configuration: Of the data set.
        split: Of the data set.
        column: Of the data set, where the text is.

    Raises:
        ValueError: If there is no text, no such split or no such column.
    """
    path = Path(source)
    files = [path] if path.is_file() else sorted(path.rglob("*.txt"))
    if files:
        return _not_empty(Dataset.from_dict({"text": [file.read_text("utf-8") for file in files]}), source)
    found = cast(DatasetDict, load_dataset(source, configuration))
    if split not in found:
        raise ValueError(f"{source} must have the split {split!r}, got {list(found)}: name one of those.")
    data = cast(Dataset, found[split])
    if column not in data.column_names:
        raise ValueError(f"{source} must have the column {column!r}, got {data.column_names}: name one of those.")
    data = data.select_columns(column)
    return _not_empty(data if column == "text" else data.rename_column(column, "text"), source)


def _not_empty(texts: Dataset, source: str) -> Dataset:
    texts = texts.filter(lambda text: bool(text.strip()), input_columns="text", keep_in_memory=True)
    if not len(texts):
        raise ValueError(f"{source} must hold text, got none: name a text file, a folder of *.txt, or a data set.")
    return texts


def hold_out(texts: Dataset, share: float) -> tuple[Dataset, Dataset]:
    """Texts to train on, and the last ones to evaluate on; of a single text its end.

    Args:
        texts: With a column `text`.
        share: Of the texts, or of the characters of a single one; at least one is held out.

    Raises:
        ValueError: If `share` is not between 0 and 1.
    """
    if not 0 < share < 1:
        raise ValueError(f"The share that is held out must be between 0 and 1, got {share}.")
    if len(texts) == 1:
        text = texts[0]["text"]
        place = len(text) - max(1, round(share * len(text)))
        return Dataset.from_dict({"text": [text[:place]]}), Dataset.from_dict({"text": [text[place:]]})
    place = len(texts) - max(1, round(share * len(texts)))
    return texts.select(range(place)), texts.select(range(place, len(texts)))


def tokenize_texts(texts: Dataset, tokenizer: PreTrainedTokenizerFast) -> Dataset:
    """Documents with `input_ids` and `num_bytes`, the UTF-8 bytes of their text."""
    counted = texts.map(
        lambda text: {"num_bytes": len(text.encode())}, input_columns="text", keep_in_memory=True, desc="Counting bytes"
    )
    return tokenize(counted, tokenizer)


class TextTrainer(RMTTrainer):
    """An `RMTTrainer` that says in stream mode what evaluation costs in bits per byte, as `eval_bits_per_byte`.

    Data sets are as `tokenize_texts` gives them. All tokens of a document but its first one are predicted, so nothing
    is left out if the tokenizer begins texts with a special token.
    """

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As every `RMTTrainer`, and bits per byte of all documents."""
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        prefix, lanes = kwargs.get("metric_key_prefix", "eval"), dataloader.dataset
        if isinstance(lanes, Lanes) and output.metrics is not None and f"{prefix}_loss" in output.metrics:
            num_predicted = lanes.num_tokens - int((lanes.columns > 0).sum())
            bits = output.metrics[f"{prefix}_loss"] * num_predicted / math.log(2)
            output.metrics[f"{prefix}_bits_per_byte"] = bits / sum(lanes.documents.with_format(None)["num_bytes"])
        return output


def text_trainer(
    model: RMTForCausalLM,
    documents: Dataset,
    arguments: RMTTrainingArguments,
    held_out: Dataset | None = None,
    row_length: int | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> TextTrainer:
    """A trainer for documents of text, in stream mode or on plain rows.

    Args:
        model: Trained in place.
        documents: As `tokenize_texts` gives them.
        arguments: With `stream_length` for stream mode.
        held_out: Documents to evaluate on.
        row_length: Tokens of a plain row; see `cut_into_rows`.
        callbacks: Further callbacks.
        tokenizer: Saved beside the model.

    Raises:
        ValueError: If not exactly one of `stream_length` and `row_length` is given, or no document fills a row.
    """
    if (arguments.stream_length is None) == (row_length is None):
        raise ValueError(
            f"Exactly one of stream_length and row_length is wanted, got {arguments.stream_length} and {row_length}: "
            "the first one carries memory from step to step, the second one trains on rows of their own."
        )
    if row_length is not None:
        documents = plain_rows(documents, row_length)
        held_out = None if held_out is None else plain_rows(held_out, row_length)
    return TextTrainer(
        model,
        arguments,
        train_dataset=documents,
        eval_dataset=held_out,
        callbacks=list(callbacks),
        processing_class=tokenizer,
    )


def plain_rows(documents: Dataset, row_length: int) -> Dataset:
    """Rows of `row_length` tokens with `input_ids` and `labels`.

    Raises:
        ValueError: If no document is that long.
    """
    rows = cut_into_rows(documents, row_length)
    if not len(rows):
        raise ValueError(f"row_length must be at most the length of the longest document, got {row_length}.")
    return rows.map(lambda row: {"labels": row["input_ids"]}, keep_in_memory=True, desc="Labelling")
