"""A compiled decoding step is compiled twice, serves the whole stream, and gives what the plain step gives."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from helpers import CLOSE, FORMS, S, assert_same_rows, pad_left, prompts, read, tiny_ids, tiny_model


# Compiling takes seconds: forms that differ in what is compiled, and slowly the others.
SOME = ("gated select", "two parts", "paper")
SOME_AND_SLOW = [form if form in SOME else pytest.param(form, marks=pytest.mark.slow) for form in FORMS]
SLOW_STEPS = [pytest.param(form, 1, 2, marks=pytest.mark.slow) for form in FORMS if form != "gated select"]


@pytest.fixture(autouse=True)
def forget_what_was_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize(
    ("form", "rows", "length"), [("gated select", 1, 2), ("two parts", 5, S), ("paper", 5, S), *SLOW_STEPS]
)
def test_compiled_once_without_a_write_and_once_with_one(form, rows, length):
    """From the first tokens, when memory is empty, over segment ends, to a ring that has turned.

    Rows that stand at different positions, and windows of any number of observing tokens, are no other graphs.
    """
    model, counter = tiny_model(**FORMS[form] | {"num_observing_tokens": length}), CompileCounter()
    batch = pad_left(prompts()[:rows])
    _, cache = read(model, batch["input_ids"], mask=batch["attention_mask"])
    expected = cache.clone()
    compiled = torch.compile(model.forward, backend=counter)
    counts: dict[bool, set[int]] = {False: set(), True: set()}
    for column in tiny_ids(rows, 6 * S + 3, seed=3).split(1, 1):
        before = counter.frame_count
        logits = compiled(input_ids=column, past_key_values=cache).logits
        torch.testing.assert_close(logits, model(column, past_key_values=expected).logits, **CLOSE)
        counts[any(position % S == 0 for position in cache.positions)].add(counter.frame_count - before)
    assert_same_rows(cache, expected, model.config)
    new = [sorted(found)[::-1] for found in counts.values()]
    assert all(len(found) == 2 and found[1] == 0 for found in new)  # the first step of each kind, and no other one
    assert sum(found[0] for found in new) == 2 + 1  # the layers of each kind, and the head


@torch.no_grad()
def test_generate_with_a_compiled_forward():
    model, ids = tiny_model(), tiny_ids(1, 2 * S + 5)
    settings = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 2 * S + 2}
    expected = model.generate(ids, **settings)
    counter = CompileCounter()
    model.forward = torch.compile(model.forward, backend=counter)
    assert torch.equal(model.generate(ids, **settings), expected)
    compiled = counter.frame_count
    assert torch.equal(model.generate(ids, **settings), expected)
    assert counter.frame_count == compiled > 0


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # inside the compiler
def test_the_default_compiler_gives_the_same():
    model, ids = tiny_model(dtype=torch.float32), tiny_ids(1, 3 * S)
    _, cache = read(model, ids)
    _, expected = read(model, ids)
    compiled, more = torch.compile(model.forward), tiny_ids(1, 2 * S + 1, seed=3)
    for column in more.split(1, 1):
        logits = compiled(input_ids=column, past_key_values=cache).logits
        # float32: sums in another order
        torch.testing.assert_close(logits, model(column, past_key_values=expected).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", SOME_AND_SLOW)
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_is_one_graph(form, training):
    """`fullgraph=True`: no break, and the same result and gradient; in training, and in a step that goes on."""
    model, calls = tiny_model(**FORMS[form]).train(training), []
    layer = model.model.layers[1]
    ids = tiny_ids(2, 3 * S + 3)
    with torch.set_grad_enabled(training):
        cache = None if training else model(ids, use_cache=True).past_key_values
        hook = layer.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
        model(ids if training else ids[:, :1], past_key_values=cache, use_cache=not training)
        hook.remove()
        (hidden_states,), arguments = calls[0]
        hidden_states = hidden_states.detach().requires_grad_(training)
        expected = layer(hidden_states, **arguments)[0]
        found = torch.compile(layer, fullgraph=True, backend="aot_eager")(hidden_states, **arguments)[0]
        torch.testing.assert_close(found, expected, **CLOSE)
        if training:
            gradients = [torch.autograd.grad(each.square().sum(), hidden_states)[0] for each in (found, expected)]
            torch.testing.assert_close(*gradients, **CLOSE)


@torch.no_grad()
def test_pieces_of_a_stream_are_not_compiled_for_each_place():
    """Several tokens at a time, across a segment end, from many places of a segment."""
    model, counter, counts = tiny_model(), CompileCounter(), []
    compiled = torch.compile(model.forward, backend=counter)
    for start in range(4 * S + 1, 5 * S - 1):
        ids, (_, cache) = tiny_ids(1, 2 * S, seed=start), read(model, tiny_ids(1, start))
        expected = cache.clone()
        logits = compiled(input_ids=ids, past_key_values=cache).logits
        torch.testing.assert_close(logits, model(ids, past_key_values=expected).logits, **CLOSE)
        assert_same_rows(cache, expected, model.config)
        counts.append(counter.frame_count)
    assert counts[-1] <= counts[1]
