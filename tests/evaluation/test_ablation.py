"""Ablations of memory: each does to a memory what it says, to the last bit, and streams are read with what it left."""

from collections.abc import Sequence

import pytest
import torch

from helpers import FORMS, read, segments_alone, tiny_config, tiny_ids, tiny_model
from rmt_hf import RMTCache, RMTForCausalLM
from rmt_hf.evaluation import bits_of, token_bits
from rmt_hf.evaluation.ablation import (
    empty_memories,
    freeze_memories,
    pass_on_memories,
    stream_bits,
    swap_memories,
)
from rmt_hf.memory_rmt import Slots


CLOSE = {"atol": 1e-12, "rtol": 0}  # float64: sums in another order
S = 8
NO_MEMORY = {"num_memory_slots": 0, "num_lasting_slots": None}


def memories(cache: RMTCache) -> list[torch.Tensor]:
    return [tensor.clone() for layer in cache.layers for tensor in layer.state.memory]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


def model_that_says_its_memory():
    """One layer with one head, as wide as the vocabulary: it says the token whose one-hot vector the slots hold."""
    sizes = {"hidden_size": 16, "vocab_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1}
    model = tiny_model(num_hidden_layers=1, use_local_attention=False, **sizes)
    weights = model.state_dict()
    for name in ("self_attn.v_proj", "mlp.down_proj"):
        weights[f"model.layers.0.{name}.weight"].zero_()  # only what is put into memory has anything to say
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.o_proj.weight"):
        weights[name].copy_(torch.eye(16))
    model.model.norm.weight.data.fill_(1.0)
    return model


@pytest.mark.parametrize("num_read", [3 * S, 3 * S + 3], ids=["at a segment start", "within a segment"])
@torch.no_grad()
def test_a_swap_swaps_the_answers(num_read):
    model, answers = model_that_says_its_memory(), torch.tensor([3, 7, 11, 5])
    _, cache = read(model, torch.randint(1, 16, (1, num_read)).expand(4, -1))
    values = 100 * torch.eye(16).double()[answers][:, None, None].expand(4, 8, 1, 16)
    positions = torch.arange(8)[None, :, None].expand(4, -1, 1)
    written = Slots(torch.zeros_like(values), values, torch.zeros(4, 8, 1).double(), positions)
    cache.edit_memory(lambda slots: written)

    def say(cache: RMTCache) -> list[int]:
        return model(torch.ones(4, 1, dtype=torch.int64), past_key_values=cache).logits[:, -1].argmax(-1).tolist()

    assert say(cache.clone()) == [3, 7, 11, 5]
    for ablate, expected in (
        (swap_memories, [7, 3, 5, 11]),
        (pass_on_memories, [7, 11, 5, 3]),
        (empty_memories, [1, 1, 1, 1]),
    ):
        changed = cache.clone()
        ablate(changed)
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


@pytest.mark.parametrize("pads", [(0, 0), (0, S)], ids=["all rows at one position", "rows at two"])
@pytest.mark.parametrize("form", ["gated select", "two parts", "present", "mean", "sink"])
@torch.no_grad()
def test_an_emptied_memory_is_none(form, pads):
    """Sink and window alone are seen, as by the same weights without memory, whatever the slots hold."""
    model, ids = tiny_model(**FORMS[form]), tiny_ids(2, 9 * S)
    without = RMTForCausalLM(tiny_config(**FORMS[form] | NO_MEMORY)).double().eval()
    without.load_state_dict(model.state_dict(), strict=False)
    mask = torch.arange(9 * S) >= torch.tensor(pads)[:, None]
    cache, expected, start = RMTCache(model.config), RMTCache(without.config), 0
    for size in [S, S, S, 3, S - 3, *[1] * S, S, 1, S - 1, S - 1, 1, S]:  # none that sees what it has written itself
        columns, own_mask = ids[:, start : start + size], mask[:, start : start + size]
        found, wanted = (
            read(each, columns, [], state, own_mask)[0] for each, state in ((model, cache), (without, expected))
        )
        torch.testing.assert_close(found[own_mask], wanted[own_mask], **CLOSE)
        empty_memories(cache)
        cache.edit_memory(lambda slots: slots._replace(keys=slots.keys + 5, values=slots.values - 7))
        start += size


def memory_of(cache: RMTCache):
    """An edit that gives every layer the memory of another state, also that before the last write."""
    states = [layer.state for layer in cache.layers]
    slots = iter([slots for state in states for slots in (state.memory_before(cache.sizes), state.memory)])
    return lambda _: next(slots)


@pytest.mark.parametrize("held", [(0, 0), (1, 1), (3, 3), (5, 5), (0, 2), (1, 6)], ids=str)
@pytest.mark.parametrize("form", [{"num_lasting_slots": 8}, {"memory_write": "mean"}], ids=["lasting", "mean"])
@torch.no_grad()
def test_a_memory_of_fewer_writes_is_read_as_it_is(form, held):
    """One layer, and strengths that do not ask the present: as if only what was written, and the window, were there.

    Each row has a number of writes of its own. The state goes on in calls of several sizes, there and back over a
    segment end, to a folder, among other rows.
    """
    model, ids, more = tiny_model(num_hidden_layers=1, **form), tiny_ids(2, 9 * S), tiny_ids(2, 6 * S + 3, seed=1)

    def said(window: slice, held: Sequence[int]) -> torch.Tensor:
        """Logits of what comes, by streams that have read what is written and the window."""
        rows = [torch.cat([row[: n * S], row[window], new]) for row, n, new in zip(ids, held, more, strict=True)]
        return torch.cat([read(model, row[None])[0][:, -more.shape[1] :] for row in rows])

    expected = said(slice(8 * S, None), held)
    _, cache = read(model, ids)
    writers = [model.memorize(row[None, : (n + 1) * S]) for row, n in zip(ids, held, strict=True)]
    cache.edit_memory(memory_of(RMTCache.stack(writers)))
    for cuts in ([], [S, S, 1, 1, 2 * S], [3, S - 2, 3]):
        found, _ = read(model, more, cuts, cache.clone())
        torch.testing.assert_close(found, expected, **CLOSE)
    there_and_back = cache.clone()
    read(model, tiny_ids(2, S, seed=2), [3], there_and_back)
    there_and_back.crop(-S)
    torch.testing.assert_close(read(model, more, [], there_and_back)[0], expected, **CLOSE)
    back = cache.clone()
    back.crop(-3)
    before = said(slice(7 * S, -3), [max(0, n - 1) for n in held])
    torch.testing.assert_close(read(model, more, [], back)[0], before, **CLOSE)
    rows = RMTCache.stack([cache, *cache.split()])
    rows.batch_repeat_interleave(2)
    rows.batch_select_indices(torch.tensor([7, 4, 0, 3]))
    found, _ = read(model, more[[1, 0, 0, 1]], [S + 2], rows)
    torch.testing.assert_close(found, expected[[1, 0, 0, 1]], **CLOSE)
    rows.reset(torch.tensor([True, False, True, True]))
    found, _ = read(model, ids[:1].expand(4, -1), [], rows)
    torch.testing.assert_close(found[[0, 2]], read(model, ids[[0, 0]])[0], **CLOSE)


@torch.no_grad()
def test_an_edited_memory_is_saved_and_ends_with_its_document(tmp_path):
    model, ids, more = tiny_model(), tiny_ids(2, 9 * S), tiny_ids(2, 6 * S, seed=1)
    _, cache = read(model, ids)
    empty_memories(cache)
    cache.save_pretrained(tmp_path)
    expected, _ = read(model, more, [], cache.clone())
    assert torch.equal(read(model, more, [], RMTCache.from_pretrained(tmp_path, model))[0], expected)
    positions = torch.cat([9 * S + torch.arange(2 * S), torch.arange(4 * S)])[None]
    model(more, position_ids=positions, past_key_values=cache)
    _, wanted = read(model, more[:, 2 * S :])
    found = model(more, past_key_values=cache).logits
    torch.testing.assert_close(found, model(more, past_key_values=wanted).logits, **CLOSE)


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
    windows = (segments_alone(each.layers[0].state.keys, model.config) for each in (cache, plain))
    assert torch.equal(*windows)  # goes on
    assert same(memories(cache), memories(plain)) == (kept == 9)


@pytest.mark.parametrize("num_lookback_segments", [0, 1])
@torch.no_grad()
def test_streams_are_read_with_what_the_ablations_left(num_lookback_segments):
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
    caches, kept = {name: RMTCache(model.config) for name in bits}, RMTCache(model.config)
    for start in range(0, 59, S):
        own = caches["own"].clone()
        for name, cache in caches.items():
            if start and name != "own":
                cache.edit_memory(memory_of(own))
                if name == "empty":
                    cache.edit_memory(lambda slots: Slots.empty(slots.keys, slots.keys.shape[1]))
                elif name in ("other", "swapped"):
                    order = [1, 2, 3, 0] if name == "other" else [1, 0, 3, 2]
                    cache.edit_memory(lambda slots, order=order: slots.map(lambda tensor: tensor[order]))
                elif name == "frozen" and start > 3 * S:
                    cache.edit_memory(memory_of(kept))
                elif name == "frozen":
                    kept = own
            targets = ids[:, start + 1 : start + S + 1]
            logits, _ = read(model, ids[:, start : start + S], cache=cache)
            expected = bits_of(logits[:, : targets.shape[1]], targets)
            torch.testing.assert_close(bits[name][:, start : start + S], expected, **CLOSE)
    for name in ("empty", "other", "swapped", "frozen"):
        assert (bits[name][:, -S:] - bits["own"][:, -S:]).abs().max() > 1e-3, name


def test_the_old_name_of_ablations_warns():
    model, ids = tiny_model(), tiny_ids(2, 60)
    with pytest.warns(FutureWarning, match="controls is now called ablations") as caught:
        bits = stream_bits(model, ids, controls={"empty": empty_memories})
    assert caught[0].filename == __file__
    expected = stream_bits(model, ids, {"empty": empty_memories})
    assert bits.keys() == expected.keys() and all(torch.equal(bits[name], expected[name]) for name in bits)


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
