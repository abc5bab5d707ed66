"""The last layer of a long prompt: of most of its tokens, nothing is wanted but what they leave in the state.

Shapes: B rows, T columns of a call, E hidden size.
"""

from typing import Any, cast

import torch

from .layout_rmt import STEP, CallLayout, plan_call
from .state_rmt import LayerState


LEAST_SEGMENTS = 1  # left out at least if the layer is called a second time: it must be worth it
QUIET_HOOKS = (
    "transformers.utils.output_capturing"  # stay for ever after one call, and are silent unless they are asked
)


def can_leave_out(model: Any, layout: CallLayout, num_wanted: int | None) -> bool:
    """Whether the last layer of an `RMTModel` may compute the columns alone that are wanted.

    It must be worth it, the call may have no gradients and no documents that begin inside, and nobody may listen to
    the layer, the norm or the model: hooks would hear of other calls than they know.
    """
    if num_wanted is None or layout.form == STEP or torch.is_grad_enabled() or layout.origins is not None:
        return False
    least = LEAST_SEGMENTS * model.config.segment_length if num_wanted else 0
    last = model.layers[-1]
    if layout.num_columns - num_wanted <= least or not hasattr(last, "self_attn"):  # that is in another stage
        return False
    modules = (model, model.norm, *last.modules())
    hooks = [hook for each in modules for hook in (*each._forward_hooks.values(), *each._forward_pre_hooks.values())]
    return all(getattr(hook, "__module__", None) == QUIET_HOOKS for hook in hooks)


@torch.compiler.disable  # with all that it calls: plans are Python
def last_columns_alone(
    model: Any, hidden_states: torch.Tensor, layout: CallLayout, state: LayerState | None, num_wanted: int
) -> tuple[torch.Tensor, LayerState]:
    """What last layer and norm give for the last columns of a call, as if cut before them, and the state of the layer.

    Args:
        model: The `RMTModel`.
        hidden_states: (B, T, E), what the layer before has given.
        layout: The plan of the whole call.
        state: Of the last layer, before the call.
        num_wanted: Number of last columns, K; may be 0.

    Returns:
        (B, K, E) and the state.
    """
    starts, first, found = list(layout.starts), layout.num_columns - num_wanted, hidden_states[:, :0]
    for columns, only_state in ((slice(0, first), True), (slice(first, None), False)):
        piece = hidden_states[:, columns]
        if not piece.shape[1]:
            break
        is_real = None if layout.is_real is None else layout.is_real[:, columns]
        part = layout if not num_wanted else plan_call(model.config, starts, is_real, piece.shape[1], piece.device)
        given = {"keep_state": True, "turn": model._turn(part), "only_state": only_state}
        tables = model.rotary_emb.tables(part, piece.dtype)
        states, state = model.layers[-1](piece, layout=part, state=state, **given, **tables)
        starts = list(part.ends)
        found = found if only_state else states
    return model.norm(found), cast(LayerState, state)
