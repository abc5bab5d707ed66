"""Memory alone: what a segment offers, what a write does to a ring, what two parts take. Worked by hand."""

import math

import pytest
import torch

from rmt_hf import RMTConfig
from rmt_hf.memory_rmt import LEAST, VALUE_SHIFT, RMTMemory, Segments, Slots, attention_evidence, stretched_sigmoid


# Float64 keeps 15 digits and no sum here is longer than 8: what is worked by hand agrees to 1e-12.
EXACT = {"rtol": 0, "atol": 1e-12}
NOTHING = -math.inf


def make_memory(seed: int | None = None, **fields) -> RMTMemory:
    """A memory in float64, all parameters zero, or random with a seed; 2 slots of width 2, 1 head, chunk = segment."""
    defaults = {"hidden_size": 2, "num_attention_heads": 1, "chunk_length": 2, "segment_length": 2}
    defaults |= {"num_memory_slots": 2, "num_observing_tokens": 1}
    memory = RMTMemory(RMTConfig(**{**defaults, **fields})).double()
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


def segments_of(
    keys: torch.Tensor, values: torch.Tensor, scores: torch.Tensor | None = None, evidence: torch.Tensor | None = None
) -> Segments:
    """The first segments of a stream, from tensors (B, W, S, G, D) and (B, W, S, G)."""
    scores = keys[..., :0, 0] if scores is None else scores
    return Segments(keys, values, scores, evidence, numbers=torch.arange(keys.shape[1])[None], is_packed=False)


def slots_of(keys: list, values: list, strengths: list, positions: list) -> Slots:
    """Slots of one row and one head, oldest first."""
    return Slots(
        number(*keys)[None, :, None],
        number(*values)[None, :, None],
        number(*strengths)[None, :, None],
        torch.tensor(positions)[None, :, None],
    )


def assert_slots(slots: Slots, expected: Slots, **tolerance) -> None:
    for name, got, want in zip(Slots._fields, slots, expected, strict=True):
        torch.testing.assert_close(got, want, **(tolerance or EXACT), msg=lambda text, name=name: f"{name}: {text}")


def empty_memory(memory: RMTMemory, segments: Segments) -> Slots:
    """The memory (B, M, G, D) that these segments find first."""
    return Slots.empty(segments.keys[:, 0], sum(ring.num_slots for ring in memory.rings))


def versions(memory: RMTMemory, segments: Segments, start: Slots | None = None) -> list[Slots]:
    """The memory (B, M, G, D) before these writes and after each of them, all done at once."""
    stages, _ = memory(empty_memory(memory, segments) if start is None else start, segments)
    found = memory.version(stages, torch.arange(segments.keys.shape[1] + 1))
    return [found.map(lambda tensor, n=n: tensor[:, n]) for n in range(segments.keys.shape[1] + 1)]


# Three writes by hand: 2 slots, 1 head, a segment is one chunk of two tokens, which gives one slot.

# Three segments of two tokens, whose means are keys (2, 1), (0, 2), (7, 4) and values (1, 2), (3, 1), (5, 6).
KEYS = number([1, 0], [3, 2], [0, 4], [0, 0], [8, 3], [6, 5]).reshape(1, 3, 2, 1, 2)
VALUES = number([0, 0], [2, 4], [6, 0], [0, 2], [5, 5], [5, 7]).reshape(1, 3, 2, 1, 2)


def write_three(**values: float | list[float]) -> list[Slots]:
    """The memory before and after each of three writes of means, by a ring with these parameters. (Others fade.)"""
    memory = make_memory(memory_write="mean")
    for name in ("gate_scale", "fade"):
        setattr(memory.rings[0], name, torch.nn.Parameter(number(0.0)))
    with torch.no_grad():
        for name, value in values.items():
            getattr(memory.rings[0], name).copy_(number(value))
    return versions(memory, segments_of(KEYS, VALUES))


def test_three_writes_worked_by_hand():
    empty, one, two, three = write_three()  # sigmoid 1/2, stretched 1.2 / 2 - 0.1 = 1/2
    assert_slots(empty, slots_of([[0, 0], [0, 0]], [[0, 0], [0, 0]], [NOTHING, NOTHING], [-1, -1]))
    # An empty slot takes it whole; a mean is where its last token is.
    assert_slots(one, slots_of([[0, 0], [2, 1]], [[0, 0], [1, 2]], [NOTHING, 0], [-1, 1]))
    assert_slots(two, slots_of([[2, 1], [0, 2]], [[1, 2], [3, 1]], [0, 0], [1, 3]))
    # The oldest meets the new one and is the youngest then; half and half, it stays where it was.
    assert_slots(three, slots_of([[0, 2], [4.5, 2.5]], [[3, 1], [3, 4]], [0, 0], [3, 1]))


def test_a_slot_fades_and_the_gate_compares_strengths():
    # Third write: 0 new against 0 - ln 2 / 3 faded, three times the difference: sigmoid 2/3, stretched 0.7.
    three = write_three(gate_scale=3.0, fade=math.log(2) / 3)[3]
    key, value = [2 + 0.7 * 5, 1 + 0.7 * 3], [1 + 0.7 * 4, 2 + 0.7 * 4]
    # It is more than half a new one, and stands where that does.
    assert_slots(three, slots_of([[0, 2], key], [[3, 1], value], [0, -0.3 * math.log(2) / 3], [3, 5]))
    # A gate at a half by its bias: strength half way between 0 - 0.5 and 0.
    three = write_three(gate_scale=2.0, fade=0.5, gate_bias=-1.0)[3]
    assert_slots(three, slots_of([[0, 2], [4.5, 2.5]], [[3, 1], [3, 4]], [0, -0.25], [3, 1]))


def test_a_gate_far_below_zero_keeps_exactly():
    three = write_three(gate_bias=-3.0, fade=0.25)[3]
    assert_slots(three, slots_of([[0, 2], [2, 1]], [[3, 1], [1, 2]], [0, -0.25], [3, 1]), rtol=0, atol=0)


def test_a_gate_far_above_zero_replaces_exactly():
    three = write_three(gate_bias=3.0, fade=0.25)[3]
    assert_slots(three, slots_of([[0, 2], [7, 4]], [[3, 1], [5, 6]], [0, 0], [3, 5]), rtol=0, atol=0)


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
    three = write_three(gate_weight=weight)[3]
    gate = 1.2 * 2 / 3 - 0.1  # 0.7
    mixed_key = [2 + gate * 5, 1 + gate * 3]
    mixed_value = [1 + gate * 4, 2 + gate * 4]
    assert_slots(three, slots_of([[0, 2], mixed_key], [[3, 1], mixed_value], [0, 0], [3, 5]))


# Which candidate meets which slot: one group of slots, and segments of as many chunks of one token


def write_strengths(
    *strengths: list[float], bias: float = 0.0, fade: float = 0.0, mixes: bool = False, **fields
) -> list[list[tuple]]:
    """After each write of tokens of these strengths, the slots as (position, strength), in order of the ring.

    The gate is 0 or 1 where strengths differ by more than a tenth: unless it `mixes`, every slot is that of one token.
    """
    size = len(strengths[0])
    fields = {"num_lasting_slots": 0, "segment_length": size, "num_memory_slots": size} | fields
    memory = make_memory(chunk_length=1, **fields)
    with torch.no_grad():
        memory.rings[0].gate_scale.fill_(100.0)
        memory.rings[0].gate_bias.fill_(bias)
        memory.rings[0].fade.fill_(fade)
    evidence = number(*strengths)[None, :, :, None]
    keys = torch.arange(evidence.numel(), dtype=torch.float64).reshape(1, -1, size, 1, 1).expand(-1, -1, -1, -1, 2)
    found = []
    for slots in versions(memory, segments_of(keys, 100 + keys, evidence=evidence))[1:]:
        positions, kept = slots.positions.flatten().tolist(), slots.strengths.flatten().tolist()
        there = [position for position in positions if position >= 0]
        if not mixes:
            assert slots.keys[0, -len(there) :, 0, 0].tolist() == there
            assert slots.values[0, -len(there) :, 0, 0].tolist() == [100 + position for position in there]
        found.append(list(zip(positions, kept, strict=True)))
    return found


def test_the_strongest_candidate_meets_the_weakest_slot():
    first, second, third = write_strengths([1, 3, 2], [2.5, 0, 5], [7, 2.2, 6])
    assert first == [(1, 3), (2, 2), (0, 1)]  # strongest first
    assert second == [(5, 5), (3, 2.5), (1, 3)]  # 5 meets 1, 2.5 meets 2, 0 meets 3, which stays
    assert third == [(6, 7), (8, 6), (5, 5)]  # 7 meets 2.5, 6 meets 3, 2.2 meets 5


def test_what_fades_gives_way_to_what_was_weaker_once():
    kept, replaced = (write_strengths([3, 2], [1, 1.5], [1.6, 1], fade=fade) for fade in (0.0, 0.75))
    assert kept[2] == [(1, 2), (0, 3)]
    # Faded once, 2 is 1.25 and gives way to 1.5, 3 is 2.25; then 1.5 is 0.75 and gives way to 1.6, 2.25 is 1.5.
    assert replaced[1] == [(3, 1.5), (0, 2.25)]
    assert replaced[2] == [(4, 1.6), (0, 1.5)]


def test_equal_strengths_meet_in_the_order_of_the_text_and_of_the_ring():
    memory = make_memory(chunk_length=1, segment_length=4, num_memory_slots=4, num_lasting_slots=0)
    keys = number(*range(8)).reshape(1, 2, 4, 1, 1).expand(-1, -1, -1, -1, 2)
    _, first, second = versions(memory, segments_of(keys, keys, evidence=torch.ones_like(keys[..., 0])))
    assert first.positions.flatten().tolist() == [0, 1, 2, 3]
    assert second.keys[0, :, 0, 0].tolist() == [2, 3, 4, 5]  # all gates are a half: slot i met candidate i


def test_what_differs_by_a_rounding_is_equal():
    """Sums of equal tokens are rounded in another way in another call: no choice may depend on it."""
    tiny = 1e-12
    for change in (0.0, tiny, -tiny):
        found = write_strengths([1, 1 + change, 1 - change], [2, 2 - change, 2 + change], [1, 3 + change, 3])
        assert [[position for position, _ in slots] for slots in found] == [[0, 1, 2], [3, 4, 5], [7, 8, 5]]
        # A gate that stands at a half, where equal strengths meet, leaves the slot where it is.
        mixed = write_strengths([1, 1 + change], [1 - change, 1], mixes=True)
        assert [position for position, _ in mixed[1]] == [0, 1]


def test_groups_are_written_in_turn_and_the_youngest_is_last():
    found = write_strengths([1, 2], [4, 3], [5, 0], num_memory_slots=4)
    assert found[0] == [(-1, NOTHING), (-1, NOTHING), (1, 2), (0, 1)]
    assert found[1] == [(1, 2), (0, 1), (2, 4), (3, 3)]
    assert found[2] == [(2, 4), (3, 3), (4, 5), (1, 2)]  # only the group of the first write was met


# Fillers: what takes an empty slot and gives way to anything


def test_with_a_sink_the_first_token_only_fills_a_slot():
    (first, second, _), plain = (
        write_strengths([9, 1], [0.5, -50], [2, 3], use_attention_sink=sink) for sink in (True, False)
    )
    assert first == [(1, 1), (0, LEAST)]
    # Strongest 0.5 takes the place of the filler whatever the gate says; -50 meets 1.
    assert second == [(2, 0.5), (1, 1)]
    assert plain[0] == [(0, 9), (1, 1)]


def test_a_gate_cannot_let_a_filler_in_or_keep_one():
    open_gate, shut_gate = (
        write_strengths([9, 1], [LEAST, 2], bias=bias, use_attention_sink=True) for bias in (1e6, -1e6)
    )
    # 2 meets the filler of the first write; the filler of the second meets 1.
    assert open_gate[1] == shut_gate[1] == [(3, 2), (1, 1)]
    assert write_strengths([9, 1], [LEAST, LEAST], bias=1e6, use_attention_sink=True)[1] == [(0, LEAST), (1, 1)]


# What a segment offers

TOKEN_KEYS = number(*[[t, 10 + t] for t in range(8)])[None, None, :, None]  # (1, 1, 8, 1, 2)


def offered(scores: torch.Tensor, keys: torch.Tensor = TOKEN_KEYS, **fields) -> Slots:
    """The candidates (K, G, ...) of one row with one segment of two chunks of 4, their values not scaled."""
    memory = make_memory(chunk_length=4, segment_length=8, **{"num_memory_slots": 24, "num_lasting_slots": 0} | fields)
    evidence = scores[None, None] if memory.rings[0].uses_evidence else None
    slots, _ = memory.rings[0].candidates(segments_of(keys, 100 + keys, evidence=evidence), None)
    return slots.map(lambda tensor: tensor[0, 0])


def tokens(*places: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of these tokens; a fraction is a mixture of neighbours."""
    keys = number(*[[place, 10 + place] for place in places])[:, None]
    return keys, 100 + keys


@pytest.mark.parametrize(
    ("num_slots", "scores", "chosen"),  # strongest first
    [
        (1, [1, 4, 2, 3, 0, 0, 0, 1], [1, 7]),
        (1, [5, 4, 5, 5, -2, -1, -1, -3], [0, 5]),  # of equal scores the earlier wins
        (1, [0, 0, 0, 0, 0, 0, 0, 1], [7, 0]),
        (2, [1, 4, 2, 3, 2, 0, 0, 5], [7, 1, 3, 4]),
        (2, [4, 1, 2, 3, 1, 2, 3, 4], [0, 7, 3, 6]),  # of equals, the earlier chunk first
        (2, [5, 1, 5, 5, 0, 2, 1, 1], [0, 2, 5, 6]),
        (3, [0, 0, 0, 0, 1, 0, 0, 0], [4, 0, 1, 2, 5, 6]),
    ],
)
def test_select_takes_the_best_tokens_of_each_chunk_exactly(num_slots, scores, chosen):
    slots = offered(number(*scores)[:, None], num_slots_per_chunk=num_slots)
    strengths = number(*[scores[place] for place in chosen])[:, None]
    assert_slots(slots, Slots(*tokens(*chosen), strengths, torch.tensor(chosen)[:, None]), rtol=0, atol=0)


@pytest.mark.parametrize("num_slots", [1, 2])
def test_select_ties_go_to_the_earlier_token_in_a_long_chunk(num_slots):
    # An unstable sort or maximum shows only from some length on.
    fields = {"chunk_length": 512, "segment_length": 512, "num_memory_slots": 2, "num_lasting_slots": 0}
    memory = make_memory(num_slots_per_chunk=num_slots, **fields)
    keys = torch.arange(512.0).reshape(1, 1, 512, 1, 1).expand(-1, -1, -1, -1, 2)
    evidence = (torch.arange(512) % 7 == 3).float().reshape(1, 1, 512, 1)
    slots, _ = memory.rings[0].candidates(segments_of(keys, keys, evidence=evidence), None)
    assert slots.keys[0, 0, :, 0, 0].tolist() == [3, 10][:num_slots]


def test_select_chooses_for_each_head_by_its_own_strength():
    keys = TOKEN_KEYS.expand(-1, -1, -1, 2, -1)
    scores = number([3, 0], [0, 3], [0, 0], [0, 0], [0, 0], [1, 0], [0, 0], [0, 4])
    slots = offered(scores, keys, num_attention_heads=2, hidden_size=4)
    assert slots.keys[..., 0].tolist() == [[0, 7], [5, 1]]


@pytest.mark.parametrize(("num_slots", "means"), [(1, [1.5, 5.5]), (2, [0.5, 2.5, 4.5, 6.5]), (4, list(range(8)))])
def test_mean_cuts_the_chunk_in_equal_parts(num_slots, means):
    slots = offered(
        number(*range(8))[:, None], memory_write="mean", num_slots_per_chunk=num_slots, num_lasting_slots=None
    )
    ends = [end - 1 for end in range(4 // num_slots, 9, 4 // num_slots)]
    strengths = torch.zeros(len(means), 1, dtype=torch.float64)
    assert_slots(slots, Slots(*tokens(*means), strengths, torch.tensor(ends)[:, None]))


def test_scores_come_from_the_hidden_states_where_a_part_uses_them():
    memory, hidden_states = make_memory(seed=1), torch.randn(1, 3, 2, dtype=torch.float64)
    expected = hidden_states @ memory.score_proj.weight.T + memory.score_proj.bias
    torch.testing.assert_close(memory.scores(hidden_states), expected, **EXACT)
    for fields in ({"memory_write": "mean"}, {"num_lasting_slots": 0}):
        without = make_memory(**fields)
        assert without.scores(hidden_states).shape == (1, 3, 0)
        assert without.score_proj is None
    assert make_memory(num_lasting_slots=2).score_proj is not None


def test_evidence_worked_by_hand():
    # Two query heads of one key/value head, two tokens asking, a segment of three tokens.
    queries = number([math.log(2), 0], [0, 0], [0, math.log(3)], [math.log(4), math.log(4)]).reshape(1, 1, 2, 2, 2)
    keys = number([2, 0], [0, 2], [0, 0]).reshape(1, 1, 1, 3, 2)
    # Scores times 1/2 are logarithms: shares (2, 1, 1) / 4, (1, 1, 1) / 3, (1, 3, 1) / 5 and (4, 4, 1) / 9.
    shares = number(1 / 2 + 1 / 3 + 1 / 5 + 4 / 9, 1 / 4 + 1 / 3 + 3 / 5 + 4 / 9, 1 / 4 + 1 / 3 + 1 / 5 + 1 / 9) / 4
    queries.requires_grad_()
    evidence = attention_evidence(queries, keys.requires_grad_(), 0.5)
    assert evidence.shape == (1, 1, 3, 1) and not evidence.requires_grad
    torch.testing.assert_close(evidence.flatten(), (shares + 1e-8).log(), **EXACT)


def test_evidence_of_each_head_is_from_its_own_query_heads():
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(2, 3, 4, 5, 2, generator=generator, dtype=torch.float64)  # (B, W, H, L, D)
    keys = torch.randn(2, 3, 2, 6, 2, generator=generator, dtype=torch.float64)  # (B, W, G, S, D)
    whole = attention_evidence(queries, keys, 0.7)
    for head in range(2):
        of_head = attention_evidence(queries[:, :, 2 * head : 2 * head + 2], keys[:, :, head : head + 1], 0.7)
        torch.testing.assert_close(whole[..., head : head + 1], of_head, **EXACT)
    for dtype in (torch.bfloat16, torch.float16):
        assert attention_evidence(queries.to(dtype), keys.to(dtype), 0.7).dtype == torch.float32


# Strengths and values of the parts

SCORES, EVIDENCE = number(0.5, 2, -1, 1.5), number(-3, -1, -0.5, -2)  # of a segment of four tokens


def write_one(sink: bool = False, **fields) -> tuple[RMTMemory, Slots]:
    """The memory after one segment of four tokens, each its own chunk, was offered to a part or two of four slots."""
    fields = {"chunk_length": 1, "segment_length": 4, "use_attention_sink": sink} | fields
    memory = make_memory(**fields)
    keys = TOKEN_KEYS[:, :, :4]
    segments = segments_of(keys, 100 + keys, SCORES[None, None, :, None], EVIDENCE[None, None, :, None])
    return versions(memory, segments)[1].map(lambda tensor: tensor[0, :, 0])


def scaled(*places: int) -> torch.Tensor:
    """Values of these tokens, scaled by the sigmoid of their score and four."""
    return torch.sigmoid(SCORES[[*places]] + 4)[:, None] * tokens(*places)[1][:, 0]


def test_the_lasting_part_is_by_score_and_the_present_part_by_evidence():
    lasting, present = (
        write_one(num_memory_slots=4, num_lasting_slots=4),
        write_one(num_memory_slots=4, num_lasting_slots=0),
    )
    assert lasting.positions.tolist() == [1, 3, 0, 2]
    assert torch.equal(lasting.strengths, SCORES[[1, 3, 0, 2]])
    torch.testing.assert_close(lasting.values, scaled(1, 3, 0, 2), **EXACT)
    assert present.positions.tolist() == [2, 1, 3, 0]
    assert torch.equal(present.strengths, EVIDENCE[[2, 1, 3, 0]])
    assert torch.equal(present.values, tokens(2, 1, 3, 0)[1][:, 0])  # not scaled


def test_what_the_lasting_part_takes_is_not_offered_to_the_present_part():
    """Two segments: the first fills both parts; of the second, the lasting part takes what is better than it has."""
    memory = make_memory(chunk_length=1, num_memory_slots=4, num_lasting_slots=2)
    for ring in memory.rings:
        torch.nn.init.constant_(ring.gate_scale, 100.0)
    scores, evidence = (number(*both).reshape(1, 2, 2, 1) for both in ((0, 1, 2, -5), (-1, -2, -0.5, -1.5)))
    keys = TOKEN_KEYS[:, :, :4].reshape(1, 2, 2, 1, 2)
    _, first, second = versions(memory, segments_of(keys, 100 + keys, scores, evidence))
    # All of the first segment fills empty slots of the lasting part, so that the present part gets fillers.
    assert first.positions.flatten().tolist() == [1, 0, 0, 1]
    assert first.strengths.flatten().tolist() == [1, 0, LEAST, LEAST]
    # Token 2 is stronger than 0 and taken; 3 is not, and the present part takes it in place of a filler.
    assert second.positions.flatten().tolist() == [2, 1, 3, 1]
    assert second.strengths.flatten().tolist() == [2, 1, -1.5, LEAST]
    assert second.values[0, 2].tolist() == [[103, 113]]


@pytest.mark.parametrize("gate", [0.5, 0.6])
def test_a_token_is_taken_if_the_gate_is_above_a_half(gate):
    memory = make_memory(chunk_length=2, num_memory_slots=2, num_lasting_slots=1)
    torch.nn.init.constant_(memory.rings[0].gate_bias, math.log((gate + 0.1) / (1.1 - gate)))
    torch.nn.init.constant_(memory.rings[1].gate_bias, 100.0)
    scores, evidence = (number(*both).reshape(1, 2, 2, 1) for both in ((1, 0, 1, 0), (0, 1, 1, 0)))
    keys = TOKEN_KEYS[:, :, :4].reshape(1, 2, 2, 1, 2)
    _, first, second = versions(memory, segments_of(keys, keys, scores, evidence))
    assert first.positions.flatten().tolist() == [0, 1]  # one candidate each, of which only the first is taken
    # Candidate of both parts is token 2. Where the lasting part has taken it, the present part is offered a filler.
    assert second.positions.flatten().tolist() == ([2, 1] if gate > 0.5 else [0, 2])


def test_with_a_sink_the_first_token_is_the_least_in_every_part():
    for fields in ({"num_lasting_slots": 4}, {"num_lasting_slots": 0}):
        slots = write_one(sink=True, num_memory_slots=4, **fields)
        assert (slots.positions[-1], slots.strengths[-1]) == (0, LEAST)
        assert (slots.strengths[:-1] > LEAST).all()


# The ring: any number of writes at once is one write after the other

FIELDS = {"num_attention_heads": 3, "hidden_size": 6, "num_slots_per_chunk": 2, "chunk_length": 3, "segment_length": 3}
PARTS = {"lasting": {}, "two parts": {"num_lasting_slots": 2}, "mean": {"memory_write": "mean", "chunk_length": 4}}


def random_segments(num_writes: int, fields: dict, seed: int = 3) -> Segments:
    """Segments (2, W, S, 3, 2) of two rows."""
    generator, length = torch.Generator().manual_seed(seed), fields["segment_length"]
    shapes = [(2, num_writes, length, 3, 2)] * 2 + [(2, num_writes, length, 3)] * 2
    return segments_of(*(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes))


def fields_of(parts: str, num_groups: int) -> dict:
    fields = {**FIELDS, **PARTS[parts]}
    is_mean = "memory_write" in fields
    return (
        fields
        | {"num_memory_slots": 2 * num_groups + fields.get("num_lasting_slots", 0)}
        | ({"segment_length": 4} if is_mean else {})
    )


def only(segments: Segments, which: slice) -> Segments:
    """Some of the segments."""
    cut = [tensor[:, which] if isinstance(tensor, torch.Tensor) else tensor for tensor in segments]
    return Segments(*cut)


@pytest.mark.parametrize("num_groups", [1, 2, 3])
@pytest.mark.parametrize("parts", PARTS)
def test_writing_many_segments_is_writing_one_after_the_other(parts, num_groups):
    fields = fields_of(parts, num_groups)
    memory, segments = make_memory(seed=2, **fields), random_segments(8, fields)
    at_once = versions(memory, segments)
    slots = at_once[0]
    for n in range(8):
        slots = versions(memory, only(segments, slice(n, n + 1)), start=slots)[1]
        assert_slots(at_once[n + 1], slots)
    assert len({slots.strengths.flatten()[0].item() for slots in at_once[num_groups:]}) > 3  # they do change


def test_each_row_may_ask_for_versions_of_its_own():
    fields = fields_of("two parts", 3)
    memory, segments = make_memory(seed=2, **fields), random_segments(7, fields)
    stages, _ = memory(empty_memory(memory, segments), segments)
    common = memory.version(stages, torch.arange(8))
    own = memory.version(stages, torch.tensor([[0, 7, 3], [5, 5, 1]]))
    expected = common.map(lambda tensor: torch.stack([tensor[0, [0, 7, 3]], tensor[1, [5, 5, 1]]]))
    assert_slots(own, expected, rtol=0, atol=0)


@pytest.mark.parametrize("parts", PARTS)
def test_nothing_to_write_leaves_the_memory_as_it_is(parts):
    fields = fields_of(parts, 2)
    memory, segments = make_memory(seed=2, **fields), random_segments(3, fields)
    old = versions(memory, segments)[3]
    stages, anchor = memory(old, None)
    assert_slots(memory.version(stages, torch.tensor([0])).map(lambda tensor: tensor[:, 0]), old, rtol=0, atol=0)
    gradients = torch.autograd.grad(anchor, [*memory.rings.parameters()])
    assert anchor == 0 and not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("parts", PARTS)
def test_segments_before_the_stream_began_write_nothing(parts):
    fields = fields_of(parts, 3)
    memory, segments = make_memory(seed=2, **fields), random_segments(5, fields)
    begun = only(segments, slice(2, None))._replace(numbers=torch.arange(3)[None])
    late = segments._replace(numbers=torch.arange(-2, 3)[None])
    found, expected = versions(memory, late), versions(memory, begun)
    assert_slots(found[2], empty_memory(memory, segments), rtol=0, atol=0)
    for n in range(4):
        assert_slots(found[2 + n], expected[n])


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("num_groups", [1, 2, 3])
def test_a_document_that_begins_between_finds_its_groups_empty(parts, num_groups):
    """Of six segments, the last three are of another document; what is in the ring of the first is not its own."""
    fields = fields_of(parts, num_groups)
    memory, segments = make_memory(seed=2, **fields), random_segments(6, fields)
    packed = segments._replace(numbers=torch.tensor([[0, 1, 2, 0, 1, 2]]), is_packed=True)
    second = only(packed, slice(3, None))._replace(is_packed=False)
    found, expected = versions(memory, packed), versions(memory, second)
    for n in range(4):
        # The memory of a document is what was written since it began.
        is_old = memory.written_before(torch.tensor([3 + n]))[0] < 3
        assert_slots(found[3 + n].forget(is_old.expand(2, -1)), expected[n])


def test_which_write_each_slot_is_of():
    memory = make_memory(
        **fields_of("two parts", 3)
    )  # a lasting part of one group of two slots, a present one of three
    numbers = memory.written_before(torch.tensor([[0, 5]]))
    assert numbers.tolist() == [[[-1, -1, -3, -3, -2, -2, -1, -1], [4, 4, 2, 2, 3, 3, 4, 4]]]


# Slots


def test_slots_are_taken_forgotten_and_replaced():
    slots = slots_of([[1, 2], [3, 4], [5, 6]], [[7, 8], [9, 10], [11, 12]], [0.1, 0.2, 0.3], [4, 5, 6])
    taken = slots.take(torch.tensor([2, 0])[None, :, None], 1)
    assert_slots(taken, slots_of([[5, 6], [1, 2]], [[11, 12], [7, 8]], [0.3, 0.1], [6, 4]), rtol=0, atol=0)
    forgotten = slots.forget(torch.tensor([[False, True, False]]))
    expected = slots_of([[1, 2], [0, 0], [5, 6]], [[7, 8], [0, 0], [11, 12]], [0.1, NOTHING, 0.3], [4, -1, 6])
    assert_slots(forgotten, expected, rtol=0, atol=0)
    both = Slots(*(torch.cat([tensor, tensor]) for tensor in slots))
    new = both.map(lambda tensor: -tensor)
    rows = both.replace_rows(torch.tensor([False, True]), new)
    assert_slots(rows, Slots(*(torch.cat([old, -old]) for old in slots)), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_empty_slots_and_the_dtypes_of_slots(dtype):
    wide = torch.promote_types(dtype, torch.float32)
    slots = Slots.empty(torch.ones(2, 9, 3, 4, dtype=dtype), 5)
    assert [tuple(tensor.shape) for tensor in slots] == [(2, 5, 3, 4)] * 2 + [(2, 5, 3)] * 2
    assert [tensor.dtype for tensor in slots] == [dtype, dtype, wide, torch.int64]
    assert not slots.keys.any() and not slots.values.any()
    assert (slots.strengths == NOTHING).all() and (slots.positions == -1).all()
    for parts in PARTS:
        fields = fields_of(parts, 2)
        memory, segments = make_memory(seed=2, **fields).to(dtype), random_segments(5, fields)
        states = [tensor.to(dtype) for tensor in segments[:2]] + [tensor.to(wide) for tensor in segments[2:4]]
        written = versions(memory, Segments(*states, *segments[4:]))[-1]
        assert [tensor.dtype for tensor in written] == [dtype, dtype, wide, torch.int64]


# What is trained


def run(memory: RMTMemory, hidden_states: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """From tokens (B, W * S, ...) to numbers of keys and values of all slots after all segments were written."""
    segments = [tensor.unflatten(1, (-1, 4)) for tensor in (keys, values, memory.scores(hidden_states))]
    evidence = torch.randn(segments[0].shape[:4], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    slots = versions(memory, segments_of(*segments, evidence))[-1]
    return torch.cat([slots.keys, slots.values], -1).sin().sum((0, 1, 2))


def run_inputs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(6)
    shapes = ((2, 20, 4), (2, 20, 2, 2), (2, 20, 2, 2))  # 5 segments of 4, of which each meets the one before it
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


RUN_FIELDS = {"hidden_size": 4, "num_attention_heads": 2, "chunk_length": 2, "segment_length": 4}
RING = {f"rings.0.{name}" for name in ("gate_weight", "gate_scale", "gate_bias")}
SCORE = {"score_proj.weight", "score_proj.bias"}
TRAINED = {
    "two parts": (
        {"num_memory_slots": 4, "num_lasting_slots": 2},
        RING | SCORE | {name.replace("0", "1") for name in RING} | {"rings.1.fade"},
    ),
    "present": ({"num_memory_slots": 2, "num_lasting_slots": 0}, RING | {"rings.0.fade"}),
    "lasting": ({"num_memory_slots": 2, "num_lasting_slots": 2}, RING | SCORE),
    "mean": ({"num_memory_slots": 2, "memory_write": "mean"}, RING - {"rings.0.gate_scale"}),
}
every_part = pytest.mark.parametrize("name", TRAINED)


@every_part
def test_every_parameter_changes_what_is_kept_and_has_a_gradient(name):
    fields, names = TRAINED[name]
    memory = make_memory(seed=7, **RUN_FIELDS, **fields)
    assert {name for name, _ in memory.named_parameters()} == names
    before = run(memory, *run_inputs())
    gradients = torch.autograd.grad(before.sum(), list(memory.parameters()))
    for (name, parameter), gradient in zip(memory.named_parameters(), gradients, strict=True):
        with torch.no_grad():
            parameter += 0.1
            after = run(memory, *run_inputs())
            parameter -= 0.1
        assert (after - before).abs().max() > 1e-5, name  # a score's bias only scales values, by nearly nothing
        assert gradient.abs().max() > 1e-4, name


def test_the_score_is_trained_through_the_scale_of_the_value_alone_where_gates_are_shut():
    memory = make_memory(seed=7, **RUN_FIELDS, num_memory_slots=2, num_lasting_slots=2)
    torch.nn.init.constant_(memory.rings[0].gate_bias, -1e6)
    hidden_states, keys, values = run_inputs()
    gradients = torch.autograd.grad(run(memory, hidden_states, keys, values).sum(), [*memory.score_proj.parameters()])
    assert all((gradient.abs() > 1e-6).any() for gradient in gradients)
    # A score that is one higher everywhere takes the same tokens; their values are a little larger.
    before = run(memory, hidden_states, keys, values)
    torch.nn.init.constant_(memory.rings[0].gate_weight, 0.0)
    memory.score_proj.bias.data += 1
    after = run(memory, hidden_states, keys, values)
    assert torch.equal(after[:2], before[:2])
    assert VALUE_SHIFT == 4 and (after[2:] - before[2:]).abs().min() > 1e-6


@every_part
def test_gradients_are_those_of_finite_differences(name):
    memory = make_memory(seed=7, **RUN_FIELDS, **TRAINED[name][0])
    inputs = [tensor.requires_grad_() for tensor in run_inputs()] + list(memory.parameters())
    # gradcheck changes its inputs in place, so the parameters need not be handed on.
    assert torch.autograd.gradcheck(lambda *changed: run(memory, *changed[:3]), inputs, fast_mode=True)
