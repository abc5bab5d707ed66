"""The loss of the language model without logits that exist all at once: torch's own, as transformers wants it called.

Shapes: B rows, T columns of a call, E hidden size, V vocabulary.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


def check_chunked_loss() -> None:
    """Refuses a torch that is too old, before a call changes anything."""
    if not hasattr(F, "linear_cross_entropy"):
        raise RuntimeError(
            f"use_chunked_loss=True needs torch 2.13 or newer, got {torch.__version__}: set config.use_chunked_loss to "
            "False, or install a newer torch."
        )


def chunked_loss(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """The loss of causal language models as transformers defines it, without logits that exist all at once.

    Args:
        hidden_states: (B, T, E), after the last norm.
        weight: (V, E), of the vocabulary projection.
        labels: (B, T) token ids, not shifted.
        num_items_in_batch: What the sum over tokens is divided by; None for the number of tokens that count.
        ignore_index: Label of tokens that do not count.
        shift_labels: (B, T) labels that are shifted already; used instead of `labels`.
        kwargs: Of no meaning here.

    Returns:
        A scalar in the dtype of the hidden states; sums are taken in float32 or wider.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels[:, 1:], (0, 1), value=ignore_index)
    loss = F.linear_cross_entropy(
        hidden_states.flatten(0, 1),
        weight,
        shift_labels.flatten().to(hidden_states.device),
        reduction="mean" if num_items_in_batch is None else "sum",
        ignore_index=ignore_index,
        options=nn.LinearCrossEntropyOptions(),
    )
    return loss if num_items_in_batch is None else loss / num_items_in_batch
