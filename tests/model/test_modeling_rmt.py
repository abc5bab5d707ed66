"""The model is what the design page says: law 9 against the naive reference, Llama as a special case, every knob."""

import itertools
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from helpers import FORMS, pad_left, read, tiny_config, tiny_ids, tiny_model
from reference import ReferenceModel, ReferenceStream
from rmt_hf import RMTCache, RMTForCausalLM, RMTModel, memory_rmt
from rmt_hf.layout_rmt import CallLayout
from rmt_hf.memory_rmt import RMTMemory
from rmt_hf.modeling_rmt import FADE, GATE_BIAS, GATE_SCALE


# The reference sums in another order. Logits here are below 50 and gradients below 1e4, so float64 agrees to 1e-10.
CLOSE = {"rtol": 1e-10, "atol": 1e-10}

VOCABULARY = 17

# How memory is written, and what is then kept; slots for rings of two groups.
MEMORIES = {
    "two parts": {"num_lasting_slots": 4, "lasting_distance": 5},
    "present": {"num_lasting_slots": 0},
    "lasting": {"num_lasting_slots": 8, "lasting_distance": 3},
    "mean": {"memory_write": "mean"},
    "paper": {"memory_write": "mean", "fusion_type": "softmax"},
}


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
        "num_memory_slots": 4 * num_slots,  # two groups: the ring turns with every other segment
        "num_observing_tokens": 4,
    }
    model = RMTForCausalLM(tiny_config(**{**defaults, **fields})).double()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=1.0 if name.endswith("gate_weight") else 0.5, generator=generator)
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
        memory = layer.state.memory
        for name, got, want in zip(memory._fields, memory, stream.memory(index), strict=True):
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

LOOKBACKS, SLOTS, GROUPS, OBSERVING, CUTS = (0, 1, 2), (1, 2), (1, 2, 4), (1, 4, 6), ((5, 1, 1, 8, 1), (13, 2, 20))


def grid_case(
    memory: str, lookback: int, num_slots: int, groups: int, sink: bool, qk_norm: bool, bias: bool, observing: int
) -> dict:
    fields = MEMORIES[memory] | {"num_lookback_segments": lookback, "num_slots_per_chunk": num_slots}
    fields |= {"num_key_value_heads": groups, "use_attention_sink": sink, "use_qk_norm": qk_norm}
    fields |= {"attention_bias": bias, "num_observing_tokens": observing, "num_memory_slots": 4 * num_slots}
    if "num_lasting_slots" in fields:  # both parts have the share that they have of eight slots
        fields["num_lasting_slots"] = fields["num_lasting_slots"] * num_slots // 2
    return fields


def covering_cases() -> list:
    """Every memory with every lookback and number of slots; the other fields take turns, the sink at either value."""
    cases = []
    for number, which in enumerate(itertools.product(MEMORIES, LOOKBACKS, SLOTS)):
        sink = (which[1] + which[2]) % 2 == 1
        others = (GROUPS[number % 5 % 3], sink, number % 4 < 2, number % 3 == 0, OBSERVING[number % 7 % 3])
        cases.append(pytest.param(grid_case(*which, *others), id="-".join(map(str, which))))
    return cases


@pytest.mark.parametrize("fields", covering_cases())
def test_outputs_state_and_gradients_are_those_of_the_reference(fields):
    assert_true(random_model(**fields), ids_of(1, 40), *CUTS)


@pytest.mark.slow
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize(("qk_norm", "bias"), [(False, True), (True, False)])
@pytest.mark.parametrize(("groups", "observing"), list(zip(GROUPS, OBSERVING, strict=True)))
@pytest.mark.parametrize("which", list(itertools.product(MEMORIES, LOOKBACKS, SLOTS)), ids=str)
def test_the_whole_grid_is_the_reference(which, groups, observing, qk_norm, bias, sink):
    assert_true(random_model(**grid_case(*which, groups, sink, qk_norm, bias, observing)), ids_of(1, 53), *CUTS)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_memory_slots": 0},
        {"num_memory_slots": 0, "fusion_type": "softmax", "num_lookback_segments": 0},
        {"num_memory_slots": 0, "use_local_attention": False},
        {"use_local_attention": False},
        {"use_local_attention": False, "fusion_type": "softmax", "num_lookback_segments": 2},
        {"num_memory_slots": 0, "use_local_attention": False, "use_attention_sink": True},
        {"num_memory_slots": 0, "use_attention_sink": True, "fusion_type": "softmax", "num_lookback_segments": 0},
        {"fusion_type": "softmax", "num_memory_slots": 6, "num_lasting_slots": 2, "use_attention_sink": True},
        {"use_attention_sink": True, "segment_length": 3, "num_observing_tokens": 3, "num_memory_slots": 2},
        {"num_memory_slots": 2},  # one group: every segment meets the one before it
        {"num_memory_slots": 6, "num_lookback_segments": 0},
        {"num_memory_slots": 8, "num_lasting_slots": 2, "use_attention_sink": True},  # one group and three
        {"num_slots_per_chunk": 3, "num_memory_slots": 6},  # every token becomes a slot
        {"num_slots_per_chunk": 3, "num_memory_slots": 12, "num_lasting_slots": 6, "use_attention_sink": True},
        {"segment_length": 3, "num_observing_tokens": 2, "num_memory_slots": 2},  # a segment of one chunk
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
    model = random_model(num_lookback_segments=lookback, num_lasting_slots=2, use_attention_sink=True)
    assert_true(model, ids_of(1, length))


@pytest.mark.parametrize("memory", ["lasting", "two parts", "mean"])
def test_many_turns_of_the_ring_are_the_reference(memory):
    fields = {"num_memory_slots": 8} | MEMORIES[memory]
    assert_true(random_model(num_lookback_segments=0, **fields), ids_of(1, 101), (50, 1))


@pytest.mark.parametrize("cuts", [(), (9, 1, 2)])
@pytest.mark.parametrize("memory", ["lasting", "two parts", "paper"])
def test_a_padded_batch_is_the_reference_row_by_row(memory, cuts):
    """Pads on the left of ragged rows, on the right, and between."""
    fields = {"num_memory_slots": 8, "use_attention_sink": memory == "two parts"} | MEMORIES[memory]
    model = random_model(**fields, num_lookback_segments=0 if memory == "paper" else 1)
    batch = pad_left([ids_of(1, length, seed=length)[0] for length in (3, 33, 14)])
    ids = torch.cat([batch["input_ids"], ids_of(2, 33, seed=1)])
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 33, dtype=torch.bool)])
    mask[3, 25:] = False
    mask[4, [0, 5, 6, 7, 12, 20, 21, 30]] = False
    logits, cache = read(model, ids, cuts, mask=mask)
    ours = torch.autograd.grad(logits[mask].square().sum(), list(model.parameters()))
    theirs = [torch.zeros_like(gradient) for gradient in ours]
    for row in range(len(ids)):
        expected, stream, weights = read_reference(model, ids[row, mask[row]])
        torch.testing.assert_close(logits[row, mask[row]], expected, **CLOSE)
        assert_same_memory(cache, row, stream)
        gradients = torch.autograd.grad(expected.square().sum(), list(weights.values()), materialize_grads=True)
        theirs = [total + gradient for total, gradient in zip(theirs, gradients, strict=True)]
    for name, got, want in zip(weights, ours, theirs, strict=True):
        torch.testing.assert_close(got, want, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("memory", ["lasting", "two parts", "mean"])
def test_packed_documents_are_the_reference_each_from_its_beginning(memory):
    """Two rows of two and three documents, each padded to whole segments; the state is that of the last."""
    fields = {"num_memory_slots": 8, "use_attention_sink": memory == "two parts"} | MEMORIES[memory]
    model = random_model(**fields)
    segment = model.config.segment_length
    lengths = [[2 * segment + 3, 4 * segment + 1], [segment, 3, 5 * segment - 2]]
    ids, mask = ids_of(2, 8 * segment), torch.zeros(2, 8 * segment, dtype=torch.bool)
    positions, documents = torch.zeros_like(ids), []
    for row, row_lengths in enumerate(lengths):
        start = 0
        for length in row_lengths:
            columns = slice(start, start + length)
            mask[row, columns], positions[row, columns] = True, torch.arange(length)
            documents.append((row, columns))
            start += -(-length // segment) * segment
    outputs = model(ids, attention_mask=mask, position_ids=positions, use_cache=True)
    ours = torch.autograd.grad(outputs.logits[mask].square().sum(), list(model.parameters()))
    theirs = [torch.zeros_like(gradient) for gradient in ours]
    for row, columns in documents:
        expected, stream, weights = read_reference(model, ids[row, columns])
        torch.testing.assert_close(outputs.logits[row, columns], expected, **CLOSE)
        gradients = torch.autograd.grad(expected.square().sum(), list(weights.values()), materialize_grads=True)
        theirs = [total + gradient for total, gradient in zip(theirs, gradients, strict=True)]
        if (row, columns) in (documents[1], documents[-1]):
            assert_same_memory(outputs.past_key_values, row, stream)
    for name, got, want in zip(weights, ours, theirs, strict=True):
        torch.testing.assert_close(got, want, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("memory", ["lasting", "two parts", "mean"])
def test_the_gates_of_these_models_take_every_regime(memory, monkeypatch):
    gates, stretched_sigmoid = [], memory_rmt.stretched_sigmoid

    def record(logits: torch.Tensor) -> torch.Tensor:
        gates.append(stretched_sigmoid(logits))
        return gates[-1]

    monkeypatch.setattr(memory_rmt, "stretched_sigmoid", record)
    for seed in range(4):
        read(random_model(seed, **{"num_memory_slots": 8} | MEMORIES[memory]), ids_of(1, 101))
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


def norm(weight: torch.Tensor, eps: float, states: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(states, weight.shape, weight, eps)


def llama_of(model) -> LlamaForCausalLM:
    """A Llama with the same weights, and the model's rotary tables and norms in place of its own in float32."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rope_parameters", "rms_norm_eps")
    names += ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "tie_word_embeddings")
    llama = LlamaForCausalLM(LlamaConfig(**{name: getattr(model.config, name) for name in names})).double().eval()
    own = model.state_dict()
    llama.load_state_dict({name: own[name] for name in llama.state_dict()})
    sign = torch.ones(model.config.head_dim, dtype=torch.float64)
    sign[: model.config.head_dim // 2] = -1  # which the model's tables have in them

    def rotary(states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = model.model.rotary_emb(position_ids, torch.float64)
        return cos[:, :, 0], sign * sin[:, :, 0]

    llama.model.rotary_emb.forward = rotary
    for module in llama.modules():
        if isinstance(module, LlamaRMSNorm):
            module.forward = partial(norm, module.weight, module.variance_epsilon)
    return llama


def test_with_the_local_scale_zero_there_is_no_local_path():
    model, ids = random_model(), ids_of(2, 47)
    for layer in model.model.layers:
        layer.self_attn.fusion.scale.data.zero_()
    torch.testing.assert_close(model(ids).logits, twin(model, use_local_attention=False)(ids).logits, **CLOSE)
    assert (model(ids).logits - random_model()(ids).logits).abs().max() > 0.1


@pytest.mark.parametrize("fields", [{}, {"num_lasting_slots": 4, "use_attention_sink": True}])
def test_inside_the_window_it_is_llama(fields):
    model, ids = tiny_model(use_local_attention=False, **fields), tiny_ids(2, 16)
    llama = llama_of(model)
    torch.testing.assert_close(model(ids).logits, llama(ids).logits, **CLOSE)
    more = tiny_ids(2, 17)
    assert (model(more).logits - llama(more).logits)[:, -1].abs().max() > 1e-3  # the window has moved on


@pytest.mark.parametrize("lookback", LOOKBACKS)
def test_without_memory_it_is_llama_that_sees_the_window(lookback):
    model = tiny_model(use_local_attention=False, num_memory_slots=0, num_lookback_segments=lookback)
    ids, positions = tiny_ids(2, 45), torch.arange(45)
    first = (positions // 8 - lookback).clamp_min(0) * 8
    seen = (positions <= positions[:, None]) & (positions >= first[:, None])
    mask = torch.zeros(2, 1, 45, 45, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)
    torch.testing.assert_close(model(ids).logits, llama_of(model)(ids, attention_mask=mask).logits, **CLOSE)


# Every knob turns something.


@pytest.mark.parametrize("memory", MEMORIES)
def test_every_parameter_is_trained(memory):
    fields = {"num_memory_slots": 8, "num_lookback_segments": 0, "use_attention_sink": True} | MEMORIES[memory]
    model = random_model(**fields, attention_bias=True, mlp_bias=True, use_qk_norm=True)
    read(model, ids_of(2, 47))[0].square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 1e-6, name


KNOBS = [
    ("chunk_length", 1),
    ("segment_length", 9),
    ("num_lookback_segments", 0),
    ("num_lookback_segments", 2),
    ("num_memory_slots", 8),
    ("num_lasting_slots", 0),
    ("num_lasting_slots", 2),
    ("lasting_distance", 5),
    ("num_observing_tokens", 1),
    ("num_observing_tokens", 6),
    ("num_slots_per_chunk", 2),
    ("memory_write", "mean"),
    ("use_attention_sink", True),
    ("rope_parameters", {"rope_type": "default", "rope_theta": 100.0}),
    ("rope_parameters", {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}),
    ("rms_norm_eps", 1e-2),
    ("hidden_act", "gelu"),
]


@pytest.mark.parametrize(("name", "value"), KNOBS)
def test_every_field_changes_the_output(name, value):
    # The ring fits all of these, and no weight is of another shape, so that only the field can make the difference.
    base = {"num_lasting_slots": 0} if name == "num_observing_tokens" else {}
    model, ids = random_model(num_memory_slots=4, **base), ids_of(1, 47)
    slots = {"chunk_length": {"num_memory_slots": 12}, "segment_length": {"num_memory_slots": 6}}.get(name, {})
    with torch.no_grad():
        change = (twin(model, **{name: value} | slots)(ids).logits - twin(model)(ids).logits).abs()
    assert change.max() > 1e-3


def test_all_shares_of_the_lasting_part_differ():
    model, ids = random_model(num_memory_slots=8), ids_of(1, 47)
    with torch.no_grad():
        found = [twin(model, num_lasting_slots=number)(ids).logits for number in (0, 2, 4, 6, 8)]
        assert torch.equal(twin(model, num_lasting_slots=None)(ids).logits, found[-1])  # all
    assert all((one - other).abs().max() > 1e-3 for one, other in itertools.combinations(found, 2))


def test_a_distance_without_lasting_slots_is_none():
    model, ids = random_model(num_memory_slots=8, num_lasting_slots=0, use_attention_sink=True), ids_of(1, 47)
    with torch.no_grad():
        assert torch.equal(twin(model, lasting_distance=5)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("memory", ["lasting", "present", "two parts"])
@pytest.mark.parametrize("name", ["fade", "gate_scale", "gate_bias", "gate_weight"])
def test_every_number_of_a_gate_changes_the_output(name, memory):
    model, ids = random_model(**{"num_memory_slots": 8} | MEMORIES[memory]), ids_of(1, 101)  # many gates are 0 or 1
    rings = [ring for layer in model.model.layers for ring in layer.self_attn.memory.rings]
    with torch.no_grad():
        before = model(ids).logits
        for ring in rings:
            if name == "fade" and not ring.uses_evidence:  # what lasts does not fade
                assert ring.fade is None
                continue
            getattr(ring, name).add_(0.5)
            assert (model(ids).logits - before).abs().max() > 1e-5  # some are weak, none is inert
            getattr(ring, name).sub_(0.5)


@pytest.mark.parametrize("memory", MEMORIES)
def test_values_are_scaled_where_a_score_is_used(memory, monkeypatch):
    model, ids = random_model(**{"num_memory_slots": 8} | MEMORIES[memory]), ids_of(1, 47)
    before = model(ids).logits
    monkeypatch.setattr(memory_rmt, "VALUE_SHIFT", 1e3)  # a factor of one
    change = (model(ids).logits - before).abs().max()
    assert change > 1e-3 if memory in ("two parts", "lasting") else change == 0


@pytest.mark.parametrize(
    "rope_parameters",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
        {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 64},
    ],
    ids=lambda parameters: parameters["rope_type"],
)
def test_max_position_embeddings_limits_nothing(rope_parameters):
    models = [
        tiny_model(rope_parameters=dict(rope_parameters), **limit) for limit in ({}, {"max_position_embeddings": 4})
    ]
    ids, prompt = tiny_ids(2, 60), tiny_ids(1, 30)
    assert models[1].config.max_position_embeddings == 4 < models[0].config.max_position_embeddings == 2**30
    assert torch.equal(*(model(ids).logits for model in models))
    generated = [model.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None) for model in models]
    assert torch.equal(*generated) and generated[0].shape == (1, 50)


def names_of(**fields) -> set[str]:
    """Names of the parameters of a layer, without those that every layer has."""
    names = {name for name, _ in random_model(**fields).model.layers[0].named_parameters()}
    always = {f"self_attn.{kind}_proj.weight" for kind in "qkvo"}
    always |= {f"mlp.{kind}_proj.weight" for kind in ("gate", "up", "down")}
    always |= {"input_layernorm.weight", "post_attention_layernorm.weight"}
    assert names >= always
    return {name.removeprefix("self_attn.") for name in names - always}


RING = {f"memory.rings.0.{name}" for name in ("gate_weight", "gate_scale", "gate_bias")}
LOCAL = {"fusion.gate.weight", "fusion.gate.bias", "fusion.scale"}
SCORE = {"memory.score_proj.weight", "memory.score_proj.bias"}
SINK = {"sink.key", "sink.value"}


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"num_memory_slots": 0, "use_local_attention": False}, set()),
        ({"num_memory_slots": 0, "use_local_attention": False, "fusion_type": "softmax"}, set()),
        ({"num_memory_slots": 0, "use_local_attention": False, "use_attention_sink": True}, SINK),
        ({"num_memory_slots": 0}, LOCAL),
        ({"num_memory_slots": 0, "fusion_type": "softmax"}, {"fusion.logits"}),
        ({}, LOCAL | RING | SCORE),
        ({"use_local_attention": False, "num_lasting_slots": 0}, RING | {"memory.rings.0.fade"}),
        ({"use_local_attention": False, "num_lasting_slots": 4}, RING | SCORE),
        (
            {"use_local_attention": False, "num_lasting_slots": 2},
            RING | SCORE | {name.replace("0", "1") for name in RING} | {"memory.rings.1.fade"},
        ),
        ({"memory_write": "mean", "fusion_type": "softmax"}, RING - {"memory.rings.0.gate_scale"} | {"fusion.logits"}),
        (
            {"num_memory_slots": 0, "use_local_attention": False, "attention_bias": True},
            {f"{kind}_proj.bias" for kind in "qkvo"},
        ),
        (
            {"num_memory_slots": 0, "use_local_attention": False, "mlp_bias": True},
            {f"mlp.{kind}_proj.bias" for kind in ("gate", "up", "down")},
        ),
        (
            {"num_memory_slots": 0, "use_local_attention": False, "use_qk_norm": True},
            {"q_norm.weight", "k_norm.weight"},
        ),
    ],
)
def test_parameters_of_a_layer(fields, names):
    assert names_of(**fields) == names


def test_shapes_of_the_parameters_of_memory_and_fusion():
    attention = random_model(num_lasting_slots=2, use_attention_sink=True).model.layers[0].self_attn
    shapes = {name: tuple(parameter.shape) for name, parameter in attention.named_parameters() if "proj" not in name}
    ring = {"gate_weight": (2, 16), "gate_scale": (2,), "gate_bias": (2,)}  # 2 heads of width 4
    expected = {f"memory.rings.{part}.{name}": shape for part in (0, 1) for name, shape in ring.items()}
    expected["memory.rings.1.fade"] = (2,)
    expected |= {"sink.key": (2, 4), "sink.value": (2, 4)}
    expected |= {"fusion.gate.weight": (4, 16), "fusion.gate.bias": (4,), "fusion.scale": (4,)}
    assert shapes == expected
    assert attention.memory.score_proj.weight.shape == (2, 16)
    for fields, number in (({}, 3), ({"use_local_attention": False}, 2), ({"num_memory_slots": 0}, 2)):
        softmax = random_model(**fields, fusion_type="softmax").model.layers[0].self_attn.fusion
        assert softmax.logits.shape == (number,)


def test_dropout_is_for_training_only():
    model, ids = tiny_model(attention_dropout=0.5), tiny_ids(1, 40)
    expected = tiny_model()(ids).logits
    assert torch.equal(model(ids).logits, expected)
    torch.manual_seed(0)
    first, second = (model.train()(ids).logits for _ in range(2))
    assert (first - second).abs().max() > 1e-3
    assert (first - expected).abs().max() > 1e-3


# What tools want of a model: every parameter in every graph, plain linear maps, nothing that is moved by mistake.


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("length", [1, 3, 8, 16, 17, 40])
def test_every_parameter_is_in_the_graph_of_rows_of_any_length(length, with_state, form):
    model = tiny_model(**FORMS[form]).train()
    state = RMTCache(model.config) if with_state else None
    for _ in range(2 if with_state else 1):
        logits = model(tiny_ids(2, length), past_key_values=state, use_cache=False).logits
        gradients = torch.autograd.grad(logits.sum(), list(model.parameters()), retain_graph=True, allow_unused=True)
        for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True):
            assert gradient is not None and gradient.isfinite().all(), name


@pytest.mark.parametrize("form", [form for form in FORMS if form != "no memory"])
@pytest.mark.parametrize("length", [2, 8, 17, 40])
@pytest.mark.parametrize("own", ["memory", "sink"])
def test_a_frozen_model_with_its_memory_to_train_has_a_loss_to_train(own, length, form):
    model, ids = tiny_model(**FORMS[form] | {"use_attention_sink": True}).train(), tiny_ids(2, length)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f".{own}." in name)
    for keep_state in (False, True):
        loss = model(ids, labels=ids, use_cache=keep_state).loss
        assert loss.requires_grad
        loss.backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
        model.zero_grad()


def test_no_object_that_layers_are_given_can_be_moved_but_tensors_and_the_plan():
    """accelerate calls `to` on whatever has it, and looks into tuples, lists and dicts for more."""
    model, cache, seen = tiny_model(**FORMS["two parts"]), RMTCache(tiny_config(**FORMS["two parts"])), []

    def look(given: object) -> None:
        inside = given.values() if isinstance(given, dict) else given if isinstance(given, tuple | list) else ()
        seen.append(type(given).__name__)
        assert isinstance(given, torch.Tensor | CallLayout) or not hasattr(given, "to"), type(given)
        for each in inside:
            look(each)

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        look(args)
        look(kwargs)

    for module in model.model.layers.modules():
        module.register_forward_pre_hook(hook, with_kwargs=True)
    for size in (3, 14, 30, 1):
        model(tiny_ids(2, size), past_key_values=cache)
    assert {"CallLayout", "Tables", "LayerState", "Slots", "Tensor"} <= {*seen}
    assert not any(hasattr(given, "to") for given in cache.layers)  # of the state itself: tests/tools/test_devices.py


@pytest.mark.parametrize("form", FORMS)
def test_every_linear_map_is_plain(form):
    model = tiny_model(**FORMS[form])
    kinds = {type(module) for module in model.modules() if isinstance(module, nn.Linear)}
    assert kinds == {nn.Linear}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_lookback_segments", -1, "num_lookback_segments must be at least 0, got -1"),
        ("memory_write", "pool", "memory_write must be one of select, mean, got 'pool'"),
        ("num_observing_tokens", 9, r"num_observing_tokens must be at most segment_length \(8\), got 9"),
        ("num_memory_slots", 7, r"num_memory_slots \(7\) must be a multiple of"),
    ],
)
@pytest.mark.parametrize("model_class", [RMTModel, RMTForCausalLM])
def test_a_configuration_is_checked_again_when_a_model_is_made(model_class, name, value, message):
    config = tiny_config()
    setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        model_class(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            r"rope_parameters\[\"rope_type\"\] must be one of default, linear, llama3, got 'yarn'",
        ),
        ({"num_lookback_segments": -1}, "num_lookback_segments must be at least 0, got -1"),
    ],
)
def test_fields_that_are_overridden_when_a_model_is_loaded_are_checked(fields, message, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        RMTForCausalLM.from_pretrained(tmp_path, **fields)
    loaded = RMTForCausalLM.from_pretrained(tmp_path, num_lookback_segments=2)
    assert loaded.config.num_lookback_segments == 2
    assert AutoConfig.from_pretrained(tmp_path).num_lookback_segments == 1


@pytest.mark.parametrize(("form", "length"), [("gated select", 12), ("two parts", 45)])
@torch.no_grad()
def test_a_plain_call_can_be_exported(form, length):
    """Inside the window, and beyond it; other tokens than those it was exported with."""
    model = tiny_model(**FORMS[form])
    program = torch.export.export(model, (tiny_ids(2, length),), {"use_cache": False}).module()
    for seed in (0, 1):
        ids = tiny_ids(2, length, seed=seed)
        torch.testing.assert_close(program(ids, use_cache=False).logits, model(ids).logits, **CLOSE)


# Initial values, and nothing that was not written.


@pytest.fixture
def poisoned():
    """Fills what `torch.empty` gives with NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_uninitialised_is_used(form, poisoned):
    model = RMTForCausalLM(tiny_config(**FORMS[form], attention_bias=True, mlp_bias=True))
    batch = pad_left([tiny_ids(1, n)[0] for n in (1, 3, 51)])
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    logits, cache = read(model, batch["input_ids"], mask=batch["attention_mask"])
    more = [model(tiny_ids(3, size), past_key_values=cache).logits for size in (1, 2, 20)]
    torch.cat([logits, *more], 1).square().sum().backward()
    assert all(tensor.isfinite().all() for tensor in (logits, *more))
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    for layer in cache.layers:
        assert not any(tensor.isnan().any() for tensor in layer.state.tensors())


@pytest.mark.parametrize("memory", MEMORIES)
def test_initial_values_are_those_of_the_table(memory):
    torch.manual_seed(0)
    std, fields = 0.07, {"use_qk_norm": True, "attention_bias": True, "use_attention_sink": True} | MEMORIES[memory]
    model = RMTModel(tiny_config(initializer_range=std, **fields))
    constants = {"gate_scale": GATE_SCALE, "gate_bias": GATE_BIAS, "fade": FADE}
    constants |= {"gate_weight": 0.0}
    for name, parameter in model.named_parameters():
        last = name.split(".")[-1]
        if ".rings." in name:
            assert (parameter == torch.tensor(constants[last])).all(), name
        elif name.endswith(("norm.weight", "fusion.scale")):
            assert (parameter == 1).all(), name
        elif name.endswith((".bias", "fusion.logits", "sink.value")):
            assert (parameter == 0).all(), name
        else:
            # The standard deviation of n samples is off by 0.7 / sqrt(n) of it: four times that is hardly ever met.
            assert parameter.std().item() == pytest.approx(std, rel=2.8 * parameter.numel() ** -0.5), name
            assert parameter.mean().item() == pytest.approx(0, abs=4 * std * parameter.numel() ** -0.5), name
    assert sum(isinstance(module, RMTMemory) for module in model.modules()) == 2
