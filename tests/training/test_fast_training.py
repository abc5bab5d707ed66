"""bfloat16 autocast and `torch.compile` in `Trainer`, on plain rows and in stream mode: the losses of plain float32."""

import pytest
import torch
from datasets import Dataset
from torch._dynamo.utils import counters
from transformers import Trainer, TrainingArguments

from helpers import tiny_ids, tiny_model
from rmt_hf import RMTTrainer, RMTTrainingArguments


S = 8  # segment_length of the tiny configuration
MODES = {"plain rows": None, "stream mode": 2 * S}
every_mode = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(autouse=True)
def forget_what_was_compiled():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def train(mode: str, tmp_path, **fields) -> tuple[list[float], Trainer]:
    """Losses of four steps, and the trainer."""
    arguments = {"max_steps": 4, "logging_steps": 1, "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0}
    arguments |= {"save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "per_device_train_batch_size": 2}
    model = tiny_model(dtype=torch.float32, num_hidden_layers=1)
    if MODES[mode] is None:
        rows = Dataset.from_dict(dict.fromkeys(("input_ids", "labels"), tiny_ids(8, 6 * S).tolist()))
        run = Trainer(model, TrainingArguments(str(tmp_path), **(arguments | fields)), train_dataset=rows)
    else:
        rows = Dataset.from_dict({"input_ids": [tiny_ids(1, n, seed=n)[0].tolist() for n in (50, 31, 40, 70)]})
        arguments |= {"stream_length": MODES[mode], "bptt_segments": 1}
        run = RMTTrainer(model, RMTTrainingArguments(str(tmp_path), **(arguments | fields)), train_dataset=rows)
    run.train()
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry], run


@every_mode
def test_bfloat16_autocast_is_near_float32(mode: str, tmp_path) -> None:
    expected, _ = train(mode, tmp_path)
    found, run = train(mode, tmp_path, bf16=True)
    assert all(parameter.dtype == torch.float32 for parameter in run.model.parameters())
    assert found == pytest.approx(expected, rel=0.01)  # bfloat16 has three digits
    assert found != expected


@pytest.mark.parametrize("mode", ["plain rows", pytest.param("stream mode", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # the compiler's own
def test_a_compiled_model_has_the_same_losses(mode: str, tmp_path) -> None:
    expected, _ = train(mode, tmp_path, max_steps=2)
    found, _ = train(mode, tmp_path, max_steps=2, torch_compile=True, torch_compile_backend="aot_eager")
    assert found == pytest.approx(expected, rel=1e-5)  # float32
    assert counters["stats"]["unique_graphs"] > 0
