"""Prepares data: texts, pairs and chats become documents of token ids, and documents become rows.

A document is a row with `input_ids` and, if not every token is to be learned, `labels`. Data sets may be map-style or
streaming.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from numpy.typing import ArrayLike
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging


logger = logging.get_logger(__name__)

END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"
IGNORED = -100  # label of a token that is not to be learned
WORD_BYTES = 1000  # that BPE learns from at a time: training takes time by the square of the longest word
# A word of byte-level BPE is letters, digits, blanks, or anything else.
LONG_WORD = re.compile(
    "|".join(f"(?:{kind}){{{WORD_BYTES + 1}}}" for kind in (r"[^\W\d_]", r"\d", r"\s", r"[^\w\s]|_"))
)

AnyDataset = TypeVar("AnyDataset", Dataset, IterableDataset)


def train_tokenizer(texts: Iterable[str], vocab_size: int, show_progress: bool = False) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer that begins every text with the end-of-text token.

    Args:
        texts: Training texts. Words of more than `WORD_BYTES` bytes are cut, to learn from; a warning says so.
        vocab_size: Number of tokens, at least 258 (256 bytes, the end-of-text token, whose id is 0, and the padding
            token, whose id is the last).
        show_progress: Whether to show a progress bar.

    Raises:
        ValueError: If the vocabulary is too small for all bytes.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 2:
        raise ValueError(
            f"vocab_size must be at least {len(alphabet) + 2} (all bytes, {END_OF_TEXT} and {PAD}), got {vocab_size}."
        )
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    cut = pre_tokenizers.Split(Regex(f".{{1,{WORD_BYTES}}}"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([byte_level, cut])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=show_progress
    )
    tokenizer.train_from_iterator(_watched(texts), trainer)
    tokenizer.pre_tokenizer = byte_level
    tokenizer.add_special_tokens([PAD])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def _watched(texts: Iterable[str]) -> Iterator[str]:
    """The texts; a warning says once that words in them are cut."""
    is_quiet = False
    for text in texts:
        if not is_quiet and (found := LONG_WORD.search(text)) is not None:
            logger.warning(f"Words of more than {WORD_BYTES:,} bytes are cut to train a tokenizer: {found[0][:20]}...")
            is_quiet = True
        yield text


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


def _texts(batch: dict[str, list], column: str) -> list[str]:
    """A column of texts, after checking that it holds nothing else."""
    for text in batch[column]:
        if not isinstance(text, str):
            got = "null" if text is None else f"{text!r}, a {type(text).__name__}"
            raise ValueError(f"The column {column} must hold a text in every row, got {got}: leave such rows out.")
    return batch[column]


def _missing_end(ids: list[int], tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The end-of-text token, if there is one and the tokens do not end with it."""
    end = tokenizer.eos_token_id
    return [] if end is None or ids[-1:] == [end] else [end]


def tokenize(texts: AnyDataset, tokenizer: PreTrainedTokenizerFast) -> AnyDataset:
    """The texts with a column `input_ids` instead of `text`, which ends with the end-of-text token; other columns stay.

    Args:
        texts: With a column `text`, a whole document in each row.
        tokenizer: Of the model. Without `eos_token` nothing is added.

    Raises:
        ValueError: If there is no such column, or a row has no text.
    """

    def cut(batch: dict[str, list]) -> dict[str, list]:
        all_ids: list[list[int]] = tokenizer(_texts(batch, "text"), return_attention_mask=False)["input_ids"]
        return {"input_ids": [ids + _missing_end(ids, tokenizer) for ids in all_ids]}

    return _map(texts, cut, ["text"], "Tokenizing")


def tokenize_completions(pairs: AnyDataset, tokenizer: PreTrainedTokenizerFast) -> AnyDataset:
    """The pairs with columns `input_ids` and `labels`, which are -100 in the prompt; other columns stay.

    Prompt and completion are tokenized as one text; a token with characters of both belongs to the prompt. The
    end-of-text token is added and learned.

    Args:
        pairs: With text columns `prompt` and `completion`.
        tokenizer: A fast one, which knows the offsets of its tokens. Without `eos_token` nothing is added.

    Raises:
        ValueError: If there are no such columns, or a row has no text.
    """

    def cut(batch: dict[str, list]) -> dict[str, list]:
        prompts, completions = _texts(batch, "prompt"), _texts(batch, "completion")
        whole = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        encoded = tokenizer(whole, return_attention_mask=False, return_offsets_mapping=True)
        all_ids: list[list[int]] = encoded["input_ids"]
        labels = [
            [number if first >= len(prompt) else IGNORED for number, (first, _) in zip(ids, offsets, strict=True)]
            for ids, offsets, prompt in zip(all_ids, encoded["offset_mapping"], prompts, strict=True)
        ]
        ends = [_missing_end(ids, tokenizer) for ids in all_ids]
        columns = {"input_ids": all_ids, "labels": labels}
        return {name: [ids + end for ids, end in zip(column, ends, strict=True)] for name, column in columns.items()}

    return _map(pairs, cut, ["prompt", "completion"], "Tokenizing pairs")


def _chat_columns(ids: list[int], is_own: list[int], tokenizer: PreTrainedTokenizerFast) -> dict[str, list[int]]:
    """Tokens and labels of a chat, in which the end of a turn is learned that is."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    before = [0, *is_own[:-1]]
    learned = [own or (last and number in special) for number, own, last in zip(ids, is_own, before, strict=True)]
    labels = [number if own else IGNORED for number, own in zip(ids, learned, strict=True)]
    shown = next(
        (number for number in reversed(ids) if number in special or str(tokenizer.decode(number)).strip()), None
    )
    end = _missing_end(ids, tokenizer) if is_own[-1:] == [1] and shown not in special else []
    return {"input_ids": ids + end, "labels": labels + end}


def tokenize_chats(chats: AnyDataset, tokenizer: PreTrainedTokenizerFast, all_turns: bool = False) -> AnyDataset:
    """The chats with columns `input_ids` and `labels`, which are -100 outside the turns of the assistant.

    A special token directly behind a turn of the assistant, which ends it, is learned, too. Where the template ends a
    chat with no special token, the end-of-text token is added.

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
        all_ids: list[list[int]] = encoded["input_ids"]
        masks = [[1] * len(ids) for ids in all_ids] if all_turns else encoded["assistant_masks"]
        rows = [_chat_columns(*row, tokenizer) for row in zip(all_ids, masks, strict=True)]
        return {name: [row[name] for row in rows] for name in ("input_ids", "labels")}

    return _map(chats, cut, ["messages"], "Tokenizing chats")


def _parts(batch: dict[str, list], row_length: int, segment_length: int) -> list[dict[str, np.ndarray]]:
    """Documents, cut where they are longer than a row and padded to whole segments."""
    labels = batch.get("labels", batch["input_ids"])
    return [
        document_columns(ids[start : start + row_length], own[start : start + row_length], segment_length)
        for ids, own in zip(batch["input_ids"], labels, strict=True)
        for start in range(0, len(ids), row_length)
    ]


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
        document begins. Their collator is `default_data_collator`: one that makes labels anew would learn both.

    Raises:
        ValueError: If the rows are no whole segments, or there is no column `input_ids`.
    """
    if row_length <= 0 or segment_length <= 0 or row_length % segment_length:
        raise ValueError(
            f"row_length must be a multiple of segment_length ({segment_length}), so that documents begin at segment "
            f"starts; got {row_length}."
        )

    def fill(batch: dict[str, list]) -> dict[str, list]:
        parts = _parts(batch, row_length, segment_length)
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


def cut_into_rows(documents: AnyDataset, row_length: int) -> AnyDataset:
    """Rows of `row_length` columns, each from one document; the last one of a document is padded.

    Args:
        documents: With a column `input_ids` and, if not every token is to be learned, `labels`.
        row_length: Columns of a row, many segments, so that memory is written and read inside it.

    Returns:
        Rows with `input_ids`, `attention_mask` and `labels`, which are -100 at padding and where a row begins.

    Raises:
        ValueError: If there is no column `input_ids`.
    """

    def cut(batch: dict[str, list]) -> dict[str, list]:
        names = ("input_ids", "attention_mask", "labels")
        parts = _parts(batch, row_length, row_length)
        return {name: [part[name].tolist() for part in parts] for name in names}

    others: list[str] = [name for name in _column_names(documents) if name != "input_ids"]
    return _map(documents, cut, ["input_ids", *others], "Cutting into rows")


def collate(documents: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch of documents of any length, padded on the right: the `data_collator` of plain rows.

    Columns are padding because nothing is there, not because of their token: the end-of-text token is learned where it
    is the padding token, too. `DataCollatorForLanguageModeling` would mask it.

    Args:
        documents: With `input_ids` and, if not every token is to be learned, `labels`.

    Returns:
        `input_ids`, `attention_mask`, and `labels`, which are -100 at padding; (B, T) int64.
    """
    parts = [document_columns(row["input_ids"], row.get("labels", row["input_ids"]), 1) for row in documents]
    rows = [join_columns([part], max(len(part["input_ids"]) for part in parts)) for part in parts]
    return {name: torch.tensor(np.stack([row[name] for row in rows])) for name in rows[0] if name != "position_ids"}
