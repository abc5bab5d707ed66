"""`generate` with a state reads what the state has not read, whichever way the prompt is given, and nothing twice."""

import copy

import pytest
import torch

from helpers import CLOSE, S, assert_same_rows, pad_left, tiny_ids, tiny_model
from rmt_hf import RMTCache


GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": S + 3}
SAID = S + 3


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("question", [1, 2, 30])
@pytest.mark.parametrize("read", [1, 3, 10, 5 * S + 2])
def test_a_question_alone_or_after_all_that_was_read(model, read, question):
    text, asked = tiny_ids(1, read, seed=read), tiny_ids(1, question, seed=question + 100)
    everything = torch.cat([text, asked], 1)
    wanted = model.generate(everything, **GREEDY)[:, -SAID:]
    for prompt in (asked, everything):
        state = model.memorize(text)
        assert torch.equal(model.generate(prompt, past_key_values=state, **GREEDY)[:, -SAID:], wanted)
        assert state.positions == [read + question + SAID]


@pytest.mark.parametrize("read", [1, S, 5 * S + 2])
def test_the_same_ids_again_are_not_read_twice(model, read):
    text = tiny_ids(1, read, seed=read)
    state, wanted = model.memorize(text), model.generate(text, **GREEDY)
    assert torch.equal(model.generate(text, past_key_values=state, **GREEDY), wanted)
    assert_same_rows(state, model.memorize(wanted), model.config)


MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True},
    "beams": {"num_beams": 3},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "a draft": {"assistant_model": tiny_model(num_hidden_layers=1)},
    "in slices": {"prefill_chunk_size": 3},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("is_returned", [False, True])
def test_the_next_turn_alone_is_right_after_every_way_to_decode(model, mode, is_returned):
    stream, state = torch.zeros(1, 0, dtype=torch.long), None
    for turn in range(3):
        asked = tiny_ids(1, 4 + turn, seed=turn)
        if not is_returned and state is None:
            state = RMTCache(model.config)
        rows = MODES[mode].get("num_beams", 1)
        if state is not None and state.is_initialized:
            state.batch_repeat_interleave(rows)
        output = model.generate(asked, past_key_values=state, return_dict_in_generate=True, **{**GREEDY, **MODES[mode]})
        state, answer = output.past_key_values, output.sequences[:, asked.shape[1] :]
        stream, more = torch.cat([stream, asked, answer], 1), tiny_ids(1, 3 * S, seed=9)
        wanted = model.memorize(stream)
        assert (state.positions, state.history[0, 0]) == (wanted.positions, wanted.history[0, 0])
        logits, expected = (model(more, past_key_values=each.clone()).logits for each in (state, wanted))
        torch.testing.assert_close(logits, expected, **CLOSE)


@pytest.mark.parametrize("beams", [1, 3])
def test_rows_that_stop_early_read_no_padding(model, beams):
    rows = [tiny_ids(1, length, seed=length)[0] for length in (3, 2 * S + 5, 5 * S + 1)]
    batch, state = pad_left(rows), RMTCache(model.config)
    free = model.generate(**batch, **{**GREEDY, "max_new_tokens": 3 * S})[:, batch["input_ids"].shape[1] :]
    ends = [free[0, 2].item(), free[1, 2 * S].item()]  # two rows stop, and not together
    settings = {**GREEDY, "max_new_tokens": 3 * S, "eos_token_id": ends, "pad_token_id": 0, "num_beams": beams}
    output = model.generate(**batch, past_key_values=state, **settings)
    read = []
    for row, ids in zip(rows, output[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
        length = min([ids.index(end) + 1 for end in ends if end in ids], default=len(ids))
        read.append(torch.cat([row, torch.tensor(ids[:length])]))
    assert len({len(row) - len(said) for row, said in zip(read, rows, strict=True)}) > 1
    assert state.positions == [len(row) for row in read]
    assert_same_rows(state, model.memorize(**pad_left(read)), model.config)


def test_a_whole_conversation_that_is_padded_anew(model):
    rows = [tiny_ids(1, length, seed=length)[0] for length in (3, 2 * S + 5, 5 * S + 1)]
    more = [tiny_ids(1, length, seed=length + 50)[0] for length in (3 * S, 1, 4)]
    state = model.memorize(**pad_left(rows))
    batch = pad_left([torch.cat(pair) for pair in zip(rows, more, strict=True)])
    wanted = model.generate(**batch, **GREEDY)
    assert torch.equal(model.generate(**batch, past_key_values=state, **GREEDY), wanted)
    assert state.positions == [len(row) + len(new) + SAID for row, new in zip(rows, more, strict=True)]


@pytest.mark.parametrize("common", [4 * S + 2, 5 * S - 1])
def test_a_beginning_that_was_changed_is_refused_and_both_ways_are_named(model, common):
    text = tiny_ids(1, 5 * S)
    changed = torch.cat([text[:, :common], (text[:, common : common + 1] + 1) % 60, tiny_ids(1, 9, seed=7)], 1)
    state = model.memorize(text)
    for prompt in (changed, text[:, :common]):
        with pytest.raises(
            ValueError, match=rf"begin with {common} of the {5 * S} .*crop\({common - 5 * S}\).*begin_prompt\(\)"
        ):
            model.generate(prompt, past_key_values=state, **GREEDY)
    assert_same_rows(state, model.memorize(text), model.config)
    first, second = state.clone(), state.clone()
    first.crop(common - 5 * S)
    assert torch.equal(model.generate(changed, past_key_values=first, **GREEDY), model.generate(changed, **GREEDY))
    second.begin_prompt()
    wanted = model.generate(torch.cat([text, changed], 1), **GREEDY)[:, -SAID:]
    assert torch.equal(model.generate(changed, past_key_values=second, **GREEDY)[:, -SAID:], wanted)


def test_a_common_first_token_is_no_beginning(model):
    text, asked = tiny_ids(1, S), tiny_ids(1, 30, seed=5)
    asked[:, 0] = text[:, 0]  # as a begin-of-text token
    wanted = model.generate(torch.cat([text, asked], 1), **GREEDY)[:, -SAID:]
    state = model.memorize(text)
    assert torch.equal(model.generate(asked, past_key_values=state, **GREEDY)[:, -SAID:], wanted)


def test_rows_that_are_given_in_two_ways_are_refused(model):
    text = tiny_ids(2, 5 * S)
    state, prompt = model.memorize(text), torch.cat([text, tiny_ids(2, 3, seed=4)], 1)
    prompt[1] = tiny_ids(1, 5 * S + 3, seed=9)[0]
    with pytest.raises(ValueError, match=r"some rows begin with what the state has read.*begin_prompt\(\)"):
        model.generate(prompt, past_key_values=state, **GREEDY)


def test_a_mask_over_all_columns_says_that_the_ids_are_new(model):
    text = tiny_ids(1, 6)
    state, prompt = model.memorize(text), torch.cat([text, tiny_ids(1, 3, seed=4)], 1)
    wanted = model.generate(torch.cat([text, prompt], 1), **GREEDY)[:, -SAID:]
    mask = torch.ones(1, 6 + prompt.shape[1], dtype=torch.long)
    answer = model.generate(prompt, attention_mask=mask, past_key_values=state, **GREEDY)
    assert torch.equal(answer[:, -SAID:], wanted)


def test_embeddings_of_a_question(model):
    text, asked = tiny_ids(1, 5 * S), tiny_ids(1, 5, seed=1)
    wanted, state = model.generate(torch.cat([text, asked], 1), **GREEDY)[:, -SAID:], model.memorize(text)
    embeds = model.get_input_embeddings()(asked)
    with pytest.raises(ValueError, match=r"inputs_embeds must be new.*begin_prompt\(\)"):
        model.generate(inputs_embeds=embeds, past_key_values=state, **GREEDY)
    named = copy.deepcopy(state)
    named.begin_prompt()
    mask = torch.ones(1, 5 * S + 5, dtype=torch.long)
    assert torch.equal(model.generate(inputs_embeds=embeds, past_key_values=named, **GREEDY), wanted)
    answer = model.generate(inputs_embeds=embeds, attention_mask=mask, past_key_values=state, **GREEDY)
    assert torch.equal(answer, wanted) and state.positions == named.positions == [5 * S + 5 + SAID]
    # What was read as embeddings is never taken for ids.
    again = model.generate(asked, past_key_values=state, **GREEDY)[:, -SAID:]
    stream = torch.cat([text, asked, wanted, asked], 1)
    assert torch.equal(again, model.generate(stream, **GREEDY)[:, -SAID:])


@pytest.mark.parametrize("mask", [[[1, 1, 1], [1, 1, 0]], [[1, 1, 1], [0, 0, 0]]])
def test_padding_at_the_end_of_a_prompt_is_refused(model, mask):
    with pytest.raises(ValueError, match=r"attention_mask must be 1 in the last column.*padding_side"):
        model.generate(tiny_ids(2, 3), attention_mask=torch.tensor(mask), **GREEDY)
