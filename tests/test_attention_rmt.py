"""Attention: rotary angles that are right at any position, and no loop over segments."""

import itertools
import math
from collections import Counter
from decimal import Decimal, localcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from rmt_hf import RMTCache, RMTConfig, memory_rmt
from rmt_hf.attention_rmt import RMTRotaryEmbedding
from rmt_hf.layers_rmt import rotate
from rmt_hf.state_rmt import cut_columns
from tiny import read, tiny_ids, tiny_model


S = 8  # the segments of the tiny models

# Float64 sums of some 100 terms taken in another order: values up to 10 agree to 1e-12.
CLOSE = {"rtol": 0, "atol": 1e-12}

# Rotary encoding.

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
every_rope = pytest.mark.parametrize("rope", ROPES)
WIDTH = 16  # of a head
PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")


SIGNS = torch.tensor([-1.0] * (WIDTH // 2) + [1.0] * (WIDTH // 2))  # of the sines in the tables


def rotary(rope: str) -> RMTRotaryEmbedding:
    return RMTRotaryEmbedding(RMTConfig(hidden_size=WIDTH, num_attention_heads=1, rope_parameters=dict(ROPES[rope])))


def llama_rotary(rope: str) -> LlamaRotaryEmbedding:
    fields = {"hidden_size": WIDTH, "num_attention_heads": 1, "max_position_embeddings": 4096}
    return LlamaRotaryEmbedding(LlamaConfig(**fields, rope_parameters=dict(ROPES[rope])))


@every_rope
def test_angles_are_those_of_llama(rope):
    position_ids = torch.arange(100)[None]
    cos, sin = rotary(rope)(position_ids, torch.float32)
    expected = llama_rotary(rope)(torch.zeros(1), position_ids)
    # Llama rounds angles up to 100 to float32, which is up to 4e-6 off.
    torch.testing.assert_close((cos[:, :, 0], SIGNS * sin[:, :, 0]), expected, rtol=0, atol=1e-5)


@every_rope
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float64, 2e-7),  # turns per position are float64: 1e-16 of 1e9 radians
        (torch.float32, 5e-7),  # and then one rounding of an angle below pi
    ],
)
def test_angles_are_right_anywhere_in_the_stream(rope, dtype, tolerance):
    position_ids = torch.tensor([[0, 1, 2**24 + 1, 10**8, 10**8 + 7, 10**9 + 1]])
    cos, sin = rotary(rope)(position_ids, dtype)
    assert (cos.dtype, cos.shape) == (dtype, (1, 6, 1, WIDTH))
    frequencies = llama_rotary(rope).inv_freq.tolist()
    with localcontext(prec=60):
        for row, position in enumerate(position_ids[0].tolist()):
            angles = [float(position * Decimal(frequency) % (2 * PI)) for frequency in frequencies] * 2
            assert cos[0, row, 0].tolist() == pytest.approx([math.cos(angle) for angle in angles], abs=tolerance)
            assert (SIGNS * sin[0, row, 0]).tolist() == pytest.approx(
                [math.sin(angle) for angle in angles], abs=tolerance
            )


@every_rope
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-14), (torch.float32, 1e-5)],  # the angles between tokens agree exactly: only sums round
)
def test_scores_depend_on_the_distance_alone(rope, dtype, tolerance):
    states = torch.randn(2, 1, 300, 1, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)

    def scores(start: int) -> torch.Tensor:
        query, key = rotate(states, *rotary(rope)(start + torch.arange(300)[None], dtype))
        return query[:, :, 0] @ key[:, :, 0].mT

    expected = scores(0)
    assert (expected - states[0, :, :, 0] @ states[1, :, :, 0].mT).abs().max() > 1  # the encoding does something
    for start in (10**5, 10**8, 10**8 + 1, 10**12):
        torch.testing.assert_close(scores(start), expected, rtol=0, atol=10 * tolerance)


@every_rope
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-3)])
def test_a_stream_goes_on_at_position_10_to_the_8_as_it_would_at_the_start(rope, dtype, tolerance):
    model, ids = tiny_model(dtype=dtype, rope_parameters=dict(ROPES[rope])), tiny_ids(2, 9 * S)
    shift, lookback = 10**8 // S * S, model.config.num_lookback_segments
    with torch.no_grad():
        _, cache = read(model, ids[:, : 4 * S + 3])
        first = (4 - lookback - 1) * S  # stream position of window column 0
        position_ids = first + torch.arange((lookback + 2) * S)[None]
        near, far = (model.model.rotary_emb(position_ids + by, dtype) for by in (0, shift))
        moved = cache.clone()
        moved.positions = [position + shift for position in cache.positions]
        for layer in moved.layers:
            keys = rotate(rotate(layer.state.keys.transpose(1, 2), near[0], -near[1]), *far)
            layer.state = layer.state._replace(keys=keys.transpose(1, 2).contiguous())
        cuts = (1, 2, S, 2 * S + 1)
        expected, cache = read(model, ids[:, 4 * S + 3 :], cuts, cache)
        logits, moved = read(model, ids[:, 4 * S + 3 :], cuts, moved)
    torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance)
    for got, want in zip(moved.layers, cache.layers, strict=True):
        for name in ("keys", "values"):
            torch.testing.assert_close(
                getattr(got.state.memory, name), getattr(want.state.memory, name), rtol=0, atol=tolerance
            )


@every_rope
def test_the_encoding_can_be_undone(rope):
    states = torch.randn(1, 5, 2, WIDTH, dtype=torch.float64)
    cos, sin = rotary(rope)(10**8 + torch.arange(5)[None], torch.float64)
    torch.testing.assert_close(rotate(rotate(states, cos, sin), cos, -sin), states, **CLOSE)


FORMS = {
    "gated select": {},
    "paper": {"fusion_type": "softmax", "memory_write": "mean", "num_lookback_segments": 0},
    "mean": {"memory_write": "mean", "num_slots_per_chunk": 2, "num_lookback_segments": 2, "use_qk_norm": True},
    "one head": {"num_key_value_heads": 1, "num_memory_slots": 2, "use_local_attention": False},
    "all heads": {"num_key_value_heads": 4, "num_memory_slots": 0},
    "sink": {"use_attention_sink": True, "num_memory_slots": 2},
}
every_form = pytest.mark.parametrize("form", FORMS)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("first", [-4, -1, 0, 2, 3, 6])
def test_columns_are_cut_out_with_zeros_where_there_are_none(first, is_transposed):
    states = torch.randn(2, 7, 3, 4).transpose(1, 2) if is_transposed else torch.randn(2, 7, 4)
    found = cut_columns(states, first, 5)
    for column in range(5):
        there = 0 <= first + column < 7
        wanted = states[..., first + column, :] if there else torch.zeros_like(states[..., 0, :])
        assert torch.equal(found[..., column, :], wanted)
    assert found.shape[-2] == 5 and found.is_contiguous()
    assert found.untyped_storage().nbytes() == found.nbytes  # it does not keep the frame alive


# No loop over segments: the whole of a call is a fixed number of operations, however long it is.


class CountOperations(TorchDispatchMode):
    """Counts what PyTorch executes."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


@every_form
@pytest.mark.parametrize("before", [0, 5, 3 * S + 5])
@pytest.mark.parametrize("with_gradients", [False, True])
def test_the_number_of_operations_does_not_depend_on_the_number_of_segments(form, before, with_gradients):
    # A ring that does not turn: see the next test. Eight segments are more windows than rows; fewer take fewer calls.
    model = tiny_model(**{**FORMS[form], "num_memory_slots": 0 if form == "all heads" else 50 * 4})
    counts = []
    for num_segments in (8, 8, 40):  # the first one makes the masks that are kept
        cache = RMTCache(model.config)
        with torch.set_grad_enabled(with_gradients):
            if before:
                read(model, tiny_ids(2, before), cache=cache)
            with CountOperations() as operations:
                logits = model(tiny_ids(2, num_segments * S), past_key_values=cache).logits
                if with_gradients:
                    torch.autograd.grad(logits.sum(), list(model.parameters()))
        counts.append(operations.counts)
    assert counts[1] == counts[2]
    assert counts[1]["aten.addmm.default"] + counts[1]["aten.mm.default"] > 10


def test_each_turn_of_the_ring_costs_one_more_round(monkeypatch):
    model, gate, calls, totals = tiny_model(), memory_rmt.stretched_sigmoid, [], []  # a ring of four segments
    monkeypatch.setattr(memory_rmt, "stretched_sigmoid", lambda logits: calls.append(0) or gate(logits))
    for turns in (1, 2, 3, 4):
        calls.clear()
        with torch.no_grad(), CountOperations() as operations:
            model(tiny_ids(1, (1 + 4 * turns) * S), use_cache=True)
        totals.append(operations.counts.total())
        assert len(calls) == turns * model.config.num_hidden_layers
    assert len({later - earlier for earlier, later in itertools.pairwise(totals)}) == 1
