"""bAbI-style stories: parsed and simulated here from their sentences, alone and out of the text they are spread in."""

import random
import re
from collections import Counter

import pytest
import torch

from experiments.stories import (
    BABI_TASKS,
    OBJECTS,
    PERSONS,
    PLACES,
    Story,
    babi_batch,
    babi_story,
    babi_tasks,
    read_background,
    split_sentences,
    spread,
)
from helpers import tiny_tokenizer
from rmt_hf.data import train_tokenizer


FEWEST = {"qa1": 1, "qa2": 2, "qa3": 3, "qa4": 1, "qa5": 3}
BOOK = "".join(f" Line {number} of the book{', it is long' * (number % 4)} is here." for number in range(400))
STEPS = {"north": (0, 1), "south": (0, -1), "east": (1, 0), "west": (-1, 0)}
MOVE = r"([A-Z]\w+) (?:went|moved|walked|travelled) to the (\w+)\."
TAKE = r"([A-Z]\w+) (?:took|picked up|grabbed) the (\w+)\."
DROP = r"([A-Z]\w+) (?:dropped|put down|discarded) the (\w+)\."
GIVE = r"([A-Z]\w+) (?:gave|handed|passed) the (\w+) to (\w+)\."
SIDE = r"The (\w+) is just (\w+) of the (\w+)\."
FACT = re.compile("|".join(re.sub(r"\((?!\?)", "(?:", form) for form in (MOVE, TAKE, DROP, GIVE, SIDE)))


@pytest.fixture(scope="module")
def background():
    return read_background(BOOK, train_tokenizer([BOOK], 300))


def solve_map(facts: list[str], question: str) -> str:
    """Puts the places on a map, step by step from one of them, and looks where the question points."""
    sides = [re.fullmatch(SIDE, fact).groups() for fact in facts]
    squares = {sides[0][0]: (0, 0)}
    while len(squares) < len(sides) + 1:  # a tree: one place more than facts
        for place, direction, other in sides:
            dx, dy = STEPS[direction]
            if other in squares:
                squares[place] = (squares[other][0] + dx, squares[other][1] + dy)
            elif place in squares:
                squares[other] = (squares[place][0] - dx, squares[place][1] - dy)
    assert len(set(squares.values())) == len(squares)
    if match := re.fullmatch(r"What is just (\w+) of the (\w+)\?", question):
        (direction, place), sign = match.groups(), 1
    else:
        (place, direction), sign = re.fullmatch(r"What is the (\w+) just (\w+) of\?", question).groups(), -1
    x, y = squares[place]
    dx, dy = STEPS[direction]
    return {square: name for name, square in squares.items()}[x + sign * dx, y + sign * dy]


def solve(facts: list[str], question: str) -> str:
    """The answer, by reading the sentences one after another; fails where one contradicts those before it."""
    if "just" in question:
        return solve_map(facts, question)
    where, holder, way, gifts = {}, {}, {}, []
    for fact in facts:
        if match := re.fullmatch(MOVE, fact):
            person, place = match.groups()
            assert where.get(person) != place
            where[person] = place
            for thing in [thing for thing in holder if holder[thing] == person]:
                way[thing].append(place)
        elif match := re.fullmatch(TAKE, fact):
            person, thing = match.groups()
            assert thing not in holder and way.get(thing, [where[person]])[-1] == where[person]
            holder[thing] = person
            way.setdefault(thing, [where[person]])
        elif match := re.fullmatch(DROP, fact):
            person, thing = match.groups()
            assert holder.pop(thing) == person
        else:
            person, thing, other = re.fullmatch(GIVE, fact).groups()
            assert holder[thing] == person != other and where.setdefault(other, where[person]) == where[person]
            holder[thing] = other
            gifts.insert(0, (person, thing, other))
    assert not [thing for thing in holder if way[thing][-1] != where[holder[thing]]]
    if match := re.fullmatch(r"Where is the (\w+)\?", question):
        return way[match[1]][-1]
    if match := re.fullmatch(r"Where is (\w+)\?", question):
        return where[match[1]]
    if match := re.fullmatch(r"Where was the (\w+) before it was in the (\w+)\?", question):
        places = way[match[1]]
        assert places.count(match[2]) == 1
        return places[places.index(match[2]) - 1] if places.index(match[2]) else "nowhere"
    for pattern, answer in (
        (r"What did (?P<giver>\w+) last give to (?P<receiver>\w+)\?", 1),
        (r"Who last gave the (?P<thing>\w+) to (?P<receiver>\w+)\?", 0),
        (r"To whom did (?P<giver>\w+) last give the (?P<thing>\w+)\?", 2),
    ):
        if match := re.fullmatch(pattern, question):
            asked = match.groupdict().items()
            named = [dict(zip(("giver", "thing", "receiver"), gift, strict=True)) for gift in gifts]
            latest = next(gift for gift in named if asked <= gift.items())
            return list(latest.values())[answer]
    raise AssertionError(question)


@pytest.mark.parametrize("num_facts", ["fewest", 6, 11])
@pytest.mark.parametrize("task", BABI_TASKS)
def test_a_simulation_from_the_sentences_finds_every_answer(task, num_facts):
    rng, num_facts = random.Random(0), FEWEST[task] if num_facts == "fewest" else num_facts
    questions, forms, sentences = set(), set(), set()
    for _ in range(400):
        story = babi_story(task, num_facts, rng)
        assert len(story.facts) == num_facts
        assert story.answer == solve(story.facts, story.question)
        questions.add(story.question)
        sentences |= set(story.facts)
        forms.add(" ".join(word for word in re.findall(r"\w+", story.question) if word not in PLACES))
    assert len(questions) >= len(PERSONS) and len(sentences) > 70  # of 132 in qa4, more elsewhere
    if task == "qa4":
        assert forms == {f"What is just {side} of the" for side in STEPS} | {
            f"What is the just {side} of" for side in STEPS
        }
    if task == "qa5":
        assert {question.split()[0] for question in questions} == {"What", "Who", "To"}


@pytest.mark.parametrize("task", BABI_TASKS)
def test_every_answer_comes_and_none_is_a_good_guess(task):
    rng = random.Random(1)
    answers = Counter(babi_story(task, 8, rng).answer for _ in range(1200))
    expected = {*PERSONS, *OBJECTS} if task == "qa5" else set(PLACES)
    assert set(answers) == expected
    # Twelve answers (in qa5 two kinds of six, persons twice as often): the best guess is right about 1 time in 12 (9).
    assert max(answers.values()) / 1200 < 1.4 / (9 if task == "qa5" else 12)


def test_maps_are_told_in_no_order():
    """Told in the order in which it is drawn, every map would begin with two facts about one place."""
    rng, apart = random.Random(0), 0
    for _ in range(100):
        first, second = (set(re.fullmatch(SIDE, fact).group(1, 3)) for fact in babi_story("qa4", 6, rng).facts[:2])
        apart += not first & second
    assert 20 < apart < 90


def test_later_facts_count():
    """Stories in which the first mention would be the wrong answer are common: no shortcut by the first fact."""
    rng, changed = random.Random(2), Counter()
    for task in ("qa1", "qa2"):
        for _ in range(300):
            story = babi_story(task, 12, rng)
            mentioned = [word for fact in story.facts for word in re.findall(r"\w+", fact) if word in PLACES]
            changed[task] += story.answer != mentioned[0]
            changed[task, "last"] += story.answer != mentioned[-1]
    assert all(count > 150 for count in changed.values())


def test_stories_by_seed():
    for task in BABI_TASKS:
        stories = [[babi_story(task, 5, rng) for _ in range(3)] for rng in map(random.Random, (0, 0, 1))]
        assert stories[0] == stories[1] != stories[2]
        assert stories[0][0] != stories[0][1]


@pytest.mark.parametrize(
    ("task", "num_facts", "message"),
    [
        ("qa6", 3, "task must be one of qa1, qa2, qa3, qa4, qa5, got 'qa6'"),
        *((task, fewest - 1, f"num_facts must be .*{fewest}.* in {task}, got") for task, fewest in FEWEST.items()),
        ("qa4", 12, "num_facts must be from 1 to 11 in qa4, got 12"),
    ],
)
def test_impossible_stories(task, num_facts, message):
    with pytest.raises(ValueError, match=message):
        babi_story(task, num_facts, random.Random(0))


def test_sentences():
    text = 'He said: "Go! Now." (Why?) Version 2.5 ran\n\n  on.\nThe end'
    sentences = ['He said: "Go!', ' Now."', " (Why?)", " Version 2.5 ran\n\n  on.", "\nThe end"]
    assert split_sentences(text) == sentences
    assert split_sentences("No end") == ["No end"] and split_sentences("") == []
    assert len(split_sentences(BOOK)) == 400 and "".join(split_sentences(BOOK)) == BOOK


def test_background_is_the_book(background):
    assert background.tokenizer.decode(background.token_ids) == BOOK
    assert background.ends[-1] == len(background.token_ids) and len(background.ends) == 400
    assert background.tokenizer.decode(background.token_ids[: background.ends[4]]) == "".join(split_sentences(BOOK)[:5])
    again = read_background(split_sentences(BOOK), background.tokenizer)
    assert torch.equal(again.token_ids, background.token_ids) and again.ends == background.ends


def columns_of(row: list[int], text: str, tokenizer) -> tuple[int, int]:
    """First and last position of a text that comes once in a row."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    starts = [start for start in range(len(row)) if row[start : start + len(ids)] == ids]
    assert len(starts) == 1
    return starts[0], starts[0] + len(ids) - 1


@pytest.mark.parametrize("distance", [0, 150, (0, 130), (100, 260), (40, 150)])
def test_facts_between_sentences_at_their_distance(background, distance):
    tokenizer, rng = background.tokenizer, random.Random(0)
    least, greatest = (distance, 400) if isinstance(distance, int) else distance
    story = Story(["Nadia went to the attic.", "Nadia took the kettle."], "Where is the kettle?", "attic")
    end = f"\nQuestion: {story.question}\nAnswer: {story.answer}"
    nearest, farthest, slices = [], [], set()
    for _ in range(200):
        batch = spread(story, background, 400, distance, rng)
        assert batch.input_ids.shape == batch.labels.shape == (1, 400)
        assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
        row, labels = batch.input_ids[0].tolist(), batch.labels[0].tolist()
        answer = tokenizer.encode(" attic", add_special_tokens=False)
        assert labels == [-100] * (400 - len(answer)) + answer == [-100] * (400 - len(answer)) + row[-len(answer) :]
        text = tokenizer.decode(row)
        assert text.endswith(end)
        first, second = (text.index(" " + fact) for fact in story.facts)
        assert first < second and all(index == 0 or text[index - 1] == "." for index in (first, second))
        chosen = text.removesuffix(end).replace(" " + story.facts[0], "").replace(" " + story.facts[1], "")
        assert chosen in BOOK and chosen.endswith(".")
        slices.add(chosen)
        question = columns_of(row, end[: end.index(" attic")], tokenizer)[0]
        spans = [columns_of(row, " " + fact, tokenizer) for fact in story.facts]
        nearest.append(question - spans[1][1] - 1)
        farthest.append(question - spans[0][0])
    assert min(nearest) >= least and max(farthest) <= greatest
    # No sentence of the book has more than 60 tokens, so all of the range is used.
    longest = max(end - start for start, end in zip([0, *background.ends], background.ends, strict=False))
    assert longest < 60
    assert min(nearest) <= least + longest and max(farthest) >= min(greatest, question) - longest
    assert len(slices) > 100


@pytest.mark.parametrize("task", BABI_TASKS)
def test_batch_is_solved_from_its_text(background, task):
    generate, vocab_size = babi_tasks(background)[task]
    batch = generate(40, 500, (20, 350), generator=torch.Generator().manual_seed(0))
    assert batch.input_ids.shape == batch.labels.shape == (40, 500)
    assert vocab_size == len(background.tokenizer) and batch.input_ids.max() < vocab_size
    stories = set()
    for row, labels in zip(batch.input_ids, batch.labels, strict=True):
        text = background.tokenizer.decode(row)
        facts = FACT.findall(text)
        question = re.search(r"\nQuestion: (.*)\nAnswer: \w+$", text)[1]
        answer = background.tokenizer.decode(labels[labels != -100])
        assert answer == " " + solve(facts, question) and text.endswith(answer)
        assert len(facts) == 4
        stories.add(tuple(facts))
    assert len(stories) == 40
    again = generate(40, 500, (20, 350), generator=torch.Generator().manual_seed(0))
    other = generate(40, 500, (20, 350), generator=torch.Generator().manual_seed(1))
    assert torch.equal(batch.input_ids, again.input_ids) and not torch.equal(batch.input_ids, other.input_ids)


def test_exact_lengths_and_rows_without_text(background):
    story = Story(["Nadia went to the attic."], "Where is Nadia?", "attic")
    text = f" {story.facts[0]}\nQuestion: {story.question}\nAnswer: attic"
    shortest = sum(
        len(background.tokenizer.encode(part, add_special_tokens=False))
        for part in (f" {story.facts[0]}", f"\nQuestion: {story.question}\nAnswer:", " attic")
    )
    for length in (shortest, shortest + 60, shortest + len(background.token_ids)):
        row = spread(story, background, length, 0, random.Random(0)).input_ids
        assert row.shape == (1, length)
        assert (background.tokenizer.decode(row[0]) == text) == (length == shortest)
    for length in (shortest - 1, shortest + len(background.token_ids) + 1):
        with pytest.raises(ValueError, match=rf"length must be from {shortest} .*, got {length}"):
            spread(story, background, length, 0, random.Random(0))


def test_the_only_place_is_found(background):
    """One sentence is short enough for a fact before it: every start, also one behind it, leads to that slice."""
    sentences = [" " + "long " * 60 + "one."] * 4 + [" Short one."]
    book = read_background(sentences + [" " + "long " * 60 + "end."] * 3, background.tokenizer)
    story = Story(["Nadia went to the attic."], "Where is Nadia?", "attic")
    for seed in range(20):
        ids = spread(story, book, 200, (5, 60), random.Random(seed)).input_ids[0]
        assert "one. Nadia went to the attic. Short one.\nQuestion" in book.tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("length", "distance", "message"),
    [
        (200, (1, 3), r"distance must leave room for \d+ tokens of facts .* got \(1, 3\) with length = 200"),
        (200, 190, "distance must leave room .* got 190"),
        (200, (60, 40), r"distance must be tokens.* from 0 up, got \(60, 40\)"),
        (200, -1, "distance must be tokens.* from 0 up, got -1"),
    ],
)
def test_no_room_at_that_distance(background, length, distance, message):
    story = Story(["Nadia went to the attic."], "Where is Nadia?", "attic")
    with pytest.raises(ValueError, match=message):
        spread(story, background, length, distance, random.Random(0))


def test_what_no_batch_can_be_made_of(background):
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match="text must have at least one sentence, got ''"):
        read_background("", background.tokenizer)
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        babi_batch(0, 300, generator=generator, task="qa1", background=background)
    words = read_background([" w3 w4 w5"] * 50, tiny_tokenizer())  # knows no place
    with pytest.raises(ValueError, match="tokenizer must know the word"):
        babi_batch(2, 60, generator=generator, task="qa1", background=words)
