"""What a token costs at growing contexts, against a Llama of equal size: `python -m rmt_hf.decoding_benchmark`.

All contenders of one context and batch size take turns at every token, in one process; medians of CPU time. Caches of
Llama are filled with random numbers, and the clock of our state is set on beyond what fills its window and memory: what
a token costs does not depend on what was read. (`rmt_hf.benchmark` reads its 100,000 tokens.) Prints a table for people
and one JSON line last; writes the same JSON and a plot.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from tqdm.auto import tqdm
from transformers import Cache, DynamicCache, StaticCache

from . import RMTCache, RMTForCausalLM
from .benchmark import add_size_arguments, build_models
from .report import environment, write_whole


COMPILED_LLAMA = 131_072  # columns of all rows; a third cache beyond would not fit into the memory of a small machine


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line; the defaults are what docs/results/decoding was made with."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_size_arguments(parser)
    parser.add_argument("--output-dir", type=Path, default=Path("reports/decoding"))
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 8192, 32768, 100_000, 1_000_000])
    parser.add_argument("--longest-llama", type=int, default=32768, help="longest context that Llama decodes at")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=128, help="at each context")
    parser.add_argument(
        "--seconds", type=float, default=40.0, help="a context ends after so many, if 8 tokens are done"
    )
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(arguments)


def state_at(model: RMTForCausalLM, position: int, num_rows: int) -> RMTCache:
    """A state whose window and memory are full, if the position is far enough, with its clock set to the position."""
    config = model.config
    filling = config.window_length + config.num_memory_slots // config.num_slots_per_segment * config.segment_length
    length = position if position <= filling else filling + (position - filling) % config.segment_length
    input_ids = cast(torch.LongTensor, torch.randint(0, config.vocab_size, (num_rows, length)))
    cache = model.memorize(input_ids)
    cache.positions = [position] * num_rows
    return cache


def filled(cache: Cache, config: Any, context: int, num_rows: int) -> Cache:
    """A cache of Llama that holds `context` columns of random numbers."""
    shape = (num_rows, config.num_key_value_heads, context, config.hidden_size // config.num_attention_heads)
    for layer in range(config.num_hidden_layers):
        cache.update(torch.randn(shape), torch.randn(shape), layer)
    return cache


def contenders(
    models: dict[str, Any], args: argparse.Namespace, context: int, num_rows: int
) -> dict[str, Callable[[], Any]]:
    """Name of each contender, and what reads one more token with it."""
    ours, llama = models["ours"], models["llama"]
    state, token = state_at(ours, context, num_rows), torch.ones(num_rows, 1, dtype=torch.long)
    steps: dict[str, Callable[[], Any]] = {}
    steps["ours"] = partial(ours, input_ids=token, past_key_values=state, logits_to_keep=1)
    if args.compile:
        arguments = {"input_ids": token, "past_key_values": state.clone(), "logits_to_keep": 1}
        steps["ours, compiled"] = partial(models["ours, compiled"], **arguments)
    if context > args.longest_llama:
        return steps
    caches: dict[str, Cache] = {
        "Llama, dynamic cache": DynamicCache(config=llama.config),
        "Llama, static cache": StaticCache(config=llama.config, max_cache_len=context + args.tokens + 4),
    }
    for name, cache in caches.items():
        cache = filled(cache, llama.config, context, num_rows)
        steps[name] = partial(llama, input_ids=token, past_key_values=cache, logits_to_keep=1)
    if args.compile and context * num_rows <= COMPILED_LLAMA:
        cache = StaticCache(config=llama.config, max_cache_len=context + args.tokens + 4)
        arguments = {"input_ids": token, "logits_to_keep": 1}
        arguments["past_key_values"] = filled(cache, llama.config, context, num_rows)
        steps["Llama, static cache, compiled"] = partial(models["Llama, compiled"], **arguments)
    return steps


@torch.no_grad()
def milliseconds(steps: dict[str, Callable[[], Any]], args: argparse.Namespace) -> dict[str, float]:
    """Median CPU milliseconds of a step, in turns; two steps of each to warm up."""
    for step in steps.values():
        step()
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + args.seconds
    for index in range(args.tokens):
        for name, step in steps.items():
            start = time.process_time()
            step()
            seconds[name].append(time.process_time() - start)
        if index >= 7 and time.perf_counter() > end:
            break
    return {name: 1000 * statistics.median(values) for name, values in seconds.items()}


def ratios(results: dict, args: argparse.Namespace) -> dict[str, float]:
    """The figures that the project promises: against Llama's best eager time, and flatness."""
    figures = {}
    for rows, by_context in results["milliseconds"].items():
        for context, row in by_context.items():
            theirs = [row[name] for name in ("Llama, dynamic cache", "Llama, static cache") if name in row]
            for name in [name for name in row if name.startswith("ours") and theirs]:
                figures[f"{name} over Llama's best eager, batch {rows}, {context}"] = row[name] / min(theirs)
        full = [str(context) for context in args.contexts if context >= 8192] or list(by_context)
        for name in [name for name in by_context[full[0]] if name.startswith("ours")]:
            times = [by_context[context][name] for context in full]
            figures[f"{name}, slowest over fastest context, batch {rows}"] = max(times) / min(times)
    return figures


def plot(results: dict, path: Path) -> None:
    """Milliseconds per token against context, a panel for each batch size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, len(results["milliseconds"]), squeeze=False)[0]
    for axes, (rows, by_context) in zip(panels, results["milliseconds"].items(), strict=True):
        for name in next(iter(by_context.values())):
            points = [(int(context), row[name]) for context, row in by_context.items() if name in row]
            axes.plot(*zip(*points, strict=True), "o-", label=name)
        axes.set(title=f"batch {rows}", xlabel="context, tokens", ylabel="CPU ms per token", xscale="log", yscale="log")
    panels[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> dict:
    """Runs all measurements and writes the report."""
    args = parse_arguments(arguments)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    models = {name: model.eval() for name, model in build_models(args).items()}
    if args.compile:
        for name, model in {"ours, compiled": models["ours"], "Llama, compiled": models["llama"]}.items():
            models[name] = torch.compile(model.forward, dynamic=False)
    results: dict = {"milliseconds": {str(rows): {} for rows in args.batch_sizes}}
    cells = [(rows, context) for rows in args.batch_sizes for context in args.contexts]
    for rows, context in tqdm(cells, desc="Decoding"):
        steps = contenders(models, args, context, rows)
        results["milliseconds"][str(rows)][str(context)] = milliseconds(steps, args)
    results["ratios"] = ratios(results, args)
    results["settings"] = {name: value for name, value in vars(args).items() if name != "output_dir"}
    results["environment"] = environment()
    write_whole(args.output_dir / "decoding.png", lambda path: plot(results, path))
    write_whole(args.output_dir / "decoding.json", lambda path: path.write_text(json.dumps(results, indent=1) + "\n"))
    for rows, by_context in results["milliseconds"].items():
        for context, row in by_context.items():
            print(f"batch {rows}, {context:>9}: " + ", ".join(f"{name} {value:.1f}" for name, value in row.items()))
    for name, value in results["ratios"].items():
        print(f"{name:64} {value:8.3f}")
    print(json.dumps(results))
    return results


if __name__ == "__main__":
    main()
