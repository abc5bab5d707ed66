"""What memory holds, as a table: `RMTCache.slots`."""

import math

import torch

from helpers import S, every_form, pad_left, prompts, read, tiny_ids, tiny_model
from rmt_hf import RMTCache


EVERYTHING = {"num_slots_per_chunk": 4, "num_memory_slots": 8 * S, "num_lasting_slots": 4 * S}


def test_where_nothing_is_dropped_all_that_left_the_window_is_there():
    model = tiny_model(**EVERYTHING)
    with torch.no_grad():
        _, cache = read(model, tiny_ids(1, 5 * S + 3))
    found = cache.slots()
    assert found == sorted(found) and all(type(number) in (int, float, str) for number in found[0])
    for layer in range(2):
        for head in range(2):
            for part, first in (("lasting", 0), ("present", 4 * S)):
                own = [slot for slot in found if slot[:4] == (0, layer, head, part)]
                assert sorted(slot.position for slot in own) == list(range(4 * S))  # segment 4 is in the window
                assert [slot.slot for slot in own] == list(range(first, first + 4 * S))
                assert all(slot.age == 5 - slot.position // S for slot in own)
    assert len(found) == 2 * 2 * 2 * 4 * S


@every_form
def test_the_table_is_what_the_state_has(models, form):
    """Rows at different positions, of which some have written nothing."""
    model, inputs = models[form], pad_left(prompts())
    with torch.no_grad():
        cache = model.memorize(**inputs)
    found = cache.slots()
    assert len({slot[:3] + slot[4:5] for slot in found}) == len(found)
    written = sum(int((layer.state.memory.strengths > -math.inf).sum()) for layer in cache.layers)
    assert len(found) == written and (written > 0) == (model.config.num_memory_slots > 0)
    lasting = model.config.num_lasting_slots
    for slot in found:
        memory = cache.layers[slot.layer].state.memory
        where = slot.row, slot.slot, slot.head
        assert (memory.positions[where], memory.strengths[where]) == (slot.position, slot.strength)
        assert slot.part == ("lasting" if lasting is None or slot.slot < lasting else "present")
        assert slot.age == cache.positions[slot.row] // S - slot.position // S
        assert slot.age > model.config.num_lookback_segments  # else it is in the window


def test_the_table_follows_the_state(models, tmp_path):
    model, ids = models["two parts"], tiny_ids(2, 6 * S)
    assert RMTCache(model.config).slots() == []
    with torch.no_grad():
        _, expected = read(model, ids[:, : 5 * S - 1])
        _, cache = read(model, ids[:, : 5 * S + 2], cuts=[5 * S - 1])
    before = cache.slots()
    cache.crop(-3)
    assert [slot[:6] for slot in cache.slots()] == [slot[:6] for slot in expected.slots()] != [s[:6] for s in before]
    cache.save_pretrained(tmp_path)
    assert RMTCache.from_pretrained(tmp_path, model).slots() == cache.slots()
    cache.reset(rows=torch.tensor([True, False]))
    assert {slot.row for slot in cache.slots()} == {1}
