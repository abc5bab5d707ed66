"""Synthetic tasks: slow solvers that read only the input ids find every label, at the distance that was asked for."""

import inspect
import math
from collections import Counter

import pytest
import torch

from experiments.tasks import TASKS, TaskBatch, accuracy, associative_recall, copying, counting, needle, overwriting


LENGTH = 96
# Of each task at its defaults: answers, names (the question mark follows), tokens of the answer, tokens before it.
SHAPES = {
    "needle": (16, 16, 1, 2),
    "passkey": (10, 16, 5, 2),
    "overwriting": (16, 16, 1, 2),
    "copying": (16, 0, 8, 1),
    "reversing": (16, 0, 8, 1),
    "counting": (8, 4, 1, 2),
}
# The longest distance in a row of 96 tokens: what facts, question and answer leave.
LONGEST = {"needle": 91, "passkey": 83, "overwriting": 87, "copying": 79, "reversing": 79, "counting": 61}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(name: str, rows: int, distance, seed: int = 0, **options) -> TaskBatch:
    return TASKS[name].generate(rows, LENGTH, distance, generator=seeded(seed), **options)


def solve(name: str, row: list[int]) -> tuple[list[int], int]:
    """The answer to the question at the end of a row, and the distance, from the tokens before the answer alone."""
    num_values, num_names, num_answers, num_before = SHAPES[name]
    question = len(row) - num_answers - num_before
    text, asked = row[:question], row[question : question + num_before]
    assert asked[0] == num_values + num_names
    assert asked[0] not in text and max(row) <= asked[0] + 64
    if name in ("copying", "reversing"):
        positions = [position for position, token in enumerate(text) if token < num_values]
        assert positions == list(range(positions[0], positions[0] + 8))
        said = [text[position] for position in positions]
        return said[::-1] if name == "reversing" else said, question - positions[-1] - 1
    if name == "counting":
        positions = [position for position, token in enumerate(text) if token == asked[1]]
        assert not [token for token in text if token < num_values]
        return [len(positions)], question - max(positions, default=0) - 1
    facts = {}
    for position, token in enumerate(text):
        if num_values <= token < num_values + num_names:
            facts[token] = (text[position + 1 : position + 1 + num_answers], question - position - 1 - num_answers)
    return facts[asked[1]]


@pytest.mark.parametrize("distance", [0, 1, 17, "longest", (5, 40)])
@pytest.mark.parametrize("name", SHAPES)
def test_a_slow_solver_finds_every_label(name, distance):
    distance = LONGEST[name] if distance == "longest" else distance
    least, greatest = (distance, distance) if isinstance(distance, int) else distance
    batch = draw(name, 200, distance)
    num_answers, found = SHAPES[name][2], Counter()
    assert batch.input_ids.shape == batch.labels.shape == (200, LENGTH)
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    for row, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
        answer, between = solve(name, row)
        assert labels == [-100] * (LENGTH - num_answers) + answer
        assert row[-num_answers:] == answer  # read along
        if name != "counting":  # where its stretch ends does not show in a single row
            assert least <= between <= greatest
            found[between] += 1
    if name != "counting":
        assert {least, greatest} <= set(found) and len(found) > (greatest - least) * 0.8


@pytest.mark.parametrize("distance", [0, 20])
def test_counted_symbols_lie_in_their_stretch(distance):
    options = {"span": 10, "max_count": 3, "num_symbols": 2}  # values 0 .. 3, symbols 4 and 5
    input_ids = counting(400, LENGTH, distance, generator=seeded(), **options).input_ids[:, :-3]
    positions = ((input_ids == 4) | (input_ids == 5)).sum(0).nonzero()[:, 0]
    end = LENGTH - 3 - distance
    assert positions.tolist() == list(range(end - 10, end))
    counts = torch.stack([(input_ids == symbol).sum(1) for symbol in (4, 5)])
    for pair in [(a, b) for a in range(4) for b in range(4)]:  # independent of each other
        assert abs((torch.tensor(pair) == counts.T).all(1).sum().item() - 25) < 5 * 25**0.5


def test_needle_tells_as_many_facts_as_asked_and_asks_any():
    batch = needle(300, LENGTH, (0, 60), generator=seeded(), num_facts=5, num_keys=6, num_values=7, value_length=2)
    others = Counter()
    for row in batch.input_ids.tolist():
        keys = [position for position, token in enumerate(row[:-4]) if 7 <= token < 13]
        assert len({row[position] for position in keys}) == len(keys) == 5 and row[-3] in [
            row[position] for position in keys
        ]
        assert all(row[position + 1] < 7 and row[position + 2] < 7 for position in keys)
        assert sum(token < 7 for token in row[:-4]) == 10
        others.update(position for position in keys if row[position] != row[-3])
    assert min(others) <= 2 and max(others) >= LENGTH - 4 - 5  # from the beginning to the question
    assert set(batch.input_ids[:, -3].tolist()) == set(range(7, 13))


@pytest.mark.parametrize(("length", "distance"), [(96, 30), (96, 31), (95, 31)])
def test_every_key_is_overwritten_and_every_place_is_used(length, distance):
    options = {"num_facts": 3, "num_assignments": 4, "num_keys": 5}  # values 0 .. 15, keys 16 .. 20
    batch, used, after = overwriting(300, length, distance, generator=seeded(), **options), set(), 0
    for row in batch.input_ids.tolist():
        positions = [position for position, token in enumerate(row[:-3]) if 16 <= token <= 20]
        assert sorted(Counter(row[position] for position in positions).values()) == [4, 4, 4]
        assert all(row[position + 1] < 16 for position in positions)
        used.update(positions)
        asked = [position for position in positions if row[position] == row[-2]]
        after += max(positions) > max(asked)
        assert max(asked) == length - 3 - distance - 2
    assert used == set(range(max(asked) % 2, length - 4, 2)) and 200 < after < 300


def test_a_full_row_and_the_smallest_one():
    batch = overwriting(50, 28, (0, 18), generator=seeded(), num_facts=4, num_assignments=3)
    assert ((batch.input_ids[:, :-3] >= 16) & (batch.input_ids[:, :-3] < 32)).sum(1).tolist() == [12] * 50
    assert needle(3, 6, 0, generator=seeded()).input_ids[:, 3].tolist() == [32] * 3
    batch = copying(3, 3, 0, generator=seeded(), num_items=1)
    assert (batch.input_ids[:, 0] == batch.labels[:, 2]).all() and (batch.input_ids[:, 1] == 16).all()


def test_needle_in_real_text():
    text = torch.arange(LENGTH + 2) + 100  # a slice shows where it was taken from
    batch = needle(100, LENGTH, 50, generator=seeded(), haystack=text, first_token=300)
    offsets = set()
    for row in batch.input_ids.tolist():
        own = [position for position, token in enumerate(row) if token >= 300]
        assert own == [LENGTH - 55, LENGTH - 54, LENGTH - 3, LENGTH - 2, LENGTH - 1]
        assert row[own[0]] == row[-2] and 316 <= row[-2] < 332 and row[-3] == 332
        assert row[own[1]] == row[-1] and 300 <= row[-1] < 316
        starts = {token - position for position, token in enumerate(row) if position not in own}
        assert len(starts) == 1
        offsets |= starts
    assert offsets == {100, 101, 102}
    assert text.tolist() == list(range(100, 100 + LENGTH + 2))


@pytest.mark.parametrize("distance", [0, 7, (0, 20), (9, 23)])
def test_associative_recall_of_plain_rows(distance):
    least, greatest = (distance, 89) if isinstance(distance, int) else distance
    batch = associative_recall(
        500, 97, distance, generator=seeded(), num_pairs=3, vocab_size=20, random_non_queries=False
    )
    gaps = set()
    for row, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
        values = dict(zip(row[0:6:2], row[1:6:2], strict=True))
        assert len(values) == len(set(values.values())) == 3
        assert all(1 <= key < 10 <= value < 20 for key, value in values.items())
        expected = [-100] * 97
        for position in range(6, 97):
            if 1 <= row[position] < 20:
                gaps.add(position - 6)
                expected[position + 1] = values.pop(row[position])  # each is asked once
            elif row[position] == 0:
                assert least <= position - 6 <= greatest + 1
            else:
                assert 20 <= row[position] < 84 and not least <= position - 6 < greatest
        assert labels == expected and not values
    assert gaps == set(range(least, greatest + 1, 2))


def test_associative_recall_among_random_tokens():
    batch = associative_recall(300, 64, 6, generator=seeded(), num_pairs=4, vocab_size=40)
    assert ((batch.input_ids[:, 8:14] >= 40) & (batch.input_ids[:, 8:14] < 104)).all()
    among = batch.input_ids[:, 14:]
    assert set(among.unique().tolist()) == set(range(40))  # also keys that are not asked, values and 0
    for row, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
        asked = [position for position, label in enumerate(labels) if label != -100]
        assert sorted(row[position - 1] for position in asked) == sorted(row[0:8:2])
        assert all(labels[position] == row[row.index(row[position - 1]) + 1] for position in asked)
    after = batch.labels != -100
    assert (batch.input_ids[after] == batch.labels[after]).float().mean() < 0.1  # the answer is not in the input
    assert set(batch.labels[after].tolist()) == set(range(20, 40))


@pytest.mark.parametrize("power", [0.01, 1.0])
def test_gaps_follow_the_power_law(power):
    rows, slots = 20_000, 6
    batch = associative_recall(
        rows, 16, generator=seeded(), num_pairs=2, vocab_size=10, power=power, random_non_queries=False
    )
    weights = [n ** (power - 1) for n in range(1, slots + 1)]
    share = [weight / sum(weights) for weight in weights]
    queries = batch.input_ids[:, 4::2]
    first, second = ((queries == batch.input_ids[:, [pair]]).int().argmax(1) for pair in (0, 2))
    for one in range(slots):
        for other in range(slots):
            expected = 0 if one == other else share[one] * share[other] / (1 - share[one])
            got = ((first == one) & (second == other)).float().mean().item()
            assert abs(got - expected) <= 5 * math.sqrt(expected * (1 - expected) / rows)


@pytest.mark.parametrize("name", TASKS)
def test_seed_alone_decides(name):
    before = torch.get_rng_state()
    batch, again, other = (draw(name, 4, (0, 60), seed) for seed in (1, 1, 2))
    assert torch.equal(batch.input_ids, again.input_ids) and torch.equal(batch.labels, again.labels)
    assert not torch.equal(batch.input_ids, other.input_ids)
    generator = seeded(1)
    TASKS[name].generate(4, LENGTH, 0, generator=generator)
    following = TASKS[name].generate(4, LENGTH, (0, 60), generator=generator)
    assert not torch.equal(batch.input_ids, following.input_ids)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", TASKS)
def test_table_of_tasks(name):
    batch = draw(name, 4000, 4)  # so many rows hold every id
    assert batch.input_ids.min() == 0
    assert batch.input_ids.max() == TASKS[name].vocab_size - 1
    defaults = inspect.signature(TASKS[name].generate).parameters
    assert list(defaults)[:3] == ["rows", "length", "distance"]


@pytest.mark.parametrize("name", SHAPES)
def test_knowing_guessing_and_chance(name):
    batch, num_values = draw(name, 800, (0, 50)), SHAPES[name][0]
    vocab_size = TASKS[name].vocab_size
    knows = torch.nn.functional.one_hot(batch.labels.clamp(0).roll(-1, 1), vocab_size).float()
    assert accuracy(knows, batch.labels).tolist() == [1.0] * 800
    asked = batch.labels[batch.labels != -100]
    for value in range(num_values):  # a guesser who always says the same: each value comes equally often
        logits = torch.zeros(vocab_size).index_fill_(0, torch.tensor([value]), 1.0).expand(800, LENGTH, -1)
        spread = math.sqrt((1 / num_values) * (1 - 1 / num_values) / len(asked))
        assert abs(accuracy(logits, batch.labels).mean().item() - 1 / num_values) < 5 * spread


def test_accuracy_by_hand():
    labels = torch.tensor([[1, -100, 2, 0], [-100, 1, 1, 1], [2, -100, -100, -100]])
    said = torch.tensor([[0, 2, 1, 2], [1, 0, 1, 0], [2, 2, 2, 2]])  # by position, of what comes next
    result = accuracy(torch.nn.functional.one_hot(said, 3).float(), labels)
    assert result[0] == 0.5 and abs(result[1] - 2 / 3) < 1e-6 and result[2].isnan()
    assert result.shape == (3,)


@pytest.mark.parametrize(
    ("make", "arguments", "options", "message"),
    [
        (needle, (2, 30, 26), {}, r"distance must be .* from 0 to 25, got 26: .* larger length"),
        (needle, (2, 30, -1), {}, "distance must be .* got -1"),
        (needle, (2, 30, (9, 8)), {}, r"distance must be .* got \(9, 8\)"),
        (needle, (0, 30, 1), {}, "rows must be at least 1, got 0"),
        (needle, (2, 30, 1), {"num_facts": 17}, "num_facts must be at most num_keys = 16, got 17"),
        (needle, (2, 30, 1), {"num_facts": 0}, "num_facts must be at least 1, got 0"),
        (needle, (2, 30, 1), {"value_length": 0}, "value_length must be at least 1, got 0"),
        (needle, (2, 30, 1), {"num_values": 0}, "num_values must be at least 1, got 0"),
        (needle, (2, 30, 1), {"num_noise": 0}, "num_noise must be at least 1, got 0"),
        (needle, (2, 29, 1), {"num_facts": 13}, "length must be at least 30 .* got 29"),
        (needle, (2, 30, 1), {"haystack": torch.zeros(29, dtype=torch.long)}, r"haystack .* 30, got shape \(29,\)"),
        (needle, (2, 30, 1), {"haystack": torch.zeros(2, 30, dtype=torch.long)}, r"haystack .* got shape \(2, 30\)"),
        (needle, (2, 30, 1), {"haystack": torch.full((40,), 7), "first_token": 7}, "first_token .* got 7 .* of 7"),
        (overwriting, (2, 60, 52), {}, "distance must be .* from 0 to 51, got 52"),
        (overwriting, (2, 60, 0), {"num_assignments": 0}, "num_assignments must be at least 1, got 0"),
        (copying, (2, 30, 14), {}, "distance must be .* from 0 to 13, got 14"),
        (copying, (2, 30, 0), {"num_items": 0}, "num_items must be at least 1, got 0"),
        (counting, (2, 40, 6), {}, "distance must be .* from 0 to 5, got 6"),
        (counting, (2, 40, 0), {"span": 27}, "span must be at least .* = 28, got 27"),
        (counting, (2, 40, 0), {"max_count": 0}, "max_count must be at least 1, got 0"),
        (counting, (2, 40, 0), {"num_symbols": 0}, "num_symbols must be at least 1, got 0"),
        (associative_recall, (2, 30), {}, r"two positions for each of 8 queries, got 0 with length = 30"),
        (associative_recall, (2, 32, 1), {}, r"two positions for each of 8 queries, got 1 with length = 32"),
        (associative_recall, (2, 64, (0, 13)), {}, r"two positions for each of 8 queries, got \(0, 13\)"),
        (associative_recall, (2, 64, (0, 47)), {}, r"distance must be .* from 0 to 46, got \(0, 47\)"),
        (associative_recall, (2, 64), {"vocab_size": 16}, r"num_pairs must be below vocab_size // 2 = 8, got 8"),
        (associative_recall, (2, 64), {"num_pairs": 0}, "num_pairs must be at least 1, got 0"),
    ],
)
def test_bad_input(make, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        make(*arguments, generator=seeded(), **options)


def test_bounds_are_no_narrower_than_said():
    for make, arguments, options in [
        (needle, (2, 30, 25), {}),
        (needle, (2, 30, 1), {"num_facts": 13}),
        (needle, (2, 30, 1), {"haystack": torch.full((30,), 7), "first_token": 8}),
        (overwriting, (2, 60, 51), {}),
        (copying, (2, 30, 13), {}),
        (counting, (2, 40, 5), {"span": 32}),
        (counting, (2, 40, 0), {"span": 28}),
        (associative_recall, (2, 32, 0), {}),
        (associative_recall, (2, 64, (0, 46)), {}),
        (associative_recall, (2, 64, (0, 14)), {}),
        (associative_recall, (2, 64), {"vocab_size": 18}),
    ]:
        assert make(*arguments, generator=seeded(), **options).input_ids.shape == arguments[:2]
