"""Attention: rotary encoding, the sink, the fusion of paths, and the layer's attention over prefix and window.

Shapes: B rows, T columns of a call, F views, W writes (see layout_rmt), S segment length, N lookback segments, M slots,
P columns of the prefix (slots and sink), H query heads, G key/value heads, D head width, E hidden size.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_rmt import RMTConfig
from .layout_rmt import CallLayout, ViewGroup
from .memory_rmt import (
    RMTMemory,
    RMTPerHead,
    RMTSink,
    Segments,
    Slots,
    at_least_float32,
    attention_evidence,
    in_order,
    own_heads,
)
from .state_rmt import LayerState, StateSizes, oldest_groups


class RMTRMSNorm(nn.Module):
    """Root mean square norm over the last axis, computed in float32 or wider."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.weight.to(hidden_states.dtype)
        return F.rms_norm(hidden_states, weight.shape, weight, self.eps).to(hidden_states.dtype)  # else autocast widens


def rotary_revolutions(config: RMTConfig) -> torch.Tensor:
    """Revolutions per position in units of 2^-64, (D / 2,) int64, for the frequencies of Llama, rounded to float32."""
    parameters, (_, width) = cast(dict[str, Any], config.rope_parameters), config.key_value_shape
    if parameters["rope_type"] == "default":
        exponents = torch.arange(0, width, 2, dtype=torch.float, device="cpu") / width
        frequencies = 1.0 / parameters["rope_theta"] ** exponents
    else:
        with torch.device("cpu"):  # not everything in there is made where it is asked for
            frequencies, _ = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"))
    return (frequencies.double() / (2 * math.pi) * 2.0**64).to(torch.int64)


Rotary = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, (..., 1, D) each
Pair = tuple[torch.Tensor, torch.Tensor]  # keys and values


class Tables(NamedTuple):
    """What all layers need of a call: rotary tables and masks."""

    columns: Rotary
    writes: Rotary | None  # of the segments that are written
    prefixes: Rotary | None  # of the prefix of each view
    after: Rotary | None  # of the prefix in the state after the call
    mask: torch.Tensor | None  # None where queries can do without
    chunk_mask: torch.Tensor | None


class RMTRotaryEmbedding(nn.Module):
    """Cosine and sine tables that do not lose precision along a stream.

    Angles are integers: position times revolutions per position, modulo 2^64, which int64 does by itself.

    Source: section 3.4 of arXiv 2507.00453 ("rotary encoding per head"); the integer form is ours.
    """

    def __init__(self, config: RMTConfig) -> None:
        super().__init__()
        self.config = config
        self.revolutions = nn.Buffer(rotary_revolutions(config), persistent=False)

    def _apply(self, *args: Any, **kwargs: Any) -> "RMTRotaryEmbedding":
        """As every module; the numbers are made anew, because `to_empty` and a way over `meta` leave none."""
        super()._apply(*args, **kwargs)
        device = "cpu" if self.revolutions.is_meta else self.revolutions.device
        self._buffers["revolutions"] = rotary_revolutions(self.config).to(device)
        return self

    @torch.no_grad()
    def forward(self, position_ids: torch.Tensor, dtype: torch.dtype) -> Rotary:
        """Position ids (...) int64 to cosine and sine, each (..., 1, D), the first half of the sines negated."""
        revolutions = position_ids[..., None] * self.revolutions.to(position_ids.device)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        angles = revolutions.to(wide) * (2 * math.pi / 2.0**64)
        cos, sin = angles.cos()[..., None, :], angles.sin()[..., None, :]
        return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)

    def of_call(self, layout: CallLayout, dtype: torch.dtype, keep_state: bool) -> Tables:
        """The tables of a call."""
        config, indices, device = self.config, layout.indices, layout.indices.device
        segment, lookback, prefix = config.segment_length, config.num_lookback_segments, config.prefix_length
        view = (indices // segment).expand(layout.first_views.shape[0], -1)
        columns = indices - layout.first_views.gather(1, view.clamp_max(layout.num_views - 1)) * segment
        writes = prefixes = after = None
        if layout.num_writes and config.num_memory_slots:
            segments = torch.arange(layout.num_writes, device=device) - lookback
            starts = (segments - layout.began(segments)) * segment
            writes = self((starts[..., None] + torch.arange(segment, device=device)).flatten(1), dtype)
        if prefix and (layout.num_views > 1 or layout.refreshes):
            prefixes = self(self.prefix_positions((layout.view_segments - lookback) * segment), dtype)
        if prefix and keep_state and (layout.num_writes or layout.num_views > 1):
            after = self(self.prefix_positions((layout.segments_after - lookback) * segment)[:, None], dtype)
        # A compiled call looks at all columns through a mask, so that it is the same at every position.
        is_masked = torch.compiler.is_compiling() or not (layout.lead or layout.groups)
        mask = layout.window_mask(config) if is_masked else None
        is_masked = is_masked and layout.num_views == 1 and config.use_local_attention
        chunk_mask = layout.chunk_mask(config) if is_masked else None
        return Tables(self(columns, dtype), writes, prefixes, after, mask, chunk_mask)

    def prefix_positions(self, starts: torch.Tensor) -> torch.Tensor:
        """Positions of the prefix of windows that begin at `starts`, (...) int64 to (..., P).

        The prefix ends directly before its window. What is before the last columns, as many as there are present slots,
        is up to `lasting_distance` farther back, but not before the stream.
        """
        config, before = self.config, torch.arange(-self.config.prefix_length, 0, device=starts.device)
        num_present = sum(size for size, _, uses_evidence in config.memory_parts if uses_evidence)
        is_far = (before < -num_present) & (num_present < config.num_memory_slots)
        distance = (starts - config.num_memory_slots).clamp(0, config.lasting_distance)
        return starts[..., None] + before - distance[..., None] * is_far


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary encoding of (..., heads, D), in their dtype (autocast mixes them); with `-sin` it is undone."""
    return torch.addcmul(states * cos, states.roll(states.shape[-1] // 2, -1), sin).to(states.dtype)


class RMTFusion(nn.Module):
    """How the paths are added: the local path through a gate for each head and token, or all by scalars of the layer.

    Source: section 3 of arXiv 2507.00453 for the scalars; the gate is ours.
    """

    def __init__(self, config: RMTConfig) -> None:
        super().__init__()
        self.is_gated = config.fusion_type == "gated"
        num_extra_paths = config.use_local_attention + (config.prefix_length > 0)
        if self.is_gated and config.use_local_attention:
            self.gate = RMTPerHead(config, config.num_attention_heads)
            self.scale = nn.Parameter(torch.empty(config.num_attention_heads))
        elif num_extra_paths and not self.is_gated:
            self.logits = nn.Parameter(torch.empty(1 + num_extra_paths))

    def forward(
        self, hidden_states: torch.Tensor, window: torch.Tensor, local: torch.Tensor | None, prefix: torch.Tensor | None
    ) -> torch.Tensor:
        """The paths (B, T, H, D) added; None where there is none. `prefix` is given if it has a softmax of its own."""
        if not self.is_gated:
            paths = [path for path in (window, local, prefix) if path is not None]
            shares = at_least_float32(self.logits).softmax(0).to(window.dtype) if len(paths) > 1 else [1.0]
            return sum((share * path for share, path in zip(shares, paths, strict=True)), torch.zeros_like(window))
        return window if local is None else torch.addcmul(window, self.share(hidden_states), local)

    def share(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What the local path counts for (B, T, E), with `"gated"`: (B, T, H, 1)."""
        gate = self.gate(hidden_states).sigmoid() * at_least_float32(own_heads(self.scale))
        return gate.to(hidden_states.dtype)[..., None]


def eager_attention_forward(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in plain PyTorch: (B, H, Lq, D), (B, G, Lk, D), additive mask; returns (B, Lq, H, D) and weights."""
    key = key.repeat_interleave(module.num_key_value_groups, 1)
    value = value.repeat_interleave(module.num_key_value_groups, 1)
    weights = query @ key.transpose(2, 3) * kwargs["scaling"]
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = at_least_float32(weights).softmax(-1).to(query.dtype)
    weights = F.dropout(weights, kwargs.get("dropout", 0.0), module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any = None, is_causal: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Softmax attention through the implementation that the configuration names.

    Of queries (B, Lq, H, D), keys and values (B, G, Lk, D) and a mask (B or 1, 1, Lq, Lk) bool, True where a key is
    seen; with `is_causal` the last query sees all keys, and each one before it one key less. Gives (B, Lq, H, D), and
    the weights (B, H, Lq, Lk) if the implementation has them.
    """
    implementation, num_queries, num_keys = module.config._attn_implementation or "eager", query.shape[1], key.shape[2]
    is_flash = "flash" in implementation
    if mask is not None and is_flash:
        raise ValueError(
            f"attn_implementation {implementation!r} takes no masks, which rows at different positions, padded or "
            'packed rows want: use "sdpa", or rows that stand at one position.'
        )
    is_causal = is_causal and mask is None and num_queries > 1
    if is_causal and not is_flash and (num_queries != num_keys or implementation != "sdpa"):
        seen = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
        mask, is_causal = seen.tril(num_keys - num_queries)[None, None], False
    if mask is not None and implementation != "sdpa":
        additive = torch.zeros(mask.shape, dtype=query.dtype, device=query.device)
        mask = additive.masked_fill(~mask, torch.finfo(query.dtype).min).expand(query.shape[0], -1, -1, -1)
    interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
    settings = {"scaling": module.scaling, "is_causal": is_causal}
    settings["dropout"] = module.config.attention_dropout if module.training else 0.0
    return interface(module, query.transpose(1, 2), key, value, mask, **settings)


class RMTAttention(nn.Module):
    """Attention to prefix and window in one softmax, and to the own chunk; memory is written as segments leave.

    Source: section 3 of arXiv 2507.00453. Departs from the paper: memory is a prefix of the window.
    """

    def __init__(self, config: RMTConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        num_key_value_heads, head_dim = config.key_value_shape
        self.num_key_value_groups, self.scaling = config.num_attention_heads // num_key_value_heads, head_dim**-0.5
        # Plain numbers: every look into a configuration costs 3 µs, which a step of one token feels.
        self.head_dim, self.segment_length, self.window_length = head_dim, config.segment_length, config.window_length
        self.chunk_length, self.num_lookback_segments = config.chunk_length, config.num_lookback_segments
        self.prefix_length, self.num_memory_slots = config.prefix_length, config.num_memory_slots
        self.use_qk_norm, self.use_local_attention = config.use_qk_norm, config.use_local_attention
        self.is_unified, self.sizes = config.fusion_type == "gated", StateSizes.of(config)
        size, queries, bias = config.hidden_size, config.num_attention_heads * head_dim, config.attention_bias
        self.q_proj = nn.Linear(size, queries, bias=bias)
        self.k_proj = nn.Linear(size, num_key_value_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(size, num_key_value_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(queries, size, bias=bias)
        for name in ("q_norm", "k_norm") if config.use_qk_norm else ():
            self.add_module(name, RMTRMSNorm(head_dim, config.rms_norm_eps))
        self.memory = RMTMemory(config) if config.num_memory_slots else None
        self.sink = RMTSink(config) if config.use_attention_sink else None
        self.fusion = RMTFusion(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        layout: CallLayout,
        tables: Tables,
        state: LayerState | None = None,
        keep_state: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, LayerState | None]:
        """Attends and, if asked, gives the state after the call.

        Args:
            hidden_states: (B, T, E), after the input norm.
            layout, tables: What all layers need of the call.
            state: The state before the call, None for new streams; not changed while gradients are recorded.
            keep_state: Whether to return a state.

        Returns:
            (B, T, E); weights over prefix and window (B, H, T, P + (N + 1) * S), or (B, H, T, T) of new streams
            without padding that are no longer than the window, if the implementation gives them; the state.
        """
        query, key = (rotate(self.heads(name, hidden_states), *tables.columns) for name in "qk")
        value = self.heads("v", hidden_states)
        scores = at_least_float32(key[:, :, 0, :0]) if self.memory is None else self.memory.scores(hidden_states)
        if state is None:
            state = LayerState.empty(self.sizes, key, scores, query)
        frame = state.cast(key.dtype).extend(layout, self.sizes, key, value, scores)
        frame = frame.observe(layout, self.sizes, query) if layout.num_writes or keep_state else frame
        stages = self.write(frame, layout, tables) if layout.num_writes and self.num_memory_slots else None
        prefix = None
        if tables.prefixes is not None:
            views = torch.arange(layout.num_views, device=query.device)[None]
            writes, began = views.clamp_max(layout.num_writes), layout.first_views
            prefix = self.prefix(self.memory_after(frame, stages, writes, began, layout.is_packed), tables.prefixes)
            if layout.num_views == 1:
                frame = frame.with_prefix(self.segment_length, [states[:, 0] for states in prefix])
        split = 0 if self.is_unified else self.prefix_length
        columns = (split, self.prefix_length + self.window_length)
        window, weights = self.read(query, frame, prefix, layout, tables.mask, columns)
        local = self.attend_to_chunk(query, frame, layout, tables.chunk_mask) if self.use_local_attention else None
        own = self.read(query, frame, prefix, layout, tables.mask, (0, split))[0] if split else None
        attended = self.fusion(hidden_states, window, local, own).flatten(2)
        output = self.o_proj(attended.contiguous())  # sharded weights want it so
        if torch.is_grad_enabled():
            output = output + self.anchor(scores, frame).to(output.dtype)
        return output, weights, self.state_after(frame, stages, layout, tables) if keep_state else None

    def heads(self, name: str, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, heads, D) of a projection, normalised per head where that is so."""
        states = getattr(self, f"{name}_proj")(hidden_states).unflatten(-1, (-1, self.head_dim))
        return getattr(self, f"{name}_norm")(states) if self.use_qk_norm and name != "v" else states

    def prefix_in(self, layout: CallLayout) -> int:
        """Columns of the prefix in the frame of a call: with several views, each has a prefix of its own outside."""
        return self.prefix_length if layout.num_views == 1 else 0

    def anchor(self, scores: torch.Tensor, frame: LayerState) -> torch.Tensor:
        """Zero, with a gradient of zero for all that a short row does not use: no call leaves a parameter out."""
        zero = scores.sum() * 0
        if self.memory is not None:
            zero = zero + self.memory(frame.memory, None)[1]
        return zero if self.sink is None else zero + self.sink()[2]

    def prefix(self, memory: Slots, rotary: Rotary) -> Pair:
        """Slots (B, V, M, G, D) in the order of the text, behind the sink, as keys and values (B, V, G, P, D)."""
        keys, values, _, positions = memory
        order = positions - (positions < 0).long()  # what was never written comes first, the sink next
        if self.sink is not None:
            key, value, _ = self.sink()
            shape = (*keys.shape[:2], 1, *keys.shape[3:])
            keys = torch.cat([key.to(keys.dtype).expand(shape), keys], 2)
            values = torch.cat([value.to(values.dtype).expand(shape), values], 2)
            order = torch.cat([order.new_full(shape[:4], -1), order], 2)
        order = in_order(order, 2)[..., None].expand(keys.shape)
        keys = rotate(keys.gather(2, order), *rotary)
        return keys.transpose(2, 3), values.gather(2, order).transpose(2, 3)

    def read(
        self,
        query: torch.Tensor,
        frame: LayerState,
        prefix: Pair | None,
        layout: CallLayout,
        mask: torch.Tensor | None,
        columns: tuple[int, int],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention to a range of the columns of prefix and window: (B, T, H, D), exactly zero where none is seen."""
        (first, last), segment, num_views, rows = columns, self.segment_length, layout.num_views, query.shape[0]
        is_window, width = last > self.prefix_length, self.prefix_length + self.window_length
        groups = layout.groups if mask is None else (ViewGroup(0, num_views, 0, width),)
        lead = 0 if mask is not None else layout.lead
        if lead:
            groups = (ViewGroup(0, 0, self.prefix_length, width), *groups)  # no view: the columns of the call
        spread = query if lead == layout.num_columns else layout.spread(query, num_views * segment)
        outputs, all_weights = [], []
        for group in groups:
            asked = spread if num_views == 1 else spread[:, group.first * segment : group.end * segment]
            asked = asked if group.end else query[:, :lead]
            asked = asked.unflatten(1, (max(1, group.end - group.first), -1)).flatten(0, 1)
            start, stop = max(first, group.start), min(last, group.stop)
            if start >= stop:
                outputs.append(torch.zeros_like(asked).unflatten(0, (rows, -1)).flatten(1, 2))
                continue
            keys, values = self.columns(frame, prefix, layout, group, start, stop)
            seen = None if mask is None else mask[..., start:stop].expand(rows, -1, -1, -1).flatten(0, 1)[:, None]
            output, weights = attend(self, asked, keys.flatten(0, 1), values.flatten(0, 1), seen, is_causal=is_window)
            if seen is not None and not is_window:
                output = output.masked_fill(~seen.any(-1).transpose(1, 2)[..., None], 0)
            outputs.append(output.unflatten(0, (rows, -1)).flatten(1, 2))
            if weights is not None:  # (B * views, H, queries, columns) to (B, queries of all views, H, width)
                weights = F.pad(weights, (start, width - stop)) if group.end else weights
                all_weights.append(weights.unflatten(0, (rows, -1)).transpose(2, 3).flatten(1, 2))
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        if lead == layout.num_columns:
            return output, all_weights[0].transpose(1, 2) if all_weights else None
        weights = layout.collect(torch.cat(all_weights, 1)).transpose(1, 2) if all_weights else None
        return layout.collect(output), weights

    def columns(
        self, frame: LayerState, prefix: Pair | None, layout: CallLayout, group: ViewGroup, start: int, stop: int
    ) -> list[torch.Tensor]:
        """Keys and values of some columns of prefix and window, (B, views, G, stop - start, D) each."""
        found, segment = [], self.segment_length
        for index, states in enumerate(frame[:2]):
            if not group.end:
                at = self.window_length + self.prefix_in(layout)
                found.append(states[:, None, :, at : at + layout.lead])
            elif layout.num_views == 1:
                found.append(states[:, None, :, segment + start : segment + stop])
            else:
                segments = states.unflatten(2, (-1, segment)).transpose(1, 2)  # (B, segments, G, S, D)
                parts = [] if prefix is None else [prefix[index][:, group.first : group.end]]
                back = range(1, self.num_lookback_segments + 2)
                parts += [segments[:, group.first + i : group.end + i] for i in back]
                found.append(torch.cat(parts, 3)[..., start:stop, :])
        return found

    def attend_to_chunk(
        self, query: torch.Tensor, frame: LayerState, layout: CallLayout, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Local attention: each token sees its own chunk, (B, T, H, D)."""
        segment, chunk, batch = self.segment_length, self.chunk_length, query.shape[0]
        first = self.window_length + self.prefix_in(layout)
        keys, values = frame.keys[:, :, first:], frame.values[:, :, first:]
        if mask is not None:
            return attend(self, query, keys, values, mask)[0]
        if layout.num_views == 1:  # rows at one position: chunk after chunk
            end = layout.lead or layout.groups[0].stop + segment - self.prefix_length - self.window_length
            begin, outputs = end - query.shape[1], []
            for start in range(begin // chunk * chunk, end, chunk):
                stop = min(start + chunk, end)
                asked = query[:, max(start, begin) - begin : stop - begin]
                part = slice(start, stop)
                outputs.append(attend(self, asked, keys[:, :, part], values[:, :, part], is_causal=True)[0])
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        spread = layout.spread(query, layout.num_views * segment).unflatten(1, (-1, chunk)).flatten(0, 1)
        keys, values = (states.unflatten(2, (-1, chunk)).transpose(1, 2).flatten(0, 1) for states in (keys, values))
        output, _ = attend(self, spread, keys, values, is_causal=True)
        return layout.collect(output.unflatten(0, (batch, -1)).flatten(1, 2))

    def write(self, frame: LayerState, layout: CallLayout, tables: Tables) -> list[Slots]:
        """Every stage of memory in a call: see `RMTMemory.forward`. Segment 1 + w of the frame is the w-th written."""
        memory, count, length = cast(RMTMemory, self.memory), layout.num_writes, self.sizes.queries
        segment, first = self.segment_length, self.segment_length + self.prefix_in(layout)
        rotated, values = (
            states[:, :, first : first + count * segment].unflatten(2, (-1, segment)).transpose(1, 2)
            for states in frame[:2]
        )  # (B, W, G, S, D)
        cos, sin = (table.unflatten(1, (-1, segment)) for table in cast(Rotary, tables.writes))
        evidence = None
        if length:
            queries = frame.queries[:, :, length : (1 + count) * length].unflatten(2, (-1, length)).transpose(1, 2)
            evidence = attention_evidence(queries, rotated, self.scaling)
        numbers = torch.arange(count, device=rotated.device) - self.num_lookback_segments
        numbers = numbers - layout.began(numbers)  # (B or 1, W), in their documents
        segments = Segments(
            keys=rotate(rotated.transpose(2, 3), cos, -sin),
            values=values.transpose(2, 3),
            scores=frame.scores[:, segment : (1 + count) * segment].unflatten(1, (-1, segment)),
            evidence=evidence,
            numbers=numbers,
            is_packed=layout.is_packed,
        )
        return memory(frame.memory, segments)[0]

    def memory_after(
        self, frame: LayerState, stages: list[Slots] | None, writes: torch.Tensor, began: torch.Tensor, is_packed: bool
    ) -> Slots:
        """Memory (B, V, M, G, D) after `writes`, (B or 1, V), as a document may see it that began in view `began`."""
        if stages is None:
            return frame.memory.map(lambda tensor: tensor[:, None].expand(-1, writes.shape[1], *tensor.shape[1:]))
        memory = cast(RMTMemory, self.memory)
        found = memory.version(stages, writes[0] if writes.shape[0] == 1 else writes)
        if not is_packed:
            return found
        return found.forget(memory.written_before(writes) - self.num_lookback_segments < began[..., None])

    def state_after(
        self, frame: LayerState, stages: list[Slots] | None, layout: CallLayout, tables: Tables
    ) -> LayerState:
        """The state after a call."""
        if not layout.num_writes and layout.num_views == 1:
            return frame
        ends, began = layout.segment_ends[:, None], layout.first_views[:, -1:]
        memory, before = (
            self.memory_after(frame, stages, writes, began, layout.is_packed)
            for writes in (ends, (ends - 1).clamp_min(0))
        )
        prefix = [states[:, :, :0] for states in frame[:2]]
        if tables.after is not None:
            prefix = [states[:, 0] for states in self.prefix(memory, tables.after)]
        memory, before = (slots.map(lambda tensor: tensor[:, 0]) for slots in (memory, before))
        replaced = frame.replaced.replace_rows(ends[:, 0] > 0, oldest_groups(before, self.sizes))
        return frame.close(layout, self.sizes, prefix)._replace(memory=memory, replaced=replaced)
