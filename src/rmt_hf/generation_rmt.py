"""Where `generate` meets the state: which cache it makes, what it gives the model again, and what is refused.

Decoding is inherited from `transformers.GenerationMixin`; here is only what a state of constant size needs.
"""

from contextlib import nullcontext
from itertools import accumulate
from typing import Any, NoReturn, cast

import torch
from transformers.generation import GenerationConfig, StoppingCriteriaList

from .cache_rmt import RMTCache, check_cache_type
from .configuration_rmt import RMTConfig
from .state_rmt import HASH_BASE, HASH_INVERSE, PADDING


class RMTGeneration:
    """What a language model puts before `GenerationMixin`."""

    config: RMTConfig

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As every model. A state that is given or returned has read all then, the last token too.

        Of `input_ids` a given state reads what it has not read: they may be all since it began, or what comes next
        alone. An error leaves it as it is.
        """
        state: Any = kwargs.get("past_key_values")
        is_assistant = getattr(kwargs.get("generation_config"), "is_assistant", False)
        with state.unchanged_on_error() if hasattr(state, "unchanged_on_error") else nullcontext():
            output = super().generate(*args, **kwargs)  # type: ignore[misc]
            sequences = output if torch.is_tensor(output) else output.sequences
            state = state if torch.is_tensor(output) else output.get("past_key_values")
            if state is not None and not is_assistant:
                real = None if state.stopped is None else (~state.stopped)[:, None].long()
                state.stopped = None
                self.memorize(sequences[:, -1:], attention_mask=real, past_key_values=state)  # type: ignore[attr-defined]
        return output

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
        if getattr(cache, "stopped", None) is not None:
            kwargs["attention_mask"] = (~cache.stopped)[:, None].long()
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)  # type: ignore[misc]
        inputs.pop("position_ids", None)
        return inputs

    def _assisted_decoding(self, input_ids: torch.LongTensor, *args: Any, **kwargs: Any) -> Any:
        """Lets assisted generation go on from a state as well; the inherited one gives it the whole prompt again."""
        cache: Any = kwargs.get("past_key_values")
        self._skip_what_was_read(input_ids, kwargs["generation_config"], kwargs)
        if cache is not None:
            cache.num_columns_to_skip = cache.get_seq_length()
        return super()._assisted_decoding(input_ids, *args, **kwargs)  # type: ignore[misc]

    def _sample(self, input_ids: torch.LongTensor, *args: Any, **kwargs: Any) -> Any:
        """Keeps the padding of rows that have stopped out of the state."""
        criteria, cache = kwargs["stopping_criteria"], kwargs.get("past_key_values")
        if cache is not None and len(input_ids) > 1 and any(hasattr(each, "eos_token_id") for each in criteria):
            kwargs["stopping_criteria"] = WatchedCriteria(criteria, cache)
        return super()._sample(input_ids, *args, **kwargs)  # type: ignore[misc]

    def _beam_search(self, input_ids: torch.LongTensor, *args: Any, **kwargs: Any) -> Any:
        """Lets the state go on with the sequences that are returned, and not with those that were tried last."""
        cache: Any = kwargs.get("past_key_values")
        settings, length = kwargs["generation_config"], input_ids.shape[1]
        self._skip_what_was_read(input_ids, settings, kwargs)
        is_kept = settings.return_dict_in_generate or getattr(cache, "_is_user_defined", False)
        before, mask = cache.clone() if cache is not None and is_kept else None, kwargs.get("attention_mask")
        output = super()._beam_search(input_ids, *args, **kwargs)  # type: ignore[misc]
        if before is not None:
            sequences = output if torch.is_tensor(output) else output.sequences
            rows = torch.arange(len(sequences)) // settings.num_return_sequences * settings.num_beams
            cache.go_back_to(before)
            if cache.is_initialized:
                cache.batch_select_indices(rows)
            prompt = torch.ones_like(input_ids) if mask is None else mask[:, -length:]
            real = torch.nn.functional.pad(prompt[rows], (0, sequences.shape[1] - length), value=1)
            if settings._eos_token_tensor is not None:
                ends = torch.isin(sequences[:, length:], settings._eos_token_tensor).long()
                real[:, length:] = ends.cumsum(1) == ends  # up to the first end, which is said, too
            first = before.get_seq_length() if mask is None or mask.shape[1] == length else 0
            self.memorize(sequences[:, first:-1], attention_mask=real[:, first:-1], past_key_values=cache)  # type: ignore[attr-defined]
            cache.stopped = real[:, -1] == 0
        return output

    def _prepare_attention_mask_for_generation(
        self, inputs_tensor: torch.Tensor, generation_config: GenerationConfig, *args: Any
    ) -> torch.Tensor:
        """All ones for a draft: it goes on with what the model wrote, in which the id of padding is a token."""
        if generation_config.is_assistant:
            return torch.ones(inputs_tensor.shape[:2], dtype=torch.long, device=inputs_tensor.device)
        return super()._prepare_attention_mask_for_generation(inputs_tensor, generation_config, *args)  # type: ignore[misc]

    # Who has this name is served in pages of keys and values, of which a state of constant size has none.
    init_continuous_batching = property()

    def continuous_batching_context_manager(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuses what `generate_batch` enters."""
        raise ValueError("This model has no continuous batching (generate_batch): give generate a left-padded batch.")

    def _prefill(self, input_ids: Any, generation_config: Any, model_kwargs: dict, **kwargs: Any) -> Any:
        """As every model, after what of the prompt has been read is found."""
        self._skip_what_was_read(input_ids, generation_config, model_kwargs)
        return super()._prefill(input_ids, generation_config, model_kwargs, **kwargs)  # type: ignore[misc]

    def _skip_what_was_read(self, input_ids: torch.Tensor, generation_config: Any, model_kwargs: dict) -> None:
        """Lets the state count the columns of the prompt that are not to be read again, and masks others like them."""
        cache, mask = model_kwargs.get("past_key_values"), cast(Any, model_kwargs.get("attention_mask"))
        if mask is not None and not mask[:, -1].all():
            raise ValueError(
                "attention_mask must be 1 in the last column, got a row that ends with padding, after which nothing "
                'can be said: pad on the left (tokenizer.padding_side = "left"), and leave out rows without tokens.'
            )
        if cache is None or generation_config.is_assistant or not cache.get_seq_length():
            return
        embeds = model_kwargs.get("inputs_embeds")
        length = input_ids.shape[1] if embeds is None else embeds.shape[1]
        is_alone = length < (getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[1])
        if embeds is not None:
            if not is_alone:
                rule = "inputs_embeds must be new to past_key_values, which cannot tell what it has read of them"
                raise ValueError(f"{rule}: give the new ones alone, after begin_prompt() on the state.")
            model_kwargs["attention_mask"] = None if mask is None else mask[:, -length:]
            cache.begin_prompt()
        elif not is_alone and len(input_ids) == cache.batch_size:  # others are refused by the call
            while not (unread := find_unread(cache, input_ids, mask)).any(1).all():
                cache.crop(-1)  # the last token is asked for what comes next
            cache.num_columns = int(unread.any(0).long().argmax())
            if not unread[:, cache.num_columns :].all():
                model_kwargs["attention_mask"] = unread.long()


class WatchedCriteria(StoppingCriteriaList):
    """Stopping criteria that tell the state for which rows the newest token is padding."""

    def __init__(self, criteria: StoppingCriteriaList, cache: RMTCache) -> None:
        super().__init__(criteria)
        self.cache, self.stopped = cache, None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        stops = super().__call__(input_ids, scores, **kwargs)
        self.cache.stopped, self.stopped = self.stopped, stops if self.stopped is None else self.stopped | stops
        return stops


def find_unread(cache: RMTCache, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Which columns of a prompt (B, T) the streams have not read, (B, T) bool.

    Ids that begin with all that a stream has read are new from there on, others from the first one on. ValueError if
    only some rows begin so, or if a row begins with most of what was read, and then differs.
    """
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.dtype)
    history = cast(torch.Tensor, cache.history).tolist()
    begins = [
        _begins_with_what_was_read(row, ids[is_real != 0].tolist(), history[row], cache.positions[row])
        for row, (ids, is_real) in enumerate(zip(input_ids, real, strict=True))
    ]
    read = [position * has_begun for position, has_begun in zip(cache.positions, begins, strict=True)]
    if any(begins) and begins != [position > 0 for position in cache.positions]:
        raise ValueError(
            "input_ids of some rows begin with what the state has read, those of others do not: give all rows from the "
            "beginning, or, after begin_prompt() on the state, the new tokens of all rows alone."
        )
    return (real != 0) & (real.cumsum(1) > torch.tensor(read, device=real.device)[:, None])


def _begins_with_what_was_read(row: int, ids: list[int], history: list[int], position: int) -> bool:
    hashes = list(accumulate(ids, lambda before, token: (before * HASH_BASE + token + 1) % 2**64, initial=0))
    known, recent = history[0], [token for token in history[1:] if token != PADDING]
    for common in range(position, position // 2, -1):
        if common < len(hashes) and hashes[common] == known % 2**64:
            if common == position:
                return True
            raise ValueError(
                f"input_ids of row {row} begin with {common} of the {position} tokens that the state has read, and "
                f"then end or differ. If they are all since it began, call crop({common - position}) on it first; if "
                "they come after what it has read, call begin_prompt() on it first."
            )
        if not recent:
            break
        known = (known - recent.pop() - 1) * HASH_INVERSE
    return False
