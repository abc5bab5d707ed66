"""Models or conditions measured on the same documents, and whether a saved model says the same in a new process.

Shapes: B documents, T tokens of a document, V vocabulary.
"""

import math
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from rmt_hf.evaluation.bits import bits_per_byte, mean_and_standard_error, position_edges


NEW_PROCESS = """
import sys, torch, rmt_hf
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(int(sys.argv[3]))
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    save_file({"logits": model(**load_file(sys.argv[2])).logits}, sys.argv[2])
"""


def logits_in_new_process(folder: Path, input_ids: torch.Tensor) -> torch.Tensor:
    """Logits (B, T, V) of a saved model, loaded through the Auto classes in a new process on the CPU.

    Args:
        folder: What `save_pretrained` wrote.
        input_ids: (B, T) int64.

    Raises:
        subprocess.CalledProcessError: If the new process fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        file = f"{scratch}/tensors.safetensors"
        save_file({"input_ids": input_ids.contiguous()}, file)
        # The same number of threads: sums may be split, and so rounded, by thread.
        command = [sys.executable, "-c", NEW_PROCESS, str(folder), file, str(torch.get_num_threads())]
        subprocess.run(command, check=True)
        return load_file(file)["logits"]


@dataclass(frozen=True)
class Comparison:
    """Models or conditions measured on the same documents; differences are paired, and errors are over documents.

    Documents may differ in length: each counts as far as it goes, and buckets end where only one document is left.

    Args:
        bits: (B, T - 1) for each model or condition by name, `reference` among them.
        token_bytes: (B, T - 1), UTF-8 bytes of the same tokens; 0 at padding.
        window_length: Tokens that are seen without memory; overall figures are of the positions beyond.
        reference: Name of what the others are compared with.

    Raises:
        ValueError: If the reference is missing, shapes differ, bits are NaN, or fewer than two documents are longer
            than the window.
    """

    bits: dict[str, torch.Tensor]
    token_bytes: torch.Tensor
    window_length: int
    reference: str = "own"

    def __post_init__(self) -> None:
        if self.reference not in self.bits:
            raise ValueError(f"reference must be one of {list(self.bits)}, got {self.reference!r}.")
        for name, bits in self.bits.items():
            if bits.shape != self.token_bytes.shape:
                raise ValueError(
                    f"bits of {name!r} must have the shape of token_bytes, {tuple(self.token_bytes.shape)}, got "
                    f"{tuple(bits.shape)}: measure all on the same documents."
                )
            if bits.isnan().any():
                raise ValueError(f"bits of {name!r} must be numbers, got NaN: the model or its state is not finite.")
        if self._num_shared_tokens <= self.window_length:
            raise ValueError(
                f"At least 2 documents must be longer than the window ({self.window_length}): give more documents, or "
                "longer ones."
            )

    @property
    def _num_shared_tokens(self) -> int:
        """Tokens of the second longest document, up to its last byte."""
        lengths = (self.token_bytes > 0) * torch.arange(2, self.token_bytes.shape[1] + 2)
        longest = F.pad(lengths, (1, 0)).amax(1).sort(descending=True).values
        return int(longest[1]) if len(longest) > 1 else 0

    @property
    def others(self) -> list[str]:
        """What is compared with the reference."""
        return [name for name in self.bits if name != self.reference]

    @property
    def edges(self) -> list[int]:
        """Edges of the position buckets."""
        return position_edges(self._num_shared_tokens, self.window_length)

    def by_document(self, name: str) -> torch.Tensor:
        """Bits per byte of each document beyond the window, (B,); NaN if it ends within."""
        edges = [self.window_length, self.token_bytes.shape[1] + 1]
        return bits_per_byte(self.bits[name], self.token_bytes, edges)[:, 0]

    def overall(self, name: str) -> tuple[float, float]:
        """Bits per byte beyond the window: mean and standard error."""
        return mean_and_standard_error(self.by_document(name))

    def overall_difference(self, name: str) -> tuple[float, float]:
        """By how much one is worse than the reference beyond the window: mean and standard error."""
        return mean_and_standard_error(self.by_document(name) - self.by_document(self.reference))

    def by_position(self, name: str) -> list[tuple[float, float]]:
        """Bits per byte in each bucket: mean and standard error."""
        columns = bits_per_byte(self.bits[name], self.token_bytes, self.edges).unbind(1)
        return [mean_and_standard_error(column) for column in columns]

    def difference_by_position(self, name: str) -> list[tuple[float, float]]:
        """By how much one is worse than the reference in each bucket: mean and standard error."""
        ours, theirs = (bits_per_byte(self.bits[key], self.token_bytes, self.edges) for key in (self.reference, name))
        return [mean_and_standard_error(column) for column in (theirs - ours).unbind(1)]

    def metrics(self) -> dict:
        """All figures, ready for JSON; each pair is a mean and its standard error; None for a document without any."""
        by_document = {name: self.by_document(name).tolist() for name in self.bits}
        return {
            "reference": self.reference,
            "window_length": self.window_length,
            "position_edges": self.edges,
            "bits_per_byte": {name: self.overall(name) for name in self.bits},
            "difference": {name: self.overall_difference(name) for name in self.others},
            "bits_per_byte_by_position": {name: self.by_position(name) for name in self.bits},
            "difference_by_position": {name: self.difference_by_position(name) for name in self.others},
            "bits_per_byte_by_document": {
                name: [None if math.isnan(value) else value for value in values] for name, values in by_document.items()
            },
        }
