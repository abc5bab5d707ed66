"""PEFT: an adapter learns, is saved, loaded and merged without loss; memory alone can be tuned; streams go on."""

import json
import sys

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from helpers import read, tiny_config, tiny_ids, tiny_model
from rmt_hf import RMTCache, RMTTrainer, RMTTrainingArguments
from rmt_hf.adapters import memory_lora_config
from rmt_hf.conversion import memory_parameters


# PEFT 0.21 asks transformers 5.23 for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

S = 8  # segment_length of the tiny configuration
CLOSE = {"rtol": 0, "atol": 1e-9}  # float64: a merged weight adds in another order
FORMS = {
    "default": {"use_qk_norm": True},
    "paper": {"fusion_type": "softmax", "memory_write": "mean", "num_lookback_segments": 0},
    "tied": {"tie_word_embeddings": True},
    "as converted": {"num_lasting_slots": 0, "use_attention_sink": True, "use_local_attention": False},
}
every_form = pytest.mark.parametrize("form", FORMS)


def with_adapter(form: str = "default", memory_only: bool = False, **fields) -> PeftModel:
    model = tiny_model(**FORMS[form])
    return get_peft_model(model, memory_lora_config(model.config, memory_only, r=4, **fields))


def learn(model: torch.nn.Module, steps: int = 3) -> torch.nn.Module:
    """A few steps on rows so long that the ring turns; every parameter that may learn has a gradient in each."""
    ids, learned = tiny_ids(2, 10 * S), [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(learned, lr=0.3)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def step_by_step(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a prompt and then of one token at a time, which is another path of the code."""
    return read(model, ids, [S + 3, *[1] * (ids.shape[1] - S - 3)])[0]


@every_form
def test_all_projections_memory_and_fusion_learn(form: str) -> None:
    model = with_adapter(form)
    ids = tiny_ids(2, 10 * S)
    torch.testing.assert_close(model(ids).logits, tiny_model(**FORMS[form])(ids).logits, rtol=0, atol=0)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    learn(model)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    attention = "base_model.model.model.layers.0.self_attn."
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        assert f"{attention}{name}.lora_B.default.weight" in changed
    for name in memory_parameters(tiny_model(**FORMS[form])):
        module, rest = name.removeprefix("model.layers.0.self_attn.").split(".", 1)
        if name.startswith("model.layers.0."):
            assert f"{attention}{module}.modules_to_save.default.{rest}" in changed, name


@every_form
def test_saved_loaded_and_merged_without_loss(form: str, tmp_path) -> None:
    model, ids = learn(with_adapter(form)), tiny_ids(2, 9 * S + 3, seed=1)
    expected = model(ids).logits
    assert (expected - tiny_model(**FORMS[form])(ids).logits).abs().max() > 0.01
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(**FORMS[form]), tmp_path).eval()
    assert torch.equal(loaded(ids).logits, expected)
    torch.testing.assert_close(step_by_step(loaded, ids), expected.detach(), **CLOSE)
    base = tiny_model(**FORMS[form]).requires_grad_(False)  # torch multiplies weights that are not trained another way
    with loaded.disable_adapter():
        assert torch.equal(loaded(ids).logits, base(ids).logits)
    merged = loaded.merge_and_unload()
    assert merged.state_dict().keys() == tiny_model(**FORMS[form]).state_dict().keys()
    torch.testing.assert_close(merged(ids).logits, expected, **CLOSE)
    torch.testing.assert_close(step_by_step(merged, ids), expected.detach(), **CLOSE)
    merged.save_pretrained(tmp_path / "merged")
    again = type(merged).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(again(ids).logits, expected, **CLOSE)


@every_form
def test_memory_alone_is_tuned(form: str) -> None:
    model, base = learn(with_adapter(form, memory_only=True)), tiny_model(**FORMS[form])
    merged, own = dict(model.merge_and_unload().named_parameters()), dict(base.named_parameters())
    changed = {name for name, parameter in own.items() if not torch.equal(parameter, merged[name])}
    assert changed == set(memory_parameters(base))


def test_a_variant_and_all_linear_merge_without_loss() -> None:
    ids = tiny_ids(2, 9 * S + 3, seed=1)
    for fields in ({"use_dora": True, "target_modules": ["q_proj", "v_proj"]}, {"target_modules": "all-linear"}):
        model = learn(get_peft_model(tiny_model(), LoraConfig(r=4, task_type="CAUSAL_LM", **fields)))
        expected = model(ids).logits
        torch.testing.assert_close(step_by_step(model, ids), expected.detach(), **CLOSE)
        torch.testing.assert_close(model.merge_and_unload()(ids).logits, expected, **CLOSE)


def test_generation_and_streams() -> None:
    model, ids = learn(with_adapter()), tiny_ids(2, 3 * S + 5, seed=2)
    settings = {"max_new_tokens": 2 * S, "do_sample": False, "eos_token_id": None}
    out = model.generate(input_ids=ids, return_dict_in_generate=True, **settings)
    assert isinstance(out.past_key_values, RMTCache)
    logits = model(input_ids=out.sequences, use_cache=False).logits[:, ids.shape[1] - 1 : -1]
    assert torch.equal(out.sequences[:, ids.shape[1] :], logits.argmax(-1))
    state = model.memorize(ids[:, : 2 * S + 1])
    answers = model.generate(input_ids=ids[:, 2 * S + 1 :], past_key_values=state, **settings)
    assert torch.equal(answers, out.sequences[:, 2 * S + 1 :])


def run(folder, model, **fields) -> RMTTrainer:
    rows = {"input_ids": [tiny_ids(1, n, seed=n)[0].tolist() for n in (50, 31, 7, 40, 70)]}
    defaults = {"stream_length": 2 * S, "bptt_segments": 1, "per_device_train_batch_size": 2, "max_steps": 4}
    defaults |= {"save_steps": 2, "logging_steps": 1, "learning_rate": 0.05, "use_cpu": True, "disable_tqdm": True}
    data = Dataset.from_dict(rows)
    return RMTTrainer(
        model, RMTTrainingArguments(str(folder), **(defaults | fields)), train_dataset=data, eval_dataset=data
    )


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("checkpoint_segments", [None, 1])
def test_an_adapter_learns_in_stream_mode_and_resumes(checkpoint_segments, tmp_path) -> None:
    whole = run(tmp_path, with_adapter(), checkpoint_segments=checkpoint_segments)
    whole.train()
    expected = losses(whole)
    evaluated = whole.evaluate()["eval_loss"]
    saved = tmp_path / "checkpoint-4"
    assert (saved / "adapter_model.safetensors").is_file() and not (saved / "model.safetensors").exists()
    assert json.loads((saved / "adapter_config.json").read_text("utf-8"))["modules_to_save"]
    resumed = run(tmp_path, with_adapter(), checkpoint_segments=checkpoint_segments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == expected
    loaded = PeftModel.from_pretrained(tiny_model(**FORMS["default"]), saved)
    assert run(tmp_path, loaded).evaluate()["eval_loss"] == evaluated


def test_stream_mode_with_an_adapter_is_the_merged_model(tmp_path) -> None:
    """Losses of an adapter and of the same weights without one, at a learning rate of zero."""
    model = learn(with_adapter())
    first = run(tmp_path / "adapter", model, learning_rate=0.0, save_strategy="no")
    first.train()
    second = run(tmp_path / "merged", model.merge_and_unload(), learning_rate=0.0, save_strategy="no")
    second.train()
    assert losses(first) == pytest.approx(losses(second), rel=1e-6)  # Trainer adds losses up in float32


def test_plain_trainer(tmp_path) -> None:
    rows = Dataset.from_dict({"input_ids": tiny_ids(8, 6 * S).tolist(), "labels": tiny_ids(8, 6 * S).tolist()})
    arguments = TrainingArguments(
        str(tmp_path), max_steps=30, learning_rate=0.05, logging_steps=10, use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(with_adapter(memory_only=True), arguments, train_dataset=rows)
    trainer.train()
    first, *_, last = losses(trainer)
    assert last < first - 0.1


def test_what_does_not_work_is_refused(monkeypatch) -> None:
    config = tiny_config()
    with pytest.raises(ValueError, match=r"target_modules is set.*peft\.LoraConfig"):
        memory_lora_config(config, target_modules=["q_proj"])
    with pytest.raises(ValueError, match="memory_only is for a model with memory, got num_memory_slots=0"):
        memory_lora_config(tiny_config(num_memory_slots=0), memory_only=True)
    prefix = get_peft_model(tiny_model(), PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    with pytest.raises(TypeError, match="past_key_values"):  # a state holds no keys and values of a prefix
        prefix(input_ids=tiny_ids(1, 5))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"rmt_hf\[train\]"):
        memory_lora_config(config)
