"""The memory of one layer: what a slot is, how a segment offers tokens to it, how a ring of slots takes them.

Shapes: B rows, W leaving segments, S segment length, C chunk length, r candidates of a chunk, K candidates of a
segment, M slots, G key/value heads, H query heads, D head width, E hidden size, L observing tokens.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_rmt import RMTConfig


GATE_STRETCH = 0.1  # how far the sigmoid of the gate reaches beyond 0 and 1 before it is clamped
VALUE_SHIFT = 4.0  # of the score that scales a value: sigmoid(4) = 0.98, so that a score of 0 changes little
LEAST = -1e4  # strength of a token that fills an empty slot, and gives way to any other
STEP = 2.0**-10  # strengths that differ by less may count as equal


class Slots(NamedTuple):
    """Memory slots, part after part, the oldest group of a ring first."""

    keys: torch.Tensor  # (..., M, G, D), without rotary encoding, dtype of the model
    values: torch.Tensor  # (..., M, G, D)
    strengths: torch.Tensor  # (..., M, G), float32 or wider; -inf in a slot that was never written
    positions: torch.Tensor  # (..., M, G) int64, stream position of the token; -1 in a slot that was never written

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Slots":
        return Slots(*map(function, self))

    def take(self, indices: torch.Tensor, axis: int) -> "Slots":
        """The slots at `indices` (..., K, G) along the slot axis."""
        wide = indices[..., None].expand(*indices.shape, self.keys.shape[-1])
        states = (tensor.gather(axis, wide) for tensor in self[:2])
        return Slots(*states, *(tensor.gather(axis, indices) for tensor in self[2:]))

    def forget(self, hidden: torch.Tensor) -> "Slots":
        """The slots, those where `hidden`, (..., M) bool, is True as if they had never been written."""
        keys, values = (states.masked_fill(hidden[..., None, None], 0) for states in self[:2])
        strengths = self.strengths.masked_fill(hidden[..., None], -torch.inf)
        return Slots(keys, values, strengths, self.positions.masked_fill(hidden[..., None], -1))

    def replace_rows(self, rows: torch.Tensor, new: "Slots") -> "Slots":
        """The slots, but of `new` in the rows where `rows`, (B,) bool, is True."""
        return Slots(*(where_rows(rows, *pair) for pair in zip(new, self, strict=True)))

    @staticmethod
    def empty(like: torch.Tensor, num_slots: int) -> "Slots":
        """Slots (B, M, G, D) of streams that wrote nothing; rows, heads, dtype and device of `like` (B, T, G, D)."""
        keys = like.new_zeros(like.shape[0], num_slots, *like.shape[2:])
        strengths = at_least_float32(keys[:0]).new_full(keys.shape[:-1], -torch.inf)
        return Slots(keys, keys.clone(), strengths, torch.full_like(strengths, -1, dtype=torch.int64))


class HeldSlot(NamedTuple):
    """A slot that was written, as `RMTCache.slots` lists it."""

    row: int
    layer: int
    head: int  # key/value head
    part: str  # "lasting" or "present"
    slot: int  # index in memory: the lasting part comes first, in each part the group that is written next
    position: int  # of its token in the stream; of a mixture the token with the larger share
    strength: float  # which decides whether it is kept; comparable within a part of a head
    age: int  # segments from the token to where the row stands


class Segments(NamedTuple):
    """Segments that leave the window."""

    keys: torch.Tensor  # (B, W, S, G, D), without rotary encoding
    values: torch.Tensor  # (B, W, S, G, D)
    scores: torch.Tensor  # (B, W, S, G) as `RMTMemory.scores` gives them
    evidence: torch.Tensor | None  # (B, W, S, G) as `attention_evidence` gives it; None where no part asks for it
    numbers: torch.Tensor  # (B or 1, W) int64, how many segments of its document are before each; negative before it
    is_packed: bool  # whether a document begins inside the call, so that slots may be of another

    @property
    def positions(self) -> torch.Tensor:
        """Stream positions of the tokens, (B or 1, W, S, 1) int64."""
        length = self.keys.shape[2]
        return (self.numbers[..., None] * length + torch.arange(length, device=self.numbers.device))[..., None]


def where_rows(rows: torch.Tensor, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """(B, ...) from `new` in the rows where `rows`, (B,) bool, is True, and from `old` in the others."""
    return torch.where(rows.reshape(-1, *[1] * (old.dim() - 1)), new, old)


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32, or as it is when it is that or float64."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def own_heads(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter (heads, ...), or where tensor parallelism shards it, the heads of this process."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def zero_of(module: nn.Module) -> torch.Tensor:
    """Zero, with a gradient of zero for the parameters of a module itself: no call leaves one out of its graph."""
    return torch.stack([own_heads(parameter).sum() * 0 for parameter in module.parameters(recurse=False)]).sum()


@torch.no_grad()
def attention_evidence(queries: torch.Tensor, keys: torch.Tensor, scaling: float) -> torch.Tensor:
    """How much the last tokens before a write attend to each token of the leaving segment, (B, W, S, G).

    Log of the softmax over the segment alone, averaged over tokens and query heads; float32 or wider. Queries
    (B, W, H, L, D) and keys (B, W, G, S, D) have rotary encoding.
    """
    asking = queries.unflatten(2, (keys.shape[2], -1)).flatten(3, 4)  # (B, W, G, H / G * L, D)
    scores = at_least_float32(asking @ keys.transpose(3, 4)) * scaling
    return (scores.softmax(-1).mean(3) + 1e-8).log().transpose(2, 3)


def in_steps(strengths: torch.Tensor) -> torch.Tensor:
    """Strengths to sort by: what is equal but for the rounding of sums is equal here, and keeps its order."""
    return (strengths.detach() / STEP).round()


def in_order(numbers: torch.Tensor, dim: int, descending: bool = False) -> torch.Tensor:
    """Indices that sort whole numbers; equal ones keep their order."""
    if not torch.compiler.is_exporting():
        return numbers.sort(dim=dim, descending=descending, stable=True).indices
    size = numbers.shape[dim]  # ONNX has no stable sort
    places = torch.arange(size, device=numbers.device).view(-1, *[1] * (numbers.dim() - 1 - dim))
    distinct = numbers.clamp(-(2.0**40), 2.0**40).long() * size + (size - 1 - places if descending else places)
    return distinct.sort(dim=dim, descending=descending).indices


def stretched_sigmoid(logits: torch.Tensor) -> torch.Tensor:
    """A sigmoid that reaches 0 and 1 exactly, so that a slot can be kept for ever or replaced whole."""
    return ((1 + 2 * GATE_STRETCH) * torch.sigmoid(logits) - GATE_STRETCH).clamp(0, 1)


class RMTPerHead(nn.Module):
    """A number for each head, float32 or wider, of (B, T, E). It is no `nn.Linear`, so that no tool quantizes it."""

    def __init__(self, config: RMTConfig, num_heads: int) -> None:
        super().__init__()
        self.out_features = num_heads  # tensor parallelism asks
        linear = nn.Linear(config.hidden_size, num_heads)
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return at_least_float32(F.linear(hidden_states, self.weight, self.bias))


class RMTSink(nn.Module):
    """A key and a value that every token sees before memory, once the stream's beginning has left the window.

    Source: Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks". Departs from it: the sink is
    learned, or of the begin-of-text token in a converted model.
    """

    def __init__(self, config: RMTConfig) -> None:
        super().__init__()
        self.key = nn.Parameter(torch.empty(config.key_value_shape))  # (G, D), without rotary encoding
        self.value = nn.Parameter(torch.empty(config.key_value_shape))

    def forward(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Key and value (G, D), and a zero with a gradient."""
        return own_heads(self.key), own_heads(self.value), zero_of(self)


class RMTRing(nn.Module):
    """One part of memory: groups of K slots, of which the oldest meets the candidates of the next segment.

    Source: section 3.3 of arXiv 2507.00453 ("gated FIFO memory"). Departs from the paper: the gate compares strengths,
    and the strongest candidate meets the weakest slot.
    """

    def __init__(self, config: RMTConfig, num_slots: int, uses_score: bool, uses_evidence: bool) -> None:
        super().__init__()
        self.num_slots, self.uses_score, self.uses_evidence = num_slots, uses_score, uses_evidence
        self.chunk_length, self.slots_per_chunk = config.chunk_length, config.num_slots_per_chunk
        self.use_attention_sink = config.use_attention_sink
        self.num_groups = num_slots // config.num_slots_per_segment
        heads, width = config.key_value_shape
        self.gate_weight = nn.Parameter(torch.empty(heads, 4 * width))
        self.gate_bias = nn.Parameter(torch.empty(heads))
        self.gate_scale = nn.Parameter(torch.empty(heads)) if uses_score or uses_evidence else None  # of strengths
        self.fade = nn.Parameter(torch.empty(heads)) if uses_evidence else None  # what lasts does not fade

    def forward(
        self, memory: Slots, segments: Segments | None, taken: torch.Tensor | None = None
    ) -> tuple[Slots, torch.Tensor | None, torch.Tensor]:
        """Writes W segments, one after the other where they meet the same group.

        Args:
            memory: (B, slots of this part, G, D).
            segments: What leaves; None if nothing does.
            taken: Tokens that the part before has just taken, (B, W, S, G) bool.

        Returns:
            The ring as groups before and after each round, (B, (rounds + 1) * groups, K, G, D); which tokens it has
            taken; and a zero with a gradient.
        """
        rounds, anchor = [memory.map(lambda tensor: tensor.unflatten(1, (self.num_groups, -1)))], zero_of(self)
        if segments is None:
            return rounds[0], None, anchor
        candidates, indices = self.candidates(segments, taken)
        candidates = candidates.forget((segments.numbers < 0)[..., None].expand(candidates.strengths.shape[:3]))
        gates = []
        # Split at once: the backward pass of a slice is as large as what was sliced, whatever the number of rounds.
        parts = zip(*(tensor.split(self.num_groups, 1) for tensor in candidates), strict=True)
        for index, part in enumerate(parts):
            new, ring, start = Slots(*part), rounds[-1], index * self.num_groups
            count = new.strengths.shape[1]
            old, rest = (Slots(*(tensor[:, cut] for tensor in ring)) for cut in (slice(count), slice(count, None)))
            if segments.is_packed:  # what was written to a group before the document began is not its own
                other = segments.numbers[:, start : start + count] < self.num_groups
                old = old.forget(other[..., None].expand(old.strengths.shape[:3]))
            written, gate = self.meet(old, new)
            gates.append(gate)
            rounds.append(Slots(*(torch.cat(pair, 1) for pair in zip(written, rest, strict=True))))
        stages = Slots(*(torch.cat(parts, 1) for parts in zip(*rounds, strict=True)))
        if indices is None:
            return stages, None, anchor
        taken = segments.keys.new_zeros(segments.keys.shape[:4], dtype=torch.bool)
        taken = taken.scatter(2, indices, torch.cat(gates, 1) > 0.5 + STEP)
        return stages, taken, anchor

    def strengths(self, segments: Segments) -> torch.Tensor | None:
        """What decides which tokens of leaving segments are kept, (B, W, S, G); None for averages."""
        return segments.scores if self.uses_score else segments.evidence

    def candidates(self, segments: Segments, taken: torch.Tensor | None) -> tuple[Slots, torch.Tensor | None]:
        """What segments offer, (B, W, K, G, D), strongest first, and which of their tokens that is, (B, W, K, G)."""
        strengths = self.strengths(segments)
        if strengths is None:
            return self.averages(segments), None
        positions = segments.positions.expand(strengths.shape)
        if self.use_attention_sink:  # which stands for the first token of a stream
            strengths = strengths.masked_fill(positions == 0, LEAST)
        chunks = strengths.unflatten(2, (-1, self.chunk_length))
        best = in_order(in_steps(chunks), 3, descending=True)[:, :, :, : self.slots_per_chunk]
        starts = torch.arange(0, strengths.shape[2], self.chunk_length, device=strengths.device)
        indices = (best + starts[:, None, None]).flatten(2, 3)
        if taken is not None:
            strengths = strengths.masked_fill(taken, LEAST)
        order = in_order(in_steps(strengths.gather(2, indices)), 2, descending=True)
        indices = indices.gather(2, order)
        chosen = Slots(segments.keys, segments.values, strengths, positions).take(indices, 2)
        if self.uses_score:
            factor = (segments.scores.gather(2, indices) + VALUE_SHIFT).sigmoid()[..., None]
            chosen = chosen._replace(values=chosen.values * factor.to(chosen.values.dtype))
        return chosen, indices

    def averages(self, segments: Segments) -> Slots:
        """Means of r equal parts of every chunk, of strength 0, at the position of the last token of each."""
        length = self.chunk_length // self.slots_per_chunk
        keys, values = (states.unflatten(2, (-1, length)).mean(3) for states in segments[:2])
        positions = segments.positions[:, :, length - 1 :: length].expand(keys.shape[:4])
        return Slots(keys, values, torch.zeros_like(at_least_float32(keys[..., 0])), positions)

    def meet(self, old: Slots, new: Slots) -> tuple[Slots, torch.Tensor]:
        """Candidates (B, groups, K, G, D), strongest first, meet the slots of their groups, weakest first.

        Gives the slots after it, and the gate (B, groups, K, G): how much of each slot a candidate has replaced.
        """
        old = old.take(in_order(in_steps(old.strengths), 2), 2)
        is_empty = old.strengths == -torch.inf
        kept = old.strengths.masked_fill(is_empty, 0)
        kept = kept if self.fade is None else kept - at_least_float32(own_heads(self.fade))
        offered = new.strengths.clamp_min(2 * LEAST)  # what is not there at all only ever meets empty slots
        takes = is_empty | ((kept <= LEAST / 2) & (offered > LEAST / 2))
        gate = self.openness(old, new, kept, offered)
        gate = torch.where(takes, 1.0, torch.where(offered <= LEAST / 2, 0.0, gate))
        strengths = torch.where(is_empty, new.strengths, torch.lerp(kept, offered, gate))
        share = gate[..., None].to(old.keys.dtype)
        keys, values = (torch.lerp(before, after, share) for before, after in zip(old[:2], new[:2], strict=True))
        positions = torch.where(gate > 0.5 + STEP, new.positions, old.positions)
        return Slots(keys, values, strengths, positions), gate

    def openness(self, old: Slots, new: Slots, kept: torch.Tensor, offered: torch.Tensor) -> torch.Tensor:
        """The gate by what is learned: (B, groups, K, G) float32 or wider, 0 to 1; strengths are kept and offered."""
        features = torch.cat([old.keys, old.values, new.keys, new.values], -1)
        weight, bias = (at_least_float32(own_heads(each)) for each in (self.gate_weight, self.gate_bias))
        logits = (at_least_float32(features) * weight).sum(-1) + bias  # no einsum: autocast would lower its precision
        if self.gate_scale is not None:
            logits = logits + at_least_float32(own_heads(self.gate_scale)) * (offered - kept)
        return stretched_sigmoid(logits)

    def version(self, stages: Slots, num_writes: torch.Tensor) -> Slots:
        """The part after a number of writes, (V,) for all rows or (B, V): slots (B, V, slots of this part, G, D)."""
        writes = torch.arange(self.num_groups, device=num_writes.device) + num_writes[..., None]
        # Group b of the ring after n writes: it was written n // groups times, once more if b < n % groups.
        group, done = writes % self.num_groups, num_writes[..., None]
        index = (done // self.num_groups + (group < done % self.num_groups)) * self.num_groups + group
        if num_writes.dim() == 1:
            chosen = stages.map(lambda tensor: tensor.index_select(1, index.flatten()))
        else:
            rows = torch.arange(index.shape[0], device=index.device)[:, None]
            chosen = stages.map(lambda tensor: tensor[rows, index.flatten(1)])
        return chosen.map(lambda tensor: tensor.unflatten(1, (-1, self.num_groups)).flatten(2, 3))


class RMTMemory(nn.Module):
    """The rings of a layer, and the score that is learned for the tokens they choose from."""

    rings: Any  # a list of RMTRing

    def __init__(self, config: RMTConfig) -> None:
        super().__init__()
        self.rings = nn.ModuleList([RMTRing(config, *part) for part in config.memory_parts])
        uses_score = any(ring.uses_score for ring in self.rings)
        self.score_proj = RMTPerHead(config, config.key_value_shape[0]) if uses_score else None

    def scores(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The learned score of each token, (B, T, E) after the input norm to (B, T, G); (B, T, 0) where none is."""
        if self.score_proj is None:
            return at_least_float32(hidden_states[..., :0])
        return self.score_proj(hidden_states)

    def forward(self, memory: Slots, segments: Segments | None) -> tuple[list[Slots], torch.Tensor]:
        """Writes leaving segments, if there are any, to all parts of memory (B, M, G, D).

        Gives the stages of each part, for `version` to read, and a zero with a gradient for every parameter.
        """
        stages, taken, zero = [], None, 0
        parts = zip(*(tensor.split([ring.num_slots for ring in self.rings], 1) for tensor in memory), strict=True)
        for ring, part in zip(self.rings, parts, strict=True):
            of_part, taken, anchor = ring(Slots(*part), segments, taken)
            stages.append(of_part)
            zero = zero + anchor
        return stages, cast(torch.Tensor, zero)

    def version(self, stages: list[Slots], num_writes: torch.Tensor) -> Slots:
        """Memory after a number of writes: slots (B, V, M, G, D), see `RMTRing.version`."""
        parts = [ring.version(of_part, num_writes) for ring, of_part in zip(self.rings, stages, strict=True)]
        return parts[0] if len(parts) == 1 else Slots(*(torch.cat(each, 2) for each in zip(*parts, strict=True)))

    def written_before(self, num_writes: torch.Tensor) -> torch.Tensor:
        """Which write of the call each slot of a version is of, negative before the call: (..., V) to (..., V, M)."""
        numbers = []
        for ring in self.rings:
            groups = torch.arange(-ring.num_groups, 0, device=num_writes.device)
            groups = groups.repeat_interleave(ring.num_slots // ring.num_groups)
            numbers.append(num_writes[..., None] + groups)
        return torch.cat(numbers, -1)
