"""Law 6: a state that takes tokens back is the state of a stream that never had them."""

import re

import pytest
import torch

from helpers import CLOSE, LENGTH, C, S, assert_same_row, every_form, pad_left, prompts, read, segments_alone, tiny_ids
from rmt_hf import RMTCache, RMTConfig


MORE = 5 * S + 3  # tokens read after the rewind: every segment of the window and both memories are new then


def assert_same_memory(cache: RMTCache, row: int, expected: RMTCache, config: RMTConfig) -> None:
    """What attention will read of a row: its window without the segment that is only kept for a rewind, and memory."""
    position, lookback = cache.positions[row], config.num_lookback_segments
    assert position == expected.positions[0]
    first = S * (1 + max(0, lookback - position // S))
    live = slice(first, (lookback + 1) * S + position % S)
    for ours, theirs in zip(cache.layers, expected.layers, strict=True):
        for got, want in zip(ours.state[:2], theirs.state[:2], strict=True):
            got, want = (segments_alone(states, config) for states in (got, want))
            torch.testing.assert_close(got[row, :, live], want[0, :, live], **CLOSE)
        torch.testing.assert_close(ours.state.scores[row, live], theirs.state.scores[0, live], **CLOSE)
        for got, want in zip(ours.state.memory, theirs.state.memory, strict=True):
            torch.testing.assert_close(got[row], want[0], **CLOSE)


@every_form
@pytest.mark.parametrize(
    ("columns", "with_gradients"), [*((columns, False) for columns in (1, 3, C, S - 1, S)), (3, True), (S, True)]
)
def test_the_tokens_were_never_there(models, form, columns, with_gradients):
    model = models[form]
    for before in (S, 3 * S + 5, LENGTH):
        ids, more = tiny_ids(2, before), tiny_ids(2, MORE, seed=7)
        cuts, further = ((), (1, 1, S)) if before == LENGTH else ((before - 4, 1, 2), (3, 2 * S))
        with torch.set_grad_enabled(with_gradients):
            _, cache = read(model, ids, cuts)
            assert cache.crop(-columns) is None
            _, expected = read(model, ids[:, : before - columns]) if before > columns else (None, None)
            assert cache.positions == [before - columns] * 2 and cache.get_seq_length() == before - columns
            for row, alone in enumerate(expected.split() if expected else []):
                assert_same_memory(cache, row, alone, model.config)
            logits, cache = read(model, more, further, cache=cache)
            wanted, expected = read(model, more, cache=expected or RMTCache(model.config))
        torch.testing.assert_close(logits, wanted, **CLOSE)
        for row in range(2):
            assert_same_row(cache, row, expected, row, model.config)


@every_form
@pytest.mark.parametrize("columns", [2, S])
def test_the_gradient_is_that_of_a_stream_that_never_had_them(models, form, columns):
    model = models[form]
    embeds = model.get_input_embeddings()(tiny_ids(2, 4 * S + 1)).detach().requires_grad_()

    def gradient(length: int, taken_back: int) -> torch.Tensor:
        cache = model(inputs_embeds=embeds[:, :length], use_cache=True).past_key_values
        cache.crop(-taken_back)
        logits, _ = read(model, tiny_ids(2, MORE, seed=7), (1, 2), cache=cache)
        return torch.autograd.grad(logits.square().sum(), embeds)[0]

    got, want = gradient(4 * S + 1, columns), gradient(4 * S + 1 - columns, 0)
    # Sums of 10,000 terms up to 10 in size.
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert got[:, : 4 * S + 1 - columns].abs().amax() > 1e-3 and not got[:, 4 * S + 1 - columns :].any()


@every_form
@pytest.mark.parametrize("columns", [1, 3, C, S - 1, S])
def test_ragged_rows_and_padding_among_what_is_taken_back(models, form, columns):
    """Left-padded prompts, then columns of which every row pads others: each row takes back its own tokens only."""
    model, batch = models[form], pad_left(prompts())
    rows = len(prompts())
    tail, more = tiny_ids(rows, S + 2, seed=3), tiny_ids(rows, MORE, seed=7)
    tail_mask = torch.tensor([[(column + row) % (row + 2) > 0 for column in range(S + 2)] for row in range(rows)])
    with torch.no_grad():
        _, cache = read(model, batch["input_ids"], mask=batch["attention_mask"])
        read(model, tail, (1, 1, 4), cache=cache, mask=tail_mask)
        cache.crop(-columns)
        kept = S + 2 - columns
        streams = [torch.cat([p, tail[i, :kept][tail_mask[i, :kept]]]) for i, p in enumerate(prompts())]
        assert cache.positions == [len(stream) for stream in streams]
        expected = [read(model, stream[None])[1] for stream in streams]
        for row, alone in enumerate(expected):
            assert_same_memory(cache, row, alone, model.config)
        logits, cache = read(model, more, (1, 3, S), cache=cache)
        for row, alone in enumerate(expected):
            wanted, alone = read(model, more[row : row + 1], cache=alone)
            torch.testing.assert_close(logits[row : row + 1], wanted, **CLOSE)
            assert_same_row(cache, row, alone, 0, model.config)


@every_form
def test_again_and_again(models, form):
    """As assisted generation does it: a few tokens forward, some of them back."""
    model, ids = models[form], tiny_ids(1, 4 * S)
    with torch.no_grad():
        wanted, _ = read(model, ids)
        logits, cache = read(model, ids[:, :3])
        position = 3
        for step in range(100):
            forward, back = 1 + step % 7, step * 5 % (2 + step % 7)
            forward = min(forward, ids.shape[1] - position)
            if not forward:
                break
            right = ids[:, position : position + forward - back] if forward > back else ids[:, :0]
            guess = torch.cat([right, tiny_ids(1, forward, seed=step)[:, : forward - right.shape[1]]], 1)
            guessed = model(guess, past_key_values=cache).logits[:, : right.shape[1]]
            logits = torch.cat([logits, guessed], 1)
            cache.crop(right.shape[1] - forward)
            position += right.shape[1]
    assert position == ids.shape[1]
    torch.testing.assert_close(logits, wanted, **CLOSE)


def test_a_segment_and_no_more(models):
    model, ids = models["gated select"], tiny_ids(2, 5 * S + 3)
    with torch.no_grad():
        _, cache = read(model, ids)

        def refuses(columns: int, available: int) -> None:
            kept, tensors = list(cache.positions), [tensor.clone() for tensor in cache.tensors()]
            message = f"RMTCache.crop({-columns}): {available} columns can be rewound now, and never more than"
            with pytest.raises(RuntimeError, match=re.escape(message) + r" segment_length \(8\)\. Keep a `clone\(\)`"):
                cache.crop(-columns)
            assert cache.positions == kept and all(map(torch.equal, cache.tensors(), tensors))

        refuses(S + 1, S)
        cache.crop(-3)
        refuses(S - 2, S - 3)
        cache.crop(3 - S)
        refuses(1, 0)
        cache.crop(0)
        read(model, ids[:, :2], cache=cache)
        refuses(3, 2)
        cache.crop(-2)
        assert cache.positions == [4 * S + 3] * 2
    with pytest.raises(ValueError, match=r"tokens_to_remove must be 0 or below, got 3: crop\(-n\)"):
        cache.crop(3)
    cache = RMTCache(model.config)
    cache.crop(0)
    with pytest.raises(RuntimeError, match=r"crop\(-1\): 0 columns can be rewound now"):
        cache.crop(-1)


def test_what_a_row_forgot_stays_forgotten(models):
    model, ids, more = models["gated select"], tiny_ids(2, 3 * S), tiny_ids(2, S - 1, seed=4)
    with torch.no_grad():
        _, cache = read(model, ids)
        cache.reset(rows=torch.tensor([True, False]))
        read(model, more[:, :2], cache=cache)
        cache.crop(-S)  # two columns of the new document, the rest of one that is gone
        assert cache.positions == [0, 3 * S - (S - 2)]
        logits, _ = read(model, more, cache=cache)
        torch.testing.assert_close(logits[:1], read(model, more[:1])[0], **CLOSE)


def test_all_of_a_short_stream(models):
    model, ids = models["gated select"], tiny_ids(2, S)
    with torch.no_grad():
        _, cache = read(model, ids, (3,))
        cache.crop(-S)
        assert (cache.positions, cache.get_seq_length(), cache.num_croppable_columns) == ([0, 0], 0, 0)
        torch.testing.assert_close(read(model, ids, (2,), cache=cache)[0], read(model, ids)[0], **CLOSE)
