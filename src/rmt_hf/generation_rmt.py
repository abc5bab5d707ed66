"""Where `generate` meets the state: which cache it makes, what it gives the model again, and what is refused.

Decoding is inherited from `transformers.GenerationMixin`; here is only what a state of constant size needs.
"""

from contextlib import nullcontext
from typing import Any, NoReturn

import torch
from transformers.generation import GenerationConfig

from .cache_rmt import RMTCache, check_cache_type
from .configuration_rmt import RMTConfig


class RMTGeneration:
    """What a language model puts before `GenerationMixin`."""

    config: RMTConfig

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As every model; if it raises, a state that was given is as it was before."""
        cache: Any = kwargs.get("past_key_values")
        with cache.unchanged_on_error() if hasattr(cache, "unchanged_on_error") else nullcontext():
            return super().generate(*args, **kwargs)  # type: ignore[misc]

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Gives `generate` an RMTCache where it would make a cache that grows."""
        if generation_config.assistant_early_exit is not None:
            raise ValueError("assistant_early_exit: a state has all layers. Give a smaller assistant_model instead.")
        if (name := generation_config.cache_implementation) not in (None, "dynamic"):
            raise ValueError(f"cache_implementation={name!r}: a state is of constant size anyway, leave it out.")
        given = model_kwargs.get("past_key_values")
        if given is not None:
            check_cache_type(given)
            if generation_config.use_cache is False:
                raise ValueError("use_cache must be True with past_key_values, got False: the state is the cache.")
            given._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = RMTCache(self.config)

    def prepare_inputs_for_generation(
        self, input_ids: torch.LongTensor, *args: Any, inputs_embeds: torch.Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As every model, but without `position_ids`: the state counts, and may have read more than the prompt."""
        kwargs["inputs_embeds"] = inputs_embeds  # named above, because `generate` looks for the name
        cache: Any = kwargs.get("past_key_values")
        if getattr(cache, "num_columns_to_skip", 0):  # other caches are refused later, and in better words
            kwargs["next_sequence_length"] = input_ids.shape[1] - cache.num_columns_to_skip
            cache.num_columns_to_skip = 0
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)  # type: ignore[misc]
        inputs.pop("position_ids", None)
        return inputs

    def _assisted_decoding(self, input_ids: torch.LongTensor, *args: Any, **model_kwargs: Any) -> Any:
        """Lets assisted generation go on from a state as well; the inherited one gives it the whole prompt again."""
        cache: Any = model_kwargs.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length()
        if past >= input_ids.shape[1]:
            cache.begin_prompt()
        elif past:
            cache.num_columns_to_skip = past
        return super()._assisted_decoding(input_ids, *args, **model_kwargs)  # type: ignore[misc]

    def _prepare_attention_mask_for_generation(
        self, inputs_tensor: torch.Tensor, generation_config: GenerationConfig, *args: Any
    ) -> torch.Tensor:
        """All ones for a draft: it goes on with what the model wrote, in which the id of padding is a token."""
        if generation_config.is_assistant:
            return torch.ones(inputs_tensor.shape[:2], dtype=torch.long, device=inputs_tensor.device)
        return super()._prepare_attention_mask_for_generation(inputs_tensor, generation_config, *args)  # type: ignore[misc]

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuses what pages keys and values of any number of tokens, of which a state of constant size has none."""
        raise ValueError("This model has no continuous batching (generate_batch): give generate a left-padded batch.")

    def _prefill(self, input_ids: Any, generation_config: Any, model_kwargs: dict, **kwargs: Any) -> Any:
        """Lets `generate` go on from a state with new tokens alone; more ids than it has read begin where it began."""
        cache, mask = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
        masked = getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[1]
        if cache is not None and masked == input_ids.shape[1] <= cache.get_seq_length():
            cache.begin_prompt()
        return super()._prefill(input_ids, generation_config, model_kwargs, **kwargs)  # type: ignore[misc]
