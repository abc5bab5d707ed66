"""The memory of one layer: what a slot is, how a segment becomes slots, how slots enter the ring.

Shapes: B rows, L tokens, W segments to be written, V versions of memory, C chunk length, r slots per chunk,
K slots per segment, M slots, G key/value heads, D head width, E hidden size.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_rmt import RMTConfig


GATE_STRETCH = 0.1  # how far the sigmoid of the gate reaches beyond 0 and 1 before it is clamped


class Slots(NamedTuple):
    """Memory slots, oldest first along the slot axis. A slot that was never written has strength -inf.

    The tensors in a state are never changed in place: put other slots there. Steps keep what they made of these.

    Args:
        keys: (..., M, G, D), without rotary encoding, dtype of the model.
        values: (..., M, G, D), dtype of the model.
        strengths: (..., M, G), added to the attention score when the slot is read; float32 or wider.
    """

    keys: torch.Tensor
    values: torch.Tensor
    strengths: torch.Tensor

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Slots":
        """The slots with `function` applied to each tensor."""
        keys, values, strengths = map(function, self)
        return Slots(keys, values, strengths)

    def replace_rows(self, rows: torch.Tensor, new: "Slots") -> "Slots":
        """The slots, with those of `new` in the rows where `rows`, (B,) bool, is True."""
        keys, values, strengths = (where_rows(rows, *pair) for pair in zip(new, self, strict=True))
        return Slots(keys, values, strengths)


class ReadableMemory(NamedTuple):
    """Memory as a step reads it, the null slot first: derived from `Slots` once for all steps until the next write.

    Args:
        keys: (B * G, 1 + M, D), float32 or wider. The null key is laid in by every step: a parameter may change.
        values: (B * G, 1 + M, D).
        strengths: (B * G, 1, 1 + M), float32 or wider.
    """

    keys: torch.Tensor
    values: torch.Tensor
    strengths: torch.Tensor

    @staticmethod
    def of(slots: Slots, dtype: torch.dtype) -> "ReadableMemory":
        """Copies of slots (B, M, G, D) for a call that computes in `dtype`."""
        keys, values, strengths = (tensor.detach().transpose(1, 2).flatten(0, 1) for tensor in slots)
        wide = torch.promote_types(dtype, torch.float32)
        keys, values = (F.pad(tensor, (0, 0, 1, 0)) for tensor in (keys.to(wide), values.to(dtype)))
        return ReadableMemory(keys, values, F.pad(strengths.to(wide), (1, 0))[:, None])


def forget_slots(slots: Slots, hidden: torch.Tensor | None) -> Slots:
    """Slots (..., M, G, D), those where `hidden`, (..., M) bool, is True as if they had never been written."""
    if hidden is None:
        return slots
    keys, values = (states.masked_fill(hidden[..., None, None], 0) for states in slots[:2])
    return Slots(keys, values, slots.strengths.masked_fill(hidden[..., None], -torch.inf))


def where_rows(rows: torch.Tensor, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """(B, ...) from `new` in the rows where `rows`, (B,) bool, is True, and from `old` in the others."""
    return torch.where(rows.reshape(-1, *[1] * (old.dim() - 1)), new, old)


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32, or as it is when it is that or float64."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is what it seems in an ordinary call: nothing is being compiled or transformed (`torch.func`).

    Only then may what is computed hang on more than the mathematics: own backward passes, what is kept between calls.
    """
    is_transformed = torch._C._are_functorch_transforms_active()
    return type(tensor) is torch.Tensor and not torch.compiler.is_compiling() and not is_transformed


def own_heads(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter (heads, ...), or where tensor parallelism has dealt it out, the heads of this process.

    Whatever else a parameter is divided for is undone: the turn after a compiled step runs outside of the layer that
    would gather it.
    """
    if not hasattr(parameter, "device_mesh"):  # no DTensor, which not every build of torch has
        return parameter
    from torch.distributed.tensor import Replicate

    dealt: Any = parameter
    mesh = dealt.device_mesh
    names = mesh.mesh_dim_names or [""] * mesh.ndim
    wanted = [old if name == "tp" else Replicate() for name, old in zip(names, dealt.placements, strict=True)]
    return dealt.redistribute(placements=wanted).to_local()


def empty_slots(like: torch.Tensor, num_slots: int) -> Slots:
    """Memory (B, M, G, D) of streams that wrote nothing; rows, heads, dtype and device of `like` (B, L, G, D)."""
    keys = like.new_zeros(like.shape[0], num_slots, *like.shape[2:])
    return Slots(keys, keys.clone(), torch.full_like(at_least_float32(keys[..., 0]), -torch.inf))


def stretched_sigmoid(logits: torch.Tensor) -> torch.Tensor:
    """A sigmoid that reaches 0 and 1 exactly, so that a slot can be kept for ever or replaced whole."""
    return ((1 + 2 * GATE_STRETCH) * torch.sigmoid(logits) - GATE_STRETCH).clamp(0, 1)


class RMTMemory(nn.Module):
    """Condenses segments to slots and writes them, gated and first in first out.

    Source: section 3.3 of arXiv 2507.00453 ("gated FIFO memory"). Departs from the paper: slots are keys and values of
    the layer's own attention heads, so that reading them needs no projection, and a learned null slot lets a query find
    nothing.
    """

    def __init__(self, config: RMTConfig) -> None:
        super().__init__()
        self.write_type = config.memory_write
        self.chunk_length = config.chunk_length
        self.slots_per_chunk = config.num_slots_per_chunk
        self.blocks = config.num_memory_slots // config.num_slots_per_segment
        heads, width = config.key_value_shape
        self.null_key = nn.Parameter(torch.empty(heads, width))
        self.gate_weight = nn.Parameter(torch.empty(heads, 4 * width))
        self.gate_bias = nn.Parameter(torch.empty(heads))
        self.score_proj = nn.Linear(config.hidden_size, heads) if config.memory_write == "select" else None

    def scores(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What the write needs to know of each token besides key and value.

        Args:
            hidden_states: (B, L, E), after the layer's input norm.

        Returns:
            (B, L, G) for `"select"`, (B, L, 0) for `"mean"`; float32 or wider.
        """
        if self.score_proj is None:
            return at_least_float32(hidden_states[..., :0])
        return at_least_float32(self.score_proj(hidden_states))

    def condense(self, keys: torch.Tensor, values: torch.Tensor, scores: torch.Tensor) -> Slots:
        """The candidates of every segment, all chunks at once.

        Args:
            keys: (B, W, S, G, D), without rotary encoding.
            values: (B, W, S, G, D).
            scores: (B, W, S, ...) as `scores` gives them.

        Returns:
            Slots of shape (B, W, K, G, D), chunk after chunk.
        """
        batch, segments, length, heads, width = keys.shape
        chunks = (batch, segments, length // self.chunk_length, self.chunk_length)
        keys, values = keys.reshape(*chunks, heads, width), values.reshape(*chunks, heads, width)
        strengths = scores.new_zeros(*chunks[:3], self.slots_per_chunk, heads)
        if self.write_type == "select":
            chosen = self._chosen(scores.reshape(*chunks, heads))  # (B, W, chunks, r, G)
            strengths = F.logsigmoid(scores.reshape(*chunks, heads).gather(3, chosen))
            keys = keys.take_along_dim(chosen[..., None], dim=3)
            values = values.take_along_dim(chosen[..., None], dim=3)
        else:
            parts = (*chunks[:3], self.slots_per_chunk, self.chunk_length // self.slots_per_chunk, heads, width)
            keys, values = keys.reshape(parts).mean(4), values.reshape(parts).mean(4)
        return Slots(keys, values, strengths).map(lambda tensor: tensor.flatten(2, 3))

    def _chosen(self, scores: torch.Tensor) -> torch.Tensor:
        """Places of the r best scores along axis 3, in order of place; of equal scores the earlier wins."""
        if self.slots_per_chunk == 1:
            return scores.max(3, keepdim=True).indices
        best = scores.sort(dim=3, descending=True, stable=True).indices[:, :, :, : self.slots_per_chunk]
        return best.sort(dim=3).values

    def write(self, memory: Slots, candidates: Slots | None, meets_empty: torch.Tensor | None = None) -> Slots:
        """Writes W segments one after the other and keeps every stage, for `version` to read.

        Ring positions do not depend on each other, so one step writes as many segments as the ring holds: M / K.

        Args:
            memory: (B, M, G, D).
            candidates: (B, W, K, G, D), or None to write nothing.
            meets_empty: (B, W) bool, the segments that find an empty place whatever is there; None for none.

        Returns:
            Slots (B, (rounds + 1) * M / K, K, G, D): the ring as blocks of K slots before and after each round.
        """
        rounds = [memory.map(lambda tensor: tensor.unflatten(1, (self.blocks, -1)))]
        if candidates is not None:
            pieces = zip(*(tensor.split(self.blocks, 1) for tensor in candidates), strict=True)
            for number, piece in enumerate(pieces):
                old = rounds[-1]
                if meets_empty is not None:
                    begins = meets_empty[:, number * self.blocks :][:, : piece[0].shape[1]]
                    hidden = F.pad(begins, (0, self.blocks - begins.shape[1]))[..., None]
                    old = forget_slots(old, hidden.expand(-1, -1, old.keys.shape[2]))
                rounds.append(self._gate(old, Slots(*piece)))
        return Slots(*(torch.cat(stages, 1) for stages in zip(*rounds, strict=True)))

    def _gate(self, old: Slots, new: Slots) -> Slots:
        """One round: the first blocks of the ring meet the new ones, the rest stays."""
        written = new.strengths.shape[1]
        rest = old.map(lambda tensor: tensor[:, written:])
        old = old.map(lambda tensor: tensor[:, :written])
        empty = old.strengths == -torch.inf
        gate = torch.where(empty, 1.0, self.openness(old, new))
        old = old._replace(strengths=old.strengths.masked_fill(empty, 0))
        # An empty candidate (strength -inf) stands for a segment before the stream began: it only ever meets empties.
        mixed = [torch.lerp(old.strengths, new.strengths.clamp_min(torch.finfo(torch.float32).min), gate)]
        mixed = [new.strengths.where(empty, mixed[0])]
        for before, after in ((old.values, new.values), (old.keys, new.keys)):
            mixed.insert(0, torch.lerp(before, after, gate[..., None].to(before.dtype)))
        return Slots(*(torch.cat(pair, 1) for pair in zip(mixed, rest, strict=True)))

    def openness(self, old: Slots, new: Slots) -> torch.Tensor:
        """The gate: how much of each old slot a new one replaces, were it written; (..., G) float32 or wider, 0 to 1.

        Args:
            old: (..., G, D), what is in the ring.
            new: (..., G, D), what comes to its place.
        """
        features = torch.cat([old.keys, old.values, new.keys, new.values], -1)
        # Not an einsum: autocast would take that out of float32.
        logits = (at_least_float32(features) * at_least_float32(own_heads(self.gate_weight))).sum(-1)
        return stretched_sigmoid(logits + at_least_float32(own_heads(self.gate_bias)))

    def version(self, rounds: Slots, num_writes: torch.Tensor) -> Slots:
        """Memory after a number of writes, oldest slot first.

        Args:
            rounds: What `write` returned.
            num_writes: (V,) the same versions for every row, or (B, V) versions of each row; int64.

        Returns:
            Slots of shape (B, V, M, G, D).
        """
        places = torch.arange(self.blocks, device=num_writes.device) + num_writes[..., None]
        # Block b of the ring after n writes: it was written n // blocks times, once more if b < n % blocks.
        block = places % self.blocks
        index = (
            num_writes[..., None] // self.blocks + (block < num_writes[..., None] % self.blocks)
        ) * self.blocks + block
        if num_writes.dim() == 1:
            chosen = rounds.map(lambda tensor: tensor.index_select(1, index.flatten()))
        else:
            rows = torch.arange(index.shape[0], device=index.device)[:, None]
            chosen = rounds.map(lambda tensor: tensor[rows, index.flatten(1)])
        return chosen.map(lambda tensor: tensor.unflatten(1, (-1, self.blocks)).flatten(2, 3))

    def readable(self, slots: Slots, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots and the null slot as keys and values of an attention that knows no score bias.

        The strength is one more element of the key, met by a one in the query (see `ask`); eight elements are added,
        because kernels like widths that are multiples of eight.

        Args:
            slots: (B, M, G, D).
            scaling: Factor of the attention scores.

        Returns:
            Keys and values (B, 1 + M, G, D + 8).
        """
        null = own_heads(self.null_key).to(slots.keys.dtype).expand(slots.keys.shape[0], 1, -1, -1)
        keys = torch.cat([null, slots.keys], 1)
        values = F.pad(slots.values, (0, STRENGTH_WIDTH, 0, 0, 1, 0))
        unreachable = torch.finfo(keys.dtype).min / 2
        strengths = (slots.strengths / scaling).clamp_min(unreachable).to(keys.dtype)
        strengths = F.pad(strengths, (0, 0, 1, 0))[..., None]  # (B, 1 + M, G, 1)
        return torch.cat([keys, F.pad(strengths, (0, STRENGTH_WIDTH - 1))], -1), values

    def recall(self, queries: torch.Tensor, memory: ReadableMemory, scaling: float) -> torch.Tensor:
        """Attention of one token per row to memory and the null slot.

        Args:
            queries: (B * G, H / G, D).
            memory: What is read.
            scaling: Factor of the attention scores.

        Returns:
            (B * G, H / G, D); exactly zero if memory is empty.
        """
        null = own_heads(self.null_key)
        memory.keys[:, 0].view(-1, *null.shape).copy_(null)
        scores = torch.baddbmm(memory.strengths, at_least_float32(queries), memory.keys.transpose(1, 2), alpha=scaling)
        return torch.bmm(scores.softmax(-1).to(queries.dtype), memory.values)

    @staticmethod
    def ask(queries: torch.Tensor) -> torch.Tensor:
        """Queries (B, L, H, D) widened to (B, L, H, D + 8) for the keys of `readable`."""
        return F.pad(queries, (0, STRENGTH_WIDTH), value=1.0)


STRENGTH_WIDTH = 8  # elements that carry the strength of a slot in its readable key
