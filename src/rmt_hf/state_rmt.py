"""The state of one layer: its window and its memory, as tensors of fixed shape, and what can be done to their rows.

Shapes: B rows, N lookback segments, S segment length, G key/value heads, D head width, M slots.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .memory_rmt import Slots, at_least_float32, empty_slots, where_rows


class LayerState(NamedTuple):
    """The state of one layer. Column j of the window is stream position (t - N - 1) * S + j of a row in segment t.

    One segment more than attention sees is kept, and memory as it was before the last write, so that a rewind of up to
    S tokens across a segment boundary is exact.

    Args:
        keys: (B, G, (N + 2) * S, D), with rotary encoding; columns at or after the clock mean nothing. Heads come
            before columns, because a decoding step reads little else.
        values: (B, G, (N + 2) * S, D).
        scores: (B, (N + 2) * S, ...), what the write will need of each token.
        memory: Slots (B, M, G, D); M is 0 without memory.
        previous_memory: The slots before the last write.
    """

    keys: torch.Tensor
    values: torch.Tensor
    scores: torch.Tensor
    memory: Slots
    previous_memory: Slots

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "LayerState":
        """The state with `function` applied to every tensor."""
        keys, values, scores = map(function, self[:3])
        return LayerState(keys, values, scores, self.memory.map(function), self.previous_memory.map(function))

    def to(self, dtype: torch.dtype) -> "LayerState":
        """The state for a call that computes in `dtype`; another one before `autocast` or `model.to(dtype)`."""
        if self.keys.dtype == dtype:
            return self
        wide = torch.promote_types(dtype, torch.float32)  # of scores and strengths
        memory, previous_memory = (
            Slots(slots.keys.to(dtype), slots.values.to(dtype), slots.strengths.to(wide)) for slots in self[3:]
        )
        return LayerState(self.keys.to(dtype), self.values.to(dtype), self.scores.to(wide), memory, previous_memory)

    def tensors(self) -> list[torch.Tensor]:
        """All tensors of the state."""
        return [*self[:3], *self.memory, *self.previous_memory]

    @staticmethod
    def stack(states: Sequence["LayerState"]) -> "LayerState":
        """One state of all the streams of several, in order."""
        stacked = [torch.cat(tensors) for tensors in zip(*(state.tensors() for state in states), strict=True)]
        return LayerState.from_tensors(stacked)

    @staticmethod
    def empty(keys: torch.Tensor, scores: torch.Tensor, num_columns: int, num_slots: int) -> "LayerState":
        """The state of streams that have read nothing.

        Args:
            keys: (B, L, G, D), for their rows, heads, dtype and device.
            scores: (B, L, ...), for what the write will need.
            num_columns: (N + 2) * S.
            num_slots: M.
        """
        batch, _, heads, width = keys.shape
        window = keys.new_zeros(batch, heads, num_columns, width)
        scores = at_least_float32(scores).new_zeros(batch, num_columns, *scores.shape[2:])
        memory = empty_slots(keys, num_slots)
        return LayerState(window, window.clone(), scores, memory, memory.map(torch.clone))

    @staticmethod
    def from_tensors(tensors: list[torch.Tensor]) -> "LayerState":
        """The state of what `tensors` gave."""
        keys, values, scores, *slots = tensors
        return LayerState(keys, values, scores, Slots(*slots[:3]), Slots(*slots[3:]))

    def shift_rows(self, rows: torch.Tensor, segment: int, back: bool = False) -> "LayerState":
        """The state with the window of the rows where `rows`, (B,) bool, is True one segment further on, or back."""
        rows = rows.to(self.keys.device)

        def shift(old: torch.Tensor, axis: int) -> torch.Tensor:
            kept = old.narrow(axis, 0 if back else segment, old.shape[axis] - segment)
            gap = torch.zeros_like(old.narrow(axis, 0, segment))
            return where_rows(rows, torch.cat([gap, kept] if back else [kept, gap], axis), old)

        keys, values, scores = shift(self.keys, 2), shift(self.values, 2), shift(self.scores, 1)
        return self._replace(keys=keys, values=values, scores=scores)

    def rewind_rows(self, rows: torch.Tensor, segment: int) -> "LayerState":
        """The state with the rows where `rows`, (B,) bool, is True a segment back, their last write undone."""
        memory = self.memory.replace_rows(rows.to(self.keys.device), self.previous_memory)
        return self.shift_rows(rows, segment, back=True)._replace(memory=memory)

    def reset_rows(self, rows: torch.Tensor) -> "LayerState":
        """The state with the rows where `rows`, (B,) bool, is True empty: zeros, and no slot written."""

        def clear(tensor: torch.Tensor, value: float = 0.0) -> torch.Tensor:
            return tensor.masked_fill(rows.to(tensor.device).reshape(-1, *[1] * (tensor.dim() - 1)), value)

        def forget(memory: Slots) -> Slots:
            return Slots(clear(memory.keys), clear(memory.values), clear(memory.strengths, -torch.inf))

        keys, values, scores = map(clear, self[:3])
        return LayerState(keys, values, scores, forget(self.memory), forget(self.previous_memory))


def cut_columns(states: torch.Tensor, first: int, num_columns: int) -> torch.Tensor:
    """Columns of (..., columns, width) from `first` on, in memory of their own; zeros where there are none.

    At least one must be there.
    """
    end = first + num_columns
    part = states[..., max(0, first) : end, :]
    missing = (max(0, -first), max(0, end - states.shape[-2]))
    return F.pad(part, (0, 0, *missing)) if any(missing) else part.clone(memory_format=torch.contiguous_format)


def owned(window: torch.Tensor) -> torch.Tensor:
    """The window if it may be written in place, because no gradient needs what it holds; else a copy."""
    if window.requires_grad or torch.is_grad_enabled():
        return window.clone()
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not window.is_inference():
        return window
    return window.clone()


def lay_columns(window: torch.Tensor, axis: int, columns: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """The window with `new` at its `columns`, (L,) or (B, L), along an axis; in place where no gradient needs the old.

    Written so that a compiled step writes in place too: through a transposed view it would copy the whole window.
    """
    window = owned(window)
    if columns.dim() == 1:
        return window.index_copy_(axis, columns, new)
    rows = torch.arange(len(columns), device=columns.device)[:, None]
    if axis == 1:
        return window.index_put_((rows, columns), new)
    heads = torch.arange(window.shape[1], device=columns.device)[:, None]
    return window.index_put_((rows[:, None], heads, columns[:, None]), new)
