"""Where each token of a call belongs in its stream: arithmetic on positions, done once per call for all layers.

A call brings T columns for B rows, which may stand anywhere in their streams, be padded anywhere, and begin new
documents at segment starts. Each row is read in F *views*, its segments from the one it stands in. All views attend at
once: a prompt, a training row, packed documents and a single token are the same arithmetic with other integers.

Shapes: B rows, T columns of the call, F views, S segment length, N lookback segments, W writes, P columns of the
prefix (slots and sink). The columns that a token may see are P of the prefix, then (N + 1) * S of the window.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch.nn import functional as F

from .configuration_rmt import RMTConfig


class ViewGroup(NamedTuple):
    """Views `first` to `end` - 1, whose last query sees the columns `start` to `stop` - 1 and no others."""

    first: int
    end: int
    start: int
    stop: int


@dataclass(frozen=True)
class CallLayout:
    """The plan of one call, read by every layer. Index tensors are int64, masks of columns are bool."""

    num_columns: int  # T
    num_views: int  # F. With one view, its queries are the T columns as they come; with several, each has S
    num_writes: int  # W, segments that leave the window of some row
    starts: tuple[int, ...]  # stream position of each row before the call
    ends: tuple[int, ...]  # and after it
    refreshes: bool  # whether the prefix in the state must be made again from its memory before it is read
    lead: int  # first columns of new streams that see nothing but the call: one plain causal attention
    groups: tuple[ViewGroup, ...]  # the other views of rows at one position; empty if rows want masks of their own
    offset: int | None  # with several views of rows at one position: where in its segment every row stands
    indices: torch.Tensor  # (B or 1, T), where each column lies in the views; padding behind real tokens
    query_indices: torch.Tensor  # (B or 1, T), where its query is kept: of the last L tokens of each segment from that
    # before view 0 on; one column behind all for the others
    observes: bool  # whether some column may be among these last tokens
    first_views: torch.Tensor  # (B or 1, F), view in which the document of each view began, negative before the call
    segment_ends: torch.Tensor  # (B,), segment ends that each row passes
    segments_after: torch.Tensor  # (B,), segment of its document in which each row stands after the call
    forgotten: torch.Tensor | None  # (B, 1), writes of each row that its memory does not hold; None if it holds all
    is_packed: bool  # whether a document begins inside the call
    is_real: torch.Tensor | None  # (B, T), columns that are no padding; None if all are
    remembered: torch.Tensor | None  # (B, T), columns of the last document of their row; None if all are

    def to(self, device: Any, **options: Any) -> "CallLayout":
        """The plan on the device of a layer, as accelerate asks for it where layers are on several."""
        tensors: dict[str, Any] = {
            name: value.to(device, **options) for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        return replace(self, **tensors)

    def spread(self, states: torch.Tensor, num_columns: int) -> torch.Tensor:
        """(B, T, ...) in call columns to (B, num_columns, ...) in the columns of the views, zeros between."""
        if self.num_views == 1:
            return states
        if self.offset is not None:
            missing = num_columns - self.offset - states.shape[1]
            padding = (*[0, 0] * (states.dim() - 2), self.offset, missing)
            return F.pad(states, padding) if any(padding) else states
        spread = states.new_zeros(states.shape[0], num_columns, *states.shape[2:])
        return spread.index_put((self.rows, self.indices), states)

    def collect(self, states: torch.Tensor) -> torch.Tensor:
        """(B, columns, ...) in the columns of the views back to (B, T, ...) in call columns."""
        if self.num_views == 1:
            return states
        if self.offset is not None:
            return states[:, self.offset : self.offset + self.num_columns]
        return states[self.rows, self.indices]

    @property
    def rows(self) -> torch.Tensor:
        """(B, 1) int64: the row numbers, to index with `indices`."""
        return torch.arange(self.segment_ends.shape[0], device=self.segment_ends.device)[:, None]

    @property
    def view_segments(self) -> torch.Tensor:
        """Segment of its document that each view is, (B or 1, F) int64."""
        return torch.arange(self.num_views, device=self.segment_ends.device) - self.first_views

    def began(self, segments: torch.Tensor) -> torch.Tensor:
        """View in which the document of each of these segments began, (B or 1, len(segments)); view 0 is segment 0."""
        return self.first_views[:, segments.clamp(0, self.num_views - 1)]

    def window_mask(self, config: RMTConfig) -> torch.Tensor:
        """(B or 1, F, queries, P + (N + 1) * S) bool, True at the columns that each query sees."""
        segment, lookback, device = config.segment_length, config.num_lookback_segments, self.segment_ends.device
        segments = self.view_segments  # (B or 1, F)
        queries = self.indices if self.num_views == 1 else torch.arange(segment, device=device)[None]
        columns = torch.arange(config.window_length, device=device)
        outside = ((lookback - segments) * segment)[..., None, None]  # columns of the window before the document
        window = (columns <= lookback * segment + queries[:, None, :, None]) & (columns >= outside)
        lost = 0 if self.forgotten is None else self.forgotten * (self.first_views <= 0)
        visible = visible_columns(config, (segments - lookback).clamp_min(0), lost)[..., None, None]
        prefix = torch.arange(config.prefix_length, device=device) >= config.prefix_length - visible
        prefix = prefix.expand(*torch.broadcast_shapes(prefix.shape[:-1], window.shape[:-1]), -1)
        return torch.cat([prefix, window.expand(*prefix.shape[:-1], -1)], -1)

    def chunk_mask(self, config: RMTConfig) -> torch.Tensor:
        """With one view: (B or 1, 1, T, S) bool, True at the tokens of its own chunk that each token sees."""
        indices, chunk = self.indices[:, None, :, None], config.chunk_length
        columns = torch.arange(config.segment_length, device=indices.device)
        return (columns <= indices) & (columns >= indices // chunk * chunk)


def visible_columns(config: RMTConfig, num_written: torch.Tensor, lost: torch.Tensor | int = 0) -> torch.Tensor:
    """Columns of the prefix that are seen when so many segments have been written, and memory holds all but `lost`:
    int64 of the same shape."""
    num_slots = (num_written - lost) * config.num_slots_per_segment
    slots = [num_slots.clamp(0, size) for size, *_ in config.memory_parts]
    return sum(slots, torch.full_like(num_written, config.use_attention_sink)) * (num_written > 0)


def on_device(numbers: tuple[int, ...] | list[int], device: torch.device) -> torch.Tensor:
    """One number per row as a tensor (B,). `torch.tensor` with a device would wait until a GPU has done all before."""
    return torch.tensor(numbers).to(device, non_blocking=True)


def plan_call(
    config: RMTConfig,
    starts: list[int],
    is_real: torch.Tensor | None,
    num_columns: int,
    device: torch.device,
    restarts: torch.Tensor | None = None,
    refreshes: bool = False,
    forgotten: Sequence[int] = (),
) -> CallLayout:
    """Maps the columns of a call; arguments as the fields of `CallLayout`.

    `restarts`, (B, T) bool, is True where a document begins inside the call; None if none does. Index tensors go to
    `device`.
    """
    segment, lost = config.segment_length, [*forgotten] or [0]
    offsets = [start % segment for start in starts]
    num_views = -(-(max(offsets) + num_columns) // segment)
    is_uniform = is_real is None and restarts is None and len(set(starts)) == len(set(lost)) == 1
    remembered = None
    if is_uniform:
        ends = [start + num_columns for start in starts]
        indices = offsets[0] + torch.arange(num_columns, device=device)[None]
        first_views = torch.full((1, num_views), -(starts[0] // segment), device=device)
    else:
        shape = (len(starts), num_columns)
        ends, indices, first_views, remembered = _index_columns(starts, is_real, restarts, segment, shape, device)
    num_writes = max(end // segment - start // segment for start, end in zip(starts, ends, strict=True))
    lead, groups = _group_views(config, starts[0], lost[0], num_columns, num_views) if is_uniform else (0, ())
    segments_after = on_device([end // segment for end in ends], device)
    length = config.num_observing_tokens
    kept = indices % segment - segment + length
    query_indices = (indices // segment + 1) * length + kept
    query_indices = query_indices.masked_fill((kept < 0) | (indices >= num_views * segment), (num_views + 1) * length)
    return CallLayout(
        num_columns=num_columns,
        num_views=num_views,
        num_writes=num_writes if restarts is None else num_views,
        starts=tuple(starts),
        ends=tuple(ends),
        refreshes=refreshes,
        lead=lead,
        groups=groups,
        offset=offsets[0] if is_uniform and num_views > 1 else None,
        indices=indices,
        query_indices=query_indices,
        observes=num_views > 1 or max(offsets) + num_columns > segment - length,
        first_views=first_views,
        segment_ends=first_views[:, -1] + segments_after,
        segments_after=segments_after,
        forgotten=on_device(lost, device)[:, None] if any(lost) else None,
        is_packed=restarts is not None,
        is_real=is_real,
        remembered=remembered if restarts is not None else None,
    )


def _index_columns(
    starts: list[int],
    is_real: torch.Tensor | None,
    restarts: torch.Tensor | None,
    segment: int,
    shape: Any,
    device: Any,
) -> tuple[list[int], torch.Tensor, torch.Tensor, torch.Tensor]:
    """`ends`, `indices`, `first_views` and `remembered` of rows that are padded, packed, or at different positions."""
    offsets = [start % segment for start in starts]
    num_views = -(-(max(offsets) + shape[1]) // segment)
    columns = torch.arange(shape[1], device=device)
    real = torch.ones(shape, dtype=torch.bool, device=device) if is_real is None else is_real
    begins = torch.zeros_like(real) if restarts is None else restarts
    document = begins.cumsum(1)  # (B, T): how many documents have begun in the call
    first_column = torch.where(begins, columns, 0).cummax(1).values  # (B, T): of the document of each column
    num_real = torch.zeros(shape[0], shape[1] + 1, dtype=torch.int64, device=device)
    num_real = num_real.scatter_add(1, document, real.long()).gather(1, document)  # of the document of each column
    before = real.cumsum(1) - real.long()  # real columns before each
    before = before - before.gather(1, first_column)
    rank = torch.where(real, before, num_real + columns - first_column - before)
    indices = on_device(offsets, device)[:, None] + first_column + rank
    first_views = on_device([-(start // segment) for start in starts], device)[:, None].repeat(1, num_views)
    where = begins.nonzero(as_tuple=True)
    first_views[where[0], indices[where] // segment] = indices[where] // segment
    remembered = document == document[:, -1:]
    counts = (real & remembered).sum(1).tolist()
    is_first = (document[:, -1] == 0).tolist()
    ends = [count + start * first for count, start, first in zip(counts, starts, is_first, strict=True)]
    return ends, indices, first_views.cummax(1).values, remembered


def _group_views(config: RMTConfig, start: int, lost: int, num_columns: int, num_views: int) -> tuple[int, tuple]:
    """`lead` and `groups` of rows that all stand at one position, with memories that hold all writes but `lost`."""
    segment, lookback, prefix = config.segment_length, config.num_lookback_segments, config.prefix_length
    lead = 0
    # With weights to be recorded, all views of a call must have the same columns.
    if start == 0 and (num_columns <= config.window_length or not config.gives_attentions):
        lead = min(num_columns, config.window_length)
    end = (start % segment + num_columns) if num_views == 1 else segment
    groups: list[ViewGroup] = []
    rings, group = [size for size, *_ in config.memory_parts], config.num_slots_per_segment
    sink = int(config.use_attention_sink)
    for view in range(-(-lead // segment), num_views):
        written = start // segment + view - lookback
        if written <= 0:
            first = prefix - written * segment
        else:
            num_slots = max(0, written - lost) * group
            first = prefix - sum(min(size, num_slots) for size in rings) - sink
        if groups and groups[-1].start == first:
            groups[-1] = groups[-1]._replace(end=view + 1)
        else:
            groups.append(ViewGroup(view, view + 1, first, prefix + lookback * segment + end))
    return lead, tuple(groups)


def find_restarts(
    position_ids: torch.Tensor | None, starts: list[int], is_real: torch.Tensor | None, num_columns: int, segment: int
) -> torch.Tensor | None:
    """Where documents begin inside the rows, (B, T) bool; None if none does.

    ValueError if `position_ids`, (B or 1, T), contradict the state, or a document begins not at a segment start.
    """
    if position_ids is None:
        return None
    shapes, shape = sorted({(1, num_columns), (len(starts), num_columns)}), tuple(position_ids.shape)
    if shape not in shapes:
        rule = f"position_ids must be a tensor of shape {' or '.join(map(str, shapes))}, got {shape}"
        raise ValueError(f"{rule}: leave position_ids out, the state counts real tokens itself.")
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
            "Documents are packed at segment starts, from 0; one at the beginning of the call wants "
            "`past_key_values.reset(rows=...)`, or its own row."
        )
    if (wrong := restarts & ((begun + columns) % segment != 0)).any():
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"position_ids must begin a document at a segment start, got 0 at column {column} of row {row}, which is "
            f"{(starts[row] + column) % segment} columns into a segment of {segment}: pad the document "
            "before it to whole segments (rmt_hf.data.pack does), or give each document its own row."
        )
    return restarts if restarts.any() else None


def check_axes(name: str, given: torch.Tensor, axes: tuple[str, ...]) -> None:
    """Refuses inputs with other axes than these, or with nothing in them."""
    if given.dim() != len(axes) or 0 in given.shape:
        rule = f"{name} must have {len(axes)} axes, ({', '.join(axes)}), none of them empty"
        hint = "(`generate` with past_key_values wants all columns since the state began.)"
        raise ValueError(f"{rule}; got shape {tuple(given.shape)}. {hint}")


def check_ids(input_ids: torch.Tensor, vocab_size: int) -> None:
    """Refuses token ids that have no embedding."""
    check_axes("input_ids", input_ids, ("batch", "columns"))
    lowest, highest = (0, 0) if input_ids.is_meta else map(int, input_ids.aminmax())
    if lowest < 0 or highest >= vocab_size:
        rule = (
            f"input_ids must lie in 0 .. {vocab_size - 1}, got {lowest} .. {highest}: is it the model's own tokenizer?"
        )
        raise ValueError(f"{rule} If tokens were added, call model.resize_token_embeddings(len(tokenizer)).")


def embed(
    embed_tokens: Any, hidden_size: int, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None
) -> torch.Tensor:
    """Embeddings of checked inputs, (B, T, E); ValueError if they are not what they should be."""
    if (input_ids is None) == (inputs_embeds is None):
        got = "neither" if input_ids is None else "both"
        raise ValueError(f"Exactly one of input_ids and inputs_embeds is wanted, got {got}: give one of them.")
    if inputs_embeds is not None:
        check_axes("inputs_embeds", inputs_embeds, ("batch", "columns", "hidden_size"))
        if inputs_embeds.shape[2] != hidden_size:
            raise ValueError(f"inputs_embeds must be hidden_size ({hidden_size}) wide, got {inputs_embeds.shape[2]}.")
        return inputs_embeds
    ids = cast(torch.Tensor, input_ids)
    check_axes("input_ids", ids, ("batch", "columns"))
    # A CPU refuses such ids itself. Elsewhere looking at them means waiting, which decoding should not do.
    if ids.device.type != "cpu" and ids.shape[1] > 1:
        check_ids(ids, embed_tokens.num_embeddings)
    try:
        return embed_tokens(ids)
    except IndexError:
        check_ids(ids, embed_tokens.num_embeddings)
        raise


def real_columns(
    attention_mask: torch.Tensor | None, num_past: int, batch_size: int, num_columns: int
) -> torch.Tensor | None:
    """(B, T) bool of this call's columns, which come after `num_past` others; None if no column is padding."""
    if attention_mask is None:
        return None
    shapes = {(batch_size, num_columns), (batch_size, num_past + num_columns)}
    got = tuple(attention_mask.shape) if torch.is_tensor(attention_mask) else type(attention_mask).__name__
    if got not in shapes:
        rule = f"attention_mask must be a tensor of shape {' or '.join(map(str, sorted(shapes)))}"
        raise ValueError(f"{rule}, 1 at real tokens and 0 at padding; got {got}.")
    mask = attention_mask[:, -num_columns:]
    is_real = mask == 1
    if is_real.all():
        return None
    if (mask != 0)[~is_real].any() or (mask.is_floating_point() and not is_real.any()):
        rule = f"attention_mask must be 1 at real tokens and 0 at padding, got {mask.unique().tolist()[:4]}"
        raise ValueError(f"{rule}: additive masks are not taken, and packed documents begin where position_ids are 0.")
    return is_real


def clear_padding(inputs_embeds: torch.Tensor, is_real: torch.Tensor | None, check: bool) -> torch.Tensor:
    """Embeddings (B, T, E) with zeros at padding, which need not even be finite; the rest must be, if `check`."""
    if is_real is not None:
        inputs_embeds = inputs_embeds.masked_fill(~is_real[..., None], 0)
    if check and not inputs_embeds.is_meta and not inputs_embeds.isfinite().all():
        raise ValueError("inputs_embeds must be finite, got NaN or infinity: check what produced them.")
    return inputs_embeds


def check_labels(labels: torch.Tensor | None, inputs: torch.Tensor | None) -> None:
    """Refuses labels of another shape before the call changes the state, and not after it."""
    if labels is not None and inputs is not None and labels.shape != inputs.shape[:2]:
        rule = f"labels must have the shape of the input, {tuple(inputs.shape[:2])}, got {tuple(labels.shape)}"
        raise ValueError(f"{rule}: give one label for each column, not shifted, -100 where none is wanted.")
