"""Where `generate` meets the state: which cache it makes, what it gives the model again, and what is refused.

All decoding is inherited from `transformers.GenerationMixin`; here is only what a state of constant size needs.
"""

from typing import Any, NoReturn, cast

import torch
from transformers.generation import GenerationConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from .cache_rmt import RMTCache, check_cache_type
from .configuration_rmt import RMTConfig


class RMTGeneration:
    """What a language model puts before `GenerationMixin`."""

    config: RMTConfig

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Gives `generate` an RMTCache where it would make a cache that grows."""
        given = model_kwargs.get("past_key_values")
        if generation_config.assistant_early_exit is not None:
            raise ValueError(
                "assistant_early_exit does not apply to this model, whose state has every layer: give a smaller "
                "assistant_model, or prompt_lookup_num_tokens."
            )
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} does not apply to this model, whose "
                "state is of constant size anyway: leave it out."
            )
        if given is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = RMTCache(self.config)
        elif given is not None:
            check_cache_type(given)
            given._is_user_defined = True

    def prepare_inputs_for_generation(
        self, input_ids: torch.LongTensor, *args: Any, inputs_embeds: torch.Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As every model, but without `position_ids`: the state counts, and may have read more than the prompt."""
        kwargs["inputs_embeds"] = inputs_embeds  # named above, because `generate` looks for the name
        cache = kwargs.get("past_key_values")
        skip = getattr(cache, "num_columns_to_skip", 0)  # other caches are refused later, and in better words
        if skip:
            kwargs["next_sequence_length"] = input_ids.shape[1] - skip
            cast(RMTCache, cache).num_columns_to_skip = 0
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)  # type: ignore[misc]
        inputs.pop("position_ids", None)
        return inputs

    def _assisted_decoding(self, input_ids: torch.LongTensor, *args: Any, **model_kwargs: Any) -> Any:
        """Lets assisted generation go on from a state as well; the inherited one gives it the whole prompt again."""
        cache = model_kwargs.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length()
        if past >= input_ids.shape[1]:
            cast(RMTCache, cache).begin_prompt()
        elif past:
            cast(RMTCache, cache).num_columns_to_skip = past
        try:
            return super()._assisted_decoding(input_ids, *args, **model_kwargs)  # type: ignore[misc]
        finally:
            if past:
                cast(RMTCache, cache).num_columns_to_skip = 0  # also if the call was refused before it read anything

    def _prepare_attention_mask_for_generation(
        self, inputs_tensor: torch.Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """All ones for a draft: it goes on with what the model wrote, in which the id of padding is a token."""
        if generation_config.is_assistant:
            return torch.ones(inputs_tensor.shape[:2], dtype=torch.long, device=inputs_tensor.device)
        prepare = super()._prepare_attention_mask_for_generation  # type: ignore[misc]
        return prepare(inputs_tensor, generation_config, model_kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuses what pages keys and values of any number of tokens, of which a state of constant size has none."""
        raise ValueError(
            "This model does not support continuous batching (generate_batch): call generate with a left-padded batch, "
            "or keep a state for each stream and put batches together with RMTCache.stack and split."
        )

    def _prefill(
        self, input_ids: torch.LongTensor, generation_config: GenerationConfig, model_kwargs: dict, **kwargs: Any
    ) -> CausalLMOutputWithPast:
        """Lets `generate` go on from a state with the new tokens alone, as one that was loaded or memorized needs it.

        As with every cache, ids longer than what the state has read are all columns from the beginning.
        """
        cache, mask = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
        masked = getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[1]
        if cache is not None and masked == input_ids.shape[1] <= cache.get_seq_length():
            cache.begin_prompt()
        return super()._prefill(input_ids, generation_config, model_kwargs, **kwargs)  # type: ignore[misc]
