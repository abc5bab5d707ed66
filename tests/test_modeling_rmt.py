"""The model is what the design page says: law 9 against the naive reference, Llama as a special case, every knob."""

import itertools
import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from reference import ReferenceModel, ReferenceStream
from rmt_hf import RMTCache, RMTForCausalLM, RMTModel, memory_rmt
from rmt_hf.attention_rmt import RMTAttention
from rmt_hf.memory_rmt import RMTMemory
from tiny import pad_left, read, tiny_config, tiny_ids, tiny_model


# The reference sums in another order. Logits here are below 50 and gradients below 1e4, so float64 agrees to 1e-10.
CLOSE = {"rtol": 1e-10, "atol": 1e-10}

VOCABULARY = 17


def random_model(seed: int = 0, **fields) -> RMTForCausalLM:
    """A model in float64 with segments of two chunks, all parameters random, and gates of every regime."""
    num_slots = fields.get("num_slots_per_chunk", 1)
    chunk = 4 if fields.get("memory_write") == "mean" else 3  # mean cuts a chunk in equal parts
    defaults = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "chunk_length": chunk,
        "segment_length": 2 * chunk,
        "num_memory_slots": 4 * num_slots,  # two blocks: the ring turns with every other segment
    }
    model = RMTForCausalLM(tiny_config(**{**defaults, **fields})).double()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=1.5 if name.endswith("gate_weight") else 0.5, generator=generator)
    return model


def ids_of(num_rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (num_rows, length), generator=torch.Generator().manual_seed(seed))


def read_reference(model, ids: torch.Tensor) -> tuple[torch.Tensor, ReferenceStream, dict[str, torch.Tensor]]:
    """Logits (T, V) of one row of ids (T,), the stream after it, and the leaves that gradients go to."""
    weights = {name: tensor.detach().clone().requires_grad_() for name, tensor in model.named_parameters()}
    stream = ReferenceStream(ReferenceModel(model.config, weights))
    return stream.read_all(ids.tolist()), stream, weights


def assert_same_memory(cache: RMTCache, row: int, stream: ReferenceStream) -> None:
    for index, layer in enumerate(cache.layers):
        for name, got, want in zip(
            ("keys", "values", "strengths"), layer.state.memory, stream.memory(index), strict=True
        ):
            torch.testing.assert_close(
                got[row], want, **CLOSE, msg=lambda text, name=name, index=index: f"layer {index}, {name}: {text}"
            )


def assert_true(model, ids: torch.Tensor, *many_cuts: tuple[int, ...]) -> None:
    """One row, read in one call and with each of the cuts: outputs, state and all gradients are the reference's."""
    expected, stream, weights = read_reference(model, ids[0])
    mixture = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    want = torch.autograd.grad((expected * mixture).sum(), list(weights.values()), materialize_grads=True)
    for cuts in ((), *many_cuts):
        logits, cache = read(model, ids, cuts)
        torch.testing.assert_close(logits[0], expected, **CLOSE)
        assert_same_memory(cache, 0, stream)
        got = torch.autograd.grad((logits[0] * mixture).sum(), list(model.parameters()), materialize_grads=True)
        for name, ours, theirs in zip(weights, got, want, strict=True):
            torch.testing.assert_close(ours, theirs, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


# Law 9, truth.

FUSIONS, WRITES, LOOKBACKS, SLOTS = ("gated", "softmax"), ("select", "mean"), (0, 1, 2), (1, 2)
GROUPS, CUTS = (1, 2, 4), ((5, 1, 1, 8, 1), (13, 2, 20, 3))


def grid_case(
    fusion: str, write: str, lookback: int, num_slots: int, groups: int, qk_norm: bool, bias: bool, sink: bool
) -> dict:
    fields = {"fusion_type": fusion, "memory_write": write, "num_lookback_segments": lookback}
    fields |= {"num_slots_per_chunk": num_slots, "num_key_value_heads": groups}
    return fields | {"use_qk_norm": qk_norm, "attention_bias": bias, "use_attention_sink": sink}


def covering_cases() -> list:
    """Every fusion with every write, lookback and number of slots; the other fields drawn for each."""
    draw = random.Random(0)
    cases = []
    for which in itertools.product(FUSIONS, WRITES, LOOKBACKS, SLOTS):
        fields = grid_case(*which, draw.choice(GROUPS), *(draw.random() < 0.5 for _ in range(3)))
        cases.append(pytest.param(fields, id="-".join(map(str, which))))
    return cases


@pytest.mark.parametrize("fields", covering_cases())
def test_outputs_state_and_gradients_are_those_of_the_reference(fields):
    assert_true(random_model(**fields), ids_of(1, 47), *CUTS)


@pytest.mark.slow
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("which", list(itertools.product(FUSIONS, WRITES, LOOKBACKS, SLOTS)), ids=str)
def test_the_whole_grid_is_the_reference(which, groups, qk_norm, bias, sink):
    assert_true(random_model(**grid_case(*which, groups, qk_norm, bias, sink)), ids_of(1, 53), *CUTS)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_memory_slots": 0},
        {"num_memory_slots": 0, "fusion_type": "softmax", "num_lookback_segments": 0},
        {"num_memory_slots": 0, "use_local_attention": False},
        {"use_local_attention": False},
        {"use_local_attention": False, "fusion_type": "softmax", "num_lookback_segments": 2},
        {"num_memory_slots": 0, "use_local_attention": False, "use_attention_sink": True},
        {"use_attention_sink": True, "segment_length": 3, "num_memory_slots": 2, "num_key_value_heads": 1},
        {"num_memory_slots": 2},  # one block: every segment meets the one before it
        {"num_memory_slots": 6, "num_lookback_segments": 0},
        {"num_slots_per_chunk": 3, "num_memory_slots": 6},  # every token becomes a slot
        {"segment_length": 3, "num_memory_slots": 2},  # a segment of one chunk
        {"chunk_length": 1, "segment_length": 4, "num_memory_slots": 4},  # local attention to the token itself
        {"mlp_bias": True, "tie_word_embeddings": True, "head_dim": 6, "rms_norm_eps": 0.1},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}, "num_hidden_layers": 3},
    ],
    ids=lambda fields: "-".join(f"{name}={value}" for name, value in fields.items()),
)
def test_other_shapes_are_the_reference_too(fields):
    assert_true(random_model(**fields), ids_of(1, 41), (7, 1, 1, 15))


@pytest.mark.parametrize("lookback", LOOKBACKS)
@pytest.mark.parametrize("length", [1, 2, 3, 5, 6, 7, 11, 12, 13, 17, 18, 19, 23, 24, 25])
def test_every_length_around_the_boundaries_is_the_reference(length, lookback):
    assert_true(random_model(num_lookback_segments=lookback), ids_of(1, length))


@pytest.mark.parametrize("write", WRITES)
def test_many_turns_of_the_ring_are_the_reference(write):
    assert_true(random_model(memory_write=write, num_lookback_segments=0), ids_of(1, 101), (50, 1))


@pytest.mark.parametrize("cuts", [(), (9, 1, 2)])
@pytest.mark.parametrize("fields", [{}, {"fusion_type": "softmax", "memory_write": "mean", "num_lookback_segments": 0}])
def test_a_padded_batch_is_the_reference_row_by_row(fields, cuts):
    model = random_model(**fields)
    batch = pad_left([ids_of(1, length, seed=length)[0] for length in (3, 31, 14)])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    logits, cache = read(model, ids, cuts, mask=mask)
    ours = torch.autograd.grad(logits[mask].square().sum(), list(model.parameters()))
    theirs = [torch.zeros_like(gradient) for gradient in ours]
    for row in range(3):
        expected, stream, weights = read_reference(model, ids[row, mask[row]])
        torch.testing.assert_close(logits[row, mask[row]], expected, **CLOSE)
        assert_same_memory(cache, row, stream)
        gradients = torch.autograd.grad(expected.square().sum(), list(weights.values()), materialize_grads=True)
        theirs = [total + gradient for total, gradient in zip(theirs, gradients, strict=True)]
    for name, got, want in zip(weights, ours, theirs, strict=True):
        torch.testing.assert_close(got, want, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("write", WRITES)
def test_the_gates_of_these_models_take_every_regime(write, monkeypatch):
    gates, stretched_sigmoid = [], memory_rmt.stretched_sigmoid

    def record(logits: torch.Tensor) -> torch.Tensor:
        gates.append(stretched_sigmoid(logits))
        return gates[-1]

    monkeypatch.setattr(memory_rmt, "stretched_sigmoid", record)
    read(random_model(memory_write=write), ids_of(1, 47))
    gates = torch.cat([gate.flatten() for gate in gates])
    for regime in (gates == 0, gates == 1, (gates > 0) & (gates < 0.5), (gates < 1) & (gates > 0.5)):
        assert regime.double().mean() > 0.05


# What the design page says of special cases.


def twin(model, **fields) -> RMTForCausalLM:
    """A model of another configuration with the same weights, as far as it has them."""
    config = model.config.to_dict() | fields
    other = RMTForCausalLM(type(model.config)(**config)).double().eval()
    other.load_state_dict(model.state_dict(), strict=False)
    return other


def close_the_gates(model):
    for module in model.modules():
        if isinstance(module, RMTAttention):
            module.fusion.scale.data.zero_()
    return model


def test_with_both_scales_zero_it_is_sliding_window_attention():
    model, ids = close_the_gates(random_model()), ids_of(2, 47)
    only_window = twin(model, num_memory_slots=0, use_local_attention=False)
    torch.testing.assert_close(model(ids).logits, only_window(ids).logits, **CLOSE)
    assert (model(ids).logits - random_model()(ids).logits).abs().max() > 0.1


def test_with_both_scales_zero_and_inside_the_window_it_is_llama():
    model, ids = close_the_gates(tiny_model(tie_word_embeddings=False)), tiny_ids(2, 16)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rope_parameters", "rms_norm_eps")
    names += ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act")
    llama = LlamaForCausalLM(LlamaConfig(**{name: getattr(model.config, name) for name in names})).double().eval()
    own = model.state_dict()
    llama.load_state_dict({name: own[name] for name in llama.state_dict()})
    # Llama has its rotary tables in float32, which is 1e-7 of values up to 10.
    torch.testing.assert_close(model(ids).logits, llama(ids).logits, rtol=0, atol=1e-5)
    more = tiny_ids(2, 17)
    assert (model(more).logits - llama(more).logits)[:, -1].abs().max() > 1e-3  # the window has moved on


# Every knob turns something.


@pytest.mark.parametrize(
    "fields", [{"fusion_type": fusion, "memory_write": write} for fusion in FUSIONS for write in WRITES]
)
def test_every_parameter_is_trained(fields):
    model = random_model(**fields, attention_bias=True, mlp_bias=True, use_qk_norm=True, num_lookback_segments=0)
    read(model, ids_of(2, 47))[0].square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 1e-6, name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("chunk_length", 1),
        ("segment_length", 3),
        ("num_lookback_segments", 0),
        ("num_lookback_segments", 2),
        ("num_memory_slots", 8),
        ("num_slots_per_chunk", 2),
        ("memory_write", "mean"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 100.0}),
        ("rope_parameters", {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}),
        ("rms_norm_eps", 1e-2),
        ("hidden_act", "gelu"),
    ],
)
def test_every_field_changes_the_output(name, value):
    # The ring fits all of these, and no weight is of another shape, so that only the field can make the difference.
    model, ids = random_model(num_memory_slots=4), ids_of(1, 47)
    fields = {name: value} | ({"num_memory_slots": 12} if name == "chunk_length" else {})
    with torch.no_grad():
        change = (twin(model, **fields)(ids).logits - twin(model)(ids).logits).abs()
    assert change.max() > 1e-3


@pytest.mark.parametrize(
    ("field", "parameters"),
    [
        ("attention_bias", ("q_proj.bias", "k_proj.bias", "v_proj.bias", "o_proj.bias", "memory_q_proj.bias")),
        ("mlp_bias", ("gate_proj.bias", "up_proj.bias", "down_proj.bias")),
        ("use_attention_sink", ("sink.key", "sink.value")),
        ("use_qk_norm", ("q_norm.weight", "k_norm.weight", "memory_q_norm.weight")),
    ],
)
def test_fields_that_add_parameters(field, parameters):
    names = [set(dict(random_model(**{field: value}).model.layers[0].named_parameters())) for value in (False, True)]
    assert sorted(name.split(".", 1)[1] for name in names[1] - names[0]) == sorted(parameters)


def test_paths_that_do_not_exist_have_no_parameters():
    layer = random_model(num_memory_slots=0, use_local_attention=False).model.layers[0].self_attn
    assert {name.split(".")[0] for name, _ in layer.named_parameters()} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    for fields, num_paths in (({"num_memory_slots": 0}, 1), ({"use_local_attention": False}, 1), ({}, 2)):
        assert random_model(**fields).model.layers[0].self_attn.fusion.scale.shape == (4, num_paths)
        softmax = random_model(**fields, fusion_type="softmax").model.layers[0].self_attn.fusion
        assert softmax.logits.shape == (1 + num_paths,)
        assert not hasattr(softmax, "scale")


def test_dropout_is_for_training_only():
    model, ids = tiny_model(attention_dropout=0.5), tiny_ids(1, 40)
    expected = tiny_model()(ids).logits
    assert torch.equal(model(ids).logits, expected)
    torch.manual_seed(0)
    first, second = (model.train()(ids).logits for _ in range(2))
    assert (first - second).abs().max() > 1e-3
    assert (first - expected).abs().max() > 1e-3


# Initial values, and nothing that was not written.


@pytest.fixture
def poisoned():
    """Fills what `torch.empty` gives with NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("write", WRITES)
def test_nothing_uninitialised_is_used(fusion, write, poisoned):
    config = tiny_config(fusion_type=fusion, memory_write=write, use_qk_norm=True, attention_bias=True, mlp_bias=True)
    model, batch = RMTForCausalLM(config), pad_left([tiny_ids(1, n)[0] for n in (1, 3, 51)])
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    logits, cache = read(model, batch["input_ids"], mask=batch["attention_mask"])
    more = [model(tiny_ids(3, size), past_key_values=cache).logits for size in (1, 2, 20)]
    torch.cat([logits, *more], 1).square().sum().backward()
    assert all(tensor.isfinite().all() for tensor in (logits, *more))
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    for layer in cache.layers:
        assert not any(tensor.isnan().any() for tensor in layer.state.tensors())


@pytest.mark.parametrize("fusion", FUSIONS)
def test_initial_values_are_those_of_the_table(fusion):
    torch.manual_seed(0)
    std = 0.07
    model = RMTModel(tiny_config(fusion_type=fusion, initializer_range=std, use_qk_norm=True, attention_bias=True))
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", "fusion.scale")):
            assert (parameter == 1).all(), name
        elif name.endswith("memory.gate_bias"):
            assert (parameter == -1).all(), name
        elif name.endswith("fusion.gate.bias"):
            assert parameter.tolist() == 4 * [0, -2], name  # of each head: local path, memory
        elif name.endswith((".bias", "gate_weight", "fusion.logits")):
            assert (parameter == 0).all(), name
        else:
            # The standard deviation of n samples is off by 0.7 / sqrt(n) of it: four times that is hardly ever met.
            assert parameter.std().item() == pytest.approx(std, rel=2.8 * parameter.numel() ** -0.5), name
            assert parameter.mean().item() == pytest.approx(0, abs=4 * std * parameter.numel() ** -0.5), name
    assert sum(isinstance(module, RMTMemory) for module in model.modules()) == 2
