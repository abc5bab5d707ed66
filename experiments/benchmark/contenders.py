"""What the benchmark compares, and how each of them is brought to a context without reading for hours.

Shapes: B rows, T tokens of a call.
"""

from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, StaticCache

from experiments.baselines import BASELINES, build_baseline, read
from experiments.memory_tokens import MemoryTokensForCausalLM
from rmt_hf import RMTCache, RMTConfig, RMTForCausalLM
from rmt_hf.modeling_rmt import MEMORIZE_TOKENS


PHASES = ("train", "prefill", "decode")
FIRST_TOKENS = 8  # read before a cache is filled up with random numbers: they make its tensors
BLOCK_TOKENS = 256  # random keys that fill a cache, again and again


class Contender(NamedTuple):
    """A model and a way of running it.

    Args:
        model: "rmt", a name in `BASELINES`, or the folder of a saved causal language model.
        phases: Those of `PHASES` that it takes part in.
        is_bounded: Whether its state stops growing, so that contexts without end are possible.
        takes_turns: Whether states of several contexts can be decoded from in turns.
        has_static_cache: Whether it decodes with a `StaticCache` as long as it needs.
        is_compiled: Whether its forward pass is compiled.
        has_chunked_loss: Whether ours computes its loss without logits that exist all at once.
    """

    model: str
    phases: tuple[str, ...] = PHASES
    is_bounded: bool = False
    takes_turns: bool = False
    has_static_cache: bool = False
    is_compiled: bool = False
    has_chunked_loss: bool = False


CONTENDERS = {
    "ours": Contender("rmt", is_bounded=True, takes_turns=True, has_chunked_loss=True),
    "ours_all_logits": Contender("rmt", ("train",), is_bounded=True),
    "ours_compiled": Contender("rmt", ("decode",), is_bounded=True, takes_turns=True, is_compiled=True),
    "llama": Contender("llama"),
    "llama_static": Contender("llama", ("decode",), has_static_cache=True),
    "llama_static_compiled": Contender("llama", ("decode",), has_static_cache=True, is_compiled=True),
    "qwen3": Contender("qwen3"),  # what Llama is with the query/key norms that ours has by default
    "mistral": Contender("mistral", is_bounded=True, takes_turns=True),
    "llama4": Contender("llama4"),
    "mamba2": Contender("mamba2", is_bounded=True, takes_turns=True),
    "recurrent_gemma": Contender("recurrent_gemma", is_bounded=True),  # carries a part of its state inside the model
    "qwen3_next": Contender("qwen3_next"),
    "memory_tokens": Contender("memory_tokens", is_bounded=True, takes_turns=True),
}


def build(contender: Contender, config: dict[str, Any]) -> PreTrainedModel:
    """The model of a contender, in eval mode, with random weights unless it comes from a folder.

    Args:
        contender: What to build.
        config: Fields of our configuration; baselines get as many parameters as it gives.

    Raises:
        ValueError: If the model is neither "rmt", nor a name in `BASELINES`, nor a folder.
    """
    torch.manual_seed(0)
    if contender.model == "rmt":
        return RMTForCausalLM(RMTConfig(**config, use_chunked_loss=contender.has_chunked_loss)).eval()
    if contender.model in BASELINES:
        return build_baseline(contender.model, RMTConfig(**config)).eval()
    if not Path(contender.model).is_dir():
        raise ValueError(
            f"model must be a name of a baseline or a folder, got {contender.model!r}: save the model first."
        )
    return AutoModelForCausalLM.from_pretrained(contender.model).eval()


def random_ids(model: PreTrainedModel, num_rows: int, num_tokens: int) -> torch.Tensor:
    """Token ids (B, T), int64."""
    return torch.randint(0, model.config.vocab_size, (num_rows, num_tokens))


def read_prompt(model: PreTrainedModel, input_ids: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Reads a prompt and projects its last token alone, as the first step of `generate` does.

    Ours and memory tokens read in slices, as `memorize` does, with the same result; all others in one call.

    Args:
        model: Any contender's.
        input_ids: (B, T) token ids.

    Returns:
        Logits (B, 1, V) and the state after the last token.
    """
    num_rows, size = input_ids.shape
    if isinstance(model, RMTForCausalLM | MemoryTokensForCausalLM):
        size = max(1, MEMORIZE_TOKENS // num_rows // model.config.segment_length) * model.config.segment_length
    first, *others = input_ids.split(size, 1)
    logits, state = read(model, first)
    for part in others:
        logits, state = read(model, part, state)
    return logits, state


def full_context(config: RMTConfig) -> int:
    """Tokens after which our window and all memory slots are filled: what a token costs changes no more."""
    writes = [size // config.num_slots_per_segment for size, *_ in config.memory_parts]
    return config.window_length + max(writes, default=0) * config.segment_length


def filling_length(config: RMTConfig, context: int) -> int:
    """Tokens that ours reads to stand where `context` tokens would take it, but for its clock."""
    full = full_context(config)
    return context if context <= full else full + (context - full) % config.segment_length


def state_at(model: PreTrainedModel, context: int, num_rows: int, num_free_tokens: int | None = None) -> Any:
    """A state from which a token costs what it costs after reading `context` tokens, without reading them.

    What a token costs does not depend on what was read. Of ours, window and memory are filled by reading and the clock
    is set on; memory tokens begin every segment anew; caches are filled with random numbers; the state of a recurrent
    layer has its size from the first token on.

    Args:
        model: Any contender's.
        context: Tokens that each row has behind it; at least 1.
        num_rows: Number of rows.
        num_free_tokens: Tokens that a `StaticCache` has room left for decoding; None for the model's own state.
    """
    if isinstance(model, RMTForCausalLM):
        input_ids = random_ids(model, num_rows, filling_length(model.config, context))
        return set_clock(model.memorize(cast(torch.LongTensor, input_ids)), context)
    if isinstance(model, MemoryTokensForCausalLM):
        segment = model.config.segment_length
        length = context if context <= segment else segment + context % segment
        return read(model, random_ids(model, num_rows, length))[1]
    state = None
    if num_free_tokens is not None:
        state = StaticCache(config=model.config, max_cache_len=context + num_free_tokens)
    num_read = min(FIRST_TOKENS, context)
    _, state = read(model, random_ids(model, num_rows, num_read), state)
    for layer in state.layers:
        if getattr(layer, "keys", None) is not None and context > num_read:
            fill_layer(layer, context - num_read)
    return state


def fill_layer(layer: Any, num_tokens: int) -> None:
    """Makes a layer of a cache as if so many more tokens had been read; of a window only what it keeps is made."""
    is_window = layer.is_sliding and num_tokens > layer.sliding_window
    kept = layer.sliding_window if is_window else num_tokens
    layer.update(*(random_keys(tensor, kept) for tensor in (layer.keys, layer.values)))
    if is_window:
        layer.cumulative_length += num_tokens - kept


def set_clock(state: RMTCache, position: int) -> RMTCache:
    """Sets a state of ours to another position of its streams, at the same position within a segment."""
    state.positions = [position] * state.batch_size
    return state


def random_keys(like: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Random keys or values (B, heads, T, width) with the shape of others but for T."""
    num_rows, num_heads, _, width = like.shape
    block = torch.randn(num_rows, num_heads, min(BLOCK_TOKENS, num_tokens), width, dtype=like.dtype)
    return block.repeat(1, 1, -(-num_tokens // BLOCK_TOKENS), 1)[:, :, :num_tokens]
