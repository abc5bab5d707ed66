"""Several documents in one row of a call: where they begin, and where their columns belong.

A document begins where `position_ids` go back to 0, at a segment start of its row. Aligned columns are then whole
segments, each of one document, so that a new document costs no more than what later segments may not see.

Shapes: B rows, T columns of the call, L aligned columns, F segments of the call, S segment length, N lookback segments.
"""

import torch

from .configuration_rmt import RMTConfig
from .layout_rmt import SEGMENTS, CallLayout, add_sink_column, causal_mask, on_device, sink_positions


def find_restarts(
    position_ids: torch.Tensor | None,
    starts: list[int],
    is_real: torch.Tensor | None,
    num_columns: int,
    segment_length: int,
) -> torch.Tensor | None:
    """Checks stream positions against the state and finds the documents that begin inside the rows.

    Args:
        position_ids: (B or 1, T), or None to let the state count. What they say of padding means nothing.
        starts: Stream position of each row before the call.
        is_real: (B, T) bool, or None if no column is padding.
        num_columns: T.
        segment_length: S.

    Returns:
        (B, T) bool, True at the first column of each such document; None if there is none.

    Raises:
        ValueError: If they contradict the state, or a document begins elsewhere than at a segment start.
    """
    if position_ids is None:
        return None
    shapes = {(1, num_columns), (len(starts), num_columns)}
    if tuple(position_ids.shape) not in shapes:
        raise ValueError(
            f"position_ids must be a tensor of shape {' or '.join(map(str, sorted(shapes)))}, got "
            f"{tuple(position_ids.shape)}: leave position_ids out, the state counts real tokens itself."
        )
    given = position_ids.expand(len(starts), -1)
    real = torch.ones_like(given, dtype=torch.bool) if is_real is None else is_real
    begun, columns = on_device(starts, given.device)[:, None], torch.arange(num_columns, device=given.device)
    rank = real.cumsum(1) - 1
    restarts = real & (given == 0) & (rank > 0)
    last = torch.where(restarts, columns, -1).cummax(1).values
    expected = torch.where(last < 0, begun + rank, rank - rank.gather(1, last.clamp_min(0)))
    if (wrong := real & (given != expected)).any():
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"position_ids contradict the state: row {row}, column {column} is at {expected[row, column]} of its "
            f"stream, got {given[row, column]}. Leave position_ids out: the state counts real tokens itself. "
            "(`generate` makes them from attention_mask: give it one, or every padding id counts as padding.) "
            "Documents packed into one row begin at 0, each at a segment start; a new document at the beginning of the "
            "call wants `past_key_values.reset(rows=...)`, or its own row."
        )
    if (wrong := restarts & ((begun + columns) % segment_length != 0)).any():
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"position_ids must begin a document at a segment start, got 0 at column {column} of row {row}, which is "
            f"{(starts[row] + column) % segment_length} columns into a segment of {segment_length}: pad the document "
            "before it to whole segments (rmt_hf.data.pack does), or give each document its own row."
        )
    return restarts if restarts.any() else None


def plan_packed_call(
    config: RMTConfig, starts: list[int], is_real: torch.Tensor | None, restarts: torch.Tensor
) -> CallLayout:
    """Maps the columns of a call in whose rows documents begin.

    Args:
        config: `RMTConfig` of the model.
        starts: Stream position of each row before the call.
        is_real: (B, T) bool, False at padding; None if there is no padding.
        restarts: (B, T) bool, as `find_restarts` gives it.

    Returns:
        The layout that all layers share, of form segments.
    """
    segment, lookback, device = config.segment_length, config.num_lookback_segments, restarts.device
    real = torch.ones_like(restarts) if is_real is None else is_real
    columns, offsets = torch.arange(restarts.shape[1], device=device), [start % segment for start in starts]
    length = -(-(max(offsets) + len(columns)) // segment) * segment
    last = torch.where(restarts, columns, -1).cummax(1).values  # (B, T): first column of its document, -1 before
    rank = real.cumsum(1) - 1
    within = torch.where(last < 0, rank, rank - rank.gather(1, last.clamp_min(0)))
    places = (on_device(offsets, device)[:, None] + last.clamp_min(0) + within).clamp_min(0)  # (B, T)
    rows = torch.arange(len(starts), device=device)[:, None].expand_as(places)
    take = torch.zeros(len(starts), length, dtype=torch.int64, device=device)
    take[rows[real], places[real]] = columns.expand_as(places)[real]
    firsts = on_device([-(start // segment) for start in starts], device)[:, None]
    begins = firsts.repeat(1, length // segment)
    begins[rows[restarts], places[restarts] // segment] = places[restarts] // segment
    origins = begins.cummax(1).values  # (B, F)
    remembered = last == last[:, -1:]
    counts = (real & remembered).sum(1).tolist()
    ends = [count + (start if end < 0 else 0) for count, start, end in zip(counts, starts, last[:, -1], strict=True)]
    segments = torch.arange(length // segment, device=device)
    position_ids = _positions(segments, origins, segment)
    return CallLayout(
        form=SEGMENTS,
        length=length,
        num_columns=len(columns),
        starts=tuple(starts),
        ends=tuple(ends),
        position_ids=position_ids,
        reads_memory=config.num_memory_slots > 0,
        take=take,
        put=places,
        is_real=is_real,
        write_position_ids=_positions(segments - lookback, origins, segment),
        window_mask=_mask_documents(segments, origins, config),
        origins=origins,
        remembered=remembered,
        sink_position_ids=sink_positions(config, position_ids[:, ::segment]) if config.use_attention_sink else None,
    )


def _positions(segments: torch.Tensor, origins: torch.Tensor, length: int) -> torch.Tensor:
    """Stream positions (B, len(segments) * S) of aligned segments, those before the call included."""
    since = segments - origins[:, segments.clamp_min(0)]
    return (since[..., None] * length + torch.arange(length, device=origins.device)).flatten(1)


def _mask_documents(segments: torch.Tensor, origins: torch.Tensor, config: RMTConfig) -> torch.Tensor:
    """(B * F, 1, S, (N + 1) * S) bool: hides from the window of each segment what is not of its document."""
    back = torch.arange(-config.num_lookback_segments, 1, device=origins.device)
    seen = (segments[:, None] + back >= origins[..., None]).flatten(0, 1)  # (B * F, N + 1)
    causal = causal_mask(config.segment_length, config.window_length, origins.device)
    mask = causal & seen.repeat_interleave(config.segment_length, 1)[:, None, None]
    beyond = (segments - origins > config.num_lookback_segments).flatten()
    return add_sink_column(mask, beyond) if config.use_attention_sink else mask
