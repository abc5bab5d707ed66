"""Memory controls: each does to a memory what it says, to the last bit, and streams are read with what it left."""

import pytest
import torch

from rmt_hf import RMTCache
from rmt_hf.controls import (
    edit_memories,
    empty_memories,
    freeze_memories,
    pass_on_memories,
    stream_bits,
    swap_memories,
)
from rmt_hf.evaluation import bits_of, token_bits
from rmt_hf.memory_rmt import ReadableMemory, Slots
from tiny import read, tiny_ids, tiny_model


CLOSE = {"atol": 1e-12, "rtol": 0}  # float64: sums in another order
S = 8


def memories(cache: RMTCache) -> list[torch.Tensor]:
    return [tensor.clone() for layer in cache.layers for tensor in layer.state.memory]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


def model_that_says_its_memory():
    """One layer with one head, as wide as the vocabulary: it says the token whose one-hot vector the slots hold."""
    sizes = {"hidden_size": 16, "vocab_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1}
    model = tiny_model(num_hidden_layers=1, use_local_attention=False, **sizes)
    attention, weights = model.model.layers[0].self_attn, model.state_dict()
    for name in ("v_proj", "memory_q_proj"):
        weights[f"model.layers.0.self_attn.{name}.weight"].zero_()  # only memory has anything to say, whatever is asked
    weights["model.layers.0.mlp.down_proj.weight"].zero_()
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.o_proj.weight"):
        weights[name].copy_(torch.eye(16))
    model.model.norm.weight.data.fill_(1.0)
    attention.fusion.scale.data.fill_(1.0)
    return model


@pytest.mark.parametrize("num_read", [3 * S, 3 * S + 3], ids=["at a segment start", "within a segment"])
@torch.no_grad()
def test_a_swap_swaps_the_answers(num_read):
    model, answers = model_that_says_its_memory(), torch.tensor([3, 7, 11, 5])
    _, cache = read(model, torch.randint(1, 16, (1, num_read)).expand(4, -1))
    values = 100 * torch.eye(16).double()[answers][:, None, None].expand(4, 8, 1, 16)
    written = Slots(torch.zeros_like(values), values, torch.zeros(4, 8, 1).double())
    edit_memories(cache, lambda slots: written)

    def say(cache: RMTCache) -> list[int]:
        return model(torch.ones(4, 1, dtype=torch.int64), past_key_values=cache).logits[:, -1].argmax(-1).tolist()

    assert say(cache.clone()) == [3, 7, 11, 5]
    for control, expected in (
        (swap_memories, [7, 3, 5, 11]),
        (pass_on_memories, [7, 11, 5, 3]),
        (empty_memories, [1, 1, 1, 1]),
    ):
        changed = cache.clone()
        control(changed)
        assert say(changed) == expected
        changed.crop(-1)
        assert say(changed) == expected


@pytest.mark.parametrize("later", [1, 5, S, 3 * S + 3])
@torch.no_grad()
def test_what_a_swapped_row_says_is_what_its_partner_would_have_said(later):
    # One layer, so that the window knows nothing of memory: rows that end alike differ in their memories alone.
    model, ids = tiny_model(num_hidden_layers=1), tiny_ids(4, 9 * S)
    ids[:, 5 * S :] = ids[0, 5 * S :]
    _, cache = read(model, ids)
    more = tiny_ids(1, later, seed=1).expand(4, -1)
    expected, _ = read(model, more, cache=cache.clone())
    swap_memories(cache)
    found, _ = read(model, more, cache=cache)
    torch.testing.assert_close(found, expected[[1, 0, 3, 2]], **CLOSE)
    assert not torch.allclose(found, expected)


@torch.no_grad()
def test_two_swaps_are_none_and_a_rewind_keeps_one():
    model, ids = tiny_model(), tiny_ids(2, 6 * S + 2)
    _, cache = read(model, ids)
    before, twice = memories(cache), cache.clone()
    swap_memories(twice)
    assert not same(memories(twice), before)
    swap_memories(twice)
    assert same(memories(twice), before)
    swapped = cache.clone()
    swap_memories(swapped)
    for state in (cache, swapped):
        state.crop(-4)  # back over the segment end
    assert same(memories(swapped), [tensor.flip(0) for tensor in memories(cache)])


@torch.no_grad()
def test_an_emptied_memory_reads_exactly_zero():
    model, ids = tiny_model(), tiny_ids(3, 7 * S)
    _, cache = read(model, ids)
    full, windows = memories(cache), [layer.state.keys.clone() for layer in cache.layers]
    empty_memories(cache)
    for layer, state in zip(model.model.layers, (layer.state for layer in cache.layers), strict=True):
        queries = torch.randn(3 * 2, 2, 8, dtype=torch.float64)
        assert not layer.self_attn.memory.recall(queries, ReadableMemory.of(state.memory, torch.float64), 0.3).any()
        assert layer.self_attn.memory.recall(
            queries, ReadableMemory.of(cache.layers[0].state.memory._replace(strengths=full[2]), torch.float64), 0.3
        ).any()
    assert same([layer.state.keys for layer in cache.layers], windows)
    garbage = cache.clone()
    edit_memories(garbage, lambda slots: Slots(slots.keys + 5, slots.values - 7, slots.strengths))
    expected, _ = read(model, tiny_ids(3, 2 * S), cache=cache)
    assert torch.equal(read(model, tiny_ids(3, 2 * S), cache=garbage)[0], expected)


@pytest.mark.parametrize("num_tokens", [0, S - 1, S, 5 * S, 5 * S + 3, 100 * S])
@pytest.mark.parametrize("num_lookback_segments", [0, 1])
@torch.no_grad()
def test_a_frozen_memory_stays_bit_for_bit(num_lookback_segments, num_tokens):
    model, ids = tiny_model(num_lookback_segments=num_lookback_segments), tiny_ids(2, 9 * S)
    cache, freeze = RMTCache(model.config), freeze_memories(num_tokens)
    freeze(cache)  # nothing has been read, nothing happens
    for start in range(0, 9 * S, S):
        read(model, ids[:, start : start + S], cache=cache)
        freeze(cache)
    kept = min(num_tokens // S, 9)
    if kept > num_lookback_segments:
        _, expected = read(model, ids[:, : kept * S], [S] * (kept - 1))
        assert same(memories(cache), memories(expected))
    else:
        assert all((layer.state.memory.strengths == -torch.inf).all() for layer in cache.layers)
    _, plain = read(model, ids, [S] * 8)
    assert same([cache.layers[0].state.keys], [plain.layers[0].state.keys])  # the window goes on
    assert same(memories(cache), memories(plain)) == (kept == 9)


@pytest.mark.parametrize("num_lookback_segments", [0, 1])
@torch.no_grad()
def test_streams_are_read_with_what_the_controls_left(num_lookback_segments):
    model, ids = tiny_model(num_lookback_segments=num_lookback_segments), tiny_ids(4, 60)
    bits = stream_bits(
        model,
        ids,
        {
            "empty": empty_memories,
            "other": pass_on_memories,
            "swapped": swap_memories,
            "frozen": freeze_memories(3 * S + 5),
            "untouched": lambda cache: None,
        },
    )
    torch.testing.assert_close(bits["own"], token_bits(model, ids), **CLOSE)
    assert torch.equal(bits["untouched"], bits["own"])
    caches = {name: RMTCache(model.config) for name in bits}
    for start in range(0, 59, S):
        own = caches["own"].clone()
        for name, cache in caches.items():
            for layer, own_layer in zip(cache.layers, own.layers, strict=True):
                if start and name != "own":
                    memory = own_layer.state.memory
                    if name == "empty":
                        memory = memory._replace(strengths=torch.full_like(memory.strengths, -torch.inf))
                    elif name in ("other", "swapped"):
                        order = [1, 2, 3, 0] if name == "other" else [1, 0, 3, 2]
                        memory = Slots(*(tensor[order] for tensor in memory))
                    elif name == "frozen" and start > 3 * S:
                        memory = layer.kept
                    layer.kept = memory
                    layer.state = layer.state._replace(memory=memory)
            piece, targets = ids[:, start : start + S], ids[:, start + 1 : start + S + 1]
            expected = bits_of(read(model, piece, cache=cache)[0][:, : targets.shape[1]], targets)
            torch.testing.assert_close(bits[name][:, start : start + S], expected, **CLOSE)
    for name in ("empty", "other", "swapped", "frozen"):
        assert (bits[name][:, -S:] - bits["own"][:, -S:]).abs().max() > 1e-3, name


def test_bad_questions_are_refused():
    model, ids = tiny_model(), tiny_ids(3, 20)
    for words, refused in {
        "at least 2 rows": lambda: stream_bits(model, ids[:1], {"other": pass_on_memories}),
        "even number": lambda: stream_bits(model, ids, {"swapped": swap_memories}),
        "no memory": lambda: stream_bits(tiny_model(num_memory_slots=0), ids, {"empty": empty_memories}),
        "another name": lambda: stream_bits(model, ids, {"own": empty_memories}),
        "at least 2 tokens": lambda: stream_bits(model, ids[:, :1], {}),
        "0 or more": lambda: freeze_memories(-1),
    }.items():
        with pytest.raises(ValueError, match=words):
            refused()
