"""The models that a user would pick instead of ours, of equal size and read through one function.

Six are transformers' own code; the recurrence that the literature compares with, memory tokens, is in memory_tokens.py.
All have our vocabulary, width and number of parameters, and are called as `model(input_ids=..., labels=...)`.

Shapes: B rows, T tokens of a call, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)
from transformers.models.llama4 import Llama4ForCausalLM, Llama4TextConfig

from experiments.eviction import EvictionForCausalLM, EvictionState
from experiments.memory_tokens import MemoryTokensConfig, MemoryTokensForCausalLM, MemoryTokensState
from rmt_hf import RMTCache, RMTConfig, RMTForCausalLM


SLIDING = ("mistral", "qwen3_window")  # baselines whose every layer has a sliding window
LEAST_STATE_SIZE = 64  # of Mamba2: half of what its authors take at widths from 768 on
TOLERANCE = 0.02  # of the number of parameters


class ParameterCount(NamedTuple):
    """Parameters of a model, tied ones once."""

    embedding: int
    non_embedding: int


def num_parameters(model: PreTrainedModel) -> ParameterCount:
    """Counts parameters; those of the input embedding and the vocabulary projection apart.

    Args:
        model: Any language model; also one on the meta device.
    """
    heads = (model.get_input_embeddings(), model.get_output_embeddings())
    of_heads = {id(parameter): parameter.numel() for head in heads for parameter in cast(nn.Module, head).parameters()}
    embedding = sum(of_heads.values())
    return ParameterCount(embedding, sum(parameter.numel() for parameter in model.parameters()) - embedding)


class _Baseline(NamedTuple):
    model_class: type[PreTrainedModel]
    config_class: type[PreTrainedConfig]
    free_field: str  # the number that is chosen so that sizes agree


BASELINES = {
    "llama": _Baseline(LlamaForCausalLM, LlamaConfig, "intermediate_size"),
    "mistral": _Baseline(MistralForCausalLM, MistralConfig, "intermediate_size"),
    "mamba2": _Baseline(Mamba2ForCausalLM, Mamba2Config, "state_size"),
    "memory_tokens": _Baseline(MemoryTokensForCausalLM, MemoryTokensConfig, "intermediate_size"),
    "llama4": _Baseline(Llama4ForCausalLM, Llama4TextConfig, "intermediate_size_mlp"),
    "recurrent_gemma": _Baseline(RecurrentGemmaForCausalLM, RecurrentGemmaConfig, "intermediate_size"),
    "qwen3": _Baseline(Qwen3ForCausalLM, Qwen3Config, "intermediate_size"),
    "qwen3_window": _Baseline(Qwen3ForCausalLM, Qwen3Config, "intermediate_size"),
    "qwen3_next": _Baseline(Qwen3NextForCausalLM, Qwen3NextConfig, "intermediate_size"),
}


def build_baseline(
    name: str,
    config: RMTConfig,
    *,
    window_length: int | None = None,
    num_memory_tokens: int | None = None,
    equal_state: bool = False,
) -> PreTrainedModel:
    """A baseline with as many non-embedding parameters as ours, to 2 %, and random weights.

    Every field that its configuration shares with ours has our value: vocabulary, width, layers, heads, tied or untied
    embeddings, rotary base and so on. One number, in brackets, is chosen so that the sizes agree; the rest:

    - `llama`: full attention (`intermediate_size`).
    - `mistral`: a sliding window of `window_length` tokens (`intermediate_size`).
    - `mamba2`: width expanded by 2, heads of our width, one group, chunks of 64, output projections scaled down at the
      start as its authors do. At most two layers for each of ours; the most that leave a state size of 64 or more
      (`state_size`).
    - `memory_tokens`: segments of `window_length` tokens (`intermediate_size`).
    - `llama4`: dense; chunks of `window_length` tokens, and in every fourth layer full attention without positions, as
      published (`intermediate_size_mlp`).
    - `recurrent_gemma`: two recurrent layers, or one if ours has two in all, then attention with a window of
      `window_length`; its own initial weights and activation (`intermediate_size`).
    - `qwen3`: what Llama is with query/key norm (`intermediate_size`).
    - `qwen3_window`: the same with a sliding window of `window_length` tokens (`intermediate_size`).
    - `qwen3_next`: dense; gated delta rule with our heads, and full attention in every fourth layer, or in the last one
      if ours has fewer (`intermediate_size`).

    If ours has a single layer, attention is all that is left of the last two.

    Args:
        name: One of `BASELINES`.
        config: Configuration of our model.
        window_length: Tokens that attention sees at most, or tokens of a segment; at least 2; defaults to
            `config.window_length`. `llama`, `qwen3`, `mamba2` and `qwen3_next` have none.
        num_memory_tokens: Of `memory_tokens`; at least 1; defaults to `config.num_memory_slots`.
        equal_state: Whether `mistral` or `qwen3_window` gets the smallest window, instead of `window_length`, and
            `mamba2` the most layers, with which a long stream has as many state bytes as ours, or more.

    Returns:
        The model in train mode, on torch's default device and in its default dtype.

    Raises:
        ValueError: If the name is unknown, an argument breaks its rule, or no such baseline has our size.
    """
    if name not in BASELINES:
        raise ValueError(f"name must be one of {', '.join(BASELINES)}, got {name!r}.")
    if equal_state and name not in (*SLIDING, "mamba2"):
        allowed = " and ".join([", ".join(SLIDING), "mamba2"])
        raise ValueError(f"equal_state is for {allowed}, got {name!r}: choose its window_length instead.")
    window_length = config.window_length if window_length is None else window_length
    if window_length < 2:
        raise ValueError(f"window_length must be at least 2, got {window_length}.")
    ours = _on_meta(RMTForCausalLM, config)
    least_bytes = state_bytes(ours, 1, 1) if equal_state else 0
    if name in SLIDING and equal_state:
        smallest = _on_meta(BASELINES[name].model_class, _baseline_config(name, config, 1, window_length=2))
        token_bytes = state_bytes(smallest, 1, 1)
        window_length = 1 - -least_bytes // token_bytes  # the cache holds one token less than attention sees
    target = num_parameters(ours).non_embedding
    if name == "mamba2":
        baseline_config = _fit_mamba2(config, target, least_bytes)
    else:
        baseline_config = _fit(name, config, target, window_length=window_length, num_memory_tokens=num_memory_tokens)
    model_class = BASELINES[name].model_class
    found = num_parameters(_on_meta(model_class, baseline_config)).non_embedding
    if abs(found / target - 1) > TOLERANCE:
        raise ValueError(
            f"No {name} of width {config.hidden_size} has about {target} non-embedding parameters: the nearest has "
            f"{found}. Give ours a larger intermediate_size."
        )
    return model_class(baseline_config)


def _on_meta(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model without memory for its weights, to be counted."""
    with torch.device("meta"):
        return model_class(config)


def _baseline_config(name: str, config: RMTConfig, size: int, **options: Any) -> PreTrainedConfig:
    """Configuration of a baseline whose free number is `size`; `options` are those of `_own_fields`."""
    _, config_class, free_field = BASELINES[name]
    shared = {field: getattr(config, field) for field in RMTConfig.__annotations__ if hasattr(config_class, field)}
    shared |= {"rope_parameters": dict(shared["rope_parameters"])} if "rope_parameters" in shared else {}
    return config_class(**(shared | _own_fields(name, config, **options) | {free_field: size}))


def _own_fields(
    name: str, config: RMTConfig, window_length: int = 0, num_memory_tokens: int | None = None, num_layers: int = 0
) -> dict[str, Any]:
    """Fields of a baseline that our configuration does not give."""
    if name == "mistral":
        return {"sliding_window": window_length}
    if name == "qwen3_window":
        return {"use_sliding_window": True, "sliding_window": window_length, "max_window_layers": 0}
    if name == "mamba2":
        num_heads = 2 * config.hidden_size // config.key_value_shape[1]
        form = {"expand": 2, "n_groups": 1, "chunk_size": 64, "rescale_prenorm_residual": True}
        return {"num_hidden_layers": num_layers, "num_heads": num_heads, **form}
    if name == "memory_tokens":
        num_memory_tokens = config.num_memory_slots if num_memory_tokens is None else num_memory_tokens
        return {"segment_length": window_length, "num_memory_tokens": num_memory_tokens}
    if name == "llama4":
        return {"attention_chunk_size": window_length, "moe_layers": []}
    if name == "recurrent_gemma":
        recurrent = ["recurrent"] * min(2, config.num_hidden_layers - 1)
        return {"attention_window_size": window_length, "block_types": [*recurrent, "attention"]}
    if name == "qwen3_next":
        linear = {"linear_num_key_heads": config.num_attention_heads, "linear_key_head_dim": config.head_dim}
        linear |= {"linear_num_value_heads": config.num_attention_heads, "linear_value_head_dim": config.head_dim}
        return {**linear, "num_experts": 0, "full_attention_interval": min(4, config.num_hidden_layers)}
    return {}


def _fit(name: str, config: RMTConfig, target: int, **options: Any) -> PreTrainedConfig:
    """The configuration with the nearest number of parameters, which is linear in the free number."""
    model_class = BASELINES[name].model_class
    two, four = (
        num_parameters(_on_meta(model_class, _baseline_config(name, config, size, **options))).non_embedding
        for size in (2, 4)
    )
    size = 2 + round((target - two) / ((four - two) / 2))
    return _baseline_config(name, config, max(1, size), **options)


def _fit_mamba2(config: RMTConfig, target: int, least_bytes: int) -> PreTrainedConfig:
    """The most layers, and at least one, that leave a state as large as asked for."""
    for num_layers in range(2 * config.num_hidden_layers, 0, -1):
        baseline_config = _fit("mamba2", config, target, num_layers=num_layers)
        layer = _baseline_config("mamba2", config, baseline_config.state_size, num_layers=1)
        if baseline_config.state_size < LEAST_STATE_SIZE and num_layers > 1:
            continue
        if not least_bytes or num_layers * state_bytes(_on_meta(Mamba2ForCausalLM, layer), 1, 1) >= least_bytes:
            return baseline_config
    raise ValueError(
        f"No mamba2 of {target} non-embedding parameters has {least_bytes} bytes of state: give ours a smaller window "
        "or a larger intermediate_size."
    )


def new_state(model: PreTrainedModel) -> Any:
    """An empty state for `read`: what is carried from one call to the next.

    Args:
        model: Ours or a baseline. RecurrentGemma keeps a part of its state inside the model, so a new state ends the
            stream that was read before.

    Returns:
        An `RMTCache`, a `MemoryTokensState`, an `EvictionState`, or a `DynamicCache`.
    """
    if isinstance(model, RMTForCausalLM):
        return RMTCache(model.config)
    if isinstance(model, MemoryTokensForCausalLM):
        return MemoryTokensState()
    if isinstance(model, EvictionForCausalLM):
        return EvictionState(model.config.num_hidden_layers)
    for block in _recurrent_blocks(model):
        block.conv1d_state = None  # makes it set both of its tensors anew
    return DynamicCache(config=model.config)


@torch.no_grad()
def read(
    model: PreTrainedModel, input_ids: torch.Tensor, state: Any = None, logits_to_keep: int = 1
) -> tuple[torch.Tensor, Any]:
    """Reads the next tokens of a stream, without gradient.

    Args:
        model: Ours or a baseline. RecurrentGemma reads more than one token in the first call of a stream only.
        input_ids: (B, T) token ids, int64; no padding.
        state: From `new_state` or an earlier call, changed in place; None begins a stream.
        logits_to_keep: Last positions to project, 0 for all.

    Returns:
        Logits (B, T or `logits_to_keep`, V) and the state.
    """
    state = new_state(model) if state is None else state
    state_name = "cache_params" if isinstance(model, Mamba2ForCausalLM) else "past_key_values"
    outputs = model(input_ids=input_ids, use_cache=True, logits_to_keep=logits_to_keep, **{state_name: state})
    return outputs.logits, state


def state_tensors(model: PreTrainedModel, state: Any) -> list[torch.Tensor]:
    """The tensors that a state is made of, keys and values first for each layer that has them.

    Args:
        model: The model that read with it.
        state: What `read` returned.
    """
    if isinstance(state, RMTCache):
        return state.tensors()
    if isinstance(state, MemoryTokensState):
        cached = [] if state.cache is None else state_tensors(model, state.cache)
        return [cast(torch.Tensor, state.memory), *cached]
    tensors: list[torch.Tensor | None] = []
    for layer in state.layers:
        tensors += [getattr(layer, name, None) for name in ("keys", "values")]
        for name in ("conv_states", "recurrent_states"):
            tensors += getattr(layer, name, {}).values()
    for block in _recurrent_blocks(model):
        tensors += [block.conv1d_state, block.rg_lru.recurrent_states]
    return [tensor for tensor in tensors if tensor is not None]


def state_bytes(model: PreTrainedModel, batch_size: int, position: int) -> int:
    """Bytes that are carried when so many tokens of each stream have been read.

    Computed from the state after one token. With memory tokens the figure rises within a segment and falls at its end;
    the most is one token before.

    Args:
        model: Ours or a baseline; also one on the meta device.
        batch_size: Number of streams; at least 1.
        position: Tokens read of each; at least 1.

    Raises:
        ValueError: If one of the numbers is below 1.
    """
    if min(batch_size, position) < 1:
        raise ValueError(f"batch_size and position must be at least 1, got {batch_size} and {position}.")
    _, state = read(model, torch.zeros(batch_size, 1, dtype=torch.long, device=model.device))
    tensors = state_tensors(model, state)
    if isinstance(state, MemoryTokensState):
        memory, *keys_and_values = tensors
        begun = position % model.config.segment_length
        num_tokens = model.config.num_memory_tokens + begun if begun else 0
        return memory.nbytes + num_tokens * sum(tensor[:, :, :1].nbytes for tensor in keys_and_values)
    carried = sum(tensor.nbytes for tensor in tensors)
    for layer in [] if isinstance(state, RMTCache) else state.layers:
        if getattr(layer, "keys", None) is not None:
            num_tokens = min(position, layer.sliding_window - 1) if layer.is_sliding else position
            carried += (num_tokens - 1) * (layer.keys.nbytes + layer.values.nbytes)
    return carried


def _recurrent_blocks(model: PreTrainedModel) -> Iterator[Any]:
    """The modules of RecurrentGemma that carry state themselves; none in another model."""
    if isinstance(model, RecurrentGemmaForCausalLM):
        for layer in model.model.layers:
            if hasattr(layer.temporal_block, "rg_lru"):
                yield layer.temporal_block
