"""Tiny models in which every part matters, for the tests of what is built on the model."""

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from rmt_hf import RMTCache, RMTConfig, RMTForCausalLM


# Of any model with rotary attention.
SIZES = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


# Forms of the model that differ in every field that the state depends on, with rings of four groups, two and one.
FORMS: dict[str, dict] = {
    "gated select": {},
    "two parts": {"num_lasting_slots": 4, "use_attention_sink": True, "use_local_attention": False},
    "present": {"num_lasting_slots": 0, "num_slots_per_chunk": 2, "num_observing_tokens": 8, "num_key_value_heads": 4},
    "lasting": {"num_memory_slots": 2, "num_lasting_slots": 2, "use_local_attention": False, "fusion_type": "softmax"},
    "paper": {"fusion_type": "softmax", "memory_write": "mean", "num_lookback_segments": 0},
    "mean": {"memory_write": "mean", "num_slots_per_chunk": 2, "num_lookback_segments": 2, "use_qk_norm": True},
    "no memory": {"num_memory_slots": 0},
    "sink": {"use_attention_sink": True, "num_memory_slots": 2, "num_key_value_heads": 1},
}


def tiny_config(**overrides) -> RMTConfig:
    """Chunks of 4, segments of 8, a window of two segments, one ring of four groups; 0 pads."""
    fields = {
        **SIZES,
        "chunk_length": 4,
        "segment_length": 8,
        "num_memory_slots": 8,
        "num_observing_tokens": 3,
        "use_qk_norm": False,  # where it is on, tests say so
    }
    return RMTConfig(**(fields | overrides))


def tiny_model(model_class=RMTForCausalLM, dtype: torch.dtype = torch.float64, seed: int = 0, **overrides):
    """A model in eval mode whose parameters are all random and so large that no path, gate or bias is negligible."""
    model = model_class(tiny_config(**overrides)).to(torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(parameter + 0.3 * noise if parameter.dim() == 1 else noise * parameter.shape[-1] ** -0.5)
    return model.to(dtype).eval()


def tiny_ids(num_rows: int, num_columns: int, seed: int = 0) -> torch.Tensor:
    """Token ids (B, T) that are neither padding nor end of text."""
    return torch.randint(3, 67, (num_rows, num_columns), generator=torch.Generator().manual_seed(seed))


def read(
    model, ids: torch.Tensor, cuts: Sequence[int] = (), cache: RMTCache | None = None, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, RMTCache]:
    """Logits (B, T, V) of columns read in calls of these sizes and one for the rest, and the state after them."""
    cache, logits, start = RMTCache(model.config) if cache is None else cache, [], 0
    for size in filter(None, [*cuts, ids.shape[1] - sum(cuts)]):
        columns = slice(start, start + size)
        own_mask = None if mask is None else mask[:, columns]
        logits.append(model(ids[:, columns], attention_mask=own_mask, past_key_values=cache).logits)
        start += size
    return torch.cat(logits, 1), cache


def segments_alone(states: torch.Tensor, config: RMTConfig) -> torch.Tensor:
    """Keys or values of a state, (B, G, columns, D), without the columns of the prefix."""
    before, _, after = states.split([config.segment_length, config.prefix_length, config.window_length], 2)
    return torch.cat([before, after], 2)


def pad_left(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """One-dimensional prompts as a left-padded batch: input_ids and attention_mask."""
    longest = max(len(row) for row in rows)
    missing = [longest - len(row) for row in rows]
    input_ids = torch.stack([torch.cat([row.new_zeros(n), row]) for n, row in zip(missing, rows, strict=True)])
    return {"input_ids": input_ids, "attention_mask": torch.arange(longest) >= torch.tensor(missing)[:, None]}


def tiny_tokenizer(padding_side: str = "left") -> PreTrainedTokenizerFast:
    """The words w3 to w66, between blanks, and three special ones."""
    words = ["<pad>", "<s>", "</s>", *(f"w{number}" for number in range(3, 67))]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side=padding_side, **special)
