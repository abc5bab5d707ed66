"""What a converted model has gained and lost: against its source, and against windows of the same size.

A home file: it does not travel with the weights.

Shapes: B documents or rows, T tokens.
"""

import random
from collections.abc import Sequence
from typing import Any, cast

import torch
from tqdm.auto import tqdm
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

from . import RMTForCausalLM
from .controls import empty_memories, pass_on_memories, stream_bits
from .distillation import code_stories
from .evaluation import Comparison, token_bits
from .facts import Background, spread
from .peers import read, state_bytes
from .tasks import TaskBatch


CONTROLS = {"memory emptied": empty_memories, "memory of another document": pass_on_memories}


def sliding_window(source: PreTrainedModel, window: int) -> MistralForCausalLM:
    """The source (of Llama's family, without biases) with attention to the last tokens alone; tensors are shared.

    Args:
        source: Any length of attention.
        window: Tokens that a token sees, itself included.
    """
    known = source.config.to_dict()
    kept = {name: known[name] for name in MistralConfig().to_dict() if name in known and name != "model_type"}
    config = MistralConfig(**{**kept, "sliding_window": window, "architectures": None})
    loaded: Any = MistralForCausalLM.from_pretrained(
        None, config=config, state_dict=source.state_dict(), dtype=source.dtype, output_loading_info=True
    )
    model, report = loaded
    if report["missing_keys"] or report["unexpected_keys"]:
        raise ValueError(
            f"source must have the tensors of Mistral, got {sorted(report['unexpected_keys'])[:5]} besides."
        )
    return model.eval()


def window_of_equal_state(model: RMTForCausalLM) -> int:
    """Tokens whose keys and values are as many bytes as the state of one of our streams, rounded up."""
    config = model.config
    num_heads, width = config.key_value_shape
    per_token = 2 * config.num_hidden_layers * num_heads * width * torch.finfo(model.dtype).bits // 8
    return -(-state_bytes(model, 1, config.window_length) // per_token)


def contenders(model: RMTForCausalLM, source: PreTrainedModel) -> dict[str, PreTrainedModel]:
    """Ours, the source with its full attention, and the source with two sliding windows."""
    equal = window_of_equal_state(model)
    return {
        "ours": model,
        "full attention": source.eval(),
        "sliding window, our window": sliding_window(source, model.config.window_length),
        f"sliding window, our state bytes ({equal})": sliding_window(source, equal),
    }


def text_comparison(
    models: dict[str, PreTrainedModel], input_ids: torch.Tensor, token_bytes: torch.Tensor
) -> Comparison:
    """Bits of documents (B, T) read as streams by every model, and by ours under the memory controls.

    Args:
        models: As `contenders` gives them; "ours" among them.
        input_ids: (B, T) int64.
        token_bytes: (B, T - 1), UTF-8 bytes of tokens 1 .. T - 1.
    """
    ours = cast(RMTForCausalLM, models["ours"])
    controls = CONTROLS if len(input_ids) > 1 else {"memory emptied": empty_memories}
    bits = stream_bits(ours, input_ids, controls, show_progress=True)
    bits["ours"] = bits.pop("own")
    for name, model in models.items():
        if name != "ours":
            rows = [token_bits(model, row[None], show_progress=True) for row in input_ids]
            bits[name] = torch.cat(rows)
    return Comparison(bits, token_bytes, ours.config.window_length, reference="ours")


def gap_recovered(comparison: Comparison, window: str) -> float:
    """Share of the gap between a sliding window and full attention, beyond our window, that ours makes good."""
    ours, full, short = (comparison.overall(name)[0] for name in ("ours", "full attention", window))
    return (short - ours) / (short - full)


def recall_rows(background: Background, num_windows: int, window: int, count: int, seed: int) -> list[TaskBatch]:
    """Rows (1, T) that ask for one of four codes, the facts at `num_windows` windows before the question or one less.

    Args:
        background: Text that was not trained on.
        num_windows: At least 2.
        window: Tokens of our window.
        count: Number of rows.
        seed: Of everything that is drawn.
    """
    rng = random.Random(f"{seed} {num_windows}")
    span = ((num_windows - 1) * window, num_windows * window)
    return [spread(code_stories(4, rng)[0], background, span[1] + 64, span, rng) for _ in range(count)]


@torch.no_grad()
def recall(model: PreTrainedModel, rows: Sequence[TaskBatch], piece: int = 512) -> list[bool]:
    """Whether each row's answer would be given, all of its tokens, by taking the likeliest token each time."""
    hits = []
    for row in tqdm(rows, desc="Asking"):
        asked = int((row.labels != -100).sum())
        context, answer = row.input_ids[:, :-asked], row.input_ids[:, -asked:]
        state = None
        for part in context[:, :-1].split(piece, 1):
            _, state = read(model, part, state)
        logits, _ = read(model, torch.cat([context[:, -1:], answer[:, :-1]], 1), state, logits_to_keep=0)
        hits.append(bool((logits.argmax(-1) == answer).all()))
    return hits


def recall_figures(models: dict[str, PreTrainedModel], rows: dict[int, list[TaskBatch]]) -> dict[str, dict[str, Any]]:
    """Share of right answers, and its standard error, of every model at every distance, in windows."""
    figures: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        for distance, batch in rows.items():
            hits = torch.tensor(recall(model, batch)).double()
            error = (hits.var() / len(hits)).sqrt().item() if len(hits) > 1 else 0.0
            figures.setdefault(name, {})[str(distance)] = [hits.mean().item(), error]
    return figures


@torch.no_grad()
def greedy_agreement(model: PreTrainedModel, source: PreTrainedModel, prompts: Sequence[list[int]]) -> float:
    """Share of prompts that both answer with the same 32 tokens, taking the likeliest token each time."""
    same = 0
    for prompt in tqdm(prompts, desc="Answering"):
        ids = torch.tensor([prompt])
        found = [cast(Any, each).generate(ids, max_new_tokens=32, do_sample=False).tolist() for each in (model, source)]
        same += found[0] == found[1]
    return same / max(1, len(prompts))
