"""Distillation: a converted model with a window learns from its source, which sees whole rows.

Shapes: B rows, T tokens of a row, V vocabulary.
"""

import re
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..conversion import memory_parameters
from ..data import IGNORED
from .trainer import RMTTrainer


SLICE_LENGTH = 512  # tokens whose probabilities over the vocabulary are compared at a time


class DistillationTrainer(RMTTrainer):
    """`RMTTrainer` for plain rows that pulls the student's predictions to the teacher's.

    The loss is the Kullback-Leibler divergence from teacher to student, nats, mean over all tokens, plus
    `label_weight` times the cross entropy of labels that are not -100, in proportion: their sum by the number of all
    tokens. Without a teacher it is the mean cross entropy of labels. A converted model begins with a divergence of 0
    inside its window.

    Args:
        teacher: Sees whole rows, and has the vocabulary of the student; None to learn labels alone.
        label_weight: What a label counts, of what a token counts; at least 0.
        args, kwargs: As `Trainer` takes them.

    Raises:
        ValueError: If the vocabularies differ, the weight is negative, or rows are to be read as streams or in groups.

    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", at temperature 1.
    """

    def __init__(
        self, *args: Any, teacher: PreTrainedModel | None = None, label_weight: float = 1.0, **kwargs: Any
    ) -> None:
        if not label_weight >= 0:
            raise ValueError(f"label_weight must be at least 0, got {label_weight}.")
        super().__init__(*args, **kwargs)
        self.label_weight = label_weight
        self.model_accepts_loss_kwargs = False  # a mean over the row: the Trainer divides by the accumulation steps
        for name in ("stream_length", "checkpoint_segments"):
            if getattr(self.args, name) is not None:
                raise ValueError(f"{name} must be None, got {getattr(self.args, name)}: a teacher reads whole rows.")
        self.teacher = teacher
        if teacher is None:
            return
        sizes = teacher.config.vocab_size, self._config.vocab_size
        if sizes[0] != sizes[1]:
            raise ValueError(f"vocab_size of the teacher must be that of the student ({sizes[1]}), got {sizes[0]}.")
        teacher.eval().requires_grad_(False)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Divergence and cross entropy of rows `input_ids` and `labels`, (B, T) each."""
        labels = inputs.get("labels")
        inputs = {name: tensor for name, tensor in inputs.items() if name != "labels"}
        outputs = model(**inputs, use_cache=False)
        loss = outputs.logits.new_zeros(())
        if self.teacher is not None:
            with torch.no_grad():
                wanted = self.teacher(**inputs, use_cache=False).logits
            loss = divergence(outputs.logits, wanted)
        if labels is not None and (labels[:, 1:] != IGNORED).any():
            wanted = labels[:, 1:].flatten()
            errors = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1).float(), wanted, reduction="sum")
            share = 1 / (wanted != IGNORED).sum() if self.teacher is None else self.label_weight / labels.numel()
            loss = loss + errors * share
        return (loss, outputs) if return_outputs else loss


def divergence(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence from teacher to student, nats, mean over tokens.

    Args:
        logits: (B, T, V) of the student.
        wanted: (B, T, V) of the teacher.
    """
    total = torch.zeros((), device=logits.device)
    for pair in zip(logits.split(SLICE_LENGTH, 1), wanted.split(SLICE_LENGTH, 1), strict=True):
        ours, theirs = (part.float().log_softmax(-1) for part in pair)
        total = total + F.kl_div(ours, theirs, reduction="sum", log_target=True)
    return total / logits.shape[:2].numel()


def parameter_groups(model: nn.Module, learning_rate: float, scale_factor: float = 10.0) -> list[dict[str, Any]]:
    """Parameter groups of an optimizer, with a higher learning rate for what is one number for each head.

    The share of a local path begins at 0 and has to reach about 1, and a gate or fade has to move as far, while a
    weight stays near its beginning.

    Args:
        model: For example after `freeze_base`.
        learning_rate: Of all other parameters.
        scale_factor: By how much the learning rate of shares, gate scales, gate biases and fades is larger.

    Returns:
        One or two groups, with `params` and `lr`.
    """
    # An adapter that holds fusion whole puts names of its own between the two.
    pattern = r"fusion\..*\bscale$|\b(gate_scale|gate_bias|fade)$"
    scales = [(name, parameter) for name, parameter in memory_parameters(model).items() if re.search(pattern, name)]
    names = {name for name, _ in scales}
    others = [item for item in model.named_parameters() if item[1].requires_grad and item[0] not in names]
    rates = (scale_factor * learning_rate, learning_rate)
    return [
        {"params": [parameter for _, parameter in items if parameter.requires_grad], "lr": rate}
        for items, rate in zip((scales, others), rates, strict=True)
        if items
    ]
