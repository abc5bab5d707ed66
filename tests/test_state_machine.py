"""RMTCache as a state machine: any sequence of its verbs leaves what the naive reference says of each row's tokens."""

import functools
import random
import tempfile
from dataclasses import astuple, dataclass

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from reference import LayerState, ReferenceModel, ReferenceStream
from rmt_hf import RMTCache
from tiny import tiny_model


S, VOCABULARY = 4, 11

SIZE = {"vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2}
SIZE |= {"chunk_length": 2, "segment_length": S}
# Forms of the model that differ in every field that the state depends on; rings of 3, 1 and 2 writes.
FORMS = {
    "gated": {"num_memory_slots": 6, "num_key_value_heads": 1},
    "paper": {"num_memory_slots": 2, "fusion_type": "softmax", "memory_write": "mean", "num_lookback_segments": 0},
    "pool": {"num_memory_slots": 8, "memory_write": "pool", "num_slots_per_chunk": 2, "num_lookback_segments": 2},
}

# The same float64 sums in another order: values are below 100, errors about 1e-14 each, a state is used some 100 times.
CLOSE = {"rtol": 0, "atol": 1e-10}

Row = list[
    int | None
]  # the columns of a row since the state began: a token, or None for padding and what was forgotten


@functools.cache
def model_of(form: str):
    """The model, whose gates keep exactly, replace exactly, and mix."""
    model = tiny_model(**SIZE, **FORMS[form])
    for layer in model.model.layers:
        layer.self_attn.memory.gate_weight.data *= 3
    return model


@functools.cache
def reference_model(form: str) -> ReferenceModel:
    return ReferenceModel(model_of(form).config, dict(model_of(form).state_dict()))


@functools.cache
def bytes_per_row(form: str) -> int:
    cache = RMTCache(model_of(form).config)
    model_of(form)(torch.zeros(1, 1, dtype=torch.int64), past_key_values=cache)
    return cache.nbytes


@functools.lru_cache(maxsize=50_000)
def after(form: str, tokens: tuple[int, ...]) -> tuple[ReferenceStream, torch.Tensor | None]:
    """The stream that has read these tokens, one by one, and the logits of the last."""
    stream = ReferenceStream(reference_model(form))
    if not tokens:
        return stream, None
    before, _ = after(form, tokens[:-1])
    stream.position = before.position
    stream.layers = [LayerState(*map(list, vars(layer).values())) for layer in before.layers]
    return stream, stream.read(tokens[-1])


def tokens_of(row: Row) -> tuple[int, ...]:
    return tuple(token for token in row if token is not None)


def assert_logits(form: str, logits: torch.Tensor, row: Row) -> None:
    """Logits (T, V) of the last T columns of a row, padding aside."""
    read = tokens_of(row)
    new = [column for column, token in enumerate(row[-len(logits) :]) if token is not None]
    for back, column in enumerate(reversed(new)):
        torch.testing.assert_close(logits[column], after(form, read[: len(read) - back])[1], **CLOSE)


def assert_state(cache: RMTCache, row: int, stream: ReferenceStream) -> None:
    """Memory and what attention can read of the window: not the oldest segment, which is only kept for a rewind."""
    lookback = cache.fingerprint["num_lookback_segments"]
    segment, offset = divmod(stream.position, S)
    start = max(0, segment - lookback) * S
    live = slice(max(1, lookback + 1 - segment) * S, (lookback + 1) * S + offset)
    for index, layer in enumerate(cache.layers):
        state, theirs = layer.state, stream.layers[index]
        window = [state.keys[row, :, live].transpose(0, 1), state.values[row, :, live].transpose(0, 1)]
        lists = [part[start:] for part in (theirs.rotated_keys, theirs.values, theirs.scores)]
        for got, parts in zip([*window, state.scores[row, live]], lists, strict=True):
            torch.testing.assert_close(got, torch.stack(parts) if parts else torch.zeros_like(got), **CLOSE)
        for got, want in zip(state.memory, stream.memory(index), strict=True):
            torch.testing.assert_close(got[row], want, **CLOSE)


@dataclass
class Clock:
    """What a state should know of itself; kept apart from it, and compared after every step."""

    rows: list[Row]
    croppable: int = 0

    def append(self, columns: list[Row]) -> None:
        self.rows = [row + new for row, new in zip(self.rows, columns, strict=True)]
        self.croppable = min(S, self.croppable + len(columns[0]))

    def crop(self, columns: int) -> None:
        self.rows = [row[: len(row) - columns] for row in self.rows]
        self.croppable -= columns

    def select(self, rows: list[int]) -> None:
        self.rows = [list(self.rows[row]) for row in rows]


class StateMachine(RuleBasedStateMachine):
    """One state and its clock; and another state, once its twin, that reads other tokens after every step."""

    form = ""

    def __init__(self) -> None:
        super().__init__()
        self.model = model_of(self.form)
        self.cache, self.clock = RMTCache(self.model.config), Clock([[]])
        self.other: RMTCache | None = None

    def read(self, columns: list[Row], whole_mask: bool = False, gradients: bool = False) -> None:
        """Reads columns of all rows, with a mask only if there is padding, and compares the logits."""
        self.clock.append(columns)
        ids = torch.tensor([[token or 0 for token in new] for new in columns])
        seen = self.clock.rows if whole_mask else columns
        mask = torch.tensor([[token is not None for token in row] for row in seen])
        is_padded = not mask[:, -ids.shape[1] :].all()
        with torch.set_grad_enabled(gradients):
            logits = self.model(ids, mask if is_padded else None, past_key_values=self.cache).logits
        for got, row in zip(logits, self.clock.rows, strict=True):
            assert_logits(self.form, got, row)

    def random_columns(self, num_columns: int, paddings: list[str], seed: int) -> list[Row]:
        draw = random.Random(seed)
        columns: list[Row] = []
        for padding in paddings:
            row: Row = [draw.randrange(VOCABULARY) for _ in range(num_columns)]
            real = {"whole": num_columns, "nothing": 0}.get(padding, draw.randrange(num_columns + 1))
            holes = draw.sample(range(num_columns), num_columns - real)
            holes = range(num_columns - real) if padding == "left" else holes
            columns.append([None if column in holes else token for column, token in enumerate(row)])
        return columns

    def leave(self, cache: RMTCache) -> None:
        """Goes on with `cache`; what was gone on with before becomes the other one."""
        self.cache, self.other = cache, self.cache

    # Beginning and reading.

    @initialize(
        num_rows=st.integers(1, 3), num_columns=st.sampled_from([1, S, 3 * S + 2, 6 * S - 1]), seed=st.integers(0, 99)
    )
    def begin(self, num_rows: int, num_columns: int, seed: int) -> None:
        self.clock = Clock([[] for _ in range(num_rows)])
        self.read(self.random_columns(num_columns, ["whole"] * num_rows, seed))

    @rule(
        num_columns=st.sampled_from([1, 2, 3, 5, S - 1, S, S + 3, 2 * S + 1]),
        paddings=st.lists(st.sampled_from(["whole", "nothing", "holes", "left"]), min_size=4, max_size=4),
        seed=st.integers(0, 99),
        whole_mask=st.booleans(),
        gradients=st.sampled_from([False, False, False, True]),
    )
    def append(self, num_columns: int, paddings: list[str], seed: int, whole_mask: bool, gradients: bool) -> None:
        columns = self.random_columns(num_columns, paddings[: len(self.clock.rows)], seed)
        self.read(columns, whole_mask, gradients)

    @rule(num_columns=st.sampled_from([1, 1, 2, 3, S, S + 3]), seed=st.integers(0, 99))
    def append_without_padding(self, num_columns: int, seed: int) -> None:
        self.read(self.random_columns(num_columns, ["whole"] * len(self.clock.rows), seed))

    # Taking back and forgetting.

    @precondition(lambda self: self.clock.croppable)
    @rule(data=st.data())
    def crop(self, data: st.DataObject) -> None:
        columns = data.draw(st.integers(1, self.clock.croppable), label="columns")
        self.cache.crop(-columns)
        self.clock.crop(columns)

    @rule(too_many=st.integers(1, 2 * S))
    def crop_too_far(self, too_many: int) -> None:
        kept = [tensor.clone() for tensor in self.cache.tensors()]
        with pytest.raises(RuntimeError, match=rf"{self.clock.croppable} columns can be taken back now"):
            self.cache.crop(-self.clock.croppable - too_many)
        assert all(map(torch.equal, self.cache.tensors(), kept))

    @precondition(lambda self: self.cache.is_initialized)
    @rule(gone=st.lists(st.booleans(), min_size=4, max_size=4))
    def reset_rows(self, gone: list[bool]) -> None:
        gone = gone[: len(self.clock.rows)]
        self.cache.reset(rows=torch.tensor(gone))
        self.clock.rows = [[None] * len(row) if left else row for left, row in zip(gone, self.clock.rows, strict=True)]

    @rule(num_rows=st.integers(1, 3))
    def reset(self, num_rows: int) -> None:
        self.cache.reset()
        self.clock = Clock([[] for _ in range(num_rows)])

    @rule()
    def detach(self) -> None:
        assert self.cache.detach() is self.cache
        assert not any(tensor.requires_grad for tensor in self.cache.tensors())

    # Rows.

    @precondition(lambda self: self.cache.is_initialized)
    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        num_rows = len(self.clock.rows)
        rows = data.draw(st.lists(st.integers(0, num_rows - 1), min_size=num_rows, max_size=num_rows), label="rows")
        self.cache.reorder_cache(torch.tensor(rows))
        self.clock.select(rows)

    @precondition(lambda self: self.cache.is_initialized)
    @rule(data=st.data(), as_mask=st.booleans())
    def select(self, data: st.DataObject, as_mask: bool) -> None:
        num_rows = len(self.clock.rows)
        rows = data.draw(st.lists(st.integers(0, num_rows - 1), min_size=1, max_size=4), label="rows")
        rows = sorted(set(rows)) if as_mask else rows
        mask = torch.tensor([row in rows for row in range(num_rows)])
        self.cache.batch_select_indices(mask if as_mask else torch.tensor(rows))
        self.clock.select(rows)

    @precondition(lambda self: self.cache.is_initialized and len(self.clock.rows) <= 2)
    @rule(repeats=st.integers(1, 2))
    def repeat(self, repeats: int) -> None:
        self.cache.batch_repeat_interleave(repeats)
        self.clock.select([row for row in range(len(self.clock.rows)) for _ in range(repeats)])

    # Copies.

    @rule(go_on_with_the_clone=st.booleans())
    def clone(self, go_on_with_the_clone: bool) -> None:
        original = self.cache
        self.leave(original.clone())
        if not go_on_with_the_clone:
            self.leave(original)

    @precondition(lambda self: self.cache.is_initialized)
    @rule()
    def save_and_load(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.cache.save_pretrained(folder)
            self.leave(RMTCache.from_pretrained(folder, self.model))

    @precondition(lambda self: self.cache.is_initialized)
    @rule(data=st.data(), seed=st.integers(0, 99))
    def split_and_stack(self, data: st.DataObject, seed: int) -> None:
        """In another order; one of the parts reads on alone, so that the others are padded on the left."""
        whole, clock, parts = self.cache, self.clock, self.cache.split()
        num_columns = data.draw(st.sampled_from([0, 1, S + 1]), label="columns that row 0 reads alone")
        clocks = [Clock([row], clock.croppable) for row in clock.rows]
        if num_columns:
            self.cache, self.clock = parts[0], clocks[0]
            self.read(self.random_columns(num_columns, ["whole"], seed))
        order = data.draw(st.permutations(range(len(parts))), label="order")
        self.cache = whole
        self.leave(RMTCache.stack([parts[row] for row in order]))
        longest = max(len(part.rows[0]) for part in clocks)
        rows = [[None] * (longest - len(row)) + row for row in (clocks[row].rows[0] for row in order)]
        self.clock = Clock(rows, min(part.croppable for part in clocks))

    @precondition(lambda self: self.cache.is_initialized and len(self.clock.rows) <= 2)
    @rule()
    def stack_with_a_clone(self) -> None:
        self.leave(RMTCache.stack([self.cache, self.cache.clone()]))
        self.clock.select([*range(len(self.clock.rows))] * 2)

    # What must hold after every step.

    @invariant()
    def the_state_is_what_the_reference_says(self) -> None:
        cache, rows, form = self.cache, self.clock.rows, self.form
        streams = [tokens_of(row) for row in rows]
        if self.other is not None:
            with torch.no_grad():  # in place, where it shares a tensor that it should not share
                self.model(torch.full((max(1, self.other.batch_size), 1), 7), past_key_values=self.other)
        if cache.is_initialized:
            assert cache.positions == [len(tokens) for tokens in streams]
            assert cache.nbytes == len(rows) * bytes_per_row(form)
            for row, tokens in enumerate(streams):
                assert_state(cache, row, after(form, tokens)[0])
        assert (cache.batch_size, cache.nbytes > 0) == ((len(rows), True) if cache.is_initialized else (-1, False))
        assert (cache.get_seq_length(), cache.num_croppable_columns) == (len(rows[0]), self.clock.croppable)
        with torch.no_grad():
            probe = self.model(torch.full((len(rows), 1), 5), past_key_values=cache.clone()).logits
        for row, logits in zip(rows, probe, strict=True):
            assert_logits(form, logits, [*row, 5])


def run(form: str, max_examples: int) -> None:
    """Runs the machine on one form of the model, with the same examples every time."""
    machine = hypothesis.seed(form)(type(f"{form}StateMachine", (StateMachine,), {"form": form}))
    settings = hypothesis.settings(
        max_examples=max_examples,
        stateful_step_count=15,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    hypothesis.stateful.run_state_machine_as_test(machine, settings=settings)


@pytest.mark.parametrize("form", FORMS)
def test_any_verbs_in_any_order(form):
    run(form, max_examples=10)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_any_verbs_in_any_order_many_times(form):
    run(form, max_examples=170)
