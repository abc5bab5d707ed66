"""A converted model learns from its source: the loss by hand, what is trained, what the rows hold, how it is judged."""

import copy
import random
import re

import pytest
import torch
from datasets import Dataset
from transformers import default_data_collator

from rmt_hf.conversion import add_memory, freeze_base, memory_parameters
from rmt_hf.data import IGNORED, tokenize, train_tokenizer
from rmt_hf.distillation import (
    TOKENS_PER_FACT,
    DistillationTrainer,
    code_stories,
    divergence,
    parameter_groups,
    rows_of,
)
from rmt_hf.evaluation import Comparison
from rmt_hf.facts import read_background
from rmt_hf.peers import state_bytes
from rmt_hf.retrofit_evidence import (
    contenders,
    gap_recovered,
    greedy_agreement,
    recall,
    recall_figures,
    recall_rows,
    sliding_window,
    text_comparison,
    window_of_equal_state,
)
from rmt_hf.training import RMTTrainingArguments
from test_conversion import FIELDS, WINDOW, make_source
from tiny import tiny_ids


TEXT = "The sea was calm. A boat lay still? Nobody spoke! The evening came and went, and so did we. " * 60


def make_trainer(tmp_path, rows: list[dict], teacher=None, **settings) -> DistillationTrainer:
    source = make_source("llama", torch.float32)
    model = add_memory(source, **FIELDS).train()
    freeze_base(model)
    fixed = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "disable_tqdm": True, "max_steps": 1}
    fixed |= {"per_device_train_batch_size": 1, "train_sampling_strategy": "sequential", "save_strategy": "no"}
    arguments = RMTTrainingArguments(**{**fixed, **settings})
    return DistillationTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_list(rows),
        data_collator=default_data_collator,
        teacher=copy.deepcopy(source) if teacher is None else teacher,
        optimizers=(torch.optim.SGD(parameter_groups(model, 0.02), lr=0.02), None),
    )


def make_row(length: int, seed: int = 0, num_labels: int = 0) -> dict[str, list[int]]:
    ids = tiny_ids(1, length, seed)[0].tolist()
    return {"input_ids": ids, "labels": [IGNORED] * (length - num_labels) + ids[length - num_labels :]}


def test_divergence_is_the_sum_over_the_vocabulary():
    ours, theirs = (torch.randn(2, 600, 7, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    p, q = (part.double().softmax(-1) for part in (theirs, ours))
    expected = sum(
        float(p[b, t, v] * (p[b, t, v] / q[b, t, v]).log()) for b in range(2) for t in range(600) for v in range(7)
    )
    assert divergence(ours, theirs).item() == pytest.approx(expected / 1200, rel=1e-5)
    assert divergence(theirs, theirs).item() == pytest.approx(0, abs=1e-7)


def test_the_loss_is_nothing_in_the_window_and_something_beyond(tmp_path):
    trainer = make_trainer(tmp_path, [make_row(WINDOW)])
    inside, beyond = (
        trainer.compute_loss(trainer.model, {"input_ids": tiny_ids(2, length)}).item()
        for length in (WINDOW, 4 * WINDOW)
    )
    assert inside == pytest.approx(0, abs=1e-6) and beyond > 1e-3


def test_labels_add_their_cross_entropy(tmp_path):
    trainer, ids = make_trainer(tmp_path, [make_row(WINDOW)]), tiny_ids(1, 40)
    labels = torch.full_like(ids, IGNORED)
    labels[:, -2:] = ids[:, -2:]
    alone = trainer.compute_loss(trainer.model, {"input_ids": ids, "labels": torch.full_like(ids, IGNORED)})
    with_labels, outputs = trainer.compute_loss(trainer.model, {"input_ids": ids, "labels": labels}, True)
    chances = outputs.logits[0, -3:-1].double().softmax(-1)[[0, 1], ids[0, -2:]]
    assert (with_labels - alone).item() == pytest.approx(-chances.log().mean().item(), rel=1e-4)
    trainer.teacher = None
    assert trainer.compute_loss(trainer.model, {"input_ids": ids, "labels": labels}).item() == pytest.approx(
        (with_labels - alone).item(), rel=1e-4
    )


def test_training_comes_nearer_to_the_teacher_and_touches_memory_alone(tmp_path):
    rows = [make_row(4 * WINDOW)] * 60
    trainer = make_trainer(tmp_path, rows, max_steps=60)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    teacher = {name: tensor.clone() for name, tensor in trainer.teacher.state_dict().items()}
    first = trainer.compute_loss(trainer.model, {"input_ids": tiny_ids(1, 4 * WINDOW)}).item()
    trainer.train()
    last = trainer.compute_loss(trainer.model, {"input_ids": tiny_ids(1, 4 * WINDOW)}).item()
    assert last < 0.95 * first
    changed = {name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed <= set(memory_parameters(trainer.model))
    assert any(name.endswith("fusion.scale") for name in changed)
    assert any(name.endswith("memory_q_proj.weight") for name in changed)
    assert all(torch.equal(tensor, teacher[name]) for name, tensor in trainer.teacher.state_dict().items())


def test_accumulated_steps_are_the_mean_of_their_rows(tmp_path):
    rows = [make_row(3 * WINDOW, seed, 2) for seed in (0, 1)]
    trainer = make_trainer(tmp_path, rows, gradient_accumulation_steps=2, max_grad_norm=0.0)
    inputs = [{name: torch.tensor([value]) for name, value in row.items()} for row in rows]
    names = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    parameters = [dict(trainer.model.named_parameters())[name] for name in names]
    wanted = torch.autograd.grad(
        sum(trainer.compute_loss(trainer.model, row) for row in inputs) / 2, parameters, allow_unused=True
    )
    before = [parameter.detach().clone() for parameter in parameters]
    trainer.train()
    for name, old, new, gradient in zip(names, before, parameters, wanted, strict=True):
        rate = 0.2 if name.endswith("fusion.scale") else 0.02
        step = torch.zeros_like(old) if gradient is None else rate * gradient
        torch.testing.assert_close(old - new.detach(), step, rtol=1e-3, atol=1e-7)


def test_every_trained_parameter_is_in_one_group():
    model = add_memory(make_source("llama"), **FIELDS)
    freeze_base(model)
    scales, others = parameter_groups(model, 1e-3, 5.0)
    assert (scales["lr"], others["lr"]) == (5e-3, 1e-3)
    assert len(scales["params"]) == model.config.num_hidden_layers
    trained = [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(id(parameter) for group in (scales, others) for parameter in group["params"]) == sorted(trained)


@pytest.fixture(scope="module")
def texts():
    tokenizer = train_tokenizer([TEXT, "secret code of 0123456789"], 300)
    return tokenizer, tokenize(Dataset.from_list([{"text": TEXT}]), tokenizer), read_background(TEXT, tokenizer)


def test_rows_follow_the_stages_and_hold_what_is_asked(texts):
    tokenizer, documents, background = texts
    rows = rows_of(documents, background, [(400, 6), (800, 4)], recall_share=0.5, seed=3)
    assert [len(ids) for ids in rows["input_ids"]] == [400] * 6 + [800] * 4
    again = rows_of(documents, background, [(400, 6), (800, 4)], recall_share=0.5, seed=3)
    assert again["input_ids"] == rows["input_ids"] != rows_of(documents, background, [(400, 10)], seed=4)["input_ids"]
    asked = 0
    for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True):
        codes = tokenizer.decode([label for label in labels if label != IGNORED]).split()
        if codes:
            asked += 1
            told, _, questions = tokenizer.decode(ids).partition("\nQuestion: ")
            towns = re.findall(r"secret code of (\w+)\?", questions)
            assert len(set(towns)) == len(towns) == len(codes) == len(ids) // TOKENS_PER_FACT
            for town, code in zip(towns, codes, strict=True):
                assert f"The secret code of {town} is {code}." in told[: -len(ids) // 8]
                assert f"secret code of {town}?\nAnswer: {code}" in questions
    assert 0 < asked < 10
    (plain,) = rows_of(documents, background, [(400, 1)], recall_share=0.0, label_text=True)["labels"]
    assert IGNORED not in plain


def test_a_story_has_one_code_for_each_town():
    stories = code_stories(4, random.Random(0))
    towns = [fact.split()[4] for fact in stories[0].facts]
    assert len(set(towns)) == 4
    assert sorted(story.question.split()[-1].rstrip("?") for story in stories) == sorted(towns)
    for story in stories:
        assert story.facts == stories[0].facts
        (fact,) = (fact for fact in story.facts if story.question.split()[-1].rstrip("?") in fact)
        assert fact.endswith(f"is {story.answer}.")


def test_a_sliding_window_is_the_source_until_it_is_full():
    source, ids = make_source("llama", torch.float32), tiny_ids(2, 2 * WINDOW)
    window = sliding_window(source, WINDOW)
    with torch.no_grad():
        ours, theirs = window(ids).logits, source(ids).logits
    torch.testing.assert_close(ours[:, :WINDOW], theirs[:, :WINDOW], rtol=0, atol=1e-4)
    assert not torch.allclose(ours[:, WINDOW + 2 :], theirs[:, WINDOW + 2 :], rtol=0, atol=1e-2)
    with pytest.raises(ValueError, match="tensors of Mistral"):
        sliding_window(make_source("llama with biases"), WINDOW)


def test_contenders_have_state_of_equal_size():
    source = make_source("llama", torch.float32)
    model = add_memory(source, **FIELDS)
    equal = window_of_equal_state(model)
    names = list(contenders(model, source))
    assert names[-1].endswith(f"({equal})")
    theirs = state_bytes(sliding_window(source, equal + 1), 1, 4 * equal)  # a window sees itself: one less is kept
    assert 0 <= theirs - state_bytes(model, 1, WINDOW) < theirs / equal


def test_text_is_compared_and_the_gap_is_a_share():
    source = make_source("llama", torch.float32)
    models, ids = contenders(add_memory(source, **FIELDS), source), tiny_ids(3, 5 * WINDOW)
    comparison = text_comparison(models, ids, torch.ones(3, 5 * WINDOW - 1, dtype=torch.long))
    assert set(comparison.others) == {"memory emptied", "memory of another document", *list(models)[1:]}
    # As converted, memory counts for nothing: no control changes a bit.
    assert torch.equal(comparison.bits["ours"], comparison.bits["memory emptied"])
    bytes_ = torch.ones(2, 7, dtype=torch.long)
    bits = {name: torch.full((2, 7), value) for name, value in (("ours", 2.5), ("full attention", 2.0), ("short", 3.0))}
    assert gap_recovered(Comparison(bits, bytes_, 2, "ours"), "short") == pytest.approx(0.5)


def test_recall_is_what_the_likeliest_tokens_say(texts):
    tokenizer, _, background = texts
    source = make_source("llama", torch.float32, vocab_size=len(tokenizer))
    rows = recall_rows(background, 2, 128, 4, seed=1)
    assert [row.input_ids.tolist() for row in rows] == [
        row.input_ids.tolist() for row in recall_rows(background, 2, 128, 4, seed=1)
    ]
    for row in rows:
        tail = tokenizer.decode(row.input_ids[0]).rpartition("\nQuestion")[2]
        ids = row.input_ids[0, : -len(tokenizer.encode("\nQuestion" + tail, add_special_tokens=False))].tolist()
        assert "secret code of" in tokenizer.decode(ids[-256:])
        assert not any("secret code of" in tokenizer.decode(part) for part in (ids[:-256], ids[-128:]))
    hits = recall(source, rows, piece=50)
    for row, hit in zip(rows, hits, strict=True):
        said = source(row.input_ids).logits.argmax(-1)[0, :-1][row.labels[0, 1:] != IGNORED]
        assert hit == torch.equal(said, row.labels[row.labels != IGNORED])

    class Knows(type(source)):
        def forward(self, input_ids=None, **kwargs):
            outputs = super().forward(input_ids=input_ids, **kwargs)
            kept = kwargs.get("logits_to_keep") or input_ids.shape[1]
            answer = torch.nn.functional.one_hot(self.answer, self.config.vocab_size).float()
            outputs.logits = answer[None].expand(1, kept, -1) if kept == len(answer) else outputs.logits
            return outputs

    source.__class__ = Knows
    source.answer = rows[0].labels[rows[0].labels != IGNORED]
    assert recall(source, rows[:1]) == [True]
    source.answer = source.answer.flip(0) + 1
    assert recall_figures({"it": source}, {2: rows[:2]}) == {"it": {"2": [0.0, 0.0]}}


def test_a_new_conversion_answers_as_its_source():
    source = make_source("llama", torch.float32)
    model, prompts = add_memory(source, segment_length=64, num_memory_slots=16), tiny_ids(3, 9).tolist()
    assert greedy_agreement(model, source, prompts) == 1.0
    with torch.no_grad():
        for parameter in memory_parameters(model).values():
            parameter.normal_()
    assert greedy_agreement(model, source, prompts) < 1.0


@pytest.mark.parametrize("settings", [{"stream_length": 16}, {"checkpoint_segments": 1}])
def test_rows_are_read_whole(tmp_path, settings):
    with pytest.raises(ValueError, match="a teacher reads whole rows"):
        make_trainer(tmp_path, [make_row(16)], **settings)


def test_vocabularies_must_agree(tmp_path):
    with pytest.raises(ValueError, match="vocab_size of the teacher must be"):
        make_trainer(tmp_path, [make_row(16)], teacher=make_source("llama", vocab_size=99))
