"""Reads up to 1,048,576 tokens of real text and reports what it costs and how far rounding carries the state away.

Every length and dtype is read in a process of its own, whose peak memory is reported; states at the same position are
then compared with float64. Tokens are decoded from both ends, in turns, to see that the last costs what the first cost.
Run `train_on_a_book` first: it trains the model.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.corpora import shakespeare_texts
from experiments.reports import environment
from rmt_hf import RMTCache
from rmt_hf.files import write_whole


# Else glibc keeps some freed tensors for later, more with every call, and the peak says more about it than about us.
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "1000000"}


def peak_bytes() -> int:
    """Largest resident memory of this process, from Linux (`getrusage` would count that of the process before it)."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def read(args: argparse.Namespace) -> None:
    """In a process of its own: reads, saves the state, prints the cost as JSON."""
    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
    input_ids = load_file(args.ids)["input_ids"][:, : args.length]
    started = time.perf_counter()
    state = model.memorize(input_ids, show_progress=True)
    seconds = time.perf_counter() - started
    state.save_pretrained(args.state)  # refuses what is not finite
    live = [tensor for layer in state.layers for tensor in (*layer.state[:4], *layer.state.memory[:2])]
    largest = max(tensor.abs().max().item() for tensor in live if tensor.numel())
    cost = {"tokens": state.positions[0], "seconds": seconds, "peak_bytes": peak_bytes(), "state_bytes": state.nbytes}
    print(json.dumps({**cost, "largest_number": largest}))


def drift(state: RMTCache, exact: RMTCache) -> dict[str, float]:
    """How many tokens are in memory still, and how far their values are off, relative to the largest."""
    same, errors = [], []
    for ours, theirs in zip(state.layers, exact.layers, strict=True):
        assert ours.state is not None and theirs.state is not None
        memory, wanted = ours.state.memory, theirs.state.memory
        matches = wanted.positions[:, :, None] == memory.positions[:, None]  # (1, M, M, heads)
        is_there, index = matches.any(2), matches.long().argmax(2)
        difference = (memory.values.double().take_along_dim(index[..., None], 1) - wanted.values).abs().amax(-1)
        same.append(is_there.double().mean().item())
        largest = wanted.values.abs().max()
        errors.append((difference[is_there].max() / largest).item() if is_there.any() else float("nan"))
    return {"slots_that_agree": statistics.fmean(same), "largest_error_in_them": max(errors)}


@torch.no_grad()
def decoding(args: argparse.Namespace, states: dict[int, Path]) -> dict[str, float]:
    """Median CPU milliseconds per token from each length on, in turns."""
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    caches = {length: RMTCache.from_pretrained(path, model) for length, path in states.items()}
    seconds: dict[int, list[float]] = {length: [] for length in caches}
    for _ in range(8 * model.config.segment_length):
        for length, cache in caches.items():
            start = time.process_time()
            model(input_ids=torch.tensor([[1]]), past_key_values=cache)
            seconds[length].append(time.process_time() - start)
    return {str(length): 1000 * statistics.median(values) for length, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="reports/book/model", help="a folder of a trained model and its tokenizer")
    parser.add_argument("--lengths", type=int, nargs="+", default=[65_536, 262_144, 1_048_576])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--output-dir", type=Path, default=Path("reports/million"))
    parser.add_argument("--threads", type=int, default=1)
    for name in ("--ids", "--state", "--dtype"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ids:
        return read(args)
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = "\n".join(shakespeare_texts().values())
    input_ids = tokenizer(text[: 8 * max(args.lengths)], return_tensors="pt").input_ids
    results: dict = {"runs": {}, "drift_from_float64": {}}
    with tempfile.TemporaryDirectory() as scratch:
        save_file({"input_ids": input_ids}, f"{scratch}/ids.safetensors")
        for dtype in (*args.dtypes, "float64"):
            for length in args.lengths:
                command = [sys.executable, "-m", "experiments.a_million_tokens", "--model", args.model]
                command += ["--ids", f"{scratch}/ids.safetensors"]
                command += ["--dtype", dtype, "--length", str(length), "--state", f"{scratch}/{dtype}-{length}"]
                command += ["--threads", str(args.threads)]
                run = subprocess.run(
                    command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | RETURN_MEMORY
                )
                results["runs"][f"{dtype}, {length}"] = json.loads(run.stdout)
                print(dtype, run.stdout, end="", flush=True)
        model = AutoModelForCausalLM.from_pretrained(args.model)
        for dtype in args.dtypes:
            for length in args.lengths:
                pair = [RMTCache.from_pretrained(f"{scratch}/{name}-{length}", model) for name in (dtype, "float64")]
                results["drift_from_float64"][f"{dtype}, {length}"] = drift(*pair)
        states = {length: Path(f"{scratch}/{args.dtypes[0]}-{length}") for length in args.lengths}
        results["decoding_milliseconds"] = decoding(args, states)
    first, last = (results["runs"][f"{args.dtypes[0]}, {args.lengths[index]}"] for index in (0, -1))
    times = list(results["decoding_milliseconds"].values())
    results["peak_memory_last_over_first"] = last["peak_bytes"] / first["peak_bytes"]
    results["decoding_last_over_first"] = times[-1] / times[0]
    results["environment"] = environment(("torch", "transformers", "shakespeare"))
    text = json.dumps(results, indent=1) + "\n"
    write_whole(args.output_dir / "metrics.json", lambda path: path.write_text(text, "utf-8"))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
