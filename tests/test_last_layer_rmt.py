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


def noted_calls(monkeypatch) -> list[int]:
    """Grows by one at every call of `last_columns_alone`."""
    calls, original = [], last_layer_rmt.last_columns_alone
    monkeypatch.setattr("rmt_hf.modeling_rmt.last_columns_alone", lambda *args: calls.append(1) or original(*args))
    return calls


@pytest.mark.parametrize("num_wanted", [1, S + 2])
@pytest.mark.parametrize("begun", [0, 1, 3 * S, 3 * S + 2])
@pytest.mark.parametrize("num_columns", [4 * S, 7 * S - 1])
@pytest.mark.parametrize("fields", FORMS)
@pytest.mark.parametrize(
    "padding", [None, (0, slice(S + 3)), (0, slice(-S - 5, None)), (slice(2), slice(-5)), (0, slice(9, 29))]
)
@torch.no_grad()
def test_last_columns_and_state_are_those_of_the_whole(num_wanted, begun, num_columns, fields, padding, monkeypatch):
    """New and old streams, padding at either end, between or nearly everywhere; and what is read after it."""
    results, calls = [], noted_calls(monkeypatch)
    for least in (1, 1000):
        monkeypatch.setattr(last_layer_rmt, "LEAST_SEGMENTS", least)
        model, ids = tiny_model(**fields).eval(), tiny_ids(2, begun + num_columns + 3)
        state = read(model, ids[:, :begun], 1)[1] if begun else None
        prompt, inputs = ids[:, begun : begun + num_columns], {}
        if padding is not None:
            inputs["attention_mask"] = torch.ones(2, num_columns, dtype=torch.long)
            inputs["attention_mask"][padding] = 0
        logits, state = read(model, prompt, num_wanted, state, **inputs)
        memorized = model.memorize(prompt, **inputs)
        after, state = read(model, ids[:, -3:], 3, state)
        state.crop(-S)
        results.append([logits, after, *tensors_of(state), *tensors_of(memorized)])
    assert len(calls) >= 1
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


@pytest.mark.parametrize(("num_columns", "is_cut"), [(S + 1, False), (S + 2, True)])
@torch.no_grad()
def test_a_prompt_is_cut_if_a_segment_is_left_out(num_columns, is_cut, monkeypatch):
    calls = noted_calls(monkeypatch)
    read(tiny_model().eval(), tiny_ids(1, num_columns), 1)
    assert bool(calls) is is_cut


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
        assert [weights.shape[2] for weights in outputs.attentions] == [6 * S] * len(model.model.layers)


@torch.no_grad()
def test_after_it_less_is_computed_again():
    """What transformers listens with stays in the model."""
    model, ids = tiny_model(num_hidden_layers=1).eval(), tiny_ids(1, 8 * S)
    model(ids[:, :S], output_hidden_states=True, output_attentions=True)
    assert model.model.layers[-1]._forward_hooks
    with Costs() as costs:
        model.memorize(ids)
    assert not costs.operations[KERNEL] and costs.operations["silu"] == 0


@torch.no_grad()
def test_many_rows_leave_out_as_much(monkeypatch):
    """However short their pieces are."""
    monkeypatch.setattr("rmt_hf.modeling_rmt.MEMORIZE_TOKENS", 16 * S)
    model, ids = tiny_model(num_hidden_layers=1).eval(), tiny_ids(8, 4 * S)
    with Costs() as costs:
        model.memorize(ids)
    assert not costs.operations[KERNEL] and costs.operations["silu"] == 0


@torch.no_grad()
def test_a_call_that_fails_in_the_last_layer_leaves_the_state_as_it_was(monkeypatch):
    model, ids = tiny_model().eval(), tiny_ids(2, 9 * S)
    _, state = read(model, ids[:, : 3 * S + 1], 1)
    before = [tensor.clone() for tensor in tensors_of(state)]

    def fail(*args):
        raise RuntimeError("no")

    monkeypatch.setattr(model.model.layers[-1].mlp, "forward", fail)
    with pytest.raises(RuntimeError, match="no"):
        read(model, ids[:, 3 * S + 1 :], 1, state)
    torch.testing.assert_close(tensors_of(state), before, rtol=0, atol=0)
    assert state.get_seq_length() == 3 * S + 1


@pytest.mark.parametrize("place", ["layers.1.mlp", "layers.1", "norm", ""])
@torch.no_grad()
def test_a_hook_hears_of_the_whole_call(place):
    model, ids, shapes = tiny_model().eval(), tiny_ids(2, 6 * S), []

    def listen(module, args, output):
        shapes.append((output if torch.is_tensor(output) else output[0]).shape[1])

    model.model.get_submodule(place).register_forward_hook(listen)
    model(ids, past_key_values=RMTCache(model.config), logits_to_keep=1)
    assert shapes == [6 * S]


def test_with_gradients_nothing_is_left_out(monkeypatch):
    monkeypatch.delattr("rmt_hf.modeling_rmt.last_columns_alone")
    model, ids, gradients = tiny_model().eval(), tiny_ids(1, 6 * S), []
    for num_wanted in (1, 0):
        logits = model(ids, past_key_values=RMTCache(model.config), logits_to_keep=num_wanted).logits[:, -1]
        gradients.append(torch.autograd.grad(logits.square().sum(), list(model.parameters()), allow_unused=True))
    torch.testing.assert_close(*gradients)
