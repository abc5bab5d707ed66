"""What memory is worth on held-out text: bits of every token, with the stream's own memory, with none, with another's.

Shapes: B documents, T tokens of a document, S segment length. A home file: it does not travel with the weights.
"""

import itertools
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from tqdm.auto import tqdm

from .cache_rmt import RMTCache
from .modeling_rmt import RMTForCausalLM


CONDITIONS = ("own", "empty", "other")


@torch.no_grad()
def stream_bits(model: RMTForCausalLM, input_ids: torch.Tensor, show_progress: bool = False) -> dict[str, torch.Tensor]:
    """Bits that each token of B documents costs, read segment by segment with the state carried all the way.

    The documents advance in lockstep. Before every segment the memory of the `"empty"` streams is emptied, and the
    `"other"` streams are lent the memory that the next document's `"own"` stream has written up to the same position;
    the window always is a stream's own.

    Args:
        model (`RMTForCausalLM`): The model; read without dropout. Without memory only `"own"` is returned.
        input_ids: (B, T) int64, T at least 2; B at least 2 if the model has memory. No padding.
        show_progress: Whether to show a progress bar over segments.

    Returns:
        For each of the conditions `"own"`, `"empty"`, `"other"` the bits (B, T - 1), float32, of tokens 1 .. T - 1.

    Raises:
        ValueError: If there are too few tokens, or no other document to borrow a memory from.

    Source: ours.
    """
    has_memory = model.config.num_memory_slots > 0
    if input_ids.dim() != 2 or input_ids.shape[1] < 2 or len(input_ids) < (2 if has_memory else 1):
        raise ValueError(
            f"input_ids must be (documents, tokens), at least 2 tokens and, with memory, 2 documents; got "
            f"{tuple(input_ids.shape)}: give more documents, or shorter ones so that more are long enough."
        )
    conditions = CONDITIONS if has_memory else CONDITIONS[:1]
    segment, was_training = model.config.segment_length, model.training
    # Without memory nothing has to be exchanged between segments, so a call may be longer.
    piece = segment if has_memory else segment * max(1, 512 // segment)
    cache, bits = RMTCache(model.config), []
    model.eval()
    for start in tqdm(range(0, input_ids.shape[1] - 1, piece), desc="Evaluating", disable=not show_progress):
        if has_memory:
            exchange_memories(cache)
        inputs = input_ids[:, start : start + piece].repeat(len(conditions), 1)
        targets = input_ids[:, start + 1 : start + piece + 1].repeat(len(conditions), 1)
        logits = model(inputs, past_key_values=cache, use_cache=True).logits[:, : targets.shape[1]]
        bits.append(F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none") / math.log(2))
    model.train(was_training)
    return dict(zip(conditions, torch.cat(bits, 1).chunk(len(conditions)), strict=True))


def exchange_memories(cache: RMTCache) -> None:
    """Empties the memory of the second third of the rows; lends the last third that of the first, moved on by one row.

    Args:
        cache: State of 3 * B streams, at the start of a segment; changed in place. An empty state stays empty.
    """

    def lend(tensor: torch.Tensor) -> torch.Tensor:
        own, empty, _ = tensor.chunk(3)
        return torch.cat([own, empty, own.roll(-1, 0)])

    for layer in cache.layers:
        if layer.state is not None and layer.state.memory is not None:
            memory = layer.state.memory.map(lend)
            memory.strengths.chunk(3)[1].fill_(-torch.inf)
            layer.state = layer.state._replace(memory=memory)


def position_edges(num_tokens: int, first: int) -> list[int]:
    """Edges of position buckets that double: 0, first, 2 * first, ... , num_tokens.

    Args:
        num_tokens: Tokens of a document.
        first: Width of the first bucket, tokens.
    """
    edges = [0, first]
    while edges[-1] * 2 <= num_tokens:
        edges.append(edges[-1] * 2)
    return [*(edge for edge in edges if edge < num_tokens), num_tokens]


def bits_per_byte(bits: torch.Tensor, token_bytes: torch.Tensor, edges: Sequence[int]) -> torch.Tensor:
    """Bits per byte of each document within each bucket of positions.

    Args:
        bits: (B, T - 1), as `stream_bits` returns them.
        token_bytes: (B, T - 1), UTF-8 bytes of the same tokens.
        edges: Token positions, rising; position 0 itself is never predicted.

    Returns:
        (B, len(edges) - 1) float64.
    """
    spans = [slice(max(start, 1) - 1, end - 1) for start, end in itertools.pairwise(edges)]
    return torch.stack([bits[:, span].double().sum(1) / token_bytes[:, span].sum(1) for span in spans], 1)


def mean_and_standard_error(samples: torch.Tensor) -> tuple[float, float]:
    """Mean over documents and its standard error.

    Args:
        samples: (B,), one number (a paired difference, say) of each document; B at least 2.
    """
    return samples.mean().item(), samples.std().item() / len(samples) ** 0.5


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
    """Conditions measured on the same documents; differences are paired, and errors are over documents.

    Args:
        bits: (B, T - 1) for each condition by name, `"own"` among them: what the others are compared with.
        token_bytes: (B, T - 1), UTF-8 bytes of the same tokens.
        window_length: Tokens that are seen without memory; overall figures are of the positions beyond.
    """

    bits: dict[str, torch.Tensor]
    token_bytes: torch.Tensor
    window_length: int

    @property
    def others(self) -> list[str]:
        """The conditions that are compared with `"own"`."""
        return [name for name in self.bits if name != "own"]

    @property
    def edges(self) -> list[int]:
        """Edges of the position buckets."""
        return position_edges(self.token_bytes.shape[1] + 1, self.window_length)

    def by_document(self, name: str) -> torch.Tensor:
        """Bits per byte of each document beyond the window, (B,)."""
        edges = [self.window_length, self.token_bytes.shape[1] + 1]
        return bits_per_byte(self.bits[name], self.token_bytes, edges)[:, 0]

    def overall(self, name: str) -> tuple[float, float]:
        """Bits per byte beyond the window: mean and standard error."""
        return mean_and_standard_error(self.by_document(name))

    def overall_difference(self, name: str) -> tuple[float, float]:
        """By how much a condition is worse than `"own"` beyond the window: mean and standard error."""
        return mean_and_standard_error(self.by_document(name) - self.by_document("own"))

    def by_position(self, name: str) -> list[tuple[float, float]]:
        """Bits per byte in each bucket: mean and standard error."""
        columns = bits_per_byte(self.bits[name], self.token_bytes, self.edges).unbind(1)
        return [mean_and_standard_error(column) for column in columns]

    def difference_by_position(self, name: str) -> list[tuple[float, float]]:
        """By how much a condition is worse than `"own"` in each bucket: mean and standard error."""
        ours, theirs = (bits_per_byte(self.bits[key], self.token_bytes, self.edges) for key in ("own", name))
        return [mean_and_standard_error(column) for column in (theirs - ours).unbind(1)]

    def metrics(self) -> dict:
        """All figures, ready for JSON; each pair is a mean and its standard error."""
        return {
            "window_length": self.window_length,
            "position_edges": self.edges,
            "bits_per_byte": {name: self.overall(name) for name in self.bits},
            "difference": {name: self.overall_difference(name) for name in self.others},
            "bits_per_byte_by_position": {name: self.by_position(name) for name in self.bits},
            "difference_by_position": {name: self.difference_by_position(name) for name in self.others},
            "bits_per_byte_by_document": {name: self.by_document(name).tolist() for name in self.bits},
        }
