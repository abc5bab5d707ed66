"""Checkpoints: a run that is killed at any step goes on to the last bit; what is not whole is never used."""

import itertools
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback

from helpers import tiny_ids, tiny_model
from rmt_hf import RMTTrainer, RMTTrainingArguments, StreamSchedule
from rmt_hf.training import checkpoints
from rmt_hf.training import trainer as trainer_file


pytestmark = pytest.mark.xdist_group("resume")  # one worker makes what all of these tests look at


S = 8  # segment_length of the tiny configuration
STEPS = 9  # of a run: more than an epoch


def documents() -> Dataset:
    return Dataset.from_dict({"input_ids": [tiny_ids(1, n, seed=n)[0].tolist() for n in (50, 31, 7, 16, 40, 9)]})


class KillAt(TrainerCallback):
    """Ends the process as `kill -9` does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def trainer(
    folder: Path, kill_at: int | None = None, streaming: bool = False, data: Dataset | None = None, **arguments
) -> RMTTrainer:
    """A run with everything that has a state: dropout, AdamW, a scheduler, streams, shuffled epochs, accumulation."""
    torch.manual_seed(0)
    model = tiny_model(dtype=torch.float32, attention_dropout=0.1)
    defaults = {"use_cpu": True, "logging_steps": 1, "save_strategy": "steps", "save_steps": 2, "disable_tqdm": True}
    defaults |= {"stream_length": 2 * S, "bptt_segments": 1, "per_device_train_batch_size": 2, "max_steps": STEPS}
    defaults |= {"gradient_accumulation_steps": 2, "learning_rate": 0.01, "lr_scheduler_type": "cosine", "seed": 3}
    data = data or documents()
    return RMTTrainer(
        model,
        RMTTrainingArguments(output_dir=str(folder), **(defaults | arguments)),
        train_dataset=data.to_iterable_dataset().shuffle(seed=1, buffer_size=4) if streaming else data,
        eval_dataset=data,
        callbacks=[] if kill_at is None else [KillAt(kill_at)],
    )


def losses(run: RMTTrainer) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in run.state.log_history if "loss" in entry}


def run_and_die(folder: Path, kill_at: int, interrupt=None, **arguments) -> None:
    """Trains in a process of its own, which is killed."""
    child = os.fork()
    if child == 0:
        try:
            if interrupt is not None:
                interrupt()
            trainer(folder, kill_at, **arguments).train(resume_from_checkpoint=any(folder.glob("checkpoint-*")) or None)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def assert_same_weights(one: RMTTrainer, other: RMTTrainer) -> None:
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, other.model.state_dict()[name]), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> RMTTrainer:
    """A run that was never cut."""
    run = trainer(tmp_path_factory.mktemp("whole"))
    run.train()
    assert len(set(losses(run).values())) == STEPS
    assert run.state.epoch > 1
    return run


def test_a_run_that_was_killed_twice_goes_on_to_the_last_bit(whole: RMTTrainer, tmp_path) -> None:
    run_and_die(tmp_path, kill_at=3)
    run_and_die(tmp_path, kill_at=7)
    run = trainer(tmp_path)
    run.train(resume_from_checkpoint=True)
    assert losses(run) == losses(whole)
    assert_same_weights(run, whole)


def test_a_streaming_run_goes_on_to_the_last_bit(tmp_path) -> None:
    run = trainer(tmp_path / "whole", streaming=True)
    run.train()
    run_and_die(tmp_path / "cut", kill_at=5, streaming=True)
    resumed = trainer(tmp_path / "cut", streaming=True)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(run)
    assert_same_weights(resumed, run)


def test_a_run_in_bfloat16_autocast_goes_on_to_the_last_bit(whole: RMTTrainer, tmp_path) -> None:
    run, resumed = (trainer(tmp_path / name, bf16=True, checkpoint_segments=1) for name in ("whole", "resumed"))
    run.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert run._stream_state.state.state_dtype == torch.bfloat16
    assert losses(resumed) == losses(run) != losses(whole)
    assert list(losses(run).values()) == pytest.approx(list(losses(whole).values()), rel=0.1)


def test_a_run_of_plain_rows_goes_on_to_the_last_bit(tmp_path) -> None:
    def plain(folder: Path) -> RMTTrainer:
        run = trainer(folder, stream_length=None, bptt_segments=0, checkpoint_segments=2)
        rows = tiny_ids(12, 5 * S).tolist()
        run.train_dataset = Dataset.from_dict({"input_ids": rows, "labels": rows})
        return run

    run, resumed = plain(tmp_path / "whole"), plain(tmp_path / "resumed")
    run.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert losses(resumed) == losses(run)
    assert_same_weights(resumed, run)


@pytest.mark.parametrize("moment", ["while it is written", "before it is sealed", "before it is renamed"])
def test_a_checkpoint_that_was_being_written_is_not_there(moment: str, whole: RMTTrainer, tmp_path) -> None:
    """Killed in the middle of the second checkpoint: the first one is the last whole one."""

    def interrupt() -> None:
        owner, name = {
            "while it is written": (RMTTrainer, "_save_rng_state"),
            "before it is sealed": (trainer_file, "seal_checkpoint"),
            "before it is renamed": (trainer_file, "publish_checkpoint"),
        }[moment]
        original = getattr(owner, name)

        calls = itertools.count(1)

        def die_the_second_time(*args, **kwargs):
            if next(calls) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, name, die_the_second_time)

    run_and_die(tmp_path, STEPS, interrupt)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    run = trainer(tmp_path)
    run.train(resume_from_checkpoint=True)
    assert losses(run) == losses(whole)
    assert not (tmp_path / checkpoints.UNFINISHED).exists()


@pytest.fixture
def copied(whole: RMTTrainer, tmp_path) -> Path:
    shutil.copytree(whole.args.output_dir, tmp_path, dirs_exist_ok=True)
    return tmp_path


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "a bit of the weights": lambda folder: flip(folder / "model.safetensors"),
    "a bit of the optimizer": lambda folder: flip(folder / "optimizer.pt"),
    "streams that are gone": lambda folder: next((folder / "streams-0").glob("state.safetensors")).unlink(),
    "half a record": lambda folder: os.truncate(folder / checkpoints.RECORD_NAME, 40),
    "no record": lambda folder: (folder / checkpoints.RECORD_NAME).unlink(),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_skipped_with_a_warning(
    name: str, copied: Path, whole: RMTTrainer, monkeypatch
) -> None:
    warnings = []
    monkeypatch.setattr(checkpoints.logger, "warning", warnings.append)
    DAMAGE[name](copied / f"checkpoint-{STEPS}")
    DAMAGE[name](copied / f"checkpoint-{STEPS - 1}")
    with pytest.raises(ValueError, match=rf"checkpoint-{STEPS} cannot be used: .*resume_from_checkpoint=True"):
        trainer(copied).train(resume_from_checkpoint=str(copied / f"checkpoint-{STEPS}"))
    assert checkpoints.last_whole_checkpoint(str(copied)).endswith(f"checkpoint-{STEPS - 3}")
    assert len(warnings) == 2 and all("is skipped: " in warning for warning in warnings)


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(copied: Path, whole: RMTTrainer) -> None:
    flip(copied / f"checkpoint-{STEPS}" / "scheduler.pt")
    run = trainer(copied)
    run.train(resume_from_checkpoint=True)
    assert losses(run) == losses(whole) and checkpoints.damage(copied / f"checkpoint-{STEPS}") is None


def test_without_any_whole_checkpoint_there_is_no_resuming(tmp_path) -> None:
    with pytest.raises(ValueError, match="needs a whole checkpoint-"):
        trainer(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="cannot be used: there is no such folder"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("arguments", [{"stream_length": S}, {"per_device_train_batch_size": 1}, {"data_seed": 5}])
def test_a_run_with_other_arguments_does_not_take_the_streams(arguments: dict, copied: Path) -> None:
    (name, value), *_ = arguments.items()
    with pytest.raises(ValueError, match=rf"goes on with the arguments it began with, got {name} {value} instead of"):
        trainer(copied, max_steps=2 * STEPS, **arguments).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("index", [0, -1])
def test_a_run_on_other_data_does_not_take_the_streams(index: int, copied: Path) -> None:
    """The memory of old documents would go on in new ones."""
    rows = documents()["input_ids"][:]
    rows[index] = [*rows[index][:-1], (rows[index][-1] + 1) % 60]
    for other in (rows, rows[:3] + rows[2:]):
        with pytest.raises(ValueError, match=r"got documents \d documents \w+ instead of 6 documents \w+"):
            trainer(copied, max_steps=2 * STEPS, data=Dataset.from_dict({"input_ids": other})).train(
                resume_from_checkpoint=True
            )


def test_a_checkpoint_without_streams_does_not_go_on_in_stream_mode(tmp_path) -> None:
    trainer(tmp_path, save_only_model=True, max_steps=2).train()
    with pytest.raises(ValueError, match="must hold the state of its streams"):
        trainer(tmp_path).train(resume_from_checkpoint=True)


def test_nothing_is_pickled_but_by_trainer_itself(whole: RMTTrainer) -> None:
    folder = Path(whole.args.output_dir) / f"checkpoint-{STEPS}"
    ours = sorted(path.suffix for path in (folder / "streams-0").iterdir())
    assert ours == [".json", ".json", ".md", ".safetensors", ".safetensors"]


def test_the_best_checkpoint_is_known_by_its_place_and_old_ones_go(tmp_path) -> None:
    arguments = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_total_limit": 2}
    run = trainer(tmp_path, max_steps=8, learning_rate=0.003, **arguments)
    run.train()
    best = Path(run.state.best_model_checkpoint)
    assert best.parent == tmp_path and best.is_dir()
    assert len([*tmp_path.glob("checkpoint-*")]) == 2
    saved = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text("utf-8"))
    assert saved["best_model_checkpoint"] == str(best)
    loaded, ids = AutoModelForCausalLM.from_pretrained(best), tiny_ids(1, 3 * S)
    assert torch.equal(loaded(ids).logits, run.model.eval()(ids).logits)


def test_a_schedule_is_written_into_the_trainer_state(tmp_path) -> None:
    stages = [[0, S, 0], [2, 2 * S, 1]]
    run = trainer(tmp_path, max_steps=4)
    run.add_callback(StreamSchedule(stages))
    run.train()
    saved = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text("utf-8"))
    assert saved["stateful_callbacks"]["StreamSchedule"]["args"]["stages"] == stages
    assert [entry["stream_length"] for entry in saved["log_history"]] == [S, S, 2 * S, 2 * S]
    resumed = trainer(tmp_path, max_steps=6, restore_callback_states_from_checkpoint=True)
    resumed.add_callback(StreamSchedule([(0, 2 * S, 0)]))
    resumed.train(resume_from_checkpoint=True)
    assert resumed._schedule.stages == stages
