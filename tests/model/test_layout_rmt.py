"""The plan of a call, against its definition: which column is which token, and who sees whom."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rmt_hf import RMTConfig
from rmt_hf.layout_rmt import CallLayout, plan_call, visible_columns


CHUNK, SEGMENT, OBSERVING = 2, 6, 4
CPU = torch.device("cpu")


def make_config(lookback: int = 1, **fields) -> RMTConfig:
    """Three slots for each segment: a lasting part of one group and a present part of two, and a sink."""
    defaults = {"chunk_length": CHUNK, "segment_length": SEGMENT, "num_observing_tokens": OBSERVING}
    defaults |= {"num_memory_slots": 9, "num_lasting_slots": 3, "use_attention_sink": True}
    return RMTConfig(**{**defaults, "num_lookback_segments": lookback, **fields})


def plan(starts: list[int], rows: list[str] | int, lookback: int = 1, **arguments) -> CallLayout:
    """The plan for rows written as "x" for a token and "." for padding, or for a number of columns without padding."""
    if isinstance(rows, int):
        return plan_call(make_config(lookback), starts, None, rows, CPU, **arguments)
    is_real = torch.tensor([[column == "x" for column in row] for row in rows])
    return plan_call(make_config(lookback), starts, is_real, is_real.shape[1], CPU, **arguments)


@pytest.mark.parametrize(
    ("starts", "rows", "num_views", "num_writes"),
    [
        ([0], 1, 1, 0),
        ([0], SEGMENT, 1, 1),
        ([0, 0], 50, 9, 8),
        ([0], ["..."], 1, 0),
        ([1], 5, 1, 1),  # ends with the segment
        ([1], 6, 2, 1),  # reaches the next one
        ([5], 1, 1, 1),
        ([13, 1], 5, 1, 1),
        ([13, 4], 3, 2, 1),  # the second row leaves its segment
        ([13, 4], ["xxx", "x.."], 2, 0),  # might leave it: what is padding is not asked
        ([5, 17], 14, 4, 3),
        ([7, 8], ["....", "...."], 1, 0),
    ],
)
def test_views_writes_and_ends(starts, rows, num_views, num_writes):
    layout = plan(starts, rows)
    assert (layout.num_views, layout.num_writes) == (num_views, num_writes)
    counts = [rows] * len(starts) if isinstance(rows, int) else [row.count("x") for row in rows]
    ends = [start + count for start, count in zip(starts, counts, strict=True)]
    assert (layout.starts, layout.ends) == (tuple(starts), tuple(ends))
    passed = [end // SEGMENT - start // SEGMENT for start, end in zip(starts, ends, strict=True)]
    assert layout.segment_ends.tolist() == passed
    assert layout.segments_after.tolist() == [end // SEGMENT for end in ends]


def test_rows_at_one_position_want_no_masks_and_no_padding_is_no_padding():
    for starts, rows in (([0, 0], 20), ([13, 13], 1), ([13, 13], 20), ([12], 12)):
        layout = plan(starts, rows)
        assert layout.lead or layout.groups
        assert layout.indices.shape == (1, rows)
    for starts, rows in (([0, 1], 20), ([13, 19], 1), ([3, 3], ["xx", ".x"])):
        layout = plan(starts, rows)
        assert not layout.lead and not layout.groups
    assert plan([0, 0], 20, lookback=2).lead == 3 * SEGMENT
    assert plan([0, 0], 7, lookback=2).lead == 7


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
    num_rows, num_columns = len(rows), layout.num_views * SEGMENT
    for row, text in enumerate(rows):
        indices = layout.indices[row].tolist()
        real = [index for index, token in zip(indices, text, strict=True) if token == "x"]
        assert real == list(range(starts[row] % SEGMENT, starts[row] % SEGMENT + len(real)))
        padding = [index for index, token in zip(indices, text, strict=True) if token == "."]
        assert all(index >= starts[row] % SEGMENT + len(real) for index in padding)
        assert len({*indices}) == len(indices)
    states = torch.arange(1.0, 1 + num_rows * len(rows[0])).reshape(num_rows, -1, 1)
    wide = max(num_columns, int(layout.indices.max()) + 1)
    spread = layout.spread(states, wide)
    assert torch.equal(layout.collect(spread), states)
    if layout.num_views > 1:
        assert spread.count_nonzero() == states.numel()  # zeros between


@pytest.mark.parametrize(("start", "num_columns"), [(0, 13), (4, 9), (5, 2), (12, 12), (17, 30)])
def test_rows_at_one_position_are_spread_by_padding(start, num_columns):
    layout = plan([start, start], num_columns)
    states = torch.randn(2, num_columns, 3)
    spread = layout.spread(states, layout.num_views * SEGMENT)
    expected = torch.zeros(2, layout.num_views * SEGMENT, 3)
    expected[:, start % SEGMENT : start % SEGMENT + num_columns] = states
    assert torch.equal(spread, expected)
    assert torch.equal(layout.collect(spread), states)


def visible_by_definition(config: RMTConfig, position: int, lost: int = 0) -> tuple[int, set[int]]:
    """How many columns of the prefix the token at a position of its document sees, and which positions."""
    segment = position // SEGMENT
    written = max(0, segment - config.num_lookback_segments)
    slots = sum(min(size, max(0, written - lost) * 3) for size, *_ in config.memory_parts)
    first = max(0, (segment - config.num_lookback_segments) * SEGMENT)
    return (slots + 1) * (written > 0), set(range(first, position + 1))


def assert_seen(layout: CallLayout, config: RMTConfig, row: int, column: int, seen: list[int], lost: int = 0) -> None:
    """That these columns of prefix and window are what the token of a column sees by definition."""
    index = int(layout.indices.expand(len(layout.starts), -1)[row, column])
    first_view = int(layout.first_views.expand(len(layout.starts), -1)[row, index // SEGMENT])
    position = index - first_view * SEGMENT
    origin = (position // SEGMENT - config.num_lookback_segments) * SEGMENT  # position of the window's first column
    num_prefix, positions = visible_by_definition(config, position, lost if first_view <= 0 else 0)
    prefix = [each for each in seen if each < config.prefix_length]
    assert prefix == list(range(config.prefix_length - num_prefix, config.prefix_length))
    assert {each - config.prefix_length + origin for each in seen if each >= config.prefix_length} == positions


@pytest.mark.parametrize("lookback", [0, 1, 2])
@given(case=ROWS)
def test_masks_show_what_the_definition_says(case, lookback):
    starts, rows = case
    layout, config = plan(starts, rows, lookback), make_config(lookback)
    mask = layout.window_mask(config).expand(len(rows), -1, -1, -1)
    assert mask.shape[1] == layout.num_views
    chunk_mask = layout.chunk_mask(config)[:, 0] if layout.num_views == 1 else None
    for row, text in enumerate(rows):
        for column in [column for column, token in enumerate(text) if token == "x"]:
            index = int(layout.indices[row, column])
            query = column if layout.num_views == 1 else index % SEGMENT
            seen = mask[row, index // SEGMENT, query].nonzero().flatten().tolist()
            assert_seen(layout, config, row, column, seen)
            if chunk_mask is not None:
                own = chunk_mask[row, column].nonzero().flatten().tolist()
                assert own == list(range(index // CHUNK * CHUNK, index + 1))


FROM_THE_BEGINNING = [(0, 3), (0, 6), (0, 7), (0, 12), (0, 13), (0, 50)]
FROM_A_STATE = [(4, 1), (4, 2), (4, 3), (13, 2), (11, 20), (12, 6), (12, 50), (29, 1), (29, 40), (41, 13)]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("lookback", [0, 1, 2])
@pytest.mark.parametrize("lost", [0, 2])
@pytest.mark.parametrize(("start", "num_columns"), FROM_THE_BEGINNING + FROM_A_STATE)
def test_groups_of_views_show_what_the_definition_says(start, num_columns, lookback, lost, implementation):
    config = make_config(lookback, attn_implementation=implementation)
    lost = lost if start >= (lookback + 2) * SEGMENT else 0  # a memory can only lose what was written
    layout = plan_call(config, [start] * 2, None, num_columns, CPU, forgotten=[lost] * 2)
    num_lead, first_place = layout.lead, start % SEGMENT
    for column in range(num_lead):  # they see the columns before them in the call, and nothing else
        num_prefix, positions = visible_by_definition(config, column)
        assert (start, num_prefix, positions) == (0, 0, set(range(column + 1)))
    found = set(range(num_lead))
    for group in layout.groups:
        for view in range(group.first, group.end):
            queries = range(num_columns) if layout.num_views == 1 else range(SEGMENT)
            for query in queries:  # the last sees all, and each one before it one column less
                column = query if layout.num_views == 1 else view * SEGMENT + query - first_place
                if 0 <= column < num_columns:
                    seen = range(group.start, group.stop - (len(queries) - 1 - query))
                    assert_seen(layout, config, 0, column, [*seen], lost)
                    found.add(column)
    assert found == set(range(num_columns))
    if implementation == "eager" and num_columns > config.window_length:
        assert not num_lead  # all weights that are recorded have the same columns


@pytest.mark.parametrize("num_written", range(6))
def test_visible_columns_of_the_prefix(num_written):
    config, written = make_config(), torch.tensor([[num_written]])
    expected = min(3, 3 * num_written) + min(6, 3 * num_written) + (num_written > 0)
    assert visible_columns(config, written).tolist() == [[expected]]
    without = make_config(num_memory_slots=0, num_lasting_slots=None, use_attention_sink=False)
    assert visible_columns(without, written).tolist() == [[0]]


@given(ROWS)
def test_queries_of_the_last_tokens_of_each_segment_are_kept(case):
    starts, rows = case
    layout = plan(starts, rows)
    unused = (layout.num_views + 1) * OBSERVING
    for row, text in enumerate(rows):
        wanted = []
        for index, token in zip(layout.indices[row].tolist(), text, strict=True):
            view, offset = divmod(index, SEGMENT)
            if token == "x" and offset >= SEGMENT - OBSERVING:  # those of the segment before view 0 come first
                wanted.append((view + 1) * OBSERVING + offset - (SEGMENT - OBSERVING))
        real = torch.tensor([token == "x" for token in text])
        found = [index for index in layout.query_indices[row, real].tolist() if index != unused]
        assert found == wanted
        assert layout.observes or not wanted


def test_documents_that_begin_inside_a_call():
    """Two rows of three segments: a new document at column 6 of the first, and at column 12 of the second."""
    restarts = torch.zeros(2, 18, dtype=torch.bool)
    restarts[0, 6] = restarts[1, 12] = True
    is_real = torch.ones(2, 18, dtype=torch.bool)
    is_real[0, 4:6] = is_real[0, 16:] = False
    layout = plan_call(make_config(), [12, 0], is_real, 18, CPU, restarts)
    assert layout.is_packed and layout.num_views == layout.num_writes == 3
    assert layout.first_views.tolist() == [[-2, 1, 1], [0, 0, 2]]
    assert layout.view_segments.tolist() == [[2, 0, 1], [0, 1, 0]]
    assert layout.ends == (10, 6)
    assert layout.segment_ends.tolist() == [2, 3]  # in views, to the segment in which the last document stands
    assert layout.remembered.tolist() == [[False] * 6 + [True] * 12, [False] * 12 + [True] * 6]
    mask = layout.window_mask(make_config())
    for row, columns in ((0, [0, 3, 6, 11, 12, 15]), (1, [0, 6, 11, 12, 17])):
        for column in columns:
            index = int(layout.indices[row, column])
            seen = mask[row, index // SEGMENT, index % SEGMENT].nonzero().flatten().tolist()
            assert_seen(layout, make_config(), row, column, seen)
