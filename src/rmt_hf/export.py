"""Streams as pure functions of tensors, for `torch.export` and ONNX: a prompt, and steps of one token.

Shapes: B rows, T tokens of a prompt, V vocabulary.
"""

import torch
from torch import nn

from .cache_rmt import RMTCache
from .configuration_rmt import RMTConfig
from .layout_rmt import CallLayout, plan_call
from .modeling_rmt import RMTForCausalLM
from .state_rmt import LayerState


def state_tensors(cache: RMTCache) -> list[torch.Tensor]:
    """Copies of the tensors of a state, layer by layer, as `DecodingStep` takes them.

    Args:
        cache: A state that has read something.

    Raises:
        ValueError: If it is empty, since shapes are not known before the first call; or if it was edited or cropped
            over a segment end since the last call.
    """
    if not cache.is_initialized:
        raise ValueError("The state must have read something, got an empty one: read the prompt with the model first.")
    if cache.is_stale or any(cache.forgotten):
        raise ValueError(
            "The state must be as reading has left it, got one that was cropped or edited: read on with the "
            "model first, and do not edit memory."
        )
    return [tensor.clone() for tensor in cache.tensors()[:-1]]  # the last says which columns were padding


def step_layout(config: RMTConfig, positions: torch.Tensor, ends_segment: bool) -> CallLayout:
    """The layout of one token of each row, from tensors alone.

    Args:
        config: Of the model.
        positions: (B,) int64, stream positions before the step.
        ends_segment: Whether the token fills the segment of some row.
    """
    segment, length = config.segment_length, config.num_observing_tokens
    indices, first_views = (positions % segment)[:, None], -(positions // segment)[:, None]
    kept = indices - segment + length
    segments_after = (positions + 1) // segment
    return CallLayout(
        num_columns=1,
        num_views=1,
        num_writes=int(ends_segment),
        starts=(),
        ends=(),
        refreshes=False,
        lead=0,
        groups=(),
        offset=None,
        indices=indices,
        query_indices=torch.where(kept < 0, 2 * length, length + kept),
        observes=True,
        first_views=first_views,
        segment_ends=first_views[:, -1] + segments_after,
        segments_after=segments_after,
        forgotten=None,
        is_packed=False,
        is_real=None,
        remembered=None,
    )


class PromptReader(nn.Module):
    """The beginning of streams: `torch.export.export(PromptReader(model), (input_ids,))`, for one number of tokens.

    Args:
        model (`RMTForCausalLM`): In eval mode; the reader shares its weights.
    """

    def __init__(self, model: RMTForCausalLM) -> None:
        super().__init__()
        self.model = model
        self.train(model.training)

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Reads a prompt.

        Args:
            input_ids: (B, T) int64, no padding.

        Returns:
            Logits of the last token (B, 1, V), and the tensors that `DecodingStep` takes, at position T.
        """
        base = self.model.model
        layout = plan_call(base.config, [0], None, input_ids.shape[1], input_ids.device)  # as every row stands
        states: list[LayerState | None] = [None] * len(base.layers)
        hidden_states, after = base._run_layers(base.embed_tokens(input_ids), layout, states)
        return self.model.lm_head(hidden_states[:, -1:]), [tensor for state in after for tensor in state.tensors()]


class DecodingStep(nn.Module):
    """One token per row: `torch.export.export(DecodingStep(model), (input_ids, positions, tensors))`.

    Args:
        model (`RMTForCausalLM`): In eval mode; the step shares its weights.
        ends_segment: Whether the step writes memory, in rows where `(positions + 1) % segment_length == 0`. Without
            it no such row may be read; with it any row may.
    """

    def __init__(self, model: RMTForCausalLM, ends_segment: bool = False) -> None:
        super().__init__()
        self.model, self.ends_segment = model, ends_segment
        self.train(model.training)

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, tensors: list[torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Reads a token.

        Args:
            input_ids: (B, 1) int64.
            positions: (B,) int64, the stream position of each token, which counts the tokens before it.
            tensors: As `state_tensors` returns them; without gradients, the windows are written in place.

        Returns:
            Logits (B, 1, V), and the tensors after the step.
        """
        base, size = self.model.model, len(tensors) // len(self.model.model.layers)
        hidden_states, layout = base.embed_tokens(input_ids), step_layout(base.config, positions, self.ends_segment)
        tables = base.rotary_emb.of_call(layout, hidden_states.dtype, True)
        after: list[torch.Tensor] = []
        for index, layer in enumerate(base.layers):
            state = LayerState.from_tensors(tensors[index * size : (index + 1) * size])
            hidden_states, state = layer(hidden_states, layout=layout, tables=tables, state=state, keep_state=True)
            after += state.tensors()
        return self.model.lm_head(base.norm(hidden_states)), after
