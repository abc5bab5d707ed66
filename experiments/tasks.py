"""Synthetic long-context tasks, drawn afresh from a seed: facts, then a distance, then a question.

They are token ids for any causal language model. Every task takes a *distance*: the tokens between its facts and its
question. Asked at a distance that a model's window still spans, a task is its own baseline; asked beyond, only what
carries across the window can answer. `TASKS` names them, all with one signature.

Shapes: B rows, T tokens of a row. Token ids of a task, in this order: values (answers), names (keys or symbols), the
question mark, noise.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch.nn import functional as F


Distance = int | tuple[int, int]
IGNORED = -100
NUM_NOISE = 64


class TaskBatch(NamedTuple):
    """Rows of a task, ready for a causal language model of transformers.

    Args:
        input_ids: (B, T) int64, without padding.
        labels: (B, T) int64, not shifted: `labels[:, t]` is what to say after reading `input_ids[:, :t]`, and -100
            where nothing is asked. It need not be what stands at `input_ids[:, t]`.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor


class Alphabet(NamedTuple):
    """The token ids of a task.

    Args:
        num_values: Ids that are answers, at least 1; they come first.
        num_names: Ids of keys or symbols, at least 0.
        num_noise: Ids that mean nothing, at least 0; they come last, after the question mark.
        first_token: The first of all these ids.
    """

    num_values: int
    num_names: int
    num_noise: int = NUM_NOISE
    first_token: int = 0

    @property
    def first_name(self) -> int:
        """Id of the first name."""
        return self.first_token + self.num_values

    @property
    def question(self) -> int:
        """Id of the question mark."""
        return self.first_name + self.num_names

    @property
    def first_noise(self) -> int:
        """Id of the first noise token."""
        return self.question + 1

    @property
    def vocab_size(self) -> int:
        """What the vocabulary of a model must hold at least."""
        return self.first_noise + self.num_noise


class Task(NamedTuple):
    """A task as a script calls it: `task.generate(rows, length, distance, generator=generator)`.

    Args:
        generate: Returns a TaskBatch of `rows` rows, each of `length` tokens.
        vocab_size: The ids that it draws from are below.
    """

    generate: Callable[..., TaskBatch]
    vocab_size: int


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Share of the labels of each row that the model would say: the largest logit, one position before.

    Args:
        logits: (B, T, V), floating.
        labels: (B, T) int64, as in `TaskBatch`.

    Returns:
        (B,) float32; NaN in a row that asks nothing.

    Source: ours.
    """
    asked = labels[:, 1:] != IGNORED
    hits = (logits[:, :-1].argmax(-1) == labels[:, 1:]) & asked
    return hits.sum(1) / asked.sum(1)


def require_positive(**sizes: int) -> None:
    """Raises a ValueError unless every one of these sizes is at least 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}: give a positive number.")


def distance_bounds(distance: Distance, longest: int) -> tuple[int, int]:
    """The least and the greatest distance; an int means that it is both.

    Args:
        distance: Tokens, or a range of tokens with both ends included.
        longest: What a row has room for, tokens.

    Raises:
        ValueError: If the range is empty, begins below 0 or has no room.
    """
    least, greatest = (distance, distance) if isinstance(distance, int) else distance
    if not 0 <= least <= greatest <= longest:
        raise ValueError(
            f"distance must be tokens, or (least, greatest), from 0 to {longest}, got {distance}: the row has no room "
            f"for more beside its facts, its question and its answer; give a shorter distance or a larger length."
        )
    return least, greatest


def draw_distances(rows: int, distance: Distance, longest: int, generator: torch.Generator) -> torch.Tensor:
    """A distance for each row, uniform in its range, (B,) int64; raises as `distance_bounds` does."""
    least, greatest = distance_bounds(distance, longest)
    return integers(least, greatest + 1, (rows,), generator)


def integers(low: int, high: int, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Integers of this shape, low <= integer < high, int64, on the generator's device."""
    return torch.randint(low, high, shape, generator=generator, device=generator.device)


def uniform(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Numbers of this shape from 0 to 1, float32, on the generator's device."""
    return torch.rand(shape, generator=generator, device=generator.device)


def choose(rows: int, count: int, out_of: int, generator: torch.Generator) -> torch.Tensor:
    """In each row `count` different integers below `out_of`, in random order, (B, count) int64."""
    return uniform((rows, out_of), generator).topk(count).indices


def ask_at_the_end(input_ids: torch.Tensor, question: torch.Tensor, answer: torch.Tensor) -> TaskBatch:
    """Writes question (B, Q) and answer (B, A) over the end of the rows, in place; the answer is what is asked."""
    end = torch.cat([question, answer], 1)
    input_ids[:, -end.shape[1] :] = end
    return TaskBatch(input_ids, F.pad(answer, (input_ids.shape[1] - answer.shape[1], 0), value=IGNORED))


def associative_recall(
    rows: int,
    length: int,
    distance: Distance = 0,
    *,
    generator: torch.Generator,
    num_pairs: int = 8,
    vocab_size: int = 8192,
    power: float = 0.01,
    random_non_queries: bool = True,
    num_noise: int = NUM_NOISE,
) -> TaskBatch:
    """Multi-query associative recall: pairs of key and value first, then every key once more, to be answered.

    At distance 0 this is the protocol of Zoology. Keys are drawn without repetition from the lower half of the
    vocabulary (id 0 apart), values from the upper half. A query may stand at every second position behind the pairs;
    the n-th of these has probability proportional to n ** (power - 1), and each has one query at most. What stands
    between the queries is drawn from the whole vocabulary. The answer is not in the input.

    Args:
        rows: B, at least 1.
        length: T.
        distance: Tokens between the last pair and the first position of queries, filled with noise; with (least,
            greatest), no query comes after more than `greatest` tokens either, and noise fills the rest of the row.
        generator: Source of all randomness; its device is that of the rows.
        num_pairs: Keys, at least 1, fewer than half the vocabulary.
        vocab_size: Ids of keys, values and what stands between queries, at least 4; noise comes behind.
        power: Exponent of the law of gaps: 1 is uniform, smaller is nearer to the pairs.
        random_non_queries: Whether tokens between queries are random; otherwise they are 0.
        num_noise: Ids of noise, `vocab_size` to `vocab_size + num_noise - 1`; at least 1.

    Raises:
        ValueError: If a size is out of its bounds, or the queries have no room.

    Source: Arora et al. 2023, "Zoology: Measuring and Improving Recall in Efficient Language Models", section 4 and
    the published settings; distance and noise are ours.
    """
    require_positive(rows=rows, num_pairs=num_pairs, num_noise=num_noise)
    half = vocab_size // 2
    if num_pairs >= half:
        raise ValueError(
            f"num_pairs must be below vocab_size // 2 = {half}, got {num_pairs}: keys do not repeat; raise vocab_size."
        )
    facts = 2 * num_pairs  # tokens of the pairs
    longest = length - facts - 2  # from the pairs to the last position that leaves one for the answer
    least, greatest = distance_bounds(distance, longest)
    num_slots = ((longest if isinstance(distance, int) else greatest) - least) // 2 + 1
    if num_slots < num_pairs:
        raise ValueError(
            f"distance must leave two positions for each of {num_pairs} queries, got {distance} with length = {length}:"
            f" give a wider range, a shorter distance or a larger length."
        )
    first = facts + least
    keys = choose(rows, num_pairs, half - 1, generator) + 1
    values = choose(rows, num_pairs, vocab_size - half, generator) + half
    # The positions of queries are drawn one by one, by their weights and without repetition (Gumbel's trick).
    weights = torch.arange(1, num_slots + 1, device=keys.device) ** (power - 1)
    waiting = torch.empty(rows, num_slots, device=keys.device).exponential_(generator=generator) / weights
    queries = first + 2 * waiting.topk(num_pairs, largest=False).indices

    input_ids = integers(vocab_size, vocab_size + num_noise, (rows, length), generator)
    input_ids[:, :facts] = torch.stack([keys, values], 2).flatten(1)
    among = (rows, 2 * num_slots)
    input_ids[:, first : first + 2 * num_slots] = (
        integers(0, vocab_size, among, generator) if random_non_queries else keys.new_zeros(among)
    )
    input_ids.scatter_(1, queries, keys)
    return TaskBatch(input_ids, torch.full_like(input_ids, IGNORED).scatter_(1, queries + 1, values))


def needle(
    rows: int,
    length: int,
    distance: Distance,
    *,
    generator: torch.Generator,
    num_facts: int = 1,
    num_keys: int = 16,
    num_values: int = 16,
    value_length: int = 1,
    num_noise: int = NUM_NOISE,
    haystack: torch.Tensor | None = None,
    first_token: int = 0,
) -> TaskBatch:
    """Facts (a key and its value) among noise or text; the row ends with a question mark, one of the keys, its value.

    The fact that is asked for ends exactly `distance` tokens before the question mark; others stand anywhere. A value
    of several tokens (`num_values=10, value_length=5`, say) is a pass-key; after its first token it is read along.

    Args:
        rows: B, at least 1.
        length: T.
        distance: Tokens between the fact and the question mark, exact; or a range, drawn for each row.
        generator: Source of all randomness; its device is that of the rows.
        num_facts: Facts of different keys, at least 1.
        num_keys: Keys to draw from, at least `num_facts`.
        num_values: Ids that a value's tokens are drawn from, at least 1.
        value_length: Tokens of a value, at least 1.
        num_noise: Ids of noise, at least 1; unused with a haystack.
        haystack: (N,) int64, N at least T, ids of real text to hide the facts in; every row takes a random slice.
        first_token: First of the task's own ids; with a haystack, above all of its ids (its vocabulary's size).

    Raises:
        ValueError: If a size is out of its bounds, the facts have no room, or ids of haystack and task overlap.

    Source: the pass-key task of Mohtashami and Jaggi 2023, "Landmark Attention", in token ids.
    """
    alphabet = Alphabet(num_values, num_keys, num_noise, first_token)
    hay = hay_rows(rows, length, alphabet, generator, haystack)
    return ask_for_last_value(hay, distance, alphabet, num_facts, 1, value_length, generator)


def overwriting(
    rows: int,
    length: int,
    distance: Distance,
    *,
    generator: torch.Generator,
    num_facts: int = 4,
    num_assignments: int = 3,
    num_keys: int = 16,
    num_values: int = 16,
    num_noise: int = NUM_NOISE,
) -> TaskBatch:
    """Keys get values again and again, among noise; the row ends with a question mark, a key, its last value.

    The last assignment of that key ends exactly `distance` tokens before the question mark, its earlier ones stand
    before, and those of the other keys anywhere.

    Args:
        rows: B, at least 1.
        length: T.
        distance: Tokens between the assignment that counts and the question mark, exact; or a range, drawn for each
            row.
        generator: Source of all randomness; its device is that of the rows.
        num_facts: Keys that get values, at least 1.
        num_assignments: How often each of them does, at least 1.
        num_keys: Keys to draw from, at least `num_facts`.
        num_values: Values, at least 1.
        num_noise: Ids of noise, at least 1.

    Raises:
        ValueError: If a size is out of its bounds or the assignments have no room.

    Source: ours.
    """
    alphabet = Alphabet(num_values, num_keys, num_noise)
    hay = hay_rows(rows, length, alphabet, generator)
    return ask_for_last_value(hay, distance, alphabet, num_facts, num_assignments, 1, generator)


def hay_rows(
    rows: int, length: int, alphabet: Alphabet, generator: torch.Generator, haystack: torch.Tensor | None = None
) -> torch.Tensor:
    """Rows (B, T) int64 of noise, or of random slices of the haystack (N,); raises a ValueError on sizes below 1."""
    require_positive(rows=rows, length=length, num_values=alphabet.num_values)
    if haystack is None:
        require_positive(num_noise=alphabet.num_noise)
        return integers(alphabet.first_noise, alphabet.vocab_size, (rows, length), generator)
    if haystack.dim() != 1 or len(haystack) < length:
        raise ValueError(
            f"haystack must be (N,) with N at least length = {length}, got shape {tuple(haystack.shape)}: give more "
            f"text or a smaller length."
        )
    if haystack.max() >= alphabet.first_token:
        raise ValueError(
            f"first_token must be above all ids of the haystack, got {alphabet.first_token} and a largest id of "
            f"{haystack.max()}: give the size of the haystack's vocabulary."
        )
    starts = integers(0, len(haystack) - length + 1, (rows, 1), generator)
    return haystack[starts + torch.arange(length, device=starts.device)]


def ask_for_last_value(
    input_ids: torch.Tensor,
    distance: Distance,
    alphabet: Alphabet,
    num_facts: int,
    num_assignments: int,
    value_length: int,
    generator: torch.Generator,
) -> TaskBatch:
    """What `needle` and `overwriting` share; their docstrings say what it does. `input_ids` is changed in place."""
    require_positive(num_facts=num_facts, num_assignments=num_assignments, value_length=value_length)
    if num_facts > alphabet.num_names:
        raise ValueError(
            f"num_facts must be at most num_keys = {alphabet.num_names}, got {num_facts}: keys do not repeat; raise "
            f"num_keys."
        )
    rows, length = input_ids.shape
    width, count = 1 + value_length, num_facts * num_assignments
    end = length - 1 - width  # position of the question mark
    if end < (count + 1) * width - 1:
        raise ValueError(
            f"length must be at least {(count + 2) * width} for {count} facts of {width} tokens, a question and an "
            f"answer, got {length}: raise it or ask for fewer facts."
        )
    # The row before the question is cut into fields as wide as a fact, so that one of them is where the asked fact is.
    position = end - width - draw_distances(rows, distance, end - num_assignments * width, generator)
    asked, phase = position[:, None] // width, position[:, None] % width
    fields = torch.arange(end // width, device=input_ids.device)
    scores = uniform((rows, len(fields)), generator)
    earlier = scores.masked_fill(fields >= asked, 2).topk(num_assignments - 1, largest=False).indices
    is_free = (fields != asked) & (phase + (fields + 1) * width <= end)
    scores = scores.masked_fill(~is_free, 2).scatter(1, earlier, 2)
    others = scores.topk(count - num_assignments, largest=False).indices
    positions = phase + torch.cat([asked, earlier, others], 1) * width  # (B, count), the fact that counts first

    keys = alphabet.first_name + choose(rows, num_facts, alphabet.num_names, generator)
    values = alphabet.first_token + integers(0, alphabet.num_values, (rows, count, value_length), generator)
    facts = torch.cat([keys.repeat_interleave(num_assignments, 1)[..., None], values], 2)  # (B, count, width)
    positions = positions[..., None] + torch.arange(width, device=positions.device)
    input_ids.scatter_(1, positions.flatten(1), facts.flatten(1))
    question = torch.stack([torch.full_like(keys[:, 0], alphabet.question), keys[:, 0]], 1)
    return ask_at_the_end(input_ids, question, values[:, 0])


def copying(
    rows: int,
    length: int,
    distance: Distance,
    *,
    generator: torch.Generator,
    num_items: int = 8,
    num_symbols: int = 16,
    num_noise: int = NUM_NOISE,
    is_reversed: bool = False,
) -> TaskBatch:
    """A sequence of symbols stands together amid noise; after a question mark it is to be said again.

    The sequence ends exactly `distance` tokens before the question mark. The answer is read along: before each of its
    symbols the model has seen the right ones before it.

    Args:
        rows: B, at least 1.
        length: T.
        distance: Tokens between the sequence and the question mark, exact; or a range, drawn for each row.
        generator: Source of all randomness; its device is that of the rows.
        num_items: Symbols of the sequence, at least 1.
        num_symbols: Symbols to draw from, at least 1.
        num_noise: Ids of noise, at least 1.
        is_reversed: Whether the last symbol is to be said first.

    Raises:
        ValueError: If a size is out of its bounds or the sequence has no room.

    Source: the copy task of Graves et al. 2014, "Neural Turing Machines", at a distance.
    """
    require_positive(num_items=num_items)
    alphabet = Alphabet(num_symbols, 0, num_noise)
    input_ids = hay_rows(rows, length, alphabet, generator)
    longest = length - 2 * num_items - 1
    starts = longest - draw_distances(rows, distance, longest, generator)
    symbols = integers(0, num_symbols, (rows, num_items), generator)
    input_ids.scatter_(1, starts[:, None] + torch.arange(num_items, device=starts.device), symbols)
    question = torch.full_like(starts[:, None], alphabet.question)
    return ask_at_the_end(input_ids, question, symbols.flip(1) if is_reversed else symbols)


reversing = partial(copying, is_reversed=True)


def counting(
    rows: int,
    length: int,
    distance: Distance,
    *,
    generator: torch.Generator,
    max_count: int = 7,
    num_symbols: int = 4,
    span: int = 32,
    num_noise: int = NUM_NOISE,
) -> TaskBatch:
    """Symbols are strewn over a stretch of noise; the row ends with a question mark, a symbol, and how often it came.

    Each symbol comes 0 to `max_count` times, all equally likely; the answer n is token n. The stretch ends exactly
    `distance` tokens before the question mark.

    Args:
        rows: B, at least 1.
        length: T.
        distance: Tokens between the stretch and the question mark, exact; or a range, drawn for each row.
        generator: Source of all randomness; its device is that of the rows.
        max_count: How often a symbol comes at most, at least 1.
        num_symbols: Symbols, at least 1; all but the one that is asked for are distractors.
        span: Tokens of the stretch, at least `num_symbols * max_count`.
        num_noise: Ids of noise, at least 1.

    Raises:
        ValueError: If a size is out of its bounds or the stretch has no room.

    Source: ours.
    """
    require_positive(max_count=max_count, num_symbols=num_symbols)
    if span < num_symbols * max_count:
        raise ValueError(
            f"span must be at least num_symbols * max_count = {num_symbols * max_count}, got {span}: raise it, or "
            f"count fewer symbols."
        )
    alphabet = Alphabet(max_count + 1, num_symbols, num_noise)
    input_ids = hay_rows(rows, length, alphabet, generator)
    longest = length - 3 - span
    starts = longest - draw_distances(rows, distance, longest, generator)
    counts = integers(0, max_count + 1, (rows, num_symbols), generator)
    # Every symbol has max_count random positions of the stretch and fills as many of them as its count says.
    positions = starts[:, None] + choose(rows, num_symbols * max_count, span, generator)
    symbols = alphabet.first_name + torch.arange(num_symbols, device=starts.device).repeat_interleave(max_count)
    is_filled = torch.arange(max_count, device=starts.device) < counts[..., None]  # (B, num_symbols, max_count)
    input_ids.scatter_(1, positions, torch.where(is_filled.flatten(1), symbols, input_ids.gather(1, positions)))
    asked = integers(0, num_symbols, (rows, 1), generator)
    question = torch.cat([torch.full_like(asked, alphabet.question), alphabet.first_name + asked], 1)
    return ask_at_the_end(input_ids, question, counts.gather(1, asked))


TASKS = {
    "associative_recall": Task(associative_recall, 8192 + NUM_NOISE),
    "needle": Task(needle, Alphabet(16, 16).vocab_size),
    "passkey": Task(partial(needle, num_values=10, value_length=5), Alphabet(10, 16).vocab_size),
    "overwriting": Task(overwriting, Alphabet(16, 16).vocab_size),
    "copying": Task(copying, Alphabet(16, 0).vocab_size),
    "reversing": Task(reversing, Alphabet(16, 0).vocab_size),
    "counting": Task(counting, Alphabet(8, 4).vocab_size),
}
