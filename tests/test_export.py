"""`torch.export` of a decoding step and of the turn of a segment: together they are the stream."""

import pytest
import torch

from rmt_hf import RMTCache
from rmt_hf.export import DecodingStep, SegmentTurn, state_tensors
from test_cache_rmt import CLOSE, FORMS, S, every_form, prompts
from tiny import pad_left, read, tiny_ids, tiny_model


@torch.no_grad()
@every_form
def test_exported_programs_are_the_stream(form, tmp_path):
    model, batch = tiny_model(**FORMS[form]), pad_left(prompts())
    _, cache = read(model, batch["input_ids"], mask=batch["attention_mask"])
    more, tensors = tiny_ids(len(prompts()), 2 * S + 3, seed=3), state_tensors(cache)
    expected, cache = read(model, more, cache=cache)
    positions = torch.tensor([len(prompt) for prompt in prompts()])
    copies = [tensor.clone() for tensor in tensors]
    step = torch.export.export(DecodingStep(model), (more[:, :1], positions, copies))
    turn = torch.export.export(SegmentTurn(model), (positions, copies))
    torch.export.save(step, tmp_path / "step.pt2")
    step, turn = torch.export.load(tmp_path / "step.pt2").module(), turn.module()
    for column, wanted in zip(more.split(1, 1), expected.split(1, 1), strict=True):
        logits, tensors = step(column, positions, list(tensors))
        torch.testing.assert_close(logits, wanted, **CLOSE)
        positions = positions + 1
        if (positions % S == 0).any():
            tensors = turn(positions, list(tensors))
    assert positions.tolist() == cache.positions
    slots = [tensor for layer in cache.layers for tensor in layer.state.memory]
    exported = [tensor for index in range(0, len(tensors), 9) for tensor in tensors[index + 3 : index + 6]]
    for got, want in zip(exported, slots, strict=True):
        torch.testing.assert_close(got, want, **CLOSE)


def test_an_empty_state_has_no_tensors():
    with pytest.raises(ValueError, match="must have read something, got an empty one"):
        state_tensors(RMTCache(tiny_model().config))
