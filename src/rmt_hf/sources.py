"""What a model must be to be converted, what is kept of it, and a sentence for each kind that cannot be."""

import copy
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import has_file, logging

from .saving_rmt import hub_id


logger = logging.get_logger(__name__)

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # `model_type` of sources, whose tensors have the same names in ours
# A folder with none of them has no tokenizer; with one of them, a tokenizer that cannot be loaded is an error.
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json")
UNWRAP = "give the model inside of it (accelerator.unwrap_model, _orig_mod)"
OF_OTHER_HEADS = {
    "v_head.": "It has a value head: save its pretrained_model, and convert that.",
    "lm_head.": "It is no language model, but perhaps a classifier: convert the model that it was made from.",
}
# What a model is in, by an attribute that only the wrapper has, and what to do.
WRAPPERS = {
    "peft_config": ("adapters of PEFT", "merge them first, with merge_and_unload()"),
    "pretrained_model": ("a wrapper with a value head", "give its pretrained_model"),
    "_orig_mod": ("a wrapper of torch.compile", UNWRAP),
    "module": ("a wrapper that trains it", UNWRAP),
}


def check_source(source: nn.Module) -> None:
    """Refuses wrapped models, other heads, and weights that are not all there as plain tensors."""
    if not isinstance(source, PreTrainedModel):
        for name, (what, remedy) in WRAPPERS.items():
            if hasattr(source, name):
                raise ValueError(f"source must be a model of transformers, got one in {what}: {remedy}.")
        raise ValueError(f"source must be a model of transformers, got a {type(source).__name__}.")
    name, family = type(source).__name__, source.config.model_type
    wanted = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(family)  # `config_with_memory` has a sentence for other families
    if family in FAMILIES and wanted not in [parent.__name__ for parent in type(source).__mro__]:
        raise ValueError(f"source must be a {wanted}, got a {name}: load it with AutoModelForCausalLM.")
    check_tensors(source)


def check_tensors(model: nn.Module) -> None:
    """Refuses models whose weights are not all there, in full precision, as plain tensors."""
    named = model.state_dict()
    if any(".base_layer." in name for name in named):
        what, remedy = (
            "has adapters in it",
            "load it as a PEFT model (AutoPeftModelForCausalLM), and merge_and_unload() it",
        )
    elif any(not _is_plain(tensor) for tensor in named.values()):
        remedy = "convert the model as it was before, and quantize the result when you load it (quantization_config)"
        what = "is quantized"
    elif any(tensor.is_meta for tensor in named.values()):
        what, remedy = "has weights on the meta device or offloaded", "load it without device_map, or to one device"
    elif any(hasattr(tensor, "device_mesh") for tensor in named.values()):
        what, remedy = "is sharded", "load it in one process, without distributed_config"
    else:
        return
    raise ValueError(f"The model must have all its weights as plain tensors, got one that {what}: {remedy}.")


def _is_plain(tensor: object) -> bool:
    """Whether a tensor is no container of another one, with integers or eight-bit numbers instead of its values."""
    kinds = (torch.Tensor, nn.Parameter)
    is_own = type(tensor) in kinds or hasattr(tensor, "device_mesh")
    return is_own and isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.dtype.itemsize > 1


def check_names(report: dict[str, Any], new: str) -> None:
    """Refuses a checkpoint with missing or unexpected tensors but those that match the pattern `new`."""
    for kind in ("missing", "unexpected"):
        if names := sorted(name for name in report[f"{kind}_keys"] if not re.search(new, name)):
            remedies = [remedy for start, remedy in OF_OTHER_HEADS.items() if names[0].startswith(start)]
            remedy = remedies[0] if remedies else "Is the checkpoint whole?"
            raise ValueError(f"Tensors are {kind}: {', '.join(names[:5])}. {remedy}")


def check_window(source: PreTrainedConfig, length: int) -> None:
    """Refuses windows beyond the sliding window of the source, and warns of those it was not trained for."""
    sliding = getattr(source, "sliding_window", None)
    if sliding is not None and length > sliding:
        raise ValueError(
            f"The window, (num_lookback_segments + 1) * segment_length = {length}, must be at most "
            f"sliding_window of the source, {sliding}: choose a smaller segment_length."
        )
    trained = getattr(source, "max_position_embeddings", None)
    if trained is not None and length > trained:
        logger.warning(
            f"The window of {length} tokens is longer than the {trained} that the source was trained for "
            "(max_position_embeddings): choose a smaller segment_length."
        )


def trained_length(record: dict[str, Any]) -> int | None:
    """Tokens of which a source sees all, by its configuration as a dictionary; None if there is no limit."""
    limits = [record.get(name) for name in ("max_position_embeddings", "sliding_window")]
    return min((limit for limit in limits if limit), default=None)


def source_record(config: PreTrainedConfig) -> dict[str, Any]:
    """The configuration of a source, to go back to."""
    record = config.to_dict()
    record.pop("quantization_config", None)  # of a model that was dequantized
    if hub_id(config) is None:
        record.pop("_name_or_path", None)
    return record


def generation_settings(config: GenerationConfig | None) -> GenerationConfig | None:
    """A copy of the generation settings of a source, without those of its cache."""
    settings = copy.deepcopy(config)
    for name in ("cache_implementation", "cache_config") if settings is not None else ():
        setattr(settings, name, None)
    return settings


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a source; None and a warning if it has none."""
    if any(has_file(str(source), name) for name in TOKENIZER_FILES):
        try:
            return AutoTokenizer.from_pretrained(source)
        except Exception as error:  # of json, tokenizers or transformers
            what = f"The tokenizer of {source} cannot be loaded ({type(error).__name__}: {error})"
            raise ValueError(f"{what}: mend its files, or remove all of them to convert without.") from error
    logger.warning(f"{source} has no tokenizer: the target has none.")
    return None
