"""Facts of one token: what recall through memory alone is measured with, so that a single layer can learn it.

A fact is one token that says "key k has value v"; a question names a key, and its label is the value. The facts of a
row lie in one segment, at most one in each chunk.
"""

import torch
from torch.nn import functional as F

from rmt_hf import RMTConfig


NUM_KEYS, NUM_VALUES, NUM_NOISE, NUM_FACTS = 4, 8, 64, 4
FIRST_QUESTION = NUM_VALUES  # token ids: values, then questions, then facts, then noise
FIRST_FACT = FIRST_QUESTION + NUM_KEYS
FIRST_NOISE = FIRST_FACT + NUM_KEYS * NUM_VALUES
VOCABULARY = FIRST_NOISE + NUM_NOISE
RECALL_SEGMENT, RECALL_CHUNK = 8, 2  # tokens


def recall_config(num_hidden_layers: int = 1) -> RMTConfig:
    """A window of two segments of 8 tokens, and as many slots as a segment has tokens: two segments fill them."""
    return RMTConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=4,
        chunk_length=RECALL_CHUNK,
        segment_length=RECALL_SEGMENT,
        num_memory_slots=8,
        num_observing_tokens=8,
        use_qk_norm=True,  # a query that grows too sharp leaves the score of the write without a gradient
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
    )


def noise(rows: int, length: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Tokens (rows, length) that mean nothing."""
    return torch.randint(FIRST_NOISE, VOCABULARY, (rows, length), generator=generator)


def write_facts(
    input_ids: torch.Tensor,
    segments: torch.Tensor,
    segment_length: int,
    chunk_length: int,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Writes facts of different keys into a segment of each row, in place.

    Args:
        input_ids: (B, T) int64.
        segments: (B,) int64, the segment of each row.
        segment_length: Tokens; at least as many chunks as there are facts.
        chunk_length: Tokens.
        generator: Where random numbers come from; the global one if None.

    Returns:
        Keys, values and chunks of the facts, each (B, facts) int64.
    """
    rows = len(input_ids)
    keys = torch.rand(rows, NUM_KEYS, generator=generator).argsort(1)[:, :NUM_FACTS]
    values = torch.randint(NUM_VALUES, (rows, NUM_FACTS), generator=generator)
    chunks = torch.rand(rows, segment_length // chunk_length, generator=generator).argsort(1)[:, :NUM_FACTS]
    positions = segments[:, None] * segment_length + chunks * chunk_length
    positions += torch.randint(chunk_length, (rows, NUM_FACTS), generator=generator)
    input_ids.scatter_(1, positions, FIRST_FACT + keys * NUM_VALUES + values)
    return keys, values, chunks


def answers(input_ids: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Labels (B, T) of every question in the rows, one position later; -100 elsewhere: labels say what comes next."""
    by_token = torch.full((len(input_ids), VOCABULARY), -100).scatter_(1, FIRST_QUESTION + keys, values)
    return F.pad(by_token.gather(1, input_ids)[:, :-1], (1, 0), value=-100)
