"""Prepares data: texts, pairs and chats become documents of token ids, and documents become rows.

A document is a row with `input_ids` and, if not every token is to be learned, `labels`. Data sets may be map-style or
streaming.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from numpy.typing import ArrayLike
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


END_OF_TEXT = "<|endoftext|>"
IGNORED = -100  # label of a token that is not to be learned

AnyDataset = TypeVar("AnyDataset", Dataset, IterableDataset)


def train_tokenizer(texts: Iterable[str], vocab_size: int, show_progress: bool = False) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer that begins every text with the end-of-text token.

    Args:
        texts: Training texts.
        vocab_size: Number of tokens, at least 257 (256 bytes and the end-of-text token, whose id is 0).
        show_progress: Whether to show a progress bar.

    Raises:
        ValueError: If the vocabulary is too small for all bytes.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise ValueError(
            f"vocab_size must be at least {len(alphabet) + 1} (all bytes and {END_OF_TEXT}), got {vocab_size}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=show_progress
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def token_byte_counts(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """UTF-8 bytes of each token id, (V,) int64; special tokens have none.

    Args:
        tokenizer: A byte-level tokenizer, whose tokens have one character per byte.
    """
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special = set(tokenizer.all_special_tokens)
    return torch.tensor([0 if token in special else len(token) for token in tokens])


def _column_names(dataset: AnyDataset) -> list[str]:
    return dataset.column_names or list(next(iter(dataset), {}))  # a streaming data set may not know its own


def _map(dataset: AnyDataset, function: Callable, removed: list[str], description: str) -> AnyDataset:
    """`dataset.map` in batches, without the columns `removed`."""
    missing = [name for name in removed if name not in _column_names(dataset)]
    if missing:
        raise ValueError(
            f"The data set must have the columns {removed}, got {_column_names(dataset)}: rename_column gives a column "
            "another name."
        )
    in_memory = {} if isinstance(dataset, IterableDataset) else {"keep_in_memory": True, "desc": description}
    return dataset.map(function, batched=True, remove_columns=removed, **in_memory)


def tokenize(texts: AnyDataset, tokenizer: PreTrainedTokenizerFast) -> AnyDataset:
    """The texts with a column `input_ids` instead of `text`; other columns stay.

    Args:
        texts: With a column `text`, a whole document in each row.
        tokenizer: Of the model.

    Raises:
        ValueError: If there is no such column.
    """

    def cut(batch: dict[str, list]) -> dict[str, list]:
        return {"input_ids": tokenizer(batch["text"], return_attention_mask=False)["input_ids"]}

    return _map(texts, cut, ["text"], "Tokenizing")


def tokenize_completions(pairs: AnyDataset, tokenizer: PreTrainedTokenizerFast) -> AnyDataset:
    """The pairs with columns `input_ids` and `labels`, which are -100 in the prompt; other columns stay.

    Prompt and completion are tokenized as one text; a token with characters of both belongs to the prompt.

    Args:
        pairs: With text columns `prompt` and `completion`.
        tokenizer: A fast one, which knows the offsets of its tokens. If the model is to learn to stop, end the
            completions with the end-of-text token: the tokenizer does not add it.

    Raises:
        ValueError: If there are no such columns.
    """

    def cut(batch: dict[str, list]) -> dict[str, list]:
        whole = [prompt + completion for prompt, completion in zip(batch["prompt"], batch["completion"], strict=True)]
        encoded = tokenizer(whole, return_attention_mask=False, return_offsets_mapping=True)
        all_ids: list[list[int]] = encoded["input_ids"]
        labels = [
            [number if first >= len(prompt) else IGNORED for number, (first, _) in zip(ids, offsets, strict=True)]
            for ids, offsets, prompt in zip(all_ids, encoded["offset_mapping"], batch["prompt"], strict=True)
        ]
        return {"input_ids": all_ids, "labels": labels}

    return _map(pairs, cut, ["prompt", "completion"], "Tokenizing pairs")


def tokenize_chats(chats: AnyDataset, tokenizer: PreTrainedTokenizerFast, all_turns: bool = False) -> AnyDataset:
    """The chats with columns `input_ids` and `labels`, which are -100 outside the turns of the assistant.

    Args:
        chats: With a column `messages`, lists of `{"role": ..., "content": ...}`.
        tokenizer: One whose chat template marks the text of the assistant with `{% generation %}`.
        all_turns: Whether every turn is to be learned; the template then needs no marks.

    Raises:
        ValueError: If there is no such column, no template, or no mark in it.
    """
    template = tokenizer.get_chat_template()
    if not all_turns and not re.search(r"\{%-?\s*generation\b", template):
        raise ValueError(
            "tokenizer.chat_template must mark the turns of the assistant with {% generation %} ... "
            "{% endgeneration %}, got one without: put the marks in, or learn all turns with all_turns=True."
        )

    def cut(batch: dict[str, list]) -> dict[str, list]:
        encoded: Any = tokenizer.apply_chat_template(
            batch["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=not all_turns
        )
        if all_turns:
            return {"input_ids": encoded["input_ids"], "labels": encoded["input_ids"]}
        labels = [
            [number if said else IGNORED for number, said in zip(ids, mask, strict=True)]
            for ids, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
        ]
        return {"input_ids": encoded["input_ids"], "labels": labels}

    return _map(chats, cut, ["messages"], "Tokenizing chats")


def pack(documents: AnyDataset, row_length: int, segment_length: int) -> AnyDataset:
    """Rows of `row_length` columns, each with several documents that do not see each other.

    Each document begins at a segment start, where `position_ids` go back to 0, and is padded to whole segments. Those
    longer than a row are cut into several documents. A thousand documents at a time are packed, the longest first.

    Args:
        documents: With a column `input_ids` and, if not every token is to be learned, `labels`.
        row_length: A multiple of `segment_length`.
        segment_length: `config.segment_length` of the model.

    Returns:
        Rows with `input_ids`, `attention_mask`, `position_ids` and `labels`, which are -100 at padding and where a
        document begins.

    Raises:
        ValueError: If the rows are no whole segments, or there is no column `input_ids`.
    """
    if row_length <= 0 or segment_length <= 0 or row_length % segment_length:
        raise ValueError(
            f"row_length must be a multiple of segment_length ({segment_length}), so that documents begin at segment "
            f"starts; got {row_length}."
        )

    def fill(batch: dict[str, list]) -> dict[str, list]:
        labels = batch.get("labels", batch["input_ids"])
        parts = [
            document_columns(ids[start : start + row_length], own[start : start + row_length], segment_length)
            for ids, own in zip(batch["input_ids"], labels, strict=True)
            for start in range(0, len(ids), row_length)
        ]
        rows: list[list[dict[str, np.ndarray]]] = []
        free: list[int] = []
        for part in sorted(parts, key=lambda part: -len(part["input_ids"])):
            size = len(part["input_ids"])
            row = next((index for index, room in enumerate(free) if room >= size), len(rows))
            if row == len(rows):
                rows.append([])
                free.append(row_length)
            rows[row].append(part)
            free[row] -= size
        whole = [join_columns(packed, row_length) for packed in rows]
        return {name: [packed[name].tolist() for packed in whole] for name in PADDING}

    others: list[str] = [name for name in _column_names(documents) if name != "input_ids"]
    return _map(documents, fill, ["input_ids", *others], "Packing")


# The columns of a row, and their values at padding.
PADDING = {"input_ids": 0, "attention_mask": 0, "position_ids": 0, "labels": IGNORED}


def document_columns(
    ids: ArrayLike, labels: ArrayLike, segment_length: int, start: int = 0, stop: int | None = None
) -> dict[str, np.ndarray]:
    """Columns `start` to `stop` of a document padded to whole segments, int64 each; its first label is -100.

    Raises:
        ValueError: If `labels` are not as many as `ids`.
    """
    numbers, own = np.asarray(ids, dtype=np.int64), np.asarray(labels, dtype=np.int64)
    if len(own) != len(numbers):
        raise ValueError(
            f"labels must be as many as the input_ids of their document ({len(numbers)}), got {len(own)}: do not shift "
            "them, and set those that are not to be learned to -100."
        )
    padded = -(-len(numbers) // segment_length) * segment_length
    stop = padded if stop is None else min(stop, padded)
    numbers, own = numbers[start:stop], own[start:stop].copy()
    if start == 0:
        own[:1] = IGNORED
    given = (numbers, np.ones_like(numbers), np.arange(start, start + len(numbers)), own)
    return join_columns([dict(zip(PADDING, given, strict=True))], stop - start)


def join_columns(parts: list[dict[str, np.ndarray]], length: int) -> dict[str, np.ndarray]:
    """Columns of several parts in sequence, padded to `length`."""
    joined = {}
    for name, padding in PADDING.items():
        values = [part[name] for part in parts]
        missing = length - sum(map(len, values))
        joined[name] = np.concatenate([*values, np.full(missing, padding, np.int64)])
    return joined


def cut_into_rows(documents: Dataset, row_length: int) -> Dataset:
    """Rows of `row_length` tokens, each from one document; the rest of a document is dropped.

    Args:
        documents: With a column `input_ids`, as `tokenize` returns them.
        row_length: Tokens of a row, many segments, so that memory is written and read inside it.
    """

    def cut(batch: dict[str, list]) -> dict[str, list]:
        starts = (
            (ids, start) for ids in batch["input_ids"] for start in range(0, len(ids) - row_length + 1, row_length)
        )
        return {"input_ids": [ids[start : start + row_length] for ids, start in starts]}

    return documents.map(
        cut, batched=True, remove_columns=documents.column_names, keep_in_memory=True, desc="Cutting into rows"
    )
