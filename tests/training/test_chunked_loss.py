"""`use_chunked_loss`: the same loss and gradients, and logits that never exist all at once."""

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments, default_data_collator

from helpers import tiny_config, tiny_ids, tiny_model
from rmt_hf import RMTCache, RMTConfig, RMTForCausalLM


class LargestTensor(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation returns, views of nothing new included."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, torch.Tensor):
                self.numel = max(self.numel, each.numel())
        return result


class ProductDtypes(TorchDispatchMode):
    """Dtypes of the factors of matrix products in the layers, and in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: set[torch.dtype] = set()
        self.loss: set[torch.dtype] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        found = self.layers if name in ("aten::mm", "aten::addmm") else self.loss
        if found is self.layers or "linear_cross_entropy" in name:
            found |= {each.dtype for each in args if isinstance(each, torch.Tensor) and each.is_floating_point()}
        return function(*args, **(kwargs or {}))


def labels_of(ids: torch.Tensor) -> torch.Tensor:
    """The ids with some that do not count."""
    return ids.masked_fill(torch.arange(ids.shape[1]) % 5 == 2, -100)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("items", [None, 37, torch.tensor(37)], ids=["mean", "number", "tensor"])
def test_loss_and_gradients_are_those_of_all_logits(tied, items) -> None:
    """In float64, where the loss of transformers itself is only a float32."""
    model, ids = tiny_model(tie_word_embeddings=tied), tiny_ids(3, 45)
    targets = F.pad(labels_of(ids)[:, 1:], (0, 1), value=-100).flatten()
    total = F.cross_entropy(model(ids).logits.flatten(0, 1), targets, reduction="sum")
    wanted = total / ((targets != -100).sum() if items is None else 37)
    expected = torch.autograd.grad(wanted, list(model.parameters()))
    model.config.use_chunked_loss = True
    output = model.train()(ids, labels=labels_of(ids), num_items_in_batch=items)
    assert output.logits is None and output.loss.dtype == torch.float64
    torch.testing.assert_close(output.loss, wanted, rtol=1e-12, atol=0)
    found = torch.autograd.grad(output.loss, list(model.parameters()))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_labels_that_are_shifted_already_and_another_ignored_id() -> None:
    model, ids = tiny_model(use_chunked_loss=True), tiny_ids(2, 20)
    wanted = model(ids, labels=ids).loss
    shifted = F.pad(ids[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(model(ids, labels=ids.flip(1), shift_labels=shifted).loss, wanted, rtol=1e-12, atol=0)
    shifted = F.pad(ids[:, 1:], (0, 1), value=1)
    loss = model(ids, labels=ids.flip(1), shift_labels=shifted, ignore_index=1).loss
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("in_chunks", [False, True])
def test_all_logits_never_exist_at_once(in_chunks) -> None:
    config = tiny_config(vocab_size=2048, hidden_size=16, use_chunked_loss=in_chunks)
    model, ids = RMTForCausalLM(config), tiny_ids(1, 512)
    with LargestTensor() as largest:
        model(ids, labels=ids).loss.backward()
    assert largest.numel >= 512 * 2048 if not in_chunks else largest.numel <= 512 * 2048 // 8


@pytest.mark.parametrize(
    ("dtype", "autocast", "of_layers", "of_loss", "tolerance"),
    [
        (torch.float32, False, torch.float32, torch.float32, 0),
        (torch.float32, True, torch.bfloat16, torch.float32, 0.05),  # autocast does not reach into the chunked loss
        (torch.bfloat16, False, torch.bfloat16, torch.bfloat16, 0.1),
    ],
    ids=["float32", "autocast", "bfloat16"],
)
def test_bfloat16_and_autocast_are_near_float32(dtype, autocast, of_layers, of_loss, tolerance) -> None:
    model, ids = tiny_model(dtype=torch.float32, use_chunked_loss=True), tiny_ids(2, 40)
    wanted = model(ids, labels=ids).loss.item()
    model.to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), ProductDtypes() as products:
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert products.layers == {of_layers} and products.loss == {of_loss} == {loss.dtype}
    assert abs(loss.item() - wanted) <= tolerance and (loss.item() != wanted) == (tolerance > 0)


def test_without_labels_there_are_logits_and_generate_works() -> None:
    model, ids = tiny_model(use_chunked_loss=True), tiny_ids(1, 12)
    assert model(ids).logits.shape == (1, 12, 67)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > 12


def test_a_head_that_an_adapter_wraps_is_called() -> None:
    model, ids = tiny_model(use_chunked_loss=True), tiny_ids(1, 12)
    wanted = model(ids, labels=ids).loss
    model.lm_head = torch.nn.Sequential(model.lm_head)
    output = model(ids, labels=ids)
    assert output.logits.shape == (1, 12, 67)
    torch.testing.assert_close(output.loss.double(), wanted, rtol=1e-5, atol=0)


def test_evaluation_gives_as_many_logits_as_are_asked_for() -> None:
    model, ids = tiny_model(use_chunked_loss=True), tiny_ids(2, 20)
    trained = model.train()(ids, labels=ids)
    assert trained.logits is None
    for keep, columns in ((0, slice(None)), (1, slice(-1, None))):
        output = model.eval()(ids, labels=ids, logits_to_keep=keep)
        assert torch.equal(output.loss, trained.loss)
        torch.testing.assert_close(output.logits, model(ids).logits[:, columns], rtol=0, atol=1e-12)


def test_older_torch_is_refused_before_the_state_changes(monkeypatch) -> None:
    monkeypatch.delattr(F, "linear_cross_entropy")
    model, ids = tiny_model(use_chunked_loss=True), tiny_ids(1, 12)
    cache = RMTCache(model.config)
    with pytest.raises(RuntimeError, match=r"use_chunked_loss=True needs torch 2\.13 or newer, got"):
        model(ids, labels=ids, past_key_values=cache)
    assert not cache.is_initialized
    assert model(ids, past_key_values=cache).logits is not None


def test_trainer_trains_and_evaluates_alike(tmp_path) -> None:
    """The plain Trainer, two steps: losses of training and evaluation are those with all logits."""
    rows = Dataset.from_dict({"input_ids": tiny_ids(8, 24).tolist(), "labels": tiny_ids(8, 24).tolist()})
    losses = []
    for in_chunks in (False, True):
        torch.manual_seed(0)
        model = RMTForCausalLM(RMTConfig(**tiny_config(use_chunked_loss=in_chunks).to_diff_dict()))
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
        )
        trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=default_data_collator)
        trainer.train()
        history = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        losses.append([*history, trainer.evaluate()["eval_loss"]])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and len(losses[0]) == 3
