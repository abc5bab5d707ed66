"""Rows of text in which codes of towns are told, to be asked for at the end: what a converted model is taught with."""

import random
from collections.abc import Iterator, Sequence
from functools import partial

from datasets import Dataset

from experiments.stories import Background, Story, spread
from experiments.tasks import Distance
from rmt_hf.data import IGNORED


TOWNS = (
    *("Athens", "Berlin", "Boston", "Cairo", "Chicago", "Dublin", "London", "Madrid", "Milan", "Moscow", "Oslo"),
    *("Paris", "Prague", "Rome", "Tokyo", "Vienna"),
)
TOKENS_PER_FACT = 128


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
    parts = []
    for story in stories[1:]:
        question, answer = encode(f"\nQuestion: {story.question}\nAnswer:"), encode(f" {story.answer}")
        parts += [(question, [IGNORED] * len(question)), (answer, answer)]
    left = length - sum(len(ids) for ids, _ in parts)
    row = spread(stories[0], background, left, distance, rng)
    input_ids, labels = row.input_ids[0].tolist(), row.labels[0].tolist()
    for ids, wanted in parts:
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
        texts: Documents with `input_ids`; a row of text is a random slice of one of them.
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
                chosen = ids[start : start + length]
                yield {"input_ids": chosen, "labels": chosen if label_text else [IGNORED] * length}

    return Dataset.from_list(list(rows()))
