"""What survives between two calls: the states of all layers and a clock per row; what a user can do with it.

Shapes: B rows, T columns of a call, S segment length.
"""

import copy
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, cast

import torch
from huggingface_hub import HfApi
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_utils import PreTrainedModel

from .configuration_rmt import RMTConfig
from .layout_rmt import CallLayout
from .memory_rmt import HeldSlot, Slots
from .saving_rmt import (
    TENSOR_FILE,
    check_fingerprint,
    read_state,
    reading_device,
    refuse_other_weights,
    state_fingerprint,
    tensor_names,
    weights_record,
    write_state,
)
from .state_rmt import PADDING, UNKNOWN, LayerState, StateSizes, empty_history, forget_ids, hash_ids


# What a state knows besides its tensors; all of it can be written as JSON.
CLOCK = ("fingerprint", "positions", "forgotten", "num_columns", "num_croppable_columns", "is_stale")


def _refuse(reason: str) -> Any:
    def method(self: CacheLayerMixin, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(reason)

    return method


class RMTCacheLayer(CacheLayerMixin):
    """One layer of an `RMTCache`; the model puts a new `LayerState` here after each call."""

    is_sliding = True  # bounded: nothing here grows with the stream
    is_croppable = True
    supports_early_init = False
    state: LayerState | None = None
    lazy_initialization = _refuse("An RMTCache is filled by the forward pass of an RMT model alone.")
    update = _refuse("An RMTCache is written by the forward pass of an RMT model, not through `update`.")
    get_mask_sizes = _refuse("An RMT model builds its own masks: `create_causal_mask` does not know an RMTCache.")
    get_seq_length = _refuse("Ask the RMTCache itself for `get_seq_length()`: the clock belongs to the stream.")

    def get_max_length(self) -> int:
        return -1


class RMTCache(Cache):
    """The state of B streams, all that the model remembers: constant in size, whatever the length of the streams.

    Pass it as `past_key_values`; the model changes it and hands it back. `config` is that of the model.

    Source: docs/architecture.md; the paper says only that memory persists across segments.
    """

    layers: list[RMTCacheLayer]  # type: ignore[assignment]  # all are of our kind
    positions: list[int]  # of each row: real tokens read
    forgotten: list[int]  # of each row: writes that its memory does not hold since `edit_memory`
    num_columns: int  # read, padding included
    num_croppable_columns: int
    history: torch.Tensor | None  # (B, 1 + S) int64: a hash of all ids read, and those of the last S columns
    is_stale: bool  # whether a memory has been changed, of which the prefix is to be made again
    write_card: Any = None  # `rmt_hf.cards`, which does not travel, puts a function here

    def __init__(self, config: RMTConfig) -> None:
        super().__init__(layers=[RMTCacheLayer() for _ in range(config.num_hidden_layers)])
        self.fingerprint, self.sizes = state_fingerprint(config), StateSizes.of(config)
        self.ring_sizes = [size for size, *_ in config.memory_parts] or [0]
        self.num_slots_per_segment = config.num_slots_per_segment
        self.num_columns_to_skip = 0  # of the prompt that assisted generation gives next: they have been read
        self.stopped: torch.Tensor | None = None  # (B,) bool, rows for which the newest token of `generate` is padding
        self._free = [True]  # taken out while a call runs
        self.find_model: Callable[[], nn.Module | None] = lambda: None  # the decoder that wrote the state last
        self.reset()

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

    @property
    def state_dtype(self) -> torch.dtype | None:
        """Dtype of keys and values; None before the first call."""
        # Not `dtype`: under autocast, accelerate takes whatever has one for a tensor that it must convert to float32.
        state = self.layers[0].state
        return None if state is None else state.keys.dtype

    def tensors(self) -> list[torch.Tensor]:
        """All tensors of the state, each with the streams along its first axis; none before the first call."""
        states = [tensor for layer in self.layers if layer.state is not None for tensor in layer.state.tensors()]
        return states if self.history is None else [*states, self.history]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of columns read, padding included, since the start or `begin_prompt`; `positions` has real tokens."""
        return self.num_columns

    def begin_prompt(self) -> None:
        """Counts columns from 0 again, so that `generate` takes the next prompt for what comes next, whatever it is."""
        self.num_columns = 0

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Holds the state for one call; RuntimeError if another holds it: a stream cannot go on in two ways."""
        try:
            self._free.pop()  # one atomic step: two threads cannot both have it
        except IndexError:
            raise RuntimeError(
                "past_key_values is in use by another call: give each thread a state of its own, made with `clone()`."
            ) from None
        try:
            yield
        finally:
            self._free.append(True)

    @torch.compiler.disable
    def commit(
        self, states: list[LayerState], layout: CallLayout, input_ids: torch.Tensor | None, model: nn.Module
    ) -> None:
        """Takes over the states of all layers after a call, in one go: a call that failed has changed nothing."""
        self.find_model = weakref.ref(model)
        segment, device, shape = self.sizes.segment, layout.segment_ends.device, (len(layout.ends), layout.num_columns)
        ids = torch.full(shape, UNKNOWN, device=device) if input_ids is None else input_ids.long().to(device)
        history, forgotten = self.history, self.forgotten or [0] * shape[0]
        history = empty_history(ids, segment) if history is None else history
        if layout.is_real is not None:
            ids = ids.masked_fill(~layout.is_real, PADDING)
        if layout.remembered is not None:  # what is before the last document of a row cannot be rewound
            ids = ids.masked_fill(~layout.remembered, PADDING)
            history = torch.where(layout.remembered[:, :1], history, empty_history(ids, segment))
            forgotten = [lost * old for lost, old in zip(forgotten, layout.remembered[:, 0].tolist(), strict=True)]
        recent = history[:, 1 + layout.num_columns :]
        self.history = torch.cat([hash_ids(ids, history[:, :1]), recent, ids[:, -segment:]], 1)
        for layer, state in zip(self.layers, states, strict=True):
            layer.state = state
        self.positions, self.forgotten, self.is_stale = list(layout.ends), forgotten, False
        self.num_columns += layout.num_columns
        self.num_croppable_columns = min(segment, self.num_croppable_columns + layout.num_columns)

    def crop(self, tokens_to_remove: int) -> None:
        """Rewinds every row by its last columns: the state is as if they had never been read.

        Padding among them takes no token from its row; what `reset` forgot stays forgotten. `tokens_to_remove` is minus
        their number, `num_croppable_columns` (up to `segment_length`) at most: RuntimeError beyond, ValueError above 0.
        """
        columns, history, segment = -int(tokens_to_remove), self.history, self.sizes.segment
        if columns < 0:
            raise ValueError(f"tokens_to_remove must be 0 or below, got {tokens_to_remove}: crop(-n) rewinds n.")
        if columns > self.num_croppable_columns:
            raise RuntimeError(
                f"RMTCache.crop({-columns}): {self.num_croppable_columns} columns can be rewound now, and never "
                f"more than segment_length ({segment}). Keep a `clone()` of the state from before them to go on from, "
                "or draft fewer tokens at a time (num_assistant_tokens, prompt_lookup_num_tokens)."
            )
        if not columns or history is None:
            return
        known, kept, gone = history.split([1, segment - columns, columns], 1)
        removed = (gone != PADDING).sum(1).tolist()
        ends = [end - number for end, number in zip(self.positions, removed, strict=True)]
        crossed = [new // segment < old // segment for new, old in zip(ends, self.positions, strict=True)]
        self.history = torch.cat([forget_ids(gone, known), torch.full_like(gone, PADDING), kept], 1)
        self.positions, self.num_columns = ends, max(0, self.num_columns - columns)
        self.num_croppable_columns -= columns
        if any(crossed):
            self._change_states(lambda state: state.rewind_rows(torch.tensor(crossed), self.sizes))
            self.is_stale = True
            if any(self.forgotten):
                self._count_writes()

    def detach(self) -> "RMTCache":
        """Cuts the gradient to everything read so far, in place."""
        # A copy, because a call without gradients writes in place what a backward pass may still need.
        return self._map(lambda tensor: tensor.detach().clone())

    def to(self, device: torch.device | str | int, non_blocking: bool | None = None) -> "RMTCache":
        """Moves the state to a device, in place.

        With `non_blocking` it stays: so accelerate moves whatever has a method `to` with the inputs and outputs of a
        model, while a state belongs where the layers are.
        """
        return self._map(lambda tensor: tensor.to(device)) if non_blocking is None else self

    def clone(self) -> "RMTCache":
        """An independent copy of the state."""
        return self._copy()._map(torch.Tensor.clone)

    def __deepcopy__(self, memo: dict[int, Any]) -> "RMTCache":
        return self.clone()  # also of tensors with a gradient, and during a call

    def __getstate__(self) -> dict[str, Any]:
        twin = self._copy()._map(lambda tensor: tensor.detach().clone())  # the tensors, and not what they show of
        return vars(twin) | {"find_model": type(None)}  # gives None

    def edit_memory(self, edit: Callable[[Slots], Slots]) -> None:
        """Changes the memory of every layer, also that which `crop` goes back to; the window stays.

        Args:
            edit: From slots (B, M, G, D) to slots of the same shapes; it must not change the given tensors in place.
                Slots without a position (-1) are not seen. A row must look like one that has written some number of
                segments: the youngest groups of each ring are full, equally many in all heads and layers.
        """
        self._change_states(lambda state: state.edit_memory(edit, self.sizes))
        self.is_stale = True
        self._count_writes()

    def slots(self) -> list[HeldSlot]:
        """What memory holds, by row, layer, head, part and slot; what was never written is left out."""
        lasting, segment, found = self.fingerprint["num_lasting_slots"], self.sizes.segment, list[HeldSlot]()
        for index, state in ((index, layer.state) for index, layer in enumerate(self.layers) if layer.state):
            where = (state.memory.positions >= 0).nonzero(as_tuple=True)
            columns = (*where, *(tensor[where] for tensor in state.memory[2:]))
            for row, slot, head, strength, position in zip(*(column.tolist() for column in columns), strict=True):
                part = "lasting" if lasting is None or slot < lasting else "present"
                age = self.positions[row] // segment - position // segment
                found.append(HeldSlot(row, index, head, part, slot, position, strength, age))
        return sorted(found)

    def _count_writes(self) -> None:
        """Notes how many of its writes the memory of each row does not hold, so that no empty slot is ever seen."""
        state = next((layer.state for layer in self.layers if layer.state is not None), None)
        if state is not None:
            rings = (state.memory.positions[:, :, 0] >= 0).split(self.ring_sizes, 1)
            held = torch.stack([ring.sum(1) for ring in rings]).amax(0) // self.num_slots_per_segment
            segment, lookback = self.sizes.segment, self.fingerprint["num_lookback_segments"]
            written = [max(0, position // segment - lookback) for position in self.positions]
            self.forgotten = [number - old for number, old in zip(written, held.tolist(), strict=True)]

    def reset(self, rows: torch.Tensor | None = None) -> None:
        """Forgets the rows `rows`, (B,) bool, as if their streams had never begun; all, and the batch size, if None."""
        if rows is None:
            self.positions, self.forgotten, self.history, self.is_stale = [], [], None, False
            self.num_columns = self.num_croppable_columns = 0
            for layer in self.layers:
                layer.state = None
            return
        if rows.dtype != torch.bool or rows.shape != (len(self.positions),):
            got = f"{rows.dtype} of shape {tuple(rows.shape)}"
            raise ValueError(f"rows must be a bool tensor of shape ({len(self.positions)},), got {got}.")
        for name in ("positions", "forgotten"):
            setattr(self, name, [n * (not gone) for n, gone in zip(getattr(self, name), rows.tolist(), strict=True)])
        self._change_states(lambda state: state.reset_rows(rows))
        if (history := self.history) is not None:
            empty = empty_history(history, self.sizes.segment)
            self.history = torch.where(rows.to(history.device)[:, None], empty, history)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows `indices`, (B',) int64 or (B,) bool, in this order; a row may be named more than once.

        IndexError if there is no such row, ValueError if none is named; nothing has changed then.
        """
        rows = torch.arange(len(self.positions))[indices.cpu()]  # negative ones count from the last, as in any index
        if not len(rows):
            raise ValueError("indices must name at least one row, got none: `reset()` empties a state.")
        for name in ("positions", "forgotten"):
            setattr(self, name, [getattr(self, name)[row] for row in rows.tolist()])
        self._map(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))

    reorder_cache = batch_select_indices  # type: ignore[assignment]  # as beam search calls it

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row `repeats` times, copies next to each other."""
        self.batch_select_indices(torch.arange(len(self.positions)).repeat_interleave(repeats))

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
        of them, includes. ValueError if there is no state, one is empty, or they differ in configuration or dtype.
        """
        kinds = {f"{cache.state_dtype} with {cache.fingerprint}" for cache in caches}
        if len(kinds) != 1 or not all(cache.is_initialized for cache in caches):
            rule = "caches must be states of one configuration and dtype that have read something"
            raise ValueError(f"{rule}, got {' and '.join(kinds) or 'none'}: leave out empty and other ones.")
        stacked = caches[0]._copy()
        for index, layer in enumerate(stacked.layers):
            states = [cache.layers[index].state for cache in caches]
            layer.state = None if None in states else LayerState.stack(cast(list[LayerState], states))
        stacked.history = torch.cat([cast(torch.Tensor, cache.history) for cache in caches])
        for name in ("positions", "forgotten"):
            setattr(stacked, name, [number for cache in caches for number in getattr(cache, name)])
        for name, choose in (("num_columns", max), ("num_croppable_columns", min), ("is_stale", max)):
            setattr(stacked, name, choose(getattr(cache, name) for cache in caches))
        return stacked

    def save_pretrained(self, directory: str | os.PathLike, tensor_file: str = TENSOR_FILE) -> None:
        """Writes the state to a folder: `rmt_state.json`, one safetensors file, and, by `rmt_hf`, a card.

        The folder is made if need be, other files in it stay, and a state in it is replaced in one step. ValueError if
        the state is empty, not finite, or of a part of the heads or layers; nothing is written then. Without {}, a
        place for a hash, `tensor_file` is for folders that are renamed as a whole.
        """
        if not self.is_initialized:
            raise ValueError("The state must have read something, got an empty one: begin with RMTCache(config).")
        wanted, states = self.fingerprint["num_key_value_heads"], [layer.state for layer in self.layers]
        found = {state.keys.shape[1] for state in states if state is not None}
        missing = "layers, got those of one stage of a pipeline" if None in states else ""
        missing = missing or f"{wanted} heads, got {min(found)}, the heads of one process" * (found != {wanted})
        if missing:
            raise ValueError(f"A saved state must have all {missing}: let one process with all of them read the text.")
        record = {name: getattr(self, name) for name in CLOCK} | {"dtype": str(self.state_dtype)}
        record |= {"weights": {}} if (model := self.find_model()) is None else weights_record(model)
        write_state(directory, record, dict(zip(tensor_names(len(states)), self.tensors(), strict=True)), tensor_file)
        if self.write_card is not None:
            self.write_card(directory)

    @classmethod
    def from_pretrained(
        cls, directory: str | os.PathLike, model: PreTrainedModel, check_weights: bool = True, **hub: Any
    ) -> "RMTCache":
        """Reads a state that `save_pretrained` or `push_to_hub` wrote, to be continued by the model that made it.

        Args:
            directory: A folder, or the id of a Hub repository; OSError if it holds no state, ValueError if it holds one
                that is damaged, of another format, configuration or model, or not finite.
            model: The model that goes on; the state comes to its device, and to its dtype as it is read.
            check_weights: Whether to refuse a state that other weights have written.
            hub: `revision`, `token` and what else `transformers.utils.cached_file` takes.
        """
        config = cast(RMTConfig, model.config)
        cache = cls(config)
        record, (*tensors, cache.history) = read_state(directory, config, reading_device(model), **hub)
        if check_weights:
            refuse_other_weights(directory, record, model.base_model)
        size = len(tensors) // len(cache.layers)
        for index, layer in enumerate(cache.layers):
            layer.state = LayerState.from_tensors(tensors[index * size : (index + 1) * size])
        for name in CLOCK:
            setattr(cache, name, record[name])
        return cache

    def push_to_hub(self, repo_id: str, private: bool | None = None, token: str | None = None, **upload: Any) -> str:
        """Puts the state into a model repository of the Hub, in place of one there; returns the address of the commit.

        Repository and branch are made if need be. The state before stays in the history of the branch.

        Args:
            repo_id: `"user/name"`.
            private, token: Whether a new repository is private; the access token, if not the stored one.
            upload: What `huggingface_hub.HfApi.upload_folder` takes: `revision`, `commit_message`, `path_in_repo`, ...
        """
        api, branch = HfApi(token=token), upload.get("revision")
        upload = {"commit_message": "Upload memory state", "delete_patterns": TENSOR_FILE.format("*"), **upload}
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)  # first: a state that is refused makes no repository
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if branch is not None and not branch.startswith("refs/"):
                api.create_branch(repo_id, branch=branch, exist_ok=True)
            if self.write_card is not None:
                self.write_card(folder, repo_id, revision=branch, subfolder=upload.get("path_in_repo"), token=token)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **upload))

    def _copy(self) -> "RMTCache":
        """A state of its own that shares the tensors."""
        twin = object.__new__(type(self))
        twin.__dict__ |= vars(self) | {"_free": [True], "layers": [copy.copy(layer) for layer in self.layers]}
        return twin

    @contextmanager
    def unchanged_on_error(self) -> Iterator[None]:
        """Whatever raises inside leaves the state as it was: calls write where a state has nothing, or make it anew."""
        before = self._copy()
        try:
            yield
        except BaseException:
            self.go_back_to(before)
            raise

    def go_back_to(self, before: "RMTCache") -> None:
        """Takes over another state."""
        vars(self).update({name: value for name, value in vars(before).items() if name != "_free"})

    def _change_states(self, function: Callable[[LayerState], LayerState]) -> None:
        for layer in self.layers:
            layer.state = None if layer.state is None else function(layer.state)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "RMTCache":
        self._change_states(lambda state: state.map(function))
        self.history = None if self.history is None else function(self.history)
        return self


def check_cache_type(cache: object) -> None:
    """Refuses caches of other models; by what it has, as the class from a Hub folder is not that of the package."""
    if not hasattr(cache, "fingerprint"):
        rule = f"past_key_values must be an RMTCache, got {type(cache).__name__}: pass RMTCache(model.config), or none"
        raise TypeError(f"{rule} and use_cache=True. (Prefix tuning brings a cache of its own: it cannot work.)")


def stream_starts(cache: RMTCache | None, config: RMTConfig, batch_size: int) -> list[int]:
    """Stream position of each row, after checking that the state is one of this model and this batch."""
    if cache is None:
        return [0] * batch_size
    check_fingerprint(cache.fingerprint, state_fingerprint(config))
    if cache.positions and len(cache.positions) != batch_size:
        streams = f"past_key_values holds {len(cache.positions)} streams, the input has {batch_size} rows"
        raise ValueError(f"{streams}: give one row per stream, or use batch_select_indices, batch_repeat_interleave.")
    return cache.positions or [0] * batch_size


__all__ = ["RMTCache"]
