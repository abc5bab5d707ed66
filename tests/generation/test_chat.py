"""TRL: `SFTTrainer` learns answers of chats, alone or with an adapter; packing that it cannot do right is refused."""

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from trl import SFTConfig, SFTTrainer

from helpers import tiny_model, tiny_tokenizer
from rmt_hf import RMTForCausalLM
from rmt_hf.adapters import memory_lora_config
from rmt_hf.conversion import memory_parameters
from rmt_hf.data import tokenize_chats


pytestmark = [
    # TRL 1.16 and PEFT 0.21 use names that transformers 5.23 has replaced.
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + ' ' + eos_token + ' ' }}{% endgeneration %}"
    "{% else %}{{ bos_token + ' ' + message['content'] + ' ' }}{% endif %}{% endfor %}"
)


def tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def chats() -> Dataset:
    """32 questions, up to nine segments long, whose answer is their first word and another one."""
    questions = [[3 + (7 * i + j) % 64 for j in range(6 + 2 * i)] for i in range(32)]
    rows = [
        [
            {"role": "user", "content": " ".join(f"w{number}" for number in question)},
            {"role": "assistant", "content": f"w{question[0]} w5"},
        ]
        for question in questions
    ]
    return Dataset.from_dict({"messages": rows})


def trainer(tmp_path, model, peft_config=None, **fields) -> SFTTrainer:
    defaults = {"assistant_only_loss": True, "max_length": None, "max_steps": 60, "learning_rate": 0.02}
    defaults |= {"per_device_train_batch_size": 8, "save_strategy": "no", "logging_steps": 10, "disable_tqdm": True}
    arguments = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, **(defaults | fields))
    data = chats()
    return SFTTrainer(
        model, arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer(), peft_config=peft_config
    )


def answers(model) -> float:
    """Share of the questions that are answered word for word."""
    words, right = tokenizer(), 0
    for messages in chats()["messages"]:
        text = words.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
        question = words(text, return_tensors="pt", add_special_tokens=False)
        out = model.generate(**question, max_new_tokens=2, do_sample=False)
        right += words.decode(out[0, question["input_ids"].shape[1] :]) == messages[1]["content"]
    return right / 32


def test_it_learns_answers_and_nothing_else(tmp_path) -> None:
    run = trainer(tmp_path, tiny_model(dtype=torch.float32))
    ours = tokenize_chats(chats(), tokenizer())
    for name in ("input_ids", "labels"):
        assert list(run.train_dataset[name]) == list(ours[name])
    own = tiny_model(dtype=torch.float32)
    losses = [own(torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss.item() for row in ours]
    # float32: logits of a padded batch, and of a row alone
    assert run.evaluate()["eval_loss"] == pytest.approx(sum(losses) / 32, rel=1e-4)
    run.train()
    run.save_model(str(tmp_path / "model"))
    assert answers(RMTForCausalLM.from_pretrained(tmp_path / "model")) > 0.9 > answers(own) + 0.8


def test_an_adapter_of_memory_alone(tmp_path) -> None:
    model = tiny_model(dtype=torch.float32)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    run = trainer(tmp_path, model, memory_lora_config(model.config, memory_only=True), max_steps=20)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    run.save_model(str(tmp_path / "adapter"))
    merged = PeftModel.from_pretrained(tiny_model(dtype=torch.float32), tmp_path / "adapter").merge_and_unload()
    changed = {name for name, parameter in merged.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == set(memory_parameters(merged))


@pytest.mark.parametrize(
    "fields", [{"packing": True, "max_length": 64}, {"padding_free": True}], ids=["packing", "padding_free"]
)
@pytest.mark.filterwarnings("ignore:.*padding-free.*:UserWarning")
def test_packing_that_would_leak_is_refused(fields: dict, tmp_path) -> None:
    """TRL begins documents anywhere in a row; here they begin at segment starts, as `rmt_hf.data.pack` has them."""
    with pytest.raises(ValueError, match=r"begin a document at a segment start.*rmt_hf\.data\.pack"):
        trainer(tmp_path, tiny_model(dtype=torch.float32), **fields).train()
