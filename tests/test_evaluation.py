"""Evaluation: the three conditions are what they say, and figures are sums over the right bytes."""

import math

import pytest
import torch
from torch.nn import functional as F

from rmt_hf import RMTCache
from rmt_hf.evaluation import Comparison, bits_per_byte, position_edges, stream_bits
from tiny import tiny_model


def bits_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.transpose(1, 2).float(), targets, reduction="none") / math.log(2)


@pytest.mark.parametrize("num_memory_slots", [0, 8])
@torch.no_grad()
def test_own_memory_is_the_plain_forward(num_memory_slots):
    model, input_ids = tiny_model(num_memory_slots=num_memory_slots), torch.randint(50, (3, 45))
    bits = stream_bits(model, input_ids)
    assert list(bits) == (["own", "empty", "other"] if num_memory_slots else ["own"])
    expected = bits_of(model(input_ids).logits[:, :-1], input_ids[:, 1:])
    torch.testing.assert_close(bits["own"], expected, atol=5e-6, rtol=0)  # float32, after the logits


@pytest.mark.parametrize("num_lookback_segments", [0, 1])
@torch.no_grad()
def test_emptied_and_lent_memories(num_lookback_segments):
    model, input_ids = tiny_model(num_lookback_segments=num_lookback_segments), torch.randint(50, (3, 44))
    bits = stream_bits(model, input_ids)
    own, bare, borrower = (RMTCache(model.config) for _ in range(3))
    for start in range(0, 44, 8):
        piece, targets = input_ids[:, start : start + 8], input_ids[:, start + 1 : start + 9]
        for layer, bare_layer, borrowing_layer in zip(own.layers, bare.layers, borrower.layers, strict=True):
            if start:
                memory = layer.state.memory
                lent = memory.map(lambda tensor: tensor[[1, 2, 0]])
                borrowing_layer.state = borrowing_layer.state._replace(memory=lent)
                none = memory._replace(strengths=torch.full_like(memory.strengths, -torch.inf))
                bare_layer.state = bare_layer.state._replace(memory=none)
        for name, cache in (("own", own), ("empty", bare), ("other", borrower)):
            expected = bits_of(model(piece, past_key_values=cache).logits[:, : targets.shape[1]], targets)
            found = bits[name][:, start : start + 8]
            torch.testing.assert_close(found, expected, atol=5e-6, rtol=0)  # float32, after the logits
    assert not torch.allclose(bits["own"][:, -8:], bits["empty"][:, -8:])
    assert not torch.allclose(bits["own"][:, -8:], bits["other"][:, -8:])


def test_one_document_cannot_borrow():
    with pytest.raises(ValueError, match="more documents"):
        stream_bits(tiny_model(), torch.zeros(1, 20, dtype=torch.int64))


def test_bits_per_byte_counts_each_token_once():
    bits, token_bytes = torch.tensor([[1.0, 2, 3, 4, 5]]), torch.tensor([[1, 1, 2, 2, 2]])
    # Token 0 is never predicted: the bucket of positions 0 and 1 holds token 1 alone.
    assert bits_per_byte(bits, token_bytes, [0, 2, 4, 6]).tolist() == [[1.0, 5 / 3, 9 / 4]]
    assert position_edges(100, 16) == [0, 16, 32, 64, 100]
    assert position_edges(64, 16) == [0, 16, 32, 64]


def test_differences_are_paired():
    token_bytes = torch.ones(3, 9, dtype=torch.int64)
    own = torch.arange(3.0)[:, None].expand(3, 9)
    comparison = Comparison({"own": own, "other": own + 0.5}, token_bytes, window_length=2)
    assert comparison.overall_difference("other") == (0.5, 0.0)
    assert comparison.overall("own") == (1.0, pytest.approx(1 / 3**0.5))
    assert comparison.difference_by_position("other") == [(0.5, 0.0)] * len(comparison.edges[1:])
