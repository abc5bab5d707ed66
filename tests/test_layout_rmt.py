"""The plan of a call, against its definition: which form, which column is which token, and who sees whom."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rmt_hf import RMTConfig
from rmt_hf.layout_rmt import FRESH, SEGMENTS, STEP, CallLayout, causal_mask, plan_call


CHUNK, SEGMENT = 2, 6


def make_config(lookback: int = 1, **fields) -> RMTConfig:
    fields = {"chunk_length": CHUNK, "segment_length": SEGMENT, "num_memory_slots": 6, **fields}
    return RMTConfig(num_lookback_segments=lookback, **fields)


def plan(starts: list[int], rows: list[str] | int, lookback: int = 1) -> CallLayout:
    """The plan for rows written as "x" for a token and "." for padding, or for a number of columns without padding."""
    if isinstance(rows, int):
        return plan_call(make_config(lookback), starts, None, rows, torch.device("cpu"))
    is_real = torch.tensor([[column == "x" for column in row] for row in rows])
    return plan_call(make_config(lookback), starts, is_real, is_real.shape[1], torch.device("cpu"))


@pytest.mark.parametrize(
    ("starts", "rows", "form", "length"),
    [
        ([0], 1, FRESH, 1),
        ([0, 0], 50, FRESH, 50),
        ([0, 0], ["..xxx", "x.x.."], FRESH, 3),  # as long as the row with most tokens
        ([0], ["..."], FRESH, 1),  # nothing but padding still has a column
        ([1], 5, STEP, 5),  # ends with the segment
        ([1], 6, SEGMENTS, 12),  # reaches the next one
        ([6], 6, STEP, 6),  # a whole segment from its start
        ([5], 1, STEP, 1),
        ([13, 1], 5, STEP, 5),
        ([13, 4], 3, SEGMENTS, 12),  # the second row leaves its segment
        ([13, 4], ["xxx", "x.x"], SEGMENTS, 6),  # might leave it: offset and longest row say so together
        ([13, 4], ["x..", "x.x"], STEP, 2),
        ([0, 4], 2, STEP, 2),  # a row may begin while another goes on
        ([0, 4], 3, SEGMENTS, 12),
        ([5, 17], 14, SEGMENTS, 24),
        ([7, 8], ["....", "...."], STEP, 1),
    ],
)
def test_the_form_of_a_call(starts, rows, form, length):
    layout = plan(starts, rows)
    assert (layout.form, layout.length) == (form, length)
    counts = [rows] * len(starts) if isinstance(rows, int) else [row.count("x") for row in rows]
    assert layout.starts == tuple(starts)
    assert layout.ends == tuple(start + count for start, count in zip(starts, counts, strict=True))


def test_uniform_calls_need_no_index_and_no_mask():
    fresh, step, whole_segments = plan([0, 0], 20), plan([13, 13], 1), plan([12, 18], 12)
    for layout in (fresh, step, whole_segments):
        assert (layout.take, layout.put, layout.is_real, layout.window_mask) == (None,) * 4
    assert (step.step.global_mask, step.step.local_mask) == (None, None)
    assert step.step.columns.shape == (1,)
    for starts, num_columns in (([12, 18], 11), ([13, 19], 11), ([12, 19], 12)):  # a segment is cut
        assert plan(starts, num_columns).take is not None
    assert plan([13, 19], 20).window_mask is None  # both rows have a whole window before them


ROWS = st.integers(1, 3).flatmap(
    lambda count: st.tuples(
        st.lists(st.integers(0, 25), min_size=count, max_size=count),
        st.integers(1, 20).flatmap(
            lambda columns: st.lists(st.text("x.", min_size=columns, max_size=columns), min_size=count, max_size=count)
        ),
    )
)


@given(ROWS)
def test_tokens_find_their_place_and_the_way_back(case):
    starts, rows = case
    layout = plan(starts, rows)
    columns = torch.arange(len(rows[0])).expand(len(rows), -1)
    aligned = layout.align(columns)
    restored = layout.restore(layout.align(columns[..., None] + 1))[..., 0]
    assert aligned.shape == (len(rows), layout.length)
    position_ids = layout.position_ids.expand(len(rows), -1)
    for row, text in enumerate(rows):
        real = [column for column, token in enumerate(text) if token == "x"]
        found = (position_ids[row] >= starts[row]) & (position_ids[row] < starts[row] + len(real))
        assert aligned[row, found].tolist() == real
        assert restored[row].tolist() == [column + 1 if token == "x" else 0 for column, token in enumerate(text)]


def test_restore_gives_zero_at_padding_whatever_the_aligned_columns_hold():
    layout = plan([0, 3], [".x.", "x.."])
    restored = layout.restore(torch.full((2, layout.length, 2, 2), torch.nan))
    assert restored[0, 0].tolist() == restored[1, 2].tolist() == [[0, 0], [0, 0]]
    assert restored[0, 1].isnan().all()


def test_causal_mask_ends_with_the_last_key():
    assert causal_mask(2, 4, torch.device("cpu")).tolist() == [[[[True, True, True, False], [True] * 4]]]


def seen_by_definition(token: int, key: int, lookback: int) -> tuple[bool, bool]:
    """Whether global and local attention of the token at one stream position see the key at another."""
    first_of_window = max(0, (token // SEGMENT - lookback) * SEGMENT)
    return first_of_window <= key <= token, token // CHUNK * CHUNK <= key <= token


STEPS = st.integers(1, 3).flatmap(
    lambda count: st.tuples(
        st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=count, max_size=count),
        st.lists(st.integers(0, 4), min_size=count, max_size=count),
        st.booleans(),
    )
)


@pytest.mark.parametrize("lookback", [0, 1, 2])
@given(STEPS)
def test_a_step_sees_what_the_definition_says(lookback, case):
    places, counts, is_uniform = case
    if is_uniform:
        places, counts = [places[0]] * len(places), [max(1, counts[0])] * len(counts)
    starts = [segment * SEGMENT + offset for segment, offset in places]
    counts = [min(count, SEGMENT - start % SEGMENT) for start, count in zip(starts, counts, strict=True)]
    layout = plan(starts, ["x" * count + "." * (max(counts) + 1 - count) for count in counts], lookback)
    if layout.form != STEP:
        return
    view = layout.step
    columns = view.columns.expand(len(starts), -1)
    for (first, end), mask, which in ((view.global_span, view.global_mask, 0), (view.local_span, view.local_mask, 1)):
        mask = causal_mask(layout.length, end - first, columns.device) if mask is None else mask
        mask = mask.expand(len(starts), 1, -1, -1)[:, 0]
        for row, start in enumerate(starts):
            origin = (start // SEGMENT - lookback - 1) * SEGMENT  # stream position of window column 0
            assert (columns[row, : counts[row]] + origin).tolist() == list(range(start, start + counts[row]))
            for query in range(counts[row]):
                visible = {first + key + origin for key in mask[row, query].nonzero().flatten().tolist()}
                token = start + query
                assert visible == {key for key in range(token + 1) if seen_by_definition(token, key, lookback)[which]}


@pytest.mark.parametrize("lookback", [0, 1, 2])
@pytest.mark.parametrize("starts", [[5, 5], [1, 8], [0, 29], [13, 14], [25, 30]])
def test_windows_of_segments_see_what_the_definition_says(starts, lookback):
    layout = plan(starts, 15, lookback)
    assert layout.form == SEGMENTS
    count = layout.length // SEGMENT
    mask = layout.window_mask
    mask = causal_mask(SEGMENT, (lookback + 1) * SEGMENT, torch.device("cpu")) if mask is None else mask
    mask = mask.expand(len(starts) * count, 1, -1, -1).unflatten(0, (len(starts), count))[:, :, 0]
    for row, start in enumerate(starts):
        for segment in range(count):
            for query in range(SEGMENT):
                token = (start // SEGMENT + segment) * SEGMENT + query
                origin = token - query - lookback * SEGMENT  # stream position of the first key of the window
                visible = {origin + key for key in mask[row, segment, query].nonzero().flatten().tolist()}
                assert visible == {key for key in range(token + 1) if seen_by_definition(token, key, lookback)[0]}


@pytest.mark.parametrize("lookback", [0, 1, 2])
@pytest.mark.parametrize(
    ("starts", "num_columns", "first_segments"),
    [
        ([3], 2, None),  # the segment does not end
        ([3], 3, [[0]]),
        ([3, 13], 3, [[0], [2]]),  # only the first row is due, but all are laid out
        ([3, 13], 9, [[0, 1], [2, 3]]),
        ([0, 20], 4, [[0], [3]]),
    ],
)
def test_segments_to_be_written_leave_the_window(starts, num_columns, first_segments, lookback):
    layout = plan(starts, num_columns, lookback)
    if first_segments is None:
        assert layout.write_position_ids is None
        return
    expected = [
        [(segment - lookback) * SEGMENT + place for segment in segments for place in range(SEGMENT)]
        for segments in first_segments
    ]
    assert layout.write_position_ids.tolist() == expected


def test_rows_whose_segment_ends_are_due():
    assert plan([3, 13], 2).due_rows(SEGMENT) is None
    assert plan([3, 14], 3).due_rows(SEGMENT).tolist() == [True, False]
    assert plan([11, 17, 4], 1).due_rows(SEGMENT).tolist() == [True, True, False]
    assert plan([12, 11], [".", "x"]).due_rows(SEGMENT).tolist() == [False, True]  # a row at an end that reads nothing


@pytest.mark.parametrize("lookback", [0, 1, 2])
def test_memory_is_read_from_the_first_token_that_can_see_a_slot(lookback):
    first = (lookback + 1) * SEGMENT  # segment 0 has just left the window
    assert not plan([0], first, lookback).reads_memory
    assert plan([0], first + 1, lookback).reads_memory
    assert not plan([first - 1], 1, lookback).reads_memory
    assert plan([first], 1, lookback).reads_memory
    assert plan([0, first - 2], ["x..", "xxx"], lookback).reads_memory
    without = make_config(lookback, num_memory_slots=0)
    assert not plan_call(without, [first], None, 1, torch.device("cpu")).reads_memory
