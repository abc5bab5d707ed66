"""Documents of prose in which facts are told, and asked for at the end: what a memory is calibrated and taught with."""

import random
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from .data import IGNORED


NUM_FACTS = 16  # of a document, or as many as fit in half of it
CHARACTERS_PER_TOKEN = 8  # at most, of the slices of text that are cut into tokens
FACT_SHARE = 0.3  # of rows to teach with, in which facts are asked for
QUOTED_SHARE = 0.4  # of facts that are sentences of the prose with a value put in
FREE_SHARE = 0.6  # of the others, that are told in sentences of their own
CHANGED_SHARE = 0.2  # of facts that are told twice, with another value the second time, which counts

KINDS = (
    *("phone number", "locker number", "password", "room number", "ticket number", "pin", "account number"),
    *("order number", "address", "birthday", "nickname", "favourite colour", "price", "licence plate"),
)
OWNERS = (
    *("Alice", "Robert", "the captain", "Maria", "Kenji", "the hotel", "Lima", "the museum", "Doctor Hall", "Bergen"),
    *("my brother", "the library", "Fatima", "the old ship", "Mr. Novak", "the school"),
)
WORDS = (
    *("amber", "otter", "velvet", "harbour", "seven", "maple", "copper", "Thursday", "raven", "lantern", "willow"),
    *("April", "violet", "granite", "falcon", "orchard"),
)
TOLD = (
    "The {kind} of {owner} is {value}.",
    "Note: {owner} has the {kind} {value}.",
    "Remember that {value} is the {kind} of {owner}.",
    "For {owner}, they wrote down {value} as the {kind}.",
    '"And the {kind}?" - "{value}, if you mean {owner}."',
    "{owner} ({kind}: {value}) was mentioned as well.",
    "Nobody but {owner} knew it: the {kind} had been changed to {value}.",
    "When they asked {owner} for the {kind}, the answer was {value}.",
    "{value} stood on the slip of paper, which was the {kind} of {owner}.",
    "As for {owner}, whose {kind} was {value}, nothing more was said.",
    "You will be asked for {value} there; that is the {kind} of {owner}.",
    "Write this down. {owner}, {kind}: {value}.",
)
TOLD_AGAIN = (
    "The {kind} of {owner} is now {value}.",
    "{owner} has a new {kind}: {value}.",
    "From here on, {value} is the {kind} of {owner}.",
)
SENTENCE = re.compile(r"(?<=[.!?]\s)[^.!?\n]{40,140}[.!?]")
QUOTED = ("As was said before: ", "It was written above: ", "Question: How did it go on?\nAnswer: ", "Quote: ")
NEWS = ("It is otherwise now.", "Since then this has changed.", "That was long ago.", "Forget what was said.")
ASKED = (
    "Question: What is the {kind} of {owner}?\nAnswer: The {kind} of {owner} is",
    "Question: What is the {kind} of {owner}?\nAnswer:",
    "Q: Which {kind} belongs to {owner}?\nA:",
    "As was said before, the {kind} of {owner} is",
    "Tell me the {kind} of {owner}.\nIt is",
    "For {owner}, the {kind} that was told above is",
)
# Sentences of their own, each with how it is asked for: the more differ, the better is what differs from all of them.
FREE = (
    ("The bridge of {owner} was built in {value}.", "When was the bridge of {owner} built?\nAnswer: It was built in"),
    ("From here it is {value} miles to {owner}.", "How far is it to {owner}?\nAnswer: From here it is"),
    ("There were {value} sheep on the hill behind {owner}.", "How many sheep had {owner}?\nAnswer: There were"),
    ("The train for {owner} leaves from platform {value}.", "Where is the train for {owner}?\nAnswer: From platform"),
    ("The baker says that {owner} owes him {value} coins.", "What does {owner} owe?\nAnswer: {owner} owes him"),
    ("Count {value} steps north from {owner}, and dig there.", "How many steps from {owner}?\nAnswer: Count"),
    ("Each morning {owner} gets {value} drops.", "How many drops are for {owner}?\nAnswer: Each morning {owner} gets"),
    ("In the ledger {owner} stands with {value}.", "What has {owner} in it?\nAnswer: {owner} stands with"),
    ("A ship with {value} barrels of oil has come for {owner}.", "How many barrels got {owner}?\nAnswer: A ship with"),
    ("All letters to {owner} are in box {value}.", "Where are the letters to {owner}?\nAnswer: In box"),
    ("The mast of {owner} is {value} feet high.", "How high is the mast of {owner}?\nAnswer: It is"),
    ("Dial {value} if you want to speak to {owner}.", "What do I dial for {owner}?\nAnswer: Dial"),
    ("Mix {value} grams of sugar into the cake for {owner}.", "How much sugar needs {owner}?\nAnswer: Mix"),
    ("Volume {value} of the chronicle tells about {owner}.", "Which volume tells about {owner}?\nAnswer: Volume"),
    ("With {value} points the game went to {owner}.", "How did {owner} win the game?\nAnswer: With"),
    ("The clock of {owner} has stopped at {value}.", "When did the clock of {owner} stop?\nAnswer: At"),
    ("To fish near {owner} costs a fine of {value}.", "What is the fine near {owner}?\nAnswer: It costs a fine of"),
    ("The dog of {owner} comes when one calls {value}.", "How do I call the dog of {owner}?\nAnswer: One calls"),
    ("Prisoner {value} turned out to be {owner}.", "Which prisoner was {owner}?\nAnswer: Prisoner"),
    ("By then {value} people had left {owner} for good.", "How many people had left {owner}?\nAnswer: By then"),
    ("Until {value} the road to {owner} remains closed.", "Until when can I not go to {owner}?\nAnswer: Until"),
    ("Seat {value} is being kept for {owner}.", "Which seat is kept for {owner}?\nAnswer: Seat"),
    ("A rope of {value} yards was bought for {owner}.", "How long is the rope of {owner}?\nAnswer: A rope of"),
    ("The rent that {owner} asks for is {value} a year.", "What rent does {owner} ask for?\nAnswer: The rent is"),
    ("Lamp {value} in the corridor belongs to {owner}.", "Which lamp belongs to {owner}?\nAnswer: Lamp"),
    ("On page {value} someone has drawn {owner}.", "On which page is {owner} drawn?\nAnswer: On page"),
    ("Do not forget: {owner} expects us at {value}.", "When does {owner} expect us?\nAnswer: {owner} expects us at"),
    ("The lock of the chest yields to {value}, said {owner}.", "What said {owner} of it?\nAnswer: The lock yields to"),
    ("{value} soldiers stood before {owner} that morning.", "Who stood before {owner}?\nAnswer: Before {owner} stood"),
    ("My list has {owner} under {value}.", "Where is {owner} on it?\nAnswer: My list has {owner} under"),
    ("The weight of {owner} was found to be {value}.", "What is the weight of {owner}?\nAnswer: It was found to be"),
    ("A bottle for {owner} was sealed in the year {value}.", "When was it sealed for {owner}?\nAnswer: In the year"),
)


class _Fact(NamedTuple):
    """What is told, in this order, how it is asked for, and the answer."""

    told: list[str]
    asked: str
    answer: str


class FactDocument(NamedTuple):
    """A document (T,) int64, and labels (T,): the tokens of the answers, -100 elsewhere."""

    input_ids: torch.Tensor
    labels: torch.Tensor


def fact_documents(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    count: int,
    seed: int = 0,
    told_until: int | None = None,
) -> list[FactDocument]:
    """Documents of prose in which facts are told, and asked for at their end.

    Args:
        texts: Prose, any number of texts of any length.
        tokenizer: Of the model that is to read them.
        length: T, tokens of a document.
        count: How many.
        seed: Of what is drawn.
        told_until: Facts are told before this token; None for anywhere before the questions.

    Raises:
        ValueError: If the texts have fewer tokens than a document, or a document has no room for a fact.
    """
    rng, prose = random.Random(seed), "\n\n".join(texts)
    return [_document(prose, tokenizer, length, told_until, rng) for _ in range(count)]


def teaching_rows(
    groups: Sequence[Sequence[str]],
    tokenizer: PreTrainedTokenizerBase,
    stages: Sequence[tuple[int, int]],
    fact_share: float = FACT_SHARE,
    seed: int = 0,
) -> Iterator[dict[str, list[int]]]:
    """Rows to teach a memory with, in their order: slices of texts, and documents that tell facts and ask for them.

    Args:
        groups: Texts of several kinds; each kind is drawn equally often, and of it each text.
        tokenizer: Of the model.
        stages: (tokens of a row, number of rows), one after the other.
        fact_share: Of rows, in which facts are told and asked for.
        seed: Of what is drawn.

    Yields:
        `input_ids` and `labels`, (T,) each; labels are the tokens of answers, -100 elsewhere.

    Raises:
        ValueError: If no text of a group has `CHARACTERS_PER_TOKEN` characters for each token of a row.
    """
    rng = random.Random(seed)
    for length, count in stages:
        size = CHARACTERS_PER_TOKEN * length
        long = [[text for text in group if len(text) >= size] for group in groups]
        if not all(long):
            raise ValueError(f"Each group must have a text of {size:,} characters for rows of {length} tokens.")
        kinds = [(group, "\n\n".join(group)) for group in long]
        for _ in range(count):
            group, prose = rng.choice(kinds)
            if rng.random() < fact_share:
                document = _document(prose, tokenizer, length, None, random.Random(rng.randrange(2**32)))
                yield {"input_ids": document.input_ids.tolist(), "labels": document.labels.tolist()}
                continue
            text = rng.choice(group)
            start = rng.randrange(len(text) - size + 1)
            ids = tokenizer(text[start : start + size], add_special_tokens=False, verbose=False)["input_ids"][:length]
            yield {"input_ids": ids, "labels": [IGNORED] * length}


def _document(
    prose: str, tokenizer: PreTrainedTokenizerBase, length: int, told_until: int | None, rng: random.Random
) -> FactDocument:
    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    told: list[list[list[int]]] = []
    asked: list[tuple[list[int], list[int]]] = []
    left = length
    for owner in rng.sample(OWNERS, NUM_FACTS):
        fact = (_quoted(prose, rng) if rng.random() < QUOTED_SHARE else None) or _fact(owner, rng)
        sentences = [encode(f"\n\n{sentence}\n\n") for sentence in fact.told]
        question = encode(f"\n\n{fact.asked}"), encode(f" {fact.answer}")
        size = sum(map(len, (*sentences, *question)))
        if left - size < length / 2:
            continue  # a shorter one may fit
        told.append(sentences)
        asked.append(question)
        left -= size
    if not told:
        raise ValueError(f"length must be at least twice the {size} tokens of a fact and its question, got {length}.")
    rng.shuffle(asked)
    start = rng.randrange(max(1, len(prose) - CHARACTERS_PER_TOKEN * left + 1))
    ids = encode(prose[start : start + CHARACTERS_PER_TOKEN * left])[:left]
    if len(ids) < left:
        raise ValueError(f"texts must have at least {left} tokens in all, got {len(ids)}: give more.")
    room = max(1, min(left, told_until or left))
    drawn = [(sorted(rng.randrange(room) for _ in parts), parts) for parts in told]  # of a fact, in its order
    places = [pair for each in drawn for pair in zip(*each, strict=True)]
    for place, part in reversed(sorted(places, key=lambda pair: pair[0])):
        ids[place:place] = part
    labels = [IGNORED] * len(ids)
    for words, answer in asked:
        ids, labels = ids + words + answer, labels + [IGNORED] * len(words) + answer
    return FactDocument(torch.tensor(ids), torch.tensor(labels))


def _quoted(prose: str, rng: random.Random) -> _Fact | None:
    """A sentence of the prose with a value instead of a word, asked for by its beginning; None if there is none.

    No two such sentences are alike, so what is fitted to them is not a few wordings.
    """
    found = SENTENCE.search(prose, rng.randrange(len(prose) + 1)) or SENTENCE.search(prose)
    if found is None:
        return None
    words, value = found[0].split(), _value(rng)
    place = rng.randrange(min(4, len(words) - 1), len(words))
    told = " ".join([*words[:place], value, *words[place + 1 :]])
    return _Fact([told], rng.choice(QUOTED) + " ".join(words[:place]), value)


def _fact(owner: str, rng: random.Random) -> _Fact:
    """A fact about an owner: digits, or now and then words; now and then told twice."""
    kind, again = rng.choice(KINDS), rng.random() < CHANGED_SHARE
    values = [_value(rng) for _ in range(1 + again)]
    if rng.random() < FREE_SHARE:
        form, question = rng.choice(FREE)
        forms, asked = [form, f"{rng.choice(NEWS)} {form}"], f"Question: {question}"
    else:
        forms, asked = [rng.choice(TOLD), rng.choice(TOLD_AGAIN)], rng.choice(ASKED)
    told = [form.format(kind=kind, owner=owner, value=value) for form, value in zip(forms, values, strict=False)]
    return _Fact(told, asked.format(kind=kind, owner=owner), values[-1])


def _value(rng: random.Random) -> str:
    if rng.random() < 0.3:
        return " ".join(rng.sample(WORDS, rng.randint(1, 2)))
    return str(rng.randrange(10 ** rng.randint(2, 6)))
