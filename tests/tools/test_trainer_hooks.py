"""What heads and `Trainer` inherit: accumulated losses, weight decay, pushes, searches and metrics."""

import json
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    Trainer,
    TrainingArguments,
)

from helpers import SIZES, tiny_ids, tiny_model
from rmt_hf import (
    RMTForCausalLM,
    RMTForQuestionAnswering,
    RMTForSequenceClassification,
    RMTForTokenClassification,
    RMTTrainer,
    RMTTrainingArguments,
)
from rmt_hf.adapters import memory_lora_config
from rmt_hf.memory_rmt import RMTPerHead


# PEFT 0.21 asks transformers 5.23 for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

S = 8  # segment_length of the tiny configuration


def arguments_of(folder, arguments_class=RMTTrainingArguments, **fields):
    defaults = {"max_steps": 1, "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "report_to": "none"}
    defaults |= {"save_strategy": "no", "train_sampling_strategy": "sequential", "per_device_train_batch_size": 2}
    return arguments_class(str(folder), **(defaults | fields))


# Losses of heads

IDS = tiny_ids(4, 3 * S)
HEADS = {
    "sequences": (RMTForSequenceClassification, LlamaForSequenceClassification, {"labels": [0, 1, 1, 0]}),
    "tokens": (RMTForTokenClassification, LlamaForTokenClassification, {"labels": (IDS % 2).tolist()}),
    "answers": (
        RMTForQuestionAnswering,
        LlamaForQuestionAnswering,
        {"start_positions": [1, 2, 3, 4], "end_positions": [5, 9, 7, 20]},
    ),
    "language": (RMTForCausalLM, LlamaForCausalLM, {"labels": IDS.tolist()}),
}


def loss_and_gradients(model, folder, trainer_class, labels: dict[str, list], accumulation: int):
    """Of one step with four rows, in so many parts."""
    rows = Dataset.from_dict({"input_ids": IDS.tolist(), **labels})
    arguments_class = RMTTrainingArguments if trainer_class is RMTTrainer else TrainingArguments
    sizes = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    arguments = arguments_of(folder, arguments_class, optim="sgd", learning_rate=1.0, max_grad_norm=0.0, **sizes)
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    trainer = trainer_class(model, arguments, train_dataset=rows)
    trainer.train()
    moved = {name: before[name] - each.detach() for name, each in model.named_parameters()}
    return trainer.state.log_history[0]["loss"], moved


@pytest.mark.parametrize("trainer_class", [Trainer, RMTTrainer])
@pytest.mark.parametrize("name", HEADS)
def test_four_accumulated_steps_are_one_step_of_four_times_the_rows(name: str, trainer_class, tmp_path) -> None:
    model_class, _, labels = HEADS[name]
    results = []
    for accumulation in (1, 4):
        model = tiny_model(model_class)
        if name == "tokens":
            model.dropout.p = 0.0
        results.append(loss_and_gradients(model, tmp_path, trainer_class, labels, accumulation))
    (whole, expected), (parts, found) = results
    assert parts == pytest.approx(whole, rel=1e-5)  # Trainer adds losses up in float32
    # The loss of tokens is in float32, as in all models, and is averaged in another order.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_the_heads_of_a_llama_are_four_times_too_large(tmp_path) -> None:
    """The fault that is mended here: when this test fails, transformers has mended it, too."""
    for name, factor in (("sequences", 4), ("tokens", 4), ("answers", 1), ("language", 1)):
        losses = []
        for accumulation in (1, 4):
            torch.manual_seed(0)
            model = HEADS[name][1](LlamaConfig(**SIZES, classifier_dropout=0.0))
            losses.append(loss_and_gradients(model, tmp_path, Trainer, HEADS[name][2], accumulation)[0])
        assert losses[1] == pytest.approx(factor * losses[0], rel=1e-4), name


# Weight decay


@pytest.mark.parametrize("wrapped", [False, True], ids=["model", "adapter"])
@pytest.mark.parametrize(
    "fields",
    [{}, {"num_lasting_slots": 4, "use_attention_sink": True}, {"fusion_type": "softmax", "use_qk_norm": True}],
    ids=["gated", "sink", "softmax"],
)
def test_only_linear_maps_and_embeddings_decay(fields: dict, wrapped: bool, tmp_path) -> None:
    model = tiny_model(dtype=torch.float32, **fields)
    if wrapped:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, memory_lora_config(model.config, r=2))
    trainer = RMTTrainer(model, arguments_of(tmp_path, weight_decay=0.1))
    linear = torch.nn.Linear, torch.nn.Embedding, RMTPerHead
    expected = {
        f"{name}.weight" for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, linear)
    }
    assert set(trainer.get_decay_parameter_names(model)) == expected
    groups = trainer.create_optimizer().param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    kept = {id(parameter) for parameter in groups[1]["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and any(word in name for word in (".rings.", "fusion.scale", "sink.", "logits")):
            assert id(parameter) in kept, name


# Pushes


class Hub:
    """Notes which files a push would send."""

    def __init__(self) -> None:
        self.pushed: list[dict[str, str]] = []

    def create_repo(self, name: str, **options) -> SimpleNamespace:
        return SimpleNamespace(repo_id=f"somebody/{name}")

    def upload_folder(self, folder_path: str, **options) -> Future:
        files = [*Path(folder_path).glob("*.py"), *Path(folder_path).glob("*.json")]
        self.pushed.append({file.name: file.read_text("utf-8") for file in files})
        done: Future = Future()
        done.set_result(None)
        return done


def test_a_push_in_training_has_the_code_that_its_configuration_names(tmp_path, monkeypatch) -> None:
    """Of a model that came with its code: the package loads it with its own classes, which carry none."""
    with monkeypatch.context() as patch:
        patch.setattr(RMTForCausalLM, "_auto_class", "AutoModelForCausalLM")
        tiny_model(dtype=torch.float32).save_pretrained(tmp_path / "first")
    model, hub = AutoModelForCausalLM.from_pretrained(tmp_path / "first"), Hub()
    assert type(model) is RMTForCausalLM and model._auto_class is None
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    rows = Dataset.from_dict({"input_ids": IDS.tolist(), "labels": IDS.tolist()})
    saving = {"save_strategy": "steps", "save_steps": 1, "push_to_hub": True, "hub_strategy": "checkpoint"}
    trainer = RMTTrainer(model, arguments_of(tmp_path / "run", **saving), train_dataset=rows)
    trainer.train()
    assert len(hub.pushed) == 2  # the model, and the checkpoint
    code = {file.name for file in (tmp_path / "first").glob("*.py")}
    for files in hub.pushed:
        named = json.loads(files["config.json"])["auto_map"].values()
        assert {f"{name.split('.')[0]}.py" for name in named} <= code <= files.keys()
    assert RMTForCausalLM._auto_class is None


def test_a_model_that_came_without_code_is_saved_without(tmp_path) -> None:
    tiny_model().save_pretrained(tmp_path / "first")
    AutoModelForCausalLM.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert not list((tmp_path / "second").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "second" / "config.json").read_text("utf-8"))


# Searches


@pytest.mark.parametrize("stream_length", [None, 2 * S])
def test_hyperparameter_search(stream_length: int | None, tmp_path) -> None:
    pytest.importorskip("optuna", reason="optuna is an extra of the tests")
    lengths = (50, 31, 40) if stream_length else (24,) * 4
    rows = {"input_ids": [tiny_ids(1, n, seed=n)[0].tolist() for n in lengths]}
    data = Dataset.from_dict(rows if stream_length else rows | {"labels": rows["input_ids"]})
    arguments = arguments_of(tmp_path, max_steps=2, save_strategy="steps", save_steps=2, stream_length=stream_length)
    trainer = RMTTrainer(
        args=arguments, model_init=lambda: tiny_model(dtype=torch.float32), train_dataset=data, eval_dataset=data
    )

    def space(trial) -> dict[str, float]:
        found = {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-1, log=True)}
        return found | (
            {"stream_length": trial.suggest_categorical("stream_length", [S, 2 * S])} if stream_length else {}
        )

    best = trainer.hyperparameter_search(hp_space=space, n_trials=2, direction="minimize", backend="optuna")
    assert best.objective > 0 and 1e-3 <= best.hyperparameters["learning_rate"] <= 1e-1
    for run in ("run-0", "run-1"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / run / "checkpoint-2")
        assert model.config.segment_length == S and (tmp_path / run / "checkpoint-2" / "trainer_state.json").is_file()


# Metrics


@pytest.mark.parametrize("trainer_class", [Trainer, RMTTrainer])
def test_metrics_see_the_logits_of_a_model_with_a_chunked_loss(trainer_class, tmp_path) -> None:
    rows = Dataset.from_dict({"input_ids": IDS.tolist(), "labels": IDS.tolist()})
    arguments_class = RMTTrainingArguments if trainer_class is RMTTrainer else TrainingArguments
    found = []
    for in_chunks in (False, True):
        seen = []

        def metrics(predicted, seen=seen) -> dict[str, float]:
            seen.append(torch.as_tensor(predicted.predictions))
            return {"right": float((predicted.predictions[:, :-1].argmax(-1) == predicted.label_ids[:, 1:]).mean())}

        model = tiny_model(use_chunked_loss=in_chunks)
        trainer = trainer_class(
            model, arguments_of(tmp_path, arguments_class), eval_dataset=rows, compute_metrics=metrics
        )
        evaluated = trainer.evaluate()
        assert seen[0].shape == (4, 3 * S, 67)
        found.append((evaluated["eval_loss"], evaluated["eval_right"], seen[0]))
    assert found[1][:2] == pytest.approx(found[0][:2], rel=1e-5)
    torch.testing.assert_close(found[1][2], found[0][2], rtol=0, atol=1e-12)


def test_an_evaluation_without_metrics_makes_no_logits(tmp_path, monkeypatch) -> None:
    rows = Dataset.from_dict({"input_ids": IDS.tolist(), "labels": IDS.tolist()})
    shapes: list[torch.Size] = []
    model = tiny_model(use_chunked_loss=True)
    model.lm_head.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    RMTTrainer(model, arguments_of(tmp_path), eval_dataset=rows).evaluate()
    assert {shape[1] for shape in shapes} == {1}
