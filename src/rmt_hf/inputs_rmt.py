"""What is refused before a call changes anything, in words that say what to do; and what is made of masks and padding.

Shapes: B rows, T columns of a call, E hidden size.
"""

from typing import Any, cast

import torch
from torch import nn

from .cache_rmt import RMTCache, check_fingerprint, state_fingerprint
from .configuration_rmt import RMTConfig


def check_ids(input_ids: torch.Tensor, vocab_size: int) -> None:
    """Refuses token ids that have no embedding."""
    check_axes("input_ids", input_ids, ("batch", "columns"))
    if input_ids.is_meta:
        return
    lowest, highest = int(input_ids.min()), int(input_ids.max())
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(
            f"input_ids must lie in 0 .. {vocab_size - 1}, got {lowest} .. {highest}: is it the model's own tokenizer? "
            "If tokens were added, call model.resize_token_embeddings(len(tokenizer))."
        )


def check_axes(name: str, given: torch.Tensor, axes: tuple[str, ...]) -> None:
    """Refuses inputs with other axes than these, or with nothing in them."""
    if given.dim() != len(axes) or 0 in given.shape:
        raise ValueError(
            f"{name} must have {len(axes)} axes, ({', '.join(axes)}), none of them empty; got shape "
            f"{tuple(given.shape)}. (`generate` with past_key_values wants all columns since the state began, not only "
            "the new ones.)"
        )


def refuse_reentrant_checkpoints(layers: nn.ModuleList) -> None:
    """Refuses the kind of checkpoint that cuts the gradient through the state without a word."""
    functions = [layer._gradient_checkpointing_func for layer in layers if layer.gradient_checkpointing]
    if any(getattr(function, "keywords", {}).get("use_reentrant", True) for function in functions):
        raise ValueError(
            "Gradient checkpointing with use_reentrant=True cuts the gradient through past_key_values: enable it with "
            "use_reentrant=False, or pass no past_key_values."
        )


def check_cache_type(cache: object) -> None:
    """Refuses caches of other models; by what it has, as the class from a Hub folder is not that of the package."""
    if not hasattr(cache, "fingerprint"):
        raise TypeError(
            f"past_key_values must be an RMTCache, got {type(cache).__name__}: pass RMTCache(model.config), or "
            "use_cache=True and the state that the first call returns. (Prefix tuning brings its own: it cannot work.)"
        )


def stream_starts(cache: RMTCache | None, config: RMTConfig, batch_size: int) -> list[int]:
    """Stream position of each row, after checking that the state is one of this model and this batch."""
    if cache is None:
        return [0] * batch_size
    check_fingerprint(cache.fingerprint, state_fingerprint(config))
    if cache.positions and len(cache.positions) != batch_size:
        raise ValueError(
            f"past_key_values holds {len(cache.positions)} streams, the input has {batch_size} rows: give one row per "
            "stream, or use the state's batch_select_indices or batch_repeat_interleave."
        )
    return cache.positions or [0] * batch_size


def real_columns(
    attention_mask: torch.Tensor | None, cache: RMTCache | None, batch_size: int, num_columns: int
) -> torch.Tensor | None:
    """(B, T) bool of this call's columns, None if no column is padding."""
    if attention_mask is None:
        return None
    past = cache.num_columns if cache is not None else 0
    shapes = {(batch_size, num_columns), (batch_size, past + num_columns)}
    if not isinstance(attention_mask, torch.Tensor) or tuple(attention_mask.shape) not in shapes:
        got = tuple(attention_mask.shape) if isinstance(attention_mask, torch.Tensor) else type(attention_mask).__name__
        raise ValueError(
            f"attention_mask must be a tensor of shape {' or '.join(map(str, sorted(shapes)))}, 1 at real tokens and 0 "
            f"at padding; got {got}."
        )
    is_real = attention_mask[:, -num_columns:] != 0
    return None if is_real.all() else is_real


def clear_padding(inputs_embeds: torch.Tensor, is_real: torch.Tensor | None, check: bool) -> torch.Tensor:
    """Embeddings (B, T, E) with zeros at padding, which need not even be finite; the rest must be, if `check`."""
    if is_real is not None:
        inputs_embeds = inputs_embeds.masked_fill(~is_real[..., None], 0)
    if check and not inputs_embeds.is_meta and not inputs_embeds.isfinite().all():
        raise ValueError("inputs_embeds must be finite, got NaN or infinity: check what produced them.")
    return inputs_embeds


def embed(
    embed_tokens: Any, hidden_size: int, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None
) -> torch.Tensor:
    """Embeddings of checked inputs, (B, T, E); ValueError if they are not what they should be."""
    if (input_ids is None) == (inputs_embeds is None):
        got = "neither" if input_ids is None else "both"
        raise ValueError(f"Exactly one of input_ids and inputs_embeds is wanted, got {got}: give one of them.")
    if inputs_embeds is not None:
        check_axes("inputs_embeds", inputs_embeds, ("batch", "columns", "hidden_size"))
        if inputs_embeds.shape[2] != hidden_size:
            raise ValueError(f"inputs_embeds must be hidden_size ({hidden_size}) wide, got {inputs_embeds.shape[2]}.")
        return inputs_embeds
    ids = cast(torch.Tensor, input_ids)
    check_axes("input_ids", ids, ("batch", "columns"))
    # A CPU refuses such ids itself. Elsewhere looking at them means waiting, which decoding should not do.
    if ids.device.type != "cpu" and ids.shape[1] > 1:
        check_ids(ids, embed_tokens.num_embeddings)
    try:
        return embed_tokens(ids)
    except IndexError:
        check_ids(ids, embed_tokens.num_embeddings)
        raise


def check_labels(labels: torch.Tensor | None, inputs: torch.Tensor | None) -> None:
    """Refuses labels of another shape before the call changes the state, and not after it."""
    if labels is not None and inputs is not None and labels.shape != inputs.shape[:2]:
        raise ValueError(
            f"labels must have the shape of the input, {tuple(inputs.shape[:2])}, got {tuple(labels.shape)}: give one "
            "label for each column of the call, not shifted, -100 where none is wanted."
        )


def check_processes(distributed_config: Any, config: RMTConfig) -> None:
    """Refuses processes that a model cannot be shared out over.

    Args:
        distributed_config: `transformers.distributed.DistributedConfig`, or None.
        config: Of the model.

    Raises:
        ValueError: If key/value heads cannot be dealt out evenly, or a pipeline has more stages than layers.
    """
    tp_size, pp_size = (getattr(distributed_config, name, None) or 1 for name in ("tp_size", "pp_size"))
    num_heads, _ = config.key_value_shape
    if num_heads % tp_size:
        raise ValueError(
            f"tp_size must divide num_key_value_heads ({num_heads}), got {tp_size}: memory belongs to a head and "
            "cannot be split any further. Use fewer processes, or fsdp_size."
        )
    if pp_size > config.num_hidden_layers:
        raise ValueError(
            f"pp_size must be at most num_hidden_layers ({config.num_hidden_layers}), got {pp_size}: every stage of a "
            "pipeline needs a layer. Use fewer processes."
        )
