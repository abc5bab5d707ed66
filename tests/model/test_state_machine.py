"""RMTCache as a state machine: any sequence of its verbs leaves what the naive reference says of each row's tokens."""

import functools
import random
import tempfile

import pytest
import torch
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from helpers import segments_alone, tiny_model
from reference import LayerState, ReferenceModel, ReferenceStream
from rmt_hf import RMTCache


S, VOCABULARY, MOST_ROWS = 4, 11, 4

SIZE = {"vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2}
SIZE |= {"chunk_length": 2, "segment_length": S}
# Forms of the model that differ in every field that the state depends on; rings of three groups, two and one.
FORMS = {
    "gated": {"num_memory_slots": 6, "lasting_distance": 5, "num_key_value_heads": 1},
    "parts": {"num_memory_slots": 6, "num_lasting_slots": 2, "use_attention_sink": True, "num_observing_tokens": 1},
    "paper": {"num_memory_slots": 2, "fusion_type": "softmax", "memory_write": "mean", "num_lookback_segments": 0},
    "mean": {"num_memory_slots": 8, "memory_write": "mean", "num_slots_per_chunk": 2, "num_lookback_segments": 2},
}

# The same float64 sums of values below 10, taken in another order, differ by some 1e-14.
CLOSE = {"rtol": 0, "atol": 1e-10}

Row = list[int | None]  # columns since the state began: a token, or None for padding and for what was forgotten


@functools.cache
def model_of(form: str):
    """A model whose gates keep exactly, replace exactly, and mix."""
    model = tiny_model(**SIZE, **FORMS[form])
    for layer in model.model.layers:
        for ring in layer.self_attn.memory.rings:
            ring.gate_weight.data *= 3
    return model


@functools.cache
def reference_of(form: str) -> ReferenceModel:
    return ReferenceModel(model_of(form).config, dict(model_of(form).state_dict()))


@functools.cache
def bytes_per_row(form: str) -> int:
    return model_of(form)(torch.zeros(1, 1, dtype=torch.int64), use_cache=True).past_key_values.nbytes


@functools.lru_cache(maxsize=20_000)
def after(form: str, tokens: tuple[int, ...]) -> tuple[ReferenceStream, torch.Tensor]:
    """The stream that has read these tokens, one by one from scratch, and the logits (V,) of the last."""
    stream = ReferenceStream(reference_of(form))
    if not tokens:
        return stream, torch.empty(0)
    before, _ = after(form, tokens[:-1])
    stream.position = before.position
    stream.layers = [LayerState(*map(list, vars(layer).values())) for layer in before.layers]
    return stream, stream.read(tokens[-1])


def tokens_of(row: Row) -> tuple[int, ...]:
    return tuple(token for token in row if token is not None)


def assert_logits(form: str, logits: torch.Tensor, row: Row) -> None:
    """Logits (T, V) of the last T columns of a row, except at padding."""
    start = len(row) - len(logits)
    real = [column for column in range(start, len(row)) if row[column] is not None]
    want = [after(form, tokens_of(row[: column + 1]))[1] for column in real]
    if real:
        torch.testing.assert_close(logits[[column - start for column in real]], torch.stack(want), **CLOSE)


def assert_state(form: str, cache: RMTCache, rows: list[Row]) -> None:
    """Clock, memory, and what attention reads: not the segment that is only kept for a rewind, nor a stale prefix."""
    streams, config = [after(form, tokens_of(row))[0] for row in rows], model_of(form).config
    assert cache.positions == [stream.position for stream in streams]
    assert (cache.get_seq_length(), cache.nbytes) == (len(rows[0]), len(rows) * bytes_per_row(form))
    lookback, before = config.num_lookback_segments, S + config.prefix_length
    for row, stream in enumerate(streams):
        segment, offset = divmod(stream.position, S)
        start = max(0, segment - lookback) * S
        live = slice(max(1, lookback + 1 - segment) * S, (lookback + 1) * S + offset)
        for index, theirs in enumerate(stream.layers):
            ours = cache.layers[index].state
            got = [segments_alone(states, config)[row, :, live].transpose(0, 1) for states in ours[:2]]
            got += [ours.scores[row, live], *(tensor[row] for tensor in ours.memory)]
            want = [*theirs.rotated_keys[start:], *theirs.values[start:], *theirs.scores[start:]]
            want += stream.memory(index)
            length = ours.queries.shape[2] // 2  # of the last tokens of the segment before, and then of this one
            asking = max(0, offset - S + length)
            got.append(ours.queries[row, :, length : length + asking].transpose(0, 1))
            want += theirs.rotated_queries[stream.position - asking :] if asking else []
            if not cache.is_stale:
                for states, expected in zip(ours[:2], stream.prefix(index, start), strict=True):
                    got.append(states[row, :, before - len(expected) : before].transpose(0, 1))
                    want += expected
            flat = (torch.cat([tensor.double().flatten() for tensor in tensors]) for tensors in (got, want))
            torch.testing.assert_close(*flat, **CLOSE)


SEEDS, ANY_COLUMNS = st.integers(0, 99), st.sampled_from([1, 2, 3, 5, S - 1, S, S + 3, 2 * S + 1])
FEW_COLUMNS, MOSTLY_NOT = st.sampled_from([1, 1, 2, 2, 3]), st.sampled_from([False, False, False, True])
VERBS = st.sampled_from(["reorder_cache", "reorder_cache", "batch_select_indices", "mask"])
WHOLE, KINDS = ["whole"] * MOST_ROWS, st.sampled_from(["whole", "nothing", "holes", "left"])
RAGGED = st.lists(KINDS, min_size=MOST_ROWS, max_size=MOST_ROWS)
PADDINGS = st.just(WHOLE) | RAGGED
BEGINNING = {"num_rows": st.sampled_from([1, 2, 2, 3, 3]), "num_columns": st.sampled_from([1, S, 14, 23])}
BEGINNING |= {"paddings": PADDINGS, "seed": SEEDS}


class StateMachine(RuleBasedStateMachine):
    """A state, what its rows have read, and other states that were one with it and read other tokens meanwhile."""

    form = ""

    def __init__(self) -> None:
        super().__init__()
        self.model = model_of(self.form)
        self.cache, self.others = RMTCache(self.model.config), list[RMTCache]()
        self.rows: list[Row] = []
        self.croppable = 0

    def leave(self, cache: RMTCache, *others: RMTCache) -> None:
        """Goes on with `cache`; what was gone on with before, and others, must not be one with it."""
        self.others, self.cache = [self.cache, *others], cache

    def disturb(self, cache: RMTCache) -> None:
        """Reads other tokens than those of the last column and of the next, in place as far as the model does so."""
        cache.crop(-min(1, cache.num_croppable_columns))
        with torch.no_grad():
            for token in (7, 8):
                self.model(torch.full((cache.batch_size, 1), token), past_key_values=cache)

    def random_columns(self, num_columns: int, paddings: list[str], seed: int) -> list[Row]:
        draw = random.Random(seed)
        columns: list[Row] = []
        for padding in paddings:
            num_padded = {"whole": 0, "nothing": num_columns}.get(padding, draw.randrange(num_columns + 1))
            padded = range(num_padded) if padding == "left" else draw.sample(range(num_columns), num_padded)
            tokens = draw.choices(range(VOCABULARY), k=num_columns)
            columns.append([None if column in padded else token for column, token in enumerate(tokens)])
        return columns

    @initialize(**BEGINNING)
    def begin(self, num_rows: int, num_columns: int, paddings: list[str], seed: int) -> None:
        self.rows, self.croppable = [[] for _ in range(num_rows)], 0
        self.append(num_columns, paddings, seed, False, False)

    @rule(num_columns=ANY_COLUMNS, paddings=PADDINGS, seed=SEEDS, whole_mask=st.booleans(), gradients=MOSTLY_NOT)
    def append(self, num_columns: int, paddings: list[str], seed: int, whole_mask: bool, gradients: bool) -> None:
        columns = self.random_columns(num_columns, paddings[: len(self.rows)], seed)
        self.rows = [row + new for row, new in zip(self.rows, columns, strict=True)]
        self.croppable = min(S, self.croppable + num_columns)
        ids = torch.tensor([[token or 0 for token in row] for row in columns])
        mask = torch.tensor([[token is not None for token in row] for row in (self.rows if whole_mask else columns)])
        mask = None if mask[:, -num_columns:].all() else mask
        with torch.set_grad_enabled(gradients):
            logits = self.model(ids, mask, past_key_values=self.cache).logits
        for row, got in zip(self.rows, logits, strict=True):
            assert_logits(self.form, got, row)

    @rule(num_columns=FEW_COLUMNS, seed=SEEDS)
    def append_a_few(self, num_columns: int, seed: int) -> None:
        self.append(num_columns, WHOLE, seed, False, False)

    # Taking back and forgetting.

    @rule(data=st.data())
    def crop(self, data: st.DataObject) -> None:
        self.take_back(data.draw(st.integers(min(1, self.croppable), self.croppable), label="columns"))

    def take_back(self, columns: int) -> None:
        self.cache.crop(-columns)
        self.rows = [row[: len(row) - columns] for row in self.rows]
        self.croppable -= columns

    @rule(too_many=st.integers(1, 2 * S))
    def crop_too_far(self, too_many: int) -> None:
        kept = [tensor.clone() for tensor in self.cache.tensors()]
        with pytest.raises(RuntimeError, match=rf": {self.croppable} columns can be rewound now"):
            self.cache.crop(-self.croppable - too_many)
        assert all(map(torch.equal, self.cache.tensors(), kept))

    @rule(gone=st.lists(st.booleans(), min_size=MOST_ROWS, max_size=MOST_ROWS))
    def reset_rows(self, gone: list[bool]) -> None:
        self.cache.reset(rows=torch.tensor(gone[: len(self.rows)]))
        self.rows = [[None] * len(row) if left else row for left, row in zip(gone, self.rows, strict=False)]

    @rule(**BEGINNING)
    def reset(self, num_rows: int, num_columns: int, paddings: list[str], seed: int) -> None:
        self.cache.reset()
        assert (self.cache.batch_size, self.cache.nbytes, self.cache.get_seq_length()) == (-1, 0, 0)
        self.begin(num_rows, num_columns, paddings, seed)

    @rule()
    def detach(self) -> None:
        assert self.cache.detach() is self.cache
        assert not any(tensor.requires_grad for tensor in self.cache.tensors())

    # Rows and copies.

    @rule(data=st.data(), verb=VERBS)
    def select(self, data: st.DataObject, verb: str) -> None:
        least, most = (len(self.rows),) * 2 if verb == "reorder_cache" else (1, MOST_ROWS)
        rows = data.draw(st.lists(st.integers(0, len(self.rows) - 1), min_size=least, max_size=most), label="rows")
        if verb == "mask":
            rows = sorted(set(rows))
            self.cache.batch_select_indices(torch.tensor([row in rows for row in range(len(self.rows))]))
        else:
            getattr(self.cache, verb)(torch.tensor(rows))
        self.rows = [self.rows[row] for row in rows]

    @rule(stack=st.booleans())
    def twice_as_many(self, stack: bool) -> None:
        repeats = 2 if 2 * len(self.rows) <= MOST_ROWS else 1
        if stack:
            self.leave(RMTCache.stack([self.cache, self.cache.clone()][:repeats]))
            self.rows = self.rows * repeats
        else:
            self.cache.batch_repeat_interleave(repeats)
            self.rows = [row for row in self.rows for _ in range(repeats)]

    @rule(go_on_with_the_clone=st.booleans())
    def clone(self, go_on_with_the_clone: bool) -> None:
        self.leave(self.cache.clone())
        if not go_on_with_the_clone:
            self.leave(*self.others)

    @rule()
    def save_and_load(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.cache.save_pretrained(folder)
            self.leave(RMTCache.from_pretrained(folder, self.model))

    @rule(data=st.data(), alone=st.sampled_from([0, 1, S + 1, -1]), seed=SEEDS)
    def split_and_stack(self, data: st.DataObject, alone: int, seed: int) -> None:
        """In another order, after row 0 has read or rewound columns alone: the shorter are padded on the left."""
        order = data.draw(st.permutations(range(len(self.rows))), label="order")
        whole, parts, rows, croppable = self.cache, self.cache.split(), self.rows, self.croppable
        self.disturb(whole)
        self.cache, self.rows = parts[0], rows[:1]
        if alone > 0:
            self.append(alone, WHOLE, seed, False, False)
        else:
            self.take_back(min(-alone, croppable))
        rows = [*self.rows, *rows[1:]]
        self.rows = [[None] * (max(map(len, rows)) - len(rows[row])) + rows[row] for row in order]
        self.croppable = min([self.croppable] + [croppable] * (len(rows) - 1))
        self.cache = whole
        self.leave(RMTCache.stack([parts[row] for row in order]), *parts)

    # What must hold after every step.

    @invariant()
    def the_state_is_what_the_reference_says(self) -> None:
        if not self.rows:
            return
        for other in self.others:
            self.disturb(other)
        assert self.cache.num_croppable_columns == self.croppable
        assert_state(self.form, self.cache, self.rows)
        with torch.no_grad():
            probe = self.model(torch.full((len(self.rows), 1), 5), past_key_values=self.cache.clone()).logits
        for row, logits in zip(self.rows, probe, strict=True):
            assert_logits(self.form, logits, [*row, 5])
        back = self.cache.clone()
        for columns in range(1, self.croppable + 1):
            back.crop(-1)
            assert_state(self.form, back, [row[: len(row) - columns] for row in self.rows])


def run(form: str, max_examples: int, **overrides) -> None:
    """Runs the machine on one form of the model, with the same examples every time."""
    machine = seed(form)(type(f"{form}StateMachine", (StateMachine,), {"form": form}))
    explicit = {"stateful_step_count": 15, "deadline": None, "derandomize": True} | overrides
    unhurried = settings(max_examples=max_examples, suppress_health_check=[HealthCheck.too_slow], **explicit)
    run_state_machine_as_test(machine, settings=unhurried)


@pytest.mark.parametrize("form", FORMS)
def test_any_verbs_in_any_order(form):
    run(form, max_examples=10)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_any_verbs_in_any_order_many_times(form):
    run(form, max_examples=170)
