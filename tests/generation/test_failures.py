"""A `generate` that fails, wherever it fails, leaves the state that was given as it was."""

import pytest
import torch

from helpers import assert_same_rows, read, tiny_ids, tiny_model


class Broken(Exception):
    pass


def fail_at(module: torch.nn.Module, call: int):
    """A hook that raises when the module is called for the n-th time."""
    calls = []

    def hook(*args) -> None:
        calls.append(1)
        if len(calls) == call:
            raise Broken

    return module.register_forward_hook(hook)


MODULES = [name for name, part in tiny_model().named_modules() if not isinstance(part, torch.nn.ModuleList)]


@pytest.mark.parametrize("call", [1, 2, 12])
@pytest.mark.parametrize("name", MODULES)
def test_a_module_that_raises_changes_nothing(name, call):
    model, prompt = tiny_model(), tiny_ids(1, 9, seed=1)
    with torch.no_grad():
        _, cache = read(model, tiny_ids(1, 37))
        before, settings = cache.clone(), {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
        expected = model.generate(prompt, past_key_values=cache.clone(), **settings)
        handle = fail_at(model.get_submodule(name), call)
        try:
            model.generate(prompt, past_key_values=cache, **settings)
        except Broken:
            assert cache.get_seq_length() == before.get_seq_length() == 37
            assert_same_rows(cache, before, model.config)
        else:
            assert "memory" in name and call == 12  # asked at segment ends alone
            cache = before
        handle.remove()
        assert torch.equal(model.generate(prompt, past_key_values=cache, **settings), expected)


def test_what_is_refused_changes_nothing():
    model = tiny_model()
    with torch.no_grad():
        _, cache = read(model, tiny_ids(1, 37))
        before = cache.clone()
        for prompt, settings in (
            (torch.full((1, 5), 1000), {}),
            (tiny_ids(1, 5), {"use_cache": False}),
            (tiny_ids(2, 5), {}),
        ):
            with pytest.raises((ValueError, TypeError)):
                model.generate(prompt, past_key_values=cache, max_new_tokens=3, pad_token_id=0, **settings)
            assert cache.get_seq_length() == 37
            assert_same_rows(cache, before, model.config)


def test_a_state_of_another_kind_is_still_refused_by_name():
    model = tiny_model()
    with pytest.raises(TypeError, match="past_key_values must be an RMTCache"):
        model.generate(tiny_ids(1, 5), past_key_values=(), max_new_tokens=2, pad_token_id=0)
