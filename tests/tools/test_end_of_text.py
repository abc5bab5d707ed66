"""The end of a text is a token of its own, and learned: whatever makes rows, generation stops where texts ended."""

import pytest
import torch
from datasets import Dataset
from transformers import (
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from rmt_hf import RMTConfig, RMTForCausalLM, RMTTrainer, RMTTrainingArguments
from rmt_hf.data import collate, cut_into_rows, pack, tokenize, tokenize_chats, tokenize_completions, train_tokenizer


TEXTS = ["one two three", "four five six seven", "eight nine"]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SEGMENT = 8


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS * 3, 290)


def padded_with_its_end() -> PreTrainedTokenizerFast:
    """As SmolLM2 has it: padding is the end-of-text token."""
    tokenizer = train_tokenizer(TEXTS * 3, 290)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def learned(rows: list[dict]) -> list[int]:
    """All targets, without the first labels of rows, which nothing predicts."""
    return [label for row in rows for label in torch.as_tensor(row["labels"])[1:].tolist() if label != -100]


def test_padding_is_a_token_of_its_own(tokenizer) -> None:
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == 0
    assert tokenizer.pad_token_id == len(tokenizer) - 1 and tokenizer.pad_token_id not in tokenizer(TEXTS[0]).input_ids
    documents = list(tokenize(Dataset.from_dict({"text": TEXTS}), tokenizer))
    batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)(documents)
    assert learned([{"labels": labels} for labels in batch["labels"]]).count(0) == len(TEXTS)


@pytest.mark.parametrize("form", ["document", "pack", "cut_into_rows", "collate", "collate where the end is padding"])
def test_every_document_ends_once_and_its_end_is_a_target(form: str, tokenizer) -> None:
    if form.endswith("is padding"):
        tokenizer = padded_with_its_end()
    documents = tokenize(Dataset.from_dict({"text": TEXTS}), tokenizer)
    lengths = [len(tokenizer(text).input_ids) for text in TEXTS]
    assert all(
        len(ids) == length + 1 and ids[-1] == 0 for ids, length in zip(documents["input_ids"], lengths, strict=True)
    )
    again = tokenize(Dataset.from_dict({"text": [f"{TEXTS[0]}<|endoftext|>"]}), tokenizer)["input_ids"][0]
    assert again == documents["input_ids"][0]  # a text that has its end already
    if form == "pack":
        rows = list(pack(documents, 3 * SEGMENT, SEGMENT))
    elif form == "cut_into_rows":
        rows = list(cut_into_rows(documents, 6))
        assert all(len(row["input_ids"]) == 6 for row in rows) and len(rows) == sum(-(-(n + 1) // 6) for n in lengths)
    elif form == "document":
        rows = [{"labels": ids} for ids in documents["input_ids"]]
    else:
        batch = collate(list(documents))
        assert batch["attention_mask"].sum(1).tolist() == [length + 1 for length in lengths]
        rows = [{"labels": labels} for labels in batch["labels"]]
    assert learned(rows).count(0) == len(TEXTS)


def test_the_end_of_a_completion_is_a_target(tokenizer) -> None:
    pairs = Dataset.from_dict({"prompt": ["one", "four"], "completion": [" two", " five<|endoftext|>"]})
    for row in tokenize_completions(pairs, tokenizer):
        assert row["input_ids"].count(0) == 2 and row["labels"].count(0) == 1 and row["labels"][-1] == 0


CHATML = (
    "{% for m in messages %}<s>{% if m.role == 'user' %}{{ m.content }}</s>{% else %}{% generation %}{{ m.content }}"
)
ENDS = {  # template behind the words of the assistant, whether the end of each turn is learned, what is added
    "in the turn": ("</s>{% endgeneration %}\n{% endif %}{% endfor %}", 2, 0),
    "behind the turn": ("{% endgeneration %}</s>\n{% endif %}{% endfor %}", 2, 0),
    "nowhere": ("{% endgeneration %}{% endif %}{% endfor %}", 0, 1),
}


@pytest.mark.parametrize("all_turns", [False, True])
@pytest.mark.parametrize("form", ENDS)
def test_the_end_of_an_answer_is_a_target(form: str, all_turns: bool) -> None:
    tokenizer = train_tokenizer(TEXTS * 3, 290)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<s>", "</s>"]})
    end, num_turns, num_added = ENDS[form]
    tokenizer.chat_template = CHATML + end
    said = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
    chats = Dataset.from_dict({"messages": [[{"role": role, "content": text} for role, text in said]]})
    (row,) = tokenize_chats(chats, tokenizer, all_turns=all_turns)
    turn = tokenizer.convert_tokens_to_ids("</s>")
    assert row["labels"].count(turn) == num_turns + (2 if all_turns else 0)
    assert row["labels"].count(0) == num_added == (row["input_ids"][-1] == 0)
    tokenizer.chat_template = CHATML.replace("</s>", "") + end
    asked = Dataset.from_dict({"messages": [chats[0]["messages"][:3]]})
    (row,) = tokenize_chats(asked, tokenizer, all_turns=all_turns)
    assert row["input_ids"].count(0) == all_turns  # the assistant does not end where the user was the last


def make_model(name: str, tokenizer: PreTrainedTokenizerFast) -> torch.nn.Module:
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    torch.manual_seed(0)
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SIZES, **ids))
    memory = {"chunk_length": 4, "segment_length": SEGMENT, "num_memory_slots": 8, "num_observing_tokens": 4}
    return RMTForCausalLM(RMTConfig(vocab_size=len(tokenizer), **SIZES, **ids, **memory))


@pytest.mark.parametrize(
    ("name", "rows"),
    [("llama", "collate"), ("ours", "collate"), ("ours", "pack"), ("ours", "streams"), ("ours", "end is padding")],
)
def test_generation_stops_where_texts_ended(name: str, rows: str, tokenizer, tmp_path) -> None:
    if rows == "end is padding":
        tokenizer = padded_with_its_end()
    documents, model = tokenize(Dataset.from_dict({"text": TEXTS}), tokenizer), make_model(name, tokenizer)
    settings = {"learning_rate": 1e-2, "max_steps": 200, "per_device_train_batch_size": 3, "use_cpu": True}
    settings |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False}
    collator = collate
    if rows == "pack":
        documents, collator = pack(documents, 4 * SEGMENT, SEGMENT), default_data_collator
    if rows == "streams":
        arguments = RMTTrainingArguments(str(tmp_path), stream_length=2 * SEGMENT, **settings)
        RMTTrainer(model, arguments, train_dataset=documents).train()
    else:
        trainer = Trainer if name == "llama" else RMTTrainer
        kind = TrainingArguments if name == "llama" else RMTTrainingArguments
        trainer(model, kind(str(tmp_path), **settings), train_dataset=documents, data_collator=collator).train()
    for text in TEXTS:
        prompt = tokenizer(text.split()[0], return_tensors="pt")
        found = model.eval().generate(**prompt, max_new_tokens=40, do_sample=False)[0]
        assert tokenizer.decode(found[1:-1]) == text and found[-1] == tokenizer.eos_token_id
