"""Copies of a state, by whatever means, are independent of it, and as large as it says."""

import copy
import pickle

import pytest
import torch

from helpers import CLOSE, assert_same_rows, every_form, read, tiny_ids
from rmt_hf import RMTCache


COPIES = {
    "clone": RMTCache.clone,
    "copy.deepcopy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
}


@every_form
@pytest.mark.parametrize("kind", COPIES)
@pytest.mark.parametrize("with_gradients", [False, True])
def test_a_copy_goes_on_by_itself(models, form, kind, with_gradients):
    model, ids = models[form], tiny_ids(2, 45)
    with torch.set_grad_enabled(with_gradients):
        _, cache = read(model, ids)
        with cache.exclusive():  # as during a call, in another thread
            twin = COPIES[kind](cache)
        expected, after = read(model, ids[:, :11], cache=cache)
        logits, twin = read(model, ids[:, :11], cache=twin)
    torch.testing.assert_close(logits, expected, **CLOSE)
    assert_same_rows(twin, after, model.config)


def test_a_pickle_is_as_large_as_the_state(models):
    sizes = []
    for length in (3, 45):
        _, cache = read(models["gated select"], tiny_ids(2, length))
        sizes.append(len(pickle.dumps(cache)) - cache.nbytes)
    # A few hundred bytes for each of some 30 tensors, and no storage of which a tensor shows a part.
    assert min(sizes) > 0 and max(sizes) < 12_000


@every_form
def test_what_was_read_in_inference_mode_goes_on_with_gradients(models, form):
    model, ids = models[form], tiny_ids(2, 61)
    for first in (3, 45):
        _, expected = read(model, ids[:, :first])
        expected.detach()
        with torch.inference_mode():
            _, cache = read(model, ids[:, :first])
        total = 0
        for size in (1, 11, 8):
            logits, wanted = (model(ids[:, -size:], past_key_values=state).logits for state in (cache, expected))
            torch.testing.assert_close(logits, wanted, **CLOSE)
            total = total + logits.sum()
        total.backward()


@pytest.mark.parametrize(
    ("indices", "error"), [([5], IndexError), ([0, -3], IndexError), ([], ValueError), ([[True]], IndexError)]
)
def test_rows_that_are_not_there_change_nothing(models, indices, error):
    model, ids = models["gated select"], tiny_ids(2, 21)
    with torch.no_grad():
        _, cache = read(model, ids)
        before = cache.clone()
        with pytest.raises(error):
            cache.batch_select_indices(torch.tensor(indices, dtype=torch.bool if indices == [[True]] else torch.long))
        assert_same_rows(cache, before, model.config)


def test_rows_count_from_the_last_as_in_any_index(models):
    model = models["gated select"]
    with torch.no_grad():
        _, cache = read(model, tiny_ids(3, 21))
        before = cache.clone()
        cache.batch_select_indices(torch.tensor([-1, 0]))
    assert_same_rows(cache, before, model.config, rows=[2, 0])
