"""A state on disk: one JSON record and one safetensors file, both checked before anything is believed.

The record names the file of the tensors by its hash and is renamed into place last, so that a folder holds a whole
state at every moment, the old one or the new one.
"""

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import cached_file

from .configuration_rmt import RMTConfig
from .memory_rmt import Slots
from .state_rmt import LayerState, StateSizes


FORMAT_VERSION = 3  # memory is a prefix of the window, and the ids read are hashed
RECORD_NAME, TENSOR_FILE = "rmt_state.json", "state-{}.safetensors"
OF_NO_STATE = {"vocab_size", "initializer_range", "max_position_embeddings", "attention_dropout", "tie_word_embeddings"}
OF_NO_STATE |= {"use_cache", "use_chunked_loss", "pad_token_id", "bos_token_id", "eos_token_id"}
FINGERPRINT = [name for name in RMTConfig.__annotations__ if name not in OF_NO_STATE]


def write_state(
    directory: str | os.PathLike, record: dict[str, Any], tensors: dict[str, torch.Tensor], tensor_file: str
) -> None:
    """Writes a state (`record`: what JSON can hold) into a folder, whose other files are left alone."""
    check_finite(tensors)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".unfinished-{os.getpid()}"
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, temporary, {"format": "pt"})
    digest = hashlib.sha256(temporary.read_bytes()).hexdigest()
    file = temporary.replace(folder / tensor_file.format(digest[:16]))
    record = {"format_version": FORMAT_VERSION, **record, "tensor_file": file.name, "tensor_sha256": digest}
    record["record_sha256"] = _record_digest(record)
    temporary.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    temporary.replace(folder / RECORD_NAME)
    for old in set(folder.glob(TENSOR_FILE.format("*"))) - {file}:
        old.unlink()


def read_state(
    directory: str | os.PathLike, config: RMTConfig, device: torch.device, **hub: Any
) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """Reads and checks a state: record, and tensors as `state_shapes` has them. `hub`: as `cached_file` takes it."""

    def path_of(name: str) -> Path:
        return Path(str(cached_file(directory, name, **hub)))

    def damaged(what: str) -> ValueError:
        remedy = "Save it again, or let the model read the text again."
        return ValueError(f"The state in {directory} is damaged: {what}. {remedy}")

    try:
        record = json.loads(path_of(RECORD_NAME).read_text("utf-8"))
        is_whole = record["record_sha256"] == _record_digest(record)
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(f"{RECORD_NAME} cannot be read ({type(error).__name__}: {error})") from error
    if (version := record.get("format_version")) != FORMAT_VERSION:
        remedy = "read it with the version of rmt_hf that wrote it, or let the model read the text again."
        raise ValueError(f"The state in {directory} must have format_version {FORMAT_VERSION}, got {version}: {remedy}")
    if not is_whole:
        raise damaged(f"{RECORD_NAME} is not as it was written")
    check_fingerprint(record["fingerprint"], state_fingerprint(config))
    file = path_of(record["tensor_file"])
    if hashlib.sha256(file.read_bytes()).hexdigest() != record["tensor_sha256"]:
        raise damaged(f"{file.name} is not as it was written")
    try:
        tensors = load_file(file, device=str(device))
    except SafetensorError as error:
        raise damaged(f"{file.name} cannot be read ({error})") from error
    shapes, dtype = state_shapes(config, len(record["positions"])), record["dtype"]
    found = {name: (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
    wrong = [name for name in shapes | found if name not in found or found[name][1] != shapes.get(name)]
    wrong += [name for name in found if name.endswith(("keys", "values")) and found[name][0] != dtype]
    if wrong:
        got = "{} of shape {}".format(*found[wrong[0]]) if wrong[0] in found else "nothing"
        raise ValueError(
            f"{len(wrong)} tensors of the state are not what its record says; {wrong[0]} should be {dtype} of shape "
            f"{shapes.get(wrong[0], 'no tensor at all')}, got {got}: let the model read the text again."
        )
    check_finite(tensors)
    return record, [tensors[name].clone() for name in shapes]  # aligned: kernels round in another way where it is not


def reading_device(model: PreTrainedModel) -> torch.device:
    """The device on which a model reads, also while its weights are offloaded and have none."""
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    own = next((device for device in devices if device is not None), "cpu")
    return torch.device(own) if model.device.type == "meta" else model.device


def check_fingerprint(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Refuses a state that a model of another configuration has written."""
    if theirs != ours:
        names = [name for name in ours if theirs.get(name) != ours[name]]
        different = ", ".join(f"{name} {theirs.get(name)} instead of {ours[name]}" for name in names)
        remedy = "begin with RMTCache(model.config), or use the model that wrote it."
        raise ValueError(f"past_key_values must be a state of this configuration, got one with {different}: {remedy}")


@torch.no_grad()
def sample_weights(model: nn.Module) -> dict[str, list[float]]:
    """Three numbers of each parameter that is here, whole and floating: enough to tell models apart, in any dtype."""
    samples = {}
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not weight.is_meta and not hasattr(weight, "device_mesh"):
            last = weight.numel() - 1
            at = torch.tensor([0, last // 2, last - last // 7], device=weight.device)
            samples[name.replace(".base_layer", "")] = weight.flatten()[at].tolist()
    return samples


def hub_id(config: PreTrainedConfig) -> str | None:
    """The Hub id that a model was loaded or converted from; None for a folder, whose path is nobody's business."""
    origin = getattr(config, "converted_from", None) or {}
    for name in filter(None, (getattr(config, "_name_or_path", None), origin.get("_name_or_path"))):
        with suppress(HFValidationError):
            validate_repo_id(name)
            if not Path(name).exists():
                return str(name)
    return None


def weights_record(model: nn.Module) -> dict[str, Any]:
    """What the record of a state says of the weights that wrote it: samples, a hash of them, and the base model."""
    samples = sample_weights(model)
    named = json.dumps(samples, sort_keys=True).encode()
    digest = hashlib.sha256(named).hexdigest() if samples else None
    return {"weights": samples, "weights_sha256": digest, "base_model": hub_id(cast(Any, model).config)}


def refuse_other_weights(directory: str | os.PathLike, record: dict[str, Any], model: nn.Module) -> None:
    """Refuses a state that other weights have written; quantized and offloaded ones are not compared."""
    written, ours = record["weights"], sample_weights(model)
    dtypes = {getattr(torch, record["dtype"].removeprefix("torch.")), *(weight.dtype for weight in model.parameters())}
    eps = max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)
    for name in written.keys() & ours.keys():
        if any(abs(old - new) > 2 * eps * abs(old) + 1e-7 for old, new in zip(written[name], ours[name], strict=True)):
            raise ValueError(
                f"The state in {directory} must be of the weights of this model, got one of others ({name} differs): "
                "use the model that wrote it, let this one read the text again, or pass check_weights=False."
            )


def tensor_names(num_layers: int) -> list[str]:
    """Names of the tensors of a state, in the order of `RMTCache.tensors`."""
    slots = [f"{memory}.{name}" for memory in LayerState._fields[4:] for name in Slots._fields]
    names = [*LayerState._fields[:4], *slots]
    return [f"layers.{layer}.{name}" for layer in range(num_layers) for name in names] + ["history"]


def state_shapes(config: RMTConfig, batch_size: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a state of B streams."""
    (heads, width), num_layers = config.key_value_shape, config.num_hidden_layers
    num_scores = heads if any(uses_score for _, uses_score, _ in config.memory_parts) else 0
    sizes = (heads, width), (num_scores,), (config.num_attention_heads, width)
    keys, scores, queries = (torch.empty(batch_size, 0, *size, device="meta") for size in sizes)
    layer = LayerState.empty(StateSizes.of(config), keys, scores, queries).tensors()
    shapes = [tuple(tensor.shape) for tensor in layer] * num_layers + [(batch_size, 1 + config.segment_length)]
    return dict(zip(tensor_names(num_layers), shapes, strict=True))


def state_fingerprint(config: RMTConfig) -> dict[str, Any]:
    """The fields of a configuration that decide what a state is and how it goes on."""
    fields = vars(config)  # a look through the configuration itself takes 30 times as long
    return {name: fields[name] for name in FINGERPRINT}


def check_finite(tensors: dict[str, torch.Tensor]) -> None:
    """Refuses NaN and infinity; only the strength of a slot that was never written is minus infinity."""
    for name, tensor in tensors.items():
        if not (tensor.isfinite() | (name.endswith("strengths") & (tensor == -torch.inf))).all():
            raise ValueError(f"A state must be finite, got NaN or infinity in {name}: has the model diverged?")


def _record_digest(record: dict[str, Any]) -> str:
    rest = {name: value for name, value in record.items() if name != "record_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
