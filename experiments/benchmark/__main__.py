"""Speed and memory of training, prefill and decoding against context: `python -m experiments.benchmark`.

Every contender runs in a process of its own, and only one computes at a time. In each cell (phase, context, batch) they
take turns, one repetition each, round after round, so that other load on the machine meets all of them.

A training step is forward and backward, no optimizer, over `--train-tokens` tokens in rows as long as the context, or
one longer row. Prefill reads a prompt and projects its last token. Both are done once or twice to warm up, unless they
are very long. Decoding reads one token per row after a context that was filled, not read. All models have random
weights, float32, and equally many parameters, unless they come from a folder.

Finished cells are appended to `rows.jsonl`, and what is there is not done again if settings, commit and machine are the
same: a stopped run goes on. What is not measured has a row that says why.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm.auto import tqdm

from experiments.benchmark.cells import MAIN, Run, WorkerError, cells
from experiments.benchmark.contenders import CONTENDERS, PHASES, Contender, full_context
from experiments.benchmark.report import report
from experiments.reports import environment
from rmt_hf import RMTConfig
from rmt_hf.files import write_whole


PROFILE_CONTEXT, PROFILE_TOKENS = 8192, 64
SIZES = {
    "hidden_size": 320,
    "intermediate_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 5,
    "vocab_size": 8192,
    "segment_length": RMTConfig.segment_length,
    "num_memory_slots": RMTConfig.num_memory_slots,
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line; experiments/results names those of the published figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path("reports/benchmark"))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument(
        "--model", action="append", default=[], metavar="NAME=FOLDER", help="a saved model, up to 131,072 tokens"
    )
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    contexts = [512, 2048, 8192, 32_768, 131_072, 1_048_576]
    parser.add_argument("--contexts", type=int, nargs="+", default=contexts, help="tokens of a row")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8], help="rows of prefill and decoding")
    parser.add_argument("--train-tokens", type=int, default=8192, help="of a training step, in rows of one context")
    parser.add_argument("--tokens", type=int, default=128, help="decoded at each context in one repetition")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions; two if they take long")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--cell-seconds", type=float, default=40.0, help="CPU time of one contender in one cell, warm-up not counted"
    )
    words = f"the same for {' and '.join(MAIN)} in training, and in prefill at batch 1"
    parser.add_argument("--main-cell-seconds", type=float, default=600.0, help=words)
    parser.add_argument("--memory-gib", type=float, help="of one process; default: 0.7 of what is free at the start")
    for name, size in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size)
    args = parser.parse_args(arguments)
    args.contexts, args.batch_sizes = sorted(set(args.contexts)), sorted(set(args.batch_sizes))
    args.contender = {name: CONTENDERS[name] for name in args.contenders}
    for text in args.model:
        name, _, folder = text.partition("=")
        if not name or name in CONTENDERS or not folder or not Path(folder).is_dir():
            parser.error(f"--model wants NAME=FOLDER, a new name and a folder that exists, got {text}")
        args.contender[name] = Contender(folder)
    if args.memory_gib is None:
        args.memory_gib = 0.7 * psutil.virtual_memory().available / 2**30
    return args


def model_fields(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of our configuration; others get as many parameters."""
    return {name: getattr(args, name) for name in SIZES} | {"tie_word_embeddings": True}


def settings(args: argparse.Namespace, where: dict[str, str]) -> dict[str, Any]:
    """What figures depend on: two rows are comparable if all of it is the same."""
    models = [name for name in args.contender if name not in CONTENDERS]
    names = ("train_tokens", "tokens", "rounds", "threads")
    fields = {**model_fields(args), **{name: getattr(args, name) for name in names}, "contenders_from_folders": models}
    return fields | {name: value for name, value in where.items() if name != "command"}


def best_cpu_seconds(task: Callable[[], Any], repetitions: int = 10) -> float:
    """Smallest CPU time of a task, after one call to warm up."""
    times = []
    for _ in range(repetitions + 1):
        start = time.process_time()
        task()
        times.append(time.process_time() - start)
    return min(times[1:])


def machine_peaks(size: int = 1024, megabytes: int = 256) -> dict[str, float]:
    """What the machine can do, per CPU second: operations of a matrix product, bytes read by a matrix-vector product.

    Args:
        size: Of the two square matrices.
        megabytes: Of the matrix that is read, larger than the caches.
    """
    a, b = torch.randn(2, size, size)
    matrix, vector = torch.ones(megabytes * 256, 1024), torch.randn(1024)
    flops = 2 * size**3 / best_cpu_seconds(lambda: a @ b)
    return {"flops_per_second": flops, "bytes_per_second": matrix.nbytes / best_cpu_seconds(lambda: matrix @ vector)}


def write_profile(run: Run, phase: str) -> None:
    """Where the time of ours goes, at batch 1 and the longest context up to `PROFILE_CONTEXT`: profile_<phase>.txt."""
    context = max((context for context in run.args.contexts if context <= PROFILE_CONTEXT), default=None)
    if context is None or "ours" not in run.workers:  # which has a process if any of its cells was to be done
        return
    command = {"do": "profile", "phase": phase, "context": context, "batch": 1, "tokens": PROFILE_TOKENS}
    try:
        table = run.worker("ours").ask(command, 900.0 + 10 * run.args.main_cell_seconds)["table"]
    except WorkerError as error:
        table = f"failed: {error}\n"
    text = f"ours, {phase}, {context:,} tokens, batch 1\n\n{table}"
    write_whole(run.args.output_dir / f"profile_{phase}.txt", lambda path: path.write_text(text, "utf-8"))


def measure(run: Run) -> None:
    """All cells, phase by phase; what the machine can do is measured before each."""
    args, todo = run.args, cells(run.args)
    with tqdm(total=len(todo), desc="Cells") as progress:
        for index, phase in enumerate(args.phases):
            run.append([{"phase": "machine", **machine_peaks()}])
            for jobs in [jobs for jobs in todo if jobs[0].phase == phase]:
                progress.set_postfix_str(f"{phase}, batch {jobs[0].batch}, {jobs[0].contexts[-1]:,} tokens")
                run.run_cell(jobs)
                progress.update()
            write_profile(run, phase)
            later = args.phases[index + 1 :]
            run.close([name for name, each in args.contender.items() if not set(each.phases) & set(later)])


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures what is missing and writes the report; see `parse_arguments`."""
    args = parse_arguments(arguments)
    torch.set_num_threads(args.threads)
    where, config = environment(), model_fields(args)
    run = Run(args, config, settings(args, where))
    try:
        measure(run)
    finally:
        run.close()
    results = report(args, run.rows, full_context(RMTConfig(**config)), settings(args, where), where)
    print(json.dumps(results))
    return results


if __name__ == "__main__":
    main()
