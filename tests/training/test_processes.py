"""Two processes are one with twice the rows: same streams, losses and checkpoints. `torchrun` runs it as a script."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from helpers import S, run_in_two, tiny_ids, tiny_model
from rmt_hf import RMTTrainer, RMTTrainingArguments, StreamSchedule


pytestmark = pytest.mark.xdist_group("processes")  # one worker makes what all of these tests look at


NUM_STREAMS = 4

RUNS: dict[str, dict] = {
    "streams": {"bptt_segments": 1, "gradient_accumulation_steps": 2},
    "streaming": {"streaming": True},
    "groups and schedule": {"checkpoint_segments": 1, "bptt_segments": 2, "schedule": [[0, S, 0], [2, 2 * S, 2]]},
    # Every parameter is in the graph of every step, also where no memory is written or read.
    "no unused parameters": {"bptt_segments": 1, "ddp_find_unused_parameters": False},
    "one graph": {"bptt_segments": 1, "ddp_static_graph": True, "ddp_find_unused_parameters": False},
    "short plain rows": {"stream_length": None, "ddp_find_unused_parameters": False},
}


def train(folder: Path, name: str, resume: bool = False) -> list[float]:
    """Losses of a run, in all processes together, and its evaluation."""
    arguments = {"stream_length": 2 * S, "max_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 0.01}
    arguments |= {"use_cpu": True, "disable_tqdm": True, "seed": 3} | RUNS[name]
    streaming, stages = arguments.pop("streaming", False), arguments.pop("schedule", None)
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    rows, arguments["ddp_backend"] = NUM_STREAMS // num_processes, "gloo" if num_processes > 1 else None
    sizes = {"per_device_train_batch_size": rows, "per_device_eval_batch_size": rows}
    data = Dataset.from_dict({"input_ids": [tiny_ids(1, n, seed=n)[0].tolist() for n in (50, 31, 7, 16, 40, 9, 70)]})
    if arguments["stream_length"] is None:
        data = Dataset.from_dict(dict.fromkeys(("input_ids", "labels"), tiny_ids(16, 5).tolist()))
    run = RMTTrainer(
        tiny_model(),
        RMTTrainingArguments(str(folder), **arguments, **sizes),
        train_dataset=data.to_iterable_dataset() if streaming else data,
        eval_dataset=data,
        callbacks=[StreamSchedule(stages)] if stages else [],
    )
    run.train(resume_from_checkpoint=resume or None)
    history = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    return [*history, run.evaluate()["eval_loss"]]


@pytest.fixture(scope="module")
def of_two(tmp_path_factory) -> tuple[Path, dict]:
    """Results of two processes, each run cut off and resumed besides."""
    folder = tmp_path_factory.mktemp("two")
    return folder, run_in_two(__file__, folder)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one(name: str, of_two: tuple[Path, dict], tmp_path) -> None:
    folder, results = of_two
    # Trainer adds losses up in float32, and gradients are averaged in another order.
    assert results[name]["whole"] == pytest.approx(train(tmp_path, name), rel=1e-5)
    assert results[name]["resumed"] == results[name]["whole"]
    saved = folder / name / "checkpoint-4"
    for process in (0, 1):
        assert (saved / f"streams-{process}").is_dir() == (RUNS[name].get("stream_length", S) is not None)
    one, two = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "checkpoint-4", saved))
    for key, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor, two.state_dict()[key], rtol=0, atol=1e-5)


def main(folder: Path) -> None:
    results: dict[str, dict[str, list[float]]] = {}
    for name in RUNS:
        results[name] = {"whole": train(folder / name, name)}
        if os.environ["RANK"] == "0":
            shutil.rmtree(folder / name / "checkpoint-4")
        torch.distributed.barrier()
        results[name]["resumed"] = train(folder / name, name, resume=True)
    if os.environ["RANK"] == "0":
        (folder / "results.json").write_text(json.dumps(results), "utf-8")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
