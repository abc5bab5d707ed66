"""Plain `Trainer` on tiny data: it needs nothing of ours; and golden losses, which move when the model's law moves."""

import json
import logging
import platform

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling, Trainer, TrainingArguments

from helpers import ROOT, tiny_config, tiny_ids, tiny_model, tiny_tokenizer
from rmt_hf import RMTForCausalLM


S = 8  # segment_length of the tiny configuration
GOLDEN = ROOT / "tests" / "golden" / "losses.json"


def sentences(num_rows: int, length: int = 5 * S + 3) -> list[dict[str, list[int]]]:
    """Rows that can be learned: a short random motif, repeated. With labels that leave some tokens out."""
    generator = torch.Generator().manual_seed(num_rows)
    rows = []
    for index in range(num_rows):
        ids = torch.randint(3, 67, (5,), generator=generator).repeat(length)[:length]
        labels = ids.clone()
        labels[: index % 3 * 4] = -100
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return rows


def trainer(model, tmp_path, train=None, evaluation=None, **arguments) -> Trainer:
    """A `Trainer` as a user makes it, on the CPU."""
    defaults = {"use_cpu": True, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "learning_rate": 0.01}
    defaults |= {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "seed": 0}
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(tmp_path), **(defaults | arguments)),
        train_dataset=Dataset.from_list(train or sentences(8)),
        eval_dataset=Dataset.from_list(evaluation or sentences(6)),
    )


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def test_it_trains_and_generates_afterwards_without_a_warning(tmp_path, caplog, monkeypatch) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # so that caplog hears the library, too
    model = RMTForCausalLM(tiny_config())
    run = trainer(model, tmp_path, max_steps=40, lr_scheduler_type="constant")
    run.train()
    assert losses(run)[-1] < 0.5 * losses(run)[0]
    assert run.evaluate()["eval_loss"] > 0
    assert model.config.use_cache is False  # Trainer's doing
    prompt, model = torch.tensor([sentences(8)[0]["input_ids"]]), model.eval()
    greedy = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 2 * S}
    output = model.generate(prompt, **greedy, return_dict_in_generate=True)
    assert output.past_key_values.get_seq_length() == prompt.shape[1] + 2 * S
    new = output.sequences[:, prompt.shape[1] :]
    assert torch.equal(new, model(output.sequences).logits[:, prompt.shape[1] - 1 : -1].argmax(-1))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING], caplog.text


def test_padded_batches_train_as_rows_alone(tmp_path) -> None:
    """A collator pads on the right; pads are no tokens, so the loss is the one of the rows one by one."""
    model, rows = tiny_model().train(), [row["input_ids"][: 20 + 7 * index] for index, row in enumerate(sentences(4))]
    collate = DataCollatorForLanguageModeling(tiny_tokenizer(padding_side="right"), mlm=False)
    batch = collate([{"input_ids": row} for row in rows])
    assert (batch["labels"] == -100).any()
    alone = sum(model(torch.tensor([row]), labels=torch.tensor([row]), num_items_in_batch=1).loss for row in rows)
    torch.testing.assert_close(model(**batch).loss, alone / sum(len(row) - 1 for row in rows))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_accumulated_gradients_equal_one_big_batch(checkpointing: bool, tmp_path) -> None:
    """Two batches of 4 or four of 2, with unequal numbers of labels: the same steps, checkpointed or not."""
    results = []
    for size, steps in ((4, 1), (2, 2)):
        model, arguments = tiny_model(), {"max_steps": 3, "optim": "sgd", "gradient_accumulation_steps": steps}
        arguments["activation_checkpointing"] = checkpointing and size == 2
        run = trainer(model, tmp_path, per_device_train_batch_size=size, **arguments)
        run.train()
        results.append((losses(run), model.state_dict()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)  # Trainer computes the loss in float32
    for name, tensor in results[0][1].items():
        torch.testing.assert_close(tensor, results[1][1][name], rtol=0, atol=1e-6)
    assert not torch.equal(results[0][1]["lm_head.weight"], tiny_model().lm_head.weight)


def test_checkpointing_works_by_its_old_name(tmp_path) -> None:
    plain = trainer(tiny_model(), tmp_path, max_steps=2)
    with pytest.warns(FutureWarning, match="activation_checkpointing"):  # the library's own, about the name
        checkpointed = trainer(tiny_model(), tmp_path, max_steps=2, gradient_checkpointing=True)
    for run in (plain, checkpointed):
        run.train()
    assert checkpointed.model.model.gradient_checkpointing and losses(checkpointed) == losses(plain)


@pytest.mark.parametrize("use_cache", [False, True])
def test_evaluation_gathers_logits_and_no_state(use_cache: bool, tmp_path) -> None:
    model, rows = tiny_model(), sentences(6)
    run = trainer(model, tmp_path, evaluation=rows)
    model.config.use_cache = use_cache
    predicted = run.predict(run.eval_dataset)
    ids, labels = (torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels"))
    with torch.no_grad():
        logits = model(ids).logits
        of_batches = [model(ids[rows], labels=labels[rows]).loss.item() for rows in (slice(4), slice(4, 6))]
    torch.testing.assert_close(torch.from_numpy(predicted.predictions), logits, rtol=0, atol=1e-12)  # float64
    wanted = pytest.approx((4 * of_batches[0] + 2 * of_batches[1]) / 6)
    assert predicted.metrics["test_loss"] == wanted and run.evaluate()["eval_loss"] == wanted


def test_label_smoothing_looks_at_the_next_token(tmp_path) -> None:
    model, ids = tiny_model(), tiny_ids(2, 3 * S)
    run = trainer(model, tmp_path, label_smoothing_factor=0.1)
    loss = run.compute_loss(model, {"input_ids": ids, "labels": ids})
    logits, wanted = model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    torch.testing.assert_close(loss, F.cross_entropy(logits, wanted, label_smoothing=0.1), rtol=1e-6, atol=0)


def test_a_run_resumes_where_it_was_cut(tmp_path) -> None:
    arguments = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = trainer(tiny_model(), tmp_path / "whole", **arguments)
    whole.train()
    resumed = trainer(tiny_model(seed=1), tmp_path / "resumed", **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-6")
    ids = tiny_ids(1, 6 * S)  # not few rows, whose bits depend on where weights lie (RMTLinear)
    assert torch.equal(loaded(ids).logits, whole.model.eval()(ids).logits)


# Golden losses


GOLDEN_FORMS = {
    "default": {},
    "paper": {"num_lookback_segments": 0, "fusion_type": "softmax", "memory_write": "mean"},
    "mean": {"memory_write": "mean", "num_slots_per_chunk": 2, "use_qk_norm": True, "tie_word_embeddings": True},
    "two parts": {"num_lasting_slots": 4, "use_attention_sink": True},
    "no memory": {"num_memory_slots": 0},
}


def golden_losses(form: dict) -> list[float]:
    """Twenty steps of AdamW in float64, from the model's own initialisation, one batch of two long rows a step."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(initializer_range=0.2, **form), dtype=torch.float64).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    data = torch.tensor([row["input_ids"] for row in sentences(4, length=9 * S + 3)])
    history = []
    for step in range(20):
        ids = data[step % 2 :: 2]
        logits = model(ids).logits[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(logits, ids[:, 1:].flatten())  # not the model's own, which is float32
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    return history


@pytest.mark.parametrize("name", GOLDEN_FORMS)
def test_golden_losses(name: str) -> None:
    wanted = json.loads(GOLDEN.read_text("utf-8"))["losses"][name]
    # Other processors sum in another order. Noise of 1e-15 in every weight moves these float64 losses by less than
    # 1e-12, so this is room enough; any change of what the model computes moves them by far more.
    assert golden_losses(GOLDEN_FORMS[name]) == pytest.approx(wanted, rel=1e-8)


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    record = {
        "command": "PYTHONPATH=src:tests python tests/training/test_training.py",
        "torch": torch.__version__,
        "machine": platform.machine(),
        "losses": {name: golden_losses(form) for name, form in GOLDEN_FORMS.items()},
    }
    GOLDEN.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
