"""Exact checkpoints of sharded models (FSDP2 by `DistributedConfig`), which `Trainer` refuses to resume from.

torch gathers the shards, one process writes them whole, and every process reads its own shard again.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)


TENSORS_NAME, NUMBERS_NAME = "optimizer.safetensors", "optimizer.json"


def is_sharded(model: Any) -> bool:
    """Whether transformers has sharded the weights of a model by FSDP2."""
    return bool(getattr(model, "is_distributed_loading_by_transformers", False)) and hasattr(model, "reshard")


@contextmanager
def with_weights_only(model: Any = None, args: Any = None, *others: Any, **named: Any) -> Iterator[None]:
    """Sets `save_only_model` while a `Trainer` of a sharded model is made, which refuses to save more."""
    saves_more = is_sharded(model) and args is not None and not args.save_only_model
    if saves_more:
        args.save_only_model = True
    try:
        yield
    finally:
        if saves_more:
            args.save_only_model = False


def save_optimizer(folder: Path, model: Any, optimizer: Any, scheduler: Any, writes: bool) -> None:
    """Gathers and writes the state of optimizer and schedule; all processes take part.

    Args:
        folder: Of the checkpoint.
        model: Whose parameters are optimized.
        optimizer: Of torch, maybe wrapped by accelerate.
        scheduler: Of the learning rate.
        writes: Whether this process writes; one does.

    Raises:
        ValueError: If the optimizer keeps anything but tensors for a parameter.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole: Any = get_optimizer_state_dict(model, _plain(optimizer), options=options)
    if not writes:
        return
    kept = [(kind, value) for state in whole["state"].values() for kind, value in state.items()]
    if odd := {kind for kind, value in kept if not isinstance(value, torch.Tensor)}:
        raise ValueError(
            f"An optimizer must keep tensors alone, got {sorted(odd)} in {type(_plain(optimizer)).__name__}: use AdamW "
            "or SGD, or save_only_model=True."
        )
    tensors = {  # for example "exp_avg.model.norm.weight"
        f"{kind}.{name}": tensor.contiguous()
        for name, state in whole["state"].items()
        for kind, tensor in state.items()
    }
    save_file(tensors, folder / TENSORS_NAME)
    text = json.dumps({"param_groups": whole["param_groups"], "scheduler": scheduler.state_dict()})
    (folder / NUMBERS_NAME).write_text(text, "utf-8")


def load_optimizer(folder: Path, model: Any, optimizer: Any, scheduler: Any) -> None:
    """Loads what `save_optimizer` wrote; all processes take part.

    Args:
        folder: Of the checkpoint.
        model: Whose parameters are optimized.
        optimizer: Changed in place.
        scheduler: Changed in place.

    Raises:
        ValueError: If the checkpoint has no optimizer state of a sharded model.
    """
    if not (folder / NUMBERS_NAME).is_file():
        raise ValueError(
            f"The checkpoint {folder} has no {NUMBERS_NAME}: it was written with save_only_model=True, or of a "
            "model that was not sharded. Go on as it was begun, or begin anew from its weights."
        )
    numbers = json.loads((folder / NUMBERS_NAME).read_text("utf-8"))
    state: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(folder / TENSORS_NAME).items():
        kind, _, name = key.partition(".")
        state.setdefault(name, {})[kind] = tensor
    whole: Any = {"state": state, "param_groups": numbers["param_groups"]}
    for group, rate in zip(_plain(optimizer).param_groups, numbers["scheduler"]["_last_lr"], strict=True):
        group["lr"] = rate
    if state:  # SGD without momentum has none
        options = StateDictOptions(full_state_dict=True, strict=False)  # a parameter that had no gradient has no state
        set_optimizer_state_dict(model, _plain(optimizer), whole, options=options)
    scheduler.load_state_dict(numbers["scheduler"])


def load_weights(folder: Path, model: Any) -> None:
    """Loads the weights of a checkpoint; all processes take part.

    Args:
        folder: With one safetensors file, or several.
        model: Changed in place.

    Raises:
        ValueError: If a weight that is not tied is missing, or the checkpoint has one that the model has not.
    """
    tensors: dict[str, Any] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        tensors |= load_file(file)
    options = StateDictOptions(full_state_dict=True, strict=False)
    found = set_model_state_dict(model, tensors, options=options)
    missing = set(found.missing_keys) - set(getattr(model, "all_tied_weights_keys", ()))
    if missing or found.unexpected_keys:
        raise ValueError(
            f"The weights in {folder} are not those of the model: {sorted(missing)[:5]} are missing, "
            f"{sorted(found.unexpected_keys)[:5]} are unexpected. Was the checkpoint written by this run?"
        )


def _plain(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)
