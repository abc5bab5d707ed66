"""Where each token of a call belongs in its stream: pure arithmetic on positions, done once per call for all layers.

A call brings T columns for B rows. Rows may stand anywhere in their streams and have padded columns anywhere.
The attention of every layer works on *aligned* columns, where padding is gone and one of three forms holds:

- fresh: every row starts its stream in this call; aligned column i is stream position i.
- step: no row leaves its segment within this call; aligned column i is the i-th new token of the row.
- segments: anything else; aligned column 0 is the start of the segment the row stands in.

Shapes: B rows, T columns of the call, L aligned columns, F segments of the call, S segment length, N lookback segments.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import cast

import torch

from .configuration_rmt import RMTConfig


FRESH, STEP, SEGMENTS = "fresh", "step", "segments"
PLANNED_STEPS = 16  # how many steps of one token are planned in one go


def on_device(numbers: Sequence[int] | Sequence[bool], device: torch.device) -> torch.Tensor:
    """One number per row as a tensor (B,). `torch.tensor` with a device would wait until a GPU has done all before."""
    return torch.tensor(numbers).to(device, non_blocking=True)


def are_equal(numbers: Sequence[int]) -> bool:
    """Whether all are the same. One by one: of a set, a compiler would guard every number."""
    return all(number == numbers[0] for number in numbers)


@dataclass(frozen=True)
class StepView:
    """Where a step looks in the window of the state, whose columns are those of `LayerState`.

    Args:
        columns: Window columns of the new tokens, (L,) if all rows stand at the same place, else (B, L); int64.
        global_span: First and last + 1 window column that global attention looks at.
        global_mask: (B, 1, L, columns of the span) bool, one more column in front if a token of the call sees the sink;
            None for plain causal attention that ends with the span.
        local_span: The same for local attention.
        local_mask: The same for local attention.
    """

    columns: torch.Tensor
    global_span: tuple[int, int]
    global_mask: torch.Tensor | None
    local_span: tuple[int, int]
    local_mask: torch.Tensor | None

    def token(self, index: int, length: int) -> "StepView":
        """The view of one token of `length`, all of one chunk if there are no masks."""
        columns, place, later = self.columns, slice(index, index + 1), length - 1 - index
        if columns.dim() == 1:
            spans = ((start, end - later) for start, end in (self.global_span, self.local_span))
            return StepView(columns[place], next(spans), None, next(spans), None)
        masks = (cast(torch.Tensor, mask)[:, :, place] for mask in (self.global_mask, self.local_mask))
        return StepView(columns[:, place], self.global_span, next(masks), self.local_span, next(masks))


@dataclass(frozen=True)
class CallLayout:
    """The plan of one call. Built by `plan_call`; read by every layer, changed by none.

    Args:
        form: `"fresh"`, `"step"` or `"segments"`.
        length: Number L of aligned columns.
        num_columns: Number T of columns of the call.
        starts: Stream position of each row before the call.
        ends: Stream position of each row after the call.
        position_ids: Stream positions of the aligned columns, (1 or B, L), int64.
        reads_memory: Whether any token of the call can see a written slot.
        take: Column of the call that each aligned column shows, (B, L), or None if they are the same.
        put: Aligned column of each column of the call, (B, T), or None if they are the same.
        is_real: Which columns of the call are no padding, (B, T) bool, or None if all are.
        write_position_ids: Stream positions of the segments that this call may write from the state, (B, W * S), or
            None; negative for segments before the stream began.
        window_mask: Form segments only: (B * F, 1, S, (N + 1) * S) bool, one more column in front if a token sees the
            sink; None if all of them see everything.
        step: Form step only: where it looks.
        rotations: Steps of one token that were planned ahead only: rotary encoding of a query and of a key, see
            `rotation_matrices` of step_rmt.
        origins: Aligned segment in which the document of each aligned segment began, negative before the call, (B, F)
            int64; None if no document begins inside the call.
        remembered: Which columns of the call are of the last document of their row, (B, T) bool; None if all are.
        sink_position_ids: Stream position directly before the window of each segment, (B or 1, F) int64: form fresh
            only those whose window the beginning has left, form step that of the step. None if there is no sink; in
            most calls also if no token sees it, and else a mask says who does.
    """

    form: str
    length: int
    num_columns: int
    starts: tuple[int, ...]
    ends: tuple[int, ...]
    position_ids: torch.Tensor
    reads_memory: bool
    take: torch.Tensor | None
    put: torch.Tensor | None
    is_real: torch.Tensor | None
    write_position_ids: torch.Tensor | None = None
    window_mask: torch.Tensor | None = None
    step: StepView | None = None
    rotations: tuple[torch.Tensor, torch.Tensor] | None = None
    origins: torch.Tensor | None = None
    remembered: torch.Tensor | None = None
    sink_position_ids: torch.Tensor | None = None

    def align(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, ...) in call columns to (B, L, ...) in aligned columns."""
        if self.take is None:
            return hidden_states
        return hidden_states[torch.arange(len(self.starts), device=self.take.device)[:, None], self.take]

    def restore(self, aligned: torch.Tensor) -> torch.Tensor:
        """(B, L, ...) in aligned columns to (B, T, ...) in call columns, zero where the call has padding."""
        if self.put is None:
            return aligned
        restored = aligned[torch.arange(len(self.starts), device=self.put.device)[:, None], self.put]
        if self.is_real is None:
            return restored
        return restored.masked_fill(~self.is_real.reshape(*self.is_real.shape, *[1] * (restored.dim() - 2)), 0)

    def per_row(self, numbers: Sequence[int]) -> torch.Tensor:
        """One integer per row as a tensor (B,), on the device of the call."""
        return on_device(numbers, self.position_ids.device)

    def begun(self, segment_length: int) -> torch.Tensor | None:
        """Which of the segments that may be written lie in their streams, (B, W) bool; False before a stream began."""
        return None if self.write_position_ids is None else self.write_position_ids[:, ::segment_length] >= 0

    def turns(self, segment_length: int) -> list[int]:
        """Number of segment ends that each row passes in the call."""
        begins = [-(start // segment_length) for start in self.starts]
        if self.origins is not None:
            begins = self.origins[:, -1].tolist()
        return [begin + end // segment_length for begin, end in zip(begins, self.ends, strict=True)]

    def other_documents(self, segments: torch.Tensor, of: torch.Tensor) -> torch.Tensor | None:
        """Whether what was written of one aligned segment is of an earlier document than another, (B, ...) bool.

        Args:
            segments: (B or 1, V, ...) the written ones.
            of: (B or 1, V) the others; beyond the call, the last one counts.

        Returns:
            None if no document begins inside the call.
        """
        if self.origins is None:
            return None
        of = of.clamp(0, self.origins.shape[1] - 1).expand(len(self.origins), -1)
        return segments < self.origins.gather(1, of).reshape(*of.shape, *[1] * (segments.dim() - 2))

    def due_rows(self, segment_length: int) -> torch.Tensor | None:
        """Form step only: the rows whose segment ends with this call, (B,) bool; None if there are none."""
        due = [end > start and end % segment_length == 0 for start, end in zip(self.starts, self.ends, strict=True)]
        return self.per_row(due) if self.form == STEP and any(due) else None


def plan_call(
    config: RMTConfig, starts: list[int], is_real: torch.Tensor | None, num_columns: int, device: torch.device
) -> CallLayout:
    """Chooses the form of a call and maps its columns.

    Args:
        config: `RMTConfig` of the model.
        starts: Stream position of each row before the call.
        is_real: (B, T) bool, False at padding; None if there is no padding.
        num_columns: T.
        device: Where the index tensors go.

    Returns:
        The layout that all layers share.
    """
    segment = config.segment_length
    counts = [num_columns] * len(starts) if is_real is None else is_real.sum(1).tolist()
    ends = [start + count for start, count in zip(starts, counts, strict=True)]
    offsets = [start % segment for start in starts]
    length = max(1, *counts)
    if not any(starts):
        form, shift, bases = FRESH, [0] * len(starts), [0]
    elif max(offsets) + length <= segment:
        form, shift, bases = STEP, [0] * len(starts), starts[:1] if are_equal(starts) else starts
    else:
        form, shift = SEGMENTS, offsets
        bases = [start - offset for start, offset in zip(starts, offsets, strict=True)]
        length = max(-(-(end - base) // segment) for end, base in zip(ends, bases, strict=True)) * segment
    position_ids = on_device(bases, device)[:, None] + torch.arange(length, device=device)
    take = put = None
    if is_real is not None or length != num_columns:
        shifts = on_device(shift, device)[:, None]
        mask = torch.ones(len(starts), num_columns, dtype=torch.bool, device=device) if is_real is None else is_real
        order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)  # real columns first, in their order
        take = order.gather(1, (torch.arange(length, device=device) - shifts).clamp(0, num_columns - 1))
        put = (mask.cumsum(1) - 1 + shifts).clamp(0, length - 1)
    reaches_beyond = max(*ends, 1) - 1 >= config.window_length  # a window does not hold its stream's beginning
    sees_sink = config.use_attention_sink and reaches_beyond
    extras: dict = {}
    if form == STEP:
        extras["step"] = _view_step(config, starts, counts, length, sees_sink, device)
    elif form == SEGMENTS:
        extras["window_mask"] = _mask_windows(config, bases, length, sees_sink, device)
    if sees_sink:
        firsts = position_ids[:, config.window_length if form == FRESH else 0 :: segment]
        extras["sink_position_ids"] = sink_positions(config, firsts)
    turns = any(end // segment > start // segment for start, end in zip(starts, ends, strict=True))
    if form != FRESH and turns:
        first = position_ids[:, :1] // segment * segment - config.num_lookback_segments * segment
        extras["write_position_ids"] = first + torch.arange(
            max(length, segment) if form == SEGMENTS else segment, device=device
        )
    reads = config.num_memory_slots > 0 and reaches_beyond
    clock = (tuple(starts), tuple(ends), position_ids)
    return CallLayout(form, length, num_columns, *clock, reads, take, put, is_real, **extras)


def plan_steps(config: RMTConfig, starts: list[int], device: torch.device) -> list[CallLayout]:
    """The calls of one token per row that come next, planned in one go: what `plan_call` gives for each.

    A plan depends on the positions alone. It is one for a step of several tokens, cut into columns.

    Args:
        config: `RMTConfig` of the model.
        starts: Stream position of each row before the first of them; not all 0.
        device: Where the index tensors go.

    Returns:
        The layouts, up to PLANNED_STEPS: no row leaves its segment, and rows at one place do not leave their chunk.
    """
    unit = config.chunk_length if are_equal(starts) else config.segment_length
    length = min(PLANNED_STEPS, unit - max(start % unit for start in starts))
    whole = plan_call(config, starts, None, length, device)
    # A compiled step is compiled anew for other strides, and `contiguous` keeps those of an axis of one element.
    position_ids = whole.position_ids.t()[..., None].clone(memory_format=torch.contiguous_format)  # (L, 1 or B, 1)
    layouts = []
    for index in range(length):
        is_last = index == length - 1
        layout = replace(
            whole,
            length=1,
            num_columns=1,
            starts=tuple(start + index for start in starts),
            ends=tuple(start + index + 1 for start in starts),
            position_ids=position_ids[index],
            write_position_ids=whole.write_position_ids if is_last else None,
            step=cast(StepView, whole.step).token(index, length),
        )
        layouts.append(layout)
    return layouts


def sink_positions(config: RMTConfig, positions: torch.Tensor) -> torch.Tensor:
    """Stream positions directly before the windows of tokens at `positions`, which change with the segment."""
    segment = config.segment_length
    return positions // segment * segment - config.num_lookback_segments * segment - 1


def add_sink_column(mask: torch.Tensor, sees_sink: torch.Tensor) -> torch.Tensor:
    """(windows, 1, queries, 1 + columns) bool of a mask without the first column, and who sees the sink, (windows,)."""
    return torch.cat([sees_sink[:, None, None, None].expand(-1, 1, mask.shape[2], 1), mask], -1)


def causal_mask(num_queries: int, num_keys: int, device: torch.device) -> torch.Tensor:
    """(1, 1, queries, keys) bool: the last query sees all keys, each earlier one sees one key less."""
    keys = torch.arange(num_keys, device=device)
    return (keys <= torch.arange(num_queries, device=device)[:, None] + num_keys - num_queries)[None, None]


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # whoever asks first: what inference mode makes cannot be used in training
def kept_causal_mask(
    num_queries: int, num_keys: int, device: torch.device, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """`causal_mask`, made once for all layers and calls; with a dtype as numbers to add to scores, 0 and -inf.

    For plain calls alone, see `is_plain`: what only stands for a mask must not be kept.
    """
    mask = causal_mask(num_queries, num_keys, device)
    return mask if dtype is None else torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


def _view_step(
    config: RMTConfig, starts: list[int], counts: list[int], length: int, sees_sink: bool, device: torch.device
) -> StepView:
    """Spans and masks of a step, for rows at any places of their segments."""
    segment, chunk, lookback = config.segment_length, config.chunk_length, config.num_lookback_segments
    current = (lookback + 1) * segment  # window column where the current segment starts
    offsets = [start % segment for start in starts]
    firsts = [segment * (1 + max(0, lookback - start // segment)) for start in starts]
    end = current + max(offsets) + length
    is_uniform = are_equal(starts) and set(counts) == {length}
    columns = current + on_device(offsets, device)[:, None] + torch.arange(length, device=device)  # (B, L)
    global_span, global_mask = (min(firsts), end), None
    local_span, local_mask = (current + min(offsets) // chunk * chunk, end), None
    queries = columns[:, None, :, None]
    if not is_uniform:
        keys = torch.arange(*global_span, device=device)
        global_mask = (keys <= queries) & (keys >= on_device(firsts, device)[:, None, None, None])
        if sees_sink:
            beyond = [start // segment > lookback for start in starts]
            global_mask = add_sink_column(global_mask, on_device(beyond, device))
    if not is_uniform or offsets[0] // chunk != (offsets[0] + length - 1) // chunk:
        keys = torch.arange(*local_span, device=device)
        local_mask = (keys <= queries) & (keys >= queries // chunk * chunk)
    return StepView(columns[0] if is_uniform else columns, global_span, global_mask, local_span, local_mask)


def fixed_step(config: RMTConfig, position_ids: torch.Tensor) -> CallLayout:
    """A step of one token per row whose shapes, and whose Python numbers, are the same at any position.

    It looks at more columns than the step of `plan_call`, and masks them: compiled once, it serves the whole stream.

    Args:
        config: `RMTConfig` of the model.
        position_ids: Stream positions of the tokens, (1 or B, 1), int64.
    """
    segment, chunk, lookback = config.segment_length, config.chunk_length, config.num_lookback_segments
    current, end = (lookback + 1) * segment, (lookback + 2) * segment
    columns = current + position_ids % segment  # (B, 1)
    queries, keys = columns[:, None, :, None], torch.arange(segment, end, device=position_ids.device)
    firsts = current - (position_ids // segment).clamp_max(lookback)[:, None, :, None] * segment
    local_keys = keys[-segment:]
    global_mask, sink_position_ids = (keys <= queries) & (keys >= firsts), None
    if config.use_attention_sink:
        global_mask = add_sink_column(global_mask, position_ids[:, 0] >= config.window_length)
        sink_position_ids = sink_positions(config, position_ids)
    step = StepView(
        columns if len(columns) > 1 else columns[0],
        (segment, end),
        global_mask,
        (current, end),
        (local_keys <= queries) & (local_keys >= queries // chunk * chunk),
    )
    reads = config.num_memory_slots > 0
    return CallLayout(
        *(STEP, 1, 1, (), (), position_ids, reads, None, None, None), step=step, sink_position_ids=sink_position_ids
    )


def _mask_windows(
    config: RMTConfig, bases: list[int], length: int, sees_sink: bool, device: torch.device
) -> torch.Tensor | None:
    """Hides what lies before the beginning of a stream, and the sink as long as that is seen, from first segments."""
    segment, lookback = config.segment_length, config.num_lookback_segments
    if min(bases) >= (lookback + sees_sink) * segment:
        return None
    firsts = on_device(bases, device)[:, None] + torch.arange(0, length, segment, device=device)  # (B, F)
    keys = firsts.flatten()[:, None] + torch.arange(-lookback * segment, segment, device=device)  # (B * F, (N + 1) * S)
    mask = causal_mask(segment, config.window_length, device) & (keys >= 0)[:, None, None]
    return add_sink_column(mask, firsts.flatten() >= config.window_length) if sees_sink else mask
