"""Ablations of memory: what a stream is worth when its memory is emptied, frozen, or exchanged for another's.

A control is a function that edits the memory of a state in place. `stream_bits` calls it at the end of every segment,
when no token of the next one has been read; in a recall task it may be called on any state, also within a segment.

Shapes: B documents or rows, T tokens of a document. A home file: it does not travel with the weights.
"""

from collections.abc import Callable, Mapping

import torch
from tqdm.auto import tqdm

from .cache_rmt import RMTCache
from .evaluation import bits_of, evaluation_mode
from .memory_rmt import Slots
from .modeling_rmt import RMTForCausalLM


Control = Callable[[RMTCache], None]


def empty_memories(cache: RMTCache) -> None:
    """Every stream forgets every slot: attention sees the sink, if there is one, and the window alone.

    Args:
        cache: State of B streams, changed in place; one that has read nothing has no memory, and stays so.
    """
    cache.edit_memory(lambda slots: slots.forget(torch.ones_like(slots.strengths[..., 0], dtype=torch.bool)))


def pass_on_memories(cache: RMTCache) -> None:
    """Every row gets the memory of the next one, the last row that of the first.

    Slots stand in the order of their own text, directly before the window, whose tokens may be of other positions.

    Args:
        cache: State of at least 2 streams, changed in place.

    Raises:
        ValueError: If there is no other row.
    """
    if cache.is_initialized and cache.batch_size < 2:
        raise ValueError("Another document's memory needs at least 2 rows, got 1: give more documents.")
    cache.edit_memory(lambda slots: slots.map(lambda tensor: tensor.roll(-1, 0)))


def swap_memories(cache: RMTCache) -> None:
    """Rows 0 and 1, 2 and 3, ... exchange their memories. Done twice, nothing has changed.

    Args:
        cache: State of an even number of streams, changed in place.

    Raises:
        ValueError: If a row has no partner.
    """
    if cache.is_initialized and cache.batch_size % 2:
        raise ValueError(f"Rows are swapped in pairs, got {cache.batch_size} rows: give an even number of documents.")
    cache.edit_memory(lambda slots: slots.map(lambda tensor: tensor.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)))


def freeze_memories(num_tokens: int) -> Control:
    """A control that keeps memory as it is when the last segment ends that lies within the first `num_tokens` tokens.

    Args:
        num_tokens: Tokens of the stream after which nothing is written any more; less than a segment keeps it empty.

    Returns:
        A control for one state and its streams, which advance in lockstep; call it at the end of every segment.

    Raises:
        ValueError: If `num_tokens` is negative.
    """
    if num_tokens < 0:
        raise ValueError(f"num_tokens must be 0 or more, got {num_tokens}: 0 freezes an empty memory.")
    kept: list[Slots] = []

    def freeze(cache: RMTCache) -> None:
        if not cache.is_initialized:
            return
        if cache.positions[0] <= num_tokens:
            kept[:] = _memories(cache)
        elif kept:
            _put_memories(cache, kept)
        else:
            empty_memories(cache)

    return freeze


@torch.no_grad()
def stream_bits(
    model: RMTForCausalLM, input_ids: torch.Tensor, controls: Mapping[str, Control], show_progress: bool = False
) -> dict[str, torch.Tensor]:
    """Bits that each token of B documents costs with the stream's own memory, and under controls of it.

    The documents are read segment by segment, in lockstep. At the end of every segment each controlled state is lent
    what the `"own"` state has written so far, and then edited by its control, so that `pass_on_memories` means what
    another document has written up to the same position. The window always is a stream's own.

    Args:
        model (`RMTForCausalLM`): The model; read without dropout.
        input_ids: (B, T) int64, on any device. No padding: cut the documents to the shortest.
        controls: By the name of the condition, a function that edits a state in place: `empty_memories`,
            `pass_on_memories`, `swap_memories`, `freeze_memories(num_tokens)`, or one of your own.
        show_progress: Whether to show a progress bar over segments.

    Returns:
        For `"own"` and each control the bits (B, T - 1), float32 or wider, of tokens 1 .. T - 1, on the device of
        `input_ids`. Those of `"own"` are what `token_bits` gives.

    Raises:
        ValueError: If there is no token to predict, no memory to control, or no other document where one is needed.

    Source: ours.
    """
    if input_ids.dim() != 2 or not len(input_ids) or input_ids.shape[1] < 2:
        raise ValueError(
            f"input_ids must be (documents, tokens) with at least 2 tokens, got {tuple(input_ids.shape)}: the first "
            "token is not predicted."
        )
    if "own" in controls:
        raise ValueError("The name 'own' is that of the stream without a control: give the control another name.")
    if controls and not model.config.num_memory_slots:
        raise ValueError("The model has no memory to control: give controls={}, or use token_bits.")
    ids, segment = input_ids.to(model.device), model.config.segment_length
    caches = {name: RMTCache(model.config) for name in ("own", *controls)}
    bits: dict[str, list[torch.Tensor]] = {name: [] for name in caches}
    with evaluation_mode(model):
        for start in tqdm(range(0, ids.shape[1] - 1, segment), desc="Evaluating", disable=not show_progress):
            targets = ids[:, start + 1 : start + segment + 1]
            columns = ids[:, start : start + targets.shape[1]]
            for name, cache in caches.items():
                logits = model(columns, past_key_values=cache, use_cache=True).logits
                bits[name].append(bits_of(logits, targets).to(input_ids.device))
            if columns.shape[1] == segment:
                for name, control in controls.items():
                    _put_memories(caches[name], _memories(caches["own"]))
                    control(caches[name])
    return {name: torch.cat(parts, 1) for name, parts in bits.items()}


def _memories(cache: RMTCache) -> list[Slots]:
    """Of each layer its memory before the last write, and its memory, as `RMTCache.edit_memory` asks for them."""
    states = [layer.state for layer in cache.layers if layer.state is not None]
    return [slots for state in states for slots in (state.memory_before(cache.sizes), state.memory)]


def _put_memories(cache: RMTCache, memories: list[Slots]) -> None:
    """Gives every layer a copy of what `_memories` gave."""
    copies = (memory.map(torch.Tensor.clone) for memory in memories)
    cache.edit_memory(lambda _: next(copies))
