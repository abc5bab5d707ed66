"""The card of a model in training: what it was trained on, and what was measured."""

import math
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from ..cards import PIPELINES, write_card


NAMES = {"finetuned_from": "base_model", "tasks": "pipeline_tag", "dataset_tags": "datasets"}  # as `Trainer` has them
RATES = ("runtime", "per_second", "preparation_time")  # of an evaluation; they say nothing of a model


def write_trainer_card(trainer: Any, folder: str | Path, **fields: Any) -> None:
    """Writes the card of a model of ours in training, with the latest of each metric of evaluation.

    Args:
        trainer: A `Trainer`.
        folder: Where the model was saved.
        fields: As `Trainer.create_model_card` takes them; `dataset_tags` are Hub ids.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not hasattr(model, "write_card"):
        return
    latest = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
    data, task, results = _dataset_id(trainer.eval_dataset), PIPELINES.get(type(model).__name__, "text-generation"), []
    for metric, value in ((name.removeprefix("eval_"), latest[name]) for name in latest if name.startswith("eval_")):
        if isinstance(value, int | float) and math.isfinite(value) and not any(word in metric for word in RATES):
            shown, label = data or "evaluation data", metric.replace("_", " ")
            results.append(EvalResult(task, data or "unknown", shown, metric, round(value, 4), metric_name=label))
    given = {NAMES.get(name, name): value for name, value in fields.items() if name not in ("dataset", "dataset_args")}
    tags = [given["tags"]] if isinstance(given.get("tags"), str) else given.get("tags") or []
    given["datasets"] = given.get("datasets") or _dataset_id(trainer.train_dataset)
    given["tags"] = [*tags, "generated_from_trainer"]
    write_card(folder, model.config, trainer.hub_model_id, results=results, **given)


def _dataset_id(dataset: Any) -> str | None:
    """The Hub id of the files that a data set was made from."""
    files = getattr(getattr(dataset, "info", None), "download_checksums", None) or ()
    return next((match[1] for file in files if (match := re.match(r"hf://datasets/([^@]+)@", str(file)))), None)
