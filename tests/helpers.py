"""What tests share: tiny models in which every part matters, the folder of the project, scripts in two processes."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rmt_hf import RMTCache, RMTConfig, RMTForCausalLM
from rmt_hf.layout_rmt import visible_columns


ROOT = Path(__file__).parent.parent

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
    "two parts": {
        "num_lasting_slots": 4,
        "lasting_distance": 5,
        "use_attention_sink": True,
        "use_local_attention": False,
    },
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


# Scripts in two processes

TORCHRUN = ("torch.distributed.run", "--nproc_per_node=2", "--master_port={port}")
# `--cpu` starts one process only. Without it two start, and the script says that they are to use the CPU.
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port={port}")


def run_in_two(script: str, folder: Path, launcher: tuple[str, ...] = TORCHRUN, **environment: str) -> Any:
    """What the script has written to results.json in the folder, which is its only argument."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [option.format(port=port) for option in launcher]
    paths = os.pathsep.join(["src", "tests", os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", *launch, script, str(folder)],
        env=os.environ | {"PYTHONPATH": paths} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "results.json").read_text("utf-8"))


# States

C, S = 4, 8  # chunk and segment of tiny_config

every_form = pytest.mark.parametrize("form", FORMS)

# Float64 sums of some 100 terms taken in another order: values up to 10 agree to 1e-11.
CLOSE = {"rtol": 0, "atol": 1e-11}


LENGTH = 61  # seven whole segments and a bit: every ring has turned


def row_state(cache: RMTCache, config, row: int, with_prefix: bool = True) -> list[torch.Tensor]:
    """What the state of a row means: the live columns of its segments, its memory, and the prefix made of that."""
    segment, prefix = config.segment_length, config.prefix_length
    position, lookback = cache.positions[row], config.num_lookback_segments
    first = (position // segment - lookback - 1) * segment  # stream position of the first column of the segments
    live = slice(max(0, -first), position - first)
    num_written = torch.tensor(max(0, position // segment - lookback))
    visible = slice(segment + prefix - int(visible_columns(config, num_written)), segment + prefix)
    meaning = []
    for layer in cache.layers:
        length = layer.state.queries.shape[2] // 2  # of the last tokens of two segments
        asked = slice(0 if position >= segment else length, length + max(0, position % segment - segment + length))
        meaning += [segments_alone(states, config)[row, :, live] for states in layer.state[:2]]
        meaning += [layer.state.scores[row, live], layer.state.queries[row, :, asked]]
        meaning += [states[row, :, visible] for states in layer.state[:2] if with_prefix]
        meaning += [tensor[row] for memory in layer.state[4:] for tensor in memory]
    return meaning


def assert_same_row(cache: RMTCache, row: int, expected: RMTCache, expected_row: int, config, **tolerance) -> None:
    assert cache.positions[row] == expected.positions[expected_row]
    assert cache.history[row, 0] == expected.history[expected_row, 0]  # of the ids
    both_fresh = not (cache.is_stale or expected.is_stale)
    states = (row_state(*which, both_fresh) for which in ((cache, config, row), (expected, config, expected_row)))
    for got, want in zip(*states, strict=True):
        torch.testing.assert_close(got, want, **(tolerance or CLOSE))


def assert_same_rows(cache: RMTCache, expected: RMTCache, config, rows=None, **tolerance) -> None:
    """Row i of `cache` is row `rows[i]` of `expected` (the same one if left out)."""
    rows = range(expected.batch_size) if rows is None else rows
    assert cache.batch_size == len(rows)
    for ours, theirs in enumerate(rows):
        assert_same_row(cache, ours, expected, theirs, config, **tolerance)


PROMPTS = (3, S, 2 * S + 5, S - 1, 5 * S + 1)  # the last one has memory to read


def prompts() -> list[torch.Tensor]:
    return [tiny_ids(1, length, seed=length)[0] for length in PROMPTS]


# Sources of conversion

SOURCE_SIZES = {
    **SIZES,
    **{"head_dim": 8, "initializer_range": 0.3, "max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2},
}

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

SOURCES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "llama with biases": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama 3": (
        LlamaForCausalLM,
        LlamaConfig,
        {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 32}, "hidden_act": "gelu"},
    ),
    "linear": (
        LlamaForCausalLM,
        LlamaConfig,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 16, "rms_norm_eps": 1e-5}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 10, "tie_word_embeddings": True}),
    "qwen3 with biases": (Qwen3ForCausalLM, Qwen3Config, {"attention_bias": True}),
}

WINDOW = 16  # of a converted model with these fields

FIELDS = {"segment_length": S}

LOCAL = {**FIELDS, "chunk_length": 4, "use_local_attention": True}


def make_source(name: str, dtype: torch.dtype = torch.float64, **fields):
    """A tiny model with random biases and norms, whose rotary tables and norms are as exact as the dtype is."""
    model_class, config_class, own = SOURCES[name]
    torch.manual_seed(0)
    model = model_class._from_config(config_class(**{**SOURCE_SIZES, **own, **fields}), attn_implementation="sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))

    def tables(self, x, position_ids):
        angles = position_ids[..., None].to(dtype) * self.inv_freq.to(dtype)
        return torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()

    def norm(self, states):
        return self.weight * states * (states.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    model.model.rotary_emb.forward = MethodType(tables, model.model.rotary_emb)
    for module in model.modules() if dtype == torch.float64 else ():  # theirs knows float32 only
        if hasattr(module, "variance_epsilon"):
            module.forward = MethodType(norm, module)
    return model.to(dtype).eval()


# A chat template of the tokenizer's own words

TEMPLATE = (
    "{% for message in messages %}<s> {{ message['role'] == 'user' and 'w3' or 'w4' }} {{ message['content'] }}</s> "
    "{% endfor %}{% if add_generation_prompt %}<s> w4 {% endif %}"
)
