"""Gives a pretrained Llama-like model a memory, and takes it away again.

    rmt convert SOURCE TARGET --segment-length 128 --num-memory-slots 256

Inside its window a converted model computes what its source computes. Beyond it, the source's own attention sees a
begin-of-text token (the attention sink), slots with the keys and values of earlier tokens, and the window.
"""

import argparse
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging

from . import RMTConfig, RMTForCausalLM
from .calibration import calibrate
from .cards import write_card
from .configuration_rmt import MEMORY_WRITES
from .evaluation.bits import evaluation_mode
from .files import write_whole
from .modeling_rmt import AUTO_CONFIG
from .saving_rmt import hub_id
from .sources import (
    FAMILIES,
    check_names,
    check_source,
    check_tensors,
    check_window,
    generation_settings,
    load_tokenizer,
    source_record,
    trained_length,
)


logger = logging.get_logger(__name__)

SEGMENT_LENGTH = 128  # default of a converted model
NUM_OBSERVING_TOKENS = 32  # default of a converted model, at most its segment
LASTING_SEGMENTS = 4  # how much farther lasting slots stand than present ones, as far as the source was trained
PRESENT_FADE = 1.0  # of a strength, at each segment; lasting tokens do not fade
# Tensors that a source has not: all of memory, fusion and sink, and a bias that begins at 0.
NEW = r"self_attn\.((memory|fusion|sink)\..+|o_proj\.bias)$"
# Gates of memory keep the strongest tokens of a segment and of a group, the score is 0, and the share of a local path
# is 0 behind a gate that is half open.
BEGINNINGS = {
    r"memory\.rings\.\d+\.gate_scale$": 8.0,
    r"memory\.rings\.\d+\.gate_bias$": 0.0,
    r"memory\.rings\.\d+\.fade$": PRESENT_FADE,
    r"memory\.score_proj\.": 0.0,
    r"fusion\.scale$": 0.0,
    r"o_proj\.bias$": 0.0,
}
# Fields of a configuration that mean the same in both. (`max_position_embeddings` does not: a stream has no end.)
SHARED_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act", "rms_norm_eps", "mlp_bias"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias", "attention_dropout"),
    *("rope_parameters", "tie_word_embeddings", "initializer_range", "use_cache"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
)


def config_with_memory(source: PreTrainedConfig, **fields: Any) -> RMTConfig:
    """The configuration of a converted model.

    Args:
        source: Of the model to be converted.
        fields: Of `RMTConfig`, in place of the defaults of converted models: segments of `SEGMENT_LENGTH`, each of one
            chunk whose tokens are all candidates; twice as many slots that keep what the present attends to, and
            `num_lasting_slots` besides, of which there are none by default, at a `lasting_distance` of
            `LASTING_SEGMENTS` segments; a sink; no local path.

    Raises:
        ValueError: If the family is unknown, the source does what ours cannot do, or a field would change what the
            model computes.
    """
    if source.model_type not in FAMILIES:
        raise ValueError(
            f"model_type must be one of {', '.join(FAMILIES)}, got {source.model_type!r}: other models have "
            "other layers and cannot be converted."
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
    lasting = fields.get("num_lasting_slots", None if fields.get("memory_write") == "mean" else 0)
    memory = {
        "segment_length": segment,
        "chunk_length": chunk,
        "num_slots_per_chunk": chunk,
        "num_memory_slots": 2 * segment + (lasting or 0),
        "num_observing_tokens": min(segment, NUM_OBSERVING_TOKENS),
        "num_lasting_slots": lasting,
        "use_attention_sink": True,
        "use_local_attention": False,
    }
    config = RMTConfig(**{**known, "rope_parameters": rope, **memory, **fields})
    config.converted_from = source_record(source)
    if lasting and "lasting_distance" not in fields:
        room = (trained_length(config.converted_from) or 2**30) - config.prefix_length - config.window_length
        config.lasting_distance = max(0, min(LASTING_SEGMENTS * segment, room))
    check_window(source, config.window_length)
    return config


def add_memory(source: PreTrainedModel, **fields: Any) -> RMTForCausalLM:
    """A pretrained model as an RMT model that computes the same inside the window, and remembers beyond it.

    Tensors are shared with the source, not copied. New are the gates of memory, which keep the strongest tokens whole;
    a score for lasting slots, which begins at 0; the sink, from the source's begin-of-text token; and a local path, if
    there is one, with a share of 0.

    Args:
        source: LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM or Qwen3ForCausalLM.
        fields: Of `RMTConfig`, as `config_with_memory` takes them.

    Returns:
        The model, in the dtype of the source, in eval mode, with its generation configuration.

    Raises:
        ValueError: As `config_with_memory`, or if the source is wrapped, quantized, offloaded or has another head.
    """
    check_source(source)
    config = config_with_memory(source.config, **fields)
    tensors = source.state_dict()
    model = _load(RMTForCausalLM, None, NEW, config=config, state_dict=tensors, dtype=source.dtype)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            for pattern, value in BEGINNINGS.items():
                if name not in tensors and re.search(pattern, name):
                    tensor.fill_(value)
    if config.use_attention_sink:
        _copy_sink(source, model)
    model.config.name_or_path = hub_id(source.config) or ""  # cards name it as the base model
    if (settings := generation_settings(source.generation_config)) is not None:
        model.generation_config = settings
    return model


@torch.no_grad()
def _copy_sink(source: PreTrainedModel, model: RMTForCausalLM) -> None:
    """Copies key and value of a lone begin-of-text token, or of token 0; at position 0 the rotary encoding is none."""
    ids = torch.tensor([[model.config.bos_token_id or 0]], device=source.device)
    with evaluation_mode(source):  # checkpointing in training would switch the cache off
        layers = source.base_model(input_ids=ids, past_key_values=DynamicCache(), use_cache=True).past_key_values.layers
    for layer, attention in zip(layers, (layer.self_attn for layer in model.model.layers), strict=True):
        attention.sink.key.copy_(layer.keys[0, :, 0])
        attention.sink.value.copy_(layer.values[0, :, 0])


def remove_memory(model: RMTForCausalLM) -> PreTrainedModel:
    """A converted model as a model of its source's class, without memory. Tensors are shared, not copied.

    Args:
        model: From `add_memory`, trained or not.

    Raises:
        ValueError: If the model was not converted, is wrapped, quantized or offloaded, or has an output bias that the
            class of its source does not have.
    """
    check_source(model)
    record = getattr(model.config, "converted_from", None)
    if record is None:
        raise ValueError(
            "The model was not made by rmt_hf.conversion (config.converted_from is missing): nothing to go back to."
        )
    source_config = AutoConfig.for_model(**{**record, "vocab_size": model.config.vocab_size})
    tensors = model.state_dict()
    source_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(source_config)]
    source = _load(source_class, None, NEW, config=source_config, state_dict=tensors, dtype=model.dtype)
    for name in sorted(tensors.keys() - source.state_dict().keys()):
        if name.endswith("o_proj.bias") and tensors[name].any():
            raise ValueError(f"{name} must be zero, since {source_config.model_type} has none: freeze it in training.")
    source.generation_config = model.generation_config
    return source


def _load(model_class: Any, source: str | Path | None, new: str = "(?!)", **options: Any) -> Any:
    """`from_pretrained`, which here refuses missing and unexpected tensors but those that match the pattern `new`."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it would warn of new tensors
    try:
        model, report = model_class.from_pretrained(source, output_loading_info=True, **options)
    finally:
        logging.set_verbosity(level)
    check_tensors(model)
    check_names(report, new)
    if source is None:
        model.config.name_or_path = ""
    return model


class ParameterShare(NamedTuple):
    """Number of trained parameters, and of all."""

    trained: int
    all: int

    def __str__(self) -> str:
        return f"{self.trained:,} of {self.all:,} parameters are trained ({self.trained / self.all:.1%})"


def memory_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of memory, fusion and sink by name. The model may be wrapped in adapters."""
    named = model.named_parameters()
    return {name: parameter for name, parameter in named if re.search(r"self_attn\.(memory|fusion|sink)\.", name)}


def freeze_base(model: nn.Module) -> ParameterShare:
    """Freezes everything but memory, fusion and sink.

    Args:
        model: From `add_memory`; changed in place.

    Returns:
        How many parameters are trained, of how many.
    """
    model.requires_grad_(False)
    for parameter in memory_parameters(model).values():
        parameter.requires_grad_(True)
    numbers = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return ParameterShare(sum(number for number, trained in numbers if trained), sum(number for number, _ in numbers))


def convert(
    source: str | Path,
    target: str | Path,
    back: bool = False,
    with_code: bool = False,
    texts: str | Path | None = None,
    **fields: Any,
) -> ParameterShare | None:
    """Converts a folder or a model on the Hub: weights, tokenizer with chat template, generation settings.

    Args:
        source: Folder or Hub id.
        target: Folder, which must not exist yet; it appears when everything is written.
        back: Whether to take memory away instead.
        with_code: Whether the code of the model goes with it, so that the folder can be opened where `rmt_hf` is not
            installed (`trust_remote_code=True`).
        texts: What `read_texts` reads, to `calibrate` lasting slots on. As many of them as of present ones are added,
            unless fields say otherwise; of a given `num_memory_slots`, half last.
        fields: Of `RMTConfig`, as `config_with_memory` takes them.

    Returns:
        The share of memory, fusion and sink in all parameters; None with `back`.

    Raises:
        FileExistsError: If the target exists.
        ValueError: As `add_memory`, `remove_memory` and `calibrate`; of a tokenizer that cannot be loaded.
    """
    target = Path(target)
    if target.exists():
        raise FileExistsError(f"{target} exists already: choose a new folder, or delete it first.")
    if back and texts is not None:
        raise ValueError("texts are for a memory, which back=True takes away: leave one of them out.")
    tokenizer = load_tokenizer(source)
    original = _load(AutoModelForCausalLM, source, dtype="auto")
    if texts is not None and "num_lasting_slots" not in fields:
        half = fields["num_memory_slots"] // 2 if "num_memory_slots" in fields else None
        fields["num_lasting_slots"] = half or 2 * fields.get("segment_length", SEGMENT_LENGTH)
    model: Any = remove_memory(original) if back else add_memory(original, **fields)
    if texts is not None:
        from .texts import read_texts  # needs the extra for training

        calibrate(model, read_texts(texts), tokenizer)
    if tokenizer is not None and not back:
        tokenizer.padding_side = "left"  # `generate` goes on from the last column

    def write(folder: Path) -> None:
        for part in filter(None, (model, tokenizer)):
            part.save_pretrained(folder)
        if not back:
            write_card(folder, model.config, source=source)

    if with_code and not back:  # a model is saved with the code that its configuration names
        model.config.auto_map = dict(AUTO_CONFIG)
    write_whole(target, write)
    return None if back else freeze_base(model)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser("rmt convert", description=__doc__.splitlines()[0])
    parser.add_argument("source", help="folder or Hub id")
    parser.add_argument("target", type=Path, help="folder, which must not exist yet")
    parser.add_argument("--back", action="store_true", help="take memory away instead")
    parser.add_argument("--with-code", action="store_true", help="the folder opens where rmt_hf is not installed")
    parser.add_argument(
        "--calibrate", metavar="TEXTS", help="file or folder of prose, to fit the score of lasting slots, which it adds"
    )
    parser.argument_default = argparse.SUPPRESS  # `config_with_memory` knows the defaults
    sizes = ("segment-length", "chunk-length", "num-lookback-segments", "num-memory-slots", "num-lasting-slots")
    for name in (*sizes, "lasting-distance", "num-slots-per-chunk", "num-observing-tokens"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--memory-write", choices=MEMORY_WRITES)
    for name in ("use-attention-sink", "use-local-attention"):
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction)
    args = vars(parser.parse_args(arguments))
    source, target, back, *others = (args.pop(name) for name in ("source", "target", "back", "with_code", "calibrate"))
    if back and (args or others[0]):
        parser.error("--back takes memory away as it is: leave the other options out.")
    share = convert(source, target, back, *others, **args)
    print(target if share is None else f"{target}: with memory, fusion and sink alone, {share}")


if __name__ == "__main__":
    main()
