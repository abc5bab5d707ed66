"""Gives a pretrained Llama-like model a memory, without loss, and takes it away again.

    python -m rmt_hf.conversion SOURCE TARGET --segment-length 128 --num-memory-slots 256

A converted model computes what its source computes, as long as the input fits into the window. Beyond it, the source's
own attention sees three things: a begin-of-text token (the attention sink), slots that hold the keys and values of
earlier tokens, and the window. A slot keeps a token to which later ones attend; nothing needs training for that. A home
file: it does not travel with the weights.
"""

import argparse
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging

from . import RMTConfig, RMTForCausalLM
from .configuration_rmt import MEMORY_WRITES
from .evaluation import evaluation_mode
from .memory_rmt import RMTRing
from .report import write_whole


logger = logging.get_logger(__name__)

LAYER = "model.layers.*."
LLAMA = (
    *("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"),
    *(LAYER + f"{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm")),
    *(LAYER + f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    *(LAYER + f"self_attn.{name}_proj.weight" for name in "qkvo"),
)
MLP_BIAS = tuple(LAYER + f"mlp.{name}_proj.bias" for name in ("gate", "up", "down"))
INPUT_BIAS, OUTPUT_BIAS = (
    tuple(LAYER + f"self_attn.{name}_proj.bias" for name in "qkv"),
    LAYER + "self_attn.o_proj.bias",
)
QK_NORM = tuple(LAYER + f"self_attn.{name}_norm.weight" for name in "qk")

# The tensors of a source for each `model_type`, which have the same names in ours; a star is the number of the layer.
FAMILIES: dict[str, tuple[str, ...]] = {
    "llama": (*LLAMA, *MLP_BIAS, *INPUT_BIAS, OUTPUT_BIAS),
    "mistral": LLAMA,
    "qwen2": (*LLAMA, *INPUT_BIAS),
    "qwen3": (*LLAMA, *INPUT_BIAS, OUTPUT_BIAS, *QK_NORM),
}
SINK = (LAYER + "self_attn.sink.key", LAYER + "self_attn.sink.value")
# Gates of memory that keep the strongest tokens of a segment and of a group; a score that knows nothing; a local path
# of no share, behind a gate that is half open and learns faster for it.
BEGINNINGS = {
    LAYER + "self_attn.memory.rings.*.gate_scale": 8.0,
    LAYER + "self_attn.memory.rings.*.gate_bias": 0.0,
    LAYER + "self_attn.memory.score_proj.*": 0.0,
    LAYER + "self_attn.fusion.scale": 0.0,
    OUTPUT_BIAS: 0.0,
}
NEW = (*BEGINNINGS, *SINK, LAYER + "self_attn.fusion.gate.*", LAYER + "self_attn.memory.*")
SEGMENT_LENGTH = 128  # of a converted model, if nothing else is asked for
PRESENT_FADE = 1.0  # of a strength, at each segment; lasting tokens do not fade
NUM_OBSERVING_TOKENS = 32  # of a converted model, or its whole segment
# Fields of a configuration that mean the same in both.
SHARED_FIELDS = [
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act", "rms_norm_eps", "mlp_bias"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias", "attention_dropout"),
    "max_position_embeddings",
    *("rope_parameters", "tie_word_embeddings", "initializer_range", "use_cache"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
]


def matches(pattern: str, name: str) -> str | None:
    """What the star of a pattern stands for in a name, "" if it has none; None if they do not match."""
    found = re.fullmatch(re.escape(pattern).replace(r"\*", "(.+?)", 1).replace(r"\*", ".+"), name)
    return None if found is None else "".join(found.groups())


def matches_any(patterns: Iterable[str], name: str) -> bool:
    """Whether one of the patterns stands for a name."""
    return any(matches(pattern, name) is not None for pattern in patterns)


def config_with_memory(source: PreTrainedConfig, **fields: Any) -> RMTConfig:
    """The configuration of a converted model.

    Args:
        source: Of the model to be converted.
        fields: Of `RMTConfig`, where they shall not be those of the source or the default of converted models: segments
            of `SEGMENT_LENGTH`, each one chunk of which all tokens are candidates; twice as many slots, in one ring
            that keeps what the present attends to; a sink; no local path.

    Raises:
        ValueError: If the family is unknown, the source has what ours cannot do, or a field is given that would change
            what the model computes.
    """
    if source.model_type not in FAMILIES:
        raise ValueError(
            f"model_type must be one of {', '.join(FAMILIES)}, got {source.model_type!r}: other models are built in "
            "other ways and cannot be converted."
        )
    known = {name: getattr(source, name) for name in SHARED_FIELDS if hasattr(source, name)}
    known["use_qk_norm"] = source.model_type == "qwen3"
    known["attention_bias"] = source.model_type == "qwen2" or getattr(source, "attention_bias", False)
    fixed = {name for name in fields if name in known and name not in ("use_cache", "attention_dropout")}
    if fixed or fields.get("fusion_type", "gated") != "gated":
        name = min(fixed, default="fusion_type")
        raise ValueError(
            f"{name} cannot be given ({fields[name]!r}): a converted model must compute what its source does."
        )
    rope = dict(known["rope_parameters"])
    if rope.pop("partial_rotary_factor", 1) != 1:
        raise ValueError("rope_parameters: partial_rotary_factor must be 1; ours rotates whole heads.")
    segment = fields.get("segment_length", SEGMENT_LENGTH)
    chunk = fields.get("chunk_length", segment)
    memory = {"segment_length": segment, "chunk_length": chunk, "num_slots_per_chunk": chunk}
    memory |= {"num_memory_slots": 2 * segment, "num_observing_tokens": min(segment, NUM_OBSERVING_TOKENS)}
    memory |= {"num_lasting_slots": None if fields.get("memory_write") == "mean" else 0}
    memory |= {"use_attention_sink": True, "use_local_attention": False}
    config = RMTConfig(**{**known, "rope_parameters": rope, **memory, **fields})
    config.converted_from = source.to_dict()
    _check_window(source, config)
    return config


def _check_window(source: PreTrainedConfig, config: RMTConfig) -> None:
    """Refuses windows in which the source itself would not see everything; warns of those it was not trained for."""
    sliding = getattr(source, "sliding_window", None)
    if sliding is not None and config.window_length > sliding:
        raise ValueError(
            f"The window, (num_lookback_segments + 1) * segment_length = {config.window_length}, must be at most "
            f"sliding_window of the source, {sliding}: choose a smaller segment_length."
        )
    trained = getattr(source, "max_position_embeddings", None)
    if trained is not None and config.window_length > trained:
        logger.warning(
            f"The window of {config.window_length} tokens is longer than the {trained} that the source was trained for "
            "(max_position_embeddings): choose a smaller segment_length."
        )


def add_memory(source: PreTrainedModel, **fields: Any) -> RMTForCausalLM:
    """A pretrained model as an RMT model that computes the same inside the window, and remembers beyond it.

    Tensors are shared with the source, not copied. What is new: gates of memory, which begin so that the strongest
    tokens are kept whole; a score for lasting slots, which is zero until it is trained; the sink, which is the source's
    begin-of-text token; a local path, if there is one, with a share of zero.

    Args:
        source: LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM or Qwen3ForCausalLM.
        fields: Of `RMTConfig`, as `config_with_memory` takes them.

    Returns:
        The model, in the dtype of the source, in eval mode, with its generation configuration.

    Raises:
        ValueError: As `config_with_memory`, or if tensors are missing or left over.
    """
    config = config_with_memory(source.config, **fields)
    tensors = source.state_dict()
    model = _load(RMTForCausalLM, config, tensors, source.dtype, new=NEW)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for pattern, value in BEGINNINGS.items():
                if name not in tensors and matches(pattern, name) is not None:
                    parameter.fill_(value)
        for ring in (module for module in model.modules() if isinstance(module, RMTRing)):
            if ring.fade is not None:
                ring.fade.fill_(PRESENT_FADE)
    if config.use_attention_sink:
        _copy_sink(source, model)
    if source.generation_config is not None:
        model.generation_config = source.generation_config
    return model


@torch.no_grad()
def _copy_sink(source: PreTrainedModel, model: RMTForCausalLM) -> None:
    """Takes for the sink what the source makes of a lone begin-of-text token, whose rotary encoding is none.

    A source that has no such token gets token 0: at the first place nearly any will do.
    """
    ids = torch.tensor([[model.config.bos_token_id or 0]], device=source.device)
    with evaluation_mode(source):  # checkpointing in training would switch the cache off
        layers = source.base_model(input_ids=ids, past_key_values=DynamicCache(), use_cache=True).past_key_values.layers
    for layer, attention in zip(layers, (layer.self_attn for layer in model.model.layers), strict=True):
        attention.sink.key.copy_(layer.keys[0, :, 0])
        attention.sink.value.copy_(layer.values[0, :, 0])


def remove_memory(model: RMTForCausalLM) -> PreTrainedModel:
    """A converted model as a model of its source's class; what is not in that class, memory above all, is dropped.

    Tensors are shared, not copied.

    Args:
        model: From `add_memory`, trained or not.

    Raises:
        ValueError: If the model was not converted, or has an output bias that its source's class cannot hold.
    """
    record = getattr(model.config, "converted_from", None)
    if record is None:
        raise ValueError(
            "The model was not made by rmt_hf.conversion (config.converted_from is missing): nothing to go back to."
        )
    source_config = AutoConfig.for_model(**{**record, "vocab_size": model.config.vocab_size})
    names = FAMILIES[source_config.model_type]
    for name, parameter in model.named_parameters():
        if OUTPUT_BIAS not in names and matches(OUTPUT_BIAS, name) is not None and parameter.any():
            raise ValueError(f"{name} must be zero, since {source_config.model_type} has none: freeze it in training.")
    kept = {name: tensor for name, tensor in model.state_dict().items() if matches_any(names, name)}
    source = _load(MODEL_FOR_CAUSAL_LM_MAPPING[type(source_config)], source_config, kept, model.dtype)
    source.generation_config = model.generation_config
    return source


def _load(
    model_class: Any, config: PreTrainedConfig, tensors: dict[str, torch.Tensor], dtype: torch.dtype, new: tuple = ()
) -> Any:
    """A model of these tensors; what matches a pattern in `new` may be missing, and is initialised."""
    with _quiet():
        model, report = model_class.from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
        )
    model.config.name_or_path = ""
    missing = [name for name in report["missing_keys"] if not matches_any(new, name)]
    _check_whole(missing, report["unexpected_keys"])
    return model


def _check_whole(missing: Iterable[str], left_over: Iterable[str]) -> None:
    """Refuses a checkpoint that has not all tensors that a model wants, or more."""
    for kind, names in (("missing", missing), ("left over", left_over)):
        if names:
            raise ValueError(f"Tensors are {kind}: {', '.join(sorted(names)[:5])}. Is the checkpoint whole?")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that tensors are new: some are, and the others raise."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


class ParameterShare(NamedTuple):
    """How many parameters are trained, of how many."""

    trained: int
    all: int

    def __str__(self) -> str:
        return f"{self.trained:,} of {self.all:,} parameters are trained ({self.trained / self.all:.1%})"


def memory_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of memory and fusion by name, which the sink is not among. The model may be wrapped in adapters."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if re.search(r"self_attn\.(memory|fusion)", name) is not None
    }


def freeze_base(model: nn.Module) -> ParameterShare:
    """Leaves memory and fusion alone to be trained; how many parameters that is.

    Args:
        model: From `add_memory`; changed in place.
    """
    model.requires_grad_(False)
    for parameter in memory_parameters(model).values():
        parameter.requires_grad_(True)
    numbers = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return ParameterShare(sum(number for number, trained in numbers if trained), sum(number for number, _ in numbers))


def convert(source: str | Path, target: str | Path, back: bool = False, **fields: Any) -> ParameterShare | None:
    """From a folder, or a model on the Hub, to a folder: weights, tokenizer with chat template, generation settings.

    Args:
        source: Folder or Hub id.
        target: Folder, which must not exist yet; it appears when everything is written.
        back: Whether memory is taken away instead.
        fields: Of `RMTConfig`, as `config_with_memory` takes them.

    Returns:
        What memory and fusion are of all parameters; None with `back`.

    Raises:
        FileExistsError: If the target exists.
        ValueError: As `add_memory` and `remove_memory`.
    """
    target = Path(target)
    if target.exists():
        raise FileExistsError(f"{target} exists already: choose a new folder, or delete it first.")
    with _quiet():
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype="auto", output_loading_info=True)
    original, report = loaded
    _check_whole(report["missing_keys"], report["unexpected_keys"])
    model: PreTrainedModel = remove_memory(original) if back else add_memory(original, **fields)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError):
        tokenizer = None
        logger.warning(f"{source} has no tokenizer that can be loaded: none is written.")

    def write(folder: Path) -> None:
        for part in filter(None, (model, tokenizer)):
            part.save_pretrained(folder)

    write_whole(target, write)
    return None if back else freeze_base(model)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="folder or Hub id")
    parser.add_argument("target", type=Path, help="folder, which must not exist yet")
    parser.add_argument("--back", action="store_true", help="take memory away instead")
    # What is not given is left to `config_with_memory`.
    for name in ("segment_length", "chunk_length", "num_lookback_segments", "num_memory_slots", "num_lasting_slots"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=argparse.SUPPRESS)
    for name in ("num_slots_per_chunk", "num_observing_tokens"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=argparse.SUPPRESS)
    parser.add_argument("--memory-write", choices=MEMORY_WRITES, default=argparse.SUPPRESS)
    for name in ("use_attention_sink", "use_local_attention"):
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS)
    args = vars(parser.parse_args(arguments))
    source, target, back = (args.pop(name) for name in ("source", "target", "back"))
    share = convert(source, target, back, **({} if back else args))
    print(target if share is None else f"{target}: with memory and fusion alone, {share}")


if __name__ == "__main__":
    main()
