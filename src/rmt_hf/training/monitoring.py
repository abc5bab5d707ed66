"""Logs of memory in training: gates, reads, slots and fusion, for the loggers of `Trainer`.

Shapes: B rows, T columns, F views, E hidden size, M slots, P columns of the prefix, H query heads, G key/value heads,
D head width.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.utils import logging

from ..attention_rmt import RMTAttention, RMTFusion, Rotary
from ..cache_rmt import RMTCache
from ..evaluation.bits import evaluation_mode
from ..layout_rmt import CallLayout, ViewGroup
from ..memory_rmt import LEAST, RMTMemory, RMTRing, Slots, at_least_float32
from ..modeling_rmt import GATE_BIAS, GATE_SCALE, RMTModel
from ..state_rmt import LayerState
from .arguments import RMTTrainingArguments
from .sharded import is_sharded
from .stream_state import Columns, StreamState, begin_documents


PATIENCE = 3  # consecutive logs that must show a collapse before the callback warns
INPUTS = ("input_ids", "attention_mask", "position_ids", "inputs_embeds")
NO_GRADIENT = (
    "A gate that is exactly 0 or 1 has no gradient, so training cannot repair it. Begin again with a lower learning "
    "rate, a longer warm-up or a smaller max_grad_norm, or go on with gates as they begin: for every ring in "
    f"`layer.self_attn.memory.rings`, set gate_weight to 0, gate_scale to {GATE_SCALE} and gate_bias to {GATE_BIAS}."
)
NO_DIFFERENCE = (
    "Check that the texts differ, and the hidden states of different tokens; else begin again with a lower learning "
    "rate, or with use_qk_norm=True."
)
# Figures of a layer: the value from which on memory has collapsed, and what that means.
COLLAPSES = {
    "memory_gate_shut": (1.0, f"All gates are shut: the first writes stay, later ones are lost. {NO_GRADIENT}"),
    "memory_gate_open": (1.0, f"All gates are open: every write replaces a slot whole. {NO_GRADIENT}"),
    "memory_key_similarity": (0.99, f"The keys of all slots are alike: queries cannot choose. {NO_DIFFERENCE}"),
    "memory_value_similarity": (0.99, f"The values of all slots are alike: reads cannot differ. {NO_DIFFERENCE}"),
}

logger = logging.get_logger(__name__)


class LayerMeans:
    """Weighted means of the figures of one layer over calls."""

    def __init__(self) -> None:
        self._sums: dict[str, list[torch.Tensor]] = defaultdict(list)

    def add(self, name: str, values: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Adds values with their weights, which are broadcast to them; without weights all count the same."""
        weights = torch.ones_like(values) if weights is None else weights.to(values.dtype).expand_as(values)
        self._sums[name].append(torch.stack([(values * weights).sum(), weights.sum()]).double())

    def means(self) -> dict[str, float]:
        """The mean of every figure that has any weight."""
        totals = {name: torch.stack(sums).sum(0).tolist() for name, sums in self._sums.items()}
        return {name: total / weight for name, (total, weight) in totals.items() if weight > 0}


class RMTMemoryCallback(TrainerCallback):
    """Logs figures of memory at every log of `RMTTrainer`, and warns once when memory has collapsed.

    At a log the callback reads the first batch of the step once more, from the state before it, with the weights of the
    log, without gradient and dropout. Training is not affected. The figures are means over layers:

    - `memory_gate_mean`, and the shares of gates that are exactly 0 and 1, `memory_gate_shut` and `memory_gate_open`:
      of candidates that meet a written slot.
    - `memory_slot_use`: share of attention that goes to slots, of tokens that see any: of prefix and window together,
      or with softmax fusion of the prefix alone.
    - `memory_read_age`: segments from a token back to that of the slot it reads, weighted by attention.
    - `memory_key_norm`, `memory_value_norm`, and `memory_key_similarity`, `memory_value_similarity`, the mean cosine
      between two slots: of written slots.
    - `fusion_local`: weight of the local path.

    A figure without values is not logged, in rows too short for a write for example.

    Args:
        num_rows: Rows of each process that are read once more.
        num_segments: Last segments whose reads are measured; one call reads all before them.

    Raises:
        ValueError: When training begins, if the trainer is not an `RMTTrainer` or the model has no memory.
    """

    def __init__(self, num_rows: int = 2, num_segments: int = 4) -> None:
        for name, value in (("num_rows", num_rows), ("num_segments", num_segments)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        self.num_rows, self.num_segments = num_rows, num_segments
        self._model: RMTModel | None = None
        self._batch: tuple[Columns, StreamState] | None = None  # the first batch of the step
        self._collapsed: Counter[tuple[str, int]] = Counter()  # consecutive logs by figure and layer
        self._warned: set[str] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not isinstance(args, RMTTrainingArguments):
            raise ValueError(
                f"RMTMemoryCallback logs through RMTTrainer, got a Trainer with {type(args).__name__}: take RMTTrainer "
                "and RMTTrainingArguments, which train on plain rows as well."
            )
        self._model = next((module for module in model.modules() if isinstance(module, RMTModel)), None)
        if self._model is None or not self._model.config.num_memory_slots:
            got = f"a {type(model).__name__}" if self._model is None else "num_memory_slots=0"
            raise ValueError(f"RMTMemoryCallback needs an RMT model with memory, got {got}: leave the callback out.")
        self._batch, self._collapsed, self._warned = None, Counter(), set()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._batch = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._batch = None

    def keep(self, inputs: Columns, streams: StreamState) -> None:
        """Keeps the first batch of a step, and the state before it; `RMTTrainer` calls it with every batch."""
        if self._batch is None:
            self._batch = {name: inputs[name] for name in INPUTS if inputs.get(name) is not None}, streams

    def measure(self) -> dict[str, float]:
        """The figures of the step by name; warns when one shows a collapse."""
        if self._batch is None or self._model is None:
            return {}
        inputs, streams = self._batch
        columns, _ = streams.with_earlier_columns(inputs)
        columns = {name: tensor[: self.num_rows].detach() for name, tensor in columns.items()}
        state = RMTCache(self._model.config)
        if streams.state is not None and streams.state.is_initialized:
            state = streams.state.clone()
            state.batch_select_indices(torch.arange(min(self.num_rows, len(state.positions))))
        layers = [layer.means() for layer in read_once_more(self._model, columns, state, self.num_segments)]
        self._batch = None
        self._warn(layers)
        found: dict[str, list[float]] = defaultdict(list)
        for name, value in (item for layer in layers for item in layer.items()):
            found[name].append(value)
        return {name: sum(found[name]) / len(found[name]) for name in sorted(found)}

    def _warn(self, layers: list[dict[str, float]]) -> None:
        for name, (limit, meaning) in COLLAPSES.items():
            for index, layer in enumerate(layers):
                if name in layer:
                    self._collapsed[name, index] = self._collapsed[name, index] + 1 if layer[name] >= limit else 0
            where = [index for index in range(len(layers)) if self._collapsed[name, index] >= PATIENCE]
            if where and name not in self._warned:
                self._warned.add(name)
                values = ", ".join(f"{layers[index][name]:.4f}" for index in where if name in layers[index])
                logger.warning(f"Memory has collapsed in the layers {where}: {name} is {values}. {meaning}")


class RMTGradientCallback(TrainerCallback):
    """Warns when the first step moves nothing, because no parameter that is trained has a gradient but zero.

    So it is where memory alone is trained, by rows that fit into the window. `RMTTrainer` has this callback; give it to
    any other trainer.
    """

    def __init__(self) -> None:
        self._has_looked = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._has_looked = False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self._has_looked or is_sharded(model):
            return
        self._has_looked = True
        gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
        if gradients and not any(gradient.any() for gradient in gradients.values()):
            logger.warning(
                f"Training must have a gradient, got zero for all {len(gradients)} trained parameters in the first "
                f"step ({next(iter(gradients))} and others): memory learns only from rows that are longer than the "
                "window of (num_lookback_segments + 1) * segment_length tokens, and from labels beyond it. Give longer "
                "rows, a smaller segment_length, or train more than memory."
            )


@torch.no_grad()
def read_once_more(model: RMTModel, inputs: Columns, state: RMTCache, num_segments: int) -> list[LayerMeans]:
    """Figures of every layer from one more reading, in evaluation mode; the last `num_segments` one by one.

    `inputs` are `input_ids` or `inputs_embeds`, `attention_mask`, `position_ids`; `state` changes in place.
    """
    means = [LayerMeans() for _ in model.layers]
    columns = next(inputs[name] for name in ("input_ids", "inputs_embeds") if name in inputs).shape[1]
    segment = model.config.segment_length
    with evaluation_mode(model):
        first = max(0, -(-columns // segment) - num_segments) * segment
        for start, stop in pairwise(sorted({0, *range(first, columns, segment), columns})):
            part = {name: tensor[:, start:stop] for name, tensor in inputs.items()}
            begin_documents(state, part)
            with watched(model, part, means, notes_reads=start >= first):
                model(**part, past_key_values=state)
    for layer, of_layer in zip(state.layers, means, strict=True):
        if layer.state is not None:
            note_slots(layer.state.memory, of_layer)
    return means


@contextmanager
def watched(model: RMTModel, columns: Columns, means: list[LayerMeans], notes_reads: bool) -> Iterator[None]:
    """Measures every layer in one call inside the context; reads only with `notes_reads`."""
    ids = next(columns[name] for name in ("input_ids", "inputs_embeds") if name in columns)
    is_real = columns.get("attention_mask", torch.ones(ids.shape[:2], device=ids.device)) != 0
    with ExitStack() as stack:
        for layer, of_layer in zip(model.layers, means, strict=True):
            attention = cast(RMTAttention, layer.self_attn)
            stack.enter_context(fusion_noted(attention.fusion, is_real, of_layer))
            for ring in cast(RMTMemory, attention.memory).rings:
                stack.enter_context(gates_noted(cast(RMTRing, ring), of_layer))
            if notes_reads:
                stack.enter_context(reads_noted(attention, is_real, of_layer))
        yield


@contextmanager
def gates_noted(ring: RMTRing, means: LayerMeans) -> Iterator[None]:
    """Measures the gates of candidates that meet a written slot, where the gate decides."""
    openness = ring.openness

    def noting(old: Slots, new: Slots, kept: torch.Tensor, offered: torch.Tensor) -> torch.Tensor:
        gate = openness(old, new, kept, offered)
        meets = (old.strengths > -torch.inf) & (kept > LEAST / 2) & (offered > LEAST / 2)
        for name, values in (("mean", gate), ("shut", gate == 0), ("open", gate == 1)):
            means.add(f"memory_gate_{name}", values.to(gate.dtype), meets)
        return gate

    with patch.object(ring, "openness", noting):
        yield


@contextmanager
def fusion_noted(fusion: RMTFusion, is_real: torch.Tensor, means: LayerMeans) -> Iterator[None]:
    """Measures the weight of the local path for real tokens, (B, T) bool."""

    def note(module: nn.Module, args: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, Any]) -> None:
        hidden_states, window, local, _ = args
        if local is not None:
            share = fusion.share(hidden_states) if fusion.is_gated else fusion.logits.softmax(0)[1]
            means.add("fusion_local", at_least_float32(share.expand(*window.shape[:3], 1)), is_real[..., None, None])

    handle = fusion.register_forward_pre_hook(note)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def reads_noted(attention: RMTAttention, is_real: torch.Tensor, means: LayerMeans) -> Iterator[None]:
    """Measures how much real tokens, (B, T) bool, read of slots in one call, and how old those are."""
    make_prefix, read = attention.prefix, attention.read
    memories: list[Slots] = []  # (B, F, M, G, D) as the views of the call see them, if prefixes are made of them

    def prefix(memory: Slots, rotary: Rotary) -> tuple[torch.Tensor, torch.Tensor]:
        memories.append(memory)
        return make_prefix(memory, rotary)

    def noting(
        query: torch.Tensor, frame: LayerState, prefix: Any, layout: CallLayout, mask: Any, columns: tuple[int, int]
    ) -> Any:
        if columns[0] == 0:  # the prefix, and the window too if they have one softmax
            weights = slot_attention(attention, query, frame, prefix, layout, columns[1])
            memory = memories[0] if memories else frame.memory.map(lambda tensor: tensor[:, None])
            note_reads(weights, memory, layout, attention.segment_length, is_real, means)
        return read(query, frame, prefix, layout, mask, columns)

    with patch.object(attention, "prefix", prefix), patch.object(attention, "read", noting):
        yield


def slot_attention(
    attention: RMTAttention, query: torch.Tensor, frame: LayerState, prefix: Any, layout: CallLayout, num_columns: int
) -> torch.Tensor:
    """Attention of the queries of each view to slots, (B, F, queries, G, H / G, M): the last M columns of the prefix.

    `num_columns` of prefix and window share a softmax; the others are as `RMTAttention.read` takes them.
    """
    views, heads = layout.num_views, frame.keys.shape[1]
    asked = layout.spread(query, views * attention.segment_length).unflatten(1, (views, -1)).unflatten(3, (heads, -1))
    keys = attention.columns(frame, prefix, layout, ViewGroup(0, views, 0, 0), 0, num_columns)[0]
    scores = torch.einsum("bfqgrd,bfgkd->bfqgrk", at_least_float32(asked), at_least_float32(keys)) * attention.scaling
    seen = layout.window_mask(attention.config)[:, :, :, None, None, :num_columns]
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()  # there may be nothing to see
    return weights[..., attention.prefix_length - attention.num_memory_slots : attention.prefix_length]


def note_reads(
    weights: torch.Tensor, memory: Slots, layout: CallLayout, segment: int, is_real: torch.Tensor, means: LayerMeans
) -> None:
    """Measures how much of the slots (B, F, M, G, D) is read, and how old they are; weights as of `slot_attention`."""
    positions = memory.positions.transpose(2, 3).sort(-1).values[:, :, None, :, None]  # in the order of the columns
    is_slot = positions >= 0  # else it is empty, or the sink
    real = layout.spread(is_real.to(weights.dtype), layout.num_views * segment).unflatten(1, (layout.num_views, -1))
    counts = real[..., None, None] * is_slot.any(-1)
    weights = weights * is_slot
    means.add("memory_slot_use", weights.sum(-1), counts)
    ages = layout.view_segments[..., None, None, None, None] - positions // segment
    means.add("memory_read_age", ages.to(weights.dtype).expand_as(weights), weights * counts[..., None])


def note_slots(memory: Slots, means: LayerMeans) -> None:
    """Measures how large and how alike the written slots (B, M, G, D) are."""
    is_written = memory.strengths > -torch.inf  # (B, M, G)
    count = is_written.sum(1)  # (B, G)
    for part, states in (("key", memory.keys), ("value", memory.values)):
        states = at_least_float32(states)
        norms = states.norm(dim=-1)
        means.add(f"memory_{part}_norm", norms, is_written)
        directions = nn.functional.normalize(states, dim=-1) * is_written[..., None]
        # Of n directions, the square of the sum is n and twice the cosines of all pairs.
        cosines = (directions.sum(1).square().sum(-1) - count) / (count * (count - 1)).clamp_min(1)
        means.add(f"memory_{part}_similarity", cosines, count > 1)
