"""`torch.export` of decoding steps with and without a segment end: together they are the stream."""

import pytest
import torch

from helpers import CLOSE, FORMS, S, pad_left, prompts, read, tiny_ids, tiny_model
from rmt_hf import RMTCache
from rmt_hf.evaluation.ablation import empty_memories
from rmt_hf.export import DecodingStep, state_tensors


@torch.no_grad()
@pytest.mark.parametrize("form", ["two parts", "paper", "mean"])
def test_exported_programs_are_the_stream(form, tmp_path):
    model, batch = tiny_model(**FORMS[form]), pad_left(prompts())
    _, cache = read(model, batch["input_ids"], mask=batch["attention_mask"])
    more, tensors = tiny_ids(len(prompts()), 3 * S + 3, seed=3), state_tensors(cache)
    expected, cache = read(model, more, cache=cache)
    positions = torch.tensor([len(prompt) for prompt in prompts()])
    programs = []
    for ends_segment in (False, True):
        copies = [tensor.clone() for tensor in tensors]
        step = DecodingStep(model, ends_segment)
        torch.export.save(torch.export.export(step, (more[:, :1], positions, copies)), tmp_path / "step.pt2")
        programs.append(torch.export.load(tmp_path / "step.pt2").module())
    for column, wanted in zip(more.split(1, 1), expected.split(1, 1), strict=True):
        step = programs[bool(((positions + 1) % S == 0).any())]
        logits, tensors = step(column, positions, list(tensors))
        torch.testing.assert_close(logits, wanted, **CLOSE)
        positions = positions + 1
    assert positions.tolist() == cache.positions
    size = len(tensors) // len(cache.layers)
    for index, layer in enumerate(cache.layers):
        memory = tensors[index * size + 4 : index * size + 8]
        for got, want in zip(memory, layer.state.memory, strict=True):
            torch.testing.assert_close(got, want, **CLOSE)


def test_a_step_that_is_not_exported_is_the_same():
    """And goes on after any other."""
    model = tiny_model()
    _, cache = read(model, tiny_ids(2, 3 * S + 3))
    more, positions, tensors = tiny_ids(2, S, seed=3), torch.full((2,), 3 * S + 3), state_tensors(cache)
    expected, _ = read(model, more, cache=cache)
    for column, wanted in zip(more.split(1, 1), expected.split(1, 1), strict=True):
        logits, tensors = DecodingStep(model, ends_segment=True)(column, positions, tensors)
        torch.testing.assert_close(logits, wanted, **CLOSE)
        positions = positions + 1


def test_states_that_a_step_cannot_go_on_from_are_refused():
    with pytest.raises(ValueError, match="must have read something, got an empty one"):
        state_tensors(RMTCache(tiny_model().config))
    _, cropped = read(tiny_model(), tiny_ids(1, 5 * S + 2))
    edited = cropped.clone()
    cropped.crop(-4)
    empty_memories(edited)
    read(tiny_model(), tiny_ids(1, 3), cache=edited)
    for cache in (cropped, edited):
        with pytest.raises(ValueError, match="as reading has left it, got one that was cropped or edited"):
            state_tensors(cache)
