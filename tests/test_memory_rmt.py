"""Memory alone: what a segment is condensed to, what a write does to the ring, what a read finds. Worked by hand."""

import math

import pytest
import torch

from rmt_hf import RMTConfig
from rmt_hf.memory_rmt import RMTMemory, Slots, empty_slots, stretched_sigmoid


# Float64 keeps 15 digits and no sum here is longer than 8: what is worked by hand agrees to 1e-12.
EXACT = {"rtol": 0, "atol": 1e-12}


def make_memory(seed: int | None = None, **fields) -> RMTMemory:
    """A memory in float64, all parameters zero, or random with a seed; 2 slots of width 2, 1 head, chunk = segment."""
    defaults = {"hidden_size": 2, "num_attention_heads": 1, "chunk_length": 2, "segment_length": 2}
    memory = RMTMemory(RMTConfig(**{**defaults, "num_memory_slots": 2, "memory_write": "mean", **fields})).double()
    generator = torch.Generator().manual_seed(seed or 0)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.normal_(generator=generator)
            if seed is None:
                parameter.zero_()
    return memory


def number(*values) -> torch.Tensor:
    """The values as a tensor in float64."""
    return torch.tensor(values, dtype=torch.float64)


def one_head(*vectors) -> torch.Tensor:
    """(1, L, 1, D): vectors of one row and one key/value head."""
    return number(*vectors)[None, :, None]


def random_slots(*shape: int, seed: int = 0) -> Slots:
    """Slots of shape (*shape, D) for the keys, the last of `shape` being G."""
    generator = torch.Generator().manual_seed(seed)
    parts = (torch.randn(*shape, *tail, generator=generator, dtype=torch.float64) for tail in ((2,), (2,), ()))
    return Slots(*parts)


def assert_slots(slots: Slots, expected: Slots, **tolerance) -> None:
    for name, got, want in zip(Slots._fields, slots, expected, strict=True):
        torch.testing.assert_close(got, want, **(tolerance or EXACT), msg=lambda text, name=name: f"{name}: {text}")


def nothing_written(memory: RMTMemory, candidates: Slots) -> Slots:
    """The memory (B, M, G, D) that these candidates (B, W, K, G, D) find first."""
    return empty_slots(candidates.keys.flatten(1, 2), memory.blocks * candidates.keys.shape[2])


def memory_after(memory: RMTMemory, candidates: Slots, num_writes: int, start: Slots | None = None) -> Slots:
    """The memory (B, M, G, D) after some of the writes of candidates (B, W, K, G, D)."""
    start = nothing_written(memory, candidates) if start is None else start
    version = memory.version(memory.write(start, candidates), torch.tensor([num_writes]))
    return version.map(lambda tensor: tensor[:, 0])


# Three writes by hand: 2 slots, a segment is one chunk of two tokens, the slot is their mean

# Three segments of two tokens, whose means are keys (2, 1), (0, 2), (7, 4) and values (1, 2), (3, 1), (5, 6).
KEYS = one_head([1, 0], [3, 2], [0, 4], [0, 0], [8, 3], [6, 5]).reshape(1, 3, 2, 1, 2)
VALUES = one_head([0, 0], [2, 4], [6, 0], [0, 2], [5, 5], [5, 7]).reshape(1, 3, 2, 1, 2)
NO_SCORES = torch.zeros(1, 3, 2, 0, dtype=torch.float64)


def by_hand(keys, values, strengths=(0.0, 0.0)) -> Slots:
    """A memory of one row with these slots, oldest first."""
    return Slots(one_head(*keys), one_head(*values), number(*strengths)[None, :, None])


def write_three(gate_bias: float, gate_weight: list[float] | None = None) -> list[Slots]:
    """The memory before and after each of the three writes."""
    memory = make_memory()
    with torch.no_grad():
        memory.gate_bias.fill_(gate_bias)
        memory.gate_weight.copy_(number(*(gate_weight or [0] * 8)))
    candidates = memory.condense(KEYS, VALUES, NO_SCORES)
    return [memory_after(memory, candidates, n) for n in range(4)]


def test_three_writes_worked_by_hand():
    empty, one, two, three = write_three(gate_bias=0.0)  # sigmoid 1/2, stretched 1.2 / 2 - 0.1 = 1/2
    nothing = -math.inf
    assert_slots(empty, by_hand([[0, 0], [0, 0]], [[0, 0], [0, 0]], [nothing, nothing]))
    assert_slots(one, by_hand([[0, 0], [2, 1]], [[0, 0], [1, 2]], [nothing, 0]))  # an empty place takes it whole
    assert_slots(two, by_hand([[2, 1], [0, 2]], [[1, 2], [3, 1]]))
    assert_slots(three, by_hand([[0, 2], [4.5, 2.5]], [[3, 1], [3, 4]]))  # the oldest meets the new one, and is young


def test_a_gate_far_below_zero_keeps_exactly():
    three = write_three(gate_bias=-3.0)[3]
    assert_slots(three, by_hand([[0, 2], [2, 1]], [[3, 1], [1, 2]]), rtol=0, atol=0)


def test_a_gate_far_above_zero_replaces_exactly():
    three = write_three(gate_bias=3.0)[3]
    assert_slots(three, by_hand([[0, 2], [7, 4]], [[3, 1], [5, 6]]), rtol=0, atol=0)


def test_the_gate_is_exact_at_both_ends_and_a_half_in_the_middle():
    ends = stretched_sigmoid(number(-2.5, 0.0, 2.5))  # beyond 2.3979, where the sigmoid is 1 / 12 from its end
    assert ends.tolist() == [0.0, 0.5, 1.0]
    inside = stretched_sigmoid(number(-2.3, 2.3))
    assert 0 < inside[0] < 0.01
    assert 0.99 < inside[1] < 1


@pytest.mark.parametrize("place", range(8))
def test_the_gate_looks_at_old_key_old_value_new_key_new_value_in_this_order(place):
    # The third write: old (2, 1), (1, 2) meets new (7, 4), (5, 6). One weight makes the logit ln 2: sigmoid 2/3.
    features = [2, 1, 1, 2, 7, 4, 5, 6]
    weight = [0.0] * 8
    weight[place] = math.log(2) / features[place]
    three = write_three(gate_bias=0.0, gate_weight=weight)[3]
    gate = 1.2 * 2 / 3 - 0.1  # 0.7
    mixed_key = [2 + gate * 5, 1 + gate * 3]
    mixed_value = [1 + gate * 4, 2 + gate * 4]
    assert_slots(three, by_hand([[0, 2], mixed_key], [[3, 1], mixed_value]))


def test_strengths_are_mixed_by_the_same_gate():
    memory = make_memory(memory_write="select")  # gate 1/2
    scores = number(0.0, -9, math.log(3), -9, -9, math.log(9)).reshape(1, 3, 2, 1)  # sigmoid 1/2, 3/4 and 9/10 win
    three = memory_after(memory, memory.condense(KEYS, VALUES, scores), 3)
    strengths = [math.log(3 / 4), (math.log(1 / 2) + math.log(9 / 10)) / 2]
    assert_slots(three, by_hand([[0, 4], [3.5, 2.5]], [[6, 0], [2.5, 3.5]], strengths))


# Condense: what the three writes make of one segment of two chunks

TOKEN_KEYS = one_head(*[[t, 10 + t] for t in range(8)])  # (1, 8, 1, 2)
TOKEN_VALUES = 100 + TOKEN_KEYS


def condense(scores: torch.Tensor, keys: torch.Tensor = TOKEN_KEYS, **fields) -> Slots:
    """The candidates (K, G, ...) of one row with one segment of two chunks of 4."""
    memory = make_memory(chunk_length=4, segment_length=8, num_memory_slots=0, **fields)
    return memory.condense(keys[:, None], 100 + keys[:, None], scores[None, None]).map(lambda tensor: tensor[0, 0])


def tokens(*places: float) -> Slots:
    """Slots that hold these tokens; a fraction is a mixture of neighbours."""
    keys = number(*[[place, 10 + place] for place in places])[:, None]
    return Slots(keys, 100 + keys, torch.zeros(len(places), 1, dtype=torch.float64))


@pytest.mark.parametrize(
    ("num_slots", "scores", "chosen"),
    [
        (1, [1, 4, 2, 3, 0, 0, 0, 1], [1, 7]),
        (1, [5, 4, 5, 5, -2, -1, -1, -3], [0, 5]),  # of equal scores the earlier wins
        (1, [0, 0, 0, 0, 0, 0, 0, 0], [0, 4]),
        (2, [1, 4, 2, 3, 2, 0, 0, 1], [1, 3, 4, 7]),  # in order of place, not of score
        (2, [4, 1, 2, 3, 1, 2, 3, 4], [0, 3, 6, 7]),
        (2, [5, 1, 5, 5, 0, 2, 1, 1], [0, 2, 5, 6]),
        (3, [0, 0, 0, 0, 1, 0, 0, 0], [0, 1, 2, 4, 5, 6]),
    ],
)
def test_select_takes_the_best_tokens_of_each_chunk_exactly(num_slots, scores, chosen):
    slots = condense(number(*scores)[:, None], memory_write="select", num_slots_per_chunk=num_slots)
    strengths = torch.tensor([[-math.log1p(math.exp(-scores[place]))] for place in chosen], dtype=torch.float64)
    assert_slots(slots._replace(strengths=tokens(*chosen).strengths), tokens(*chosen), rtol=0, atol=0)
    torch.testing.assert_close(slots.strengths, strengths, **EXACT)  # log sigmoid(score)


@pytest.mark.parametrize("num_slots", [1, 2])
def test_select_ties_go_to_the_earlier_token_in_a_long_chunk(num_slots):
    # An unstable sort or maximum shows only from some length on.
    memory = make_memory(
        chunk_length=512, segment_length=512, num_memory_slots=0, memory_write="select", num_slots_per_chunk=num_slots
    )
    keys = torch.arange(512.0).reshape(1, 1, 512, 1, 1).expand(-1, -1, -1, -1, 2)
    scores = (torch.arange(512) % 7 == 3).float().reshape(1, 1, 512, 1)
    assert memory.condense(keys, keys, scores).keys[0, 0, :, 0, 0].tolist() == [3, 10][:num_slots]


def test_select_chooses_for_each_head_by_its_own_score():
    keys = TOKEN_KEYS.expand(-1, -1, 2, -1)
    scores = number([3, 0], [0, 3], [0, 0], [0, 0], [0, 0], [1, 0], [0, 0], [0, 1])
    fields = {"num_attention_heads": 2, "hidden_size": 4, "memory_write": "select"}
    assert condense(scores, keys, **fields).keys[..., 0].tolist() == [[0, 1], [5, 7]]


@pytest.mark.parametrize(("num_slots", "means"), [(1, [1.5, 5.5]), (2, [0.5, 2.5, 4.5, 6.5]), (4, list(range(8)))])
def test_mean_cuts_the_chunk_in_equal_parts(num_slots, means):
    slots = condense(torch.zeros(8, 0, dtype=torch.float64), memory_write="mean", num_slots_per_chunk=num_slots)
    assert_slots(slots, tokens(*means))


def test_scores_come_from_the_hidden_states():
    memory = make_memory(seed=1, memory_write="select")
    hidden_states = torch.randn(1, 3, 2, dtype=torch.float64)
    expected = hidden_states @ memory.score_proj.weight.T + memory.score_proj.bias
    torch.testing.assert_close(memory.scores(hidden_states), expected, **EXACT)
    assert make_memory(memory_write="mean").scores(hidden_states).shape == (1, 3, 0)


# The ring: any number of writes at once is one write after the other

HEADS = {"num_attention_heads": 3, "hidden_size": 6}


def write_one_by_one(memory: RMTMemory, old: Slots, candidates: Slots) -> list[Slots]:
    """The memory (M, G, D) of one row after 0, 1, 2, ... writes, slot by slot and head by head."""
    places = [Slots(*(tensor[m].clone() for tensor in old)) for m in range(len(old.strengths))]
    versions = [old]
    for write in range(len(candidates.strengths)):
        young = []
        for k in range(candidates.strengths.shape[1]):
            new = Slots(*(tensor[write, k] for tensor in candidates))
            keys, values, strengths = [], [], []
            for g in range(new.strengths.shape[0]):
                was = Slots(*(tensor[g] for tensor in places[k]))
                inputs = torch.cat([was.keys, was.values, new.keys[g], new.values[g]])
                logit = memory.gate_weight[g] @ inputs + memory.gate_bias[g]
                gate = (1.2 / (1 + torch.exp(-logit)) - 0.1).clamp(0, 1)
                if was.strengths == -math.inf:
                    gate, was = torch.ones_like(gate), was._replace(strengths=torch.zeros_like(was.strengths))
                keys.append((1 - gate) * was.keys + gate * new.keys[g])
                values.append((1 - gate) * was.values + gate * new.values[g])
                strengths.append((1 - gate) * was.strengths + gate * new.strengths[g])
            young.append(Slots(torch.stack(keys), torch.stack(values), torch.stack(strengths)))
        places = places[len(young) :] + young
        versions.append(Slots(*(torch.stack(part) for part in zip(*places, strict=True))))
    return versions


@pytest.mark.parametrize("num_writes", [0, 1, 2, 3, 5, 6, 7, 11])
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_writing_many_segments_is_writing_one_after_the_other(blocks, num_writes):
    memory = make_memory(seed=2, num_slots_per_chunk=2, num_memory_slots=2 * blocks, **HEADS)
    candidates = random_slots(2, num_writes, 2, 3, seed=3)
    expected = [
        write_one_by_one(memory, *(slots.map(lambda tensor, row=row: tensor[row]) for slots in (start, candidates)))
        for start in [nothing_written(memory, candidates)]
        for row in range(2)
    ]
    rounds = memory.write(nothing_written(memory, candidates), candidates)
    versions = memory.version(rounds, torch.arange(num_writes + 1))
    for n in range(num_writes + 1):
        stacked = Slots(*(torch.stack(part) for part in zip(*(row[n] for row in expected), strict=True)))
        assert_slots(versions.map(lambda tensor, n=n: tensor[:, n]), stacked)


def test_each_row_may_ask_for_versions_of_its_own():
    memory = make_memory(seed=2, num_slots_per_chunk=2, num_memory_slots=6, **HEADS)
    candidates = random_slots(2, 7, 2, 3, seed=3)
    rounds = memory.write(nothing_written(memory, candidates), candidates)
    common = memory.version(rounds, torch.arange(8))
    own = memory.version(rounds, torch.tensor([[0, 7, 3], [5, 5, 1]]))
    expected = common.map(lambda tensor: torch.stack([tensor[0, [0, 7, 3]], tensor[1, [5, 5, 1]]]))
    assert_slots(own, expected, rtol=0, atol=0)


@pytest.mark.parametrize("cut", [0, 1, 2, 3, 4, 6, 7])
def test_writes_can_go_on_from_where_they_stopped(cut):
    memory = make_memory(seed=2, num_slots_per_chunk=2, num_memory_slots=6, **HEADS)
    candidates = random_slots(2, 7, 2, 3, seed=3)
    at_once = memory_after(memory, candidates, 7)
    first, rest = (candidates.map(lambda tensor, part=part: tensor[:, part]) for part in (slice(cut), slice(cut, None)))
    assert_slots(memory_after(memory, rest, 7 - cut, start=memory_after(memory, first, cut)), at_once)


def test_nothing_to_write_leaves_the_memory_as_it_is():
    memory = make_memory(seed=2, num_memory_slots=6, **HEADS)
    old = random_slots(2, 6, 3)
    assert_slots(memory.version(memory.write(old, None), torch.tensor([0])).map(lambda t: t[:, 0]), old, rtol=0, atol=0)


def test_segments_before_the_stream_began_write_nothing():
    memory = make_memory(seed=2, num_memory_slots=3, **HEADS)
    candidates = random_slots(1, 4, 1, 3, seed=3)
    not_begun = candidates.strengths[:, :2].fill_(-math.inf)
    for tensor in candidates[:2]:
        tensor[:, : not_begun.shape[1]] = 0
    begun = candidates.map(lambda tensor: tensor[:, 2:])
    assert_slots(memory_after(memory, candidates, 2), nothing_written(memory, candidates), rtol=0, atol=0)
    assert_slots(memory_after(memory, candidates, 3), memory_after(memory, begun, 1))
    assert_slots(memory_after(memory, candidates, 4), memory_after(memory, begun, 2))


# Reading


def read(memory: RMTMemory, slots: Slots, queries: torch.Tensor, scaling: float = 0.5) -> torch.Tensor:
    """Softmax attention of queries (B, L, G, D) to memory through `readable` and `ask`, (B, L, G, D)."""
    keys, values = memory.readable(slots, scaling)
    weights = (torch.einsum("blgd,bmgd->bglm", memory.ask(queries), keys) * scaling).softmax(-1)
    return torch.einsum("bglm,bmgd->blgd", weights, values)[..., : queries.shape[-1]]


def test_a_read_worked_by_hand():
    memory = make_memory()
    with torch.no_grad():
        memory.null_key.copy_(number([0, 2 * math.log(2)]))
    # Scores of query (1, 1) at scaling 1/2: null ln 2; slots ln 3 - ln 3 and 0 + ln 5. Weights 2, 1, 5 of 8.
    slots = by_hand([[2 * math.log(3), 0], [1, -1]], [[8, 0], [0, 16]], [-math.log(3), math.log(5)])
    torch.testing.assert_close(read(memory, slots, one_head([1, 1])), one_head([1, 10]), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_an_empty_memory_gives_exactly_zero(dtype):
    memory = make_memory(seed=4, num_memory_slots=6, **HEADS).to(dtype)
    queries = 10 * torch.randn(2, 5, 3, 2, generator=torch.Generator().manual_seed(5)).to(dtype)
    output = read(memory, empty_slots(queries, 6), queries)
    assert output.dtype == dtype
    assert torch.equal(output, torch.zeros_like(output))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_an_empty_slot_holds_does_not_matter(dtype):
    memory = make_memory(seed=4, num_memory_slots=3, **HEADS).to(dtype)
    queries = torch.randn(2, 5, 3, 2, generator=torch.Generator().manual_seed(5)).to(dtype)
    slots = Slots(*(tensor.to(dtype) for tensor in random_slots(2, 3, 3)))
    slots = slots._replace(strengths=slots.strengths.to(torch.promote_types(dtype, torch.float32)))
    slots.strengths[:, 0] = -math.inf
    expected = read(memory, slots.map(lambda tensor: tensor[:, 1:]), queries)
    for tensor in slots[:2]:
        tensor[:, 0] = 50
    torch.testing.assert_close(read(memory, slots, queries), expected, rtol=0, atol=torch.finfo(dtype).eps)


def test_a_slot_fades_as_its_strength_falls():
    memory = make_memory()
    outputs = [
        read(memory, by_hand([[0, 0], [0, 0]], [[1, 0], [0, 1]], [0.0, strength]), one_head([1, 1]))[0, 0, 0].tolist()
        for strength in (0.0, -1.0, -5.0, -50.0)
    ]
    faded = [second for _, second in outputs]
    assert faded == sorted(faded, reverse=True)
    assert outputs[0] == pytest.approx([1 / 3, 1 / 3])  # the null slot has the third third
    assert outputs[-1] == pytest.approx([1 / 2, 0])


# What is trained


def run(memory: RMTMemory, hidden_states: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """From tokens (B, W * S, ...) to what is read (B, L, G, D) after all segments were written."""
    segments = (tensor.unflatten(1, (-1, 4)) for tensor in (keys, values, memory.scores(hidden_states)))
    candidates = memory.condense(*segments)
    after = memory_after(memory, candidates, candidates.keys.shape[1])
    return read(memory, after, keys[:, :3])


def run_inputs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(6)
    shapes = ((2, 20, 4), (2, 20, 2, 2), (2, 20, 2, 2))  # 5 segments of 4, into a ring of 2: every slot is gated
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


RUN_FIELDS = {
    "hidden_size": 4,
    "num_attention_heads": 2,
    "chunk_length": 2,
    "segment_length": 4,
    "num_memory_slots": 4,
}


@pytest.mark.parametrize("write", ["select", "mean"])
def test_every_parameter_changes_what_is_read(write):
    memory = make_memory(seed=7, memory_write=write, **RUN_FIELDS)
    scores = set() if write == "mean" else {"score_proj.weight", "score_proj.bias"}
    assert {name for name, _ in memory.named_parameters()} == {"null_key", "gate_weight", "gate_bias"} | scores
    before = run(memory, *run_inputs())
    for name, parameter in memory.named_parameters():
        with torch.no_grad():
            parameter += 0.1
            after = run(memory, *run_inputs())
            parameter -= 0.1
        assert (after - before).abs().max() > 1e-4, name


def test_the_score_is_trained_through_the_strength():
    memory = make_memory(seed=7, memory_write="select", **RUN_FIELDS)
    run(memory, *run_inputs()).square().sum().backward()
    for parameter in memory.score_proj.parameters():
        assert (parameter.grad.abs() > 1e-6).all()


@pytest.mark.parametrize("write", ["select", "mean"])
def test_gradients_are_those_of_finite_differences(write):
    memory = make_memory(seed=7, memory_write=write, **RUN_FIELDS)
    inputs = [tensor.requires_grad_() for tensor in run_inputs()] + list(memory.parameters())
    # gradcheck changes its inputs in place, so the parameters need not be handed on.
    assert torch.autograd.gradcheck(lambda *changed: run(memory, *changed[:3]), inputs, fast_mode=True)
