"""Causal attention of windows on a CPU, a block of queries at a time, each with the keys that it may see and no others.

torch's kernel takes 512 keys at a time, so a causal mask saves it nothing up to there, and windows that overlap have to
be copied for it. Here windows are views, and keys behind the last query of a block are left out. It is the mathematics
of `attend`, by the same kernel.

Shapes: B rows, L query columns, L' key columns, W windows, H query heads, G key/value heads, D head width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from transformers.utils.import_utils import is_torch_greater_or_equal

from .layout_rmt import kept_causal_mask
from .memory_rmt import is_plain


BLOCK = 128  # queries: 64 is as good, 256 takes a tenth longer (docs/lab_book.md)
# Older kernels take as many key/value heads as query heads for granted; this version is known not to.
KERNEL_HAS_GROUPS = is_torch_greater_or_equal("2.13")


class Windows(NamedTuple):
    """Windows of one size, one after the other.

    Args:
        first: Query column where the first one begins.
        num_windows: W.
        step: Queries of a window: columns from the begin of one to the begin of the next.
        columns: Keys of a window; its last query sees them all, each earlier one a key less.
    """

    first: int
    num_windows: int
    step: int
    columns: int


class Block(NamedTuple):
    """Queries at one place of several windows, and the keys up to the last of them.

    Args:
        row: Which row; None for all of them, with one window each.
        queries: First column and number of the queries, in the first window.
        keys: The same for the keys.
        num_windows: W.
        step: Columns from one window to the next.
    """

    row: int | None
    queries: tuple[int, int]
    keys: tuple[int, int]
    num_windows: int
    step: int

    def view(self, states: torch.Tensor, first: int, length: int) -> torch.Tensor:
        """Columns of every window, (W or B, heads, length, D), of states (B, columns, heads, D)."""
        if self.row is None:
            return states[:, first : first + length].transpose(1, 2)
        end = first + (self.num_windows - 1) * self.step + length
        return states[self.row, first:end].unfold(0, length, self.step).transpose(2, 3)

    def add_to_keys(self, states: torch.Tensor, gradient: torch.Tensor) -> None:
        """Adds what each window has for its keys: in pieces, of which those of different windows do not overlap."""
        first, length = self.keys
        size = length if self.row is None else self.step
        for start in range(0, length, size):
            piece = gradient[:, :, start : start + size]
            self.view(states, first + start, piece.shape[2]).add_(piece)


def cut_into_blocks(windows: list[Windows], shift: int, num_rows: int) -> list[Block]:
    """The blocks of windows; key column i + `shift` is that of query column i."""
    blocks = []
    for first, num_windows, step, columns in windows:
        places: list[tuple[int | None, int, int]]
        if num_windows <= num_rows:  # fewer calls: window by window, each of all rows
            places = [(None, first + index * step, 1) for index in range(num_windows)]
        else:
            places = [(row, first, num_windows) for row in range(num_rows)]
        for row, first_query, count in places:
            for start in range(0, step, BLOCK):
                size = min(BLOCK, step - start)
                keys = (first_query + shift + step - columns, columns - step + start + size)
                blocks.append(Block(row, (first_query + start, size), keys, count, step))
    return blocks


def windows_from_the_start(length: int, segment: int, window: int) -> list[Windows]:
    """The windows of streams that begin here: the first one whole, whole segments, and what is left over."""
    first = min(window, length)
    num_segments, rest = divmod(length - first, segment)
    windows = [
        Windows(0, 1, first, first),
        Windows(first, num_segments, segment, window),
        Windows(length - rest, 1, rest, window - segment + rest),
    ]
    return [each for each in windows if each.num_windows and each.step]


def can_be_tiled(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether a layer may call `tiled_attention`: on a CPU, where SDPA is wanted and has the kernel used here."""
    is_wanted = module.config._attn_implementation == "sdpa"
    has_dropout = module.training and module.config.attention_dropout > 0
    is_alike = query.dtype == key.dtype == value.dtype and query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    has_kernel = query.shape[2] == key.shape[2] or KERNEL_HAS_GROUPS
    return is_wanted and is_plain(query) and query.is_cpu and is_alike and has_kernel and not has_dropout


def tiled_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    windows: list[Windows],
    scaling: float,
    shift: int = 0,
) -> torch.Tensor:
    """Causal attention of windows that together hold every query once.

    Args:
        query: (B, L, H, D).
        key, value: (B, L', G, D).
        windows: Where the queries are and how many keys they see.
        scaling: Factor of the attention scores.
        shift: Key column of query column 0.

    Returns:
        (B, L, H, D).
    """
    return _TiledAttention.apply(query, key, value, cut_into_blocks(windows, shift, len(query)), scaling)[0]


class _TiledAttention(torch.autograd.Function):
    """The kernel block by block, and its own backward pass, so that gradients of keys are summed where they lie."""

    @staticmethod
    def forward(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: list[Block], scaling: float
    ) -> tuple[torch.Tensor, ...]:
        kernel: Callable = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        output, sums = torch.empty_like(query), []
        for block in blocks:
            keys, values = (block.view(states, *block.keys) for states in (key, value))
            found, log_sum = kernel(
                block.view(query, *block.queries), keys, values, attn_mask=_mask(block, query), scale=scaling
            )
            block.view(output, *block.queries).copy_(found)
            sums.append(log_sum)
        return output, *sums

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[torch.Tensor, ...]) -> None:
        *states, ctx.blocks, ctx.scaling = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*states, *output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:
        if gradient is None:
            return (None,) * 5
        query, key, value, output, *sums = ctx.saved_tensors
        kernel: Callable = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        gradient = gradient.contiguous()
        of_query, of_key, of_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for block, log_sum in zip(ctx.blocks, sums, strict=True):
            given, asked, found = (block.view(states, *block.queries) for states in (gradient, query, output))
            keys, values = (block.view(states, *block.keys) for states in (key, value))
            states = (given, asked, keys, values, found, log_sum)
            gradients = kernel(*states, 0.0, False, attn_mask=_mask(block, query), scale=ctx.scaling)
            block.view(of_query, *block.queries).copy_(gradients[0])
            block.add_to_keys(of_key, gradients[1])
            block.add_to_keys(of_value, gradients[2])
        return of_query, of_key, of_value, None, None


def _mask(block: Block, like: torch.Tensor) -> torch.Tensor:
    """The causal mask of a block as the kernel wants it, (1, 1, queries, keys)."""
    return kept_causal_mask(block.queries[1], block.keys[1], like.device, like.dtype)
