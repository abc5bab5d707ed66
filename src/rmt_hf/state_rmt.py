"""The state of one layer: prefix, window and memory as tensors of fixed shape, and what can be done to their rows.

Last come the hashes by which a stream knows the ids that it has read.

Shapes: B rows, N lookback segments, S segment length, F views of a call, P columns of the prefix, H query heads,
G key/value heads, D head width, M slots, L observing tokens.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .configuration_rmt import RMTConfig
from .layout_rmt import CallLayout
from .memory_rmt import Slots, at_least_float32, where_rows


PADDING, UNKNOWN = -1, -2  # in place of ids: of a column that counts for nothing, and of one read as `inputs_embeds`
# The hash of the ids of a stream is the sum of (id + 1) * HASH_BASE ** (ids after it), modulo 2^64. So padding adds
# nothing, and what was read last can be taken out again.
HASH_BASE = 0x5851F42D4C957F2D
HASH_INVERSE = (pow(HASH_BASE, -1, 2**64) + 2**63) % 2**64 - 2**63  # as int64 has it


class StateSizes(NamedTuple):
    """Plain numbers of a configuration, each look into which costs 3 µs."""

    segment: int  # S
    columns: int  # (N + 2) * S
    prefix: int  # P
    rings: tuple[int, ...]  # slots of each part of memory
    group: int  # K
    queries: int  # L, or 0 where no part of memory asks for evidence

    @staticmethod
    def of(config: RMTConfig) -> "StateSizes":
        queries = config.num_observing_tokens if any(uses for *_, uses in config.memory_parts) else 0
        columns, group = config.window_length + config.segment_length, config.num_slots_per_segment
        rings = tuple(size for size, *_ in config.memory_parts)
        return StateSizes(config.segment_length, columns, config.prefix_length, rings, group, queries)


class LayerState(NamedTuple):
    """The state of one layer, for a row that stands in segment t of its stream.

    The first S columns are segment t - N - 1, which attention does not see; then come the prefix, which is made of
    `memory`, and the segments t - N to t. So one slice holds all that a step sees. The segment more, and memory before
    the last write, make a rewind of up to S tokens exact.
    """

    keys: torch.Tensor  # (B, G, S + P + (N + 1) * S, D), with rotary encoding; nothing from the clock on means anything
    values: torch.Tensor  # (B, G, S + P + (N + 1) * S, D)
    scores: torch.Tensor  # (B, (N + 2) * S, G or 0), of each token of the segments
    queries: torch.Tensor  # (B, H, 2 * L or 0, D), with rotary encoding, of the last L tokens of segments t - 1 and t
    memory: Slots  # (B, M, G, D)
    replaced: Slots  # (B, K of each part, G, D), the ring groups that the last write has met, as they were before it

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "LayerState":
        return LayerState.from_tensors([function(tensor) for tensor in self.tensors()])

    def cast(self, dtype: torch.dtype) -> "LayerState":
        """The state for a call that computes in `dtype`; another one before `autocast` or `model.to(dtype)`."""
        if self.keys.dtype == dtype:
            return self
        wide = torch.promote_types(dtype, torch.float32)  # of scores and strengths
        memory, before = (
            Slots(slots.keys.to(dtype), slots.values.to(dtype), slots.strengths.to(wide), slots.positions)
            for slots in self[4:]
        )
        keys, values, queries = (states.to(dtype) for states in (self.keys, self.values, self.queries))
        return LayerState(keys, values, self.scores.to(wide), queries, memory, before)

    def tensors(self) -> list[torch.Tensor]:
        return [*self[:4], *self.memory, *self.replaced]

    @staticmethod
    def from_tensors(tensors: Sequence[torch.Tensor]) -> "LayerState":
        keys, values, scores, queries, *slots = tensors
        return LayerState(keys, values, scores, queries, Slots(*slots[:4]), Slots(*slots[4:]))

    @staticmethod
    def stack(states: Sequence["LayerState"]) -> "LayerState":
        """One state of all the streams of several, in order."""
        tensors = zip(*(state.tensors() for state in states), strict=True)
        return LayerState.from_tensors([torch.cat(each) for each in tensors])

    @staticmethod
    def empty(sizes: StateSizes, keys: torch.Tensor, scores: torch.Tensor, queries: torch.Tensor) -> "LayerState":
        """The state of streams that have read nothing; keys, scores and queries (B, T, ...) are those of a call."""
        batch, _, heads, width = keys.shape
        window, memory = (batch, heads, sizes.columns + sizes.prefix, width), Slots.empty(keys, sum(sizes.rings))
        return LayerState(  # zeros that take no memory before they are written to
            keys=keys.new_zeros(()).expand(window),
            values=keys.new_zeros(()).expand(window),
            scores=at_least_float32(scores).new_zeros(()).expand(batch, sizes.columns, scores.shape[2]),
            queries=queries.new_zeros(batch, queries.shape[2], 2 * sizes.queries, width),
            memory=memory,
            replaced=Slots.empty(keys, sizes.group * len(sizes.rings)),
        )

    def extend(
        self, layout: CallLayout, sizes: StateSizes, key: torch.Tensor, value: torch.Tensor, scores: torch.Tensor
    ) -> "LayerState":
        """The frame of a call: with its tokens, (B, T, ...), and of several views F - 1 more segments and no prefix.

        With one view, columns are written in place where no gradient needs what is there.
        """
        segment, first = sizes.segment, sizes.columns - sizes.segment
        num_more = (layout.num_views - 1) * segment

        def put(old: torch.Tensor, axis: int, new: torch.Tensor, skip: int = 0) -> torch.Tensor:
            if num_more and layout.offset is not None:
                parts = [
                    old.narrow(axis, 0, segment),
                    old.narrow(axis, segment + skip, first - segment + layout.offset),
                ]
                missing = segment + num_more - layout.offset - new.shape[axis]
                shape = [missing if i == axis else size for i, size in enumerate(new.shape)]
                return torch.cat([*parts, new, new.new_zeros(shape)] if missing else [*parts, new], axis)
            columns = first + layout.indices
            if num_more:
                old = F.pad(without_prefix(old, segment, skip), (*[0, 0] * (old.dim() - 1 - axis), 0, num_more))
            else:
                columns, old = columns + skip, writable(old)
            if columns.shape[0] == 1:
                return old.index_copy_(axis, columns[0], new)
            if axis == 1:
                return old.index_put_((layout.rows, columns), new)
            heads = torch.arange(old.shape[1], device=columns.device)[:, None]
            return old.index_put_((layout.rows[:, None], heads, columns[:, None]), new)

        keys, values = (
            put(old, 2, new.transpose(1, 2), sizes.prefix) for old, new in zip(self[:2], (key, value), strict=True)
        )
        return self._replace(keys=keys, values=values, scores=put(self.scores, 1, scores))

    def observe(self, layout: CallLayout, sizes: StateSizes, query: torch.Tensor) -> "LayerState":
        """The state with the queries (B, T, H, D) of the last L tokens of each view: (B, H, (F + 1) * L, D)."""
        length = sizes.queries
        if not length or not (torch.compiler.is_compiling() or layout.observes):
            return self
        num_columns, query = (layout.num_views + 1) * length, query.detach().transpose(1, 2)
        queries = F.pad(self.queries, (0, 0, 0, num_columns + 1 - self.queries.shape[2]))  # the last is for no use
        columns = layout.query_indices
        heads = torch.arange(queries.shape[1], device=columns.device)[:, None]
        if columns.shape[0] == 1:
            queries = queries.index_copy(2, columns[0], query)
        else:
            queries = queries.index_put((layout.rows[:, None], heads, columns[:, None]), query)
        return self._replace(queries=queries[:, :, :num_columns].contiguous())

    def close(self, layout: CallLayout, sizes: StateSizes, prefix: Sequence[torch.Tensor]) -> "LayerState":
        """The state after a call of several views or with writes: N + 2 segments of the frame for each row.

        `prefix`: keys and values (B, G, P, D) of the memory after the call.
        """

        def cut(states: torch.Tensor, axis: int, segment: int, size: int) -> torch.Tensor:
            if layout.offset is not None:
                first, have = layout.num_writes * segment, states.shape[axis]
                part = states.narrow(axis, first, min(size, have - first))
                missing = size - part.shape[axis]
                return F.pad(part, (*[0, 0] * (part.dim() - 1 - axis), 0, missing)) if missing else part
            columns = layout.segment_ends[:, None] * segment + torch.arange(size, device=states.device)  # (B, size)
            outside = columns >= states.shape[axis]
            if layout.is_packed:  # what is before the last document of a row
                outside |= columns < (layout.first_views[:, -1:] + size // segment - 1) * segment
            shape = [size if i == axis else 1 for i in range(states.dim())]
            shape[0] = columns.shape[0]
            whole = [size if i == axis else length for i, length in enumerate(states.shape)]
            columns = columns.clamp_max(states.shape[axis] - 1).view(shape).expand(whole)
            return states.gather(axis, columns).masked_fill(outside.view(shape), 0)

        segment, skip = sizes.segment, sizes.prefix if layout.num_views == 1 else 0
        plain = [cut(without_prefix(states, segment, skip), 2, segment, sizes.columns) for states in self[:2]]
        keys, values = (join_prefix(*pair, segment) for pair in zip(plain, prefix, strict=True))
        scores, length = self.scores[:, : sizes.columns], sizes.queries
        has_scores = scores.shape[2] > 0  # onnxruntime gathers nothing from nothing, and a view of the frame is spoilt
        scores = cut(self.scores, 1, segment, sizes.columns).contiguous() if has_scores else scores.clone()
        queries = cut(self.queries, 2, length, 2 * length).contiguous() if length else self.queries
        return self._replace(keys=keys, values=values, scores=scores, queries=queries)

    def with_prefix(self, segment: int, prefix: Sequence[torch.Tensor]) -> "LayerState":
        """The state with other keys and values (B, G, P, D) as its prefix."""
        plain = (without_prefix(states, segment, prefix[0].shape[2]) for states in self[:2])
        keys, values = (join_prefix(*pair, segment) for pair in zip(plain, prefix, strict=True))
        return self._replace(keys=keys, values=values)

    def rewind_rows(self, rows: torch.Tensor, sizes: StateSizes) -> "LayerState":
        """The state with the rows where `rows`, (B,) bool, is True a segment back, but for their prefix."""
        rows, segment = rows.to(self.keys.device), sizes.segment

        def shift(old: torch.Tensor, axis: int, size: int) -> torch.Tensor:
            kept = old.narrow(axis, 0, old.shape[axis] - size)
            return where_rows(rows, torch.cat([torch.zeros_like(old.narrow(axis, 0, size)), kept], axis), old)

        prefix = [states[:, :, segment : segment + sizes.prefix] for states in self[:2]]
        plain = [shift(without_prefix(states, segment, sizes.prefix), 2, segment) for states in self[:2]]
        keys, values = (join_prefix(*pair, segment) for pair in zip(plain, prefix, strict=True))
        scores, queries = shift(self.scores, 1, segment), shift(self.queries, 2, self.queries.shape[2] // 2)
        memory = self.memory.replace_rows(rows, self.memory_before(sizes))
        return LayerState(keys, values, scores, queries, memory, self.replaced)

    def memory_before(self, sizes: StateSizes) -> Slots:
        """The slots (B, M, G, D) before the last write."""
        if not sizes.rings:
            return self.memory

        def before(memory: torch.Tensor, replaced: torch.Tensor) -> torch.Tensor:
            rings = (ring[:, : -sizes.group] for ring in memory.split(list(sizes.rings), 1))
            pairs = zip(replaced.split(sizes.group, 1), rings, strict=True)
            return torch.cat([part for pair in pairs for part in pair], 1)

        return Slots(*(before(*pair) for pair in zip(self.memory, self.replaced, strict=True)))

    def edit_memory(self, edit: Callable[[Slots], Slots], sizes: StateSizes) -> "LayerState":
        """The state with other slots, now and before the last write."""
        replaced = oldest_groups(edit(self.memory_before(sizes)), sizes)
        return self._replace(memory=edit(self.memory), replaced=replaced)

    def reset_rows(self, rows: torch.Tensor) -> "LayerState":
        """The state with the rows where `rows`, (B,) bool, is True empty: zeros, and no slot written."""
        rows = rows.to(self.keys.device)
        masks = (rows.reshape(-1, *[1] * (tensor.dim() - 1)) for tensor in self[:4])
        keys, values, scores, queries = (
            tensor.masked_fill(mask, 0) for tensor, mask in zip(self[:4], masks, strict=True)
        )
        memory, replaced = (each.forget(rows[:, None].expand(each.strengths.shape[:2])) for each in self[4:])
        return LayerState(keys, values, scores, queries, memory, replaced)


def oldest_groups(memory: Slots, sizes: StateSizes) -> Slots:
    """The group of each ring of memory (..., M, G, D) along axis 1 that the next write meets."""
    if not sizes.rings:
        return memory
    parts = (tensor.split(list(sizes.rings), 1) for tensor in memory)
    return Slots(*(torch.cat([ring[:, : sizes.group] for ring in part], 1) for part in parts))


def without_prefix(states: torch.Tensor, segment: int, prefix: int) -> torch.Tensor:
    """Keys or values of a state, (B, G, columns, D), the segments alone."""
    return torch.cat([states[:, :, :segment], states[:, :, segment + prefix :]], 2) if prefix else states


def join_prefix(states: torch.Tensor, prefix: torch.Tensor, segment: int) -> torch.Tensor:
    """Keys or values of segments, (B, G, columns, D), with a prefix behind the first one."""
    return torch.cat([states[:, :, :segment], prefix, states[:, :, segment:]], 2)


def writable(window: torch.Tensor) -> torch.Tensor:
    """The tensor if it may be written in place, else a copy: for a gradient, or of inference mode."""
    if torch.is_grad_enabled() or window.stride(-1) == 0:
        return window.clone(memory_format=torch.contiguous_format)
    if not torch.compiler.is_compiling() and window.is_inference() and not torch.is_inference_mode_enabled():
        return window.clone()
    return window


def hash_ids(ids: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """The hash (B, 1) of streams with hash `known`, (B, 1), after ids (B, T)."""
    if ids.shape[1] == 1:  # a step, which feels every operation
        return torch.where(ids == PADDING, known, known * HASH_BASE + ids + 1)
    after = (ids != PADDING).flip(1).cumsum(1).flip(1)  # from each column on
    powers = powers_of(HASH_BASE, ids)
    return known * powers[after[:, :1]] + ((ids + 1) * powers[(after - 1).clamp_min(0)]).sum(1, keepdim=True)


def forget_ids(ids: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """The hash (B, 1) of streams before ids (B, T), of `known`, (B, 1), after them."""
    numbers = (ids != PADDING).sum(1, keepdim=True)
    return (known - hash_ids(ids, torch.zeros_like(known))) * powers_of(HASH_INVERSE, ids)[numbers]


def powers_of(base: int, ids: torch.Tensor) -> torch.Tensor:
    """The base to the powers 0 to T for ids (B, T), (T + 1,) int64, modulo 2^64."""
    return torch.cat([ids.new_ones(1), ids.new_full((ids.shape[1],), base)]).cumprod(0)


def empty_history(ids: torch.Tensor, segment: int) -> torch.Tensor:
    """The history (B, 1 + S) of streams that have read nothing."""
    return F.pad(ids.new_full((len(ids), segment), PADDING), (1, 0))
