"""What is refused, in which words, and that nothing has changed afterwards."""

import math

import pytest
import torch
from transformers import DynamicCache

from helpers import pad_left, tiny_config, tiny_ids, tiny_model
from rmt_hf import RMTCache, RMTConfig, RMTForTokenClassification


S = 8  # segment_length of the tiny configuration
READ = 2 * S + 5  # columns that the state has read before the bad call
IDS = tiny_ids(2, READ + 5 * S)
NEXT = IDS[:, READ : READ + 6]


def embeds(*shape: int, bad: float = 0.0) -> torch.Tensor:
    values = torch.zeros(*shape, dtype=torch.float64)
    values[1, 2] = bad
    return values


def other_state(rows: int = 2, **overrides) -> RMTCache:
    return tiny_model(**overrides)(IDS[:rows, :READ], use_cache=True).past_key_values


# Name: arguments that replace those of a right call, and what the message says: what, got, rule, remedy.
BAD = {
    "id too high": (
        {"input_ids": NEXT.clone().fill_(67)},
        r"input_ids must lie in 0 \.\. 66, got 67 \.\. 67.*tokenizer.*resize",
    ),
    "id below zero": ({"input_ids": NEXT - 100}, r"input_ids must lie in 0 \.\. 66, got -\d+ .*tokenizer"),
    "one axis": ({"input_ids": NEXT[0]}, r"input_ids must have 2 axes, \(batch, columns\).*got shape \(6,\)"),
    "no columns": ({"input_ids": NEXT[:, :0]}, r"input_ids.*none of them empty; got shape \(2, 0\).*all columns"),
    "no rows": ({"input_ids": NEXT[:0]}, r"input_ids.*none of them empty; got shape \(0, 6\)"),
    "both inputs": ({"inputs_embeds": embeds(2, 6, 32)}, r"[Oo]ne of input_ids and inputs_embeds.*got both: give one"),
    "no input": ({"input_ids": None}, r"[Oo]ne of input_ids and inputs_embeds.*got neither: give one"),
    "embeddings of two axes": (
        {"input_ids": None, "inputs_embeds": embeds(6, 32)},
        r"inputs_embeds must have 3 axes, \(batch, columns, hidden_size\).*got shape \(6, 32\)",
    ),
    "embeddings of other width": (
        {"input_ids": None, "inputs_embeds": embeds(2, 6, 31)},
        r"inputs_embeds must be hidden_size \(32\) wide, got 31",
    ),
    "NaN": (
        {"input_ids": None, "inputs_embeds": embeds(2, 6, 32, bad=math.nan)},
        r"inputs_embeds must be finite, got NaN or infinity: check what produced them",
    ),
    "infinity": ({"input_ids": None, "inputs_embeds": embeds(2, 6, 32, bad=math.inf)}, r"inputs_embeds must be finite"),
    "mask too long": (
        {"attention_mask": torch.ones(2, 7)},
        rf"attention_mask must be a tensor of shape \(2, 6\) or \(2, {READ + 6}\), 1 at real tokens and 0 at padding; "
        r"got \(2, 7\)",
    ),
    "mask of other rows": ({"attention_mask": torch.ones(3, 6)}, r"attention_mask must.*got \(3, 6\)"),
    "mask of four axes": ({"attention_mask": torch.ones(2, 1, 6, 6)}, r"attention_mask must.*got \(2, 1, 6, 6\)"),
    "masks by name": ({"attention_mask": {"full_attention": torch.ones(2, 6)}}, r"attention_mask must.*got dict"),
    "positions from zero": (
        {"position_ids": torch.arange(6)[None]},
        rf"position_ids contradict the state: row 0, column 0 is at {READ} .*got 0\. Leave position_ids out",
    ),
    "positions that jump": (
        {"position_ids": torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 2]]) + READ},
        rf"row 1, column 3 is at {READ + 3} of its stream, got {READ}\. .*packed.*own row",
    ),
    "positions too many": (
        {"position_ids": torch.arange(READ, READ + 9)[None]},
        r"position_ids must be a tensor of shape \(1, 6\) or \(2, 6\), got \(1, 9\): leave position_ids out",
    ),
    "labels that are shifted": (
        {"labels": NEXT[:, 1:]},
        r"labels must have the shape of the input, \(2, 6\), got \(2, 5\).*not shifted",
    ),
    "more rows than streams": (
        {"input_ids": IDS[:, :4].repeat(2, 1)},
        r"past_key_values holds 2 streams, the input has 4 rows: give one row per stream.*batch_repeat_interleave",
    ),
}


def snapshot(cache: RMTCache) -> list:
    tensors = [tensor.clone() for layer in cache.layers for tensor in layer.state.tensors()]
    return [list(cache.positions), cache.get_seq_length(), *tensors]


def same(before: list, after: list) -> bool:
    return before[:2] == after[:2] and all(map(torch.equal, before[2:], after[2:]))


@torch.no_grad()
@pytest.mark.parametrize("name", BAD)
def test_a_bad_call_says_so_and_leaves_the_state_alone(name: str) -> None:
    model = tiny_model()
    cache = model(IDS[:, :READ], use_cache=True).past_key_values
    before, (arguments, message) = snapshot(cache), BAD[name]
    with pytest.raises(ValueError, match=message):
        model(**({"input_ids": NEXT, "past_key_values": cache} | arguments))
    assert same(before, snapshot(cache))
    rest = model(IDS[:, READ:], past_key_values=cache).logits
    torch.testing.assert_close(rest, model(IDS).logits[:, READ:], rtol=0, atol=1e-12)  # float64


@torch.no_grad()
@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (lambda: other_state(segment_length=16), ValueError, "segment_length 16 instead of 8.*RMTCache"),
        (
            lambda: other_state(num_hidden_layers=3, memory_write="mean"),
            ValueError,
            "num_hidden_layers 3.*memory_write mean",
        ),
        (lambda: other_state(rows=1), ValueError, "holds 1 streams, the input has 2 rows.*batch_select_indices"),
        (lambda: DynamicCache(config=tiny_config()), TypeError, "must be an RMTCache, got DynamicCache: pass RMTCache"),
        (lambda: ((NEXT, NEXT),), TypeError, "must be an RMTCache, got tuple: pass RMTCache"),
    ],
)
def test_the_state_of_something_else_is_refused_and_left_alone(state, error, message: str) -> None:
    cache = state()
    before = snapshot(cache) if isinstance(cache, RMTCache) else None
    with pytest.raises(error, match=f"past_key_values.*{message}"):
        tiny_model()(NEXT, past_key_values=cache)
    assert before is None or same(before, snapshot(cache))


def test_other_heads_check_the_same() -> None:
    with pytest.raises(ValueError, match=r"input_ids must lie in 0 \.\. 66"):
        tiny_model(RMTForTokenClassification)(torch.tensor([[67]]))


@torch.no_grad()
def test_padding_need_not_be_finite() -> None:
    model = tiny_model()
    batch = pad_left([IDS[0], IDS[1, : 2 * S + 3]])
    vectors = model.model.embed_tokens(batch["input_ids"])
    wanted = model(inputs_embeds=vectors, attention_mask=batch["attention_mask"], use_cache=True)
    vectors = vectors.masked_fill(~batch["attention_mask"][..., None], math.nan)
    got = model(inputs_embeds=vectors, attention_mask=batch["attention_mask"], use_cache=True)
    assert torch.equal(got.logits, wanted.logits)
    assert same(snapshot(got.past_key_values), snapshot(wanted.past_key_values))


@torch.no_grad()
@pytest.mark.parametrize("columns", [1, 3, S, 3 * S])
def test_a_call_that_fails_half_way_has_not_happened(columns: int, monkeypatch) -> None:
    """Out of memory, an interrupt: the first layer is done, the second is not, the state is still where it was."""
    model = tiny_model()
    cache = model(IDS[:, :READ], use_cache=True).past_key_values

    def fail(*args):
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(model.model.layers[1].mlp, "forward", fail)
        model(tiny_ids(2, columns, seed=5), past_key_values=cache)
    rest = model(IDS[:, READ:], past_key_values=cache).logits
    torch.testing.assert_close(rest, model(IDS).logits[:, READ:], rtol=0, atol=1e-12)  # float64


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"segment_length": 10}, r"segment_length \(10\) must be a multiple of chunk_length \(4\): 8 is the nearest"),
        ({"num_memory_slots": 7}, r"num_memory_slots \(7\) must be a multiple of .*\(2\): 8 is the nearest"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(4\) must be a multiple of num_key_value_heads \(3\)"),
        ({"memory_write": "max"}, r"memory_write must be one of select, mean, got 'max'"),
        ({"vocab_size": 0}, r"vocab_size must be at least 1, got 0"),
    ],
)
def test_a_configuration_that_breaks_a_rule_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**fields)


def test_a_misspelt_field_is_warned_about(caplog) -> None:
    RMTConfig(num_memory_slot=4)
    assert "no field 'num_memory_slot'" in caplog.text and "Did you mean 'num_memory_slots'?" in caplog.text


@pytest.mark.parametrize(
    ("mask", "got"),
    [
        (torch.tensor([[1, 1, 2, 2]]), r"\[1, 2\]"),
        (torch.tensor([[0.0, 0.0, -1e9, 0.0]]), r"\[-1000000000.0, 0.0\]"),
        (torch.zeros(1, 4), r"\[0.0\]"),
        (torch.tensor([[1, 1, -1, 0]]), r"\[-1, 0, 1\]"),
    ],
)
def test_masks_that_mean_something_else_are_refused(mask, got):
    """Documents by number would be read as one, and an additive mask the other way round."""
    with pytest.raises(ValueError, match=rf"attention_mask must be 1 at real tokens and 0 at padding, got {got}"):
        tiny_model()(tiny_ids(1, 4), attention_mask=mask)


@pytest.mark.parametrize("name", ["seq_idx", "cu_seq_lens_q"])
def test_packing_without_position_ids_is_refused(name):
    """The second document would see the first."""
    for model in (tiny_model(), tiny_model().model):
        with pytest.raises(ValueError, match=f"{name} must come with position_ids, got none"):
            model(tiny_ids(1, 4), **{name: torch.zeros(1, 4)})


def test_what_packed_rows_come_with_is_taken_with_position_ids():
    model, ids = tiny_model(), tiny_ids(1, 16)
    position_ids = torch.arange(16)[None] % 8
    expected = model(ids, position_ids=position_ids).logits
    packed = {"cu_seq_lens_q": torch.tensor([0, 8, 16]), "max_length_q": 8, "seq_idx": torch.arange(16)[None] // 8}
    assert torch.equal(model(ids, position_ids=position_ids, **packed).logits, expected)
