"""What memory is doing while a model trains: gates, reads, slots and fusion, for the loggers of `Trainer`. A home file.

Shapes: B rows, T columns, E hidden size, M slots, H query heads, G key/value heads, D head width.
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

from .attention_rmt import RMTAttention
from .cache_rmt import RMTCache
from .evaluation import evaluation_mode
from .lane_state import Columns, LaneState, begin_documents
from .memory_rmt import RMTMemory, Slots, at_least_float32
from .modeling_rmt import MEMORY_GATE_BIAS, RMTModel
from .training_arguments import RMTTrainingArguments


ALIKE = 0.99  # mean cosine between the slots of a layer from which on they count as one
PATIENCE = 3  # logs in a row that must show a collapse before it is warned about
INPUTS = ("input_ids", "attention_mask", "position_ids", "inputs_embeds")
NO_WAY_BACK = (
    "A gate that is exactly 0 or 1 has no gradient, so this will not mend itself. Begin again with a lower learning "
    "rate, a longer warm-up or a smaller max_grad_norm, or go on with gates half open: set gate_weight of every "
    f"`layer.self_attn.memory` to 0 and gate_bias to {MEMORY_GATE_BIAS}, as they begin."
)
# What is warned about: a figure of a layer, from which value on, and what that means.
COLLAPSES = {
    "memory_gate_shut": (
        1.0,
        f"All gates are shut: what was written first stays for ever, nothing later is remembered. {NO_WAY_BACK}",
    ),
    "memory_gate_open": (
        1.0,
        f"All gates are open: every write replaces a slot whole, nothing outlives a turn of the ring. {NO_WAY_BACK}",
    ),
    **{
        f"memory_{part}_similarity": (
            ALIKE,
            f"The {part}s of all slots are alike, so {consequence}. Look whether the texts differ and hidden states of "
            "different tokens do; else begin again with a lower learning rate, or with use_qk_norm=True.",
        )
        for part, consequence in (
            ("key", "no query can choose between them"),
            ("value", "it makes no difference which is read"),
        )
    },
}

logger = logging.get_logger(__name__)


class LayerMeans:
    """Weighted means of one layer by name, gathered piece by piece."""

    def __init__(self) -> None:
        self._sums: dict[str, list[torch.Tensor]] = defaultdict(list)

    def add(self, name: str, values: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Takes in values, each counting as much as its weight, or as all others; weights are broadcast to them."""
        weights = torch.ones_like(values) if weights is None else weights.to(values.dtype).expand_as(values)
        self._sums[name].append(torch.stack([(values * weights).sum(), weights.sum()]).double())

    def means(self) -> dict[str, float]:
        """The means of what has any weight."""
        totals = {name: torch.stack(sums).sum(0).tolist() for name, sums in self._sums.items()}
        return {name: total / weight for name, (total, weight) in totals.items() if weight > 0}


class RMTMemoryCallback(TrainerCallback):
    """Logs what memory does, at every log of `RMTTrainer`, and warns once when memory has collapsed.

    The first batch of a step, lanes and all, is read once more when it is logged, with the weights of then, without
    gradient and dropout: training goes on as if nothing had been looked at. Logged are means over layers:

    - `memory_gate_mean`, and the shares that are exactly 0 and 1, `memory_gate_shut` and `memory_gate_open`: of writes
      to slots that held something.
    - `memory_slot_use`: share of the read attention that goes to slots and not to the null slot.
    - `memory_read_age`: segments back to the one that was last written to the place of what is read, by attention.
    - `memory_key_norm`, `memory_value_norm`, and `memory_key_similarity`, `memory_value_similarity`, the mean cosine
      between two slots: of slots that hold something.
    - `fusion_local`, `fusion_memory` and, with softmax fusion, `fusion_global`: what each path counts.

    What there is nothing of, in short rows that write nothing for example, is not logged.

    Args:
        num_rows: Rows that are read once more, of each process.
        num_segments: The last segments of them, of which it is noted what they read; what is before is read in one go.

    Raises:
        ValueError: When training begins, if the trainer is not an `RMTTrainer`, or the model has no memory.
    """

    def __init__(self, num_rows: int = 2, num_segments: int = 4) -> None:
        for name, value in (("num_rows", num_rows), ("num_segments", num_segments)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        self.num_rows, self.num_segments = num_rows, num_segments
        self._model: RMTModel | None = None
        self._batch: tuple[Columns, LaneState] | None = None  # the first of the step
        self._collapsed: Counter[tuple[str, int]] = Counter()  # logs in a row, by what and layer
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
            raise ValueError(f"RMTMemoryCallback wants an RMT model with memory, got {got}: leave the callback out.")
        self._batch, self._collapsed, self._warned = None, Counter(), set()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._batch = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._batch = None

    def keep(self, inputs: Columns, lanes: LaneState) -> None:
        """Keeps the first batch of a step: `RMTTrainer` names each one, with the lanes as they are before it."""
        if self._batch is None:
            self._batch = {name: inputs[name] for name in INPUTS if inputs.get(name) is not None}, lanes

    def measure(self) -> dict[str, float]:
        """What is logged of the step, by name; warns of what has collapsed."""
        if self._batch is None or self._model is None:
            return {}
        inputs, lanes = self._batch
        columns, _ = lanes.again(inputs)
        columns = {name: tensor[: self.num_rows].detach() for name, tensor in columns.items()}
        state = RMTCache(self._model.config)
        if lanes.state is not None and lanes.state.is_initialized:
            state = lanes.state.clone()
            state.batch_select_indices(torch.arange(min(self.num_rows, len(state.positions))))
        layers = [layer.means() for layer in read_once_more(self._model, columns, state, self.num_segments)]
        self._batch = None
        self._warn(layers)
        names = sorted({name for layer in layers for name in layer})
        found = {name: [layer[name] for layer in layers if name in layer] for name in names}
        return {name: sum(values) / len(values) for name, values in found.items()}

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


@torch.no_grad()
def read_once_more(model: RMTModel, inputs: Columns, state: RMTCache, num_segments: int) -> list[LayerMeans]:
    """Reads columns, the last ones segment by segment, and gathers what memory does in every layer.

    Args:
        model: Read in evaluation mode, and left in the mode it was in.
        inputs: `input_ids` or `inputs_embeds`, `attention_mask`, `position_ids`, (B, T, ...) each.
        state: The state before them; changed in place.
        num_segments: The last segments, of which it is noted what they read.
    """
    means = [LayerMeans() for _ in model.layers]
    columns = next(inputs[name] for name in ("input_ids", "inputs_embeds") if name in inputs).shape[1]
    segment = model.config.segment_length
    with evaluation_mode(model):
        first = max(0, -(-columns // segment) - num_segments) * segment
        for start, stop in pairwise(sorted({0, *range(first, columns, segment), columns})):
            piece = {name: tensor[:, start:stop] for name, tensor in inputs.items()}
            begin_documents(state, piece)
            with watched(model, piece, means, notes_reads=start >= first):
                model(**piece, past_key_values=state)
    for layer, of_layer in zip(state.layers, means, strict=True):
        if layer.state is not None:
            note_slots(layer.state.memory, of_layer)
    return means


@contextmanager
def watched(model: RMTModel, piece: Columns, means: list[LayerMeans], notes_reads: bool) -> Iterator[None]:
    """Notes what every layer does in one call of a piece, inside of the context; reads if it is one segment."""
    ids = next(piece[name] for name in ("input_ids", "inputs_embeds") if name in piece)
    is_real = piece.get("attention_mask", torch.ones(ids.shape[:2], device=ids.device)) != 0
    with ExitStack() as stack:
        for layer, of_layer in zip(model.layers, means, strict=True):
            attention = cast(RMTAttention, layer.self_attn)

            def note(module: nn.Module, args: tuple, kwargs: dict[str, Any], of_layer: LayerMeans = of_layer) -> None:
                note_fusion(cast(RMTAttention, module), args[0], is_real, of_layer)
                if notes_reads and kwargs["state"] is not None:
                    note_reads(cast(RMTAttention, module), args[0], kwargs["state"].memory, is_real, of_layer)

            stack.enter_context(attention.register_forward_pre_hook(note, with_kwargs=True))
            stack.enter_context(gates_noted(attention.memory, of_layer))
        yield


@contextmanager
def gates_noted(memory: RMTMemory, means: LayerMeans) -> Iterator[None]:
    """Notes the gate of every write inside of the context that meets a slot that holds something."""
    openness = memory.openness

    def noting(old: Slots, new: Slots) -> torch.Tensor:
        gate = openness(old, new)
        meets = (old.strengths > -torch.inf) & (new.strengths > -torch.inf)
        for name, values in (("mean", gate), ("shut", gate == 0), ("open", gate == 1)):
            means.add(f"memory_gate_{name}", values.to(gate.dtype), meets)
        return gate

    with patch.object(memory, "openness", noting):
        yield


def note_fusion(attention: RMTAttention, hidden: torch.Tensor, is_real: torch.Tensor, means: LayerMeans) -> None:
    """Notes what each path counts for hidden states (B, T, E) of real tokens, (B, T) bool."""
    shares = attention.fusion(hidden)
    for name, share in zip(("global", "local", "memory"), shares, strict=True):
        if share is not None:
            of_heads = share.expand(*is_real.shape, attention.config.num_attention_heads, 1)
            means.add(f"fusion_{name}", at_least_float32(of_heads), is_real[..., None, None])


def note_reads(
    attention: RMTAttention, hidden: torch.Tensor, memory: Slots, is_real: torch.Tensor, means: LayerMeans
) -> None:
    """Notes how much of memory is read, and how old it is.

    Args:
        attention: The layer.
        hidden: (B, T, E), after the input norm; tokens of one segment.
        memory: Slots (B, M, G, D) as those tokens find it.
        is_real: (B, T) bool.
        means: To put the figures in.
    """
    on_slots = slot_attention(attention, hidden, memory)  # (B, G, H / G, T, M)
    finds_slots = (memory.strengths > -torch.inf).any(1)  # (B, G)
    counts = is_real[:, None, None] & finds_slots[..., None, None]
    mass = on_slots.sum(-1)
    means.add("memory_slot_use", mass, counts)
    blocks = attention.memory.blocks
    ages = attention.num_lookback_segments + torch.arange(blocks, 0, -1, device=hidden.device)  # oldest first
    ages = ages.repeat_interleave(memory.strengths.shape[1] // blocks).to(mass.dtype)
    means.add("memory_read_age", ages.expand_as(on_slots), on_slots * counts[..., None])


def slot_attention(attention: RMTAttention, hidden: torch.Tensor, memory: Slots) -> torch.Tensor:
    """Weights (B, G, H / G, T, M) with which hidden states (B, T, E) read slots; the rest is the null slot's."""
    query = attention.memory_q_proj(hidden).unflatten(-1, (-1, attention.head_dim))
    query = cast(nn.Module, attention.memory_q_norm)(query) if attention.use_qk_norm else query
    query = (
        at_least_float32(query).unflatten(2, (-1, attention.num_key_value_groups)) * attention.scaling
    )  # (B, T, G, H / G, D)
    keys, null_key = memory.keys.to(query.dtype), attention.memory.null_key.to(query.dtype)
    scores = torch.einsum("btgrd,bmgd->bgrtm", query, keys)
    scores = scores + memory.strengths.to(query.dtype).transpose(1, 2)[:, :, None, None]
    null_scores = torch.einsum("btgrd,gd->bgrt", query, null_key)
    return torch.cat([null_scores[..., None], scores], -1).softmax(-1)[..., 1:]


def note_slots(memory: Slots, means: LayerMeans) -> None:
    """Notes how large and how alike the slots (B, M, G, D) are that hold something."""
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
