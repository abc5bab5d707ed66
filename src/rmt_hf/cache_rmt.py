"""What survives between two calls: the live window, the memory, and a clock per row.

Shapes: B rows, N lookback segments, S segment length, G key/value heads, D head width, M slots.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from .configuration_rmt import RMTConfig
from .memory_rmt import Slots


class LayerState(NamedTuple):
    """The state of one layer. Column j of the window is stream position (t - N - 1) * S + j of a row in segment t.

    One segment more than attention sees is kept, and memory as it was before the last write, so that a rewind of up to
    S tokens across a segment boundary can be exact.

    Args:
        keys: (B, (N + 2) * S, G, D), with rotary encoding; columns at or after the clock mean nothing.
        values: (B, (N + 2) * S, G, D).
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


class RMTCacheLayer(CacheLayerMixin):
    """One layer's place in an `RMTCache`; the model puts a new `LayerState` here after each call."""

    is_sliding = True  # bounded: nothing here grows with the stream
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.state: LayerState | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise RuntimeError("An RMTCache is filled by the forward pass of an RMT model; nothing else can initialise it.")

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError("An RMTCache is written by the forward pass of an RMT model, not through `update`.")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise RuntimeError("An RMT model builds its own masks: `create_causal_mask` cannot be used with an RMTCache.")

    def get_seq_length(self) -> int:
        raise RuntimeError(
            "Ask the RMTCache itself for `get_seq_length()`: the clock belongs to the stream, not to a layer."
        )

    def get_max_length(self) -> int:
        return -1


class RMTCache(Cache):
    """The state of B streams: constant in size, whatever the length of the streams.

    Pass it as `past_key_values`; the model changes it and hands it back. It holds everything the model remembers.

    Args:
        config (`RMTConfig`): Configuration of the model that will write the state.

    Source: sections 2 and 3 of docs/design.md; the paper says only that memory persists across segments.
    """

    def __init__(self, config: RMTConfig) -> None:
        self.layers: list[RMTCacheLayer]  # type: ignore[assignment]  # all are of our kind
        super().__init__(layers=[RMTCacheLayer() for _ in range(config.num_hidden_layers)])
        self.fingerprint = state_fingerprint(config)
        self.positions: list[int] = []
        self.num_columns = 0

    @property
    def batch_size(self) -> int:
        """Number of streams, or -1 before the first call."""
        return len(self.positions) or -1

    @property
    def is_initialized(self) -> bool:
        """Whether a call has filled the state."""
        return bool(self.positions)

    @property
    def nbytes(self) -> int:
        """Bytes of all state tensors; the same at any stream length."""
        states = [layer.state for layer in self.layers if layer.state is not None]
        return sum(tensor.nbytes for state in states for tensor in state.tensors())

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of columns read since the start or the last reset, padding included (what `generate` counts)."""
        return self.num_columns

    def commit(self, states: list[LayerState], positions: list[int], num_columns: int) -> None:
        """Takes over the states of all layers after a call, in one go: a call that failed has changed nothing.

        Args:
            states: One state per layer.
            positions: Stream position of each row after the call.
            num_columns: Columns that the call had.
        """
        for layer, state in zip(self.layers, states, strict=True):
            layer.state = state
        self.positions = positions
        self.num_columns += num_columns

    def detach(self) -> "RMTCache":
        """Cuts the gradient to everything read so far, in place."""
        # A copy, because a call without gradients writes in place what a backward pass may still need.
        return self._map(lambda tensor: tensor.detach().clone())

    def clone(self) -> "RMTCache":
        """An independent copy of the state."""
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__)
        copy.layers = [RMTCacheLayer() for _ in self.layers]
        for ours, theirs in zip(self.layers, copy.layers, strict=True):
            theirs.state = ours.state
        copy.positions = list(self.positions)
        return copy._map(torch.Tensor.clone)

    def reset(self, rows: torch.Tensor | None = None) -> None:
        """Forgets everything, as if the streams had never begun.

        Args:
            rows: (B,) bool, the rows to reset; all rows, and the batch size with them, if None.

        Raises:
            ValueError: If `rows` is not a bool tensor with one element per row.
        """
        if rows is None:
            self.positions, self.num_columns = [], 0
            for layer in self.layers:
                layer.state = None
            return
        if rows.dtype != torch.bool or rows.shape != (len(self.positions),):
            raise ValueError(
                f"rows must be a bool tensor of shape ({len(self.positions)},), one element per row of the state; got "
                f"{rows.dtype} of shape {tuple(rows.shape)}."
            )
        self.positions = [0 if gone else old for gone, old in zip(rows.tolist(), self.positions, strict=True)]
        for layer in self.layers:
            if layer.state is not None:
                layer.state = _reset_rows(layer.state, rows)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Puts row `beam_idx[i]` in place of row i, as beam search asks."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the given rows, in the given order (a row may be named more than once).

        Args:
            indices: (B',) int64 row numbers, or (B,) bool.
        """
        indices = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        self.positions = [self.positions[row] for row in indices.tolist()]
        self._map(lambda tensor: tensor.index_select(0, indices.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row `repeats` times, copies next to each other."""
        self.positions = [position for position in self.positions for _ in range(repeats)]
        self._map(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last tokens; not available yet, except for 0 tokens.

        Args:
            tokens_to_remove: 0, or minus the number of tokens to take back.

        Raises:
            RuntimeError: If tokens are to be taken back.
        """
        if tokens_to_remove != 0:
            raise RuntimeError(
                f"RMTCache.crop({tokens_to_remove}): rewinding is not available yet. Keep a `clone()` of the state "
                "before the tokens you may want to take back, and go on from the clone."
            )

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "RMTCache":
        for layer in self.layers:
            if layer.state is not None:
                layer.state = layer.state.map(function)
        return self


def _reset_rows(state: LayerState, rows: torch.Tensor) -> LayerState:
    """The state with some rows empty: zeros, and no slot written."""

    def clear(tensor: torch.Tensor, value: float = 0.0) -> torch.Tensor:
        return tensor.masked_fill(rows.to(tensor.device).reshape(-1, *[1] * (tensor.dim() - 1)), value)

    def forget(memory: Slots) -> Slots:
        return Slots(clear(memory.keys), clear(memory.values), clear(memory.strengths, -torch.inf))

    keys, values, scores = map(clear, state[:3])
    return LayerState(keys, values, scores, forget(state.memory), forget(state.previous_memory))


def state_fingerprint(config: RMTConfig) -> dict[str, Any]:
    """The fields of a configuration that decide the shape and the meaning of a state."""
    names = ["num_hidden_layers", "num_key_value_heads", "head_dim", "chunk_length", "segment_length", "memory_write"]
    names += ["num_lookback_segments", "num_memory_slots", "num_slots_per_chunk", "use_qk_norm", "rope_parameters"]
    return {name: getattr(config, name) for name in names}


__all__ = ["RMTCache"]
