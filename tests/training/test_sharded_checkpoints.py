"""Optimizers and weights are written and read whole, in one process; tests/test_sharded.py has two."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import Adafactor, get_linear_schedule_with_warmup

from helpers import tiny_ids, tiny_model
from rmt_hf.training.sharded import NUMBERS_NAME, TENSORS_NAME, load_optimizer, load_weights, save_optimizer


OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "plain": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
}


def trained(kind: str, steps: int):
    """A model with tied weights and a frozen one, its optimizer and schedule after some steps."""
    model = tiny_model(tie_word_embeddings=True).train()
    model.model.norm.weight.requires_grad_(False)
    optimizer = OPTIMIZERS[kind]([p for p in model.parameters() if p.requires_grad])
    scheduler = get_linear_schedule_with_warmup(optimizer, 4, 10)
    run(model, optimizer, scheduler, steps)
    return model, optimizer, scheduler


def run(model, optimizer, scheduler, steps: int) -> None:
    ids = tiny_ids(2, 30)
    for _ in range(steps):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_run_goes_on_exactly(kind: str, tmp_path) -> None:
    model, *rest = trained(kind, 3)
    save_optimizer(tmp_path, model, *rest, writes=True)
    model.save_pretrained(tmp_path)
    run(model, *rest, 3)
    other, *others = trained(kind, 0)
    load_weights(tmp_path, other)
    load_optimizer(tmp_path, other, *others)
    run(other, *others, 3)
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in other.state_dict().items())
    assert {file.name for file in tmp_path.iterdir()} >= {TENSORS_NAME, NUMBERS_NAME, "model.safetensors"}


def test_an_optimizer_that_keeps_more_than_tensors_is_refused(tmp_path) -> None:
    model, *_ = trained("plain", 0)
    optimizer = Adafactor(model.parameters(), lr=0.1, relative_step=False)
    scheduler = get_linear_schedule_with_warmup(optimizer, 4, 10)
    model.model.norm.weight.requires_grad_(True)
    run(model, optimizer, scheduler, 1)
    with pytest.raises(ValueError, match=r"keep tensors alone, got .* in Adafactor"):
        save_optimizer(tmp_path, model, optimizer, scheduler, writes=True)
    assert not list(tmp_path.iterdir())


def test_checkpoints_of_other_kinds_are_refused(tmp_path) -> None:
    model, *rest = trained("adamw", 1)
    with pytest.raises(ValueError, match=r"has no optimizer\.json"):
        load_optimizer(tmp_path, model, *rest)
    save_file({"odd": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"are missing, .'odd'. are unexpected"):
        load_weights(tmp_path, model)
