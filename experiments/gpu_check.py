"""What has to be true on a GPU, and how fast it is there: `python -m experiments.gpu_check`, five minutes.

Written and tested on a CPU (`--device cpu`), where what needs a GPU is skipped. A small model in float64 with eager
attention on a CPU is the truth that every attention implementation and dtype is held against: a prompt, a stream in
slices that end anywhere, and one token at a time. Prints a line for each result, and writes all so far to
`gpu_check.json` after each.

Shapes: B rows, T tokens of a call.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from experiments.baselines import build_baseline, read
from experiments.benchmark.contenders import read_prompt
from experiments.reports import environment
from rmt_hf import RMTCache, RMTConfig, RMTForCausalLM
from rmt_hf.files import write_whole


# Largest difference of logits whose standard deviation is about 1.
TOLERANCES = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.4}
BACKENDS = {"cpu": "eager", "cuda": "inductor"}  # of the compiler: a CPU checks its graphs alone
IMPLEMENTATIONS = ("sdpa", "flash_attention_2", "flex_attention")  # the last one compiles, which takes longest
NARROW = ("float16", "bfloat16")


class Result(NamedTuple):
    """A check: whether it holds (None if it could not be made), and what was measured or why not."""

    name: str
    holds: bool | None
    detail: str


def small_model(dtype: str = "float32") -> RMTForCausalLM:
    """A model in float64 whose every part matters; heads are 64 wide, as GPU kernels like them.

    Args:
        dtype: In which it is to be compared. In a narrow one a strength that is rounded may choose another token for a
            slot, so memory takes means there.
    """
    torch.manual_seed(0)
    memory: dict[str, Any] = {"memory_write": "mean"} if dtype in NARROW else {"num_lasting_slots": 8}
    config = RMTConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        chunk_length=16,
        segment_length=64,
        num_memory_slots=16,
        use_attention_sink=True,
        **memory,
    )
    model = RMTForCausalLM(config).double().eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


def moved(model: Any, device: torch.device, dtype: torch.dtype, implementation: str) -> Any:
    """The same model elsewhere, in another dtype and with another attention implementation."""
    model.set_attn_implementation(implementation)
    return model.to(device=device, dtype=dtype)


def small_ids(model: RMTForCausalLM) -> torch.Tensor:
    """Two streams that are six segments and three tokens long."""
    return torch.randint(model.config.vocab_size, (2, 6 * model.config.segment_length + 3))


@torch.no_grad()
def logits_in_calls(model: RMTForCausalLM, ids: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Logits (B, T, V) of a stream that is read in calls of these sizes."""
    cache = RMTCache(model.config)
    return torch.cat([model(part, past_key_values=cache).logits for part in ids.split(sizes, 1)], 1)


def agreement(device: torch.device, implementation: str, dtype: str) -> Result:
    """Whether a prompt, slices, and single tokens give what float64 gives on a CPU."""
    name = f"{implementation}, {dtype}"
    if implementation == "flash_attention_2" and (dtype not in NARROW or not is_flash_attn_2_available()):
        return Result(name, None, "not installed, or not for this dtype")
    if implementation == "flex_attention" and device.type == "cpu":
        return Result(name, None, "compiled flex attention is for GPUs")
    model = small_model(dtype)
    ids, segment = small_ids(model), model.config.segment_length
    length = ids.shape[1]
    cuts = [[length], [segment + 5, 9, 3 * segment, length - 4 * segment - 14], [length - 8, *[1] * 8]]
    expected = logits_in_calls(model, ids, cuts[0])
    model = moved(model, device, getattr(torch, dtype), implementation)
    found = [logits_in_calls(model, ids.to(device), sizes).cpu().double() for sizes in cuts]
    worst = max(float((each - expected).abs().max()) for each in found)
    return Result(name, worst <= TOLERANCES[dtype], f"largest difference {worst:.2g}, allowed {TOLERANCES[dtype]:g}")


def gradients(device: torch.device) -> Result:
    """Whether float32 gives the gradients of float64 on a CPU, in units of the largest one of each parameter."""
    found = []
    for where, dtype in ((torch.device("cpu"), torch.float64), (device, torch.float32)):
        implementation = "eager" if dtype == torch.float64 else "sdpa"
        model = moved(small_model(), where, dtype, implementation).train()
        ids = small_ids(model).to(where)
        model(ids, labels=ids, use_cache=False).loss.backward()
        found.append([p.grad.cpu().double() for p in model.parameters() if p.grad is not None])
    worst = max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-12)) for a, b in zip(*found, strict=True))
    return Result("gradients, float32", worst <= 1e-2, f"largest relative difference {worst:.2g}, allowed 0.01")


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Makes CUDA raise where the program would wait for the GPU."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def token_loop(device: torch.device) -> Result:
    """Whether decoding across two segment ends never waits for the GPU."""
    if device.type != "cuda":
        return Result(
            "no waiting in the token loop", None, "needs CUDA; tests/test_costs.py does it on the meta device"
        )
    model = moved(small_model(), device, torch.float32, "sdpa")
    ids = small_ids(model).to(device)
    cache, token = model.memorize(ids[:, :-1]), ids[:, -1:]
    model(token, past_key_values=cache)
    try:
        with no_waiting(device):
            for _ in range(2 * model.config.segment_length + 1):
                token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
    except RuntimeError as error:
        return Result("no waiting in the token loop", False, str(error).splitlines()[0])
    return Result("no waiting in the token loop", True, f"{2 * model.config.segment_length + 1} tokens")


@torch.no_grad()
def compiled_step(device: torch.device) -> Result:
    """Whether a compiled step gives the same over three segment ends, compiled once without and once with a write."""
    model, counter = (
        moved(small_model(), device, torch.float32, "sdpa"),
        CompileCounterWithBackend(BACKENDS[device.type]),
    )
    ids, segment = small_ids(model).to(device), model.config.segment_length
    cache = model.memorize(ids[:, : 2 * segment - 3])
    expected, compiled = cache.clone(), torch.compile(model.forward, backend=counter)
    worst, counts = 0.0, []
    for index in range(2 * segment + 6):
        token = ids[:, index : index + 1]
        logits = [compiled(input_ids=token, past_key_values=cache).logits]
        logits.append(model(token, past_key_values=expected).logits)
        worst = max(worst, float((logits[0] - logits[1]).abs().max()))
        counts.append(counter.frame_count)
    detail = f"largest difference {worst:.2g}, {counts[0]} graphs in the first step and {counts[-1]} in all"
    return Result("a compiled step", worst <= TOLERANCES["float32"] and counts[-1] <= counts[0] + 1, detail)


def seconds_of(device: torch.device, task: Callable[[], Any], repetitions: int) -> float:
    """Smallest wall time of a task after one call to warm up; the GPU has finished at both ends."""
    times = []
    for _ in range(repetitions + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        task()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def speed(device: torch.device, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Tokens per second and peak memory of ours and of a Llama of equal size, in bfloat16, at every context.

    Training is a step on one row, forward and backward; decoding 32 tokens after a prompt.
    """
    config = RMTConfig(
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size * 12 // 5 // 64 * 64 or 64,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=max(1, args.hidden_size // 64),
        vocab_size=8192,
        tie_word_embeddings=True,
    )
    models = {"ours": RMTForCausalLM(config), "llama": build_baseline("llama", config)}
    for context in args.contexts:
        ids = torch.randint(config.vocab_size, (1, context), device=device)
        for name, each in models.items():
            model = moved(each, device, torch.bfloat16, "sdpa")
            for phase in (train, decode):
                yield {
                    "contender": name,
                    "context": context,
                    "phase": phase.__name__,
                    **rate(device, partial(phase, model, ids), args.repetitions),
                }
                model.zero_grad()
            moved(model, torch.device("cpu"), torch.bfloat16, "sdpa")


def rate(device: torch.device, start: Callable[[], tuple[int, Callable[[], Any]]], repetitions: int) -> dict[str, Any]:
    """Tokens per second of what `start` gives, and the largest memory of the GPU meanwhile, in bytes."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        num_tokens, task = start()
        found: dict[str, Any] = {"tokens_per_second": num_tokens / seconds_of(device, task, repetitions)}
    except torch.OutOfMemoryError:
        found = {"failed": "out of memory"}
    return found | ({"peak_bytes": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {})


def train(model: PreTrainedModel, ids: torch.Tensor) -> tuple[int, Callable[[], Any]]:
    """Tokens and a step of training."""
    model.train()

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad()

    return ids.shape[1], step


@torch.no_grad()
def decode(model: PreTrainedModel, ids: torch.Tensor) -> tuple[int, Callable[[], Any]]:
    """Tokens and the steps that follow a prompt."""
    _, state = read_prompt(model.eval(), ids)
    return 32, torch.no_grad()(lambda: [read(model, ids[:, :1], state) for _ in range(32)])


def attempt(check: Callable[..., Result], *args: Any) -> Result:
    """The result of a check, printed; one that raises fails, and the others go on."""
    torch._dynamo.reset()  # or what is compiled for one check counts against the limit of the next
    try:
        result = check(*args)
    except Exception as error:
        words = str(error).strip().splitlines() or [""]
        result = Result(" ".join([check.__name__, *map(str, args)]), False, f"{type(error).__name__}: {words[0]}")
    print(
        {True: "holds  ", False: "FAILS  ", None: "skipped"}[result.holds],
        f"{result.name}: {result.detail}",
        flush=True,
    )
    return result


def check_all(device: torch.device) -> Iterator[Result]:
    """All checks, those that compile for long last."""
    yield from (attempt(check, device) for check in (gradients, token_loop))
    for implementation in IMPLEMENTATIONS:
        yield from (attempt(agreement, device, implementation, dtype) for dtype in TOLERANCES)
    yield attempt(compiled_step, device)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output-dir", type=Path, default=Path("reports/gpu_check"))
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 32_768])
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--num-hidden-layers", type=int, default=12)
    parser.add_argument("--repetitions", type=int, default=3)
    args = parser.parse_args(arguments)
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda wants a GPU that torch sees: --device cpu does what is possible without one")
    return args


def write_json(report: dict[str, Any], path: Path) -> None:
    """Writes a report."""
    path.write_text(json.dumps(report, indent=1), "utf-8")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Checks, measures, prints and writes; ends with exit code 1 if a check fails."""
    args = parse_arguments(arguments)
    device = torch.device(args.device)
    report: dict[str, Any] = {**environment(), "checks": [], "speed": []}
    if device.type == "cuda":
        report["gpu"] = torch.cuda.get_device_name(device)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    save = partial(write_whole, args.output_dir / "gpu_check.json", partial(write_json, report))
    for row in speed(device, args):
        print(json.dumps(row), flush=True)
        report["speed"].append(row)
        save()
    for result in check_all(device):
        report["checks"].append(result._asdict())
        save()
    if any(check["holds"] is False for check in report["checks"]):
        raise SystemExit(1)
    return report


if __name__ == "__main__":
    main()
