"""Fits the score of lasting slots to what the source's own attention comes back to. Nothing is backpropagated.

A converted model is its source where all is seen. So its own weights say, for every token of a document, how much
attention the token gets once it has left the window; a linear map of the hidden state is fitted to that, layer by layer
and head by head.

Shapes: T tokens of a document, E hidden size, H query heads, G key/value heads, D head width.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from .attention_rmt import RMTAttention, rotate
from .facts import fact_documents
from .files import write_whole
from .memory_rmt import at_least_float32
from .modeling_rmt import RMTForCausalLM
from .sources import check_source, trained_length


BLOCK_LENGTH = 256  # queries whose attention exists at once
FLOOR = -20.0  # log of an attention that nothing notices
MEAN_WEIGHT = 0.75  # of the mean in a target: what everything attends to, as line breaks, is hardly missed
LEAST_NEEDED = 0.5  # share of a document's tokens that count as equally little needed: none of them is to be kept
RIDGE = 1e-3  # of the mean variance of a hidden state
NUM_DOCUMENTS = 24  # that are made of texts by default
# In windows: length of a made document, and its end, whose tokens few queries come after, which is not fitted.
DOCUMENT_WINDOWS, END_WINDOWS = 12, 3
SINK_LENGTH = 4  # first tokens, which get attention whatever they are

Texts = str | Sequence[str] | Sequence[Sequence[int]] | Sequence[torch.Tensor]


def calibrate(
    model: RMTForCausalLM,
    texts: Texts,
    tokenizer: PreTrainedTokenizerBase | None = None,
    num_documents: int = NUM_DOCUMENTS,
    seed: int = 0,
    show_progress: bool = True,
) -> torch.Tensor:
    """Fits the score of lasting slots, so that they keep what will be asked for. Minutes on two cores.

    The target of a token is the log of the largest attention that it gets, where all is seen, from tokens more than a
    window later, less 0.75 of the log of the mean; the lower half of a document's tokens gets its median. The fit is a
    ridge regression from the hidden state after the input norm. The mean score is 0, so that values of kept tokens are
    scaled by 0.98 to 1.

    Args:
        model: From `add_memory`, with `num_lasting_slots` above 0. The weight and bias of its scores are changed in
            place, and nothing else.
        texts: Prose, of which documents are made that tell facts and ask for them at their end; or documents as token
            ids, (T,) each, which are read as they are.
        tokenizer: Of the model; needed for texts.
        num_documents: Made of texts.
        seed: Of what is drawn for them.
        show_progress: Whether to show a progress bar.

    Returns:
        The share of the target's variance that the score explains, (layers, G) float64.

    Raises:
        ValueError: If the model was not converted or has no score; if texts come without a tokenizer, or are too short.
    """
    memories = _memories(model)
    documents = _documents(model, texts, tokenizer, num_documents, seed)
    sums = [_NormalEquations() for _ in memories]
    distance, end = model.config.window_length, _not_fitted(model)
    with torch.no_grad():
        for ids in tqdm(documents, desc="Calibrating", unit="document", disable=not show_progress):
            for index, (attention, hidden, query, key) in enumerate(full_attention(model, ids)):
                wanted = later_attention(query, key, distance, attention.scaling)
                wanted = wanted[SINK_LENGTH:-end]
                sums[index].add(
                    hidden[SINK_LENGTH:-end], wanted.maximum(wanted.quantile(LEAST_NEEDED, 0, interpolation="higher"))
                )
        shares = []
        for memory, equations in zip(memories, sums, strict=True):
            weight, bias, explained = equations.solve()
            memory.score_proj.weight.copy_(weight)
            memory.score_proj.bias.copy_(bias)
            shares.append(explained)
    return torch.stack(shares)


def _documents(
    model: RMTForCausalLM, texts: Texts, tokenizer: PreTrainedTokenizerBase | None, num_documents: int, seed: int
) -> list[torch.Tensor]:
    """Documents that are long enough, no longer than the source can read."""
    given: list[Any] = [texts] if isinstance(texts, str) else list(texts)
    limit = trained_length(model.config.converted_from)
    if any(isinstance(text, str) for text in given):
        if tokenizer is None:
            raise ValueError("tokenizer must be given with texts, got None: give it, or token ids instead of texts.")
        length = min(DOCUMENT_WINDOWS * model.config.window_length, limit or 2**62)
        told_until = length - _not_fitted(model)  # what is told behind it is not fitted
        made = fact_documents(given, tokenizer, length, num_documents, seed, told_until)
        given = [document.input_ids for document in made]
    documents = [torch.as_tensor(ids)[:limit] for ids in given]
    least, longest = _not_fitted(model) + SINK_LENGTH, max(map(len, documents), default=0)
    if longest <= least:
        raise ValueError(
            f"texts must have a document of more than {least} tokens, got {longest} at most: give longer ones, or a "
            "model with a smaller window."
        )
    return [ids for ids in documents if len(ids) > least]


def _memories(model: RMTForCausalLM) -> list[Any]:
    """Memory of each layer; refuses models without a score, and those that are not their source where all is seen."""
    check_source(model)
    if not isinstance(model, RMTForCausalLM) or getattr(model.config, "converted_from", None) is None:
        raise ValueError(
            "model must be from rmt_hf.conversion, whose attention was trained where all is seen: use add_memory first."
        )
    found = [layer.self_attn.memory for layer in model.model.layers]
    if any(memory is None or memory.score_proj is None for memory in found):
        lasting = model.config.num_lasting_slots
        raise ValueError(
            f"num_lasting_slots must be above 0 for a score to be fitted, got {lasting}: give it to add_memory, half "
            "of num_memory_slots, say."
        )
    return found


def _not_fitted(model: RMTForCausalLM) -> int:
    """Tokens at the end of a document that are not fitted."""
    return END_WINDOWS * model.config.window_length


def full_attention(
    model: RMTForCausalLM, input_ids: torch.Tensor
) -> Iterator[tuple[RMTAttention, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Reads a document as the source does, each token seeing all before it, and gives what each layer attends with.

    Args:
        model: A converted one.
        input_ids: (T,) int64.

    Yields:
        Attention module, its input after the norm (T, E), queries (T, H, D) and keys (T, G, D) with rotary encoding.
    """
    decoder, ids = model.model, input_ids[None].to(model.device)
    hidden = decoder.embed_tokens(ids)
    rotary = decoder.rotary_emb(torch.arange(ids.shape[1], device=ids.device)[None], hidden.dtype)
    for layer in decoder.layers:
        attention, normed = layer.self_attn, layer.input_layernorm(hidden)
        query, key = (rotate(attention.heads(name, normed), *rotary) for name in "qk")
        yield attention, normed[0], query[0], key[0]
        query, key, value = (each.transpose(1, 2) for each in (query, key, attention.heads("v", normed)))
        attended = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=attention.scaling, enable_gqa=True
        )
        hidden = hidden + attention.o_proj(attended.transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def later_attention(query: torch.Tensor, key: torch.Tensor, distance: int, scaling: float) -> torch.Tensor:
    """How much each token is asked for by tokens more than `distance` later, (T, G).

    Log of the largest attention that it gets from one of them, less `MEAN_WEIGHT` times the log of the mean; both are
    `FLOOR` at least, also where nothing comes so long after. Attention exists of `BLOCK_LENGTH` queries at a time. A
    key/value head counts the queries of all heads that share it.

    Args:
        query: (T, H, D) with rotary encoding.
        key: (T, G, D) with rotary encoding.
        distance: Tokens.
        scaling: Of the products.
    """
    length, num_groups = key.shape[:2]
    asking = at_least_float32(query).unflatten(1, (num_groups, -1)).permute(1, 2, 0, 3) * scaling  # (G, H / G, T, D)
    keys = at_least_float32(key).permute(1, 2, 0)[:, None]  # (G, 1, D, T)
    largest, total = asking.new_zeros(num_groups, length), asking.new_zeros(num_groups, length)
    for start in range(0, length, BLOCK_LENGTH):
        end = min(length, start + BLOCK_LENGTH)
        logits = asking[:, :, start:end] @ keys[..., :end]
        own = logits[..., start:]  # the queries' own columns: any before them is seen by all
        own.masked_fill_(own.new_ones(own.shape[2:], dtype=torch.bool).triu(1), -torch.inf)
        late = logits.softmax(-1)[..., : max(0, end - 1 - distance)]
        edge = late[..., max(0, start - distance) :]  # too near to some of the queries
        edge.masked_fill_(edge.new_ones(edge.shape[2:], dtype=torch.bool).triu(min(0, start - distance)), 0)
        largest[:, : late.shape[-1]] = torch.maximum(largest[:, : late.shape[-1]], late.amax((1, 2)))
        total[:, : late.shape[-1]] += late.sum((1, 2))
    count = asking.shape[1] * (torch.arange(length, 0, -1, device=key.device) - 1 - distance).clamp_min(1)
    logs = [attention.T.log().clamp_min(FLOOR) for attention in (largest, total / count)]
    return logs[0] - MEAN_WEIGHT * logs[1]


class _NormalEquations:
    """Sums of a linear regression with several targets, in float64 on the CPU."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: list[Any] = [0.0] * 5

    def add(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """More rows: inputs (n, E), targets (n, G)."""
        x, y = at_least_float32(inputs), targets
        self.count += len(x)
        new = (x.sum(0), y.sum(0), x.T @ x, x.T @ y, (y * y).sum(0))
        self.sums = [old + more.cpu().double() for old, more in zip(self.sums, new, strict=True)]

    def solve(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Weight (G, E), a bias (G,) with which the mean of the fit is 0, and the share of variance it explains."""
        x, y, xx, xy, yy = self.sums
        x, y = x / self.count, y / self.count
        square, cross = xx - self.count * torch.outer(x, x), xy - self.count * torch.outer(x, y)
        variance = yy - self.count * y * y
        ridge = RIDGE * square.diagonal().mean() * torch.eye(len(x), dtype=x.dtype)
        weight = torch.linalg.solve(square + ridge, cross)
        missed = variance - 2 * (weight * cross).sum(0) + (weight * (square @ weight)).sum(0)
        return weight.T, -(x @ weight), 1 - missed / variance


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser("rmt calibrate", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or Hub id of a converted model with lasting slots")
    parser.add_argument("texts", help="file, folder or data set of prose, 3,000 tokens at least")
    parser.add_argument("target", type=Path, help="folder, which must not exist yet")
    parser.add_argument(
        "--num-documents", type=int, default=NUM_DOCUMENTS, help="made of the texts (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn for them (default %(default)s)")
    args = parser.parse_args(arguments)
    if args.target.exists():
        raise FileExistsError(f"{args.target} exists already: choose a new folder, or delete it first.")
    from .texts import read_texts  # needs the extra for training

    texts, tokenizer = read_texts(args.texts), AutoTokenizer.from_pretrained(args.model)
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    explained = calibrate(model, texts, tokenizer, args.num_documents, args.seed)

    def write(folder: Path) -> None:
        for part in (model, tokenizer):
            part.save_pretrained(folder)

    write_whole(args.target, write)
    print(f"{args.target}: scores explain {explained.mean():.0%} of what the source comes back to")
