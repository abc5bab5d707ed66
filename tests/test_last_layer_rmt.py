"""Of a long prompt, the last layer computes what is wanted and no more, and nobody sees a difference."""

import pytest
import torch

from rmt_hf import RMTCache, last_layer_rmt
from test_costs import KERNEL, Costs
from tiny import tiny_ids, tiny_model


S = 8  # segments of the tiny models
FORMS = [{}, {"use_attention_sink": True, "num_lookback_segments": 2}, {"num_memory_slots": 0}]


def tensors_of(state: RMTCache) -> list[torch.Tensor]:
    return [
        tensor
        for layer in state.layers
        for tensor in (*layer.state[:3], *layer.state.memory, *layer.state.previous_memory)
    ]


def read(model, ids, num_wanted, state=None, **inputs):
    state = RMTCache(model.config) if state is None else state
    logits = model(ids, past_key_values=state, logits_to_keep=num_wanted, **inputs).logits
    return logits, state


@pytest.mark.parametrize("num_wanted", [1, S + 2])
@pytest.mark.parametrize("begun", [0, 1, 3 * S, 3 * S + 2])
@pytest.mark.parametrize("num_columns", [4 * S, 5 * S + 1, 7 * S - 1])
@pytest.mark.parametrize(
    "fields", [{}, {"use_attention_sink": True, "num_lookback_segments": 2}, {"num_memory_slots": 0}]
)
@pytest.mark.parametrize("is_padded", [False, True])
@torch.no_grad()
def test_last_columns_and_state_are_those_of_the_whole(num_wanted, begun, num_columns, fields, is_padded, monkeypatch):
    """New and old streams, rows at different places, with padding in front; what is read after it is the same, too."""
    results, calls = [], []
    original = last_layer_rmt.last_columns_alone
    monkeypatch.setattr("rmt_hf.modeling_rmt.last_columns_alone", lambda *args: calls.append(1) or original(*args))
    for least in (2, 1000):
        monkeypatch.setattr(last_layer_rmt, "LEAST_SEGMENTS", least)
        model, ids = tiny_model(**fields).eval(), tiny_ids(2, begun + num_columns + 3)
        state = read(model, ids[:, :begun], 1)[1] if begun else None
        prompt, inputs = ids[:, begun : begun + num_columns], {}
        if is_padded:
            inputs["attention_mask"] = torch.ones(2, num_columns, dtype=torch.long)
            inputs["attention_mask"][0, : S + 3] = 0
        logits, state = read(model, prompt, num_wanted, state, **inputs)
        memorized = model.memorize(prompt, **inputs)
        after, state = read(model, ids[:, -3:], 3, state)
        state.crop(-S)
        results.append([logits, after, *tensors_of(state), *tensors_of(memorized)])
    assert len(calls) == 2 + (begun > 2 * S + 1)
    torch.testing.assert_close(*results, rtol=0, atol=1e-11)


@torch.no_grad()
def test_what_is_left_out_is_not_computed():
    """One layer: memorizing asks for nothing, and a prompt for the last token alone, of window, chunk and memory."""
    model, ids = tiny_model(num_hidden_layers=1).eval(), tiny_ids(1, 8 * S)
    with Costs() as costs:
        state = model.memorize(ids)
    assert not costs.operations[KERNEL] and costs.operations["silu"] == 0
    assert state.get_seq_length() == 8 * S
    with Costs() as costs:
        model(ids, past_key_values=RMTCache(model.config), logits_to_keep=1)
    assert costs.operations["silu"] == 1 and costs.operations[KERNEL] == 3
    with Costs() as whole:
        model(ids, past_key_values=RMTCache(model.config))
    assert costs.bytes < 0.7 * whole.bytes


@pytest.mark.parametrize("inputs", [{"output_hidden_states": True}, {"output_attentions": True}])
@torch.no_grad()
def test_who_asks_for_more_gets_it(inputs):
    model, ids = tiny_model().eval(), tiny_ids(2, 6 * S)
    model.set_attn_implementation("eager")
    outputs = model(ids, past_key_values=RMTCache(model.config), logits_to_keep=1, **inputs)
    plain = model(ids, past_key_values=RMTCache(model.config))
    torch.testing.assert_close(outputs.logits, plain.logits[:, -1:])
    if "output_hidden_states" in inputs:
        assert all(states.shape[1] == 6 * S for states in outputs.hidden_states)
    else:
        assert outputs.attentions[-1].shape[2] == 6 * S


@torch.no_grad()
def test_a_hook_hears_of_the_whole_call():
    model, ids, shapes = tiny_model().eval(), tiny_ids(2, 6 * S), []
    model.model.layers[-1].mlp.register_forward_hook(lambda module, args, output: shapes.append(output.shape[1]))
    model(ids, past_key_values=RMTCache(model.config), logits_to_keep=1)
    assert shapes == [6 * S]


def test_with_gradients_nothing_is_left_out():
    model, ids, gradients = tiny_model().eval(), tiny_ids(1, 6 * S), []
    for num_wanted in (1, 0):
        logits = model(ids, past_key_values=RMTCache(model.config), logits_to_keep=num_wanted).logits[:, -1]
        gradients.append(torch.autograd.grad(logits.square().sum(), list(model.parameters()), allow_unused=True))
    torch.testing.assert_close(*gradients)
