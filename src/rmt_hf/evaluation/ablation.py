"""Ablations of memory: functions that empty, freeze or exchange it in place, and the bits of streams without it.

Shapes: B documents or rows, T tokens of a document.
"""

import warnings
from collections.abc import Callable, Mapping

import torch
from tqdm.auto import tqdm

from ..cache_rmt import RMTCache, reading_device
from ..memory_rmt import Slots
from ..modeling_rmt import RMTForCausalLM
from .bits import bits_of, evaluation_mode


Ablation = Callable[[RMTCache], None]  # edits the memory of a state in place, also within a segment


def empty_memories(cache: RMTCache) -> None:
    """Empties every slot: attention sees only the window, and the sink if there is one.

    Args:
        cache: State of B streams, changed in place.
    """
    cache.edit_memory(lambda slots: slots.forget(torch.ones_like(slots.strengths[..., 0], dtype=torch.bool)))


def pass_on_memories(cache: RMTCache) -> None:
    """Gives every row the memory of the next one, and the last row that of the first.

    Slots keep the order of their own text, directly before the window, whose tokens may have other positions.

    Args:
        cache: State of at least 2 streams, changed in place.

    Raises:
        ValueError: If there is no other row.
    """
    if cache.is_initialized and cache.batch_size < 2:
        raise ValueError("Another document's memory needs at least 2 rows, got 1: give more documents.")
    cache.edit_memory(lambda slots: slots.map(lambda tensor: tensor.roll(-1, 0)))


def swap_memories(cache: RMTCache) -> None:
    """Exchanges the memories of rows 0 and 1, 2 and 3, ...; a second call restores them.

    Args:
        cache: State of an even number of streams, changed in place.

    Raises:
        ValueError: If the number of rows is odd.
    """
    if cache.is_initialized and cache.batch_size % 2:
        raise ValueError(f"Rows are swapped in pairs, got {cache.batch_size} rows: give an even number of documents.")
    cache.edit_memory(lambda slots: slots.map(lambda tensor: tensor.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)))


def freeze_memories(num_tokens: int) -> Ablation:
    """An ablation that keeps memory as the last segment within the first `num_tokens` tokens leaves it.

    Args:
        num_tokens: Tokens of the stream after which nothing is written; fewer than a segment keep it empty.

    Returns:
        An ablation for one state whose streams advance in lockstep; call it at the end of every segment.

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
    model: RMTForCausalLM,
    input_ids: torch.Tensor,
    ablations: Mapping[str, Ablation] | None = None,
    show_progress: bool = False,
    *,
    controls: Mapping[str, Ablation] | None = None,
) -> dict[str, torch.Tensor]:
    """Bits that each token of B documents costs with the stream's own memory, and under ablations of it.

    The documents are read segment by segment, in lockstep. At the end of every segment each ablated state gets a copy
    of the memory of the `"own"` state, which its ablation then edits: `pass_on_memories` gives what another document
    has written up to the same position. The window always is a stream's own.

    Args:
        model (`RMTForCausalLM`): The model; read without dropout.
        input_ids: (B, T) int64, on any device. No padding: cut the documents to the shortest.
        ablations: By the name of the condition, a function that edits a state in place: `empty_memories`,
            `pass_on_memories`, `swap_memories`, `freeze_memories(num_tokens)`, or one of your own.
        show_progress: Whether to show a progress bar over segments.
        controls: Deprecated name of `ablations`.

    Returns:
        For `"own"` and each ablation the bits (B, T - 1), float32 or wider, of tokens 1 .. T - 1, on the device of
        `input_ids`. Those of `"own"` are those of `token_bits`.

    Raises:
        ValueError: If there is no token to predict, no memory to ablate, or no other document where one is needed.

    Source: ours.
    """
    if input_ids.dim() != 2 or not len(input_ids) or input_ids.shape[1] < 2:
        raise ValueError(
            f"input_ids must be (documents, tokens) with at least 2 tokens, got {tuple(input_ids.shape)}: the first "
            "token is not predicted."
        )
    if controls is not None:
        warnings.warn("controls is now called ablations, and goes in the next version.", FutureWarning, stacklevel=3)
    ablations = ablations or controls or {}
    if "own" in ablations:
        raise ValueError("The name 'own' is that of the stream without ablation: give the ablation another name.")
    if ablations and not model.config.num_memory_slots:
        raise ValueError("The model has no memory to ablate: leave out ablations, or use token_bits.")
    ids, segment = input_ids.to(reading_device(model)), model.config.segment_length
    caches = {name: RMTCache(model.config) for name in ("own", *ablations)}
    bits: dict[str, list[torch.Tensor]] = {name: [] for name in caches}
    with evaluation_mode(model):
        for start in tqdm(range(0, ids.shape[1] - 1, segment), desc="Evaluating", disable=not show_progress):
            targets = ids[:, start + 1 : start + segment + 1]
            columns = ids[:, start : start + targets.shape[1]]
            for name, cache in caches.items():
                logits = model(columns, past_key_values=cache, use_cache=True).logits
                bits[name].append(bits_of(logits, targets).to(input_ids.device))
            if columns.shape[1] == segment:
                for name, ablate in ablations.items():
                    _put_memories(caches[name], _memories(caches["own"]))
                    ablate(caches[name])
    return {name: torch.cat(parts, 1) for name, parts in bits.items()}


def _memories(cache: RMTCache) -> list[Slots]:
    """The memory of each layer before the last write and after it, in the order of `RMTCache.edit_memory`."""
    states = [layer.state for layer in cache.layers if layer.state is not None]
    return [slots for state in states for slots in (state.memory_before(cache.sizes), state.memory)]


def _put_memories(cache: RMTCache, memories: list[Slots]) -> None:
    """Gives every layer a copy of its memories."""
    copies = (memory.map(torch.Tensor.clone) for memory in memories)
    cache.edit_memory(lambda _: next(copies))
