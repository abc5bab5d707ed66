"""A converted model learns from its source: the loss by hand, what is trained, what the rows hold, how it is judged."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import default_data_collator

from helpers import LOCAL, WINDOW, make_source, tiny_ids
from rmt_hf.adapters import memory_lora_config
from rmt_hf.conversion import add_memory, freeze_base, memory_parameters
from rmt_hf.data import IGNORED
from rmt_hf.training import RMTTrainingArguments
from rmt_hf.training.distillation import DistillationTrainer, divergence, parameter_groups


FIELDS = {**LOCAL, "num_lasting_slots": 8}  # everything that can be trained
SCALARS = ("fusion.scale", "gate_scale", "gate_bias", "fade")


def make_trainer(
    tmp_path, rows: list[dict], teacher=None, dtype: torch.dtype = torch.float32, **settings
) -> DistillationTrainer:
    source = make_source("llama", dtype)
    model = add_memory(source, **FIELDS).train()
    freeze_base(model)
    fixed = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "disable_tqdm": True, "max_steps": 1}
    fixed |= {"per_device_train_batch_size": 1, "train_sampling_strategy": "sequential", "save_strategy": "no"}
    arguments = RMTTrainingArguments(**{**fixed, **settings})
    return DistillationTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_list(rows),
        data_collator=default_data_collator,
        teacher=copy.deepcopy(source) if teacher is None else teacher,
        optimizers=(torch.optim.SGD(parameter_groups(model, 0.02), lr=0.02), None),
    )


def make_row(length: int, seed: int = 0, num_labels: int = 0) -> dict[str, list[int]]:
    ids = tiny_ids(1, length, seed)[0].tolist()
    return {"input_ids": ids, "labels": [IGNORED] * (length - num_labels) + ids[length - num_labels :]}


def test_divergence_is_the_sum_over_the_vocabulary():
    ours, theirs = (torch.randn(2, 600, 7, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    p, q = (part.double().softmax(-1) for part in (theirs, ours))
    expected = sum(
        float(p[b, t, v] * (p[b, t, v] / q[b, t, v]).log()) for b in range(2) for t in range(600) for v in range(7)
    )
    assert divergence(ours, theirs).item() == pytest.approx(expected / 1200, rel=1e-5)
    assert divergence(theirs, theirs).item() == pytest.approx(0, abs=1e-7)


def test_the_loss_is_nothing_in_the_window_and_something_beyond(tmp_path):
    trainer = make_trainer(tmp_path, [make_row(WINDOW)])
    inside, beyond = (
        trainer.compute_loss(trainer.model, {"input_ids": tiny_ids(2, length)}).item()
        for length in (WINDOW, 4 * WINDOW)
    )
    assert inside == pytest.approx(0, abs=1e-6) and beyond > 1e-3


def test_labels_add_their_cross_entropy(tmp_path):
    trainer, ids = make_trainer(tmp_path, [make_row(WINDOW)]), tiny_ids(1, 40)
    labels = torch.full_like(ids, IGNORED)
    labels[:, -2:] = ids[:, -2:]
    alone = trainer.compute_loss(trainer.model, {"input_ids": ids, "labels": torch.full_like(ids, IGNORED)})
    with_labels, outputs = trainer.compute_loss(trainer.model, {"input_ids": ids, "labels": labels}, True)
    chances = outputs.logits[0, -3:-1].double().softmax(-1)[[0, 1], ids[0, -2:]]
    errors = -chances.log().sum().item()
    assert (with_labels - alone).item() == pytest.approx(errors / 40, rel=1e-4)  # in proportion
    trainer.label_weight = 5.0
    weighted = trainer.compute_loss(trainer.model, {"input_ids": ids, "labels": labels})
    assert (weighted - alone).item() == pytest.approx(5 * errors / 40, rel=1e-4)
    trainer.teacher = None
    own = trainer.compute_loss(trainer.model, {"input_ids": ids, "labels": labels}).item()
    assert own == pytest.approx(errors / 2, rel=1e-4)  # a mean


def test_training_comes_nearer_to_the_teacher_and_touches_memory_alone(tmp_path):
    rows = [make_row(4 * WINDOW)] * 60
    trainer = make_trainer(tmp_path, rows, max_steps=60)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    teacher = {name: tensor.clone() for name, tensor in trainer.teacher.state_dict().items()}
    first = trainer.compute_loss(trainer.model, {"input_ids": tiny_ids(1, 4 * WINDOW)}).item()
    trainer.train()
    last = trainer.compute_loss(trainer.model, {"input_ids": tiny_ids(1, 4 * WINDOW)}).item()
    assert last < 0.95 * first
    changed = {name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed <= set(memory_parameters(trainer.model))
    for part in ("fusion.scale", "memory.score_proj.weight", "memory.rings.1.gate_weight"):
        assert any(name.endswith(part) for name in changed), part
    assert all(torch.equal(tensor, teacher[name]) for name, tensor in trainer.teacher.state_dict().items())


def test_accumulated_steps_are_the_mean_of_their_rows(tmp_path):
    rows = [make_row(3 * WINDOW, seed, 2) for seed in (0, 1)]
    # float32 would round what is taken from a gate_scale of 8
    trainer = make_trainer(tmp_path, rows, dtype=torch.float64, gradient_accumulation_steps=2, max_grad_norm=0.0)
    inputs = [{name: torch.tensor([value]) for name, value in row.items()} for row in rows]
    names = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    parameters = [dict(trainer.model.named_parameters())[name] for name in names]
    wanted = torch.autograd.grad(
        sum(trainer.compute_loss(trainer.model, row) for row in inputs) / 2, parameters, allow_unused=True
    )
    before = [parameter.detach().clone() for parameter in parameters]
    trainer.train()
    for name, old, new, gradient in zip(names, before, parameters, wanted, strict=True):
        rate = 0.2 if name.endswith(SCALARS) else 0.02
        step = torch.zeros_like(old) if gradient is None else rate * gradient
        torch.testing.assert_close(old - new.detach(), step, rtol=1e-3, atol=1e-7)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's
@pytest.mark.parametrize("is_adapted", [False, True])
def test_every_trained_parameter_is_in_one_group(is_adapted):
    model = add_memory(make_source("llama"), **FIELDS)
    freeze_base(model)
    model = get_peft_model(model, memory_lora_config(model.config)) if is_adapted else model
    scales, others = parameter_groups(model, 1e-3, 5.0)
    assert (scales["lr"], others["lr"]) == (5e-3, 1e-3)
    # The share of the local path; scale and bias of two rings; the fade of the present one.
    assert len(scales["params"]) == 6 * model.config.num_hidden_layers
    (only,) = parameter_groups(add_memory(make_source("llama"), num_memory_slots=0, segment_length=8), 1e-3)
    assert only["lr"] == 1e-3 and only["params"]
    trained = [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(id(parameter) for group in (scales, others) for parameter in group["params"]) == sorted(trained)


@pytest.mark.parametrize("settings", [{"stream_length": 16}, {"checkpoint_segments": 1}])
def test_rows_are_read_whole(tmp_path, settings):
    with pytest.raises(ValueError, match="a teacher reads whole rows"):
        make_trainer(tmp_path, [make_row(16)], **settings)


def test_a_weight_is_not_negative():
    with pytest.raises(ValueError, match="label_weight must be at least 0, got -1"):
        DistillationTrainer(label_weight=-1)


def test_vocabularies_must_agree(tmp_path):
    with pytest.raises(ValueError, match="vocab_size of the teacher must be"):
        make_trainer(tmp_path, [make_row(16)], teacher=make_source("llama", vocab_size=99))
