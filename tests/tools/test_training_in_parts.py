"""Training in parts, as Llama does it: two processes, checkpoints of layers, rows of any length, frozen weights.

Every run has the losses of one process with twice the rows. `torchrun` runs this file as a script.
"""

import json
import logging
import os
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import DataCollatorForLanguageModeling, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from helpers import SIZES, run_in_two, tiny_ids, tiny_model, tiny_tokenizer
from rmt_hf import RMTTrainer, RMTTrainingArguments
from rmt_hf.adapters import memory_lora_config
from rmt_hf.conversion import freeze_base
from rmt_hf.training import RMTGradientCallback


pytestmark = [
    pytest.mark.xdist_group("processes"),
    # PEFT 0.21 and TRL 1.16 ask transformers 5.23 for names of before.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
]

LENGTHS = {"short": [5, 9, 3, 12] * 2, "mixed": [50, 10] * 4, "long": [50] * 8}  # a step takes two; 16 are a window
REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
WAYS: dict[str, dict] = {
    "plain": {"ddp_find_unused_parameters": False},
    "checkpoints": {"gradient_checkpointing": True},  # transformers looks for no unused parameters then
    "reentrant": {**REENTRANT, "ddp_find_unused_parameters": False},  # of PEFT's models it looks for them all the same
    "accumulated": {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
    "trl": {},  # checkpoints are its default
}
AS_CONVERTED = {"num_lasting_slots": 0, "use_attention_sink": True, "use_local_attention": False}
RUNS = [
    ("llama", "trl", "mixed"),
    *(("rmt", way, "mixed") for way in WAYS),
    ("rmt", "trl", "short"),
    ("frozen", "checkpoints", "short"),
    ("frozen", "reentrant", "mixed"),
    ("memory only", "trl", "short"),
    ("memory only", "plain", "mixed"),
    ("lora", "reentrant", "mixed"),
]


def make_model(name: str) -> torch.nn.Module:
    if name == "llama":
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**SIZES))
    # Without a local path memory alone learns nothing inside the window.
    model = tiny_model(dtype=torch.float32, **({} if name in ("rmt", "lora") else AS_CONVERTED))
    if name == "frozen":
        freeze_base(model)
    if name in ("memory only", "lora"):
        torch.manual_seed(0)
        return get_peft_model(model, memory_lora_config(model.config, name == "memory only"))
    return model


def make_trainer(folder: Path, model: str, way: str, rows: str, trainer_class: type[Trainer] = Trainer, **options):
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    arguments = {"max_steps": 2, "logging_steps": 1, "learning_rate": 0.05, "use_cpu": True, "disable_tqdm": True}
    arguments |= {"per_device_train_batch_size": 2 // num_processes, "train_sampling_strategy": "sequential"}
    arguments |= {"ddp_backend": "gloo" if num_processes > 1 else None, "save_strategy": "no"} | WAYS[way]
    data = Dataset.from_dict({"input_ids": [tiny_ids(1, n, seed=n)[0].tolist() for n in LENGTHS[rows]]})
    made, tokenizer = make_model(model), tiny_tokenizer("right")
    if way == "trl":
        config = SFTConfig(str(folder), bf16=False, dataset_kwargs={"skip_prepare_dataset": True}, **arguments)
        return SFTTrainer(made, config, train_dataset=data, processing_class=tokenizer, **options)
    arguments_class = RMTTrainingArguments if trainer_class is RMTTrainer else TrainingArguments
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    arguments = arguments_class(str(folder), **arguments)
    return trainer_class(made, arguments, train_dataset=data, data_collator=collator, **options)


def losses(trainer: Trainer) -> list[float]:
    """Losses of a run in all processes together."""
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def of_two(tmp_path_factory) -> dict[str, list[float]]:
    return run_in_two(__file__, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("run", RUNS, ids="-".join)
def test_two_processes_train_as_one(run: tuple[str, str, str], of_two: dict[str, list[float]], tmp_path) -> None:
    found = losses(make_trainer(tmp_path, *run))
    # Float32 sums in another order.
    assert len(found) == 2 and of_two["/".join(run)] == pytest.approx(found, rel=1e-5)


def test_checkpoints_change_no_loss(tmp_path) -> None:
    plain = losses(make_trainer(tmp_path, "rmt", "plain", "mixed"))
    for way in ("checkpoints", "reentrant", "trl"):
        assert losses(make_trainer(tmp_path, "rmt", way, "mixed")) == pytest.approx(plain, rel=1e-5)


# Training that moves nothing


@pytest.mark.parametrize(
    ("model", "way"),
    [("frozen", "plain"), ("frozen", "RMTTrainer"), ("memory only", "trl"), ("memory only", "RMTTrainer")],
)
def test_training_that_moves_nothing_says_so_once(model: str, way: str, tmp_path, caplog, monkeypatch) -> None:
    monkeypatch.setattr(logging.getLogger("rmt_hf"), "propagate", True)
    options = {"callbacks": [RMTGradientCallback()]}
    trainer_class = Trainer
    if way == "RMTTrainer":  # which has the callback
        way, options, trainer_class = "plain", {}, RMTTrainer
    for rows, number in (("short", 1), ("long", 0)):
        caplog.clear()
        trainer = make_trainer(tmp_path, model, way, rows, trainer_class, **options)
        before = {name: each.clone() for name, each in trainer.model.named_parameters()}
        losses(trainer)
        moved = {name for name, each in trainer.model.named_parameters() if not torch.equal(each, before[name])}
        assert bool(moved) is not bool(number)
        said = [record.message for record in caplog.records if "Training must have a gradient" in record.message]
        assert len(said) == number
        assert not said or ("window of" in said[0] and "self_attn.memory" in said[0] and "longer rows" in said[0])


def main(folder: Path) -> None:
    results = {"/".join(run): losses(make_trainer(folder, *run)) for run in RUNS}
    if os.environ["RANK"] == "0":
        (folder / "results.json").write_text(json.dumps(results), "utf-8")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
