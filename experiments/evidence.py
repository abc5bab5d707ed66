"""What each choice in the architecture is worth, and what baselines reach: `python -m experiments.evidence`.

Every row of the table is a form of our model, or a baseline, of equal size. It is trained from the same seeds on the
same data in the same order, on two things: recall of facts that have left the window, and text. Runs are done seed by
seed, and each finished run is a JSON line in `runs.jsonl`; a run that is there already is not done again, so a stopped
grid goes on where it was, and several processes may share the work (`--tasks recall` beside `--tasks text`). The table
and the plot are made of all lines so far.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments, default_data_collator, set_seed

from experiments.baselines import build_baseline, num_parameters, read, state_bytes
from experiments.corpora import shakespeare, whole_rows
from experiments.evidence_report import write_evidence
from experiments.one_token_facts import (
    FIRST_QUESTION,
    NUM_FACTS,
    RECALL_CHUNK,
    RECALL_SEGMENT,
    answers,
    noise,
    recall_config,
    write_facts,
)
from experiments.reports import environment, read_lines
from experiments.tasks import TaskBatch, accuracy
from rmt_hf import RMTConfig, RMTForCausalLM
from rmt_hf.data import token_byte_counts, tokenize, train_tokenizer
from rmt_hf.evaluation.ablation import empty_memories, pass_on_memories, stream_bits
from rmt_hf.evaluation.bits import bits_per_byte, token_bits
from rmt_hf.memory_rmt import RMTRing


NUM_QUESTIONS = 16


class Row(NamedTuple):
    """A form of our model, or a baseline.

    Args:
        fields: Of the configuration that differ from the default; functions of the default configuration.
        prepare: What is done to the new model before it is trained.
        baseline: Name of a baseline in place of our model, and what `build_baseline` is told besides.
        is_for_text_alone: Whether recall says nothing about it.
        share: Of the tokens of text that all others read: as many as a slower baseline reads in the time of the default
            row.
    """

    fields: Callable[[RMTConfig], dict[str, Any]] = lambda base: {}
    prepare: Callable[[RMTForCausalLM], None] = lambda model: None
    baseline: tuple[str, dict[str, Any]] | None = None
    is_for_text_alone: bool = False
    share: float = 1.0


def fields(**values: Any) -> Callable[[RMTConfig], dict[str, Any]]:
    """The same fields for every default configuration."""
    return lambda base: values


def lasting(share: float) -> Callable[[RMTConfig], dict[str, Any]]:
    """Memory in two parts; `share` of the slots belong to the lasting one."""
    return lambda base: {"num_lasting_slots": round(share * base.num_memory_slots)}


def candidates(share: float) -> Callable[[RMTConfig], dict[str, Any]]:
    """Ring groups of `share` of a segment: more tokens of each chunk are candidates; chunks stay as they are."""
    return lambda base: {"num_slots_per_chunk": round(share * base.chunk_length)}


def without_lookback(base: RMTConfig) -> dict[str, Any]:
    """No segment before the current one; the state bytes that it took go to memory.

    A slot is there twice: in memory, and in the prefix of the window.
    """
    group = base.num_slots_per_segment
    num_more = group * round(base.segment_length / 2 / group)
    return {"num_lookback_segments": 0, "num_memory_slots": base.num_memory_slots + num_more}


def paper_form(base: RMTConfig) -> dict[str, Any]:
    """What `RMTConfig.paper` changes, at equal state bytes."""
    return {"fusion_type": "softmax", "memory_write": "mean", "use_qk_norm": False, **without_lookback(base)}


def set_rings(model: RMTForCausalLM, **values: float) -> None:
    """Sets parameters of all rings of memory, by name."""
    for ring in (module for module in model.modules() if isinstance(module, RMTRing)):
        for name, value in values.items():
            torch.nn.init.constant_(getattr(ring, name), value)


# The default keeps by the score alone, with gates that mostly keep, and one candidate a chunk: every other row is one
# step away from it.
ROWS = {
    "default": Row(),
    "no memory": Row(fields(num_memory_slots=0)),
    "sink": Row(fields(use_attention_sink=True)),
    "no memory, sink": Row(fields(num_memory_slots=0, use_attention_sink=True)),
    "paper": Row(paper_form),
    "evidence alone": Row(lasting(0)),
    "two parts, halves": Row(lasting(1 / 2)),
    "two parts, a quarter lasting": Row(lasting(1 / 4), is_for_text_alone=True),
    "mean write": Row(fields(memory_write="mean")),
    "no local path": Row(fields(use_local_attention=False)),
    "evidence alone, 8 observing tokens": Row(
        fields(num_lasting_slots=0, num_observing_tokens=8), is_for_text_alone=True
    ),
    "evidence alone, 32 observing tokens": Row(
        fields(num_lasting_slots=0, num_observing_tokens=32), is_for_text_alone=True
    ),
    "evidence alone, fade 0.1": Row(lasting(0), prepare=partial(set_rings, fade=0.1)),
    "evidence alone, fade 0.4": Row(lasting(0), prepare=partial(set_rings, fade=0.4)),
    "groups of half a segment": Row(candidates(1 / 2), is_for_text_alone=True),
    "groups of a segment": Row(candidates(1)),
    "half-open gates": Row(prepare=partial(set_rings, gate_bias=0.0)),
    "gate bias -3": Row(prepare=partial(set_rings, gate_bias=-3.0)),
    "hard gates": Row(prepare=partial(set_rings, gate_scale=8.0)),
    "no lookback": Row(without_lookback),
    "no query/key norm": Row(fields(use_qk_norm=False)),
    "Llama": Row(baseline=("llama", {})),
    "Mistral, our window": Row(baseline=("mistral", {})),
    "Mistral, our state bytes": Row(baseline=("mistral", {"equal_state": True})),
    "Qwen3": Row(baseline=("qwen3", {})),
    "Qwen3, our window": Row(baseline=("qwen3_window", {})),
    "Qwen3, our state bytes": Row(baseline=("qwen3_window", {"equal_state": True})),
    "Mamba2": Row(baseline=("mamba2", {})),
    "Mamba2, our time": Row(baseline=("mamba2", {}), is_for_text_alone=True, share=0.31),
    "memory tokens": Row(baseline=("memory_tokens", {})),
    "memory tokens, our time": Row(baseline=("memory_tokens", {}), is_for_text_alone=True, share=0.4),
}


def build(row: Row, base: RMTConfig, seed: int) -> PreTrainedModel:
    """A new model of a row with as many parameters as the default row: the MLP makes up for what a form has less."""
    set_seed(seed)
    if row.baseline is not None:
        name, arguments = row.baseline
        return build_baseline(name, base, **arguments)
    changed = row.fields(base)

    def make(intermediate_size: int) -> RMTForCausalLM:
        return RMTForCausalLM(RMTConfig(**{**base.to_diff_dict(), "intermediate_size": intermediate_size, **changed}))

    with torch.device("meta"):
        wanted = num_parameters(RMTForCausalLM(base)).non_embedding
        missing = wanted - num_parameters(make(base.intermediate_size)).non_embedding
    set_seed(seed)
    model = make(base.intermediate_size + round(missing / (3 * base.hidden_size * base.num_hidden_layers)))
    row.prepare(model)
    return model


def recall_batch(rows: int, num_segments: int, generator: torch.Generator, distance: int | None = None) -> TaskBatch:
    """Facts in one segment, noise, and questions from the second segment after it on, where no window reaches.

    A fact is one token, "key k has value v", so that one layer can learn the task: what is compared is memory, not how
    a model puts two tokens together.

    Args:
        rows: Number of rows.
        num_segments: Segments of `RECALL_SEGMENT` tokens.
        generator: Where random numbers come from.
        distance: Segments from the facts to all questions; None for facts and questions anywhere.
    """
    segment = RECALL_SEGMENT
    input_ids = noise(rows, num_segments * segment, generator)
    last = num_segments - 2 if distance is None else 1
    segments = torch.randint(last, (rows, 1), generator=generator)
    keys, values, _ = write_facts(input_ids, segments[:, 0], segment, RECALL_CHUNK, generator)
    at = segments * segment
    first, end = (at + 2 * segment, num_segments * segment) if distance is None else (at + distance * segment, 0)
    room = end - 1 - first if distance is None else torch.full_like(first, segment)
    positions = first + (torch.rand(rows, NUM_QUESTIONS, generator=generator) * room).long()
    asked = torch.randint(NUM_FACTS, (rows, NUM_QUESTIONS), generator=generator)
    input_ids.scatter_(1, positions, FIRST_QUESTION + keys.gather(1, asked))
    return TaskBatch(input_ids, answers(input_ids, keys, values))


def train(model: PreTrainedModel, dataset: Any, collator: Any, args: argparse.Namespace, **settings: Any) -> float:
    """Trains in place with the plain Trainer; returns the CPU seconds it took."""
    arguments = TrainingArguments(
        output_dir=str(args.output_dir),
        lr_scheduler_type="cosine",
        warmup_steps=max(1, settings["max_steps"] // 20),
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **settings,
    )
    start = time.process_time()
    Trainer(model, arguments, train_dataset=dataset, data_collator=collator).train()
    return time.process_time() - start


def run_recall(model: PreTrainedModel, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Trains on streams that grow to 12 segments; asks at 8 and at 64 segments, beyond any window."""
    steps, longest = args.recall_steps, 12

    def collate(examples: list[dict[str, int]]) -> dict[str, torch.Tensor]:
        step = examples[0]["step"]
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        return recall_batch(32, min(longest, 4 + 2 * (longest - 4) * step // steps), generator)._asdict()

    dataset = Dataset.from_dict({"step": list(range(steps))})
    settings = {"max_steps": steps, "learning_rate": 3e-3, "adam_beta2": 0.98, "seed": seed}
    settings |= {
        "per_device_train_batch_size": 1,
        "remove_unused_columns": False,
        "train_sampling_strategy": "sequential",
    }
    seconds = train(model, dataset, collate, args, **settings)
    figures: dict[str, Any] = {"train_seconds": seconds, "train_tokens": None}
    model.eval()
    for distance in (8, 64):
        batch = recall_batch(256, distance + 2, torch.Generator().manual_seed(10**9 + seed), distance)
        with torch.no_grad():
            logits = torch.cat([model(rows).logits for rows in batch.input_ids.split(32)])
        figures[f"accuracy_{distance}"] = accuracy(logits, batch.labels).mean().item()
    return figures


def text_config(vocab_size: int, token_id: int) -> RMTConfig:
    """A window of two segments of 32 tokens, and 64 slots."""
    return RMTConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=2,
        num_attention_heads=4,
        chunk_length=8,
        segment_length=32,
        num_memory_slots=64,
        initializer_range=0.08,
        tie_word_embeddings=True,
        bos_token_id=token_id,
        eos_token_id=token_id,
        pad_token_id=token_id,
    )


class Text(NamedTuple):
    """Training rows, held-out documents (B, T) with the bytes of their tokens (B, T - 1), and the configuration."""

    rows: Dataset
    input_ids: torch.Tensor
    token_bytes: torch.Tensor
    config: RMTConfig


def read_text(args: argparse.Namespace) -> Text:
    """Shakespeare; every fourth play is held out."""
    training, held_out = shakespeare()
    tokenizer = train_tokenizer(training["text"], 1025)  # the last is padding, which no row has and no model knows
    rows = whole_rows(tokenize(training, tokenizer), args.row_length)
    documents = tokenize(held_out, tokenizer)["input_ids"]
    input_ids = torch.tensor([ids[: args.document_tokens] for ids in documents if len(ids) >= args.document_tokens])
    token_bytes = token_byte_counts(tokenizer)[input_ids[:, 1:]]
    return Text(rows, input_ids, token_bytes, text_config(len(tokenizer) - 1, tokenizer.eos_token_id))


def run_text(
    model: PreTrainedModel, seed: int, args: argparse.Namespace, text: Text, share: float = 1.0
) -> dict[str, Any]:
    """Trains on rows of text; bits per byte of held-out documents beyond the window, the state carried all the way.

    Full attention, whose positions end with its training rows, reads with windows of that length and strides of half of
    it.
    """
    steps = round(share * args.text_tokens / args.row_length)
    settings = {"max_steps": steps, "learning_rate": 4e-3, "adam_beta2": 0.99, "weight_decay": 0.1, "seed": seed}
    seconds = train(model, text.rows, default_data_collator, args, per_device_train_batch_size=1, **settings)
    sliding = getattr(model.config, "sliding_window", None)
    strides = args.row_length if model.config.model_type in ("llama", "qwen3") and not sliding else None
    bits = {"own": token_bits(model, text.input_ids, window=strides)}
    if isinstance(model, RMTForCausalLM) and model.config.num_memory_slots:
        bits = stream_bits(model, text.input_ids, {"empty": empty_memories, "other": pass_on_memories})
    edges = [text.config.window_length, text.input_ids.shape[1]]
    by_document = {name: bits_per_byte(each, text.token_bytes, edges)[:, 0].tolist() for name, each in bits.items()}
    return {"train_seconds": seconds, "train_tokens": steps * args.row_length, "bits_per_byte": by_document}


@torch.no_grad()
def decode_milliseconds(model: PreTrainedModel, tokens: int = 30) -> float:
    """Median CPU milliseconds to read one token after 512 others."""
    _, state = read(model.eval(), torch.ones(1, 512, dtype=torch.long))
    times = []
    for _ in range(tokens):
        start = time.process_time()
        _, state = read(model, torch.ones(1, 1, dtype=torch.long), state)
        times.append(time.process_time() - start)
    return 1000 * sorted(times)[tokens // 2]


def run(task: str, name: str, seed: int, args: argparse.Namespace, text: Text | None) -> dict[str, Any]:
    """One run, ready for JSON."""
    row, base = ROWS[name], recall_config() if text is None else text.config
    model = build(row, base, seed)
    figures = run_recall(model, seed, args) if text is None else run_text(model, seed, args, text, row.share)
    sizes = {"parameters": num_parameters(model).non_embedding, "state_bytes": state_bytes(model, 1, 4095)}
    figures |= {**sizes, "decode_milliseconds": decode_milliseconds(model)}
    return {"task": task, "row": name, "seed": seed, **figures, "environment": environment(("torch", "transformers"))}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line; the defaults are what experiments/results/evidence is made with."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path("experiments/results/evidence"))
    parser.add_argument("--tasks", nargs="+", choices=("recall", "text"), default=["recall", "text"])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recall-steps", type=int, default=500)
    parser.add_argument("--text-tokens", type=int, default=1_024_000, help="of a training run")
    parser.add_argument("--row-length", type=int, default=1024, help="tokens of a training row of text")
    parser.add_argument("--document-tokens", type=int, default=8192, help="read of each held-out document")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Does the runs that are missing, then writes the table and the plot."""
    args = parse_arguments(arguments)
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # numbers next to zero, which closed gates make, are slow on a CPU
    args.output_dir.mkdir(parents=True, exist_ok=True)
    file = args.output_dir / "runs.jsonl"
    settings = {name: getattr(args, name) for name in ("recall_steps", "text_tokens", "row_length", "document_tokens")}
    text = read_text(args) if "text" in args.tasks else None
    for seed in args.seeds:
        for task in args.tasks:
            for name in args.rows:
                is_there = {"task": task, "row": name, "seed": seed, **settings} in done(file)
                if is_there or (task == "recall" and ROWS[name].is_for_text_alone):
                    continue
                start = time.perf_counter()
                result = run(task, name, seed, args, text if task == "text" else None)
                with file.open("a", encoding="utf-8") as lines:  # one write, so that processes can share the file
                    lines.write(json.dumps({**result, "settings": settings}) + "\n")
                print(f"{task}, {name}, seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
    write_evidence(file, args.output_dir, list(ROWS))
    print((args.output_dir / "table.md").read_text("utf-8"))


def done(file: Path) -> list[dict[str, Any]]:
    """Which runs have a line, with the settings they were done with."""
    return [{**{name: run[name] for name in ("task", "row", "seed")}, **run["settings"]} for run in read_lines(file)]


if __name__ == "__main__":
    main()
