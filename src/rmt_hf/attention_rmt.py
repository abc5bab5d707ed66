"""Attention: rotary encoding, and the layer's attention that runs the three paths and fuses them.

Shapes: B rows, T columns of a call, L aligned columns (see layout_rmt), F segments of the call, S segment length,
N lookback segments, H query heads, G key/value heads, D head width, E hidden size.
"""

import math
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .configuration_rmt import RMTConfig
from .layers_rmt import RMTLinear, RMTRMSNorm, rotate
from .layout_rmt import FRESH, SEGMENTS, CallLayout, StepView, are_equal
from .memory_rmt import RMTMemory, Slots, empty_slots, forget_slots
from .paths_rmt import (
    Paths,
    Projections,
    RMTFusion,
    RMTSink,
    Sink,
    attend,
    first_columns,
    fuse,
    local_attention,
    memory_attention,
    pad_columns,
    windowed_attention,
    windows_of,
    without_sink,
)
from .state_rmt import LayerState, cut_columns, lay_columns
from .step_rmt import OneToken, attend_one_token
from .tiles_rmt import Windows, can_be_tiled, tiled_attention, windows_from_the_start


def rotary_turns(config: RMTConfig) -> torch.Tensor:
    """Turns per position in units of 2^-64, (D / 2,) int64, for the frequencies of Llama, rounded to float32."""
    parameters, (_, width) = cast(dict[str, Any], config.rope_parameters), config.key_value_shape
    if parameters["rope_type"] == "default":
        exponents = torch.arange(0, width, 2, dtype=torch.float, device="cpu") / width
        frequencies = 1.0 / parameters["rope_theta"] ** exponents
    else:
        with torch.device("cpu"):  # not everything in there is made where it is asked for
            frequencies, _ = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"))
    return (frequencies.double() / (2 * math.pi) * 2.0**64).to(torch.int64)


class RMTRotaryEmbedding(nn.Module):
    """Cosine and sine tables that do not lose precision along a stream.

    Angles are integers: position times turns per position, modulo 2^64, which int64 multiplication does by itself. The
    angle between two tokens therefore depends on their distance alone, at any position.

    Source: section 3.4 of arXiv 2507.00453 ("rotary encoding per head"); the integer form is ours.
    """

    def __init__(self, config: RMTConfig) -> None:
        super().__init__()
        self.config = config
        self.turns = nn.Buffer(rotary_turns(config), persistent=False)

    @torch.no_grad()
    def forward(self, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Position ids (B, L) int64 to cosine and sine, each (B, L, 1, D), the first half of the sines negated."""
        turns = position_ids[..., None] * self.turns.to(position_ids.device)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        angles = turns.to(wide) * (2 * math.pi / 2.0**64)
        cos, sin = angles.cos()[:, :, None], angles.sin()[:, :, None]
        return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)

    def tables(self, layout: CallLayout, dtype: torch.dtype, is_step: bool = False) -> dict[str, Any]:
        """Cosines and sines of a call as `RMTAttention` takes them; a plain step of one token needs few of them."""
        embeddings = () if is_step else self(layout.position_ids, dtype)
        if layout.form == SEGMENTS and layout.write_position_ids is not None:
            embeddings += self(layout.write_position_ids, dtype)
        ids = layout.sink_position_ids
        return {"position_embeddings": embeddings, "sink_embeddings": None if ids is None else self(ids, dtype)}


class Turn(NamedTuple):
    """What a turn wants; see `RMTAttention.turn`."""

    due: torch.Tensor
    begun: torch.Tensor | None
    position_embeddings: tuple[torch.Tensor, torch.Tensor]


class RMTAttention(nn.Module):
    """Global, chunked local and memory attention, fused.

    Source: section 3 of arXiv 2507.00453. Departs from the paper: memory has a query projection of its own, and the
    default fusion is gated (docs/design.md says why).
    """

    def __init__(self, config: RMTConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        num_key_value_heads, head_dim = config.key_value_shape
        self.num_key_value_groups = config.num_attention_heads // num_key_value_heads
        self.scaling = head_dim**-0.5
        self.is_causal = True
        # Plain numbers: every look into a configuration costs 3 µs, which a step of one token feels.
        self.head_dim = head_dim
        self.segment_length, self.window_length = config.segment_length, config.window_length
        self.num_lookback_segments, self.num_memory_slots = config.num_lookback_segments, config.num_memory_slots
        self.use_local_attention, self.use_qk_norm = config.use_local_attention, config.use_qk_norm
        queries, slots = config.num_attention_heads * head_dim, num_key_value_heads * head_dim
        self.q_proj = RMTLinear(config.hidden_size, queries, bias=config.attention_bias)
        self.k_proj = RMTLinear(config.hidden_size, slots, bias=config.attention_bias)
        self.v_proj = RMTLinear(config.hidden_size, slots, bias=config.attention_bias)
        self.o_proj = RMTLinear(queries, config.hidden_size, bias=config.attention_bias)
        norms = ["q_norm", "k_norm"] if config.use_qk_norm else []
        if config.num_memory_slots:
            self.memory_q_proj = RMTLinear(config.hidden_size, queries, bias=config.attention_bias)
            self.memory = RMTMemory(config)
            norms += ["memory_q_norm"] if config.use_qk_norm else []
        for name in norms:
            self.add_module(name, RMTRMSNorm(head_dim, config.rms_norm_eps))
        self.fusion = RMTFusion(config)
        self.sink = RMTSink(config) if config.use_attention_sink else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        layout: CallLayout,
        position_embeddings: tuple[torch.Tensor, ...],
        state: LayerState | None = None,
        keep_state: bool = False,
        output_attentions: bool = False,
        token: OneToken | None = None,
        turn: Turn | None = None,
        sink_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        only_state: bool = False,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, LayerState | None]:
        """Attends and, if asked, gives the state after the call.

        Args:
            hidden_states: (B, T, E), after the input norm.
            layout: Where each column belongs.
            position_embeddings: Cosine and sine for the aligned columns, then for the segments to be written.
            state: The state before the call; not changed in place while gradients are recorded.
            keep_state: Whether to return a state.
            output_attentions: Whether to return global attention weights (needs the eager implementation).
            token: Given if the call is a plain step of one token, as `is_plain_step` says.
            turn: Given if the call is a step that brings rows to the end of their segment, and is to turn them.
            sink_embeddings: Cosine and sine for the sink of each segment, if a token sees it.
            only_state: Whether no token is to attend, and the new state is all that is wanted.

        Returns:
            (B, T, E), or None if only the state is wanted; weights (B, H, T, T), or (B, H, T, (N + 1) * S) with a
            state, or None; the new state or None.
        """
        hidden_states = layout.align(hidden_states)
        sink = None if self.sink is None or sink_embeddings is None else self.sink(*sink_embeddings)
        if token is not None:
            step, before = cast(StepView, layout.step), cast(LayerState, state)
            fused, state = attend_one_token(self, hidden_states[:, 0], step, before, token, sink)
            state = state if turn is None else self.turn(state, *turn)
            return layout.restore(self.o_proj(fused)[:, None]), None, state
        inputs = self._project(hidden_states, layout, keep_state, only_state, sink, *position_embeddings[:2])
        state = None if state is None else state.to(inputs.key.dtype)
        blocks: tuple = (None, None)
        if state is None and layout.form == SEGMENTS:  # documents begin inside the rows of new streams
            columns = self.window_length + self.segment_length
            state = LayerState.empty(inputs.key, inputs.scores, columns, self.num_memory_slots)
        paths: Paths | None
        if state is None or layout.form == FRESH:
            paths, blocks, state = self._attend_fresh(inputs, layout, keep_state)
        elif layout.step is None:
            paths, blocks, state = self._attend_segments(inputs, layout, state, position_embeddings[2:])
        else:
            state = self._lay(inputs, layout.step, state)
            paths, blocks = self._attend_step(inputs, layout.step, state)
            state = state if turn is None else self.turn(state, *turn)
        if paths is None:
            return None, None, state
        output = self.o_proj(fuse(self.fusion(hidden_states), paths).flatten(2))
        weights = self._weights_by_column(blocks, layout) if output_attentions else None
        return layout.restore(output), weights, state

    def _project(
        self,
        hidden_states: torch.Tensor,
        layout: CallLayout,
        keep_state: bool,
        only_state: bool,
        sink: Sink | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> Projections:
        """Queries, keys and values of the aligned columns; what memory needs only where it is read or kept."""

        def heads(name: str, states: torch.Tensor) -> torch.Tensor:
            states = getattr(self, f"{name}_proj")(states).unflatten(-1, (-1, self.head_dim))
            return getattr(self, f"{name}_norm")(states) if self.use_qk_norm and name != "v" else states

        key, value = (heads(name, hidden_states) for name in ("k", "v"))
        query = memory_query = None
        if not only_state:
            query = rotate(heads("q", hidden_states), cos, sin)
            asking = hidden_states[:, self.window_length :].contiguous() if layout.form == FRESH else hidden_states
            memory_query = heads("memory_q", asking) if layout.reads_memory else None
        writes = self.num_memory_slots > 0 and (layout.reads_memory or keep_state)
        scores = self.memory.scores(hidden_states) if writes else key[:, :, 0, :0]
        return Projections(query, rotate(key, cos, sin), key, value, memory_query, scores, sink)

    def _attend_fresh(
        self, inputs: Projections, layout: CallLayout, keep_state: bool
    ) -> tuple[Paths | None, tuple, LayerState | None]:
        """All rows begin their stream here: one causal block as long as the window, then whole segments."""
        segment, lookback = self.segment_length, self.num_lookback_segments
        length, window = inputs.key.shape[1], self.window_length
        num_later = max(0, -(-(length - window) // segment))  # segments that do not see the beginning any more
        paths, weights, rounds, state = None, (None, None), None, None
        writes = [max(0, end // segment - lookback) for end in layout.ends]
        if self.num_memory_slots and (num_later or keep_state):
            written = (
                first_columns(pad_columns(states, segment), max(num_later, *writes) * segment)
                for states in (inputs.unrotated_key, inputs.value, inputs.scores)
            )
            rounds = self._write_segments(empty_slots(inputs.value, self.num_memory_slots), *written)
        if inputs.query is not None:
            from_global, weights = self._attend_fresh_global(inputs.query, inputs, num_later)
            from_local = from_memory = None
            if self.use_local_attention:
                from_local = local_attention(self, inputs.query, inputs.key, inputs.value)
            if rounds is not None and inputs.memory_query is not None:
                versions = torch.arange(1, num_later + 1, device=inputs.key.device)
                asked = pad_columns(inputs.memory_query, segment)
                from_memory = memory_attention(self, asked, self.memory.version(rounds, versions))
                from_memory = first_columns(from_memory, length - window)
            paths = Paths(from_global, from_local, from_memory)
        if keep_state:
            firsts = [(end // segment - lookback - 1) * segment for end in layout.ends]
            frame = (inputs.key, inputs.value, inputs.scores)
            state = self._closing_state(frame, layout, firsts, rounds, writes, None)
        return paths, weights, state

    def _attend_fresh_global(
        self, query: torch.Tensor, inputs: Projections, num_later: int
    ) -> tuple[torch.Tensor, tuple]:
        """Global attention of new streams; the weights of the causal block and of the later segments."""
        key, value = inputs.key, inputs.value
        length, segment, window = query.shape[1], self.segment_length, self.window_length
        if inputs.sink is None and can_be_tiled(self, query, key, value):
            windows = windows_from_the_start(length, segment, window)
            return tiled_attention(query, key, value, windows, self.scaling), (None, None)
        if not num_later:
            output, weights = attend(self, query, key, value)
            return output, (weights, None)
        query, later_query = query.split([window, length - window], 1)
        # The first window holds the keys of the causal block, each other one those of a later segment.
        (key, later_key), (value, later_value) = (
            windows_of(pad_columns(states, segment), self.config).split([1, num_later], 1) for states in (key, value)
        )
        output, weights = attend(self, query, key[:, 0], value[:, 0])
        later_query = pad_columns(later_query, segment)
        later, later_weights = windowed_attention(self, later_query, later_key, later_value, None, inputs.sink)
        return first_columns(torch.cat([output, later], 1), length), (weights, later_weights)

    def _attend_segments(
        self, inputs: Projections, layout: CallLayout, state: LayerState, write_rotary: tuple[torch.Tensor, ...]
    ) -> tuple[Paths | None, tuple, LayerState]:
        """Rows go on with their streams, across segment ends: whole segments from where each row stands."""
        segment, lookback = self.segment_length, self.num_lookback_segments
        kept = (lookback + 1) * segment
        places = [start % segment for start in layout.starts]
        is_old: torch.Tensor | None = None
        if not are_equal(places):
            is_old = torch.arange(segment, device=inputs.key.device) < layout.per_row(places)[:, None]  # (B, S)

        def join(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
            if is_old is None:
                return torch.cat([old[:, : kept + places[0]], new[:, places[0] :]], 1)
            is_old_here = is_old.reshape(*is_old.shape, *[1] * (old.dim() - 2))
            current = torch.where(is_old_here, old[:, kept:], new[:, :segment])
            return torch.cat([old[:, :kept], current, new[:, segment:]], 1)

        keys, values = join(state.keys.transpose(1, 2), inputs.key), join(state.values.transpose(1, 2), inputs.value)
        scores, paths, weights = join(state.scores, inputs.scores), None, None
        rounds = self.memory.write(state.memory, None) if self.num_memory_slots else None
        if rounds is not None and write_rotary:
            written = slice(segment, segment + write_rotary[0].shape[1])
            unrotated = rotate(keys[:, written], write_rotary[0], -write_rotary[1])
            begun, meets_empty = layout.begun(segment), self._meets_empty(layout)
            rounds = self._write_segments(
                state.memory, unrotated, values[:, written], scores[:, written], begun, meets_empty
            )
        if inputs.query is not None:
            from_global, weights = self._attend_segments_global(inputs.query, inputs.sink, layout, keys, values)
            from_local = from_memory = None
            if self.use_local_attention:
                from_local = local_attention(self, inputs.query, keys[:, kept:], values[:, kept:])
            if rounds is not None and inputs.memory_query is not None:
                versions = torch.arange(layout.length // segment, device=inputs.key.device)
                memory = self._memory_after(rounds, versions, versions[None], layout)
                from_memory = memory_attention(self, inputs.memory_query, memory)
            paths = Paths(from_global, from_local, from_memory)
        writes = layout.turns(segment)
        firsts = [count * segment for count in writes]
        state = self._closing_state((keys, values, scores), layout, firsts, rounds, writes, state.previous_memory)
        return paths, (weights, None), state

    def _attend_segments_global(
        self, query: torch.Tensor, sink: Sink | None, layout: CallLayout, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Global attention to keys and values (B, (N + 1 + F) * S, G, D) of the window before the call and the call."""
        segment, window = self.segment_length, self.window_length
        sees_all = sink is None and layout.window_mask is None
        if sees_all and can_be_tiled(self, query, keys, values):
            windows = [Windows(0, query.shape[1] // segment, segment, window)]
            return tiled_attention(query, keys, values, windows, self.scaling, shift=window), None
        seen_keys, seen_values = (windows_of(states[:, segment:], self.config) for states in (keys, values))
        return windowed_attention(self, query, seen_keys, seen_values, layout.window_mask, sink)

    def _meets_empty(self, layout: CallLayout) -> torch.Tensor | None:
        """Which of the segments that a call writes find the ring place of an earlier document, (B, W) bool."""
        written = torch.arange(layout.length // self.segment_length, device=layout.position_ids.device)
        written = written[None] - self.num_lookback_segments
        return layout.other_documents(written - self.memory.blocks, written)

    def _memory_after(self, rounds: Slots, num_writes: torch.Tensor, of: torch.Tensor, layout: CallLayout) -> Slots:
        """Memory (B, V, M, G, D) after a number of writes, (V,) or (B, V), as aligned segments `of` may see it."""
        memory = self.memory.version(rounds, num_writes)
        if layout.origins is None:
            return memory
        blocks = torch.arange(-self.memory.blocks, 0, device=num_writes.device)  # oldest first
        held = num_writes.reshape(-1, num_writes.shape[-1], 1) + blocks - self.num_lookback_segments
        hidden = cast(torch.Tensor, layout.other_documents(held, of))
        return forget_slots(memory, hidden.repeat_interleave(memory.strengths.shape[2] // self.memory.blocks, 2))

    @staticmethod
    def _lay(inputs: Projections, step: StepView, state: LayerState) -> LayerState:
        """The state with the new tokens laid into the window."""
        keys = lay_columns(state.keys, 2, step.columns, inputs.key.transpose(1, 2))
        values = lay_columns(state.values, 2, step.columns, inputs.value.transpose(1, 2))
        scores = lay_columns(state.scores, 1, step.columns, inputs.scores)
        return state._replace(keys=keys, values=values, scores=scores)

    def _attend_step(self, inputs: Projections, step: StepView, state: LayerState) -> tuple[Paths | None, tuple]:
        """No row leaves its segment: the window, new tokens included, is looked at as it lies in the state."""
        if inputs.query is None:
            return None, (None, None)
        keys, values = state.keys.transpose(1, 2), state.values.transpose(1, 2)
        seen = slice(*step.global_span)
        seen_keys, seen_values = keys[:, seen], values[:, seen]
        if inputs.sink is not None:
            windows = inputs.sink.before(seen_keys[:, None], seen_values[:, None])
            seen_keys, seen_values = (states[:, 0] for states in windows)
        outputs, weights = attend(self, inputs.query, seen_keys, seen_values, step.global_mask)
        weights = without_sink(weights, inputs.sink)
        from_local = from_memory = None
        if self.use_local_attention:
            seen = slice(*step.local_span)
            from_local, _ = attend(self, inputs.query, keys[:, seen], values[:, seen], step.local_mask)
        if inputs.memory_query is not None:
            from_memory = memory_attention(self, inputs.memory_query, state.memory.map(lambda tensor: tensor[:, None]))
        return Paths(outputs, from_local, from_memory), (weights, None)

    def zero_with_gradient(self) -> torch.Tensor:
        """Zero, in whose graph all of memory, fusion and sink is.

        Processes that share out the weights (FSDP) must have a gradient for the same parameters, and a call that reads
        no memory gives these none.
        """
        names = ("memory", "memory_q_proj", "memory_q_norm", "fusion", "sink")
        modules = [module for name, module in self.named_children() if name in names]
        learned = [p for module in modules for p in module.parameters() if p.requires_grad]
        return sum((p.sum() * 0 for p in learned), torch.zeros((), device=self.q_proj.weight.device))

    def turn(
        self,
        state: LayerState,
        due: torch.Tensor,
        begun: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
    ) -> LayerState:
        """Moves the window of rows whose segment a step has filled on by one, and writes the segment that leaves it.

        Apart from the step, so that a compiled step is the same at every position.

        Args:
            state: The state after the step.
            due: (B,) bool, the rows.
            begun: (B, 1) bool, whether the stream had begun before the segment that leaves.
            position_embeddings: Cosine and sine for that segment, each (B, S, 1, D).
        """
        segment = self.segment_length
        moved = state.shift_rows(due, segment)
        if not self.num_memory_slots:
            return moved
        keys, values = (old[:, :, segment : 2 * segment].transpose(1, 2) for old in state[:2])
        cos, sin = position_embeddings
        scores = state.scores[:, segment : 2 * segment]
        rounds = self._write_segments(state.memory, rotate(keys, cos, -sin), values, scores, begun)
        written = self.memory.version(rounds, torch.ones(1, dtype=torch.int64, device=due.device))
        return moved._replace(
            memory=state.memory.replace_rows(due, written.map(lambda tensor: tensor[:, 0])),
            previous_memory=state.previous_memory.replace_rows(due, state.memory),
        )

    def _write_segments(
        self,
        memory: Slots,
        keys: torch.Tensor,
        values: torch.Tensor,
        scores: torch.Tensor,
        begun: torch.Tensor | None = None,
        meets_empty: torch.Tensor | None = None,
    ) -> Slots:
        """Condenses and writes W segments, (B, W * S, ...); `begun` (B, W) is False before a stream began."""
        segments = (states.unflatten(1, (-1, self.segment_length)) for states in (keys, values, scores))
        candidates = self.memory.condense(*segments)
        if begun is not None:
            hidden = ~begun[:, :, None, None]
            candidates = Slots(
                candidates.keys.masked_fill(hidden[..., None], 0),
                candidates.values.masked_fill(hidden[..., None], 0),
                candidates.strengths.masked_fill(hidden, -torch.inf),
            )
        return self.memory.write(memory, candidates, meets_empty)

    def _closing_state(
        self,
        frame: tuple[torch.Tensor, ...],
        layout: CallLayout,
        firsts: list[int],
        rounds: Slots | None,
        writes: list[int],
        previous: Slots | None,
    ) -> LayerState:
        """The state after a call: last columns of the frame (B, columns, ...), memory after each row's writes."""
        keys, values, scores = self._closing_window(frame, layout, firsts)
        if rounds is None:
            none = empty_slots(frame[0], 0)
            return LayerState(keys, values, scores, none, none)
        counts = layout.per_row(writes)
        last = torch.full_like(counts[:, None], layout.length // self.segment_length)
        memory, before = (
            self._memory_after(rounds, number[:, None], last, layout).map(lambda tensor: tensor[:, 0])
            for number in (counts, (counts - 1).clamp_min(0))
        )
        if previous is not None:
            before = previous.replace_rows(counts > 0, before)
        return LayerState(keys, values, scores, memory, before)

    def _closing_window(
        self, frame: tuple[torch.Tensor, ...], layout: CallLayout, firsts: list[int]
    ) -> tuple[torch.Tensor, ...]:
        """Keys and values (B, G, (N + 2) * S, D), and scores, from a column of each row on.

        Zeros where the frame has no column, and before the last document of a row.
        """
        length, num_columns = frame[0].shape[1], self.window_length + self.segment_length
        if layout.origins is None and are_equal(firsts):
            by_head = (frame[0].transpose(1, 2), frame[1].transpose(1, 2), frame[2])
            return tuple(cut_columns(states, firsts[0], num_columns) for states in by_head)
        rows = torch.arange(len(firsts), device=frame[0].device)[:, None]
        columns = layout.per_row(firsts)[:, None] + torch.arange(num_columns, device=frame[0].device)
        outside = (columns < 0) | (columns >= length)
        if layout.origins is not None:
            outside |= columns < (layout.origins[:, -1:] + self.num_lookback_segments + 1) * self.segment_length
        columns = columns.clamp(0, length - 1)
        keys, values, scores = (
            states[rows, columns].masked_fill(outside.reshape(*outside.shape, *[1] * (states.dim() - 2)), 0)
            for states in frame
        )
        return keys.transpose(1, 2).contiguous(), values.transpose(1, 2).contiguous(), scores

    def _weights_by_column(self, weights: tuple, layout: CallLayout) -> torch.Tensor | None:
        """Global attention weights as a map (B, H, T, keys); see `forward`."""
        segment, window = self.segment_length, self.window_length
        head, tail = weights
        if head is None:  # the implementation gives none
            return None
        if layout.form == FRESH:
            batch, heads = head.shape[:2]
            size = layout.length if tail is None else window + tail.shape[0] // batch * segment
            full = head.new_zeros(batch, heads, size, size)
            full[:, :, : head.shape[2], : head.shape[2]] = head
            if tail is not None:
                tail = tail.unflatten(0, (batch, -1)).transpose(1, 2)  # (B, H, F, S, (N + 1) * S)
                first = torch.arange(tail.shape[2], device=head.device)[:, None, None] * segment
                rows = window + first + torch.arange(segment, device=head.device)[:, None]
                full[:, :, rows, segment + first + torch.arange(window, device=head.device)] = tail
            full = full[:, :, : layout.length, : layout.length].transpose(1, 2)  # (B, T, H, T)
            full = layout.restore(full).permute(0, 3, 2, 1)
            return layout.restore(full).permute(0, 2, 3, 1)
        if layout.step is not None:
            span_start, span_end = layout.step.global_span
            head = F.pad(head, (span_start - segment, window + segment - span_end))
        else:
            head = head.unflatten(0, (len(layout.starts), -1)).transpose(1, 2).flatten(2, 3)
        return layout.restore(head.transpose(1, 2)).transpose(1, 2)
