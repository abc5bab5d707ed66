"""A Llama-like model whose cache evicts keys and values by attention, as H2O and SnapKV do, read segment by segment.

At each segment end the oldest segment of the window and the tokens kept so far compete for the slots. `"sum"` keeps
what has got most attention since it was read (H2O); `"last"` keeps what the last 32 tokens attend to most (SnapKV,
which does so once, after a prompt). Nothing after the segment end counts. Kept tokens stand before the window.

Source: Zhang et al. 2023, "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models", and
Li et al. 2024, "SnapKV: LLM Knows What You are Looking for Before Generation". Departs from them: kept per key/value
head, positions compressed, one budget for all layers, and no pooling over neighbours.

Shapes: one stream; T tokens of a call, G key/value heads, H query heads, n tokens kept and in the window, D head width.
"""

from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


NUM_ASKING = 32
POLICIES = ("sum", "last")


class EvictionState:
    """What each layer keeps: keys without rotary encoding and values (G, n, D), attention (G, n), last queries."""

    def __init__(self, num_layers: int) -> None:
        self.position, self.num_kept = 0, 0
        self.layers: list[list[torch.Tensor]] = [[] for _ in range(num_layers)]

    def tensors(self) -> list[torch.Tensor]:
        """Keys and values."""
        return [tensor for layer in self.layers for tensor in layer[:2]]


class EvictionForCausalLM(nn.Module):
    """The source, with slots and window of a converted model, and no learned part.

    Args:
        source: Of Llama's family; shared, not copied.
        segment_length: Tokens between two evictions; the window has one segment to two.
        num_slots: Tokens that a key/value head keeps besides.
        policy: `"sum"` or `"last"`.
    """

    def __init__(self, source: PreTrainedModel, segment_length: int, num_slots: int, policy: str) -> None:
        super().__init__()
        if policy not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}.")
        self.source, self.config, self.dtype, self.device = source.eval(), source.config, source.dtype, source.device
        self.segment_length, self.num_slots, self.policy = segment_length, num_slots, policy

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor,
        past_key_values: EvictionState | None = None,
        use_cache: bool = True,
        logits_to_keep: int = 0,
    ) -> CausalLMOutputWithPast:
        """Logits (1, T or `logits_to_keep`, V) of (1, T) tokens, which go on from a state that is changed in place."""
        state, parts = past_key_values or EvictionState(self.config.num_hidden_layers), []
        start = 0
        while start < input_ids.shape[1]:
            size = self.segment_length - state.position % self.segment_length
            parts.append(self.read(input_ids[:, start : start + size], state))
            start += size
        hidden = self.source.model.norm(torch.cat(parts, 1))
        return CausalLMOutputWithPast(
            logits=self.source.lm_head(hidden[:, -logits_to_keep:]), past_key_values=cast(Any, state)
        )

    def read(self, input_ids: torch.Tensor, state: EvictionState) -> torch.Tensor:
        """Hidden states (1, T, E) of tokens of one segment; evicts if it ends."""
        decoder, end = self.source.model, state.position + input_ids.shape[1]
        hidden, evicts = decoder.embed_tokens(input_ids), end % self.segment_length == 0
        in_window = end - max(0, (end - 1) // self.segment_length - 1) * self.segment_length
        positions = torch.arange(end - in_window - state.num_kept, end)[None].clamp_min(0)
        cos, sin = decoder.rotary_emb(hidden, positions)
        for index, layer in enumerate(decoder.layers):
            output, kept = self.attend(layer, hidden, state.layers[index], cos, sin)
            hidden = hidden + output
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
            if evicts and in_window == 2 * self.segment_length:
                kept = self.evict(kept, cos, sin, state.num_kept)
            state.layers[index] = kept
        state.position = end
        if evicts and in_window == 2 * self.segment_length:
            state.num_kept = min(self.num_slots, state.num_kept + self.segment_length)
        return hidden

    def attend(
        self, layer: Any, hidden: torch.Tensor, kept: list[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """What the layer's attention adds, (1, T, E), and what it keeps with the new tokens."""
        module, normed, length = layer.self_attn, layer.input_layernorm(hidden), hidden.shape[1]
        query, key, value = (
            project(normed)[0].unflatten(-1, (-1, module.head_dim)).transpose(0, 1)
            for project in (module.q_proj, module.k_proj, module.v_proj)
        )
        query = apply_rotary_pos_emb(query[None], query[None], cos[:, -length:], sin[:, -length:])[0][0]
        received = key.new_zeros(key.shape[:2], dtype=torch.float32)
        new = [key, value, received, query]
        keys, values, received, asking = [torch.cat(pair, 1) for pair in zip(kept, new, strict=True)] if kept else new
        weights = self.weights(query, keys, cos, sin)
        output = (weights.to(values.dtype) @ values[:, None]).flatten(0, 1)  # (H, T, D)
        output = module.o_proj(output.transpose(0, 1).flatten(1)[None])
        return output, [keys, values, received + weights.sum((1, 2)), asking[:, -NUM_ASKING:]]

    @staticmethod
    def weights(query: torch.Tensor, keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Attention of the last tokens to all, (G, H / G, T, n)."""
        keys = apply_rotary_pos_emb(keys[None], keys[None], cos, sin)[0][0]
        asked = query.unflatten(0, (keys.shape[0], -1))
        logits = (asked @ keys[:, None].transpose(2, 3)).float() * keys.shape[-1] ** -0.5
        later = logits.new_ones(logits.shape[2:], dtype=torch.bool).triu(logits.shape[3] - logits.shape[2] + 1)
        return logits.masked_fill(later, -torch.inf).softmax(-1)

    def evict(
        self, kept: list[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor, num_kept: int
    ) -> list[torch.Tensor]:
        """The best of the tokens before the newer segment, in the order of the text, and that segment."""
        keys, values, received, asking = kept
        candidates = num_kept + self.segment_length
        by = received if self.policy == "sum" else self.weights(asking, keys, cos, sin).mean((1, 2))
        best = by[:, :candidates].topk(min(self.num_slots, candidates), 1).indices.sort(1).values
        rest = torch.arange(candidates, keys.shape[1]).expand(len(keys), -1)
        chosen = torch.cat([best, rest], 1)
        wide = chosen[..., None].expand(-1, -1, keys.shape[2])
        return [keys.gather(1, wide), values.gather(1, wide), received.gather(1, chosen), asking]
