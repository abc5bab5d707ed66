"""Models that are made without numbers, on `meta`, and get them later: as the model whose weights they are."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from torch import nn

from helpers import CLOSE, FORMS, read, tiny_ids, tiny_model
from rmt_hf import RMTConfig, RMTForCausalLM


def on_meta(config: RMTConfig) -> RMTForCausalLM:
    with torch.device("meta"):
        return RMTForCausalLM(config).to(torch.float64)


def poisoned(module: nn.Module, recurse: bool = True) -> None:
    """`to_empty`, of memory in which something stands already."""
    module.to_empty(device="cpu", recurse=recurse)
    with torch.no_grad():
        for parameter in module.parameters(recurse):
            parameter.fill_(torch.nan)


def to_empty(model: RMTForCausalLM, folder: Path) -> RMTForCausalLM:
    made = on_meta(model.config)
    poisoned(made)
    made.load_state_dict(model.state_dict())
    return made


def module_after_module(model: RMTForCausalLM, folder: Path) -> RMTForCausalLM:
    """As FSDP does it."""
    made = on_meta(model.config)
    for module in made.modules():
        poisoned(module, recurse=False)
    made.load_state_dict(model.state_dict())
    return made


def assign(model: RMTForCausalLM, folder: Path) -> RMTForCausalLM:
    made = on_meta(model.config)
    made.load_state_dict(model.state_dict(), assign=True)
    return made


def moved_there_and_back(model: RMTForCausalLM, folder: Path) -> RMTForCausalLM:
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    poisoned(model.to("meta"))
    model.load_state_dict(weights)
    return model


def moved_and_assigned(model: RMTForCausalLM, folder: Path) -> RMTForCausalLM:
    weights = model.state_dict()
    made = RMTForCausalLM(model.config).to("meta")
    made.load_state_dict(weights, assign=True)
    return made


def with_accelerate(model: RMTForCausalLM, folder: Path) -> RMTForCausalLM:
    model.save_pretrained(folder)
    with init_empty_weights(include_buffers=True):
        made = RMTForCausalLM(model.config).to(torch.float64)
    return load_checkpoint_and_dispatch(made, folder, device_map={"": "cpu"}, dtype=torch.float64)


WAYS: list[Callable] = [
    to_empty,
    module_after_module,
    assign,
    moved_there_and_back,
    moved_and_assigned,
    with_accelerate,
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", ["gated select", "two parts"])
@torch.no_grad()
def test_made_on_meta_and_loaded(form, way, tmp_path) -> None:
    model, ids = tiny_model(**FORMS[form]), tiny_ids(2, 40)
    expected = model(ids).logits
    made = way(model, tmp_path).eval()
    torch.testing.assert_close(made(ids).logits, expected, **CLOSE)
    torch.testing.assert_close(read(made, ids, [20, *[1] * 5])[0], expected, **CLOSE)
