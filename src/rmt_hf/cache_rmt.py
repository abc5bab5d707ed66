"""What survives between two calls: the states of all layers and a clock per row; what a user can do with it.

Shapes: B rows, S segment length.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, cast

import torch
from huggingface_hub import HfApi
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_utils import PreTrainedModel

from .configuration_rmt import RMTConfig
from .layout_rmt import CallLayout
from .memory_rmt import Slots
from .saving_rmt import read_record, read_tensors, state_shapes, write_state
from .state_rmt import LayerState, StateSizes


# What a state knows besides its tensors; all of it can be written as JSON.
CLOCK = ("fingerprint", "positions", "forgotten", "num_columns", "num_croppable_columns", "is_stale")


class RMTCacheLayer(CacheLayerMixin):
    """One layer's place in an `RMTCache`; the model puts a new `LayerState` here after each call."""

    is_sliding = True  # bounded: nothing here grows with the stream
    is_croppable = True
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
        self.fingerprint, self.sizes = state_fingerprint(config), StateSizes.of(config)
        self.ring_sizes = [size for size, *_ in config.memory_parts]
        self.num_slots_per_segment = config.num_slots_per_segment
        self.positions: list[int] = []
        self.forgotten: list[int] = []  # of each row: writes that its memory does not hold since `edit_memory`
        self.num_columns = 0
        self.num_croppable_columns = 0
        self.recent_is_real: torch.Tensor | None = None  # (B, S) bool of the last S columns, for `crop`
        self.num_columns_to_skip = 0  # of the prompt that assisted generation gives next: they have been read
        self.is_stale = False  # whether a memory has been changed, of which the prefix is to be made again
        self._free = [True]  # taken out while a call runs

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
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> list[torch.Tensor]:
        """All tensors of the state, each with the streams along its first axis; none before the first call."""
        states = [layer.state for layer in self.layers if layer.state is not None]
        recent = [] if self.recent_is_real is None else [self.recent_is_real]
        return [*(tensor for state in states for tensor in state.tensors()), *recent]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of columns read since the start, the last reset or `begin_prompt`, padding included.

        This is what `generate` counts; `positions` has the real tokens of each row's stream.
        """
        return self.num_columns

    def begin_prompt(self) -> None:
        """Counts columns from 0 again: what was read stays read, but is no part of the prompt that comes next.

        `generate` does so by itself if its ids are not longer than what the state has read; call this before a longer
        prompt, which it would else take for all columns since the beginning.
        """
        self.num_columns = 0

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Holds the state for one call.

        Raises:
            RuntimeError: If another call holds it. A state is one point of a stream, which cannot go on in two ways.
        """
        try:
            self._free.pop()  # one atomic step: two threads cannot both have it
        except IndexError:
            raise RuntimeError(
                "past_key_values is in use by another call, which has not returned yet: give each thread a state of "
                "its own, made with `clone()`."
            ) from None
        try:
            yield
        finally:
            self._free.append(True)

    @torch.compiler.disable
    def commit(self, states: list[LayerState], layout: CallLayout) -> None:
        """Takes over the states of all layers after a call, in one go: a call that failed has changed nothing.

        Args:
            states: One state per layer.
            layout: The plan of the call.
        """
        segment, batch_size = self.fingerprint["segment_length"], len(layout.ends)
        num_columns = layout.num_columns
        recent, is_real = self.recent_is_real, layout.is_real
        if is_real is None:
            keys = next(state for state in states if state is not None).keys
            is_real = keys.new_ones(batch_size, num_columns, dtype=torch.bool)
        if recent is None:
            recent = is_real.new_zeros(batch_size, segment)
        forgotten = self.forgotten or [0] * batch_size
        if layout.remembered is not None:  # what is before the last document of a row cannot be taken back
            is_real, recent = is_real & layout.remembered, recent & layout.remembered[:, :1]
            goes_on = layout.remembered[:, 0].tolist()
            forgotten = [number * old for number, old in zip(forgotten, goes_on, strict=True)]
        self.recent_is_real = torch.cat([recent[:, num_columns:], is_real[:, -segment:]], 1)
        for layer, state in zip(self.layers, states, strict=True):
            layer.state = state
        self.positions, self.forgotten, self.is_stale = list(layout.ends), forgotten, False
        self.num_columns += num_columns
        self.num_croppable_columns = min(segment, self.num_croppable_columns + num_columns)

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last columns of every row: the state is as if they had never been read.

        Padding among them takes no token from its row. `segment_length` columns can be taken back at most, in one go or
        in several, until more are read; `num_croppable_columns` says how many. What `reset` forgot stays forgotten.

        Args:
            tokens_to_remove: Minus the number of columns to take back, or 0.

        Raises:
            ValueError: If the number is above 0, as it was counted before transformers 5.
            RuntimeError: If the state cannot go back that far; it is left as it was.
        """
        columns = -int(tokens_to_remove)
        if columns < 0:
            raise ValueError(
                f"tokens_to_remove must be 0 or below, got {tokens_to_remove}: crop(-n) takes back the last n columns."
            )
        if columns > self.num_croppable_columns:
            raise RuntimeError(
                f"RMTCache.crop({-columns}): {self.num_croppable_columns} columns can be taken back now, and never "
                f"more than segment_length ({self.fingerprint['segment_length']}). Keep a `clone()` of the state from "
                "before the tokens that you may want to take back and go on from there; in assisted generation, draft "
                "fewer tokens at a time (num_assistant_tokens, prompt_lookup_num_tokens)."
            )
        if not columns:
            return
        recent = cast(torch.Tensor, self.recent_is_real)
        segment = self.fingerprint["segment_length"]
        ends = [p - taken for p, taken in zip(self.positions, recent[:, -columns:].sum(1).tolist(), strict=True)]
        crossed = [end // segment < p // segment for end, p in zip(ends, self.positions, strict=True)]
        if any(crossed):
            rows = torch.tensor(crossed)
            for layer in self.layers:
                state = layer.state
                layer.state = None if state is None else state.rewind_rows(rows, self.sizes)
            self.is_stale = True
        # Columns more than S back are not known again: what comes in at the left is never asked for.
        self.recent_is_real = torch.cat([torch.zeros_like(recent[:, :columns]), recent[:, :-columns]], 1)
        self.positions = ends
        if any(crossed) and any(self.forgotten):
            self._count_writes()
        self.num_columns = max(0, self.num_columns - columns)
        self.num_croppable_columns -= columns

    def detach(self) -> "RMTCache":
        """Cuts the gradient to everything read so far, in place."""
        # A copy, because a call without gradients writes in place what a backward pass may still need.
        return self._map(lambda tensor: tensor.detach().clone())

    def clone(self) -> "RMTCache":
        """An independent copy of the state."""
        return self._copy()._map(torch.Tensor.clone)

    def edit_memory(self, edit: Callable[[Slots], Slots]) -> None:
        """Changes the memory of every layer; the window stays.

        The memory before the last write, which `crop` goes back to, is edited as well: a rewind does not undo the edit.

        Args:
            edit: From slots (B, M, G, D) to slots of the same shapes. It must not change the given tensors in place.
                Slots without a position (-1) are not seen. A row must look like one that has written some number of
                segments: the youngest groups of each ring are full, equally many in all heads and layers.
        """
        for layer in self.layers:
            if layer.state is not None:
                memory, before = edit(layer.state.memory), edit(layer.state.previous_memory)
                layer.state = layer.state._replace(memory=memory, previous_memory=before)
        self.is_stale = True
        self._count_writes()

    def _count_writes(self) -> None:
        """Notes how many of its writes the memory of each row does not hold, so that no empty slot is ever seen."""
        state = next((layer.state for layer in self.layers if layer.state is not None), None)
        if state is None or not self.ring_sizes:
            return
        segment, lookback = self.sizes.segment, self.fingerprint["num_lookback_segments"]
        written = [max(0, position // segment - lookback) for position in self.positions]
        most = max(self.ring_sizes) // self.num_slots_per_segment
        rings = (state.memory.positions[:, :, 0] >= 0).split(self.ring_sizes, 1)
        held = torch.stack([ring.sum(1) for ring in rings]).amax(0) // self.num_slots_per_segment
        self.forgotten = [  # a full ring looks the same after any number of writes
            number - count if count < most else min(lost, number - most)
            for number, count, lost in zip(written, held.tolist(), self.forgotten, strict=True)
        ]

    def reset(self, rows: torch.Tensor | None = None) -> None:
        """Forgets everything, as if the streams had never begun.

        Args:
            rows: (B,) bool, the rows to reset; all rows, and the batch size with them, if None.

        Raises:
            ValueError: If `rows` is not a bool tensor with one element per row.
        """
        if rows is None:
            self.positions, self.forgotten, self.recent_is_real = [], [], None
            self.num_columns = self.num_croppable_columns = 0
            for layer in self.layers:
                layer.state = None
            return
        if rows.dtype != torch.bool or rows.shape != (len(self.positions),):
            raise ValueError(
                f"rows must be a bool tensor of shape ({len(self.positions)},), one element per row of the state; got "
                f"{rows.dtype} of shape {tuple(rows.shape)}."
            )
        self.positions, self.forgotten = (
            [0 if gone else old for gone, old in zip(rows.tolist(), numbers, strict=True)]
            for numbers in (self.positions, self.forgotten)
        )
        for layer in self.layers:
            if layer.state is not None:
                layer.state = layer.state.reset_rows(rows)
        if self.recent_is_real is not None:
            self.recent_is_real = self.recent_is_real & ~rows.to(self.recent_is_real.device)[:, None]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Puts row `beam_idx[i]` in place of row i, as beam search asks."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the given rows, in the given order (a row may be named more than once).

        Args:
            indices: (B',) int64 row numbers, or (B,) bool.
        """
        indices = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        self.positions, self.forgotten = (
            [numbers[row] for row in indices.tolist()] for numbers in (self.positions, self.forgotten)
        )
        self._map(lambda tensor: tensor.index_select(0, indices.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row `repeats` times, copies next to each other."""
        self.positions, self.forgotten = (
            [number for number in numbers for _ in range(repeats)] for numbers in (self.positions, self.forgotten)
        )
        self._map(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def split(self) -> list["RMTCache"]:
        """One independent state for each stream, in order; none before the first call."""
        parts = [self._copy() for _ in self.positions]
        for row, part in enumerate(parts):
            part.batch_select_indices(torch.tensor([row]))
        return parts

    @classmethod
    def stack(cls, caches: Sequence["RMTCache"]) -> "RMTCache":
        """One independent state of all the streams of several, in order: a batch of what was read apart.

        Rows that have read fewer columns than others count as padded on the left, which `get_seq_length()`, the longest
        of them, includes.

        Args:
            caches: States of one configuration and one dtype, each with at least one stream.

        Raises:
            ValueError: If there is none, one is empty, or they do not fit each other.
        """
        if not caches or not all(cache.is_initialized for cache in caches):
            raise ValueError(
                f"caches must be states that have read something, got {len(caches)} of which "
                f"{sum(not cache.is_initialized for cache in caches)} are empty: leave those out."
            )
        for name, attribute in (("fingerprint", "fingerprint"), ("dtype", "state_dtype")):
            kinds = [getattr(cache, attribute) for cache in caches]
            different = next((kind for kind in kinds if kind != kinds[0]), kinds[0])
            if different != kinds[0]:
                raise ValueError(
                    f"caches must have one {name}, got {kinds[0]} and {different}: stack states of one model only."
                )
        stacked = caches[0]._copy()
        for index, layer in enumerate(stacked.layers):
            states = [cache.layers[index].state for cache in caches]
            layer.state = None if None in states else LayerState.stack(cast(list[LayerState], states))
        stacked.recent_is_real = torch.cat([cast(torch.Tensor, cache.recent_is_real) for cache in caches])
        stacked.positions = [position for cache in caches for position in cache.positions]
        stacked.forgotten = [number for cache in caches for number in cache.forgotten]
        stacked.num_columns = max(cache.num_columns for cache in caches)
        stacked.num_croppable_columns = min(cache.num_croppable_columns for cache in caches)
        stacked.is_stale = any(cache.is_stale for cache in caches)
        return stacked

    @property
    def state_dtype(self) -> torch.dtype | None:
        """Dtype of keys and values; None before the first call."""
        # Not `dtype`: under autocast, accelerate takes whatever has one for a tensor that it must convert to float32.
        state = self.layers[0].state
        return None if state is None else state.keys.dtype

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Writes the state to a folder: `rmt_state.json`, one safetensors file, and a card.

        Args:
            directory: Made if it does not exist. Other files in it stay; a state in it is replaced in one step.

        Raises:
            ValueError: If the state is empty, not finite, or of a part of the heads or layers; nothing is written then.
        """
        if not self.is_initialized:
            raise ValueError(
                "The state to save must have read something, got an empty one: begin with RMTCache(config)."
            )
        if any(layer.state is None for layer in self.layers):
            raise ValueError(
                "A state that is saved must have all layers, got those of one stage of a pipeline: let a model that is "
                "not shared out read the text."
            )
        num_heads = cast(LayerState, self.layers[0].state).keys.shape[1]
        wanted = self.fingerprint["num_key_value_heads"]
        if num_heads != wanted:
            raise ValueError(
                f"A state that is saved must have all {wanted} key/value heads, got {num_heads}, the heads of one "
                "process of several (tensor parallelism): let a model that is not shared out read the text."
            )
        names = state_shapes(self.fingerprint, self.batch_size)
        record = {name: getattr(self, name) for name in CLOCK} | {"dtype": str(self.state_dtype)}
        write_state(directory, record, dict(zip(names, self.tensors(), strict=True)))

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike, model: PreTrainedModel, **hub: Any) -> "RMTCache":
        """Reads a state that `save_pretrained` or `push_to_hub` wrote, to be continued by the model that made it.

        The dtype is that of the file; a call in another dtype converts it, exactly if that is the wider one.

        Args:
            directory: A folder, or the id of a Hub repository.
            model: The model that goes on; the state comes to its device.
            hub: `revision`, `token` and what else `transformers.utils.cached_file` takes.

        Raises:
            OSError: If there is no state.
            ValueError: If it is damaged, of another format or configuration, or not finite.
        """
        cache, record = cls(cast(RMTConfig, model.config)), read_record(directory, **hub)
        check_fingerprint(record["fingerprint"], cache.fingerprint)
        *tensors, recent_is_real = read_tensors(directory, record, model.device, **hub).values()
        per_layer = len(tensors) // len(cache.layers)
        for index, layer in enumerate(cache.layers):
            layer.state = LayerState.from_tensors(tensors[index * per_layer : (index + 1) * per_layer])
        cache.recent_is_real = recent_is_real
        for name in CLOCK:
            setattr(cache, name, record[name])
        return cache

    def push_to_hub(self, repo_id: str, private: bool | None = None, token: str | None = None, **upload: Any) -> str:
        """Puts the state into a model repository of the Hub, which is made if need be.

        Args:
            repo_id: `"user/name"`.
            private: Whether a new repository is private.
            token: Access token; the stored one by default.
            upload: What `huggingface_hub.HfApi.upload_folder` takes: `revision`, `commit_message`, `path_in_repo`, ...

        Returns:
            Address of the commit.
        """
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            upload = {"commit_message": "Upload memory state", **upload}
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **upload))

    def _copy(self) -> "RMTCache":
        """A state of its own that shares the tensors."""
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__)
        copy._free, copy.positions, copy.layers = [True], list(self.positions), [RMTCacheLayer() for _ in self.layers]
        for ours, theirs in zip(self.layers, copy.layers, strict=True):
            theirs.state = ours.state
        return copy

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "RMTCache":
        for layer in self.layers:
            if layer.state is not None:
                layer.state = layer.state.map(function)
        if self.recent_is_real is not None:
            self.recent_is_real = function(self.recent_is_real)
        return self


def state_fingerprint(config: RMTConfig) -> dict[str, Any]:
    """The fields of a configuration that decide the shape and the meaning of a state."""
    names = ["num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "rope_parameters"]
    names += ["chunk_length", "segment_length", "num_lookback_segments", "use_qk_norm", "use_attention_sink"]
    names += ["num_memory_slots", "num_lasting_slots", "num_slots_per_chunk", "num_observing_tokens", "memory_write"]
    fields = vars(config)  # a look through the configuration itself takes 30 times as long
    return {name: fields[name] for name in names}


def check_fingerprint(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Refuses a state that a model of another configuration has written."""
    different = [
        f"{name} {theirs.get(name)} instead of {ours[name]}" for name in ours if theirs.get(name) != ours[name]
    ]
    if different:
        raise ValueError(
            f"past_key_values must be a state of this configuration, got one with {', '.join(different)}: begin a new "
            "one with RMTCache(model.config), or use the model that wrote it."
        )


def check_cache_type(cache: object) -> None:
    """Refuses caches of other models; by what it has, as the class from a Hub folder is not that of the package."""
    if not hasattr(cache, "fingerprint"):
        raise TypeError(
            f"past_key_values must be an RMTCache, got {type(cache).__name__}: pass RMTCache(model.config), or "
            "use_cache=True and the state that the first call returns. (Prefix tuning brings its own: it cannot work.)"
        )


def stream_starts(cache: RMTCache | None, config: RMTConfig, batch_size: int) -> list[int]:
    """Stream position of each row, after checking that the state is one of this model and this batch."""
    if cache is None:
        return [0] * batch_size
    check_fingerprint(cache.fingerprint, state_fingerprint(config))
    if cache.positions and len(cache.positions) != batch_size:
        raise ValueError(
            f"past_key_values holds {len(cache.positions)} streams, the input has {batch_size} rows: give one row per "
            "stream, or use the state's batch_select_indices or batch_repeat_interleave."
        )
    return cache.positions or [0] * batch_size


def real_columns(
    attention_mask: torch.Tensor | None, cache: RMTCache | None, batch_size: int, num_columns: int
) -> torch.Tensor | None:
    """(B, T) bool of this call's columns, None if no column is padding."""
    if attention_mask is None:
        return None
    past = cache.num_columns if cache is not None else 0
    shapes = {(batch_size, num_columns), (batch_size, past + num_columns)}
    if not isinstance(attention_mask, torch.Tensor) or tuple(attention_mask.shape) not in shapes:
        got = tuple(attention_mask.shape) if isinstance(attention_mask, torch.Tensor) else type(attention_mask).__name__
        raise ValueError(
            f"attention_mask must be a tensor of shape {' or '.join(map(str, sorted(shapes)))}, 1 at real tokens and 0 "
            f"at padding; got {got}."
        )
    is_real = attention_mask[:, -num_columns:] != 0
    return None if is_real.all() else is_real


__all__ = ["RMTCache"]
