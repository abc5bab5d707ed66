"""Bits of every token of long documents, for any causal language model, and their means per byte and position.

Shapes: B documents, T tokens of a document, V vocabulary.
"""

import inspect
import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..cache_rmt import reading_device


@torch.no_grad()
def token_bits(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    window: int | None = None,
    stride: int | None = None,
    slice_length: int = 512,
    show_progress: bool = False,
    piece_length: int | None = None,
) -> torch.Tensor:
    """Bits that each token of B documents costs a causal language model, read without dropout.

    Without `window` a document is one stream: the model reads it slice by slice, and its own cache carries the state;
    the bits are those of one forward pass over the whole document. With `window` nothing is carried: every `stride`
    tokens the model reads the last `window` tokens, so each token is predicted once, from at least `window - stride`
    tokens before it, or from all if there are fewer. Logits exist of one slice at a time.

    Args:
        model: Any `AutoModelForCausalLM`. To read streams it must take and return a cache, as `past_key_values` or
            `cache_params`. The cache of a full-attention model grows with the document.
        input_ids: (B, T) int64, on any device.
        attention_mask: (B, T), 1 at the tokens of a document and 0 at padding, which is on the right; None if there is
            no padding. The model does not get it: padding after a document changes nothing before it.
        window: The most tokens that the model sees at once, or None to read streams.
        stride: Tokens predicted from one window, 1 to `window`; half the window by default.
        slice_length: Tokens of a stream in one call.
        show_progress: Whether to show a progress bar.
        piece_length: Deprecated name of `slice_length`.

    Returns:
        (B, T - 1), float32 or wider, on the device of `input_ids`: the bits of tokens 1 .. T - 1, and 0 for padding.
        Token 0 is never predicted: a document of one token alone costs nothing.

    Raises:
        ValueError: If shapes, padding or lengths are wrong, or the model returns no cache between slices.

    Source: ours; strided windows as in the transformers guide "Perplexity of fixed-length models".
    """
    _check_documents(input_ids, attention_mask)
    if piece_length is not None:
        message = "piece_length is now called slice_length, and goes in the next version."
        warnings.warn(message, FutureWarning, stacklevel=3)
        slice_length = piece_length
    if window is None and stride is not None:
        raise ValueError(f"stride is only for windows, got stride={stride} without window: give both, or neither.")
    if slice_length < 1 or (window is not None and window < 1):
        raise ValueError(f"window and slice_length must be at least 1, got {window} and {slice_length}.")
    ids, bits = input_ids.to(reading_device(model)), [torch.zeros(len(input_ids), 0)]
    step = slice_length if window is None else max(1, window // 2) if stride is None else stride
    if window is not None and not 1 <= step <= window:
        raise ValueError(f"stride must be from 1 to window ({window}), got {stride}: a larger one skips tokens.")
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
    """Logits (B, length or less, V) of slice after slice with carried state; the last token is not read."""
    name = "cache_params" if "cache_params" in inspect.signature(model.forward).parameters else "past_key_values"
    cache = None
    for start in range(0, input_ids.shape[1] - 1, length):
        if start and cache is None:
            raise ValueError(
                f"model must return a cache as {name} to read a stream, and {type(model).__name__} does not: give a "
                f"window, or a slice_length of {input_ids.shape[1] - 1} to read each document in one call."
            )
        columns = input_ids[:, start : min(start + length, input_ids.shape[1] - 1)]
        outputs = model(input_ids=columns, use_cache=True, **{name: cache})
        cache = outputs.get(name)
        yield outputs.logits


def _read_windows(model: PreTrainedModel, input_ids: torch.Tensor, window: int, stride: int) -> Iterator[torch.Tensor]:
    """Logits (B, stride or less, V) that each window adds."""
    can_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
    for start in range(0, input_ids.shape[1] - 1, stride):
        end = min(start + stride, input_ids.shape[1] - 1)
        keep = {"logits_to_keep": end - start} if can_keep else {}
        begin = max(0, start + stride - window)  # not from `end`, so that the length of a document changes no window
        yield model(input_ids=input_ids[:, begin:end], use_cache=False, **keep).logits[:, start - end :]


def bits_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Bits that each target costs, (B, L), float32 or wider.

    Args:
        logits: (B, L, V).
        targets: (B, L) int64, on the same device.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    # Row by row: over an axis that is not the last one, float32 sums of a large vocabulary are off by 1e-4 bits.
    bits = F.cross_entropy(wide.flatten(0, 1), targets.flatten(), reduction="none") / math.log(2)
    return bits.view(targets.shape)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Puts a model in evaluation mode inside the context, then back in its mode.

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
    """Sums over the tokens of each document within each bucket of positions.

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
        samples: (B,), one number of each document, for example a paired difference; NaN for none.

    Raises:
        ValueError: If fewer than two documents have a number.
    """
    samples = samples[~samples.isnan()]
    if len(samples) < 2:
        raise ValueError(f"A standard error needs at least 2 documents that reach so far, got {len(samples)}.")
    return samples.mean().item(), samples.std().item() / len(samples) ** 0.5
