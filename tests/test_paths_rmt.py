"""The three paths give the same through every implementation of attention that transformers knows."""

import pytest
import torch
from transformers.integrations import flex_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rmt_hf.layout_rmt import causal_mask
from rmt_hf.paths_rmt import kept_block_mask
from tiny import pad_left, read, tiny_ids, tiny_model


S = 8  # the segments of the tiny models

# Float64 sums of some 100 terms taken in another order: values up to 10 agree to 1e-12.
CLOSE = {"rtol": 0, "atol": 1e-12}

FORMS = {
    "gated select": {},
    "paper": {"fusion_type": "softmax", "memory_write": "mean", "num_lookback_segments": 0},
    "mean": {"memory_write": "mean", "num_slots_per_chunk": 2, "num_lookback_segments": 2, "use_qk_norm": True},
    "one head": {"num_key_value_heads": 1, "num_memory_slots": 2, "use_local_attention": False},
    "all heads": {"num_key_value_heads": 4, "num_memory_slots": 0},
    "sink": {"use_attention_sink": True, "num_memory_slots": 2},
}
every_form = pytest.mark.parametrize("form", FORMS)

CUTS = [(), (3,), (S + 3, 1, 2, S, 2 * S + 1), (1,) * (2 * S + 1)]


def use(model, implementation: str):
    """The model with another implementation, set as transformers sets it but without its checks."""
    model.config._attn_implementation = implementation
    return model


@every_form
@pytest.mark.parametrize("cuts", CUTS)
def test_eager_is_sdpa(form, cuts):
    model, ids = tiny_model(**FORMS[form], attn_implementation="eager"), tiny_ids(2, 7 * S + 3)
    assert model.config._attn_implementation == "eager"
    eager, cache = read(model, ids, cuts)
    sdpa, expected = read(use(model, "sdpa"), ids, cuts)
    torch.testing.assert_close(eager, sdpa, **CLOSE)
    for got, want in zip(cache.layers, expected.layers, strict=True):
        torch.testing.assert_close(got.state.tensors(), want.state.tensors(), **CLOSE)


@every_form
def test_eager_is_sdpa_for_rows_at_different_places(form):
    model, batch = tiny_model(**FORMS[form]), pad_left([tiny_ids(1, n)[0] for n in (3, S, 5 * S + 1)])
    logits = []
    for implementation in ("eager", "sdpa"):
        outputs = use(model, implementation)(**batch, use_cache=True)
        more, _ = read(model, tiny_ids(3, 2 * S), (1, 3), outputs.past_key_values)
        logits.append(torch.cat([outputs.logits[batch["attention_mask"]].flatten(), more.flatten()]))
    torch.testing.assert_close(*logits, **CLOSE)


# Not compiled: for a CPU, with a mask that it captures, compiled flex attention of PyTorch 2.13 corrupts memory.
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("form", ["gated select", "paper"])
def test_flex_attention_is_sdpa(form, monkeypatch):
    def not_compiled(*args, training=False, **kwargs):
        return flex_attention.flex_attention(*args, **kwargs)

    monkeypatch.setattr(flex_attention, "compile_friendly_flex_attention", not_compiled)
    model, batch = tiny_model(**FORMS[form]), pad_left([tiny_ids(1, n)[0] for n in (3, 4 * S + 1)])
    logits = []
    with torch.no_grad():
        for implementation in ("flex_attention", "sdpa"):
            outputs = use(model, implementation)(**batch, use_cache=True)
            more, _ = read(model, tiny_ids(2, S + 3), (1,), outputs.past_key_values)
            logits.append(torch.cat([outputs.logits[batch["attention_mask"]].flatten(), more.flatten()]))
    torch.testing.assert_close(*logits, **CLOSE)


@pytest.mark.parametrize(("num_queries", "num_keys"), [(S, S), (S, 3 * S), (1, 5), (200, 456)])
def test_a_block_mask_hides_what_the_mask_hides_and_is_made_once(num_queries, num_keys):
    device = torch.device("cpu")
    with torch.inference_mode():
        block_mask = kept_block_mask(num_queries, num_keys, device)
    queries, keys = torch.arange(num_queries)[:, None], torch.arange(num_keys)
    seen = block_mask.mask_mod(torch.tensor(0), torch.tensor(0), queries, keys)
    assert seen.equal(causal_mask(num_queries, num_keys, device)[0, 0])
    assert kept_block_mask(num_queries, num_keys, device) is block_mask
    assert not block_mask.kv_indices.is_inference()  # or it could not be used in training
    num_seen = block_mask.kv_num_blocks + block_mask.full_kv_num_blocks
    assert num_seen.flatten().tolist() == [
        -(-min(num_keys, num_keys - num_queries + end) // 128) for end in ends(num_queries)
    ]


def ends(length: int) -> list[int]:
    """Where blocks of 128 queries end."""
    return [min(start + 128, length) for start in range(0, length, 128)]


def test_flash_attention_that_is_not_installed_is_refused():
    with pytest.raises(ImportError, match="FlashAttention2 has been toggled on, but it cannot be used"):
        tiny_model(attn_implementation="flash_attention_2")


@pytest.fixture
def flash(monkeypatch) -> list[tuple[int, int, bool]]:
    """An implementation as flash attention is: no mask, causal from the bottom right. Gives queries, keys, causal."""
    calls = []

    def attention(module, query, key, value, attention_mask, *, dropout, scaling, is_causal, **kwargs):
        assert attention_mask is None
        assert query.shape[-1] == key.shape[-1] == value.shape[-1]
        num_queries, num_keys = query.shape[2], key.shape[2]
        calls.append((num_queries, num_keys, is_causal))
        seen = torch.ones(num_queries, num_keys, dtype=torch.bool)
        seen = seen.tril(num_keys - num_queries) if is_causal else seen
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, seen, scale=scaling, enable_gqa=True
        )
        return output.transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_attention_2", attention)
    return calls


@every_form
@pytest.mark.parametrize("cuts", [(), (2 * S,), (2 * S + 4, 1, 1, 1, 1, S + 5), (1,) * (2 * S + 1), (2, 2, 3, 1, 4, 4)])
def test_flash_attention_needs_no_mask_for_rows_of_one_length(form, cuts, flash):
    model, ids = tiny_model(**FORMS[form]), tiny_ids(2, 7 * S + 3)
    with torch.no_grad():
        expected, _ = read(model, ids, cuts)
        assert not flash
        logits, _ = read(use(model, "flash_attention_2"), ids, cuts)
    torch.testing.assert_close(logits, expected, **CLOSE)
    assert any(is_causal for _, _, is_causal in flash)
    assert any(is_causal is False for _, _, is_causal in flash) == (form != "all heads" or 1 in cuts)


@pytest.mark.parametrize(
    ("prompts", "columns"),
    [
        ((3, 2 * S), 1),  # rows at different places of their segments
        ((3, 2 * S), S + 1),
        ((3,), 2),  # across the end of a chunk
        ((3,), S),  # across the end of a segment, before the window is full
    ],
)
def test_flash_attention_refuses_what_needs_a_mask_and_leaves_the_state(prompts, columns, flash):
    model = use(tiny_model(), "flash_attention_2")
    batch = pad_left([tiny_ids(1, n)[0] for n in prompts])
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values  # a fresh batch may be ragged
        with pytest.raises(ValueError, match="attn_implementation='flash_attention_2' takes no mask"):
            read(model, tiny_ids(len(prompts), columns), cache=cache)
        assert cache.positions == list(prompts)
