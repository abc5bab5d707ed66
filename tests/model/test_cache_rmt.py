"""The laws of the state: cuts, pads, rows, documents, gradients, size, purity; and the verbs of RMTCache."""

import itertools
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import (
    CLOSE,
    FORMS,
    LENGTH,
    PROMPTS,
    C,
    S,
    assert_same_row,
    assert_same_rows,
    every_form,
    pad_left,
    prompts,
    read,
    tiny_config,
    tiny_ids,
    tiny_model,
)
from rmt_hf import RMTCache


# Law 1, cuts.

SIZES = [1, 3, C, 7, S, S + 1, 2 * S + 5, LENGTH]


@every_form
@pytest.mark.parametrize(
    ("size", "with_gradients"), [*((size, False) for size in SIZES), *((size, True) for size in (1, S + 1, LENGTH))]
)
def test_any_size_of_call_gives_the_same(models, form, size, with_gradients):
    model, ids = models[form], tiny_ids(2, LENGTH)
    with torch.set_grad_enabled(with_gradients):
        at_once, expected = read(model, ids)
        logits, cache = read(model, ids, [size] * ((LENGTH - 1) // size))
        if size == LENGTH:
            logits = model(ids, use_cache=False).logits
    torch.testing.assert_close(logits, at_once, **CLOSE)
    assert_same_rows(cache, expected, model.config)


@every_form
def test_of_equal_tokens_the_same_is_kept_in_any_call(models, form):
    """In the first layer a learned score is one of the token alone, so that text is full of equal ones."""
    model, ids = models[form], tiny_ids(2, LENGTH) % 3 + 3
    with torch.no_grad():
        at_once, expected = read(model, ids)
        for cuts in ((1,) * (LENGTH - 1), (S + 3, 1, 2 * S), (5, 1, 1, S + 1)):
            logits, cache = read(model, ids, cuts)
            torch.testing.assert_close(logits, at_once, **CLOSE)
            assert_same_rows(cache, expected, model.config)


@every_form
@settings(max_examples=25)
@given(data=st.data())
def test_any_cuts_pads_and_neighbours_give_what_each_row_gives_alone(models, form, data):
    model = models[form]
    sizes = data.draw(st.lists(st.sampled_from([1, 2, 3, 5, S, S + 3, 2 * S + 1, 21]), min_size=1, max_size=5))
    num_rows = data.draw(st.integers(1, 3))
    row_masks = st.lists(st.booleans(), min_size=sum(sizes), max_size=sum(sizes)) | st.just([True] * sum(sizes))
    mask = torch.tensor(data.draw(st.lists(row_masks, min_size=num_rows, max_size=num_rows)))
    ids = tiny_ids(*mask.shape)
    with torch.no_grad():
        logits, cache = read(model, ids, sizes[:-1], mask=mask)
        for row, is_real in enumerate(mask):
            assert cache.positions[row] == is_real.sum()
            if is_real.any():
                alone, expected = read(model, ids[row : row + 1, is_real])
                torch.testing.assert_close(logits[row, is_real], alone[0], **CLOSE)
                assert_same_row(cache, row, expected, 0, model.config)


@every_form
def test_columns_of_the_window_at_or_after_the_clock_mean_nothing(models, form):
    model, ids = models[form], tiny_ids(2, 5 * S)
    mask = torch.ones_like(ids)
    mask[1, : S + 3] = 0  # rows at different places, so that masks are made
    with torch.no_grad():
        _, cache = read(model, ids[:, : 3 * S + 2], mask=mask[:, : 3 * S + 2])
        poisoned = cache.clone()
        for layer in poisoned.layers:
            for row, position in enumerate(poisoned.positions):
                first_free = (model.config.num_lookback_segments + 1) * S + position % S
                for tensor in layer.state[:2]:
                    tensor[row, :, model.config.prefix_length + first_free :] = 1e3
                layer.state.scores[row, first_free:] = 1e3
                length = layer.state.queries.shape[2] // 2
                layer.state.queries[row, :, length + max(0, position % S - S + length) :] = 1e3
        for size in (1, 2, 5, S + 1):
            expected, _ = read(model, ids[:, -size:], cache=cache.clone())
            logits, _ = read(model, ids[:, -size:], cache=poisoned.clone())
            torch.testing.assert_close(logits, expected, **CLOSE)


MODES = {"gradients": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


@pytest.mark.parametrize("before", [3, S + 3])
@pytest.mark.parametrize(
    ("first", "then"),
    # From inference mode to gradients PyTorch itself forbids.
    [(first, then) for first in MODES for then in MODES if (first, then) != ("inference_mode", "gradients")],
)
def test_a_stream_can_go_on_in_another_mode(models, first, then, before):
    model, ids = models["gated select"], tiny_ids(2, 4 * S)
    expected = model(ids).logits
    with MODES[first]():
        _, cache = read(model, ids[:, :before])
    with MODES[then]():
        logits, _ = read(model, ids[:, before:], (1, 1, 3), cache)
    torch.testing.assert_close(logits, expected[:, before:], **CLOSE)


# Law 2, pads.

PADDINGS = {
    "left": "..........xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
    "right": "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx..........",
    "both": ".....xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx.....",
    "holes": ".xxxx.xxxxxx...xxxxxxxxx.xxxxxx..xxxxxx..",
}
padding = pytest.mark.parametrize("padding", PADDINGS)


def padded(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of ids and their mask: one padded as named, one without padding."""
    mask = torch.tensor([[column == "x" for column in PADDINGS[name]], [True] * len(PADDINGS[name])])
    return tiny_ids(*mask.shape, seed=1), mask


@every_form
@padding
@pytest.mark.parametrize("cuts", [(), (3, S + 1, 1, 1, 2)])
def test_padding_is_as_if_it_were_not_there(models, form, padding, cuts):
    model, (ids, mask) = models[form], padded(padding)
    with torch.no_grad():
        logits, cache = read(model, ids, cuts, mask=mask)
        alone, expected = read(model, ids[:1, mask[0]])
        after, _ = read(model, ids[:1, :5], cache=expected)
        logits_after, _ = read(model, ids[[0, 0], :5], cache=cache)
    torch.testing.assert_close(logits[:1, mask[0]], alone, **CLOSE)
    assert cache.positions == [31 + 5, 41 + 5]
    assert cache.get_seq_length() == 41 + 5  # columns, as `generate` counts them
    torch.testing.assert_close(logits_after[:1], after, **CLOSE)


@padding
def test_what_stands_at_padding_does_not_matter(models, padding):
    model, (ids, mask) = models["gated select"], padded(padding)
    embeds = model.get_input_embeddings()(ids).detach()
    poisoned = torch.where(mask[..., None], embeds, torch.nan)
    with torch.no_grad():
        expected, state = read(model, ids, (S + 3,), mask=mask)
        for pad_id in (0, 2, 66):
            logits, _ = read(model, ids.where(mask, pad_id), (S + 3,), mask=mask)
            assert torch.equal(logits[mask], expected[mask])
        outputs = model(inputs_embeds=poisoned, attention_mask=mask, use_cache=True)
    torch.testing.assert_close(outputs.logits[mask], expected[mask], **CLOSE)
    outputs.past_key_values.history = state.history  # embeddings have no ids
    assert_same_rows(outputs.past_key_values, state, model.config)


@every_form
def test_calls_with_and_without_gradients_follow_each_other(models, form):
    """Over a segment end; no tensor of the state is a view that the next call would spoil."""
    model = models[form]
    for modes in itertools.product([False, True], repeat=4):
        cache = RMTCache(model.config)
        for size, mode in zip((S - 3, 2, 1, 1), modes, strict=True):
            with torch.set_grad_enabled(mode):
                model(tiny_ids(1, size, seed=size), past_key_values=cache)
            assert all(tensor[0].numel() >= 0 for tensor in cache.tensors())  # looking at them raises if they are


@padding
def test_padding_need_not_even_be_finite(padding):
    model, (ids, mask) = tiny_model(), padded(padding)
    ids[ids == 0] = 3
    expected, _ = read(model, ids, (S + 3,), mask=mask)
    expected[mask].square().sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.get_input_embeddings().weight.data[0] = torch.nan
    logits, _ = read(model, ids.where(mask, 0), (S + 3,), mask=mask)
    logits[mask].square().sum().backward()
    assert torch.equal(logits[mask], expected[mask])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, gradients[name]), name


@every_form
@padding
def test_no_gradient_reaches_padding(models, form, padding):
    model, (ids, mask) = models[form], padded(padding)
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    cache = RMTCache(model.config)
    for columns in (slice(0, S + 3), slice(S + 3, None)):
        outputs = model(inputs_embeds=embeds[:, columns], attention_mask=mask[:, columns], past_key_values=cache)
    (gradient,) = torch.autograd.grad(outputs.logits[mask[:, columns]].sum(), embeds)
    assert torch.equal(gradient[~mask], torch.zeros_like(gradient[~mask]))
    assert (gradient[mask].abs().amax(-1) > 0).any()


@every_form
def test_a_call_of_nothing_but_padding_changes_nothing(models, form):
    model, ids = models[form], tiny_ids(2, 3 * S)
    with torch.no_grad():
        for before in (0, S - 1, S, 2 * S + 3):
            for columns in (1, 3, S + 2):
                _, cache = read(model, ids[:, :before]) if before else (None, RMTCache(model.config))
                nothing = torch.zeros(2, columns, dtype=torch.bool)
                _, after = read(model, ids[:, :columns], cache=cache.clone(), mask=nothing)
                assert after.positions == [before, before]
                assert after.get_seq_length() == before + columns
                if before:
                    assert_same_rows(after, cache, model.config, rtol=0, atol=0)
                expected, _ = read(model, ids, cache=cache)
                logits, _ = read(model, ids, cache=after)
                torch.testing.assert_close(logits, expected, **CLOSE)


def test_a_mask_may_cover_the_columns_read_before(models):
    model, (ids, mask) = models["gated select"], padded("holes")
    with torch.no_grad():
        expected, _ = read(model, ids, (S + 3,), mask=mask)
        cache = read(model, ids[:, : S + 3], mask=mask[:, : S + 3])[1]
        logits = model(ids[:, S + 3 :], attention_mask=mask.long(), past_key_values=cache).logits
    assert torch.equal(logits, expected[:, S + 3 :])


# Law 3, rows.


@every_form
def test_a_left_padded_batch_is_its_rows_also_when_they_go_on(models, form):
    model, batch = models[form], pad_left(prompts())
    with torch.no_grad():
        logits, cache = read(model, batch["input_ids"], mask=batch["attention_mask"])
        assert cache.positions == list(PROMPTS)
        states = []
        for row, prompt in enumerate(prompts()):
            alone, state = read(model, prompt[None])
            torch.testing.assert_close(logits[row, batch["attention_mask"][row]], alone[0], **CLOSE)
            states.append(state)
        # Steps, at which some rows end their segment and others do not, and then a call across segment ends.
        for size in (1, 1, 1, 3, 7):
            more = tiny_ids(len(PROMPTS), size, seed=size)
            logits, cache = read(model, more, cache=cache)
            for row, state in enumerate(states):
                alone, _ = read(model, more[row : row + 1], cache=state)
                torch.testing.assert_close(logits[row], alone[0], **CLOSE)
                assert_same_row(cache, row, state, 0, model.config)


@every_form
def test_rows_do_not_depend_on_their_order_or_their_neighbours(models, form):
    model, order = models[form], torch.tensor([3, 0, 4, 1, 2])
    batch, more = pad_left(prompts()), tiny_ids(len(PROMPTS), S + 5, seed=2)
    with torch.no_grad():
        _, cache = read(model, batch["input_ids"], mask=batch["attention_mask"])
        _, permuted = read(model, batch["input_ids"][order], mask=batch["attention_mask"][order])
        assert_same_rows(permuted, cache, model.config, order.tolist())
        logits, cache = read(model, more, (2, 2), cache=cache)
        permuted_logits, permuted = read(model, more[order], (2, 2), cache=permuted)
        torch.testing.assert_close(permuted_logits, logits[order], **CLOSE)
        assert_same_rows(permuted, cache, model.config, order.tolist())
        more[1:] = tiny_ids(len(PROMPTS) - 1, S + 5, seed=9)  # other neighbours for row 0
        other = {name: tensor.clone() for name, tensor in batch.items()}
        other["input_ids"][1:] = other["input_ids"][1:].flip(1)
        _, cache = read(model, other["input_ids"], mask=batch["attention_mask"])
        assert torch.equal(read(model, more, (2, 2), cache=cache)[0][0], logits[0])


# Law 4, documents.


@every_form
def test_after_a_reset_the_state_is_as_new(models, form):
    model, ids, document = models[form], tiny_ids(2, LENGTH), tiny_ids(2, 4 * S + 3, seed=5)
    with torch.no_grad():
        expected, new = read(model, document, (S + 1, 2))
        _, cache = read(model, ids)
        cache.reset()
        assert (cache.positions, cache.get_seq_length(), cache.batch_size, cache.nbytes) == ([], 0, -1, 0)
        assert not cache.is_initialized
        logits, cache = read(model, document, (S + 1, 2), cache=cache)
    assert torch.equal(logits, expected)
    assert_same_rows(cache, new, model.config, rtol=0, atol=0)
    cache.reset()
    assert read(model, document[:1, :3], cache=cache)[1].batch_size == 1  # the batch size is free again


@every_form
@pytest.mark.parametrize("cuts", [(), (1, 1, 1, 1), (S + 3, 2)])
def test_one_row_can_begin_a_document_while_the_others_go_on(models, form, cuts):
    model, ids, more = models[form], tiny_ids(3, LENGTH), tiny_ids(3, 6 * S + 3, seed=5)
    with torch.no_grad():
        _, cache = read(model, ids)
        not_reset, expected = read(model, more, cuts, cache=cache.clone())
        alone, new = read(model, more[1:2], cuts)
        cache.reset(rows=torch.tensor([False, True, False]))
        assert cache.positions == [LENGTH, 0, LENGTH]
        for layer in cache.layers:
            for memory in layer.state[4:]:
                assert (memory.strengths[1] == -torch.inf).all()
                assert (memory.strengths[[0, 2]] > -torch.inf).all()
        logits, cache = read(model, more, cuts, cache=cache)
    torch.testing.assert_close(logits[1], alone[0], **CLOSE)
    torch.testing.assert_close(logits[[0, 2]], not_reset[[0, 2]], **CLOSE)
    for row, (other, other_row) in enumerate([(expected, 0), (new, 0), (expected, 2)]):
        assert_same_row(cache, row, other, other_row, model.config)


@every_form
@pytest.mark.parametrize("cuts", [(), (1, 1, S + 3)])
def test_the_gradient_across_a_reset_is_exactly_zero(models, form, cuts):
    model = models[form]
    embeds = model.get_input_embeddings()(tiny_ids(2, 4 * S + 3)).detach().requires_grad_()
    cache = model(inputs_embeds=embeds, use_cache=True).past_key_values
    cache.reset(rows=torch.tensor([True, False]))
    logits, _ = read(model, tiny_ids(2, 3 * S, seed=5), cuts, cache=cache)
    (gradient,) = torch.autograd.grad(logits.square().sum(), embeds)
    assert torch.equal(gradient[0], torch.zeros_like(gradient[0]))
    assert gradient[1].abs().max() > 1e-3


@pytest.mark.parametrize("rows", [torch.tensor([True]), torch.tensor([1, 0])])
def test_rows_to_reset_are_named_by_a_mask(models, rows):
    with torch.no_grad():
        _, cache = read(models["gated select"], tiny_ids(2, 5))
    with pytest.raises(ValueError, match=re.escape("rows must be a bool tensor of shape (2,)")):
        cache.reset(rows=rows)


# Law 5, gradients.

WRITES = ["select", "mean"]


def faithful_model(**fields):
    """A model whose gates neither keep nor replace exactly, so that every segment ever written lives on in memory."""
    model = tiny_model(**fields)
    for name, parameter in model.named_parameters():
        if name.endswith(("gate_weight", "gate_bias")):
            parameter.data *= 0.1
    return model


def reach(model, num_segments: int, cuts=()) -> torch.Tensor:
    """Largest gradient of the last logits with respect to the embeddings of each segment."""
    embeds = model.get_input_embeddings()(tiny_ids(1, num_segments * S)).detach().requires_grad_()
    cache, start = RMTCache(model.config), 0
    for size in [*cuts, num_segments * S - sum(cuts)]:
        logits = model(inputs_embeds=embeds[:, start : start + size], past_key_values=cache).logits
        start += size
    (gradient,) = torch.autograd.grad(logits[:, -1].square().sum(), embeds)
    return gradient.unflatten(1, (num_segments, S)).abs().amax((0, 2, 3))


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("cuts", [(), (S + 3, 1, 2 * S, 5 * S, S - 4)])
def test_the_gradient_reaches_every_segment_that_memory_holds(write, cuts):
    assert (reach(faithful_model(memory_write=write), 14, cuts) > 1e-9).all()


def test_without_memory_the_gradient_ends_with_the_windows_of_the_layers():
    gradient = reach(faithful_model(num_memory_slots=0), 14)
    assert (gradient > 0).tolist() == [False] * 11 + [True] * 3  # two layers, one segment of lookback each


@pytest.mark.parametrize("lookback", [0, 1])
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("cuts", [(S, S, S), (3, 1, 1, S + 3, 2 * S), (5 * S + 1, 1, 1, 1, 3)])
def test_the_gradient_through_the_state_is_the_gradient_of_one_call(write, cuts, lookback):
    model = tiny_model(memory_write=write, num_lookback_segments=lookback)
    ids, weight = tiny_ids(2, 7 * S + 1), torch.randn(7 * S + 1, 67, dtype=torch.float64)

    def gradients(sizes) -> list[torch.Tensor]:
        logits, _ = read(model, ids, sizes)
        return torch.autograd.grad((logits * weight).sum(), list(model.parameters()))

    names = [name for name, _ in model.named_parameters()]
    for name, got, want in zip(names, gradients(cuts), gradients(()), strict=True):
        # Gradients here are sums of 10,000 terms up to 10 in size.
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@every_form
@pytest.mark.parametrize("cuts", [(), (1, 1, S + 3)])
def test_detach_cuts_the_gradient_exactly_and_changes_no_result(models, form, cuts):
    model, more = models[form], tiny_ids(2, 3 * S, seed=5)
    embeds = model.get_input_embeddings()(tiny_ids(2, 4 * S + 3)).detach().requires_grad_()

    def go_on(detach: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        cache = model(inputs_embeds=embeds, use_cache=True).past_key_values
        if detach:
            assert cache.detach() is cache
            assert not any(tensor.requires_grad for layer in cache.layers for tensor in layer.state.tensors())
        logits, _ = read(model, more, cuts, cache=cache)
        return logits, torch.autograd.grad(logits.square().sum(), embeds, allow_unused=True)[0]

    (attached, gradient), (detached, nothing) = go_on(False), go_on(True)
    assert nothing is None
    assert gradient.abs().max() > 1e-3
    assert torch.equal(attached, detached)


@pytest.mark.parametrize("first", [3, S + 3])
def test_what_was_detached_can_be_read_on_before_the_backward_pass(first):
    model, ids = tiny_model(num_key_value_heads=4), tiny_ids(2, 3 * S)  # attention keeps keys as they are, not repeated
    gradients = []
    for read_on in (False, True):
        _, cache = read(model, ids[:, :first])
        logits, cache = read(model, ids[:, first : first + 1], cache=cache)
        cache.detach()
        if read_on:
            with torch.no_grad():  # may write in place, but not into what the backward pass needs
                read(model, ids[:, first + 1 : first + 2], cache=cache)
        gradients += torch.autograd.grad(logits.square().sum(), model.get_input_embeddings().weight)
    assert torch.equal(*gradients)


# Law 7, size.


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_bytes_do_not_depend_on_the_length_of_the_stream(form, dtype):
    model = tiny_model(dtype=dtype, **FORMS[form])
    config, rows = model.config, 3
    item, wide = dtype.itemsize, max(4, dtype.itemsize)  # scores and strengths are float32 or wider
    heads, width, slots = config.num_key_value_heads, config.head_dim, config.num_memory_slots
    uses_score, uses_evidence = (any(part[which] for part in config.memory_parts) for which in (1, 2))
    # The segments that a token sees and one more, for a rewind; the prefix; queries of the last tokens of two segments.
    columns = (config.num_lookback_segments + 2) * S
    per_row = (columns + config.prefix_length) * 2 * heads * width * item + columns * heads * wide * uses_score
    per_row += 2 * config.num_observing_tokens * config.num_attention_heads * width * item * uses_evidence
    # Key, value, strength and position of each slot, and of those that the last write has met, for a rewind.
    slots += config.num_slots_per_segment * len(config.memory_parts)
    per_row += slots * heads * (2 * width * item + wide + 8)
    cache = RMTCache(config)
    assert cache.nbytes == 0
    with torch.no_grad():
        for size in (1, S - 1, 1, S, 3 * S + 1, 10 * S + 5):
            read(model, tiny_ids(rows, size), cache=cache)
            # And for the whole state, the ids of the last S columns, and a hash of all.
            assert cache.nbytes == rows * (config.num_hidden_layers * per_row + 8 * (S + 1))
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in cache.tensors()}
    assert sum(storages.values()) == cache.nbytes  # nothing bigger is kept alive behind a view


# Law 8, purity.


def snapshot(model) -> dict:
    """Every attribute of every module: tensors and objects by identity, containers by what they hold."""

    def inside(value):
        if isinstance(value, dict):
            return {key: inside(item) for key, item in value.items()}
        return [inside(item) for item in value] if isinstance(value, list | tuple | set) else id(value)

    return {name: inside(module.__dict__) for name, module in model.named_modules()}


@every_form
def test_modules_hold_no_state(form):
    model, ids = tiny_model(**FORMS[form]), tiny_ids(2, LENGTH)
    attributes = snapshot(model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    buffers = {name: tensor.clone() for name, tensor in model.named_buffers()}
    read(model, ids, (3, S, 1))
    with torch.no_grad():
        first, _ = read(model, ids, (3, S, 1))
        read(model, ids[:1], (S + 1, 1, 1))
        second, _ = read(model, ids, (3, S, 1))
    assert torch.equal(first, second)
    assert snapshot(model) == attributes
    for before, after in ((weights, model.state_dict()), (buffers, dict(model.named_buffers()))):
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_two_threads_can_generate_on_one_model():
    model = tiny_model()
    model.generation_config.eos_token_id = None  # both must take the same number of steps
    inputs = [tiny_ids(1, 3 * S + 5, seed=1), tiny_ids(1, 3 * S + 5, seed=2)]

    def generate(ids: torch.Tensor) -> torch.Tensor:
        return model.generate(ids, max_new_tokens=2 * S, do_sample=False)

    alone = [generate(ids) for ids in inputs]
    assert not torch.equal(alone[0][:, -S:], alone[1][:, -S:])
    barrier = threading.Barrier(2)  # each waits in the middle of every call until the other is there, too

    def wait(*_) -> None:
        barrier.wait(timeout=60)

    hook = model.model.layers[1].register_forward_pre_hook(wait)
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(generate, inputs))
    hook.remove()
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


@every_form
@pytest.mark.parametrize("before", [0, 5, S, 3 * S + 5])
@pytest.mark.parametrize("columns", [2, 3, 2 * S + 1])
def test_a_call_that_fails_leaves_the_state_as_it_was(models, form, before, columns):
    model, ids = models[form], tiny_ids(2, before + columns)
    with torch.no_grad():
        cache = read(model, ids[:, :before])[1] if before else RMTCache(model.config)
        kept = cache.clone()

        def fail(*_):
            raise KeyboardInterrupt

        hook = model.model.layers[-1].mlp.register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, before:], past_key_values=cache)
        hook.remove()
        with pytest.raises(ValueError, match="input_ids must lie in"):
            model(ids[:, before:] + 1000, past_key_values=cache)
        assert (cache.positions, cache.get_seq_length()) == (kept.positions, before)
        if before:
            assert_same_rows(cache, kept, model.config, rtol=0, atol=0)
        expected, _ = read(model, ids[:, before:], cache=kept)
        assert torch.equal(read(model, ids[:, before:], cache=cache)[0], expected)


# The verbs.


@pytest.fixture
def ragged(models) -> tuple:
    """A model, and the state of rows at different places of their streams."""
    model, batch = models["gated select"], pad_left(prompts())
    with torch.no_grad():
        return model, read(model, batch["input_ids"], mask=batch["attention_mask"])[1]


def go_on(model, cache: RMTCache, rows: list[int]) -> torch.Tensor:
    """Logits of more tokens, each row of `cache` reading what belongs to the original row it is."""
    with torch.no_grad():
        return read(model, tiny_ids(len(PROMPTS), S + 5, seed=2)[rows], (1, 2), cache=cache)[0]


def test_a_clone_and_its_original_are_independent(ragged):
    model, cache = ragged
    mine, other = tiny_ids(len(PROMPTS), 5, seed=3), tiny_ids(len(PROMPTS), 5, seed=4)
    with torch.no_grad():
        read(model, mine[:, :1], cache=cache)  # no row ends its segment next, which would make it write elsewhere
        expected = read(model, mine, (1, 1), cache=cache.clone())[0]
        clone = cache.clone()
        assert (clone.positions, clone.get_seq_length(), clone.nbytes) == (cache.positions, 5 * S + 2, cache.nbytes)
        logits = []
        for column in range(5):  # turn by turn, because the model writes in place what lies after the clock
            logits.append(read(model, mine[:, column : column + 1], cache=cache)[0])
            read(model, other[:, column : column + 1], cache=clone)
        torch.testing.assert_close(torch.cat(logits, 1), expected, **CLOSE)
        assert clone.positions == cache.positions == [length + 6 for length in PROMPTS]
        cache.reset(rows=torch.tensor([True] * len(PROMPTS)))
        assert clone.positions == [length + 6 for length in PROMPTS]
        empty = RMTCache(model.config)
        read(model, mine[:1], cache=empty.clone())
        assert not empty.is_initialized


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([4, 0, 0, 3, 2])), [4, 0, 0, 3, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 4])), [2, 4]),
        (lambda cache: cache.batch_select_indices(torch.tensor([False, True, True, False, True])), [1, 2, 4]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]),
    ],
    ids=["reorder_cache", "indices", "mask", "repeat"],
)
def test_verbs_on_rows(ragged, change, rows):
    model, cache = ragged
    expected = go_on(model, cache.clone(), list(range(len(PROMPTS))))[rows]
    original = cache.clone()
    change(cache)
    assert cache.batch_size == len(rows)
    assert cache.get_seq_length() == original.get_seq_length()
    assert_same_rows(cache, original, model.config, rows, rtol=0, atol=0)
    torch.testing.assert_close(go_on(model, cache, rows), expected, **CLOSE)


def test_the_state_counts_columns_and_rows(models):
    model, cache = models["gated select"], RMTCache(tiny_config())
    assert (cache.get_seq_length(), cache.batch_size, cache.is_initialized) == (0, -1, False)
    with torch.no_grad():
        for columns, total in ((3, 3), (1, 4), (21, 25)):
            mask = torch.ones(2, columns, dtype=torch.bool)
            mask[0, 0] = False
            read(model, tiny_ids(2, columns), cache=cache, mask=mask)
            assert (cache.get_seq_length(), cache.batch_size, cache.is_initialized) == (total, 2, True)
    assert cache.positions == [22, 25]


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (lambda layer: layer.update(None, None), "is written by the forward pass of an RMT model"),
        (lambda layer: layer.lazy_initialization(None, None), "is filled by the forward pass of an RMT model"),
        (lambda layer: layer.get_mask_sizes(3), "An RMT model builds its own masks"),
        (lambda layer: layer.get_seq_length(), "Ask the RMTCache itself"),
    ],
)
def test_what_other_caches_do_layer_by_layer_says_why_not(misuse, message):
    with pytest.raises(RuntimeError, match=message):
        misuse(RMTCache(tiny_config()).layers[0])


# What was changed between two calls is seen by the next, whether it records gradients or goes on from what is kept.


def go_on_two_ways(model, ids: torch.Tensor, cache: RMTCache, cuts=(1, 1, 1)) -> torch.Tensor:
    """Logits of calls without gradients, after checking that those with gradients give the same."""
    with torch.enable_grad():
        expected, state = read(model, ids, cuts, cache=cache.clone())
    with torch.no_grad():
        logits, cache = read(model, ids, cuts, cache=cache)
    torch.testing.assert_close(logits, expected.detach(), **CLOSE)
    assert_same_rows(cache, state, model.config)
    return logits


CHANGES = {
    "memory": lambda model, cache: cache.edit_memory(lambda slots: slots._replace(values=2 * slots.values)),
    "rows": lambda model, cache: cache.reorder_cache(torch.tensor([1, 0])),
    "tokens rewound": lambda model, cache: cache.crop(-2),
    "one row": lambda model, cache: cache.reset(rows=torch.tensor([False, True])),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("form", ["gated select", "two parts", "paper"])
def test_a_step_sees_what_was_changed_since_the_last(models, form, change):
    model, ids = models[form], tiny_ids(2, 6 * S + 2)
    with torch.no_grad():
        _, cache = read(model, ids[:, :-1], (5 * S + 1, 1))
        before, _ = read(model, ids[:, -1:], cache=cache.clone())
        CHANGES[change](model, cache)
    logits = go_on_two_ways(model, torch.cat([ids[:, -1:], tiny_ids(2, 2 * S, seed=3)], 1), cache)
    assert (logits[:, :1] - before).abs().max() > 1e-3


def test_a_state_goes_on_in_another_dtype(models):
    model, ids = tiny_model(use_attention_sink=True, num_lasting_slots=4), tiny_ids(2, 7 * S)
    with torch.no_grad():
        expected, _ = read(model, ids, (5 * S,))
        _, cache = read(model, ids[:, : 5 * S])
        logits, cache = read(model.to(torch.float32), ids[:, 5 * S :], (1, 1), cache=cache)
    assert cache.state_dtype == logits.dtype == torch.float32
    # Float32 has 7 digits, and logits are below 10. Selection might turn at a rounding; here it does not.
    torch.testing.assert_close(logits.double(), expected[:, 5 * S :], rtol=0, atol=1e-4)


def empty(cache: RMTCache) -> None:
    cache.edit_memory(lambda slots: slots.forget(torch.ones_like(slots.strengths[:, :, 0], dtype=torch.bool)))


@pytest.mark.parametrize("form", [form for form in FORMS if form != "no memory"])
def test_edited_memory_stays_edited_when_tokens_are_taken_back(models, form):
    """Rewound across a segment end, and read again: the same as if the edit had been there before."""
    model, ids, more = models[form], tiny_ids(2, 6 * S + 1), tiny_ids(2, 3 * S, seed=3)

    def edit(cache: RMTCache) -> None:
        cache.edit_memory(lambda slots: slots._replace(values=slots.values * 2, keys=slots.keys - 0.5))

    with torch.no_grad():
        _, early = read(model, ids[:, : 6 * S - 2])
        _, late = read(model, ids)
        edit(early)
        edit(late)
        late.crop(-3)
        not_edited = read(model, ids[:, : 6 * S - 2])[1]
        expected = go_on_two_ways(model, more, early)
        torch.testing.assert_close(go_on_two_ways(model, more, late), expected, **CLOSE)
        assert (read(model, more, cache=not_edited)[0] - expected).abs().max() > 1e-3


@pytest.mark.parametrize("before", [4 * S, 5 * S + 3])
@pytest.mark.parametrize("form", [form for form in FORMS if form != "no memory"])
def test_an_emptied_memory_is_not_seen_and_filled_again(form, before):
    """One layer, so that all of the stream before the window is in memory alone; cut as you like."""
    model, more = tiny_model(num_hidden_layers=1, **FORMS[form]), tiny_ids(3, 7 * S + 3, seed=3)
    recent, results = tiny_ids(3, model.config.num_lookback_segments * S + before % S), []
    for number, cuts in enumerate([(), (1,) * (2 * S), (S + 3, 2, 2 * S)]):
        beginning = tiny_ids(3, before + 4 * S - recent.shape[1], seed=number)  # of another stream each time
        _, cache = read(model, torch.cat([beginning, recent], 1))
        empty(cache)
        logits, cache = read(model, more, cuts, cache=cache)
        results.append((logits, *(tensor for layer in cache.layers for tensor in layer.state.memory)))
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], **CLOSE)
    if model.config.fusion_type == "gated":  # until the next write, a model without memory says the same
        without = tiny_model(num_hidden_layers=1, **FORMS[form] | {"num_memory_slots": 0, "num_lasting_slots": None})
        without.load_state_dict(model.state_dict(), strict=False)
        wanted, _ = read(without, torch.cat([beginning, recent, more[:, : S - before % S]], 1))
        start = before + 4 * S
        torch.testing.assert_close(results[0][0][:, : S - before % S], wanted[:, start:], **CLOSE)
