"""Reading without writing: `memorize`, going on from what was read, and states in the hands of two threads."""

import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from helpers import CLOSE, S, assert_same_rows, every_form, pad_left, prompts, read, tiny_ids, tiny_model
from rmt_hf import RMTCache, RMTForSequenceClassification, RMTModel, modeling_rmt


GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 2 * S}


@pytest.fixture(autouse=True)
def small_calls(monkeypatch) -> None:
    monkeypatch.setattr(modeling_rmt, "MEMORIZE_TOKENS", 5 * S)


@every_form
@pytest.mark.parametrize("length", [1, S, 5 * S, 12 * S + 3])
def test_what_is_memorized_is_what_one_call_reads(models, form, length):
    model, ids = models[form], tiny_ids(1, length)
    _, expected = read(model, ids)
    cache = model.memorize(ids)
    assert not any(tensor.requires_grad for tensor in cache.tensors())
    assert (cache.positions, cache.get_seq_length(), cache.nbytes) == ([length], length, expected.nbytes)
    assert_same_rows(cache, expected, model.config)
    going_on = model.memorize(ids, past_key_values=cache)
    assert going_on is cache and cache.positions == [2 * length]


@every_form
def test_ragged_rows_are_memorized_as_alone(models, form):
    model, batch = models[form], pad_left(prompts())
    cache = model.memorize(**batch)
    for row, prompt in enumerate(prompts()):
        assert_same_rows(cache.split()[row], model.memorize(prompt[None]), model.config)


def test_calls_are_bounded(monkeypatch):
    model, sizes = tiny_model(), []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape))
    monkeypatch.setattr(model.lm_head, "forward", None)  # nobody asks for logits
    model.memorize(tiny_ids(1, 13 * S))
    model.memorize(tiny_ids(3, 3 * S))
    model.memorize(tiny_ids(9, 2 * S))
    assert [tuple(size[:2]) for size in sizes] == [(1, 40), (1, 40), (1, 24), *[(3, 8)] * 3, *[(9, 8)] * 2]


def test_every_model_can_memorize():
    for model_class in (RMTModel, RMTForSequenceClassification):
        model = tiny_model(model_class)
        assert model.memorize(tiny_ids(1, 11 * S)).positions == [11 * S]


def test_progress_is_shown_only_if_asked_for(capsys):
    model = tiny_model()
    model.memorize(tiny_ids(1, 11 * S))
    assert capsys.readouterr().err == ""
    model.memorize(tiny_ids(1, 11 * S), show_progress=True)
    assert re.search(r"Memorizing.*3/3", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.tensor([[3] * 11 * S + [67]])}, r"input_ids must lie in 0 \.\. 66, got 3 \.\. 67"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "none of them empty"),
        (
            {"input_ids": tiny_ids(1, 9), "attention_mask": torch.ones(1, 8)},
            r"shape of input_ids, \(1, 9\), got \(1, 8",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_is_read(arguments, message):
    model = tiny_model()
    cache = model.memorize(tiny_ids(1, 5))
    with pytest.raises(ValueError, match=message):
        model.memorize(**arguments, past_key_values=cache)
    assert cache.positions == [5]


def test_an_interrupted_reading_stands_between_two_calls(monkeypatch):
    model, ids, cache = tiny_model(), tiny_ids(1, 12 * S), RMTCache(tiny_model().config)
    run_layers, calls = model.model._run_layers, []

    def interrupt(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run_layers(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model.model, "_run_layers", interrupt)
        model.memorize(ids, past_key_values=cache)
    at = cache.get_seq_length()
    assert at == 10 * S
    assert_same_rows(model.memorize(ids[:, at:], past_key_values=cache), model.memorize(ids), model.config)


# Going on from what was read


@torch.no_grad()
@pytest.mark.parametrize("question", [1, 3, 2 * S + 1])
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_takes_the_new_tokens_alone(question, beams, tmp_path):
    model, ids = tiny_model(), tiny_ids(1, 9 * S + 3)
    text, asked = ids.split([9 * S + 3 - question, question], 1)
    from_scratch = model.generate(ids, **GREEDY, num_beams=beams)[:, text.shape[1] :]
    model.memorize(text).save_pretrained(tmp_path)
    for _ in range(2):  # the file is asked again and again
        cache = RMTCache.from_pretrained(tmp_path, model)
        if beams > 1:
            cache.batch_repeat_interleave(beams)
        assert torch.equal(model.generate(asked, past_key_values=cache, **GREEDY, num_beams=beams), from_scratch)
        assert cache.positions == [9 * S + 3 + 2 * S]


@torch.no_grad()
def test_turn_after_turn_with_the_new_tokens_alone():
    model, batch = tiny_model(), pad_left(prompts())
    batch = {name: torch.nn.functional.pad(tensor, (S, 0)) for name, tensor in batch.items()}
    cache, ids, mask = model.memorize(**batch), batch["input_ids"], batch["attention_mask"]
    for turn in range(3):
        said = tiny_ids(len(prompts()), 3 + turn, seed=turn)
        said_mask = torch.arange(3 + turn) >= torch.arange(len(prompts()))[:, None] % 3  # padded on the left
        ids, mask = torch.cat([ids, said], 1), torch.cat([mask, said_mask], 1)
        from_scratch = model.generate(ids, attention_mask=mask, **GREEDY)
        answer = model.generate(said, attention_mask=said_mask, past_key_values=cache, **GREEDY)
        assert torch.equal(answer[:, said.shape[1] :], from_scratch[:, ids.shape[1] :])
        ids, mask = from_scratch, torch.nn.functional.pad(mask, (0, 2 * S), value=True)


@torch.no_grad()
def test_a_prompt_longer_than_what_was_read_begins_by_name():
    model, ids = tiny_model(), tiny_ids(1, 5 * S)
    cache = model.memorize(ids[:, :3])
    cache.begin_prompt()
    answer = model.generate(ids[:, 3:], past_key_values=cache, **GREEDY)
    assert torch.equal(answer[:, -2 * S :], model.generate(ids, **GREEDY)[:, -2 * S :])


# Two threads


def test_a_state_in_two_calls_at_once_is_refused():
    model, ids = tiny_model(), tiny_ids(1, 3 * S + 1)
    with torch.no_grad():
        _, cache = read(model, ids[:, :-1])
        expected, _ = read(model, ids[:, -1:], cache=cache.clone())
        inside, go_on = threading.Event(), threading.Event()

        def wait(*_) -> None:
            inside.set()
            assert go_on.wait(timeout=60)

        hook = model.model.layers[1].register_forward_pre_hook(wait)
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(lambda: torch.no_grad()(read)(model, ids[:, -1:], cache=cache)[0])
            assert inside.wait(timeout=60)
            with pytest.raises(
                RuntimeError, match=r"in use by another call.*a state of its own, made with `clone\(\)`"
            ):
                model(ids[:, -1:], past_key_values=cache)
            go_on.set()
            torch.testing.assert_close(first.result(timeout=60), expected, **CLOSE)
        hook.remove()
        assert cache.positions == [3 * S + 1]
        read(model, ids[:, :1], cache=cache)  # and it is free again
