"""Baselines have our size, train, and carry what `state_bytes` says; a window is as long as it claims to be."""

import pytest
import torch
from transformers import DynamicCache

from experiments.baselines import BASELINES, build_baseline, new_state, num_parameters, read, state_bytes, state_tensors
from helpers import tiny_config, tiny_ids
from rmt_hf import RMTCache, RMTConfig, RMTForCausalLM


SMALL = {
    "vocab_size": 67,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LARGE = {
    "vocab_size": 8192,
    "hidden_size": 320,
    "intermediate_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 5,
}
WINDOW = 16  # of tiny_config


def baseline(name: str, seed: int = 0, **overrides) -> torch.nn.Module:
    """A baseline of the tiny model in eval mode."""
    torch.manual_seed(seed)
    return build_baseline(name, tiny_config(intermediate_size=96, **overrides)).eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fields", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("name", BASELINES)
def test_equal_size(name: str, fields: dict, tied: bool) -> None:
    config = RMTConfig(**fields, tie_word_embeddings=tied)
    with torch.device("meta"):
        ours, theirs = RMTForCausalLM(config), build_baseline(name, config)
    assert abs(num_parameters(theirs).non_embedding / num_parameters(ours).non_embedding - 1) <= 0.02
    assert num_parameters(theirs).embedding == num_parameters(ours).embedding
    assert num_parameters(ours).embedding == (1 if tied else 2) * config.vocab_size * config.hidden_size
    assert sum(num_parameters(theirs)) == theirs.num_parameters()
    assert theirs.config.hidden_size == config.hidden_size
    if name != "mamba2":
        assert theirs.config.num_hidden_layers == config.num_hidden_layers


def test_what_baselines_are_like() -> None:
    """Numbers of the docstring, at eight layers: attention of the right kind in the right layers, no experts."""
    config = RMTConfig(**LARGE, num_key_value_heads=1, rope_parameters={"rope_type": "default", "rope_theta": 777.0})
    with torch.device("meta"):
        baselines = {name: build_baseline(name, config, window_length=100).config for name in BASELINES}
    for name in sorted(set(BASELINES) - {"mamba2"}):
        assert (baselines[name].num_attention_heads, baselines[name].num_key_value_heads, baselines[name].head_dim) == (
            5,
            1,
            64,
        )
        assert baselines[name].rope_parameters["rope_theta"] == 777.0
    assert baselines["llama4"].layer_types == (["chunked_attention"] * 3 + ["full_attention"]) * 2
    assert baselines["qwen3_next"].layer_types == (["linear_attention"] * 3 + ["full_attention"]) * 2
    assert baselines["recurrent_gemma"].layers_block_type[:3] == ["linear_attention"] * 2 + ["sliding_attention"]
    windows = [baselines["mistral"].sliding_window, baselines["qwen3_window"].sliding_window]
    windows.append(baselines["llama4"].attention_chunk_size)
    assert [*windows, baselines["recurrent_gemma"].sliding_window, baselines["memory_tokens"].segment_length] == [
        100
    ] * 5
    assert baselines["memory_tokens"].num_memory_tokens == config.num_memory_slots
    assert baselines["llama4"].moe_layers == [] and baselines["qwen3_next"].num_experts == 0
    mamba = baselines["mamba2"]
    assert (mamba.expand, mamba.n_groups, mamba.chunk_size, mamba.rescale_prenorm_residual) == (2, 1, 64, True)
    assert 8 < mamba.num_hidden_layers <= 16 and mamba.state_size >= 64 and mamba.head_dim == 64
    assert "rope_theta" not in config.to_dict() and config.rope_parameters == {
        "rope_type": "default",
        "rope_theta": 777.0,
    }


@pytest.mark.parametrize("name", BASELINES)
def test_a_single_layer_is_enough(name: str) -> None:
    assert build_baseline(name, RMTConfig(**SMALL | {"num_hidden_layers": 1})).config.num_hidden_layers == 1


@pytest.mark.parametrize("name", BASELINES)
def test_training_step(name: str) -> None:
    model, input_ids = baseline(name).train(), tiny_ids(2, 40)
    outputs = model(input_ids=input_ids, labels=input_ids, use_cache=False)
    assert outputs.logits.shape == (2, 40, 67) and outputs.logits.dtype == torch.float32
    assert abs(outputs.loss.item() - torch.tensor(67.0).log()) < 0.5
    outputs.loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("first", [1, 37])
@pytest.mark.parametrize("name", BASELINES)
def test_reading_and_decoding_is_reading_at_once(name: str, first: int) -> None:
    model, input_ids = baseline(name), tiny_ids(2, 40)
    with torch.no_grad():
        expected = model(input_ids=input_ids, use_cache=False).logits
    read(model, input_ids.flip(1))  # another stream before leaves nothing behind
    logits, state = read(model, input_ids[:, :first], logits_to_keep=0)
    torch.testing.assert_close(logits, expected[:, :first], rtol=0, atol=1e-5)  # float32
    for index in range(first, 40):
        logits, same = read(model, input_ids[:, index : index + 1], state)
        assert same is state
        torch.testing.assert_close(logits, expected[:, index : index + 1], rtol=0, atol=1e-5)  # float32


@pytest.mark.parametrize("name", ["ours", *BASELINES])
@pytest.mark.parametrize("position", [1, 5, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW, 50])
def test_state_bytes_are_those_of_a_real_state(name: str, position: int) -> None:
    model = RMTForCausalLM(tiny_config()).eval() if name == "ours" else baseline(name)
    _, state = read(model, tiny_ids(3, position))
    assert state_bytes(model, 3, position) == sum(tensor.nbytes for tensor in state_tensors(model, state))


def test_state_tensors_by_hand() -> None:
    """Bytes of each kind of state, written out: float32, two layers, two rows, 40 tokens."""
    rows, head = 2, 2 * 8 * 2 * 4  # keys and values, 8 wide, 2 heads, 4 bytes
    models = {name: baseline(name) for name in BASELINES}
    measured = {name: state_bytes(model, rows, 40) for name, model in models.items()}
    assert measured["llama"] == rows * 2 * 40 * head
    assert measured["mistral"] == rows * 2 * (WINDOW - 1) * head
    assert measured["qwen3"] == measured["llama"] and measured["qwen3_window"] == measured["mistral"]
    assert measured["memory_tokens"] == rows * (8 * 32 * 4 + 2 * (8 + 40 % WINDOW) * head)
    assert measured["llama4"] == measured["mistral"]  # with two layers, both are chunked
    assert measured["recurrent_gemma"] == rows * ((WINDOW - 1) * head + 32 * (3 + 1) * 4)
    assert measured["qwen3_next"] == rows * (40 * head + (3 * 32 * 4 + 4 * 8 * 8) * 4)
    mamba = models["mamba2"].config
    by_layer = 64 * mamba.state_size + (64 + 2 * mamba.state_size) * 4
    assert measured["mamba2"] == rows * mamba.num_hidden_layers * by_layer * 4
    ours = RMTForCausalLM(tiny_config())
    state = read(ours, tiny_ids(2, 40))[1]
    assert isinstance(state, RMTCache) and state_bytes(ours, rows, 40) == state.nbytes


@pytest.mark.parametrize("name", ["mistral", "qwen3_window", "memory_tokens", "mamba2", "recurrent_gemma"])
def test_state_is_constant(name: str) -> None:
    model = baseline(name)
    assert state_bytes(model, 1, 2 * WINDOW) == state_bytes(model, 1, 1000 * WINDOW) > 0
    assert state_bytes(baseline("llama"), 1, 2 * WINDOW) * 500 == state_bytes(baseline("llama"), 1, 1000 * WINDOW)


@pytest.mark.parametrize(
    ("name", "first_seen"),
    [("mistral", 40 - WINDOW + 1), ("qwen3_window", 40 - WINDOW + 1), ("llama4", 32), ("llama", 0), ("qwen3", 0)],
)
def test_window(name: str, first_seen: int) -> None:
    """In a single layer, the last of 41 tokens depends on those in its window (chunk, all) and on no other."""
    model = baseline(name, num_hidden_layers=1)
    embeddings = model.get_input_embeddings()(tiny_ids(1, 41)).detach().requires_grad_()
    model(inputs_embeds=embeddings).logits[0, 40].logsumexp(0).backward()
    assert embeddings.grad[0].any(-1).tolist() == [index >= first_seen for index in range(41)]


@pytest.mark.parametrize("fields", [SMALL, LARGE], ids=["small", "large"])
def test_equal_state(fields: dict) -> None:
    config = RMTConfig(**fields, chunk_length=16, segment_length=32, num_memory_slots=32)
    with torch.device("meta"):
        ours = RMTForCausalLM(config)
        mistral, mamba, qwen3 = (
            build_baseline(name, config, equal_state=True) for name in ("mistral", "mamba2", "qwen3_window")
        )
    wanted, far = state_bytes(ours, 1, 1), 10**6
    one_token = state_bytes(mistral, 1, 1)
    assert wanted <= state_bytes(mistral, 1, far) < wanted + one_token
    assert mistral.config.sliding_window > config.window_length  # what memory costs us, it gets as window
    assert qwen3.config.sliding_window == mistral.config.sliding_window
    assert state_bytes(mamba, 1, far) >= wanted
    assert abs(num_parameters(mamba).non_embedding / num_parameters(ours).non_embedding - 1) <= 0.02


def test_same_seed_same_model() -> None:
    for name in BASELINES:
        one, other = baseline(name).state_dict(), baseline(name).state_dict()
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_new_state_by_kind() -> None:
    assert isinstance(new_state(baseline("mamba2")), DynamicCache)
    assert isinstance(new_state(RMTForCausalLM(tiny_config())), RMTCache)


def test_refusals() -> None:
    ours = state_bytes(RMTForCausalLM(RMTConfig(**SMALL)), 1, 1)
    for arguments, message in [
        ({"name": "gpt"}, "name must be one of llama, mistral, .*, got 'gpt'"),
        ({"name": "mistral", "window_length": 1}, "window_length must be at least 2, got 1"),
        ({"name": "llama", "equal_state": True}, "equal_state is for mistral, qwen3_window and mamba2, got 'llama'"),
        ({"name": "mamba2", "equal_state": True, "config": RMTConfig(**SMALL)}, f"No mamba2 .* {ours} bytes of state"),
        ({"name": "memory_tokens", "num_memory_tokens": 0}, "num_memory_tokens must be at least 1"),
        ({"name": "memory_tokens", "num_memory_tokens": 900}, "No memory_tokens of width 32 has about"),
    ]:
        with pytest.raises(ValueError, match=message):
            build_baseline(**({"config": tiny_config()} | arguments))
    for numbers in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="batch_size and position must be at least 1"):
            state_bytes(baseline("llama"), *numbers)
