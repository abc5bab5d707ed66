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

from helpers import FORMS, pad_left, read, tiny_ids, tiny_model
from rmt_hf import RMTCache, RMTConfig, memory_rmt
from rmt_hf.attention_rmt import RMTRMSNorm, RMTRotaryEmbedding, rotate


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
    ids=["lasting", "two parts", "present", "mean"],
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
@pytest.mark.parametrize(("before", "with_gradients"), [(0, False), (5, False), (0, True), (3 * S + 5, True)])
def test_only_a_turn_of_the_ring_costs_more_operations(form, before, with_gradients):
    """A longer call executes what a shorter one does, and once more what a ring does when it meets its groups again."""
    costs = []
    for factor in (1, 2):  # rings of twice as many groups turn half as often
        fields = {"num_memory_slots": 8} | FORMS[form]
        fields |= {
            name: factor * fields[name] for name in ("num_memory_slots", "num_lasting_slots") if fields.get(name)
        }
        model = tiny_model(**fields, num_hidden_layers=1)
        sizes = {size // model.config.num_slots_per_segment for size, *_ in model.config.memory_parts} or {1}
        period = math.lcm(*sizes)  # segments after which every ring has turned
        counts = [operations_of(model, 8 * factor + n * period, before, with_gradients) for n in range(3)]
        first, second = (later - earlier for earlier, later in itertools.pairwise(counts))
        assert first == second and not any(earlier - later for earlier, later in itertools.pairwise(counts))
        costs.append((first.total(), sum(period // size for size in sizes)))
    (once, turns), (twice, other_turns) = costs
    assert once * other_turns == twice * turns
    assert (once == 0) == (form == "no memory")


def test_each_turn_of_the_ring_costs_one_more_round(monkeypatch):
    model, gate, calls, totals = tiny_model(), memory_rmt.stretched_sigmoid, [], []  # a ring of four segments
    monkeypatch.setattr(memory_rmt, "stretched_sigmoid", lambda logits: calls.append(0) or gate(logits))
    for turns in (2, 3, 4, 5):  # by then it is full
        calls.clear()
        with torch.no_grad(), CountOperations() as operations:
            model(tiny_ids(1, 4 * turns * S), use_cache=True)
        totals.append(operations.counts.total())
        assert len(calls) == turns * model.config.num_hidden_layers
    assert len({later - earlier for earlier, later in itertools.pairwise(totals)}) == 1


# What is computed in the layer: norms, and attention by every implementation.


def test_the_norm_is_the_norm():
    norm, states = RMTRMSNorm(8, 0.1).double(), torch.randn(2, 5, 3, 8, dtype=torch.float64).requires_grad_()
    norm.weight.data.normal_()
    output, gradient = norm(states), torch.randn(2, 5, 3, 8, dtype=torch.float64)
    plain = torch.nn.functional.rms_norm(states, (8,), norm.weight, 0.1)
    torch.testing.assert_close(output, plain, rtol=0, atol=1e-14)
    inputs = (states, norm.weight)
    found, expected = (torch.autograd.grad(result, inputs, gradient) for result in (output, plain))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    assert torch.autograd.gradgradcheck(norm, (states[0, 0],))


def test_the_norm_of_zeros_has_a_gradient_that_is_finite():
    norm, states = RMTRMSNorm(4, 1e-6), torch.zeros(2, 4, requires_grad=True)
    norm(states).sum().backward()
    assert states.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_norm_is_computed_in_float32(dtype):
    norm, states = RMTRMSNorm(64, 1e-6), torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    norm.weight.data.uniform_(0.5, 2, generator=torch.Generator().manual_seed(1))
    narrow = norm.to(dtype)(states.to(dtype))
    assert narrow.dtype == dtype
    assert torch.equal(narrow, norm.float()(states.to(dtype).float()).to(dtype))
    gradients, wide = [], states.clone().requires_grad_()
    for is_narrow in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_narrow):
            gradients += torch.autograd.grad(norm(wide).square().sum(), wide)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("dtype", "close"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
@pytest.mark.parametrize("is_autocast", [False, True])
def test_narrow_numbers(dtype, close, is_autocast):
    """Gradients of a narrow model, or of a wide one in autocast, point where those of eager float64 do."""
    gradients = []
    for is_narrow in (True, False):
        # A mean chooses nothing: no token is kept in place of another because of a rounding.
        wide = torch.float32 if is_autocast else torch.float64
        model = tiny_model(memory_write="mean", use_qk_norm=True, use_attention_sink=True, dtype=wide)
        model = model.to(dtype) if is_narrow and not is_autocast else model
        model = use(model, "sdpa" if is_narrow else "eager")
        with torch.autocast("cpu", dtype, enabled=is_narrow and is_autocast):
            logits = model(tiny_ids(2, 5 * S + 3), use_cache=False).logits
        logits.double().square().mean().backward()
        gradients.append(torch.cat([parameter.grad.double().flatten() for parameter in model.parameters()]))
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 1 - close


def test_gradients_by_torch_func_are_those_of_autograd():
    model, ids = tiny_model(num_hidden_layers=1), tiny_ids(3, 4 * S)
    embeds = model.model.embed_tokens(ids).detach()
    found = torch.func.grad(lambda inputs: model(inputs_embeds=inputs, use_cache=False).logits.square().sum())(embeds)
    embeds.requires_grad_()
    model(inputs_embeds=embeds, use_cache=False).logits.square().sum().backward()
    torch.testing.assert_close(found, embeds.grad, rtol=0, atol=1e-11)


def use(model, implementation: str):
    """The model with another implementation, set as transformers sets it but without its checks."""
    model.config._attn_implementation = implementation
    return model


CUTS = [(), (3,), (S + 3, 1, 2, S, 2 * S + 1), (1,) * (2 * S + 1)]


@every_form
@pytest.mark.parametrize("cuts", CUTS)
def test_eager_is_sdpa(form, cuts):
    """Outputs, gradients and states, in training mode."""
    ids, results = tiny_ids(2, 7 * S + 3), []
    for implementation in ("eager", "sdpa"):
        model = tiny_model(**FORMS[form], attn_implementation=implementation).train()
        assert model.config._attn_implementation == implementation
        logits, cache = read(model, ids, cuts)
        gradients = torch.autograd.grad(logits.square().mean(), list(model.parameters()))
        results.append([logits, *gradients, *cache.tensors()])
    torch.testing.assert_close(*results, **CLOSE)


@every_form
def test_eager_is_sdpa_for_rows_at_different_positions(form):
    model, batch = tiny_model(**FORMS[form]), pad_left([tiny_ids(1, n)[0] for n in (3, S, 5 * S + 1)])
    logits = []
    for implementation in ("eager", "sdpa"):
        outputs = use(model, implementation)(**batch, use_cache=True)
        more, _ = read(model, tiny_ids(3, 2 * S), (1, 3), outputs.past_key_values)
        logits.append(torch.cat([outputs.logits[batch["attention_mask"]].flatten(), more.flatten()]))
    torch.testing.assert_close(*logits, **CLOSE)


def seen_columns(config: RMTConfig, position: int, is_short: bool) -> list[int]:
    """Columns of prefix and window, or of the call if it is short and new, that the token at a position attends to."""
    if is_short:
        return [*range(position + 1)]
    segment, offset = divmod(position, S)
    written = max(0, segment - config.num_lookback_segments)
    slots = sum(min(size, written * config.num_slots_per_segment) for size, *_ in config.memory_parts)
    first = config.prefix_length - (slots + config.use_attention_sink) * (written > 0)
    first = config.prefix_length if config.fusion_type == "softmax" else first  # whose prefix has a softmax of its own
    unborn = max(0, config.num_lookback_segments - segment) * S  # columns of the window before the stream began
    window = range(config.prefix_length + unborn, config.prefix_length + config.num_lookback_segments * S + offset + 1)
    return [*range(first, config.prefix_length), *window]


@every_form
@pytest.mark.parametrize("length", [S, 2 * S, 6 * S + 3])
@pytest.mark.parametrize("padded", [False, True])
def test_recorded_attentions_are_shares_in_the_graph(form, length, padded):
    model = tiny_model(**FORMS[form], attn_implementation="eager")
    embeds = model.model.embed_tokens(tiny_ids(2, length)).detach().requires_grad_()
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, :3] = not padded
    outputs = model(inputs_embeds=embeds, attention_mask=mask, output_attentions=True)
    assert len(outputs.attentions) == 2
    is_short = not padded and length <= model.config.window_length
    width = length if is_short else model.config.prefix_length + model.config.window_length
    position_ids = mask.cumsum(1) - 1
    for weights in outputs.attentions:
        assert weights.shape == (2, 4, length, width)
        torch.testing.assert_close(weights.sum(-1)[:, 0][mask], torch.ones(int(mask.sum())).double(), **CLOSE)
        for row, column in mask.nonzero().tolist():
            seen = seen_columns(model.config, int(position_ids[row, column]), is_short)
            assert (weights[row, :, column] > 0).nonzero()[:, 1].unique().tolist() == seen
    (gradient,) = torch.autograd.grad(outputs.attentions[1].square().sum(), embeds)
    assert gradient[mask].abs().max() > 1e-3


# Not compiled: for a CPU, with a mask that it captures, compiled flex attention of PyTorch 2.13 corrupts memory.
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("form", ["gated select", "two parts", "paper"])
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
            alone, _ = read(model, tiny_ids(2, 4 * S + 3), (3 * S + 1, 1))
            rows = [outputs.logits[batch["attention_mask"]], more, alone]
            logits.append(torch.cat([each.flatten() for each in rows]))
    torch.testing.assert_close(*logits, **CLOSE)


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
def test_flash_attention_needs_no_mask_for_rows_at_one_position(form, cuts, flash):
    model, ids = tiny_model(**FORMS[form]), tiny_ids(2, 7 * S + 3)
    with torch.no_grad():
        expected, _ = read(model, ids, cuts)
        assert not flash
        logits, _ = read(use(model, "flash_attention_2"), ids, cuts)
    torch.testing.assert_close(logits, expected, **CLOSE)
    assert any(is_causal for _, _, is_causal in flash)


@pytest.mark.parametrize("columns", [1, S + 1])
def test_flash_attention_refuses_what_needs_a_mask_and_leaves_the_state(columns, flash):
    model, batch = tiny_model(), pad_left([tiny_ids(1, n)[0] for n in (3, 2 * S)])
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        for inputs in ({"past_key_values": cache}, {"attention_mask": torch.tensor([[1] * columns, [0] * columns])}):
            with pytest.raises(ValueError, match="attn_implementation 'flash_attention_2' takes no masks"):
                use(model, "flash_attention_2")(tiny_ids(2, columns), **inputs)
        assert cache.positions == [3, 2 * S]
        use(model, "sdpa")(tiny_ids(2, columns), past_key_values=cache)
