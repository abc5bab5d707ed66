"""The DeepSpeed configuration that is shipped: what it says, and where DeepSpeed is installed, what it does.

Run as a script by `torchrun`.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from datasets import Dataset

from helpers import ROOT, run_in_two, tiny_ids, tiny_model
from rmt_hf import RMTTrainer, RMTTrainingArguments, modeling_rmt


S, ROWS = 8, 4  # segment_length of the tiny configuration
CONFIG = ROOT / "examples" / "deepspeed_zero3.json"


def trainer(folder: Path, **fields) -> RMTTrainer:
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    arguments = {"max_steps": 4, "logging_steps": 1, "optim": "sgd", "learning_rate": 0.3, "max_grad_norm": 0.0}
    arguments |= {"use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": ROWS // num_processes}
    arguments |= {"deepspeed": str(CONFIG), "ddp_backend": "gloo"} if num_processes > 1 else {}
    ids = tiny_ids(4 * ROWS, 6 * S).tolist()
    data = Dataset.from_dict({"input_ids": ids, "labels": ids})
    return RMTTrainer(
        tiny_model(dtype=torch.float32),
        RMTTrainingArguments(str(folder), save_strategy="no", **(arguments | fields)),
        train_dataset=data,
    )


def losses(run: RMTTrainer) -> list[float]:
    run.train()
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def test_it_is_read_and_names_our_layer() -> None:
    config = HfDeepSpeedConfig(str(CONFIG))
    assert config.is_zero3() and not config.is_offload()
    (name,) = config.get_value("zero_optimization.leaf_module.classes")
    module, layer = name.rsplit(".", 1)
    assert module == modeling_rmt.__name__ and hasattr(modeling_rmt, layer)
    assert config.get_value("zero_optimization.stage3_gather_16bit_weights_on_model_save") is True  # one whole model


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_two_processes_train_as_one(tmp_path) -> None:
    found = run_in_two(__file__, tmp_path, DS_ACCELERATOR="cpu")
    assert found["losses"] == pytest.approx(losses(trainer(tmp_path / "one")), rel=1e-5)  # float32
    assert "whole plain rows only" in found["refused"]
    assert (tmp_path / "model" / "model.safetensors").is_file()


def main(folder: Path) -> None:
    with pytest.raises(ValueError) as refused:
        trainer(folder / "streams", stream_length=2 * S)
    run = trainer(folder / "two")
    found = {"losses": losses(run), "refused": str(refused.value)}
    run.save_model(str(folder / "model"))
    if os.environ["RANK"] == "0":
        (folder / "results.json").write_text(json.dumps(found), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
