"""The naive reference: the same model, one row and one token at a time, in plain loops, every key kept for ever.

It is written from the design page alone and shares no code with the package. Tensors are used as they are given: hand
in float64 leaves with `requires_grad` to compare gradients.
"""

# E hidden_size, H query heads, G key/value heads, D head_dim, V vocabulary, T tokens, L visible tokens,
# C chunk_length, S segment_length, N num_lookback_segments, M num_memory_slots, r num_slots_per_chunk

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Slot(NamedTuple):
    """One place of memory, all key/value heads of it."""

    key: Tensor  # (G, D)
    value: Tensor  # (G, D)
    strength: Tensor  # (G,)


@dataclass
class LayerState:
    """Everything one layer has read since the start of the stream; lists are indexed by stream position."""

    memory: list[Slot | None]  # M places, oldest first
    rotated_keys: list[Tensor] = field(default_factory=list)  # (G, D) each
    keys: list[Tensor] = field(default_factory=list)  # (G, D) each, unrotated
    values: list[Tensor] = field(default_factory=list)  # (G, D) each
    scores: list[Tensor] = field(default_factory=list)  # (G,) each for select, none for mean


class ReferenceModel:
    """The weights and the arithmetic of one token; the state is in `ReferenceStream`."""

    def __init__(self, config: Any, state_dict: dict[str, Tensor]) -> None:
        known = {
            "hidden_act": ("silu",),
            "fusion_type": ("gated", "softmax"),
            "memory_write": ("select", "mean"),
        }
        for name, choices in known.items():
            if getattr(config, name) not in choices:
                raise ValueError(f"the reference knows {name} in {choices}, got {getattr(config, name)!r}")
        if config.rope_parameters.get("rope_type", "default") != "default":
            raise ValueError(f"the reference knows plain rotary encoding only, got {config.rope_parameters}")
        self.config = config
        self.weights = state_dict

    def linear(self, name: str, x: Tensor, bias: bool) -> Tensor:
        """`x` through the projection `name`."""
        out = self.weights[f"{name}.weight"] @ x
        return out + self.weights[f"{name}.bias"] if bias else out

    def norm(self, name: str, x: Tensor) -> Tensor:
        """Root mean square norm over the last dimension."""
        mean_square = (x * x).mean(-1, keepdim=True)
        return x / torch.sqrt(mean_square + self.config.rms_norm_eps) * self.weights[f"{name}.weight"]

    def heads(self, layer: str, kind: str, h: Tensor) -> Tensor:
        """Queries, keys, values or memory queries (`kind`) of one token, split in heads, before rotary."""
        x = self.linear(f"{layer}.self_attn.{kind}_proj", h, self.config.attention_bias)
        x = x.reshape(-1, self.config.head_dim)  # (H or G, D)
        return self.norm(f"{layer}.self_attn.{kind}_norm", x) if self.config.use_qk_norm and kind != "v" else x

    def rotate(self, x: Tensor, position: int) -> Tensor:
        """Rotary encoding of `x` (heads, D) at a stream position: dimension j turns with dimension j + D/2."""
        half = self.config.head_dim // 2
        theta = self.config.rope_parameters["rope_theta"]
        exponents = torch.arange(0, self.config.head_dim, 2, dtype=torch.float32) / self.config.head_dim
        frequencies = (1.0 / theta**exponents).tolist()  # rounded to float32, as Llama has them; angles are not
        angles = [position * frequency for frequency in frequencies]
        cos = x.new_tensor([math.cos(angle) for angle in angles])
        sin = x.new_tensor([math.sin(angle) for angle in angles])
        first, second = x[:, :half], x[:, half:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def attend(self, queries: Tensor, keys: list[Tensor], values: list[Tensor], strengths: list[Tensor]) -> Tensor:
        """Softmax attention of one token's heads (H, D) to listed keys (G, D), strengths (G,) added to the scores."""
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        all_keys, all_values, bias = torch.stack(keys), torch.stack(values), torch.stack(strengths)  # (L, G, D), (L, G)
        outputs = []
        for head, query in enumerate(queries):
            g = head // group
            scores = all_keys[:, g] @ query * self.config.head_dim**-0.5 + bias[:, g]  # (L,)
            outputs.append(torch.softmax(scores, dim=0) @ all_values[:, g])
        return torch.stack(outputs)  # (H, D)

    def attention(self, layer: str, state: LayerState, h: Tensor, position: int) -> Tensor:
        """Reads the token's keys and values into `state`, then attends on all paths and fuses them."""
        config, name = self.config, f"{layer}.self_attn"
        query, key, value = (self.heads(layer, kind, h) for kind in ("q", "k", "v"))
        query = self.rotate(query, position)
        state.keys.append(key)
        state.rotated_keys.append(self.rotate(key, position))
        state.values.append(value)
        if config.num_memory_slots and config.memory_write != "mean":
            state.scores.append(self.linear(f"{name}.memory.score_proj", h, bias=True))

        def attend_from(start: int) -> Tensor:
            keys, values = state.rotated_keys[start:], state.values[start:]
            return self.attend(query, keys, values, [key.new_zeros(len(key))] * len(keys))

        segment = position // config.segment_length
        first = max(0, (segment - config.num_lookback_segments) * config.segment_length)
        paths = [attend_from(first)]
        if config.use_attention_sink and first > 0:
            sink_key, sink_value = (self.weights[f"{name}.sink.{part}"] for part in ("key", "value"))
            keys = [self.rotate(sink_key, first - 1), *state.rotated_keys[first:]]
            values = [sink_value, *state.values[first:]]
            paths = [self.attend(query, keys, values, [key.new_zeros(len(key))] * len(keys))]
        if config.use_local_attention:
            paths.append(attend_from(position // config.chunk_length * config.chunk_length))
        if config.num_memory_slots:
            null_key = self.weights[f"{name}.memory.null_key"]
            null = Slot(null_key, torch.zeros_like(null_key), null_key.new_zeros(len(null_key)))
            slots = [null] + [slot for slot in state.memory if slot is not None]
            keys, values, strengths = (list(part) for part in zip(*slots, strict=True))
            paths.append(self.attend(self.heads(layer, "memory_q", h), keys, values, strengths))
        return self.linear(f"{name}.o_proj", self.fuse(name, h, paths).reshape(-1), config.attention_bias)

    def fuse(self, name: str, h: Tensor, paths: list[Tensor]) -> Tensor:
        """One output (H, D) of the outputs of the paths: global first, then local and memory as far as they exist."""
        if len(paths) == 1:
            return paths[0]
        if self.config.fusion_type == "softmax":
            shares = torch.softmax(self.weights[f"{name}.fusion.logits"], dim=0)  # (1 + paths,)
            return sum((share * path for share, path in zip(shares, paths, strict=True)), torch.zeros_like(paths[0]))
        scale = self.weights[f"{name}.fusion.scale"]  # (H, paths)
        gates = scale * torch.sigmoid(self.linear(f"{name}.fusion.gate", h, bias=True)).reshape(scale.shape)
        return sum((gate[:, None] * path for gate, path in zip(gates.T, paths[1:], strict=True)), paths[0])

    def mlp(self, layer: str, h: Tensor) -> Tensor:
        """The gated feed-forward part."""
        gate, up = (self.linear(f"{layer}.mlp.{kind}_proj", h, self.config.mlp_bias) for kind in ("gate", "up"))
        return self.linear(f"{layer}.mlp.down_proj", gate * torch.sigmoid(gate) * up, self.config.mlp_bias)

    def candidate(self, state: LayerState, start: int, g: int, j: int) -> tuple[Tensor, Tensor, Tensor]:
        """Candidate j of head g from the chunk that starts at position `start`: key (D,), value (D,), strength ()."""
        length, num_slots = self.config.chunk_length, self.config.num_slots_per_chunk
        positions = range(start, start + length)
        if self.config.memory_write == "select":
            best_first = sorted(positions, key=lambda p: -state.scores[p][g].item())  # stable: of equals, the earlier
            p = sorted(best_first[:num_slots])[j]
            return state.keys[p][g], state.values[p][g], torch.nn.functional.logsigmoid(state.scores[p][g])
        part = length // num_slots
        positions = positions[j * part : (j + 1) * part]
        weights = state.keys[start].new_full((part,), 1 / part)
        key = weights @ torch.stack([state.keys[p][g] for p in positions])
        value = weights @ torch.stack([state.values[p][g] for p in positions])
        return key, value, key.new_zeros(())

    def write(self, layer: str, state: LayerState, segment: int) -> None:
        """Condenses a segment and lets its candidates meet the oldest places of memory."""
        start = segment * self.config.segment_length
        candidates = []
        for chunk in range(start, start + self.config.segment_length, self.config.chunk_length):
            for j in range(self.config.num_slots_per_chunk):
                per_head = [self.candidate(state, chunk, g, j) for g in range(self.config.num_key_value_heads)]
                candidates.append(Slot(*(torch.stack(part) for part in zip(*per_head, strict=True))))
        young = []
        for old, new in zip(state.memory, candidates, strict=False):  # the oldest len(candidates) places
            young.append(new if old is None else self.merge(layer, old, new))
        state.memory = state.memory[len(young) :] + young

    def merge(self, layer: str, old: Slot, new: Slot) -> Slot:
        """The gated write of a candidate over an old slot."""
        weight, bias = (self.weights[f"{layer}.self_attn.memory.gate_{part}"] for part in ("weight", "bias"))
        inputs = torch.cat([old.key, old.value, new.key, new.value], dim=-1)  # (G, 4D)
        gamma = torch.clamp(1.2 * torch.sigmoid((weight * inputs).sum(-1) + bias) - 0.1, 0, 1)  # (G,)
        column = gamma[:, None]
        return Slot(
            (1 - column) * old.key + column * new.key,
            (1 - column) * old.value + column * new.value,
            (1 - gamma) * old.strength + gamma * new.strength,
        )


class ReferenceStream:
    """The state of one stream, and the reading of it."""

    def __init__(self, model: ReferenceModel) -> None:
        self.model = model
        self.position = 0
        self.last_hidden: Tensor | None = None  # (E,) of the last token, after the final norm
        num_layers, num_places = model.config.num_hidden_layers, model.config.num_memory_slots
        self.layers = [LayerState(memory=[None] * num_places) for _ in range(num_layers)]

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
            x = x + model.attention(layer, state, model.norm(f"{layer}.input_layernorm", x), self.position)
            x = x + model.mlp(layer, model.norm(f"{layer}.post_attention_layernorm", x))
        self.last_hidden = model.norm("model.norm", x)
        self.position += 1
        if config.num_memory_slots and self.position % config.segment_length == 0:
            segment = self.position // config.segment_length - config.num_lookback_segments - 1
            if segment >= 0:  # it has just left the window
                for i, state in enumerate(self.layers):
                    model.write(f"model.layers.{i}", state, segment)
        head = model.weights.get("lm_head.weight", model.weights["model.embed_tokens.weight"])
        return head @ self.last_hidden

    def memory(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys (M, G, D), values (M, G, D) and strengths (M, G), oldest first; empty places are 0, 0 and -inf."""
        config = self.model.config
        zeros = self.model.weights["model.embed_tokens.weight"].new_zeros(config.num_key_value_heads, config.head_dim)
        empty = Slot(zeros, zeros, torch.full_like(zeros[:, 0], -math.inf))
        slots = [empty if slot is None else slot for slot in self.layers[layer].memory]
        if not slots:
            return zeros.new_zeros(0, *zeros.shape), zeros.new_zeros(0, *zeros.shape), zeros.new_zeros(0, len(zeros))
        keys, values, strengths = (torch.stack(part) for part in zip(*slots, strict=True))
        return keys, values, strengths
