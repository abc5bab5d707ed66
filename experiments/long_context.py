"""What a converted model still knows of long prompts, beside its source and windows of it: tasks through lm-eval.

    python -m experiments.long_context SOURCE calibrated=FOLDER

SOURCE is a folder, SmolLM2 say; contenders are those of `retrofit`, without caches that evict; the source reads no more
than it was trained for. Tasks are those of `long_context_tasks`, which are made once. All are read by the adapter of
`rmt_hf.evaluation.lm_eval`, so nothing is cut. Each finished unit is a line of JSON, and one that is there already is
not measured again; the table is written from the lines.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from experiments.long_context_tasks import KINDS, write_task
from experiments.reports import environment, markdown, read_lines, write_lines
from experiments.retrofit import EVICTED, FULL, Contender, contenders
from rmt_hf.evaluation.lm_eval import RMTLM
from rmt_hf.files import write_whole


def scores_of(model: PreTrainedModel, tokenizer: Any, folder: Path, task: str) -> list[float]:
    """What each document of a task scores: right or not, or the share of its answers."""
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    adapter = RMTLM(model, tokenizer=tokenizer)
    found = simple_evaluate(adapter, tasks=[task], task_manager=manager, bootstrap_iters=0, log_samples=True)
    return [float(sample.get("found", sample.get("acc"))) for sample in found["samples"][task]]


def measure(made: dict[str, Contender], tokenizer: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All lines; those that are missing in the file are measured and added to it."""
    file = args.output_dir / "lines.jsonl"
    lines = read_lines(file)
    names = [name for name in made if args.contenders is None or name.startswith(tuple(args.contenders))]
    for length, kind, name in (
        (length, kind, name) for length in args.lengths for kind in args.kinds for name in names
    ):
        settings = {"segment_length": args.segment_length, "documents": args.documents, "dtype": args.dtype}
        settings["weights"] = made[name].weights
        unit = {"contender": name, "kind": kind, "length": length, "settings": settings}
        if any(all(line[key] == value for key, value in unit.items()) for line in lines):
            continue
        if name == FULL and length > made[FULL].make().config.max_position_embeddings:
            continue
        task = write_task(args.output_dir / "tasks", kind, tokenizer, length, args.documents)
        scores = scores_of(made[name].make(), tokenizer, args.output_dir / "tasks", task)
        lines.append({**unit, "scores": scores, "environment": environment(("torch", "transformers", "lm_eval"))})
        write_lines(file, lines)
        print(f"{name}, {task}: {sum(scores) / len(scores):.2f}", flush=True)
    return lines


def table(lines: list[dict[str, Any]]) -> str:
    """The latest mean of each unit as a Markdown table, a row for each kind and length."""
    latest = {(line["kind"], line["length"], line["contender"]): line["scores"] for line in lines}
    names = list(dict.fromkeys(name for _, _, name in latest))
    rows = []
    for kind, length in sorted({(kind, length) for kind, length, _ in latest}):
        found = [latest.get((kind, length, name)) for name in names]
        count = max(len(scores) for scores in found if scores)
        cells = [f"{sum(scores) / len(scores):.2f}" if scores else "" for scores in found]
        rows.append([kind, f"{length:,}", str(count), *cells])
    return markdown(["task", "tokens", "documents", *names], rows)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder of the model that gets a memory")
    parser.add_argument("--output-dir", type=Path, default=Path("experiments/results/long_context"))
    parser.add_argument("models", nargs="*", metavar="NAME=FOLDER", help="converted models")
    parser.add_argument(
        "--contenders", nargs="+", metavar="NAME", help="names, or beginnings of them; all if not given"
    )
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--documents", type=int, default=10, help="prompts of each kind and length")
    parser.add_argument("--segment-length", type=int, default=128)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measures what is missing, and writes the table."""
    args = parse_arguments(arguments)
    torch.set_num_threads(args.threads)
    source = AutoModelForCausalLM.from_pretrained(args.source, dtype=getattr(torch, args.dtype)).eval()
    made = contenders(source, args.models, args.segment_length)
    made = {name: each for name, each in made.items() if name not in EVICTED.values()}
    text = table(measure(made, AutoTokenizer.from_pretrained(args.source), args))
    write_whole(args.output_dir / "table.md", partial(Path.write_text, data=f"{text}\n", encoding="utf-8"))
    print(text)


if __name__ == "__main__":
    main()
