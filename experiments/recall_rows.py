"""Prose in which facts are told, each asked for at its end, in words that no memory is taught with.

A row tells a needle, four codes in sentences that differ by a name and a number, and a price that is changed later.
"""

import random
from typing import Any, NamedTuple

import torch


TOWNS = (
    "Athens",
    "Berlin",
    "Boston",
    "Cairo",
    "Chicago",
    "Dublin",
    "London",
    "Madrid",
    "Milan",
    "Moscow",
    "Oslo",
    "Rome",
)
NUM_CODES = 4
# How each kind is told and asked for; an answer goes on from the last words.
NEEDLE, CODE, CHANGED = "needle", "one of four codes", "changed fact"
TOLD = {
    NEEDLE: "The treasure of the old king lies under the stone that is marked {}.",
    CODE: "Whoever came to {} at night had to whisper {} to be let in.",
    CHANGED: "A ticket for the evening boat costs {} pence.",
}
CHANGE = "Everything is dearer now: a ticket for the evening boat costs {} pence."
ASKED = {
    NEEDLE: "Where is the treasure of the king?\nAnswer: The treasure lies under the stone that is marked",
    CODE: "What did one have to whisper in {} at night?\nAnswer: Whoever came to {} at night had to whisper",
    CHANGED: "What does a ticket for the evening boat cost now?\nAnswer: A ticket for the evening boat costs",
}


class Question(NamedTuple):
    """Kind, and the tokens of question and answer, (n,) each."""

    kind: str
    question: torch.Tensor
    answer: torch.Tensor


class Row(NamedTuple):
    """Prose (T,) with the facts, and the questions, each to be asked after the whole of it."""

    prose: torch.Tensor
    questions: list[Question]


def recall_row(text: str, tokenizer: Any, num_windows: int, window: int, rng: random.Random) -> Row:
    """A row whose facts are told `num_windows` windows before the questions, or up to one window less.

    Args:
        text: Prose that is longer than the row.
        tokenizer: Of the model.
        num_windows: At least 2.
        window: Tokens.
        rng: Source of all randomness.
    """

    def encode(part: str) -> list[int]:
        return tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]

    towns = rng.sample(TOWNS, NUM_CODES)
    needle, price, dearer, *codes = (str(number) for number in rng.sample(range(1000, 10000), 3 + NUM_CODES))
    facts = [TOLD[NEEDLE].format(needle), *map(TOLD[CODE].format, towns, codes)]
    rng.shuffle(facts)
    first, second = sorted(rng.sample(range(len(facts) + 2), 2))
    facts[first:first] = [TOLD[CHANGED].format(price)]
    facts[second:second] = [CHANGE.format(dearer)]
    told = [encode(f"\n\n{fact}\n\n") for fact in facts]
    before, room = rng.randrange(window // 2, window), window - sum(map(len, told))
    places = sorted(rng.randrange(max(1, room)) for _ in told)
    length = before + max(1, room) + (num_windows - 1) * window
    start = rng.randrange(len(text) - 8 * length)
    ids = encode(text[start : start + 8 * length])[:length]
    for place, part in reversed(list(zip(places, told, strict=True))):
        ids[before + place : before + place] = part
    asked = [(NEEDLE, ASKED[NEEDLE], needle), (CHANGED, ASKED[CHANGED], dearer)]
    asked += [(CODE, ASKED[CODE].format(town, town), code) for town, code in zip(towns, codes, strict=True)]
    questions = [
        Question(kind, torch.tensor(encode(f"\n\nQuestion: {words}")), torch.tensor(encode(f" {answer}")))
        for kind, words, answer in asked
    ]
    return Row(torch.tensor(ids), questions)
