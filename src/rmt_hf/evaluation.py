"""Bits of every token of long documents, for any causal language model, and what they say per byte and position.

Shapes: B documents, T tokens of a document, V vocabulary. A home file: it does not travel with the weights.
"""

import inspect
import itertools
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel


@torch.no_grad()
def token_bits(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    window: int | None = None,
    stride: int | None = None,
    piece_length: int = 512,
    show_progress: bool = False,
) -> torch.Tensor:
    """Bits that each token of B documents costs a causal language model, read without dropout.

    Without `window` a document is one stream: it is read piece by piece, and the model's own cache carries the state
    all the way; the bits are those of one forward pass over the whole document. With `window` nothing is carried: every
    `stride` tokens the model reads anew the last `window` tokens, so each token is predicted once, from at least
    `window - stride` tokens before it, or from all if there are fewer. Logits are never held of more than one piece.

    Args:
        model: Any `AutoModelForCausalLM`. For streams it has to take and hand back a cache, as `past_key_values` or
            `cache_params`. What a full-attention model caches grows with the document.
        input_ids: (B, T) int64, on any device.
        attention_mask: (B, T), 1 at the tokens of a document and 0 at padding, which is on the right; None if there is
            no padding. The model is not shown it: what follows a document changes nothing before it.
        window: The most tokens that the model sees at once, or None to read streams.
        stride: Tokens predicted from one window, 1 to `window`; half the window by default.
        piece_length: Tokens of a stream in one call.
        show_progress: Whether to show a progress bar.

    Returns:
        (B, T - 1), float32 or wider, on the device of `input_ids`: the bits of tokens 1 .. T - 1, and 0 for padding.
        Token 0 is never predicted: a document of one token alone costs nothing.

    Raises:
        ValueError: If shapes, padding or lengths are not as said, or the model keeps no state between pieces.

    Source: ours; strided windows as in the transformers guide "Perplexity of fixed-length models".
    """
    _check_documents(input_ids, attention_mask)
    if window is None and stride is not None:
        raise ValueError(f"stride is only for windows, got stride={stride} without window: give both, or neither.")
    if piece_length < 1 or (window is not None and window < 1):
        raise ValueError(f"window and piece_length must be at least 1, got {window} and {piece_length}.")
    ids, bits = input_ids.to(model.device), [torch.zeros(len(input_ids), 0)]
    step = piece_length if window is None else max(1, window // 2) if stride is None else stride
    if window is not None and not 1 <= step <= window:
        raise ValueError(f"stride must be from 1 to window ({window}), got {stride}: tokens between would be left out.")
    calls = _read_stream(model, ids, step) if window is None else _read_windows(model, ids, window, step)
    with evaluation_mode(model):
        starts = range(1, ids.shape[1], step)
        for start, logits in zip(tqdm(starts, desc="Evaluating", disable=not show_progress), calls, strict=True):
            bits.append(bits_of(logits, ids[:, start : start + step]).to(input_ids.device))
    found = torch.cat([part.to(bits[-1]) for part in bits], 1)
    return found if attention_mask is None else found.masked_fill(attention_mask[:, 1:].to(found.device) == 0, 0)


def _check_documents(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
    if input_ids.dim() != 2 or not input_ids.numel():
        raise ValueError(
            f"input_ids must be (documents, tokens) with at least one of each, got {tuple(input_ids.shape)}: give "
            "input_ids[None] for one document."
        )
    if attention_mask is None:
        return
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_ids, {tuple(input_ids.shape)}, got "
            f"{tuple(attention_mask.shape)}."
        )
    is_real = attention_mask != 0
    if not is_real[:, 0].all() or (is_real[:, 1:] & ~is_real[:, :-1]).any():
        raise ValueError(
            "attention_mask must have padding on the right only, and a token in every row: tokenize with "
            "padding_side='right', or evaluate documents one by one."
        )


def _read_stream(model: PreTrainedModel, input_ids: torch.Tensor, length: int) -> Iterator[torch.Tensor]:
    """Logits (B, length or less, V) of one piece after the other, the state carried; the last token is not read."""
    name = "cache_params" if "cache_params" in inspect.signature(model.forward).parameters else "past_key_values"
    cache = None
    for start in range(0, input_ids.shape[1] - 1, length):
        if start and cache is None:
            raise ValueError(
                f"model must hand back a cache as {name} to read a stream, and {type(model).__name__} does not: give a "
                f"window, or a piece_length of {input_ids.shape[1] - 1} to read each document in one call."
            )
        piece = input_ids[:, start : min(start + length, input_ids.shape[1] - 1)]
        outputs = model(input_ids=piece, use_cache=True, **{name: cache})
        cache = outputs.get(name)
        yield outputs.logits


def _read_windows(model: PreTrainedModel, input_ids: torch.Tensor, window: int, stride: int) -> Iterator[torch.Tensor]:
    """Logits (B, stride or less, V) that each window adds."""
    can_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
    for start in range(0, input_ids.shape[1] - 1, stride):
        end = min(start + stride, input_ids.shape[1] - 1)
        keep = {"logits_to_keep": end - start} if can_keep else {}
        begin = max(0, start + stride - window)  # not from the end: where a document ends changes no window
        yield model(input_ids=input_ids[:, begin:end], use_cache=False, **keep).logits[:, start - end :]


def bits_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Bits that each target costs, (B, L), float32 or wider.

    Args:
        logits: (B, L, V).
        targets: (B, L) int64, on the same device.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide.transpose(1, 2), targets, reduction="none") / math.log(2)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """The model without dropout for a while, then in the mode it was in.

    Args:
        model: Changed in place.
    """
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


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
        bits: (B, T - 1), as `token_bits` returns them.
        token_bytes: (B, T - 1), UTF-8 bytes of the same tokens; 0 at padding.
        edges: Token positions, rising; position 0 itself is never predicted.

    Returns:
        (B, len(edges) - 1) float64; NaN where a document has no bytes.
    """
    return bucket_sums(bits, edges) / bucket_sums(token_bytes, edges)


def bucket_sums(numbers: torch.Tensor, edges: Sequence[int]) -> torch.Tensor:
    """What the tokens of each document have together within each bucket of positions.

    Args:
        numbers: (B, T - 1), one for each of the tokens 1 .. T - 1.
        edges: Token positions, rising.

    Returns:
        (B, len(edges) - 1) float64.
    """
    spans = [slice(max(start, 1) - 1, end - 1) for start, end in itertools.pairwise(edges)]
    return torch.stack([numbers[:, span].double().sum(1) for span in spans], 1)


def mean_and_standard_error(samples: torch.Tensor) -> tuple[float, float]:
    """Mean over documents and its standard error.

    Args:
        samples: (B,), one number (a paired difference, say) of each document; NaN of those that have none.

    Raises:
        ValueError: If fewer than two documents have a number.
    """
    samples = samples[~samples.isnan()]
    if len(samples) < 2:
        raise ValueError(f"A standard error needs at least 2 documents that reach so far, got {len(samples)}.")
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
