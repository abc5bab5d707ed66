"""Cards: what folders and repositories say of a model or state; `save_pretrained` and `push_to_hub` write them.

A card that a person wrote or has changed keeps its words. Metadata that it has not are added, and results are replaced.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from transformers.utils import logging

from .configuration_rmt import RMTConfig
from .files import write_whole
from .saving_rmt import RECORD_NAME, hub_id


logger = logging.get_logger(__name__)

TAGS = ["recurrent-memory", "long-context", "arxiv:2507.00453"]
PIPELINES = {"RMTForCausalLM": "text-generation", "RMTForSequenceClassification": "text-classification"}
PIPELINES |= {"RMTForTokenClassification": "token-classification", "RMTForQuestionAnswering": "question-answering"}
PIPELINES |= {"RMTModel": "feature-extraction"}
DESCRIPTION = "This is the model card of a 🤗 transformers model that has been pushed on the Hub. "  # of transformers
DESCRIPTION += "This model card has been automatically generated."
INHERITED = ("license", "license_name", "license_link", "language")  # of a base model
MARK = "<!-- rmt_hf {kind} card {digest}: words that you change stay as they are -->\n"
HEAD = "| data | metric | value |", "| --- | --- | ---: |"
UNKNOWN_PLACE = "this folder or repository"
MODEL_TEXT = """
# {name}

{origin} with a memory of constant size ([rmt_hf](https://arxiv.org/abs/2507.00453)). Each layer sees a window of up to
{window:,} tokens and {slots:,} earlier ones that its memory keeps. State and time per token do not grow with the text.

## Load it

```python
{first}
from transformers import {auto_class}
model = {auto_class}.from_pretrained("{place}"{trust})
```
"""
STATE_TEXT = """
# What a recurrent-memory model has read

{rows} at {positions} tokens; {nbytes:,} bytes; {dtype}. To be continued with the model that wrote it{model}:

```python
from rmt_hf import RMTCache
# model = ..., the one that wrote it
state = RMTCache.from_pretrained("{place}", model)
```
"""


def card_data(**fields: Any) -> ModelCardData:
    """Metadata that all our cards of models share; `fields` are added, and tags put after ours."""
    tags = list(dict.fromkeys([*TAGS, *(fields.pop("tags", None) or ())]))
    return ModelCardData(library_name="transformers", tags=tags, **fields)


def write_card(
    folder: str | Path,
    config: Any = None,
    repo_id: str | None = None,
    source: str | Path | None = None,
    results: Sequence[EvalResult] = (),
    **fields: Any,
) -> None:
    """Writes the card of a model, README.md, into its folder, or brings the one that is there up to date.

    Args:
        folder: Of the saved model.
        config: `RMTConfig` of the model; that of the folder if None.
        repo_id: Where it goes on the Hub; the lines that load it name it, and the Hub is asked for the base model's
            card. Without it the lines have words for a folder, as paths are nobody's business, and the cache is asked.
        source: Folder or Hub id that the model was made from; what it was loaded from if None.
        results: What was measured, in place of older results of the same metric and data.
        fields: Of `ModelCardData`: `license`, `datasets`, `language`, `base_model`, `tags`, ... If they are not given,
            they are those of the card that is there, then those of the source and of the base model.
    """
    config = RMTConfig.from_pretrained(folder) if config is None else config
    if (card := _read(Path(folder) / "README.md")) is None:
        return
    base, kept = hub_id(config), {name: value for name, value in vars(card.data).items() if value}
    loaded = _card_of(str(source or getattr(config, "_name_or_path", "")), repo_id is not None)
    base = loaded.get("base_model") if base is None else base if base != repo_id else None
    others = loaded, _card_of(base if isinstance(base, str) else "", repo_id is not None)
    found = {name: next(filter(None, (other.get(name) for other in others)), None) for name in INHERITED}
    class_name, code = (config.architectures or ["RMTForCausalLM"])[0], ["custom_code"] * bool(config.auto_map)
    found |= {"base_model": base, "pipeline_tag": PIPELINES.get(class_name), "tags": code}
    detected, given = card_data(**found).to_dict(), {name: value for name, value in fields.items() if value}
    merged = {**detected, **kept, **given}
    merged["tags"] = list(dict.fromkeys([*kept.get("tags", ()), *detected["tags"], *given.get("tags", ())]))
    old = [each for each in kept.get("eval_results", ()) if not any(map(each.is_equal_except_value, results))]
    merged["eval_results"] = [*old, *results] or None
    name = merged.get("model_name") or (repo_id or "A model with a memory").split("/")[-1]
    merged["model_name"] = name if merged["eval_results"] else None
    text = _model_text(name, merged, config, class_name, repo_id)
    _write(card, Path(folder), merged, text if _is_ours(card.text, ("model", "state")) else card.text)


def _model_text(name: str, data: dict[str, Any], config: Any, class_name: str, repo_id: str | None) -> str:
    base, has_code, results = data.get("base_model"), bool(config.auto_map), data["eval_results"] or ()
    rows = [f"| {one.dataset_name} | {one.metric_name or one.metric_type} | {one.metric_value} |" for one in results]
    text = MODEL_TEXT.format(
        name=name,
        origin=f"[{base}](https://huggingface.co/{base})" if isinstance(base, str) else "A language model",
        window=config.window_length,
        slots=config.num_memory_slots,
        first="# trust_remote_code runs the code of this repository" if has_code else "import rmt_hf",
        auto_class=class_name.replace("RMT", "AutoModel" if class_name != "RMTModel" else "Auto", 1),
        place=repo_id or UNKNOWN_PLACE,
        trust=", trust_remote_code=True" if has_code else "",
    )
    text += "\n".join(["", "## Measured", "", *HEAD, *rows, ""]) if rows else ""
    return text + _mark("model", text)


def write_model_card(model: Any, folder: str | Path, repo_id: str | None = None) -> None:
    """Writes the card of a model that has been saved; `save_pretrained` and `push_to_hub` call it."""
    write_card(folder, model.config, repo_id)


def write_state_card(state: Any, folder: str | Path, repo_id: str | None = None, **where: Any) -> None:
    """Writes the card of a saved `RMTCache`, or adds tags to the card of something else in its folder.

    Args:
        state: What was saved.
        folder: Where to.
        repo_id: Where it goes; the card that is there is asked for, so that it is kept.
        where: `revision`, `subfolder` and `token` of the upload.
    """
    file, record = Path(folder) / "README.md", json.loads((Path(folder) / RECORD_NAME).read_text("utf-8"))
    if repo_id is not None:
        try:
            file.write_bytes(Path(hf_hub_download(repo_id, "README.md", **where)).read_bytes())
        except RemoteEntryNotFoundError:
            file.unlink(missing_ok=True)
    if (card := _read(file)) is None:
        return
    positions, base, weights = state.positions, record.get("base_model"), record.get("weights_sha256")
    text = STATE_TEXT.format(
        rows="One stream" if len(positions) == 1 else f"{len(positions)} streams",
        positions=", ".join(f"{position:,}" for position in positions),
        nbytes=state.nbytes,
        dtype=record["dtype"],
        model=(f" ({base})" if base else "") + (f", with weights {weights[:16]}" if weights else ""),
        place=repo_id or UNKNOWN_PLACE,
    )
    kept, is_ours = {name: value for name, value in vars(card.data).items() if value}, _is_ours(card.text, ("state",))
    data: dict[str, Any] = {"library_name": "transformers", "base_model": base, **kept}
    data["base_model"] = base if is_ours else data["base_model"]
    data["tags"] = list(dict.fromkeys([*kept.get("tags", ()), "recurrent-memory", "memory-state"]))
    _write(card, Path(folder), data, text + _mark("state", text) if is_ours else card.text)


def _read(file: Path) -> ModelCard | None:
    """A card, an empty one if there is none; None, and a warning, if nobody can read it."""
    try:
        return ModelCard.load(file, ignore_metadata_errors=True) if file.exists() else ModelCard("---\n{}\n---\n")
    except Exception as error:  # of YAML, or of what it says
        logger.warning(f"{file} stays as it is: its metadata cannot be read ({type(error).__name__}: {error}).")
        return None


def _card_of(source: str, looks_up: bool) -> Any:
    """Metadata of the card of a folder or Hub repository, empty if there is none."""
    file = Path(source) / "README.md"
    try:
        if not source or not Path(source).is_dir():
            file = Path(hf_hub_download(source, "README.md", local_files_only=not looks_up))
    except (OSError, ValueError):  # no network, no such repository, no such name
        return ModelCardData()
    return ModelCardData() if (card := _read(file)) is None else card.data


def _write(card: ModelCard, folder: Path, data: dict[str, Any], text: str) -> None:
    """Writes a card, unless nothing has changed."""
    before = card.data.to_dict(), card.text
    vars(card.data).update(data)
    card.text = text
    if (card.data.to_dict(), text) != before:
        write_whole(folder / "README.md", card.save)


def _mark(kind: str, text: str) -> str:
    return MARK.format(kind=kind, digest=hashlib.sha256(text.encode()).hexdigest()[:16])


def _is_ours(text: str, kinds: Sequence[str]) -> bool:
    """Whether nobody wrote a text: there is none, or it is as we or transformers wrote it."""
    body = text[: text.rfind("\n<!--") + 1]
    if not text.strip() or any(text == body + _mark(kind, body) for kind in kinds):
        return True
    return "model" in kinds and text == ModelCard.from_template(ModelCardData(), model_description=DESCRIPTION).text
