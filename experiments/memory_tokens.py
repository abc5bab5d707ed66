"""A Llama that passes memory tokens from segment to segment: the recurrence that the literature compares with.

Shapes: B rows, T tokens of a call, E hidden size, V vocabulary, M memory tokens.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep


@strict
class MemoryTokensConfig(LlamaConfig):
    """Configuration of a Llama that passes memory tokens from segment to segment.

    Args:
        segment_length (`int`, defaults to 512): Tokens of a segment; at least 1.
        num_memory_tokens (`int`, defaults to 16): Vectors that one segment hands to the next; at least 1.

    Raises:
        ValueError: If one of the two is below 1. All other fields are those of `LlamaConfig`.
    """

    model_type = "memory_tokens"

    segment_length: int = 512
    num_memory_tokens: int = 16

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.validate_architecture()

    def validate_architecture(self) -> None:
        """Checks the two lengths besides what `LlamaConfig` checks. Called by `@strict`."""
        super().validate_architecture()
        for name in ("segment_length", "num_memory_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")


@dataclass
class MemoryTokensState:
    """What is carried from one call to the next; the model changes it in place, as Llama does with its cache.

    Attributes:
        memory: (B, M, E) what the last whole segment wrote; None before the first call.
        cache: Keys and values of [memory | segment so far]; None at the start of a segment.
    """

    memory: torch.Tensor | None = None
    cache: DynamicCache | None = None


class MemoryTokensForCausalLM(LlamaForCausalLM):
    """A Llama that reads [memory | segment | memory], segment after segment.

    What comes out of the final norm at the last M positions is the memory of the next segment, so every token sees the
    earlier tokens of its segment and, through M vectors, all segments before. Positions start anew in each segment.
    Nothing is detached: the gradient goes through all segments of a call, and through the state into earlier calls
    unless those ran under `torch.no_grad()`. Rows have no padding, and `generate` is not supported.

    Source: section 3 of Bulatov et al. 2022, "Recurrent Memory Transformer", arXiv 2207.06881, on an unchanged Llama.
    Attention is causal everywhere, also among the memory tokens.
    """

    config: MemoryTokensConfig

    def __init__(self, config: MemoryTokensConfig) -> None:
        super().__init__(config)
        self.first_memory = nn.Embedding(config.num_memory_tokens, config.hidden_size)  # initialised as embeddings are
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: MemoryTokensState | Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of any number of tokens, which may begin and end within a segment.

        Args:
            input_ids: (B, T) token ids, int64.
            attention_mask: (B, T) ones, or None.
            past_key_values: State to go on from, changed in place; None starts anew.
            labels: (B, T) token ids, not shifted; -100 is ignored.
            use_cache: Whether to return a state when none is given; defaults to `config.use_cache` outside training.
            logits_to_keep: Last positions to project (0 for all), or a tensor of positions.
            kwargs: Passed to the loss function.

        Returns:
            `logits` (B, T, V), `loss` and, if asked for, `past_key_values`.

        Raises:
            ValueError: If the mask has a zero, or the state is none of `MemoryTokensState`.
        """
        if attention_mask is not None and not attention_mask.all():
            raise ValueError("attention_mask has zeros, but memory tokens read rows without padding: cut the rows.")
        if not isinstance(past_key_values, MemoryTokensState | None):
            kind = type(past_key_values).__name__
            raise ValueError(f"past_key_values must be a MemoryTokensState, got {kind}: pass MemoryTokensState().")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        use_cache = use_cache or past_key_values is not None
        state = MemoryTokensState() if past_key_values is None else past_key_values
        if state.memory is None:
            state.memory = self.first_memory.weight.expand(len(input_ids), -1, -1)
        embeddings, hidden_states = self.model.embed_tokens(input_ids), []
        while embeddings.shape[1]:
            length = self.config.segment_length - self._begun(state)
            part, embeddings = embeddings[:, :length], embeddings[:, length:]
            hidden_states.append(self._read(part, state, use_cache or embeddings.shape[1] > 0))
        logits = self.lm_head(slice_logits_to_keep(torch.cat(hidden_states, 1), logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=state if use_cache else None)  # type: ignore[arg-type]

    def _begun(self, state: MemoryTokensState) -> int:
        """Tokens of the current segment that were read."""
        return 0 if state.cache is None else state.cache.get_seq_length() - self.config.num_memory_tokens

    def _read(self, part: torch.Tensor, state: MemoryTokensState, is_continued: bool) -> torch.Tensor:
        """Hidden states (B, T, E) of tokens of one segment; writes the memory if they end it and something follows."""
        memory, num_memory = cast(torch.Tensor, state.memory), self.config.num_memory_tokens
        begun, length = self._begun(state), part.shape[1]
        first = num_memory if state.cache is None else 0  # of the positions that belong to the part
        is_whole = begun + length == self.config.segment_length
        parts = [memory] * (state.cache is None) + [part] + [memory] * (is_whole and is_continued)
        if state.cache is None and is_continued and not is_whole:
            state.cache = DynamicCache(config=self.config)
        inputs = torch.cat(parts, 1)
        start = num_memory + begun - first
        outputs = self.model(
            inputs_embeds=inputs,
            position_ids=torch.arange(start, start + inputs.shape[1], device=inputs.device)[None],
            past_key_values=state.cache,
            use_cache=state.cache is not None,
        )
        if is_whole and is_continued:
            state.memory, state.cache = outputs.last_hidden_state[:, first + length :], None
        return outputs.last_hidden_state[:, first : first + length]
