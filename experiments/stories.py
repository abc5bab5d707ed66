"""Little stories whose facts are spread in real text, with a question at the end: bAbI-style, spread as in BABILong.

A story is simulated in a small world of persons, places and objects, so its answer is right by construction. The
sentences are our own; neither bAbI nor BABILong is included. Five tasks:

- qa1: persons move. Where is a person?
- qa2: persons move, take and drop objects. Where is an object?
- qa3: the same. Where was an object before it was in some place?
- qa4: places lie around each other. What lies in a direction of a place?
- qa5: persons also give objects to each other. Who last gave what to whom?

Shapes: B rows, T tokens of a row, N tokens of text.
"""

import bisect
import itertools
import random
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from experiments.tasks import IGNORED, Distance, Task, TaskBatch, require_positive


PERSONS = ("Ingrid", "Nadia", "Oskar", "Priya", "Tomas", "Yusuf")
PLACES = (
    *("attic", "bakery", "cellar", "garage", "harbour", "kitchen"),
    *("laundry", "library", "museum", "office", "station", "workshop"),
)
OBJECTS = ("camera", "kettle", "ladder", "umbrella", "violin", "wallet")
DIRECTIONS = {"north": (0, 1), "south": (0, -1), "east": (1, 0), "west": (-1, 0)}
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}
ACTIONS = {
    "move": ("{} went to the {}.", "{} moved to the {}.", "{} walked to the {}.", "{} travelled to the {}."),
    "take": ("{} took the {}.", "{} picked up the {}.", "{} grabbed the {}."),
    "drop": ("{} dropped the {}.", "{} put down the {}.", "{} discarded the {}."),
    "give": ("{0} gave the {1} to {2}.", "{0} handed the {1} to {2}.", "{0} passed the {1} to {2}."),
}


class Story(NamedTuple):
    """Sentences in the order in which they happen, a question about them, and the one word that answers it."""

    facts: list[str]
    question: str
    answer: str


class World:
    """Who is where, who holds what, and where it has been. Persons and objects are nowhere until they are mentioned."""

    def __init__(self) -> None:
        self.place_of: dict[str, str] = {}
        self.holder_of: dict[str, str] = {}
        self.places_of: dict[str, list[str]] = {thing: [] for thing in OBJECTS}  # every object's way, oldest first
        self.gifts: list[tuple[str, str, str]] = []  # giver, object, receiver

    def possible(self, action: str) -> list[tuple[str, ...]]:
        """All ways in which an action can happen now."""
        held: list[tuple[str, ...]] = [(person, thing) for thing, person in self.holder_of.items()]
        if action == "move":
            return [(person, place) for person in PERSONS for place in PLACES if self.place_of.get(person) != place]
        if action == "take":
            free = [thing for thing in OBJECTS if thing not in self.holder_of]
            return [
                (person, thing)
                for person, place in self.place_of.items()
                for thing in free
                if self.places_of[thing][-1:] in ([], [place])
            ]
        if action == "drop":
            return held
        return [
            (person, thing, other)
            for person, thing in held
            for other in PERSONS
            if other != person and self.place_of.get(other, self.place_of[person]) == self.place_of[person]
        ]

    def happen(self, action: str, person: str, what: str, receiver: str = "") -> None:
        """Changes the world by one action, one of `possible`."""
        if action == "move":
            self.place_of[person] = what
            for thing, holder in self.holder_of.items():
                if holder == person:
                    self.places_of[thing].append(what)
        elif action == "take":
            self.holder_of[what] = person
            if not self.places_of[what]:
                self.places_of[what].append(self.place_of[person])
        elif action == "drop":
            del self.holder_of[what]
        else:
            self.gifts.append((person, what, receiver))
            self.holder_of[what] = receiver
            self.place_of[receiver] = self.place_of[person]


def ask_where_person(world: World, rng: random.Random) -> tuple[str, str] | None:
    """qa1: question and answer."""
    person = rng.choice(list(world.place_of))
    return f"Where is {person}?", world.place_of[person]


def ask_where_object(world: World, rng: random.Random) -> tuple[str, str] | None:
    """qa2: question and answer, or None if no object has been taken."""
    seen = [thing for thing in OBJECTS if world.places_of[thing]]
    if not seen:
        return None
    thing = rng.choice(seen)
    return f"Where is the {thing}?", world.places_of[thing][-1]


def ask_where_object_was(world: World, rng: random.Random) -> tuple[str, str] | None:
    """qa3: question and answer, or None if no object has come to a place, only once, from another."""
    steps = [
        (thing, place, way[index])
        for thing, way in world.places_of.items()
        for index, place in enumerate(way[1:])
        if way.count(place) == 1
    ]
    if not steps:
        return None
    thing, place, before = rng.choice(steps)
    return f"Where was the {thing} before it was in the {place}?", before


def ask_about_gift(world: World, rng: random.Random) -> tuple[str, str] | None:
    """qa5: question and answer, or None if nothing was given."""
    if not world.gifts:
        return None
    giver, thing, receiver = rng.choice(world.gifts)
    latest = reversed(world.gifts)
    form = rng.randrange(3)
    if form == 0:
        return f"What did {giver} last give to {receiver}?", next(
            t for g, t, r in latest if (g, r) == (giver, receiver)
        )
    if form == 1:
        return f"Who last gave the {thing} to {receiver}?", next(g for g, t, r in latest if (t, r) == (thing, receiver))
    return f"To whom did {giver} last give the {thing}?", next(r for g, t, r in latest if (g, t) == (giver, thing))


class Plot(NamedTuple):
    """What happens in the stories of a task, the fewest facts that a question needs, and how it is asked."""

    actions: tuple[str, ...]
    fewest_facts: int
    ask: Callable[[World, random.Random], tuple[str, str] | None]


PLOTS = {
    "qa1": Plot(("move",), 1, ask_where_person),
    "qa2": Plot(("move", "take", "drop"), 2, ask_where_object),
    "qa3": Plot(("move", "take", "drop"), 3, ask_where_object_was),
    "qa5": Plot(("move", "take", "drop", "give"), 3, ask_about_gift),
}
FACT_BOUNDS = {task: (plot.fewest_facts, None) for task, plot in PLOTS.items()} | {"qa4": (1, len(PLACES) - 1)}
BABI_TASKS = tuple(sorted(FACT_BOUNDS))


def babi_story(task: str, num_facts: int, rng: random.Random) -> Story:
    """A story of one of the five tasks; see the head of this file.

    Args:
        task: `"qa1"` to `"qa5"`.
        num_facts: Sentences, at least 1, 2, 3, 1, 3 in this order; at most 11 in qa4.
        rng: Source of all randomness.

    Raises:
        ValueError: If there is no such task, or not such a number of facts in it.

    Source: tasks 1 to 5 of Weston et al. 2015, "Towards AI-Complete Question Answering"; world and sentences are ours.
    """
    if task not in FACT_BOUNDS:
        raise ValueError(f"task must be one of {', '.join(BABI_TASKS)}, got {task!r}: choose one of them.")
    fewest, most = FACT_BOUNDS[task]
    if num_facts < fewest or (most is not None and num_facts > most):
        bounds = f"at least {fewest}" if most is None else f"from {fewest} to {most}"
        raise ValueError(f"num_facts must be {bounds} in {task}, got {num_facts}: choose another number.")
    if task == "qa4":
        return map_story(num_facts, rng)
    plot = PLOTS[task]
    while True:  # until something has happened that can be asked about: a few tries
        world, facts = World(), []
        for _ in range(num_facts):
            in_turn = rng.sample(plot.actions, len(plot.actions))
            action, ways = next((action, ways) for action in in_turn if (ways := world.possible(action)))
            words = rng.choice(ways)
            world.happen(action, *words)
            facts.append(rng.choice(ACTIONS[action]).format(*words))
        asked = plot.ask(world, rng)
        if asked is not None:
            return Story(facts, *asked)


def map_story(num_facts: int, rng: random.Random) -> Story:
    """qa4: places on a grid; each fact says which is just north (south, east, west) of which."""
    start, *others = rng.sample(PLACES, num_facts + 1)
    square_of = {start: (0, 0)}
    relations = []  # (place, direction, other): the place is just in this direction of the other
    for place in others:
        taken = set(square_of.values())
        free = [
            (other, direction, square)
            for other, (x, y) in square_of.items()
            for direction, (dx, dy) in DIRECTIONS.items()
            if (square := (x + dx, y + dy)) not in taken
        ]
        other, direction, square_of[place] = rng.choice(free)
        relations.append((place, direction, other))

    def turn(place: str, direction: str, other: str) -> tuple[str, str, str]:
        return rng.choice([(place, direction, other), (other, OPPOSITE[direction], place)])

    rng.shuffle(relations)
    relations = [turn(*relation) for relation in relations]
    facts = ["The {} is just {} of the {}.".format(*relation) for relation in relations]
    place, direction, other = turn(*rng.choice(relations))
    if rng.random() < 0.5:
        return Story(facts, f"What is just {direction} of the {other}?", place)
    return Story(facts, f"What is the {place} just {direction} of?", other)


class Background(NamedTuple):
    """Real text that facts are spread in, as `read_background` makes it.

    Args:
        token_ids: (N,) int64.
        ends: For each sentence the number of tokens up to its end; rising.
        tokenizer: What it was cut with.
    """

    token_ids: torch.Tensor
    ends: list[int]
    tokenizer: PreTrainedTokenizerBase


def split_sentences(text: str) -> list[str]:
    """Sentences in order, the blanks before each kept with it, so that joined they are the text again.

    Args:
        text: Any text; a sentence ends with `.`, `!` or `?`, closing quotes and brackets, and a blank after them.
    """
    ends = [match.end() for match in re.finditer(r"[.!?]['\"\u2019\u201d)\]]*(?=\s)", text)]
    sentences = [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]
    return [sentence for sentence in sentences if sentence]


def read_background(text: str | Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Background:
    """Cuts a text into sentences and these into tokens, once for all rows.

    Args:
        text: A book, or its sentences, each with the blank before it.
        tokenizer: Of the model that is to read it.

    Raises:
        ValueError: If there is no text.
    """
    sentences = split_sentences(text) if isinstance(text, str) else list(text)
    if not sentences:
        raise ValueError(f"text must have at least one sentence, got {text!r}: give a book, or its sentences.")
    cut = tokenizer(sentences, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    token_ids = torch.tensor([token for sentence in cut for token in sentence])
    return Background(token_ids, list(itertools.accumulate(map(len, cut))), tokenizer)


def spread(story: Story, background: Background, length: int, distance: Distance, rng: random.Random) -> TaskBatch:
    """One row: a random slice of the text, the facts in order between its sentences, then question and answer.

    The slice ends with a sentence, may begin within one, and is as long as the row has room for; it is the first that
    has room for the facts at this distance, from a random sentence on. Where a fact goes is drawn among the ends of
    sentences, independently of the others but for their order.

    Args:
        story: What to tell and to ask.
        background: Real text.
        length: T, tokens of the row with all that is in it.
        distance: Tokens between any fact and the question at least; with (least, greatest), all facts stand as a
            whole within the `greatest` tokens before the question.
        rng: Source of all randomness.

    Returns:
        `input_ids` and `labels` (1, T); the labels are the tokens of the answer, at the end of the row.

    Raises:
        ValueError: If the text is too short, the row too short for the story, no end of a sentence lies at such a
            distance, or the tokenizer does not know the answer.

    Source: Kuratov et al. 2024, "BABILong"; distances are ours.
    """
    tokenizer = background.tokenizer
    texts = [*(f" {fact}" for fact in story.facts), f"\nQuestion: {story.question}\nAnswer:", f" {story.answer}"]
    *facts, question, answer = (tokenizer.encode(text, add_special_tokens=False) for text in texts)
    if story.answer not in tokenizer.decode(answer):
        raise ValueError(f"tokenizer must know the word {story.answer!r}, got {answer}: use one that knows all bytes.")
    told = sum(map(len, facts))
    size = length - told - len(question) - len(answer)
    num_tokens = len(background.token_ids)
    if not 0 <= size <= num_tokens:
        raise ValueError(
            f"length must be from {length - size} (this story) to {length - size + num_tokens} (with all of the text), "
            f"got {length}: give fewer facts or more text."
        )
    least, greatest = (distance, distance + length) if isinstance(distance, int) else distance
    if not 0 <= least <= greatest:
        raise ValueError(
            f"distance must be tokens, or (least, greatest), from 0 up, got {distance}: give the smaller one first."
        )
    # A position is a number of tokens of the slice; all of the facts may come behind the first of them.
    first, last = max(0, size + told - greatest), size - least
    ends = background.ends
    begin = bisect.bisect_left(ends, size)
    chosen = rng.randrange(begin, len(ends))
    for index in itertools.chain(range(chosen, len(ends)), range(begin, chosen)):
        start = ends[index] - size
        room = ends[bisect.bisect_left(ends, start + first) : bisect.bisect_right(ends, start + last)]
        if room:
            break
    else:
        raise ValueError(
            f"distance must leave room for {told} tokens of facts from the end of a sentence on, got {distance} with "
            f"length = {length}: give a wider range, a larger length or fewer facts."
        )
    positions = [start, *sorted(rng.choices(room, k=len(facts))), start + size]
    parts = []
    for (begin, end), fact in zip(itertools.pairwise(positions), [*facts, question + answer], strict=True):
        parts += [background.token_ids[begin:end], torch.tensor(fact)]
    input_ids = torch.cat(parts)[None]
    labels = torch.full_like(input_ids, IGNORED)
    labels[:, -len(answer) :] = input_ids[:, -len(answer) :]
    return TaskBatch(input_ids, labels)


def babi_batch(
    rows: int,
    length: int,
    distance: Distance = 0,
    *,
    generator: torch.Generator,
    task: str,
    background: Background,
    num_facts: int = 4,
) -> TaskBatch:
    """Rows of different stories of one task, each spread in another slice of the text.

    Args:
        rows: B, at least 1.
        length: T.
        distance: As in `spread`.
        generator: Source of all randomness; the rows are on its device.
        task: `"qa1"` to `"qa5"`.
        background: Real text.
        num_facts: Sentences of a story.

    Raises:
        ValueError: As `babi_story` and `spread` do, or if there is no row.
    """
    require_positive(rows=rows)
    rng = random.Random(int(torch.randint(2**62, (), generator=generator, device=generator.device)))
    parts = [spread(babi_story(task, num_facts, rng), background, length, distance, rng) for _ in range(rows)]
    input_ids, labels = (torch.cat(tensors).to(generator.device) for tensors in zip(*parts, strict=True))
    return TaskBatch(input_ids, labels)


def babi_tasks(background: Background) -> dict[str, Task]:
    """The five tasks in this text, as `experiments.tasks.TASKS` has them."""
    return {
        task: Task(partial(babi_batch, task=task, background=background), len(background.tokenizer))
        for task in BABI_TASKS
    }
