"""A decoding step: one token per row, without gradients, in as few and as small operations as there can be.

The same mathematics as that of paths_rmt.py, which serves every other call. A step of one token is nearly all overhead,
so there is one axis for rows and heads, products of two axes (a third of the time of three), and memory is kept as it
is read. design.md, section 3.

`module` is the layer's `RMTAttention` everywhere. Shapes: B rows, H query heads, G key/value heads, D head width,
M slots, E hidden size.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch

from .layers_rmt import inverse_rms
from .layout_rmt import STEP, CallLayout, StepView, plan_steps
from .memory_rmt import ReadableMemory, at_least_float32
from .paths_rmt import PLAIN, Sink, masked_softmax
from .state_rmt import LayerState, lay_columns, owned


class OneToken(NamedTuple):
    """What a layer wants for a plain step of one token besides what it wants for every call.

    Args:
        rotations: As `rotation_matrices` gives them.
        memory: What the layer reads, or None if no token can see a written slot.
    """

    rotations: tuple[torch.Tensor, torch.Tensor]
    memory: ReadableMemory | None


def is_plain_step(module: Any, layout: CallLayout) -> bool:
    """Whether a call is one token per row in plain mathematics: no gradient, dropout, or kernel that was asked for.

    A compiled step is left to the kernel as well: what the compiler makes of products of one row is slower.
    """
    if layout.form != STEP or layout.length != 1 or torch.is_grad_enabled() or module.training:
        return False
    return not torch.compiler.is_compiling() and module.config._attn_implementation in PLAIN


def rotation_matrices(cos: torch.Tensor, sin: torch.Tensor, scaling: float) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Rotary encoding as matrices to multiply the heads of a query and of a key with, for each of L columns.

    Args:
        cos, sin: Tables (1 or B, L, 1, D) as `RMTRotaryEmbedding` gives them.
        scaling: Factor of the attention scores, which goes into the matrix for queries.

    Returns:
        L pairs (D, D), or (B, D, D) for tables of several rows.
    """
    matrices = torch.diag_embed(cos[:, :, 0]) + torch.diag_embed(sin[:, :, 0]).roll(cos.shape[-1] // 2, -2)
    by_column = (matrices[0] if len(matrices) == 1 else matrices.transpose(0, 1)).contiguous()
    return list(zip((by_column * scaling).unbind(), by_column.unbind(), strict=True))


def rotations_of(model: Any, position_ids: torch.Tensor, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """`rotation_matrices` of stream positions (1 or B, L)."""
    cos, sin = model.rotary_emb(position_ids, dtype)
    return rotation_matrices(cos, sin, model.config.head_dim**-0.5)


def planned_step(model: Any, cache: Any, starts: list[int], like: torch.Tensor) -> CallLayout:
    """The plan of a step of one token per row, from a plan for several steps that the cache keeps.

    A plan depends on the positions alone, so that whatever is done to a state, a plan that is found is the right one.

    Args:
        model: The `RMTModel`.
        cache: The `RMTCache`.
        starts: Stream position of each row before the step; not all 0.
        like: A tensor of the dtype and on the device of the call.
    """
    layout = cache.planned_steps.get(tuple(starts))
    if layout is None or layout.rotations[0].device != like.device or layout.rotations[0].dtype != like.dtype:
        layouts = plan_steps(model.config, starts, like.device)
        rotations = rotations_of(model, torch.cat([layout.position_ids for layout in layouts], 1), like.dtype)
        layouts = [replace(layout, rotations=pair) for layout, pair in zip(layouts, rotations, strict=True)]
        cache.planned_steps = {layout.starts: layout for layout in layouts}
        layout = layouts[0]
    return layout


def one_token(model: Any, layout: CallLayout, cache: Any, dtype: torch.dtype) -> list[OneToken]:
    """What each layer of the `RMTModel` wants for a plain step."""
    rotations = layout.rotations or rotations_of(model, layout.position_ids, dtype)[0]
    reads = [layout.reads_memory and layer.state is not None for layer in cache.layers]
    pairs = zip(cache.layers, reads, strict=True)
    return [OneToken(rotations, layer.readable_memory(dtype) if is_read else None) for layer, is_read in pairs]


def attend_one_token(
    module: Any, hidden_states: torch.Tensor, step: StepView, state: LayerState, token: OneToken, sink: Sink | None
) -> tuple[torch.Tensor, LayerState]:
    """All paths of one token per row, fused: what `attend` and `fuse` give; and the state with the token laid into it.

    Local attention sees some of the keys of global attention, so scores are computed once, and as fusion is a sum, the
    weights of both are added before they meet the values.

    Args:
        hidden_states: (B, E).

    Returns:
        (B, H * D), and the state.
    """
    names = ("q", "k") if token.memory is None else ("q", "k", "memory_q")
    query, key, *asked = _heads(module, hidden_states, names)
    query, key = (_rotated(states, rotation) for states, rotation in zip((query, key), token.rotations, strict=True))
    state = _lay(module, hidden_states, key, step, state.to(key.dtype))
    num_heads, cells = state.keys.shape[1], (-1, module.num_key_value_groups, module.head_dim)  # (B * G, H / G, D)
    share_global, share_local, share_memory = (
        share.reshape(*cells[:2], 1) if share is not None and share.dim() else share
        for share in module.fusion(hidden_states)
    )
    start, end = step.global_span
    keys, values = state.keys[:, :, start:end].flatten(0, 1), state.values[:, :, start:end].flatten(0, 1)
    scores = torch.bmm(query.view(cells), keys.transpose(1, 2))
    num_before = 0
    if sink is not None:
        shape, num_before = (len(hidden_states), 1, 1, num_heads, module.head_dim), 1
        sinks = [states.to(keys.dtype).expand(shape).reshape(-1, 1, module.head_dim) for states in sink]
        scores = torch.cat([torch.bmm(query.view(cells), sinks[0].transpose(1, 2)), scores], -1)
    weights = masked_softmax(scores, step.global_mask, num_heads)
    if share_global is not None:
        weights = weights * share_global
    if share_local is not None:
        first = step.local_span[0] - start + num_before
        near = masked_softmax(scores[..., first:], step.local_mask, num_heads)
        weights[..., first:].addcmul_(near, share_local)
    if sink is None:
        output = torch.bmm(weights, values)
    else:
        output = torch.addcmul(torch.bmm(weights[..., 1:], values), weights[..., :1], sinks[1])
    if share_memory is not None and token.memory is not None:
        recalled = module.memory.recall(asked[0].view(cells), token.memory, module.scaling)
        output = torch.addcmul(output, share_memory, recalled)
    return output.view(len(hidden_states), -1), state


def _heads(module: Any, hidden_states: torch.Tensor, names: tuple[str, ...]) -> list[torch.Tensor]:
    """(B * heads, D) of each projection, normalised if heads are: all at once, but for the weights of the norms."""
    heads = [getattr(module, f"{name}_proj")(hidden_states).view(-1, module.head_dim) for name in names]
    if not module.use_qk_norm:
        return heads
    norms = [getattr(module, f"{name}_norm") for name in names]
    wide = at_least_float32(torch.cat(heads))
    normed = wide * inverse_rms(wide, norms[0].eps)
    parts = normed.split([len(states) for states in heads])
    return [(part * norm.weight).to(heads[0].dtype) for part, norm in zip(parts, norms, strict=True)]


def _rotated(states: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """(B * heads, D) with rotary encoding."""
    if rotation.dim() == 2:
        return states.mm(rotation)
    return states.view(len(rotation), -1, states.shape[-1]).bmm(rotation).flatten(0, 1)


def _lay(module: Any, hidden_states: torch.Tensor, key: torch.Tensor, step: StepView, state: LayerState) -> LayerState:
    """The state with the token laid into its window: rotated keys, values, and scores for the write."""
    batch, heads = len(hidden_states), state.keys.shape[1]
    new = [key.view(batch, heads, -1), module.v_proj(hidden_states).view(batch, heads, -1)]
    new += [module.memory.scores(hidden_states)] if module.num_memory_slots else []
    windows = [owned(window) for window in (state.keys, state.values, state.scores)[: len(new)]]
    for window, token in zip(windows, new, strict=True):
        axis = window.dim() - 2
        if step.columns.dim() == 1:
            window.select(axis, step.global_span[1] - 1).copy_(token)
        else:
            lay_columns(window, axis, step.columns, token.unsqueeze(axis))
    return state._replace(keys=windows[0], values=windows[1], scores=windows[-1] if len(new) == 3 else state.scores)
