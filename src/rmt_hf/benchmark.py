"""Speed of the model against a plain Llama of equal size, in one run: `python -m rmt_hf.benchmark`.

Every comparison is interleaved (A B A B) and reported as a ratio of smallest or median CPU times, so that other load on
the machine matters little. Prints a table for people and one JSON line last; writes the same JSON, a plot, the profile.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from . import RMTCache, RMTConfig, RMTForCausalLM
from .report import environment, write_whole


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line; the defaults are what docs/results/benchmark.json was made with."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path("reports/benchmark"))
    add_size_arguments(parser)
    parser.add_argument("--train-lengths", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--forward-lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--decode-positions", type=int, nargs="+", default=[2000, 100000])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(arguments)


def add_size_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `build_models` wants to know."""
    parser.add_argument("--hidden-size", type=int, default=320)
    parser.add_argument("--intermediate-size", type=int, default=768)
    parser.add_argument("--num-hidden-layers", type=int, default=8)
    parser.add_argument("--num-attention-heads", type=int, default=5)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--segment-length", type=int, default=RMTConfig.segment_length)
    parser.add_argument("--num-memory-slots", type=int, default=RMTConfig.num_memory_slots)


def build_models(args: argparse.Namespace) -> dict[str, Any]:
    """Ours, and a Llama whose MLP is wider by what our extra parameters cost, so that both have the same size."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    shared = {name: getattr(args, name) for name in names} | {"tie_word_embeddings": True}
    config = RMTConfig(
        **shared,
        intermediate_size=args.intermediate_size,
        segment_length=args.segment_length,
        num_memory_slots=args.num_memory_slots,
    )
    ours = RMTForCausalLM(config)

    def llama(intermediate_size: int) -> LlamaForCausalLM:
        config = LlamaConfig(**shared, intermediate_size=intermediate_size)
        return LlamaForCausalLM._from_config(config, attn_implementation="sdpa")

    missing = ours.num_parameters() - llama(args.intermediate_size).num_parameters()
    per_unit = 3 * args.hidden_size * args.num_hidden_layers
    return {"ours": ours, "llama": llama(args.intermediate_size + round(missing / per_unit))}


def best_seconds(tasks: dict, rounds: int) -> dict:
    """Smallest CPU time of each task over interleaved rounds, after one round to warm up; task name to seconds."""
    best = dict.fromkeys(tasks, math.inf)
    for round_index in range(rounds + 1):
        for name, task in tasks.items():
            start = time.process_time()
            task()
            if round_index:
                best[name] = min(best[name], time.process_time() - start)
    return best


def training_step(model: torch.nn.Module, input_ids: torch.Tensor) -> None:
    """Forward and backward of the language-model loss."""
    model(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward()
    model.zero_grad()


def measure_training(models: dict[str, Any], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Tokens per CPU second for each model and row length, at the same number of tokens per step."""
    tokens = max(args.train_lengths)
    tasks: dict[tuple[str, int], Callable[[], None]] = {}
    for length in args.train_lengths:
        input_ids = torch.randint(0, args.vocab_size, (tokens // length, length))
        for name, model in models.items():
            tasks[name, length] = partial(training_step, model, input_ids)
    seconds = best_seconds(tasks, args.rounds)
    return {
        name: {str(length): tokens / length * length / seconds[name, length] for length in args.train_lengths}
        for name in models
    }


@torch.no_grad()
def measure_forward(model: torch.nn.Module, args: argparse.Namespace) -> dict:
    """CPU seconds of one forward pass per length, and the exponent of the power law through them."""
    tasks = {}
    for length in args.forward_lengths:
        input_ids = torch.randint(0, args.vocab_size, (1, length))
        tasks[length] = partial(model, input_ids=input_ids, use_cache=False, logits_to_keep=1)
    seconds = best_seconds(tasks, args.rounds)
    x = torch.tensor(args.forward_lengths, dtype=torch.float64).log()
    y = torch.tensor([seconds[length] for length in args.forward_lengths], dtype=torch.float64).log()
    exponent = (((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()
    return {"seconds": {str(length): value for length, value in seconds.items()}, "exponent": exponent}


@torch.no_grad()
def measure_decoding(model: RMTForCausalLM, args: argparse.Namespace) -> dict:
    """Median CPU milliseconds per token over a whole segment from each stream position, and state bytes there.

    Positions take turns at every token, so that a slow moment of the machine meets all of them.
    """
    caches: dict[int, RMTCache] = {}
    for position in args.decode_positions:
        caches[position] = RMTCache(model.config)
        for piece in torch.randint(0, args.vocab_size, (1, position)).split(8192, 1):
            model(input_ids=piece, past_key_values=caches[position], logits_to_keep=1)
    tokens = torch.randint(0, args.vocab_size, (model.config.segment_length, 1, 1))
    seconds: dict[int, list[float]] = {position: [] for position in caches}
    for _ in range(args.rounds):
        states = {position: cache.clone() for position, cache in caches.items()}
        for token in tokens:
            for position, state in states.items():
                start = time.process_time()
                model(input_ids=token, past_key_values=state, logits_to_keep=1)
                seconds[position].append(time.process_time() - start)
    return {
        "milliseconds": {str(position): 1000 * statistics.median(values) for position, values in seconds.items()},
        "state_bytes": {str(position): cache.nbytes for position, cache in caches.items()},
    }


def profile_training(model: torch.nn.Module, args: argparse.Namespace) -> str:
    """Where the CPU time of one training step at the longest row goes."""
    input_ids = torch.randint(0, args.vocab_size, (1, max(args.train_lengths)))
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        training_step(model, input_ids)
    return profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=60)


def ratios(results: dict, args: argparse.Namespace) -> dict[str, float]:
    """The figures that the project promises, each as one number."""
    train, shortest, longest = results["train_tokens_per_second"], min(args.train_lengths), max(args.train_lengths)
    figures = {f"train_{longest}_over_{shortest}": train["ours"][str(longest)] / train["ours"][str(shortest)]}
    for length in args.train_lengths:
        figures[f"train_{length}_over_llama"] = train["ours"][str(length)] / train["llama"][str(length)]
    decode, (first, *_, last) = results["decode"]["milliseconds"], args.decode_positions
    figures[f"decode_{last}_over_{first}"] = decode[str(last)] / decode[str(first)]
    figures["forward_exponent"] = results["forward"]["exponent"]
    return figures


def plot(results: dict, path: Path) -> None:
    """Training speed and forward cost against length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, speeds in results["train_tokens_per_second"].items():
        left.plot([int(length) for length in speeds], list(speeds.values()), "o-", label=name)
    left.set(xlabel="tokens per row", ylabel="training tokens per CPU second", ylim=(0, None))
    left.legend()
    seconds = results["forward"]["seconds"]
    right.plot([int(length) for length in seconds], [1e3 * value / int(n) for n, value in seconds.items()], "o-")
    right.set(xlabel="length", ylabel="forward, CPU ms per token", ylim=(0, None))
    for axes, lengths in ((left, results["train_tokens_per_second"]["ours"]), (right, seconds)):
        axes.set_xscale("log", base=2)
        axes.set_xticks([int(length) for length in lengths], [f"{int(length):,}" for length in lengths])
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> dict:
    """Runs all measurements and writes the report."""
    args = parse_arguments(arguments)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    models = build_models(args)
    results: dict = {
        "parameters": {name: model.num_parameters() for name, model in models.items()},
        "train_tokens_per_second": measure_training(models, args),
        "forward": measure_forward(models["ours"].eval(), args),
        "decode": measure_decoding(models["ours"].eval(), args),
    }
    results["ratios"] = ratios(results, args)
    results["settings"] = {name: value for name, value in vars(args).items() if name != "output_dir"}
    results["environment"] = environment()
    table = profile_training(models["ours"].train(), args)
    write_whole(args.output_dir / "profile.txt", lambda path: path.write_text(table))
    write_whole(args.output_dir / "benchmark.png", lambda path: plot(results, path))
    write_whole(args.output_dir / "benchmark.json", lambda path: path.write_text(json.dumps(results, indent=1) + "\n"))
    for name, value in results["ratios"].items():
        print(f"{name:32} {value:8.3f}")
    print(json.dumps(results))
    return results


if __name__ == "__main__":
    main()
