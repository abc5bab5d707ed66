"""A cache that evicts: the source while nothing is evicted, the same in any cuts, and the best are kept."""

import copy

import pytest
import torch

from experiments.baselines import read
from experiments.eviction import POLICIES, EvictionForCausalLM, EvictionState
from helpers import make_source, tiny_ids
from rmt_hf.evaluation.bits import token_bits


SEGMENT, SLOTS = 16, 32


@pytest.mark.parametrize("policy", POLICIES)
def test_it_is_the_source_until_something_is_evicted(policy) -> None:
    source, ids = make_source("llama"), tiny_ids(1, 100)
    expected = token_bits(source, ids)
    torch.testing.assert_close(
        token_bits(EvictionForCausalLM(source, SEGMENT, 200, policy), ids), expected, rtol=0, atol=1e-5
    )
    found = token_bits(EvictionForCausalLM(source, SEGMENT, SLOTS, policy), ids)
    full = SLOTS + 2 * SEGMENT  # nothing has been dropped so far
    torch.testing.assert_close(found[:, : full - 1], expected[:, : full - 1], rtol=0, atol=1e-5)
    assert (found - expected)[:, full:].abs().max() > 1e-3


@pytest.mark.parametrize("policy", POLICIES)
def test_any_cut_gives_the_same(policy) -> None:
    model, ids = EvictionForCausalLM(make_source("llama"), SEGMENT, SLOTS, policy), tiny_ids(1, 150)
    expected = token_bits(model, ids, slice_length=512)
    for length in (1, 7, 16, 50):
        torch.testing.assert_close(token_bits(model, ids, slice_length=length), expected, rtol=0, atol=1e-5)
    state = None
    for part in ids.split(33, 1):
        _, state = read(model, part, state)
    assert isinstance(state, EvictionState) and state.position == 150
    again = copy.deepcopy(state)
    assert torch.equal(read(model, ids[:, :5], state)[0], read(model, ids[:, :5], again)[0])


def test_what_got_most_attention_is_kept() -> None:
    """Of the first three segments, by the source's own attention maps, before anything is lost."""
    source, ids = make_source("llama"), tiny_ids(1, 4 * SEGMENT)
    source.set_attn_implementation("eager")
    weights = source(ids, output_attentions=True).attentions[0][0]  # (H, T, T)
    by_group = weights.unflatten(0, (2, -1))
    wanted = {"sum": by_group.sum((1, 2)), "last": by_group[:, :, -32:].mean((1, 2))}
    for policy, received in wanted.items():
        model = EvictionForCausalLM(source, SEGMENT, SLOTS, policy)
        _, state = read(model, ids)
        found = state.layers[0][0][:, :SLOTS]  # keys without rotary encoding, which says which tokens
        layer = source.model.layers[0]
        keys = layer.self_attn.k_proj(layer.input_layernorm(source.model.embed_tokens(ids)))[0]
        keys = keys.unflatten(-1, (2, -1)).transpose(0, 1)
        best = received[:, : 3 * SEGMENT].topk(SLOTS, 1).indices.sort(1).values
        expected = keys.gather(1, best[..., None].expand(-1, -1, keys.shape[2]))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_the_state_is_constant_and_policies_are_two() -> None:
    model = EvictionForCausalLM(make_source("llama"), SEGMENT, SLOTS, "sum")
    sizes = set()
    for length in (160, 320):
        _, state = read(model, tiny_ids(1, length))
        sizes.add(sum(tensor.numel() for tensor in state.tensors()))
    assert len(sizes) == 1
    with pytest.raises(ValueError, match="policy must be one of sum, last, got 'best'"):
        EvictionForCausalLM(make_source("llama"), SEGMENT, SLOTS, "best")
