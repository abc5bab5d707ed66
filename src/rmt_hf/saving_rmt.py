"""A state on disk: one JSON record and one safetensors file, both checked before anything is believed.

The record names the file of the tensors by its hash and is renamed into place last, so that a folder holds a whole
state at every moment, the old one or the new one. Nothing is pickled.

Shapes: B rows, N lookback segments, S segment length, G key/value heads, D head width, M slots, r slots per chunk.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.utils import cached_file


FORMAT_VERSION = 2  # of the second form: memory as a prefix of the window
RECORD_NAME = "rmt_state.json"
CARD = """---
library_name: transformers
tags: [rmt, memory-state]
---

# What a recurrent-memory model has read

A state of `rmt_hf`, to be continued with the model that wrote it:

```python
state = RMTCache.from_pretrained("this folder or repository", model)
```

{rows} at {positions} tokens; {nbytes:,} bytes; {dtype}.
"""


def write_state(directory: str | os.PathLike, record: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Writes a state; a folder that holds one already holds either the old or the new one at every moment.

    Args:
        directory: Made if it does not exist; other files in it are left alone.
        record: What JSON can hold: `fingerprint`, `dtype`, `positions` and what else belongs to the clock.
        tensors: By name.

    Raises:
        ValueError: If a tensor holds what no stream leaves behind (NaN, infinite keys); nothing is written then.
    """
    check_finite(tensors)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".unfinished-{os.getpid()}.safetensors"
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, temporary, {"format": "pt"})
    digest = hashlib.sha256(temporary.read_bytes()).hexdigest()
    file = folder / f"state-{digest[:16]}.safetensors"
    temporary.replace(file)
    record = {"format_version": FORMAT_VERSION, **record, "tensor_file": file.name, "tensor_sha256": digest}
    record["record_sha256"] = _record_digest(record)
    positions = record["positions"]
    card = CARD.format(
        rows="One stream" if len(positions) == 1 else f"{len(positions)} streams",
        positions=", ".join(f"{position:,}" for position in positions),
        nbytes=sum(tensor.nbytes for tensor in tensors.values()),
        dtype=record["dtype"],
    )
    for name, text in (("README.md", card), (RECORD_NAME, json.dumps(record, indent=1) + "\n")):
        temporary = folder / f".unfinished-{os.getpid()}-{name}"
        temporary.write_text(text, "utf-8")
        temporary.replace(folder / name)
    for old in folder.glob("state-*.safetensors"):
        if old != file:
            old.unlink()


def read_record(directory: str | os.PathLike, **hub: Any) -> dict[str, Any]:
    """Reads the record of a state and checks that it is as it was written.

    Args:
        directory: A folder that `write_state` wrote, or the id of a Hub repository with its files.
        hub: What `transformers.utils.cached_file` takes: `revision`, `token`, ...

    Raises:
        OSError: If there is no state.
        ValueError: If the record is damaged or of another format.
    """
    file = Path(str(cached_file(directory, RECORD_NAME, **hub)))
    try:
        record = json.loads(file.read_text("utf-8"))
        is_whole = record["record_sha256"] == _record_digest(record)
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(directory, f"{RECORD_NAME} cannot be read ({type(error).__name__}: {error})") from error
    if record.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"The state in {directory} must have format_version {FORMAT_VERSION}, got {record.get('format_version')}: "
            "read it with the version of rmt_hf that wrote it, or let the model read the text again."
        )
    if not is_whole:
        raise _damaged(directory, f"{RECORD_NAME} is not as it was written")
    return record


def read_tensors(
    directory: str | os.PathLike, record: dict[str, Any], device: torch.device, **hub: Any
) -> dict[str, torch.Tensor]:
    """Reads the tensors of a state and checks that they are whole, what the record says, and possible.

    Args:
        directory: As for `read_record`.
        record: What `read_record` returned.
        device: Where the tensors go.
        hub: As for `read_record`.

    Returns:
        The tensors by name, in the order of `state_shapes`.

    Raises:
        ValueError: If they are damaged, of other names or shapes, or not finite.
    """
    name = record["tensor_file"]
    file = Path(str(cached_file(directory, name, **hub)))
    if hashlib.sha256(file.read_bytes()).hexdigest() != record["tensor_sha256"]:
        raise _damaged(directory, f"{name} is not as it was written")
    try:
        tensors = load_file(file, device=str(device))
    except SafetensorError as error:
        raise _damaged(directory, f"{name} cannot be read ({error})") from error
    shapes = state_shapes(record["fingerprint"], len(record["positions"]))
    _check_shapes(tensors, shapes, record["dtype"])
    check_finite(tensors)
    return {name: tensors[name] for name in shapes}


def state_shapes(fingerprint: dict[str, Any], batch_size: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a state of B streams."""
    heads, width, slots = (fingerprint[name] for name in ("num_key_value_heads", "head_dim", "num_memory_slots"))
    segment, lasting = fingerprint["segment_length"], fingerprint["num_lasting_slots"]
    columns = (fingerprint["num_lookback_segments"] + 2) * segment
    selects = slots > 0 and fingerprint["memory_write"] == "select"
    num_scores = heads if selects and lasting != 0 else 0
    num_queries = 2 * fingerprint["num_observing_tokens"] if selects and lasting != slots else 0
    prefix = slots + fingerprint["use_attention_sink"]
    layer: dict[str, tuple[int, ...]] = {
        name: (batch_size, heads, columns + prefix, width) for name in ("keys", "values")
    }
    layer["scores"] = (batch_size, columns, num_scores)
    layer["queries"] = (batch_size, fingerprint["num_attention_heads"], num_queries, width)
    for memory in ("memory", "previous_memory"):
        layer |= {f"{memory}.{name}": (batch_size, slots, heads, width) for name in ("keys", "values")}
        layer |= {f"{memory}.{name}": (batch_size, slots, heads) for name in ("strengths", "positions")}
    shapes = {
        f"layers.{index}.{name}": shape
        for index in range(fingerprint["num_hidden_layers"])
        for name, shape in layer.items()
    }
    return shapes | {"recent_is_real": (batch_size, segment)}


def check_finite(tensors: dict[str, torch.Tensor]) -> None:
    """Refuses NaN and infinity; only the strength of a slot that was never written is minus infinity."""
    for name, tensor in tensors.items():
        is_right = tensor.isfinite()
        if name.endswith("strengths"):
            is_right |= tensor == -torch.inf
        if not is_right.all():
            raise ValueError(
                f"A state must be finite, got NaN or infinity in {name}: the model that wrote it has diverged, or the "
                "file was made by something else. Read the text again with a model whose weights are finite."
            )


def _check_shapes(tensors: dict[str, torch.Tensor], shapes: dict[str, tuple[int, ...]], dtype: str) -> None:
    wrong = [name for name in shapes if name not in tensors or tuple(tensors[name].shape) != shapes[name]]
    wrong += [name for name in tensors if name not in shapes]
    wrong += [name for name in tensors if name.endswith(("keys", "values")) and str(tensors[name].dtype) != dtype]
    if wrong:
        name = wrong[0]
        got = f"{tensors[name].dtype} of shape {tuple(tensors[name].shape)}" if name in tensors else "nothing"
        raise ValueError(
            f"{len(wrong)} tensors of the state are not what its record says; {name} should be {dtype} of shape "
            f"{shapes.get(name, 'no tensor at all')}, got {got}: let the model read the text again."
        )


def _record_digest(record: dict[str, Any]) -> str:
    rest = {name: value for name, value in record.items() if name != "record_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _damaged(directory: str | os.PathLike, what: str) -> ValueError:
    return ValueError(
        f"The state in {directory} is damaged: {what}. Save it again, or let the model read the text again."
    )
