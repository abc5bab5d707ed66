"""Attention: rotary angles that are right at any position, memory as a prefix, no loop over segments, and the same
through every implementation of attention that transformers knows."""

import itertools
import math
from collections import Counter
from decimal import Decimal, localcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LlamaConfig
from transformers.integrations import flex_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from rmt_hf import RMTCache, RMTConfig, memory_rmt
from rmt_hf.attention_rmt import RMTRMSNorm, RMTRotaryEmbedding, rotate
from tiny import FORMS, pad_left, read, tiny_ids, tiny_model


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
@pytest.mark.parametrize("form", ["gated select", "two parts"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-3)])
def test_a_stream_goes_on_at_position_10_to_the_8_as_it_would_at_the_start(rope, form, dtype, tolerance):
    model, ids = tiny_model(dtype=dtype, rope_parameters=dict(ROPES[rope]), **FORMS[form]), tiny_ids(2, 11 * S)
    shift, before, config = 10**8 // S * S, 6 * S + 3, model.config  # the ring is full, near and far
    with torch.no_grad():
        _, cache = read(model, ids[:, :before])
        first = (before // S - config.num_lookback_segments - 1) * S  # stream position of the first column kept
        position_ids = first + torch.arange(config.window_length + S)[None]
        near, far = (model.model.rotary_emb(position_ids + by, dtype) for by in (0, shift))
        moved = cache.clone()
        moved.positions, moved.is_stale = [position + shift for position in cache.positions], True
        for layer in moved.layers:
            own = [S, config.prefix_length, config.window_length]
            oldest, prefix, window = layer.state.keys.transpose(1, 2).split(own, 1)
            plain = rotate(rotate(torch.cat([oldest, window], 1), near[0], -near[1]), *far)
            keys = torch.cat([plain[:, :S], torch.zeros_like(prefix), plain[:, S:]], 1)
            memory = layer.state.memory._replace(positions=layer.state.memory.positions + shift)
            layer.state = layer.state._replace(keys=keys.transpose(1, 2).contiguous(), memory=memory)
        cuts = (1, 2, S, 2 * S + 1)
        expected, cache = read(model, ids[:, before:], cuts, cache)
        logits, moved = read(model, ids[:, before:], cuts, moved)
    torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance)
    for got, want in zip(moved.layers, cache.layers, strict=True):
        assert torch.equal(got.state.memory.positions, want.state.memory.positions + shift)
        for ours, theirs in zip(got.state.memory[:3], want.state.memory[:3], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


@every_rope
def test_the_encoding_can_be_undone(rope):
    states = torch.randn(1, 5, 2, WIDTH, dtype=torch.float64)
    cos, sin = rotary(rope)(10**8 + torch.arange(5)[None], torch.float64)
    torch.testing.assert_close(rotate(rotate(states, cos, sin), cos, -sin), states, **CLOSE)


# Law 10, memory is a prefix: a Llama layer that is given sink, slots and window as plain keys and values.


def llama_attention(attention) -> LlamaAttention:
    """A Llama layer's attention with the same weights."""
    config = attention.config
    names = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    fields = {name: getattr(config, name) for name in names}
    fields["attn_implementation"] = "sdpa"  # of which the softmax is not in float32
    llama = LlamaAttention(LlamaConfig(**fields), layer_idx=0).double().eval()
    own = attention.state_dict()
    llama.load_state_dict({name: own[name] for name in llama.state_dict()})
    return llama


def llama_angles(model, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine (1, T, D) as Llama wants them, of the frequencies that it has, in float64."""
    inv_freq = LlamaRotaryEmbedding(LlamaConfig(head_dim=model.config.head_dim)).inv_freq.double()
    angles = (positions[:, None] * inv_freq).repeat(1, 2)[None]
    return angles.cos(), angles.sin()


def turn(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary encoding of (B, heads, T, D) as Llama has it."""
    first, second = states.chunk(2, -1)
    return states * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


def read_by_llama(model, memory, hidden_states: torch.Tensor, start: int, first: int) -> torch.Tensor:
    """What a Llama layer's attention makes of tokens from `start` on, whose window begins at `first`.

    Args:
        memory: Slots (B, M, G, D) that have been written so far.
        hidden_states: (B, T, E) of all tokens from the beginning of the stream.
    """
    attention = model.model.layers[0].self_attn
    llama, sink = llama_attention(attention), attention.sink
    written = memory.positions[0, :, 0] >= 0
    keys, values, _, positions = (tensor[:, written].transpose(1, 2) for tensor in memory)  # (B, G, m, ...)
    order = positions.argsort(dim=2, stable=True)[..., None].expand(keys.shape)
    keys, values = keys.gather(2, order), values.gather(2, order)
    if sink is not None:
        shape = (len(keys), keys.shape[1], 1, keys.shape[3])
        keys = torch.cat([sink.key[:, None].expand(shape), keys], 2)
        values = torch.cat([sink.value[:, None].expand(shape), values], 2)
    num_before = keys.shape[2]  # slot j of m stands at first - m + j, the sink before them
    keys = turn(keys, *llama_angles(model, torch.arange(first - num_before, first)))
    known = hidden_states[:, first:start]
    states = (proj(known).unflatten(-1, (-1, model.config.head_dim)) for proj in (llama.k_proj, llama.v_proj))
    own_keys, own_values = (each.transpose(1, 2) for each in states)
    own_keys = turn(own_keys, *llama_angles(model, torch.arange(first, start)))
    cache = DynamicCache()
    cache.update(torch.cat([keys, own_keys], 2), torch.cat([values, own_values], 2), 0)
    length, past = hidden_states.shape[1] - start, num_before + start - first
    mask = torch.full((length, past + length), -torch.inf, dtype=torch.float64).triu(past + 1)[None, None]
    angles = llama_angles(model, torch.arange(start, start + length))
    return llama(hidden_states[:, start:], position_embeddings=angles, attention_mask=mask, past_key_values=cache)[0]


@pytest.mark.parametrize("lookback", [0, 1, 2])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_lasting_slots": 4, "use_attention_sink": True},
        {"num_lasting_slots": 0, "num_key_value_heads": 1},
        {"num_memory_slots": 2, "memory_write": "mean", "use_attention_sink": True, "num_key_value_heads": 4},
    ],
    ids=["one ring", "two parts", "present", "mean"],
)
@torch.no_grad()
def test_memory_is_a_prefix_of_the_window(fields, lookback):
    """Segment after segment of a stream, while the ring fills and after it is full; in one call, and token by token."""
    fields = {"num_hidden_layers": 1, "use_local_attention": False, "num_lookback_segments": lookback} | fields
    model, ids, seen = tiny_model(**fields), tiny_ids(2, 9 * S + 5), []
    attention = model.model.layers[0].self_attn
    hook = attention.register_forward_hook(lambda module, args, output: seen.append((args[0], output[0])))
    outputs = []
    for cuts in ((), (1,) * (ids.shape[1] - 1), (S + 3, 2 * S, 1, S)):
        seen.clear()
        read(model, ids, cuts)
        hidden_states, output = (torch.cat(parts, 1) for parts in zip(*seen, strict=True))
        outputs.append(output)
    hook.remove()
    for segment in range(lookback + 1, 10):
        start = segment * S
        _, cache = read(model, ids[:, :start])
        memory = cache.layers[0].state.memory
        num_written = int((memory.positions[0, :, 0] >= 0).sum())
        assert num_written == min(model.config.num_memory_slots, num_written) > 0
        columns = slice(start, start + S)
        first = start - lookback * S
        wanted = read_by_llama(model, memory, hidden_states[:, : start + S], start, first)
        for output in outputs:
            torch.testing.assert_close(output[:, columns], wanted, **CLOSE)
    assert num_written == model.config.num_memory_slots  # it was full in the end


# No loop over segments: the whole of a call is a fixed number of operations, however long it is.


class CountOperations(TorchDispatchMode):
    """Counts what PyTorch executes."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def operations_of(model, num_segments: int, before: int, with_gradients: bool) -> Counter:
    """What a call of whole segments executes, after others have been read."""
    cache = RMTCache(model.config)
    with torch.set_grad_enabled(with_gradients):
        if before:
            read(model, tiny_ids(2, before), cache=cache)
        with CountOperations() as operations:
            logits = model(tiny_ids(2, num_segments * S), past_key_values=cache).logits
            if with_gradients:
                torch.autograd.grad(logits.sum(), list(model.parameters()))
    return operations.counts


every_form = pytest.mark.parametrize("form", FORMS)


@every_form
@pytest.mark.parametrize("before", [0, 5, 3 * S + 5])
@pytest.mark.parametrize("with_gradients", [False, True])
def test_only_a_turn_of_the_ring_costs_more_operations(form, before, with_gradients):
    """A longer call executes what a shorter one does, and once more what a ring does when it meets its groups again."""
    costs = []
    for factor in (1, 2):  # rings of twice as many groups turn half as often
        fields = {"num_memory_slots": 8} | FORMS[form]
        fields |= {name: factor * fields[name] for name in ("num_memory_slots", "num_lasting_slots") if fields.get(name)}
        model = tiny_model(**fields)
        sizes = {size // model.config.num_slots_per_segment for size, *_ in model.config.memory_parts} or {1}
        period = math.lcm(*sizes)  # segments after which every ring has turned
        # The first call makes what is kept, and the ring is full.
        counts = [operations_of(model, 12 * factor + n * period, before, with_gradients) for n in (0, 0, 1, 2, 3)]
        steps = [later - earlier for earlier, later in itertools.pairwise(counts[1:])]
        assert steps[0] == steps[1] == steps[2] and not any(e - l for e, l in itertools.pairwise(counts[1:]))
        costs.append((steps[0].total(), sum(period // size for size in sizes)))
    (once, turns), (twice, other_turns) = costs
    assert once * other_turns == twice * turns
    assert (once == 0) == (form == "no memory")


def test_each_turn_of_the_ring_costs_one_more_round(monkeypatch):
    model, gate, calls, totals = tiny_model(), memory_rmt.stretched_sigmoid, [], []  # a ring of four segments
    monkeypatch.setattr(memory_rmt, "stretched_sigmoid", lambda logits: calls.append(0) or gate(logits))
    for turns in (1, 2, 3, 4):
        calls.clear()
        with torch.no_grad(), CountOperations() as operations:
            model(tiny_ids(1, 4 * turns * S), use_cache=True)
        totals.append(operations.counts.total())
        assert len(calls) == turns * model.config.num_hidden_layers
    assert len({later - earlier for earlier, later in itertools.pairwise(totals)}) == 1
