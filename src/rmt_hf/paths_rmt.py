"""The attention paths as functions, all segments or chunks at once, and the one place that calls an attention kernel.

`module` is the layer's `RMTAttention` everywhere. Shapes: B rows, L aligned columns (see layout_rmt), F segments,
S segment length, N lookback segments, V versions of memory, M slots, H query heads, G key/value heads, D head width.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_rmt import RMTConfig
from .layers_rmt import has_own_form, keep_factors, pieces, rotate
from .layout_rmt import causal_mask, kept_causal_mask
from .memory_rmt import Slots, at_least_float32, is_plain, own_heads


PLAIN = (None, "eager", "sdpa")  # implementations that are the same mathematics


class Sink(NamedTuple):
    """What stands before the window of each segment that the beginning of its stream has left.

    Args:
        keys: (B or 1, F, 1, G, D), with rotary encoding.
        values: (1, G, D).
    """

    keys: torch.Tensor
    values: torch.Tensor

    def before(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of windows, (B, F, columns, G, D), with the sink as column 0."""
        shape = (*keys.shape[:2], 1, *keys.shape[3:])
        sinks = (states.to(keys.dtype).expand(shape) for states in self)
        first, second = (torch.cat([sink, states], 2) for sink, states in zip(sinks, (keys, values), strict=True))
        return first, second


class Projections(NamedTuple):
    """What attention makes of the aligned hidden states: (B, L, heads, D) each, scores (B, L, ...); and the sink.

    The memory query of new streams is that of tokens beyond the first window alone: before, memory is empty. Neither
    query is there if the state after the call is all that is wanted.
    """

    query: torch.Tensor | None
    key: torch.Tensor
    unrotated_key: torch.Tensor
    value: torch.Tensor
    memory_query: torch.Tensor | None
    scores: torch.Tensor
    sink: Sink | None


class Paths(NamedTuple):
    """Outputs of the three paths, (B, L, H, D) each; None for a path that gives nothing in this call.

    That of memory may have the last columns alone: before, it is zero.
    """

    from_global: torch.Tensor
    from_local: torch.Tensor | None
    from_memory: torch.Tensor | None


class Shares(NamedTuple):
    """What the output of each path is multiplied with: (B, L, H, 1), one number, or None for 1 or where no path is."""

    of_global: torch.Tensor | None
    of_local: torch.Tensor | None
    of_memory: torch.Tensor | None


class RMTSink(nn.Module):
    """A key and a value that every token sees directly before its window, once the stream's beginning has left it.

    Heads of a pretrained model rest on the first token when there is nothing to find, and lose their way without it.

    Source: Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks". Departs from it: the sink is
    learned, or of the begin-of-text token in a converted model, so that it is no part of the state.
    """

    def __init__(self, config: RMTConfig) -> None:
        super().__init__()
        self.key = nn.Parameter(torch.empty(config.key_value_shape))  # (G, D), without rotary encoding
        self.value = nn.Parameter(torch.empty(config.key_value_shape))

    def forward(self, cos: torch.Tensor, sin: torch.Tensor) -> Sink:
        """The sink as the windows of F segments want it, which tables (B or 1, F, 1, D) say."""
        return Sink(rotate(own_heads(self.key), cos, sin)[:, :, None], own_heads(self.value)[None])


class RMTFusionGate(nn.Linear):
    """The map from hidden states to the gates of the extra paths; a class of its own for its initial bias."""

    def __init__(self, config: RMTConfig, exists: tuple[bool, bool]) -> None:
        super().__init__(config.hidden_size, config.num_attention_heads * sum(exists))
        self.exists = exists


class RMTFusion(nn.Module):
    """What each path counts in the sum: a gate for each head and token, or trainable scalars of the layer.

    A module and not a few parameters of the attention, so that adapters can train it and nothing else.

    Source: section 3 of arXiv 2507.00453 for the scalars; gates are ours.
    """

    def __init__(self, config: RMTConfig) -> None:
        super().__init__()
        self.fusion_type = config.fusion_type
        self.exists = (config.use_local_attention, config.num_memory_slots > 0)
        num_extra_paths, num_heads = sum(self.exists), config.num_attention_heads
        if num_extra_paths and config.fusion_type == "gated":
            self.gate = RMTFusionGate(config, self.exists)
            self.scale = nn.Parameter(torch.empty(num_heads, num_extra_paths))
        elif num_extra_paths:
            self.logits = nn.Parameter(torch.empty(1 + num_extra_paths))

    def forward(self, hidden_states: torch.Tensor) -> Shares:
        """What each path counts for states (..., E): (..., H, 1), or with softmax fusion one number for the layer."""
        if not any(self.exists):
            return Shares(None, None, None)
        if self.fusion_type == "softmax":
            first, *rest = at_least_float32(self.logits).softmax(0).to(hidden_states.dtype).unbind()
        else:
            gates = at_least_float32(self.gate(hidden_states)).sigmoid().unflatten(-1, (-1, sum(self.exists)))
            gates = (gates * at_least_float32(own_heads(self.scale))).to(hidden_states.dtype)  # (..., H, paths)
            first, rest = None, list(gates.split(1, -1))
        return Shares(first, *(rest.pop(0) if there else None for there in self.exists))


class _Fusion(torch.autograd.Function):
    """output + share * path in the columns of the path, the last ones; shares are (B, L, H, 1)."""

    @staticmethod
    def forward(output: torch.Tensor, share: torch.Tensor, path: torch.Tensor) -> torch.Tensor:
        first = output.shape[1] - path.shape[1]
        if not first:
            return torch.addcmul(output, share, path)
        output = output.clone()
        output[:, first:].addcmul_(share[:, first:], path)
        return output

    setup_context = staticmethod(keep_factors)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if gradient is None:
            return None, None, None
        share, path = ctx.saved_tensors
        first = gradient.shape[1] - path.shape[1]
        given, part = gradient[:, first:], share[:, first:]
        if torch.is_grad_enabled():  # the gradient is to have a gradient
            return gradient, F.pad((given * path).sum(-1, keepdim=True), (0, 0, 0, 0, first, 0)), given * part
        of_share, of_path = torch.zeros_like(share), torch.empty_like(path)
        for each, factor, seen, *found in pieces(given, part, path, of_share[:, first:], of_path):
            torch.sum(each * seen, -1, keepdim=True, out=found[0])
            torch.mul(each, factor, out=found[1])
        return gradient, of_share, of_path


def fuse(shares: Shares, paths: Paths) -> torch.Tensor:
    """Adds the paths up, each with its share: (B, L, H, D). A path that gives nothing in this call counts as zero."""
    output = paths.from_global if shares.of_global is None else shares.of_global * paths.from_global
    for share, path in zip(shares[1:], paths[1:], strict=True):
        if share is None or path is None:
            continue
        if share.dim() and has_own_form(output, share, path):
            output = _Fusion.apply(output, share, path)
            continue
        missing = output.shape[1] - path.shape[1]
        whole = F.pad(path, (0, 0, 0, 0, missing, 0)) if missing else path
        output = torch.addcmul(output, share, whole)
    return output


def eager_attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in plain PyTorch: (B, H, Lq, D), (B, G, Lk, D), additive mask; returns (B, Lq, H, D) and weights."""
    key = key.repeat_interleave(module.num_key_value_groups, 1)
    value = value.repeat_interleave(module.num_key_value_groups, 1)
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = at_least_float32(weights).softmax(-1).to(query.dtype)
    weights = F.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def causal_block_mask(num_queries: int, num_keys: int, device: torch.device) -> BlockMask:
    """`causal_mask` as flex attention wants it: it leaves out blocks of which nothing is seen."""
    later = num_keys - num_queries

    def is_seen(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return key <= query + later

    return create_block_mask(is_seen, None, None, num_queries, num_keys, device=str(device))


kept_block_mask = lru_cache(maxsize=16)(torch.inference_mode(False)(causal_block_mask))  # see `kept_causal_mask`


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | BlockMask | None = None,
    is_causal: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Softmax attention through the implementation that the configuration names.

    Args:
        query: (B, Lq, H, D).
        key, value: (B, Lk, G, D).
        mask: (B or 1, 1, Lq, Lk) bool, True where a key is seen; replaces `is_causal`.
        is_causal: Whether the last query sees all keys, each earlier one a key less; else all see all.

    Returns:
        (B, Lq, H, D), and the weights (B, H, Lq, Lk) if the implementation gives them.

    Raises:
        ValueError: If the implementation takes no mask and one is needed.
    """
    implementation = module.config._attn_implementation or "eager"
    num_queries, num_keys = query.shape[1], key.shape[1]
    is_causal = is_causal and mask is None and num_queries > 1
    if "flash" in implementation:
        if mask is not None:
            raise ValueError(
                f"attn_implementation={implementation!r} takes no mask, which this call needs (rows at different "
                "places of their segments, tokens across a chunk end, or a segment end before the window is full or, "
                "with an attention sink, before the stream's beginning has left it): "
                "use attn_implementation='sdpa'."
            )
    elif is_causal and (implementation != "sdpa" or num_queries != num_keys):
        is_kept = is_plain(query) and num_queries != num_keys  # a window, of which there are few shapes
        make_mask: Callable
        if implementation == "flex_attention":
            make_mask = kept_block_mask if is_kept else causal_block_mask
        else:
            make_mask = kept_causal_mask if is_kept else causal_mask
        mask, is_causal = make_mask(num_queries, num_keys, query.device), False
    if isinstance(mask, torch.Tensor) and implementation != "sdpa":
        additive = torch.zeros(mask.shape, dtype=query.dtype, device=query.device)
        mask = additive.masked_fill(~mask, torch.finfo(query.dtype).min).expand(query.shape[0], -1, -1, -1)
    interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
    return interface(
        module,
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        mask,
        dropout=module.config.attention_dropout if module.training else 0.0,
        scaling=module.scaling,
        is_causal=is_causal,
    )


def local_attention(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention inside each chunk, all chunks at once: (B, L, H, D) whose column 0 starts a chunk."""
    batch, length = query.shape[:2]
    chunk = module.config.chunk_length
    query, key, value = (
        pad_columns(states, chunk).reshape(-1, chunk, *states.shape[2:]) for states in (query, key, value)
    )
    return first_columns(attend(module, query, key, value)[0].unflatten(0, (batch, -1)).flatten(1, 2), length)


def windows_of(states: torch.Tensor, config: RMTConfig) -> torch.Tensor:
    """Each segment with the N before it: (B, (N + F) * S, ...) to (B, F, (N + 1) * S, ...)."""
    segment, lookback = config.segment_length, config.num_lookback_segments
    segments = states.unflatten(1, (-1, segment))
    if lookback == 0:
        return segments
    firsts = torch.arange(segments.shape[1] - lookback, device=states.device)[:, None]
    seen = firsts + torch.arange(lookback + 1, device=states.device)
    return segments.index_select(1, seen.flatten()).reshape(
        states.shape[0], -1, config.window_length, *states.shape[2:]
    )


def windowed_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    sink: Sink | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Global attention of whole segments to their windows, all segments at once.

    Args:
        query: (B, F * S, H, D).
        key, value: (B, F, (N + 1) * S, G, D), as `windows_of` gives them.
        mask: (B * F, 1, S, (N + 1) * S) bool, one more column if there is a sink; None if all is seen.
        sink: What stands before each window.

    Returns:
        (B, F * S, H, D), and the weights (B * F, H, S, (N + 1) * S), without the sink, if the implementation gives
        them.
    """
    if sink is not None:
        key, value = sink.before(key, value)
    segments = query.reshape(-1, module.config.segment_length, *query.shape[2:])
    output, weights = attend(module, segments, key.flatten(0, 1), value.flatten(0, 1), mask)
    return output.reshape(query.shape), without_sink(weights, sink)


def without_sink(weights: torch.Tensor | None, sink: Sink | None) -> torch.Tensor | None:
    """Attention weights (..., columns) of the tokens alone."""
    return weights if weights is None or sink is None else weights[..., 1:]


def memory_attention(module: Any, query: torch.Tensor, memory: Slots) -> torch.Tensor:
    """Attention to memory as each segment finds it.

    Args:
        query: (B, V * L', H, D), the memory queries, L' of them for each version.
        memory: Slots (B, V, M, G, D).

    Returns:
        (B, V * L', H, D); exactly zero where memory is empty.
    """
    versions = memory.strengths.shape[1]
    keys, values = module.memory.readable(memory.map(lambda tensor: tensor.flatten(0, 1)), module.scaling)
    asked = module.memory.ask(query.unflatten(1, (versions, -1)).flatten(0, 1))
    output, _ = attend(module, asked, keys, values, is_causal=False)
    return output[..., : query.shape[-1]].reshape(query.shape)


def masked_softmax(scores: torch.Tensor, mask: torch.Tensor | None, num_heads: int) -> torch.Tensor:
    """Weights (B * heads, L, keys) of scores that `mask`, (B, 1, L, keys), leaves in; in float32 or wider."""
    wide = at_least_float32(scores)
    if mask is not None:
        hidden = ~mask.expand(-1, num_heads, -1, -1).flatten(0, 1)
        wide = wide.masked_fill(hidden, -torch.inf)
    return wide.softmax(-1).to(scores.dtype)


def pad_columns(states: torch.Tensor, multiple: int) -> torch.Tensor:
    """(B, L, ...) with zeros behind, so that L is a multiple."""
    missing = -states.shape[1] % multiple
    return F.pad(states, (*[0, 0] * (states.dim() - 2), 0, missing)) if missing else states


def first_columns(states: torch.Tensor, length: int) -> torch.Tensor:
    """The first `length` columns of (B, L, ...); no slice, whose backward pass is costly, for nothing."""
    return states if states.shape[1] <= length else states[:, :length]
