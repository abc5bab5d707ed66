"""The naive reference: the same model, one row and one token at a time, in plain loops, every key kept for ever.

It is written from the design page alone and shares no code with the package. Tensors are used as they are given: hand
in float64 leaves with `requires_grad` to compare gradients.
"""

# E hidden_size, H query heads, G key/value heads, D head_dim, V vocabulary, T tokens, A keys attended to,
# C chunk_length, S segment_length, M num_memory_slots, r num_slots_per_chunk, K slots a segment offers to a part

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


LEAST = -1e4  # the strength of what shall not be kept: it only fills a slot until something else comes
STEP = 2.0**-10  # strengths are compared in whole steps: what is equal but for rounding is equal


def in_steps(strength: Tensor) -> int:
    """The strength to sort by."""
    return round(strength.item() / STEP)


class Part(NamedTuple):
    """One ring of memory: how large it is, and what makes a token strong there."""

    num_slots: int
    uses_score: bool
    uses_evidence: bool


class Slot(NamedTuple):
    """One slot, or a candidate for one, of one key/value head."""

    key: Tensor  # (D,), unrotated
    value: Tensor  # (D,)
    strength: Tensor  # ()
    position: int  # in the stream


@dataclass
class LayerState:
    """Everything one layer has read since the start of the stream; lists of tensors are indexed by stream position.

    What a list holds is replaced, never changed: a copy of the lists is a copy of the state.
    """

    rings: list[list[list[Slot | None]]]  # of each part and each head its slots, oldest group first
    rotated_queries: list[Tensor] = field(default_factory=list)  # (H, D) each
    rotated_keys: list[Tensor] = field(default_factory=list)  # (G, D) each
    keys: list[Tensor] = field(default_factory=list)  # (G, D) each, unrotated
    values: list[Tensor] = field(default_factory=list)  # (G, D) each
    scores: list[Tensor] = field(default_factory=list)  # (G,) each, none if no part uses them


class ReferenceModel:
    """The weights and the arithmetic of one token; the state is in `ReferenceStream`."""

    def __init__(self, config: Any, state_dict: dict[str, Tensor]) -> None:
        known = {"hidden_act": ("silu",), "fusion_type": ("gated", "softmax"), "memory_write": ("select", "mean")}
        for name, choices in known.items():
            if getattr(config, name) not in choices:
                raise ValueError(f"the reference knows {name} in {choices}, got {getattr(config, name)!r}")
        if config.rope_parameters.get("rope_type", "default") != "default":
            raise ValueError(f"the reference knows plain rotary encoding only, got {config.rope_parameters}")
        self.config = config
        self.weights = state_dict
        num_slots, num_lasting = config.num_memory_slots, config.num_lasting_slots
        select = config.memory_write == "select"
        num_lasting = num_slots if num_lasting is None else num_lasting
        parts = [Part(num_lasting, select, False), Part(num_slots - num_lasting, False, True)]
        self.parts = [part for part in parts if part.num_slots > 0]

    def linear(self, name: str, x: Tensor, bias: bool) -> Tensor:
        """`x` through the projection `name`."""
        out = self.weights[f"{name}.weight"] @ x
        return out + self.weights[f"{name}.bias"] if bias else out

    def norm(self, name: str, x: Tensor) -> Tensor:
        """Root mean square norm over the last dimension."""
        mean_square = (x * x).mean(-1, keepdim=True)
        return x / torch.sqrt(mean_square + self.config.rms_norm_eps) * self.weights[f"{name}.weight"]

    def heads(self, name: str, kind: str, h: Tensor) -> Tensor:
        """Queries, keys or values (`kind`) of one token, split in heads, before rotary."""
        x = self.linear(f"{name}.{kind}_proj", h, self.config.attention_bias)
        x = x.reshape(-1, self.config.head_dim)  # (H or G, D)
        return self.norm(f"{name}.{kind}_norm", x) if self.config.use_qk_norm and kind != "v" else x

    def rotate(self, x: Tensor, position: int) -> Tensor:
        """Rotary encoding of `x` (heads, D) at a position: dimension j turns with dimension j + D/2."""
        half = self.config.head_dim // 2
        theta = self.config.rope_parameters["rope_theta"]
        exponents = torch.arange(0, self.config.head_dim, 2, dtype=torch.float32) / self.config.head_dim
        frequencies = (1.0 / theta**exponents).tolist()  # rounded to float32, as Llama has them; angles are not
        angles = [position * frequency for frequency in frequencies]
        cos = x.new_tensor([math.cos(angle) for angle in angles])
        sin = x.new_tensor([math.sin(angle) for angle in angles])
        first, second = x[:, :half], x[:, half:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def shares(self, query: Tensor, keys: Tensor) -> Tensor:
        """How one query (D,) divides its attention among keys (A, D): (A,)."""
        return torch.softmax(keys @ query * self.config.head_dim**-0.5, dim=0)

    def attend(self, queries: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        """Softmax attention of one token's heads (H, D) to listed keys and values (G, D)."""
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        all_keys, all_values = torch.stack(keys), torch.stack(values)  # (A, G, D)
        outputs = []
        for head, query in enumerate(queries):
            g = head // group
            outputs.append(self.shares(query, all_keys[:, g]) @ all_values[:, g])
        return torch.stack(outputs)  # (H, D)

    def prefix(self, name: str, state: LayerState, first: int) -> tuple[list[Tensor], list[Tensor]]:
        """Rotated keys and values (G, D) before a window that begins at `first`: the sink, then the slots."""
        if first == 0:  # the window sees everything
            return [], []
        keys, values = [], []
        heads = []  # of each head its slots in the order of the text
        for g in range(self.config.num_key_value_heads):
            slots = [slot for ring in state.rings for slot in ring[g] if slot is not None]
            heads.append(sorted(slots, key=lambda slot: slot.position))
        num_written = len(heads[0])  # the same for all heads
        num_present = sum(part.num_slots for part in self.parts if part.uses_evidence)

        def place(steps_back: int) -> int:
            is_far = num_present < self.config.num_memory_slots and steps_back > num_present
            distance = min(self.config.lasting_distance, max(0, first - self.config.num_memory_slots))
            return first - steps_back - is_far * distance

        if self.config.use_attention_sink:
            keys.append(self.rotate(self.weights[f"{name}.sink.key"], place(num_written + 1)))
            values.append(self.weights[f"{name}.sink.value"])
        for j in range(num_written):
            keys.append(self.rotate(torch.stack([slots[j].key for slots in heads]), place(num_written - j)))
            values.append(torch.stack([slots[j].value for slots in heads]))
        return keys, values

    def attention(self, name: str, state: LayerState, h: Tensor, position: int) -> Tensor:
        """Reads the token's query, key and value into `state`, then attends on all paths and fuses them."""
        config = self.config
        query, key, value = (self.heads(name, kind, h) for kind in ("q", "k", "v"))
        query = self.rotate(query, position)
        state.rotated_queries.append(query)
        state.rotated_keys.append(self.rotate(key, position))
        state.keys.append(key)
        state.values.append(value)
        if any(part.uses_score for part in self.parts):
            state.scores.append(self.linear(f"{name}.memory.score_proj", h, bias=True))

        segment = position // config.segment_length
        first = max(0, (segment - config.num_lookback_segments) * config.segment_length)
        keys, values = self.prefix(name, state, first)
        window_keys, window_values = state.rotated_keys[first:], state.values[first:]
        if config.fusion_type == "gated":
            paths = [self.attend(query, keys + window_keys, values + window_values)]
        else:
            paths = [self.attend(query, window_keys, window_values)]
        if config.use_local_attention:
            start = position // config.chunk_length * config.chunk_length
            paths.append(self.attend(query, state.rotated_keys[start:], state.values[start:]))
        if config.fusion_type == "softmax" and (self.parts or config.use_attention_sink):
            paths.append(self.attend(query, keys, values) if keys else torch.zeros_like(query))
        return self.linear(f"{name}.o_proj", self.fuse(name, h, paths).reshape(-1), config.attention_bias)

    def fuse(self, name: str, h: Tensor, paths: list[Tensor]) -> Tensor:
        """One output (H, D) of the outputs of the paths: first the one with the window, then others as they exist."""
        if len(paths) == 1:
            return paths[0]
        if self.config.fusion_type == "softmax":
            shares = torch.softmax(self.weights[f"{name}.fusion.logits"], dim=0)  # (paths,)
            return sum((share * path for share, path in zip(shares, paths, strict=True)), torch.zeros_like(paths[0]))
        unified, local = paths
        gate = self.weights[f"{name}.fusion.scale"] * torch.sigmoid(self.linear(f"{name}.fusion.gate", h, bias=True))
        return unified + gate[:, None] * local

    def mlp(self, layer: str, h: Tensor) -> Tensor:
        """The gated feed-forward part."""
        gate, up = (self.linear(f"{layer}.mlp.{kind}_proj", h, self.config.mlp_bias) for kind in ("gate", "up"))
        return self.linear(f"{layer}.mlp.down_proj", gate * torch.sigmoid(gate) * up, self.config.mlp_bias)

    def evidence(self, state: LayerState, start: int, g: int) -> Tensor:
        """Log of the attention (S,) that the segment which begins at `start` gets from the last tokens read."""
        keys = torch.stack([key[g] for key in state.rotated_keys[start : start + self.config.segment_length]])
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        observing = state.rotated_queries[-self.config.num_observing_tokens :]
        shares = [self.shares(query, keys) for queries in observing for query in queries[g * group : (g + 1) * group]]
        return torch.log(torch.stack(shares).mean(0) + 1e-8).detach()

    def select(self, ring: str, part: Part, state: LayerState, start: int, g: int, taken: set[int]) -> list[Slot]:
        """The strongest tokens of each chunk; what the part before has `taken` is chosen as well, but worth least."""
        end = start + self.config.segment_length
        strengths = state.keys[start].new_zeros(end - start)
        if part.uses_score:
            strengths = strengths + torch.stack([score[g] for score in state.scores[start:end]])
        if part.uses_evidence:
            strengths = strengths + self.evidence(state, start, g)
        least = strengths.new_tensor(LEAST)
        strength_at = dict(zip(range(start, end), strengths, strict=True))
        if self.config.use_attention_sink and start == 0:
            strength_at[0] = least
        slots = []
        for chunk in range(start, end, self.config.chunk_length):
            positions = range(chunk, chunk + self.config.chunk_length)
            best_first = sorted(positions, key=lambda p: -in_steps(strength_at[p]))  # stable: of equals, the earlier
            for p in best_first[: self.config.num_slots_per_chunk]:
                value = state.values[p][g]
                if part.uses_score:
                    value = value * torch.sigmoid(state.scores[p][g] + 4)
                slots.append(Slot(state.keys[p][g], value, least if p in taken else strength_at[p], p))
        return slots

    def average(self, state: LayerState, start: int, g: int) -> list[Slot]:
        """The means of equal spans of each chunk, all of one strength; each is where its span ends."""
        length = self.config.chunk_length // self.config.num_slots_per_chunk
        slots = []
        for p in range(start, start + self.config.segment_length, length):
            key = torch.stack([key[g] for key in state.keys[p : p + length]]).mean(0)
            value = torch.stack([value[g] for value in state.values[p : p + length]]).mean(0)
            slots.append(Slot(key, value, key.new_zeros(()), p + length - 1))
        return slots

    def write(self, name: str, state: LayerState, segment: int) -> None:
        """Offers a segment to every part: its candidates, strongest first, meet the oldest group, weakest first."""
        start = segment * self.config.segment_length
        taken: list[set[int]] = [set() for _ in range(self.config.num_key_value_heads)]  # positions, by the last part
        for index, part in enumerate(self.parts):
            ring, heads = f"{name}.memory.rings.{index}", []
            for g, slots in enumerate(state.rings[index]):
                if self.config.memory_write == "mean":
                    candidates = self.average(state, start, g)
                else:
                    candidates = self.select(ring, part, state, start, g, taken[g])
                candidates.sort(key=lambda slot: -in_steps(slot.strength))
                oldest = sorted(
                    slots[: len(candidates)], key=lambda s: -math.inf if s is None else in_steps(s.strength)
                )
                youngest = [self.merge(ring, g, old, new) for old, new in zip(oldest, candidates, strict=True)]
                taken[g] = {slot.position for slot in youngest if slot.position >= start}
                heads.append(slots[len(candidates) :] + youngest)
            state.rings[index] = heads

    def merge(self, ring: str, g: int, old: Slot | None, new: Slot) -> Slot:
        """The gated write of a candidate over an old slot."""
        if old is None:
            return new
        weight, bias = self.weights[f"{ring}.gate_weight"][g], self.weights[f"{ring}.gate_bias"][g]
        # Averages are all of one strength, and what lasts does not fade.
        zeros = torch.zeros_like(bias).expand(self.config.num_key_value_heads)
        scale, fade = (self.weights.get(f"{ring}.{kind}", zeros)[g] for kind in ("gate_scale", "fade"))
        faded = old.strength - fade
        logit = weight @ torch.cat([old.key, old.value, new.key, new.value]) + scale * (new.strength - faded) + bias
        gamma = torch.clamp(1.2 * torch.sigmoid(logit) - 0.1, 0, 1)
        if new.strength.item() <= LEAST / 2:
            gamma = gamma.new_tensor(0)
        elif old.strength.item() <= LEAST / 2:
            gamma = gamma.new_tensor(1)
        return Slot(
            (1 - gamma) * old.key + gamma * new.key,
            (1 - gamma) * old.value + gamma * new.value,
            (1 - gamma) * faded + gamma * new.strength,
            new.position if gamma.item() > 0.5 + STEP else old.position,
        )


class ReferenceStream:
    """The state of one stream, and the reading of it."""

    def __init__(self, model: ReferenceModel) -> None:
        self.model = model
        self.position = 0
        self.last_hidden: Tensor | None = None  # (E,) of the last token, after the final norm
        self.layers = []
        for _ in range(model.config.num_hidden_layers):
            rings = [[[None] * part.num_slots] * model.config.num_key_value_heads for part in model.parts]
            self.layers.append(LayerState(rings))

    def read(self, token_id: int) -> Tensor:
        """Reads one token and returns its logits (V,)."""
        return self.read_embedding(self.model.weights["model.embed_tokens.weight"][token_id])

    def read_all(self, ids: Iterable[int]) -> Tensor:
        """Reads tokens in order and returns their logits (T, V)."""
        return torch.stack([self.read(int(token_id)) for token_id in ids])

    def read_embedding(self, vector: Tensor) -> Tensor:
        """Reads one token given as its embedding (E,) and returns its logits (V,)."""
        model, config, x = self.model, self.model.config, vector
        for i, state in enumerate(self.layers):
            layer = f"model.layers.{i}"
            h = model.norm(f"{layer}.input_layernorm", x)
            x = x + model.attention(f"{layer}.self_attn", state, h, self.position)
            x = x + model.mlp(layer, model.norm(f"{layer}.post_attention_layernorm", x))
        self.last_hidden = model.norm("model.norm", x)
        self.position += 1
        if self.position % config.segment_length == 0:
            segment = self.position // config.segment_length - config.num_lookback_segments - 1
            if segment >= 0:  # it has just left the window
                for i, state in enumerate(self.layers):
                    model.write(f"model.layers.{i}.self_attn", state, segment)
        head = model.weights.get("lm_head.weight", model.weights["model.embed_tokens.weight"])
        return head @ self.last_hidden

    def prefix(self, layer: int, first: int) -> tuple[list[Tensor], list[Tensor]]:
        """Rotated keys and values (G, D) that tokens of a window see before it; it begins at `first`."""
        return self.model.prefix(f"model.layers.{layer}.self_attn", self.layers[layer], first)

    def memory(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys and values (M, G, D), strengths and positions (M, G), part after part, each oldest group first.

        A slot that was never written is 0, 0, -inf, -1.
        """
        config, embeddings = self.model.config, self.model.weights["model.embed_tokens.weight"]
        shape = config.num_memory_slots, config.num_key_value_heads
        keys, values = (embeddings.new_zeros(*shape, config.head_dim) for _ in range(2))
        strengths = embeddings.new_full(shape, -math.inf)
        positions = torch.full(shape, -1)
        for g in range(config.num_key_value_heads):
            slots = [slot for ring in self.layers[layer].rings for slot in ring[g]]
            for j, slot in enumerate(slots):
                if slot is not None:
                    keys[j, g], values[j, g], strengths[j, g], positions[j, g] = slot
        return keys, values, strengths, positions
