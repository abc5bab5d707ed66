"""Teaches a converted model to remember. Its teacher is its source, which sees whole rows where it sees a window.

Rows are text, from which the student learns to predict what the teacher predicts, and text with facts in it that are
asked for at the end. A home file: it does not travel with the weights.

Shapes: B rows, T tokens of a row, V vocabulary.
"""

import random
import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from .conversion import memory_parameters
from .data import IGNORED
from .facts import Background, Story, spread
from .tasks import Distance
from .training import RMTTrainer


TOWNS = (
    *("Athens", "Berlin", "Boston", "Cairo", "Chicago", "Dublin", "London", "Madrid", "Milan", "Moscow", "Oslo"),
    *("Paris", "Prague", "Rome", "Tokyo", "Vienna"),
)
TOKENS_PER_FACT = 128
PIECE = 512  # tokens whose probabilities over the vocabulary are compared at a time


class DistillationTrainer(RMTTrainer):
    """`RMTTrainer` for plain rows whose loss is how far the student's predictions are from the teacher's.

    The loss is the Kullback-Leibler divergence from teacher to student, nats, mean over all tokens; plus the cross
    entropy of labels, mean over those that are not -100. Without a teacher it is the latter alone. Nothing is lost in
    the window: a converted model begins there with a divergence of 0, which the loss holds on to.

    Args:
        teacher: Sees whole rows, and has the vocabulary of the student; None to learn labels alone.
        args, kwargs: As `Trainer` takes them.

    Raises:
        ValueError: If the vocabularies differ, or rows are to be read as streams or in groups.

    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", at temperature 1.
    """

    def __init__(self, *args: Any, teacher: PreTrainedModel | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # a mean over the row: the Trainer divides by the accumulation steps
        for name in ("stream_length", "checkpoint_segments"):
            if getattr(self.args, name) is not None:
                raise ValueError(f"{name} must be None, got {getattr(self.args, name)}: a teacher reads whole rows.")
        self.teacher = teacher
        if teacher is None:
            return
        sizes = teacher.config.vocab_size, self._config.vocab_size
        if sizes[0] != sizes[1]:
            raise ValueError(f"vocab_size of the teacher must be that of the student ({sizes[1]}), got {sizes[0]}.")
        teacher.eval().requires_grad_(False)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Divergence and cross entropy of rows `input_ids` and `labels`, (B, T) each."""
        labels = inputs.get("labels")
        inputs = {name: tensor for name, tensor in inputs.items() if name != "labels"}
        outputs = model(**inputs, use_cache=False)
        loss = outputs.logits.new_zeros(())
        if self.teacher is not None:
            with torch.no_grad():
                wanted = self.teacher(**inputs, use_cache=False).logits
            loss = divergence(outputs.logits, wanted)
        if labels is not None and (labels[:, 1:] != IGNORED).any():
            loss = loss + F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return (loss, outputs) if return_outputs else loss


def divergence(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence from what is wanted to what there is, nats, mean over tokens.

    Args:
        logits: (B, T, V) of the student.
        wanted: (B, T, V) of the teacher.
    """
    total = torch.zeros((), device=logits.device)
    for pair in zip(logits.split(PIECE, 1), wanted.split(PIECE, 1), strict=True):
        ours, theirs = (part.float().log_softmax(-1) for part in pair)
        total = total + F.kl_div(ours, theirs, reduction="sum", log_target=True)
    return total / logits.shape[:2].numel()


def parameter_groups(model: nn.Module, learning_rate: float, scale_factor: float = 10.0) -> list[dict[str, Any]]:
    """What an optimizer takes: all that is trained, the share of a local path faster.

    A share begins at 0 and has to come to about 1; a weight begins near where it stays.

    Args:
        model: After `freeze_base`, say.
        learning_rate: Of all others.
        scale_factor: By how much the learning rate of `fusion.scale` is larger.

    Returns:
        One or two groups, with `params` and `lr`.
    """
    # An adapter that holds fusion whole has words of its own between the two.
    scales = [item for item in memory_parameters(model).items() if re.search(r"fusion\..*\bscale$", item[0])]
    names = {name for name, _ in scales}
    others = [item for item in model.named_parameters() if item[1].requires_grad and item[0] not in names]
    rates = (scale_factor * learning_rate, learning_rate)
    return [
        {"params": [parameter for _, parameter in items if parameter.requires_grad], "lr": rate}
        for items, rate in zip((scales, others), rates, strict=True)
        if items
    ]


def code_stories(num_facts: int, rng: random.Random) -> list[Story]:
    """Codes of towns, and a question for each of them, in any order.

    Args:
        num_facts: 1 to 16.
        rng: Source of all randomness.

    Returns:
        As many stories, all with the same facts.
    """
    codes = {town: str(rng.randrange(1000, 10000)) for town in rng.sample(TOWNS, num_facts)}
    facts = [f"The secret code of {town} is {code}." for town, code in codes.items()]
    asked = rng.sample(list(codes), num_facts)
    return [Story(facts, f"What is the secret code of {town}?", codes[town]) for town in asked]


def ask_all(
    stories: Sequence[Story], background: Background, length: int, distance: Distance, rng: random.Random
) -> dict[str, list[int]]:
    """A row whose facts are asked for one after the other at its end.

    Args:
        stories: All with the same facts.
        background: What they are told in.
        length: T.
        distance: Tokens between any fact and the first question, as `spread` takes them.
        rng: Source of all randomness.

    Returns:
        `input_ids` and `labels`, (T,) each; the labels are the tokens of the answers.
    """
    encode = partial(background.tokenizer.encode, add_special_tokens=False)
    pieces = []
    for story in stories[1:]:
        question, answer = encode(f"\nQuestion: {story.question}\nAnswer:"), encode(f" {story.answer}")
        pieces += [(question, [IGNORED] * len(question)), (answer, answer)]
    left = length - sum(len(ids) for ids, _ in pieces)
    row = spread(stories[0], background, left, distance, rng)
    input_ids, labels = row.input_ids[0].tolist(), row.labels[0].tolist()
    for ids, wanted in pieces:
        input_ids, labels = input_ids + ids, labels + wanted
    return {"input_ids": input_ids, "labels": labels}


def rows_of(
    texts: Dataset,
    background: Background,
    stages: Sequence[tuple[int, int]],
    recall_share: float = 0.5,
    label_text: bool = False,
    seed: int = 0,
) -> Dataset:
    """Rows to train on in their order, which is a curriculum: stage after stage, text and questions mixed.

    Args:
        texts: Documents with `input_ids`; a row of text is a random piece of one of them.
        background: The same texts, cut into sentences: what the facts are told in.
        stages: (tokens of a row, number of rows).
        recall_share: Share of rows with facts in them, one for every `TOKENS_PER_FACT`, which are asked for at the end.
        label_text: Whether rows of text have labels, for training without a teacher.
        seed: Of everything that is drawn.

    Returns:
        A data set with `input_ids` and `labels`, (T,) each.

    Raises:
        ValueError: If no text is as long as the rows.
    """
    longest, needed = max(map(len, texts["input_ids"])), max(length for length, _ in stages)
    if longest < needed:
        raise ValueError(f"Rows must be at most as long as the longest text ({longest} tokens), got {needed}.")
    rng = random.Random(seed)

    def rows() -> Iterator[dict[str, list[int]]]:
        for length, count in stages:
            documents = [ids for ids in texts["input_ids"] if len(ids) >= length]
            for _ in range(count):
                if rng.random() < recall_share:
                    stories = code_stories(max(1, min(len(TOWNS), length // TOKENS_PER_FACT)), rng)
                    # A quarter of a row between facts and questions, so that most are out of the window.
                    yield ask_all(stories, background, length, length // 4, rng)
                    continue
                ids = rng.choice(documents)
                start = rng.randrange(len(ids) - length + 1)
                piece = ids[start : start + length]
                yield {"input_ids": piece, "labels": piece if label_text else [IGNORED] * length}

    return Dataset.from_list(list(rows()))
