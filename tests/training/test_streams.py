"""Stream mode: streams go on with their state from step to step, and gradient reaches as far as it is asked to."""

import pytest
import torch
from accelerate.parallelism_config import ParallelismConfig
from datasets import Dataset
from torch.nn import functional as F
from transformers import TrainerCallback, TrainingArguments

from helpers import tiny_model
from rmt_hf import RMTForSequenceClassification, RMTTrainer, RMTTrainingArguments, StreamSchedule
from rmt_hf.training.streams import StreamDataset


S = 8  # segment_length of the tiny configuration
VOCABULARY = 211  # more than tokens, so that the gradient of an embedding is that of a position

# Float64 sums taken in another order; gradients here are up to 1.
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def exact_loss(logits, labels, vocab_size, num_items_in_batch=None, shift_labels=None, **kwargs):
    """The library's loss in the precision of the logits, which it would round to float32."""
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
    total = F.cross_entropy(logits.flatten(0, 1), shift_labels.flatten(), ignore_index=-100, reduction="sum")
    return total / (num_items_in_batch if num_items_in_batch is not None else (shift_labels != -100).sum())


def model_for_streams(**overrides):
    model = tiny_model(**{"vocab_size": VOCABULARY, **overrides})
    model.loss_function = exact_loss
    return model


def documents(lengths: list[int]) -> Dataset:
    """Documents in which no token is there twice."""
    ids, first = [], 3
    for length in lengths:
        ids.append([*range(first, first + length)])
        first += length
    assert first <= 300
    return Dataset.from_dict({"input_ids": ids})


class Notes(TrainerCallback):
    """The gradients of every step, before the optimizer sees them."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        self.gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def trainer(model, tmp_path, data, evaluation=None, callbacks=(), **arguments) -> RMTTrainer:
    defaults = {"use_cpu": True, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "max_grad_norm": 0.0}
    defaults |= {"learning_rate": 0.0, "lr_scheduler_type": "constant", "stream_length": S, "optim": "sgd"}
    defaults |= {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "num_train_epochs": 1}
    args = RMTTrainingArguments(output_dir=str(tmp_path), **(defaults | arguments))
    return RMTTrainer(model, args, train_dataset=data, eval_dataset=evaluation, callbacks=list(callbacks))


def train(tmp_path, data, model=None, **arguments) -> tuple[list[float], list[dict[str, torch.Tensor]]]:
    """Losses and gradients of a run."""
    notes, model = Notes(), model_for_streams() if model is None else model
    run = trainer(model, tmp_path, data, callbacks=[notes, *arguments.pop("callbacks", [])], **arguments)
    run.train()
    return losses(run), notes.gradients


def losses(run: RMTTrainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def alone(data: Dataset, model=None) -> dict[str, torch.Tensor]:
    """Gradients of one forward pass over each whole document, of the mean over all their tokens."""
    model = (model_for_streams() if model is None else model).train()
    for row in data:
        ids = torch.tensor([row["input_ids"]])
        model(ids, labels=ids, num_items_in_batch=sum(len(row["input_ids"]) - 1 for row in data)).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_gradients(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


LENGTHS = [7 * S + 3, 2 * S, 12 * S + 1, 5]


@pytest.mark.parametrize("num_streams", [1, 2])
def test_in_one_slice_the_gradients_are_those_of_one_long_forward(num_streams: int, tmp_path) -> None:
    data = documents(LENGTHS)
    _, gradients = train(tmp_path, data, stream_length=25 * S, per_device_train_batch_size=num_streams)
    assert len(gradients) == 1
    assert_gradients(gradients[0], alone(data))


@pytest.mark.parametrize("num_streams", [1, 2])
@pytest.mark.parametrize("bptt_segments", [3, 25])
def test_what_is_read_again_makes_slices_one_long_forward(bptt_segments: int, num_streams: int, tmp_path) -> None:
    """All slices of a step, each with gradient through everything before it: together that is one long forward."""
    data = documents(LENGTHS)
    columns = 2 * S
    steps = StreamDataset(data, num_streams, columns, S).num_slices
    streams = {"stream_length": columns, "per_device_train_batch_size": num_streams}
    _, gradients = train(tmp_path, data, gradient_accumulation_steps=steps, bptt_segments=bptt_segments, **streams)
    assert len(gradients) == 1
    if bptt_segments == 25:
        assert_gradients(gradients[0], alone(data))
    else:
        with pytest.raises(AssertionError):
            assert_gradients(gradients[0], alone(data))


@pytest.mark.parametrize("checkpoint_segments", [None, 1])
@pytest.mark.parametrize(("stream_length", "bptt_segments"), [(S, 0), (S, 3), (2 * S, 1), (2 * S, 4), (3 * S, 2)])
def test_gradient_reaches_as_far_as_it_is_asked_to_and_exactly_no_further(
    stream_length: int, bptt_segments: int, checkpoint_segments: int | None, tmp_path
) -> None:
    total, arguments = 12 * S, {"stream_length": stream_length, "bptt_segments": bptt_segments}
    data = documents([total])
    _, gradients = train(tmp_path, data, checkpoint_segments=checkpoint_segments, **arguments)
    assert len(gradients) == total // stream_length
    for step, found in enumerate(gradients):
        reached = found["model.embed_tokens.weight"].ne(0).any(1).nonzero().flatten() - 3
        first = max(0, step * stream_length - bptt_segments * S)
        last = (step + 1) * stream_length - (step == len(gradients) - 1)  # nothing comes after the last token
        assert reached.tolist() == [*range(first, last)], step


@pytest.mark.parametrize("stream_length", [S, 4 * S])
def test_every_step_has_the_loss_of_its_documents_alone(stream_length: int, tmp_path) -> None:
    """They end inside slices and with them; nothing is carried over."""
    data = documents(LENGTHS)
    order = StreamDataset(data, 1, stream_length, S, seed=42)._order(0, 0)  # 42 is the seed of Trainer
    history, _ = train(tmp_path, data, stream_length=stream_length)
    model, expected = model_for_streams(), []
    for number in order:
        ids = torch.tensor([data[int(number)]["input_ids"]])
        of_tokens = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        # The last token of a document predicts nothing, and padding follows up to the next segment start.
        expected.append(F.pad(of_tokens, (0, 1 + -ids.shape[1] % S), value=torch.nan))
    slices = torch.cat(expected).split(stream_length)
    means = torch.stack([part.nanmean().nan_to_num() for part in slices])  # a slice may have nothing to predict
    torch.testing.assert_close(torch.tensor(history, dtype=torch.float64), means)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_accumulation_and_evaluation_do_not_disturb_the_streams(accumulation: int, tmp_path) -> None:
    """With weights that stay, every step has the loss of its columns in one long forward."""
    data = documents([16 * S])
    model, ids = model_for_streams(), torch.tensor(data["input_ids"][:])
    of_tokens = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
    expected = [part.mean().item() for part in of_tokens.split(S * accumulation)]
    for evaluation in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        arguments = {"gradient_accumulation_steps": accumulation, **evaluation}
        run = trainer(model_for_streams(), tmp_path, data, documents([3 * S, 5]), **arguments)
        run.train()
        assert losses(run) == pytest.approx(expected, rel=1e-6)  # Trainer adds losses up in float32
        assert sum("eval_loss" in entry for entry in run.state.log_history) == len(expected) * bool(evaluation)


@pytest.mark.parametrize("num_streams", [1, 3])
def test_documents_are_evaluated_as_streams(num_streams: int, tmp_path) -> None:
    data, model = documents(LENGTHS), model_for_streams()
    run = trainer(model, tmp_path, data, data, per_device_eval_batch_size=num_streams)
    with torch.no_grad():
        rows = [torch.tensor([row["input_ids"]]) for row in data]
        total = sum(model(ids, labels=ids, num_items_in_batch=1).loss for ids in rows)
    expected = pytest.approx(total.item() / sum(ids.shape[1] - 1 for ids in rows), rel=1e-9)
    assert run.evaluate()["eval_loss"] == expected
    assert run.evaluate(data.to_iterable_dataset())["eval_loss"] == expected
    assert run.predict(data).predictions.shape[1:] == (S, VOCABULARY)


def test_documents_are_read_in_their_order_if_that_is_wanted(tmp_path) -> None:
    data = documents([S] * 12)
    history, _ = train(tmp_path, data, num_train_epochs=2, train_sampling_strategy="sequential")
    model = model_for_streams()
    with torch.no_grad():
        rows = [torch.tensor([row["input_ids"]]) for row in data]
        in_order = [model(ids, labels=ids, num_items_in_batch=S - 1).loss.item() for ids in rows]
    assert history == pytest.approx(in_order * 2, rel=1e-6)
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "train_sampling_strategy": "sequential"}
    trainer(model_for_streams(), tmp_path, data, **saving).train()
    shuffled = trainer(model_for_streams(), tmp_path, data, **saving | {"train_sampling_strategy": "random"})
    with pytest.raises(ValueError, match="data_seed 42 instead of None"):
        shuffled.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_every_epoch_has_an_order_of_its_own(tmp_path) -> None:
    history, _ = train(tmp_path, documents([S] * 12), num_train_epochs=2)
    assert history[:12] != history[12:] and sorted(history[:12]) == pytest.approx(sorted(history[12:]))


@pytest.mark.parametrize("arguments", [{}, {"stream_length": None, "checkpoint_segments": 1}])
def test_a_step_in_which_nothing_is_learned_changes_nothing(arguments: dict, tmp_path) -> None:
    ids = list(range(3, 3 + 3 * S))
    data = Dataset.from_dict({"input_ids": [ids], "labels": [[-100] * len(ids)]})
    history, gradients = train(tmp_path, data, logging_nan_inf_filter=False, **arguments)
    assert set(history) == {0.0} and not any(tensor.any() for step in gradients for tensor in step.values())


def test_a_streaming_data_set_trains_as_one_in_memory(tmp_path) -> None:
    data = documents([6 * S])
    expected = train(tmp_path, data)
    streamed = train(tmp_path, data.to_iterable_dataset(), max_steps=6)
    assert streamed[0] == expected[0]


# Activations


@pytest.mark.parametrize("bptt_segments", [0, 5])
def test_checkpointed_layers_keep_the_state(bptt_segments: int, tmp_path) -> None:
    """transformers takes `past_key_values` from a checkpointed layer without a word: the state must not go that way."""
    data, arguments = documents(LENGTHS), {"stream_length": 2 * S, "bptt_segments": bptt_segments}
    plain = train(tmp_path, data, **arguments)
    checkpointed = train(tmp_path, data, activation_checkpointing=True, **arguments)
    assert checkpointed[0] == plain[0]
    for got, want in zip(checkpointed[1], plain[1], strict=True):
        assert_gradients(got, want)
    forgetful = train(
        tmp_path, Dataset.from_dict({"input_ids": [data["input_ids"][0][:S], data["input_ids"][0][S : 2 * S]]})
    )
    assert forgetful[0][1] != pytest.approx(train(tmp_path, documents([2 * S]))[0][1], rel=1e-3)


@pytest.mark.parametrize("layers_too", [False, True])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_checkpointed_groups_of_segments_give_the_same_gradients(
    stream: bool, group: int, layers_too: bool, tmp_path
) -> None:
    data = documents([9 * S + 3] * 2)
    arguments = {"per_device_train_batch_size": 2, "stream_length": 10 * S if stream else None}
    if not stream:
        data = data.add_column("labels", [[-100] * 20 + ids[20:] for ids in data["input_ids"]])
    dropout = {"attention_dropout": 0.2}
    plain = train(tmp_path, data, model_for_streams(), **arguments)
    grouped = train(
        tmp_path, data, model_for_streams(), checkpoint_segments=group, activation_checkpointing=layers_too, **arguments
    )
    assert grouped[0] == pytest.approx(plain[0], rel=1e-6)
    assert_gradients(grouped[1][0], plain[1][0])
    noisy = train(tmp_path, data, model_for_streams(**dropout), checkpoint_segments=group, **arguments)  # must not fail
    assert noisy[0] != plain[0]


def saved_bytes(run: RMTTrainer, batch: dict[str, torch.Tensor]) -> int:
    """Bytes of what the forward pass keeps for the backward pass, apart from states and parameters."""
    kept: dict[int, int] = {}
    parameters = {parameter.data_ptr() for parameter in run.model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run.compute_loss(run.model.train(), batch)
    loss.backward()
    return sum(kept.values())


@pytest.mark.parametrize("stream", [False, True])
def test_only_one_group_of_segments_keeps_its_activations(stream: bool, tmp_path) -> None:
    """Four times the columns cost four times the activations; in groups, nothing more."""
    sizes = {}
    for group in (None, 2):
        for columns in (8 * S, 32 * S):
            data, model = documents([columns]), model_for_streams(vocab_size=300)
            arguments = {"checkpoint_segments": group, "stream_length": columns if stream else None}
            run = trainer(model, tmp_path, data, **arguments)
            ids = torch.tensor(data["input_ids"][:])
            batch = next(iter(run.get_train_dataloader())) if stream else {"input_ids": ids, "labels": ids}
            sizes[group, columns] = saved_bytes(run, batch)
    assert sizes[None, 32 * S] > 3.5 * sizes[None, 8 * S] > 3.5 * 3 * sizes[2, 8 * S]
    assert sizes[2, 32 * S] < 1.1 * sizes[2, 8 * S]


# Curriculum


def test_a_schedule_changes_how_far_gradient_reaches_and_not_what_is_read(tmp_path) -> None:
    data = documents([24 * S])
    schedule = StreamSchedule([(0, S, 0), (2, 2 * S, 0), (4, 4 * S, 2)])
    notes = Notes()
    run = trainer(model_for_streams(), tmp_path, data, callbacks=[schedule, notes], stream_length=4 * S)
    run.train()
    expected, full = train(tmp_path, data, stream_length=4 * S, bptt_segments=2)
    assert losses(run) == pytest.approx(expected, rel=1e-6)
    logged = [(entry["stream_length"], entry["bptt_segments"]) for entry in run.state.log_history if "loss" in entry]
    assert logged == [(S, 0), (S, 0), (2 * S, 0), (2 * S, 0), (4 * S, 2), (4 * S, 2)]
    for step, same in enumerate((False, False, False, False, False, True)):  # step 4 has nothing yet to read again
        name = "model.embed_tokens.weight"
        assert torch.allclose(notes.gradients[step][name], full[step][name], **CLOSE) == same, step
    _, short = train(tmp_path, data, gradient_accumulation_steps=4)
    assert_gradients(notes.gradients[0], short[0])
    assert run.state.save_to_json(str(tmp_path / "state.json")) is None
    assert '"stream_length": 32' in (tmp_path / "state.json").read_text("utf-8")


# What is refused


BAD = {
    "no whole segments": (
        {"stream_length": S + 4},
        r"stream_length must be a multiple of segment_length \(8\).*got 12",
    ),
    "no columns": ({"stream_length": 0}, "stream_length must be at least 1, got 0"),
    "negative": ({"bptt_segments": -1}, "bptt_segments must be at least 0, got -1"),
    "no group": ({"checkpoint_segments": 0}, "checkpoint_segments must be at least 1, got 0"),
    "plain rows": ({"stream_length": None, "bptt_segments": 2}, "bptt_segments=2 is for stream mode"),
    "sorted by length": (
        {"train_sampling_strategy": "group_by_length"},
        r"train_sampling_strategy does not work in stream mode \(stream_length=8\): streams have an order",
    ),
    "data from the beginning": ({"ignore_data_skip": True}, "ignore_data_skip does not work in stream mode"),
    "other batch sizes": ({"auto_find_batch_size": True}, "auto_find_batch_size does not work in stream mode"),
    "smoothing": ({"label_smoothing_factor": 0.1}, "label_smoothing_factor does not work in stream mode"),
    "out of order": ({"dataloader_in_order": False}, "dataloader_in_order does not work in stream mode"),
    "no labels": ({"label_names": ["start_positions"]}, "label_names does not work in stream mode"),
    "one graph": (
        {"ddp_static_graph": True, "gradient_accumulation_steps": 2},
        "ddp_static_graph does not work in stream mode",
    ),
    "one graph for parts": (
        {"ddp_static_graph": True, "stream_length": 2 * S, "callbacks": [StreamSchedule([(0, S, 0)])]},
        "ddp_static_graph needs one backward pass in every step, got a StreamSchedule with a stage of 8 of 16 columns",
    ),
    "in the middle of a step": ({"enable_jit_checkpoint": True}, "enable_jit_checkpoint does not work in stream mode"),
    "kernels of others": (
        {"stream_length": None, "use_liger_kernel": True},
        "use_liger_kernel has no kernels for RMT models",
    ),
    "rows cut into columns": (
        {"stream_length": None, "parallelism_config": ParallelismConfig(cp_size=2)},
        r"parallelism_config must not split rows into columns, got \['cp_size'\]",
    ),
    "split batches": ({"accelerator_config": {"split_batches": True}}, "split_batches does not work in stream mode"),
    "smoothed groups": (
        {"stream_length": None, "checkpoint_segments": 1, "label_smoothing_factor": 0.1},
        "label_smoothing_factor works without checkpoint_segments only",
    ),
    "long stage": ({"callbacks": [StreamSchedule([(0, 2 * S, 0)])]}, "in a StreamSchedule divide .* got 16"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_would_break_streams_is_refused(name: str, tmp_path) -> None:
    arguments, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        trainer(model_for_streams(), tmp_path, documents([S]), **arguments)


def test_other_models_and_data_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="stream_length is for language models, got a RMTForSequenceClassification"):
        trainer(tiny_model(RMTForSequenceClassification), tmp_path, documents([S]))
    with pytest.raises(ValueError, match=r"needs a datasets.Dataset or a datasets.IterableDataset .* got a list"):
        trainer(model_for_streams(), tmp_path, [{"input_ids": [1, 2]}]).train()
    with pytest.raises(ValueError, match="args must be RMTTrainingArguments, got TrainingArguments"):
        RMTTrainer(model_for_streams(), TrainingArguments(str(tmp_path), use_cpu=True))
    late = trainer(model_for_streams(), tmp_path, documents([S]))
    late.add_callback(StreamSchedule([(0, 2 * S, 0)]))
    with pytest.raises(ValueError, match=r"in a StreamSchedule divide .* got 16"):
        late.train()
    for stages in ([], [(1, S, 0)], [(0, S)], [(0, S, 0), (5, S, 1), (3, S, 2)]):
        with pytest.raises(ValueError, match="stages must be triples"):
            StreamSchedule(stages)
