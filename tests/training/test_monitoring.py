"""What memory does, as the loggers see it: figures worked out by hand, a training that is not disturbed, warnings."""

import logging
import math
import re

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from helpers import FORMS, tiny_config, tiny_ids, tiny_model
from rmt_hf import RMTCache, RMTMemoryCallback, RMTTrainer, RMTTrainingArguments
from rmt_hf.memory_rmt import Slots, stretched_sigmoid
from rmt_hf.training import monitoring
from rmt_hf.training.monitoring import LayerMeans, note_slots, read_once_more
from rmt_hf.training.stream_state import StreamState


S = 8  # segment_length of the tiny configuration: a window of two segments, a ring of four groups of two slots
GATES = {"memory_gate_mean", "memory_gate_open", "memory_gate_shut"}
SLOTS = {f"memory_{part}_{kind}" for part in ("key", "value") for kind in ("norm", "similarity")}
ALL = GATES | SLOTS | {"memory_slot_use", "memory_read_age", "fusion_local"}


def figures(model, columns: int = 20 * S, num_segments: int = 100, **inputs) -> list[dict[str, float]]:
    """Figures of each layer after two rows have been read."""
    inputs = inputs or {"input_ids": tiny_ids(2, columns)}
    return [layer.means() for layer in read_once_more(model.model, inputs, RMTCache(model.config), num_segments)]


def with_gate_bias(bias: float, **overrides):
    """A model all of whose memory gates have one opening."""
    model = tiny_model(**overrides)
    for layer in model.model.layers:
        for ring in layer.self_attn.memory.rings:
            for parameter in filter(lambda each: each is not None, (ring.gate_weight, ring.gate_scale)):
                parameter.data.zero_()
            ring.gate_bias.data.fill_(bias)
    return model


# Figures


@pytest.mark.parametrize(("bias", "shut", "open"), [(-20.0, 1, 0), (0.5, 0, 0), (20.0, 0, 1)])
def test_gates_are_those_of_writes_that_meet_something(bias: float, shut: float, open: float) -> None:
    for layer in figures(with_gate_bias(bias)):
        expected = stretched_sigmoid(torch.tensor(bias)).item()
        assert layer["memory_gate_mean"] == pytest.approx(expected, abs=1e-7)
        assert (layer["memory_gate_shut"], layer["memory_gate_open"]) == (shut, open)
    first, second = figures(with_gate_bias(bias), 5 * S)  # four writes, which fill an empty ring
    assert GATES.isdisjoint(first) and GATES.isdisjoint(second)


def test_gates_of_both_parts_are_noted() -> None:
    """Lasting slots that stay, and present slots that go."""
    model = with_gate_bias(20.0, **FORMS["two parts"])
    for layer in model.model.layers:
        layer.self_attn.memory.rings[0].gate_bias.data.fill_(-20.0)
    for layer in figures(model):
        # Nearly as many of each: no gate decides about the first token, nor about what the other part has taken.
        assert layer["memory_gate_shut"] == pytest.approx(1 - layer["memory_gate_open"]) == pytest.approx(0.5, abs=0.01)
        assert layer["memory_gate_mean"] == pytest.approx(layer["memory_gate_open"])


@pytest.mark.parametrize("columns", [S, S + 5, 3 * S + 3])
@pytest.mark.parametrize("form", ["gated select", "two parts", "present", "mean"])
def test_weights_are_those_that_slots_are_read_with(form: str, columns: int, monkeypatch) -> None:
    """In a call from within a segment on, and with rows at two positions: what eager attention says."""
    model, found = tiny_model(**FORMS[form]), []

    def collect(weights, memory, layout, *others) -> None:
        by_view = weights.flatten(1, 2).flatten(2, 3)  # (B, F * queries, H, M)
        found.append(layout.collect(by_view).transpose(1, 2))

    monkeypatch.setattr(monitoring, "note_reads", collect)
    model.set_attn_implementation("eager")
    ids, mask = tiny_ids(2, 4 * S + 3), torch.arange(4 * S + 3) >= torch.tensor([[0], [S + 2]])
    more, state = tiny_ids(2, columns, seed=1), RMTCache(model.config)
    model(ids, attention_mask=mask, past_key_values=state)
    with torch.no_grad(), monitoring.watched(model.model, {"input_ids": more}, [LayerMeans(), LayerMeans()], True):
        attentions = model(more, past_key_values=state, output_attentions=True).attentions
    slots, prefix = model.config.num_memory_slots, model.config.prefix_length
    for weights, expected in zip(found, attentions, strict=True):
        torch.testing.assert_close(weights, expected[..., prefix - slots : prefix], rtol=0, atol=1e-6)  # in float32
        assert weights[:, :, -1].sum() > 0.01


def test_reads_of_a_model_that_reads_everything_alike() -> None:
    model = with_gate_bias(20.0, memory_write="mean")
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.zero_()
    for layer in figures(model, 8 * S):
        # Tokens of segments 2 to 7 find these writes of two slots each, the newest two segments old, and the window.
        filled = [(n, index) for n in (1, 2, 3, 4, 4, 4) for index in range(S)]
        shares = [2 * n / (2 * n + S + index + 1) for n, index in filled]
        assert layer["memory_slot_use"] == pytest.approx(sum(shares) / len(shares))
        ages = [1 + (n + 1) / 2 for n, _ in filled]
        expected = sum(share * age for share, age in zip(shares, ages, strict=True)) / sum(shares)
        assert layer["memory_read_age"] == pytest.approx(expected)


def test_a_slot_is_as_old_as_its_token() -> None:
    """Gates that are shut keep what was written first: tokens of segment t read what is t - 1 or t - 2 segments old."""
    model = with_gate_bias(-20.0, num_memory_slots=4)
    model.model.layers[0].self_attn.q_proj.weight.data.zero_()
    for num_segments in (4, 9):
        layer = figures(model, num_segments * S, num_segments=1)[0]
        assert layer["memory_read_age"] == pytest.approx(num_segments - 1.5)
    # What has a softmax of its own, without a sink, is all that it reads.
    for layer in figures(tiny_model(**FORMS["paper"])):
        assert layer["memory_slot_use"] == pytest.approx(1.0)


def test_the_share_of_the_local_path() -> None:
    model = tiny_model()
    for layer in model.model.layers:
        layer.self_attn.fusion.gate.weight.data.zero_()
        layer.self_attn.fusion.gate.bias.data.fill_(0.3)
        layer.self_attn.fusion.scale.data.fill_(2.0)
    for layer in figures(model):
        assert layer["fusion_local"] == pytest.approx(2 / (1 + math.exp(-0.3)), rel=1e-6)
    for index, layer in enumerate(figures(model := tiny_model(fusion_type="softmax"))):
        expected = model.model.layers[index].self_attn.fusion.logits.softmax(0)[1].item()
        assert layer["fusion_local"] == pytest.approx(expected, rel=1e-6)
    assert all("fusion_local" not in layer for layer in figures(tiny_model(use_local_attention=False)))


def test_slots_that_hold_something_are_measured_two_by_two() -> None:
    generator, means = torch.Generator().manual_seed(0), LayerMeans()
    keys, values = (torch.randn(1, 4, 1, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    strengths = torch.tensor([-torch.inf, -1.0, 0.0, -2.0]).reshape(1, 4, 1)
    positions = torch.tensor([-1, 3, 1, 7]).reshape(1, 4, 1)
    note_slots(Slots(keys, values, strengths, positions), means)
    for part, states in (("key", keys[0, 1:, 0]), ("value", values[0, 1:, 0])):
        cosines = torch.nn.functional.cosine_similarity(states[:, None], states[None], dim=-1)
        expected = (cosines[0, 1] + cosines[0, 2] + cosines[1, 2]) / 3
        assert means.means()[f"memory_{part}_similarity"] == pytest.approx(expected.item())
        assert means.means()[f"memory_{part}_norm"] == pytest.approx(states.norm(dim=-1).mean().item())
    nothing = LayerMeans()
    note_slots(Slots(keys, values, torch.full_like(strengths, -torch.inf), -torch.ones_like(positions)), nothing)
    assert nothing.means() == {}


def test_padding_does_not_count() -> None:
    model, ids = tiny_model(), tiny_ids(1, 7 * S + 3)
    alone = figures(model, input_ids=ids)
    padded = torch.nn.functional.pad(ids, (0, 2 * S + 1))
    mask = (torch.arange(padded.shape[1]) < ids.shape[1]).long()[None]
    rows = {"input_ids": padded.repeat(2, 1), "attention_mask": mask.repeat(2, 1)}
    for layer, expected in zip(figures(model, **rows), alone, strict=True):
        assert layer == pytest.approx(expected) and layer.keys() == ALL - GATES | GATES & expected.keys()


def test_another_document_finds_empty_memory() -> None:
    model, ids = tiny_model(), tiny_ids(1, 10 * S)
    restarted = torch.arange(10 * S)[None] % (5 * S)
    packed = figures(model, input_ids=ids, position_ids=restarted)
    both = [figures(model, input_ids=ids[:, part]) for part in (slice(0, 5 * S), slice(5 * S, None))]
    for index, layer in enumerate(packed):
        first, second = (each[index] for each in both)
        assert GATES.isdisjoint(layer)  # neither has filled the ring
        assert layer["fusion_local"] == pytest.approx((first["fusion_local"] + second["fusion_local"]) / 2)
        assert layer["memory_slot_use"] == pytest.approx((first["memory_slot_use"] + second["memory_slot_use"]) / 2)
        assert layer["memory_value_norm"] == pytest.approx(second["memory_value_norm"])


# While training


def trainer(model, tmp_path, callbacks=(), rows: int = 2, columns: int = 12 * S, **arguments) -> RMTTrainer:
    defaults = {"use_cpu": True, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "learning_rate": 0.01}
    defaults |= {"per_device_train_batch_size": rows, "max_steps": 4, "stream_length": 3 * S, "seed": 0}
    ids = tiny_ids(rows, columns)
    data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    args = RMTTrainingArguments(output_dir=str(tmp_path), **(defaults | arguments))
    return RMTTrainer(model, args, train_dataset=data, callbacks=list(callbacks))


def training_logs(run: Trainer) -> list[dict[str, float]]:
    return [entry for entry in run.state.log_history if "loss" in entry]


PLAIN = {"stream_length": None}
MODES = {
    "streams": {"bptt_segments": 2},
    "streams in groups": {"checkpoint_segments": 2, "activation_checkpointing": True},
    "accumulated": {"gradient_accumulation_steps": 2, "bf16": True},
    "plain rows": PLAIN,
    "plain rows in groups": PLAIN | {"checkpoint_segments": 2},
}


@pytest.mark.parametrize("mode", MODES)
def test_training_goes_on_as_if_nothing_had_been_looked_at(mode: str, tmp_path) -> None:
    results = []
    for callbacks in ([], [RMTMemoryCallback()]):
        torch.manual_seed(0)
        model = tiny_model(dtype=torch.float32, attention_dropout=0.2)  # which needs the random state
        run = trainer(model, tmp_path, callbacks, **MODES[mode])
        run.train()
        streams = [] if run.stream_state.state is None else run.stream_state.state.tensors()
        results.append((run, [*model.state_dict().values(), torch.get_rng_state(), *streams]))
    (plain, without), (noted, with_callback) = results
    names = ("loss", "grad_norm", "learning_rate")
    assert [[e[n] for n in names] for e in training_logs(plain)] == [
        [e[n] for n in names] for e in training_logs(noted)
    ]
    assert len(without) == len(with_callback) and all(map(torch.equal, without, with_callback))
    assert training_logs(noted)[-1].keys() >= ALL and ALL.isdisjoint(training_logs(plain)[-1])


def test_streams_are_read_on_from_where_they_are(tmp_path) -> None:
    """With weights that do not move, the second step is one stream with the first."""
    model = tiny_model(dtype=torch.float32)
    run = trainer(model, tmp_path, [RMTMemoryCallback()], rows=1, learning_rate=0.0, max_steps=3)
    run.train()
    first, _, third = training_logs(run)
    assert GATES.isdisjoint(first)  # two writes, which find an empty ring
    ids = tiny_ids(1, 9 * S)
    state = model.eval().memorize(ids[:, : 6 * S])
    layers = [layer.means() for layer in read_once_more(model.model, {"input_ids": ids[:, 6 * S :]}, state, 100)]
    for name in ALL:
        assert third[name] == pytest.approx(sum(layer[name] for layer in layers) / 2, rel=1e-5), name


def test_streams_that_are_looked_at_stay_where_they_are(tmp_path) -> None:
    model, callback = tiny_model(), RMTMemoryCallback(num_rows=1)
    streams = StreamState(model.memorize(tiny_ids(2, 6 * S)))
    before = streams.state.clone()
    callback.on_train_begin(RMTTrainingArguments(str(tmp_path), use_cpu=True), None, None, model=model)
    callback.keep({"input_ids": tiny_ids(2, 3 * S)}, streams)
    assert callback.measure().keys() == ALL
    assert streams.state.positions == before.positions
    assert all(map(torch.equal, streams.state.tensors(), before.tensors()))


@pytest.mark.parametrize("arguments", [{"logging_steps": 2}, {"logging_strategy": "epoch"}])
def test_only_what_is_logged_is_measured(arguments: dict, tmp_path, monkeypatch) -> None:
    measured = []
    monkeypatch.setattr("rmt_hf.training.monitoring.read_once_more", lambda *given: measured.append(given) or [])
    run = trainer(tiny_model(dtype=torch.float32), tmp_path, [RMTMemoryCallback()], **arguments)
    run.train()
    assert len(measured) == len(training_logs(run)) == (2 if "logging_steps" in arguments else 1)


def test_no_more_rows_and_segments_than_asked_for(tmp_path, monkeypatch) -> None:
    sizes, calls = [], []

    def spy(model, inputs, state, num_segments):
        sizes.append((*inputs["input_ids"].shape, len(state.positions), num_segments))
        return []

    monkeypatch.setattr("rmt_hf.training.monitoring.read_once_more", spy)
    callback = RMTMemoryCallback(num_rows=2, num_segments=5)
    trainer(tiny_model(dtype=torch.float32), tmp_path, [callback], rows=3, max_steps=2).train()
    assert sizes == [(2, 3 * S, 0, 5), (2, 3 * S, 2, 5)]
    model = tiny_model()
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    figures(model, 20 * S, num_segments=5)
    assert len(calls) == 1 + 5


def test_what_is_before_the_last_segments_is_read_in_one_call() -> None:
    model, reads = tiny_model(), {"memory_slot_use", "memory_read_age"}
    for layer, expected in zip(figures(model, 14 * S + 3, num_segments=2), figures(model, 14 * S + 3), strict=True):
        assert layer.keys() == expected.keys()
        for name, value in layer.items():
            assert (value == pytest.approx(expected[name])) == (name not in reads), name


def test_tensorboard_shows_it(tmp_path, monkeypatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    run = trainer(
        tiny_model(dtype=torch.float32), tmp_path, [RMTMemoryCallback()], report_to="tensorboard", logging_steps=2
    )
    run.train()
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    for name in ALL:
        shown = {event.step: event.value for event in events.Scalars(f"train/{name}")}
        assert shown == pytest.approx({e["step"]: e[name] for e in training_logs(run) if name in e}), name
        assert 4 in shown


# Warnings


def warnings_of(model, tmp_path, caplog, monkeypatch, **arguments) -> list[str]:
    monkeypatch.setattr(logging.getLogger("rmt_hf"), "propagate", True)
    with caplog.at_level(logging.WARNING, "rmt_hf.training.monitoring"):
        trainer(model.float(), tmp_path, [RMTMemoryCallback()], learning_rate=0.0, **arguments).train()
    return [record.getMessage() for record in caplog.records if record.name == "rmt_hf.training.monitoring"]


def alike():
    """A model that embeds all tokens alike: everything it keeps is the same."""
    model = tiny_model()
    model.model.embed_tokens.weight.data[:] = model.model.embed_tokens.weight.data[5].clone()
    return model


COLLAPSED = {
    "shut": (lambda: with_gate_bias(-20.0), ["memory_gate_shut"]),
    "open": (lambda: with_gate_bias(20.0), ["memory_gate_open"]),
    "alike": (alike, ["memory_key_similarity", "memory_value_similarity"]),
    "healthy": (tiny_model, []),
    "as it begins": (lambda: type(tiny_model())(tiny_config()), []),
}


@pytest.mark.parametrize("name", COLLAPSED)
def test_a_collapse_is_warned_about_once(name: str, tmp_path, caplog, monkeypatch) -> None:
    make, expected = COLLAPSED[name]
    found = warnings_of(make(), tmp_path, caplog, monkeypatch, max_steps=12)
    assert len(found) == len(expected)
    for message, figure in zip(found, expected, strict=True):
        values = re.match(rf"Memory has collapsed in the layers \[0, 1\]: {figure} is (\S+), (\S+)\. ", message)
        assert values and min(map(float, values.groups())) > 0.99
        assert "Begin again with a lower learning rate" in message or "else begin again" in message


def test_two_logs_are_no_collapse(tmp_path, caplog, monkeypatch) -> None:
    """The second step, which ends with the fifth write, is the first in which gates are seen."""
    assert warnings_of(with_gate_bias(20.0), tmp_path, caplog, monkeypatch, max_steps=3) == []
    assert len(warnings_of(with_gate_bias(20.0), tmp_path, caplog, monkeypatch, max_steps=4)) == 1


def test_only_logs_in_a_row_are_a_collapse(tmp_path, caplog, monkeypatch) -> None:
    monkeypatch.setattr(logging.getLogger("rmt_hf"), "propagate", True)
    callback, shares = RMTMemoryCallback(), [1.0, 1.0, 0.9, 1.0, 1.0, 1.0]

    def measured(*_) -> list[LayerMeans]:
        (layer := LayerMeans()).add("memory_gate_shut", torch.tensor([shares[number]]))
        return [layer]

    monkeypatch.setattr("rmt_hf.training.monitoring.read_once_more", measured)
    callback.on_train_begin(RMTTrainingArguments(str(tmp_path), use_cpu=True), None, None, model=tiny_model())
    for number in range(6):
        callback.on_step_begin(None, None, None)
        callback.keep({"input_ids": tiny_ids(1, S)}, StreamState())
        assert callback.measure() == {"memory_gate_shut": pytest.approx(shares[number])}
        assert len(caplog.records) == (number == 5)


# What is refused


def test_what_cannot_be_logged_is_refused_before_training(tmp_path) -> None:
    with pytest.raises(ValueError, match="logs through RMTTrainer, got a Trainer with TrainingArguments"):
        args = TrainingArguments(str(tmp_path), use_cpu=True)
        data = Dataset.from_dict({"input_ids": [[1]]})
        Trainer(tiny_model(), args, train_dataset=data, callbacks=[RMTMemoryCallback()]).train()
    with pytest.raises(ValueError, match="needs an RMT model with memory, got num_memory_slots=0"):
        trainer(tiny_model(num_memory_slots=0), tmp_path, [RMTMemoryCallback()]).train()
    for name in ("num_rows", "num_segments"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            RMTMemoryCallback(**{name: 0})
