"""Evaluation: bits of every token however a document is cut, and figures that are sums over the right bytes."""

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from experiments.comparison import Comparison
from helpers import tiny_ids, tiny_model
from rmt_hf.data import token_byte_counts, train_tokenizer
from rmt_hf.evaluation import bits_of, bits_per_byte, mean_and_standard_error, position_edges, token_bits


CLOSE = {"atol": 1e-12, "rtol": 0}  # float64: sums in another order
SHAPE = {"vocab_size": 67, "hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": None, "eos_token_id": None}
HEADS = {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}


def make_model(name: str):
    """A tiny float64 model whose weights are so large that what it read long ago matters."""
    if name == "rmt":
        return tiny_model()
    torch.manual_seed(0)
    if name == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, **HEADS, pad_token_id=0))
    elif name == "mistral":
        model = MistralForCausalLM(MistralConfig(**SHAPE, **HEADS, sliding_window=9))
    else:
        sizes = {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 8}
        model = Mamba2ForCausalLM(Mamba2Config(**SHAPE, **sizes, pad_token_id=0))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model.double().eval()


def llama_that_says(next_token: torch.Tensor) -> LlamaForCausalLM:
    """A model that is sure (V,) of what follows each token, or guesses where that is negative; it sees nothing else."""
    size = len(next_token)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | {"vocab_size": size, "hidden_size": size}, **HEADS, head_dim=8))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.zero_()
        known = next_token >= 0
        model.lm_head.weight[next_token[known], known.nonzero()[:, 0]] = 1000.0
    return model


def bits_of_logits(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none") / math.log(2)


@pytest.mark.parametrize("name", ["rmt", "llama", "mistral", "mamba2"])
@torch.no_grad()
def test_a_stream_is_one_forward_pass(name):
    model, input_ids = make_model(name), tiny_ids(2, 75)
    expected = bits_of_logits(model(input_ids, use_cache=False).logits[:, :-1], input_ids[:, 1:])
    # Mamba2's scan computes in float32, whatever the dtype of the model.
    close = {"atol": 1e-4, "rtol": 0} if name == "mamba2" else CLOSE
    for slice_length in (1, 7, 8, 37, 73, 74, 75, 512):
        bits = token_bits(model, input_ids, slice_length=slice_length)
        torch.testing.assert_close(bits, expected.to(bits), **close)
    forgetful = token_bits(model, input_ids[:, 60:])
    assert (forgetful - expected[:, 60:]).abs()[:, -1].max() > 1e-3  # else nothing would have been carried


@pytest.mark.parametrize("name", ["rmt", "llama", "mamba2"])
@pytest.mark.parametrize(("window", "stride"), [(1, 1), (8, 8), (10, 3), (16, None), (40, 7), (200, 100)])
@torch.no_grad()
def test_windows_are_a_naive_loop(name, window, stride):
    model, input_ids = make_model(name), tiny_ids(2, 41)
    bits = token_bits(model, input_ids, window=window, stride=stride)
    stride, predicted = stride or window // 2, []
    for start in range(1, 41, stride):
        end = min(start + stride, 41)
        begin = max(0, start - 1 + stride - window)
        assert begin == 0 or start - begin >= window - stride
        for target in range(start, end):
            logits = model(input_ids[:, begin:target], use_cache=False).logits[:, -1:]
            torch.testing.assert_close(
                bits[:, target - 1 : target],
                bits_of_logits(logits, input_ids[:, target : target + 1]).to(bits),
                **({"atol": 1e-4, "rtol": 0} if name == "mamba2" else CLOSE),
            )
            predicted.append(target)
    assert predicted == list(range(1, 41)) and bits.shape == (2, 40)


def test_a_model_that_knows_and_one_that_guesses():
    input_ids = torch.arange(3 * 20).reshape(3, 20) % 16
    knows = llama_that_says((torch.arange(16) + 1) % 16)
    guesses = llama_that_says(torch.full((16,), -1))
    mixed = llama_that_says(torch.tensor([1, -1, 3, -1] * 4))
    for how in ({}, {"slice_length": 3}, {"window": 4}, {"window": 5, "stride": 2}):
        assert torch.equal(token_bits(knows, input_ids, **how), torch.zeros(3, 19))
        torch.testing.assert_close(token_bits(guesses, input_ids, **how), torch.full((3, 19), 4.0))
    found = token_bits(mixed, torch.tensor([[0, 1, 5, 2, 3]]))  # sure of 1 after 0, of 3 after 2; guesses after 1 and 5
    torch.testing.assert_close(found, torch.tensor([[0.0, 4, 4, 0]]))


@pytest.mark.parametrize("how", [{}, {"window": 4}])
def test_a_document_of_one_token(how):
    model = tiny_model()
    assert token_bits(model, tiny_ids(1, 1), **how).shape == (1, 0)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    bits = token_bits(model, tiny_ids(2, 4), mask, **how)
    assert (bits[0] > 0).all() and torch.equal(bits[1], torch.zeros(3).to(bits))


@pytest.mark.parametrize("how", [{"slice_length": 9}, {"window": 12}])
def test_padded_documents_are_documents_read_alone(how):
    model, lengths, ids = tiny_model(), (30, 17, 2), tiny_ids(3, 30)
    mask = torch.arange(30) < torch.tensor(lengths)[:, None]
    bits = token_bits(model, ids.where(mask, 0), mask, **how)
    for row, length in enumerate(lengths):
        alone = token_bits(model, ids[row : row + 1, :length], **how)
        torch.testing.assert_close(bits[row, : length - 1], alone[0], **CLOSE)
        assert not bits[row, length - 1 :].any()


@pytest.mark.parametrize("how", [{"slice_length": 8}, {"window": 16, "stride": 8}])
def test_logits_are_of_one_slice_at_a_time_and_without_dropout(how):
    model, seen = tiny_model().train(), []
    model.lm_head.register_forward_hook(lambda head, inputs, logits: seen.append((head.training, logits.shape[1])))
    token_bits(model, tiny_ids(1, 45), **how)
    assert seen == [(False, 8)] * 5 + [(False, 4)] and model.training
    with pytest.raises(ValueError, match="must lie in"):
        token_bits(model, torch.full((1, 5), 1000), **how)
    assert model.training


def test_the_old_name_of_slice_length_warns():
    model, ids = tiny_model(), tiny_ids(1, 45)
    with pytest.warns(FutureWarning, match="piece_length is now called slice_length") as caught:
        bits = token_bits(model, ids, piece_length=8)
    assert caught[0].filename == __file__
    assert torch.equal(bits, token_bits(model, ids, slice_length=8))


class Stateless(LlamaForCausalLM):
    def forward(self, input_ids, past_key_values=None, **kwargs):
        return super().forward(input_ids=input_ids, use_cache=False)


def test_bad_questions_are_refused():
    model, ids = tiny_model(), tiny_ids(2, 9)
    stateless = Stateless(LlamaConfig(**SHAPE, **HEADS))
    assert token_bits(stateless, ids, slice_length=8).shape == (2, 8)
    for words, refused in {
        "past_key_values": lambda: token_bits(stateless, ids, slice_length=4),
        r"input_ids\[None\]": lambda: token_bits(model, ids[0]),
        "at least one": lambda: token_bits(model, ids[:, :0]),
        "shape of input_ids": lambda: token_bits(model, ids, torch.ones(2, 8)),
        "padding_side": lambda: token_bits(model, ids, torch.arange(9).expand(2, 9) > 2),
        "on the right only": lambda: token_bits(model, ids, torch.arange(9).expand(2, 9) != 4),
        "a token in every row": lambda: token_bits(model, ids, torch.zeros(2, 9)),
        "without window": lambda: token_bits(model, ids, stride=3),
        "from 1 to window": lambda: token_bits(model, ids, window=3, stride=4),
        "at least 1": lambda: token_bits(model, ids, window=0),
    }.items():
        with pytest.raises(ValueError, match=words):
            refused()


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


def test_any_model_may_be_the_reference():
    token_bytes = torch.ones(3, 9, dtype=torch.int64)
    first = torch.arange(3.0)[:, None].expand(3, 9)
    bits = {"small": first + 1, "large": first, "middle": first + torch.tensor([[0.0], [0.5], [1.0]])}
    comparison = Comparison(bits, token_bytes, window_length=2, reference="large")
    assert comparison.others == ["small", "middle"]
    assert comparison.overall_difference("small") == (1.0, 0.0)
    assert comparison.overall_difference("middle") == (0.5, pytest.approx(0.5 / 3**0.5))
    assert comparison.difference_by_position("middle") == [(0.5, pytest.approx(0.5 / 3**0.5))] * 4
    assert comparison.metrics()["difference"].keys() == {"small", "middle"}


def test_documents_count_as_far_as_they_go():
    lengths = torch.tensor([100, 40, 10, 1])
    token_bytes = 2 * (torch.arange(1, 100) < lengths[:, None])
    bits = torch.tensor([[2.0], [4], [6], [8]]) * (token_bytes > 0)
    comparison = Comparison({"own": bits, "other": 2 * bits}, token_bytes, window_length=8)
    assert comparison.edges == [0, 8, 16, 32, 40]
    assert torch.equal(comparison.by_document("own")[:3], torch.tensor([1.0, 2, 3]).double())
    assert comparison.overall("own") == (2.0, pytest.approx(1 / 3**0.5))
    means = [mean for mean, _ in comparison.difference_by_position("other")]
    assert means == [2.0, 2.0, 1.5, 1.5]  # three documents reach token 9, two token 39
    assert comparison.metrics()["bits_per_byte_by_document"] == {"own": [1, 2, 3, None], "other": [2, 4, 6, None]}


def test_known_byte_counts():
    tokenizer = train_tokenizer(["aaaa"], 258)
    input_ids = torch.tensor([tokenizer("aé€")["input_ids"]])  # an end-of-text token, then 1, 2 and 3 bytes
    token_bytes = token_byte_counts(tokenizer)[input_ids[:, 1:]]
    bits = torch.full(token_bytes.shape, 8.0)
    assert token_bytes.sum() == 6
    assert bits_per_byte(bits, token_bytes, [0, 7]).tolist() == [[8.0]]


def test_comparisons_that_mean_nothing_are_refused():
    bits, token_bytes = torch.ones(3, 9), torch.ones(3, 9, dtype=torch.int64)
    for words, arguments in {
        "reference": ({"other": bits}, token_bytes, 2),
        "same documents": ({"own": bits[:, 1:]}, token_bytes, 2),
        "NaN": ({"own": bits * torch.nan}, token_bytes, 2),
        "longer than the window": ({"own": bits}, token_bytes, 10),
        "At least 2": ({"own": bits[:1]}, token_bytes[:1], 2),
    }.items():
        with pytest.raises(ValueError, match=words):
            Comparison(*arguments)
    with pytest.raises(ValueError, match="2 documents"):
        mean_and_standard_error(torch.tensor([1.0, torch.nan]))


def test_a_large_vocabulary_is_summed_to_the_precision_of_its_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(2, 8, 50_000, generator=generator)
    targets = torch.randint(50_000, (2, 8), generator=generator)
    # Float32: 6e-8 of logarithms near 20; summed in order along 50,000 numbers it is 1e-4.
    torch.testing.assert_close(bits_of(logits, targets).double(), bits_of(logits.double(), targets), rtol=0, atol=2e-5)
