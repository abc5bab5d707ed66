"""State of the streams of one process between batches, and the calls of the model that read a batch.

Truncated backpropagation reads the last columns before each slice again, with gradient: those columns are kept, and the
state before them without gradient.

Shapes: B streams, T columns.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from ..cache_rmt import RMTCache
from ..data import IGNORED
from ..modeling_rmt import RMTPreTrainedModel
from ..saving_rmt import RECORD_NAME as STATE_NAME


RECORD_NAME = "streams.json"
COLUMNS_NAME = "columns.safetensors"
Columns = dict[str, torch.Tensor]  # `input_ids`, `attention_mask`, `position_ids`, labels, (B, T) each


class Call(NamedTuple):
    """One call of the model: its columns, whether any is learned, and whether it is the last call of the batch."""

    columns: Columns
    is_learned: bool
    is_last: bool


@dataclass
class StreamState:
    """State of the streams of one process.

    Args:
        state: State before `columns`, without gradient; None before the first batch.
        columns: The last columns that were read, which may still get gradient.
        loss_sum: Sum of the losses of an evaluation.
        num_targets: Labels that the evaluation predicted.
    """

    state: RMTCache | None = None
    columns: Columns = field(default_factory=dict)
    loss_sum: float = 0.0
    num_targets: int = 0

    def save(self, directory: str | os.PathLike, record: dict[str, Any]) -> None:
        """Writes safetensors and JSON, with a record of the run that `load` compares."""
        if self.state is None:
            return
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        if self.state.is_initialized:
            self.state.save_pretrained(folder, "state.safetensors")  # on the Hub the next checkpoint replaces it
        save_file({name: columns.contiguous() for name, columns in self.columns.items()}, folder / COLUMNS_NAME)
        (folder / RECORD_NAME).write_text(json.dumps(record, indent=1) + "\n", "utf-8")

    @classmethod
    def load(cls, directory: str | os.PathLike, model: RMTPreTrainedModel, record: dict[str, Any]) -> "StreamState":
        """Reads what `save` wrote.

        Raises:
            ValueError: If the folder holds no streams, or those of a run with other settings.
        """
        folder = Path(directory)
        if not (folder / RECORD_NAME).is_file():
            raise ValueError(
                f"The checkpoint must hold the state of its streams, got no {folder}: resume from one that was written "
                "with stream_length, with the same number of processes and without save_only_model, or begin anew."
            )
        written = json.loads((folder / RECORD_NAME).read_text("utf-8"))
        other = [
            f"{name} {record[name]} instead of {written.get(name)}"
            for name in record
            if written.get(name) != record[name]
        ]
        if other:
            raise ValueError(
                f"A run in stream mode goes on with the arguments it began with, got {', '.join(other)}: its streams "
                "are in the middle of other documents. Give the same arguments, or begin anew."
            )
        columns = {name: tensor.to(model.device) for name, tensor in load_file(folder / COLUMNS_NAME).items()}
        has_read = (folder / STATE_NAME).is_file()
        return cls(RMTCache.from_pretrained(folder, model) if has_read else RMTCache(model.config), columns)

    def with_earlier_columns(self, inputs: Columns) -> tuple[Columns, int]:
        """The earlier columns that are read again, without labels, then those of a slice; and how many are earlier."""
        if not self.columns:
            return inputs, 0
        ignored = {name: torch.full_like(self.columns[name], IGNORED) for name in ("labels", "shift_labels")}
        before = self.columns | ignored
        return {name: torch.cat([before[name], inputs[name]], 1) for name in inputs}, before["input_ids"].shape[1]


def fingerprint_documents(dataset: Any) -> str | None:
    """How many documents a dataset has, and a hash of the first and the last; None if it has no length."""
    if not hasattr(dataset, "__len__"):
        return None
    ends = [torch.as_tensor(dataset[index]["input_ids"]).tolist() for index in (0, len(dataset) - 1)]
    return f"{len(dataset)} documents {hashlib.sha256(json.dumps(ends).encode()).hexdigest()[:16]}"


def begin_documents(cache: RMTCache, columns: Columns) -> None:
    """Resets the streams whose first token in a call begins a document."""
    if not cache.is_initialized or "position_ids" not in columns:
        return
    position_ids = columns["position_ids"]
    real = columns.get("attention_mask", torch.ones_like(position_ids)) != 0
    first = position_ids.gather(1, real.to(torch.uint8).argmax(1, keepdim=True))[:, 0]
    begins = real.any(1) & (first == 0)
    if begins.any():
        cache.reset(rows=begins)


def read_columns(
    call_model: Callable[[Call, RMTCache], tuple[torch.Tensor, RMTCache]],
    columns: Columns,
    state: RMTCache,
    num_unlearned: int = 0,
    keep: int = 0,
    group: int | None = None,
) -> tuple[torch.Tensor, RMTCache]:
    """Reads the columns of a batch in as many calls as are needed.

    Args:
        call_model: Gives the loss of a call, and the state after it; leaves the state before it as it is.
        columns: Of the batch.
        state: The state before them.
        num_unlearned: First columns, which have no labels.
        keep: Last columns, which the next batch reads again.
        group: Columns of a call; None reads all at once.

    Returns:
        The sum of the losses, and the state before the columns to keep, without gradient.
    """
    total = columns["input_ids"].shape[1]
    keep_from = max(0, total - keep)
    losses, kept = [], None
    for start, stop in pairwise(sorted({keep_from, total, *range(0, total, group or total)})):
        if start == keep_from:
            kept = without_gradient(state)
        part = {name: tensor[:, start:stop].contiguous() for name, tensor in columns.items()}
        loss, state = call_model(Call(part, stop > num_unlearned, stop == total), state)
        losses.append(loss)
    return torch.stack(losses).sum(), without_gradient(state) if kept is None else kept


@torch.no_grad()
def without_gradient(state: RMTCache) -> RMTCache:
    """A copy that no gradient goes through."""
    return state.clone()
