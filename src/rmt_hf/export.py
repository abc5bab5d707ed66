"""Decoding as two pure functions of tensors, for `torch.export`: a step of one token, and the turn of a segment.

`DecodingStep` reads one token per row and gives its logits and the new tensors of the state. After a step that fills
a segment (`(positions + 1) % segment_length == 0` in any row), `SegmentTurn` moves the windows of those rows on and
writes memory. Everything else that a forward pass does is bookkeeping in Python, which no exporter can see.

A home file: it does not travel with the weights. Shapes: B rows, V vocabulary.
"""

import torch
from torch import nn

from .cache_rmt import RMTCache
from .layout_rmt import fixed_step
from .modeling_rmt import RMTForCausalLM
from .state_rmt import LayerState


def state_tensors(cache: RMTCache) -> list[torch.Tensor]:
    """Copies of the tensors of a state, layer after layer, as `DecodingStep` and `SegmentTurn` take them.

    Args:
        cache: A state that has read something.

    Raises:
        ValueError: If it is empty: shapes are not known before the first call.
    """
    if not cache.is_initialized:
        raise ValueError("The state must have read something, got an empty one: read the prompt with the model first.")
    return [tensor.clone() for tensor in cache.tensors()[:-1]]  # the last says which columns were padding


def _layer_states(tensors: list[torch.Tensor], num_layers: int) -> list[LayerState]:
    size = len(tensors) // num_layers
    return [LayerState.from_tensors(tensors[index : index + size]) for index in range(0, len(tensors), size)]


class DecodingStep(nn.Module):
    """One token per row: `torch.export.export(DecodingStep(model), (input_ids, positions, tensors))`.

    Args:
        model (`RMTForCausalLM`): In eval mode; its weights are those of the step.

    Source: `fixed_step` of layout_rmt, which compiled models use too.
    """

    def __init__(self, model: RMTForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, tensors: list[torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Reads a token.

        Args:
            input_ids: (B, 1) int64.
            positions: (B,) int64, the stream position of each token: how many its row has read before.
            tensors: As `state_tensors` gives them; without gradients, the windows among them are written in place.

        Returns:
            Logits (B, 1, V), and the tensors after the step.
        """
        base = self.model.model
        hidden_states, layout = base.embed_tokens(input_ids), fixed_step(base.config, positions[:, None])
        rotary, states = base.rotary_emb(layout.position_ids, hidden_states.dtype), []
        ids = layout.sink_position_ids
        sink = None if ids is None else base.rotary_emb(ids, hidden_states.dtype)
        for layer, state in zip(base.layers, _layer_states(tensors, len(base.layers)), strict=True):
            arguments = {"layout": layout, "position_embeddings": rotary, "state": state, "keep_state": True}
            arguments |= {"sink_embeddings": sink}
            hidden_states, state = layer(hidden_states, **arguments)
            states += state.tensors()
        return self.model.lm_head(base.norm(hidden_states)), states


class SegmentTurn(nn.Module):
    """What happens at the end of a segment: `torch.export.export(SegmentTurn(model), (positions, tensors))`.

    Args:
        model (`RMTForCausalLM`): As for `DecodingStep`.
    """

    def __init__(self, model: RMTForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, positions: torch.Tensor, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Moves on the rows that have just filled their segment and leaves the others as they are.

        Args:
            positions: (B,) int64, how many tokens each row has read.
            tensors: What `DecodingStep` returned.

        Returns:
            The tensors for the next step.
        """
        base, states = self.model.model, []
        segment, lookback = base.config.segment_length, base.config.num_lookback_segments
        first = (positions[:, None] - 1) // segment * segment - lookback * segment
        rotary = base.rotary_emb(first + torch.arange(segment, device=positions.device), tensors[0].dtype)
        for layer, state in zip(base.layers, _layer_states(tensors, len(base.layers)), strict=True):
            states += layer.self_attn.turn(state, positions % segment == 0, first >= 0, rotary).tensors()
        return states
