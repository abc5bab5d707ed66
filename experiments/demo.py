"""Gives SmolLM2 a memory, calibrates and trains it, reloads it in a new process, and reads a play beyond its window.

`make demo` runs it (`python -m experiments.demo`): at most ten minutes on two cores. Beside the model with memory, its
source and a window of as many bytes read the same play. report.md, metrics.json and two plots go to `--output-dir`.
Without the package that brings SmolLM2 it says what to install, and trains on a book instead (`train_on_a_book`).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer, TrainingArguments
from transformers.utils import logging

from experiments.corpora import shakespeare
from experiments.demo_reader import SLICE_LENGTH, read_text
from experiments.reports import environment
from experiments.retrofit import segment_of_equal_state, window_with_sink
from experiments.smollm2 import unpack
from rmt_hf import RMTForCausalLM
from rmt_hf.conversion import add_memory, calibrate, freeze_base
from rmt_hf.data import token_byte_counts
from rmt_hf.facts import fact_documents
from rmt_hf.files import write_whole
from rmt_hf.modeling_rmt import AUTO_CONFIG


# Told in the beginning, as one would tell an assistant, with how each is asked for and its answer.
FACTS = {
    "Remember that the meeting is at 1845.": ("When is the meeting?\nAnswer: The meeting is at", "1845"),
    "Remember that the safe opens with 6093.": ("What opens the safe?\nAnswer: The safe opens with", "6093"),
    "Remember that the ship leaves from pier 27.": ("Where is the ship?\nAnswer: The ship leaves from pier", "27"),
    "Note: the doctor lives in house 512.": ("Where does the doctor live?\nAnswer: The doctor lives in house", "512"),
}
QUESTIONS = [f"\n\nQuestion: {question}" for question, _ in FACTS.values()]
OURS, FULL, WINDOW = "with memory", "source, which sees everything", "window of as many bytes"


def make_model(source: PreTrainedModel, tokenizer: Any, texts: list[str], args: argparse.Namespace) -> RMTForCausalLM:
    """The converted model: half of its slots last, by a score that is fitted; then memory alone is trained a little."""
    length = args.segment_length
    model = add_memory(source, segment_length=length, num_lasting_slots=2 * length)
    calibrate(model, texts, tokenizer, num_documents=args.calibration_documents)
    print(freeze_base(model))
    made = fact_documents(texts, tokenizer, args.row_length, args.steps, seed=1)
    rows = Dataset.from_list([{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids, _ in made])
    arguments = TrainingArguments(
        output_dir=str(args.output_dir / "training"),
        num_train_epochs=1,
        per_device_train_batch_size=1,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    Trainer(model, arguments, train_dataset=rows).train()
    model.config.use_cache = True  # the Trainer has switched it off; generation wants it
    return model.eval()


def save_with_code(model: RMTForCausalLM, tokenizer: Any, folder: Path) -> None:
    """A folder that opens where rmt_hf is not installed."""
    model.config.auto_map = dict(AUTO_CONFIG)
    write_whole(folder, lambda path: [part.save_pretrained(path) for part in (model, tokenizer)])


def text_with_facts(tokenizer: Any, text: str, num_tokens: int) -> list[int]:
    """Token ids of a play in whose beginning the facts are told."""
    lines = text[: 8 * num_tokens].split("\n\n")
    for index, fact in enumerate(FACTS):
        lines.insert(2 * index + 1, fact)
    return tokenizer("\n\n".join(lines), add_special_tokens=False, verbose=False)["input_ids"][:num_tokens]


def read_in_new_process(folder: Path, task: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """What `demo_reader` finds."""
    files = args.output_dir / "text.json", args.output_dir / "read.json"
    files[0].write_text(json.dumps(task), "utf-8")
    command = [sys.executable, "-m", "experiments.demo_reader", str(folder), *map(str, files)]
    subprocess.run([*command, "--threads", str(args.threads)], check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    return json.loads(files[1].read_text("utf-8"))


def bits_per_byte(readings: dict[str, Any], sizes: torch.Tensor, first: int, last: int) -> dict[str, float]:
    """Of each reading, of tokens `first` to `last`."""
    num_bytes = sizes[first:last].sum().item()
    return {name: sum(reading["bits"][first - 1 : last - 1]) / num_bytes for name, reading in readings.items()}


def plot(readings: dict[str, Any], sizes: torch.Tensor, folder: Path) -> None:
    """Bits per byte by position; milliseconds of a token and megabytes of state by length."""
    from matplotlib.figure import Figure

    span = 2 * SLICE_LENGTH
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, reading in readings.items():
        ends = range(span, len(reading["bits"]) + 1, span)
        axes.plot(ends, [bits_per_byte({"": reading}, sizes, end - span + 1, end)[""] for end in ends], label=name)
    axes.set(xlabel="tokens read so far", ylabel="bits per byte", title="How well the next token is predicted")
    axes.legend()
    write_whole(folder / "bits_per_byte.png", partial(figure.savefig, format="png", dpi=120))
    figure = Figure(figsize=(10, 4), layout="constrained")
    time_axes, byte_axes = figure.subplots(1, 2)
    for name, reading in readings.items():
        lengths = [SLICE_LENGTH * (index + 1) for index in range(len(reading["seconds"]))]
        time_axes.plot(lengths, [1000 * seconds / SLICE_LENGTH for seconds in reading["seconds"]], label=name)
        byte_axes.plot(lengths, [size / 1e6 for size in reading["state_bytes"]], label=name)
    time_axes.set(xlabel="tokens read so far", ylabel="milliseconds a token", ylim=0)
    byte_axes.set(xlabel="tokens read so far", ylabel="megabytes of state", ylim=0)
    byte_axes.legend()
    write_whole(folder / "cost.png", partial(figure.savefig, format="png", dpi=120))


def five_lines(found: dict[str, Any]) -> list[str]:
    """What a person should know of it."""
    bits, ours, full = found["bits_per_byte"], found["cost"][OURS], found["cost"][FULL]
    asked = found["asked"]
    right = "; ".join(f"{sum(each['right'])} of {len(each['right'])} after {each['tokens']:,}" for each in asked)
    question, answer = list(asked[-1]["said"].items())[-1]
    same = "gives the same logits" if found["is_same"] else "gives OTHER logits"
    return [
        f"Text: {bits[FULL]:.3f} bits per byte where all is seen, {bits[OURS]:.3f} with memory, "
        f"{bits[WINDOW]:.3f} through a window of as many bytes.",
        f"Cost: with memory {ours['first_ms']:.1f} ms a token at the beginning and {ours['last_ms']:.1f} after "
        f"{ours['tokens']:,}; the source {full['first_ms']:.1f} and {full['last_ms']:.1f} after {full['tokens']:,}.",
        f"State: {ours['state_bytes'] / 1e6:.0f} MB after any number of tokens; the source's cache has "
        f"{full['state_bytes'] / 1e6:.0f} MB after {full['tokens']:,}.",
        f"The beginning: {right} tokens are right. At the end, {question.strip()!r} goes on {answer.strip()!r}.",
        f"A new process loaded the folder with its own code and {same}; {found['trained']}",
    ]


def report(found: dict[str, Any], lines: list[str]) -> str:
    """The report in words and tables."""
    rows = [
        "| | bits per byte | ms a token at first | at the end | tokens | state, bytes |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, cost in found["cost"].items():
        times = f"{cost['first_ms']:.1f} | {cost['last_ms']:.1f}"
        rows.append(
            f"| {name} | {found['bits_per_byte'][name]:.4f} | {times} | {cost['tokens']:,} | {cost['state_bytes']:,} |"
        )
    said = [
        f"- after {each['tokens']:,} tokens, {question.strip()!r}: {answer.strip()!r}"
        for each in found["asked"]
        for question, answer in each["said"].items()
    ]
    facts = [f"- {name}: {value}" for name, value in found["facts"].items()]
    parts = ["# SmolLM2 with a memory reads a play", *(f"{index}. {line}" for index, line in enumerate(lines, 1))]
    parts += ["", f"Bits per byte are of tokens {found['span']}.", "", *rows, "", "What it answers:", "", *said]
    parts += ["", "![bits per byte by position](bits_per_byte.png)", "", "![cost by length](cost.png)", "", *facts]
    return "\n".join(parts) + "\n"


@torch.no_grad()
def probe_of(model: RMTForCausalLM, input_ids: torch.Tensor) -> float:
    """A number that other weights or other code would change, as `demo_reader` has it."""
    return model(input_ids[:, :300]).logits.double().sum().item()


def cost_of(reading: dict[str, Any]) -> dict[str, Any]:
    """Time of a token at the beginning and at the end, medians of four slices, and the state at the end."""
    times = [1000 * seconds / SLICE_LENGTH for seconds in reading["seconds"]]
    first, last = sorted(times[1:5] or times), sorted(times[-5:-1] or times)
    tokens = SLICE_LENGTH * len(times)
    middle = {"first_ms": first[len(first) // 2], "last_ms": last[len(last) // 2]}
    return {**middle, "tokens": tokens, "state_bytes": reading["state_bytes"][-1]}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, help="folder of a Llama-like model; SmolLM2 if not given")
    parser.add_argument("--output-dir", type=Path, default=Path("reports/demo"))
    parser.add_argument("--segment-length", type=int, default=128)
    parser.add_argument("--calibration-documents", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--row-length", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--tokens", type=int, default=32_768, help="read with memory")
    parser.add_argument("--source-tokens", type=int, default=8192, help="read by the others: what the source can see")
    parser.add_argument("--ask-at", type=int, nargs="+", default=[2048, 8192], help="tokens, besides all")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def source_folder(args: argparse.Namespace) -> Path:
    """Where the source is; without SmolLM2 the process goes on as another demo, which needs no package."""
    if args.source is not None:
        return args.source
    try:
        return unpack(args.output_dir / "source")
    except ModuleNotFoundError as error:
        print(f"{error}\nUntil then, a small model is trained on a book instead.", flush=True)
        command = [sys.executable, "-m", "experiments.train_on_a_book", "--output-dir", "reports/book"]
        raise SystemExit(subprocess.run(command, check=False).returncode) from None


def what_was_asked(said: dict[str, list[str]]) -> list[dict[str, Any]]:
    """Of each length: what was said to each question, and which answers are right."""
    asked = []
    for tokens, words in said.items():
        right = [each.strip().startswith(answer) for (_, answer), each in zip(FACTS.values(), words, strict=True)]
        asked.append({"tokens": int(tokens), "right": right, "said": dict(zip(QUESTIONS, words, strict=True))})
    return asked


def main() -> None:
    args, start = parse_arguments(), time.perf_counter()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    folder = source_folder(args)
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    logging.set_verbosity_error()
    source = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    texts, held_out = shakespeare()
    model = make_model(source, tokenizer, list(texts["text"]), args)
    save_with_code(model, tokenizer, args.output_dir / "model")

    play = max(held_out, key=lambda row: len(row["text"]))
    ids = text_with_facts(tokenizer, play["text"], args.tokens)
    task = {"input_ids": ids, "questions": QUESTIONS, "ask_at": [*args.ask_at, len(ids)]}
    ours = read_in_new_process(args.output_dir / "model", task, args)
    beginning = torch.tensor([ids[: args.source_tokens]])
    narrow = window_with_sink(source, segment_of_equal_state(model))
    others = {FULL: read_text(source, beginning, FULL), WINDOW: read_text(narrow, beginning, WINDOW)}
    readings: dict[str, Any] = {OURS: ours, **{name: reading._asdict() for name, reading in others.items()}}
    readings = {name: {key: each[key] for key in ("bits", "seconds", "state_bytes")} for name, each in readings.items()}
    sizes, first = token_byte_counts(tokenizer)[torch.tensor(ids)], model.config.window_length
    found: dict[str, Any] = {
        "bits_per_byte": bits_per_byte(readings, sizes, first, beginning.shape[1]),
        "span": f"{first:,} to {beginning.shape[1]:,}",
        "cost": {name: cost_of(reading) for name, reading in readings.items()},
        "asked": what_was_asked(ours["answers"]),
        "is_same": ours["probe"] == probe_of(model, beginning) and not ours["code"].startswith("rmt_hf"),
        "trained": f"{freeze_base(model)}, in {args.steps} steps.",
        "facts": {
            "play": play["title"],
            "seconds in all": round(time.perf_counter() - start),
            **environment(("torch", "transformers", "shakespeare")),
        },
    }
    plot(readings, sizes, args.output_dir)
    lines = five_lines(found)
    metrics = json.dumps({**found, "readings": readings}, allow_nan=False)
    for name, text in (("metrics.json", metrics), ("report.md", report(found, lines))):
        write_whole(args.output_dir / name, partial(Path.write_text, data=text, encoding="utf-8"))
    print("\n".join(lines))
    print(f"More in {args.output_dir / 'report.md'}, after {found['facts']['seconds in all']} seconds.")


if __name__ == "__main__":
    main()
