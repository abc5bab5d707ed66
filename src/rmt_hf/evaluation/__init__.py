"""Bits that a model needs for long documents, with and without its memory."""

from .ablation import Ablation, empty_memories, freeze_memories, pass_on_memories, stream_bits, swap_memories
from .bits import (
    bits_of,
    bits_per_byte,
    bucket_sums,
    evaluation_mode,
    mean_and_standard_error,
    position_edges,
    token_bits,
)


__all__ = [
    "Ablation",
    "bits_of",
    "bits_per_byte",
    "bucket_sums",
    "empty_memories",
    "evaluation_mode",
    "freeze_memories",
    "mean_and_standard_error",
    "pass_on_memories",
    "position_edges",
    "stream_bits",
    "swap_memories",
    "token_bits",
]
