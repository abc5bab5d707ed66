"""Two processes share one model out, by heads (tensor parallelism) or all weights (FSDP2): they give what one gives.

Run as a script by `accelerate launch`, which starts both.
"""

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.distributed import DistributedConfig

from helpers import ACCELERATE, S, read, run_in_two, tiny_config, tiny_ids, tiny_model
from rmt_hf import RMTConfig, RMTForCausalLM, RMTTrainer, RMTTrainingArguments


pytestmark = pytest.mark.xdist_group("sharded")  # one worker makes what all of these tests look at


NUM_STREAMS = 4

FORMS: dict[str, dict] = {
    "default": {"use_qk_norm": True, "use_attention_sink": True},
    "chunked loss": {"use_chunked_loss": True},
    "two parts": {"num_lasting_slots": 4, "use_local_attention": False},
    "paper": {"fusion_type": "softmax", "memory_write": "mean", "num_lookback_segments": 0},
    "mean, tied, biases": {
        **{"memory_write": "mean", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        **{"use_local_attention": False, "num_lookback_segments": 2},
    },
}
PIPELINE = ("default", "paper")
SHARDINGS = {"tensor parallelism": {"tp_size": 2}, "FSDP2": {"fsdp_size": 2}}
RUNS: dict[str, dict] = {
    "one call": {"bptt_segments": 0},
    "columns again": {"bptt_segments": 1},
    "groups": {"bptt_segments": 2, "checkpoint_segments": 1, "gradient_accumulation_steps": 2},
}
CLOSE = 1e-12  # float64: sums over heads or rows in another order


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def results(model: RMTForCausalLM, rows: slice) -> dict[str, list]:
    """What is compared: logits at once and token by token, what is generated, and gradients of the rows given."""
    ids = tiny_ids(2, 9 * S + 3)
    with torch.no_grad():
        steps = read(model, ids, [S + 3, *[1] * (2 * S), 2 * S, 1])[0]
        tokens = model.generate(ids[:, : 2 * S + 3], max_new_tokens=3 * S, do_sample=False, eos_token_id=None)
    logits = model(ids).logits
    few = model(ids[:, :3]).logits
    found = {"logits": logits, "few": few, "steps": steps, "tokens": tokens.double()}
    model.train()
    for length in (ids.shape[1], 3):  # memory is read, and in three columns it is not
        model.zero_grad()
        model(ids[rows, :length], labels=ids[rows, :length]).loss.backward()
        for name, parameter in model.named_parameters():
            found[f"{length} {name}"] = whole(torch.zeros(1) if parameter.grad is None else parameter.grad)
    return {name: whole(tensor).detach().flatten().tolist() for name, tensor in found.items()}


def train(model: RMTForCausalLM, folder: Path, name: str) -> list[float]:
    """Losses of a run in stream mode, in all processes together, and its evaluation."""
    rows = NUM_STREAMS // int(os.environ.get("WORLD_SIZE", "1"))
    arguments = {"stream_length": 2 * S, "max_steps": 4, "logging_steps": 1, "optim": "sgd", "learning_rate": 0.3}
    arguments |= {"save_steps": 2, "save_only_model": True, "use_cpu": True, "disable_tqdm": True, "max_grad_norm": 0.1}
    sizes = {"per_device_train_batch_size": rows, "per_device_eval_batch_size": rows}
    data = Dataset.from_dict({"input_ids": [tiny_ids(1, n, seed=n)[0].tolist() for n in (50, 31, 7, 16, 40, 9, 70)]})
    run = RMTTrainer(
        model,
        RMTTrainingArguments(str(folder), **(arguments | sizes | RUNS[name])),
        train_dataset=data,
        eval_dataset=data,
    )
    run.train()
    history = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    return [*history, run.evaluate()["eval_loss"]]


@pytest.fixture(scope="module")
def of_two(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("two")
    for form, fields in FORMS.items():
        tiny_model(**fields).save_pretrained(folder / form)
    return folder, run_in_two(__file__, folder, ACCELERATE)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", SHARDINGS)
def test_a_sharded_model_is_the_model(kind: str, form: str, of_two: tuple[Path, dict]) -> None:
    folder, found = of_two
    expected = results(tiny_model(**FORMS[form]), slice(None))
    close = 1e-6 if form == "chunked loss" else CLOSE  # a loss in chunks is computed in float32
    assert found[f"{kind}: {form}"].keys() == expected.keys()
    for name, numbers in expected.items():
        shared = torch.tensor(found[f"{kind}: {form}"][name], dtype=torch.float64)
        alone = torch.tensor(numbers, dtype=torch.float64)  # one zero where there is no gradient: FSDP has zeros there
        torch.testing.assert_close(
            shared, alone.expand_as(shared), rtol=0, atol=close, msg=lambda text, name=name: f"{name}: {text}"
        )
    saved = folder / f"{kind}: {form}"
    assert [file.name for file in saved.glob("*.safetensors")] == ["model.safetensors"]
    ids, again = tiny_ids(2, 5 * S), RMTForCausalLM.from_pretrained(saved).eval()
    torch.testing.assert_close(again(ids).logits, tiny_model(**FORMS[form])(ids).logits, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("name", RUNS)
def test_fsdp_trains_streams_as_one_process(name: str, of_two: tuple[Path, dict], tmp_path) -> None:
    folder, found = of_two
    # Trainer adds losses up in float32, and the loss itself is computed in it.
    assert found[name] == pytest.approx(train(tiny_model(**FORMS["default"]), tmp_path, name), rel=2e-6)
    one, two = (
        RMTForCausalLM.from_pretrained(path / "checkpoint-4").state_dict() for path in (tmp_path, folder / name)
    )
    for key, tensor in one.items():
        torch.testing.assert_close(tensor, two[key], rtol=0, atol=1e-6)
    assert not torch.equal(one["lm_head.weight"], tiny_model(**FORMS["default"]).lm_head.weight)


def test_a_run_that_was_cut_goes_on_exactly(of_two: tuple[Path, dict]) -> None:
    """Weights, optimizer, schedule, random numbers, streams: losses and weights to the last bit."""
    folder, found = of_two
    whole_run, cut, resumed = (found[name] for name in ("whole", "cut", "resumed"))
    assert whole_run[:2] == cut and whole_run[2:] == resumed and len(set(whole_run)) == 4
    one, two = (
        RMTForCausalLM.from_pretrained(folder / name / "checkpoint-4").state_dict() for name in ("whole", "cut")
    )
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    files = {file.name for file in (folder / "cut" / "checkpoint-2").iterdir()}
    assert files >= {"model.safetensors", "optimizer.safetensors", "optimizer.json", "streams-0", "streams-1"}
    assert not {"optimizer.pt", "scheduler.pt"} & files


@pytest.mark.parametrize("form", PIPELINE)
def test_a_pipeline_of_two_stages_is_the_model(form: str, of_two: tuple[Path, dict]) -> None:
    """Whole rows, padded rows, tokens one by one, generated tokens; each stage has the state of its own layers."""
    found, expected = of_two[1][f"pipeline: {form}"], outputs_of_pipeline(tiny_model(**FORMS[form]))
    assert found.pop("layers with state") == 1 and expected.pop("layers with state") == 2
    assert found.keys() == expected.keys()
    for name, numbers in expected.items():
        torch.testing.assert_close(
            torch.tensor(found[name]),
            torch.tensor(numbers),
            rtol=0,
            atol=CLOSE,
            msg=lambda text, name=name: name + text,
        )


@torch.no_grad()
def outputs_of_pipeline(model: RMTForCausalLM) -> dict:
    """What a model says, also one that is sharded to the stages of a pipeline."""
    ids = tiny_ids(2, 9 * S + 3)
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    steps, cache = read(model, ids[:, : 7 * S], [S + 3, *[1] * (4 * S)])
    cache.crop(-3)
    after = model(ids[:, : S + 1], past_key_values=model.memorize(ids, past_key_values=cache)).logits
    tokens = model.generate(ids[:, : 2 * S + 3], max_new_tokens=3 * S, do_sample=False, eos_token_id=None)
    found = {"logits": model(ids).logits, "padded": model(ids, attention_mask=mask).logits * mask[..., None]}
    found |= {"steps": steps, "after": after, "tokens": tokens.double()}
    states = sum(layer.state is not None for layer in cache.layers)
    return {name: tensor.double().flatten().tolist() for name, tensor in found.items()} | {"layers with state": states}


class Cut(TrainerCallback):
    """Ends a run after two steps."""

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_training_stop = state.global_step == 2


def run_of(folder: Path, name: str, *callbacks: TrainerCallback) -> RMTTrainer:
    """A run with an optimizer that has a state, a schedule and dropout."""
    config = DistributedConfig(fsdp_size=2)
    model = RMTForCausalLM.from_pretrained(folder / "default", distributed_config=config, attention_dropout=0.1)
    data = Dataset.from_dict({"input_ids": [tiny_ids(1, n, seed=n)[0].tolist() for n in (50, 31, 7, 16, 40, 9, 70)]})
    arguments = RMTTrainingArguments(
        str(folder / name),
        **{"stream_length": 2 * S, "max_steps": 4, "logging_steps": 1, "learning_rate": 0.05, "warmup_steps": 2},
        **{"save_steps": 2, "use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 2},
    )
    return RMTTrainer(model, arguments, train_dataset=data, callbacks=list(callbacks))


def losses(run: RMTTrainer, first: int = 0) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry and entry["step"] > first]


def cut_and_go_on(folder: Path) -> dict[str, list[float]]:
    """Losses of a run that is whole, and of one that is cut after two steps and goes on with a new model."""
    whole_run = run_of(folder, "whole")
    whole_run.train()
    cut = run_of(folder, "cut", Cut())
    cut.train()
    assert not cut.args.save_only_model
    resumed = run_of(folder, "cut")
    resumed.train(resume_from_checkpoint=True)
    return {"whole": losses(whole_run), "cut": losses(cut), "resumed": losses(resumed, 2)}


def test_the_plan_names_what_is_there() -> None:
    for fields in (*FORMS.values(), {"num_memory_slots": 0}, {"num_memory_slots": 0, "use_local_attention": False}):
        model = RMTForCausalLM(tiny_config(**fields))
        names = {name for name, _ in (*model.named_modules(), *model.named_parameters())}
        names = {re.sub(r"\.\d+", ".*", name) for name in names}
        assert set(model.tp_plan) <= names and set(model.fsdp_plan) <= names
        assert "base_model_tp_plan" not in model.config.to_dict()
        assert RMTConfig.from_dict(model.config.to_dict()).base_model_tp_plan == model.config.base_model_tp_plan


def test_what_cannot_be_sharded_is_refused(of_two: tuple[Path, dict]) -> None:
    found = of_two[1]["refused"]
    assert "tp_size must divide num_key_value_heads (1), got 2" in found["heads"]
    assert "pp_size must be at most num_hidden_layers (1), got 2" in found["pipeline"]
    assert "those of one stage of a pipeline" in found["stage"]
    assert "fsdp" in found["plugin"] and "DistributedConfig(fsdp_size=" in found["plugin"]
    assert "heads of one process" in found["state"]


def refusals(folder: Path) -> dict[str, str]:
    """What is said to those who ask for what cannot be."""
    for name, fields in (("one head", {"num_key_value_heads": 1}), ("one layer", {"num_hidden_layers": 1})):
        tiny_model(**fields).save_pretrained(folder / name, is_main_process=os.environ["RANK"] == "0")
    torch.distributed.barrier()

    def state() -> None:
        config = DistributedConfig(tp_size=2)
        model = RMTForCausalLM.from_pretrained(folder / "default", distributed_config=config).eval()
        model.memorize(tiny_ids(1, 5 * S)).save_pretrained(folder / "state")

    def load(name: str, **sizes: int) -> RMTForCausalLM:
        return RMTForCausalLM.from_pretrained(folder / name, distributed_config=DistributedConfig(**sizes))

    attempts = {
        "heads": lambda: load("one head", tp_size=2),
        "pipeline": lambda: load("one layer", pp_size=2),
        "stage": lambda: load("default", pp_size=2).memorize(tiny_ids(1, 5 * S)).save_pretrained(folder / "state"),
        "plugin": lambda: RMTTrainer(tiny_model(), RMTTrainingArguments(str(folder), use_cpu=True, fsdp=True)),
        "state": state,
    }
    found = {}
    for name, attempt in attempts.items():
        with pytest.raises(ValueError) as refused:
            attempt()
        found[name] = str(refused.value)
    return found


def main(folder: Path) -> None:
    found: dict = {}
    rank = int(os.environ["RANK"])
    for kind, sizes in SHARDINGS.items():
        for form in FORMS:
            config = DistributedConfig(**sizes)
            model = RMTForCausalLM.from_pretrained(folder / form, distributed_config=config).eval()
            model.save_pretrained(folder / f"{kind}: {form}")
            found[f"{kind}: {form}"] = results(model, slice(None) if "tp_size" in sizes else slice(rank, rank + 1))
    for name in RUNS:
        config = DistributedConfig(fsdp_size=2)
        model = RMTForCausalLM.from_pretrained(folder / "default", distributed_config=config)
        found[name] = train(model, folder / name, name)
    for form in PIPELINE:
        config = DistributedConfig(pp_size=2)
        model = RMTForCausalLM.from_pretrained(folder / form, distributed_config=config).eval()
        found[f"pipeline: {form}"] = outputs_of_pipeline(model)
    found |= cut_and_go_on(folder)
    found["refused"] = refusals(folder)
    if rank == 0:
        (folder / "results.json").write_text(json.dumps(found), "utf-8")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
