"""One process of the benchmark, for one contender: a JSON command a line on stdin, a JSON answer a line on stdout.

Started by `experiments.benchmark`. The first command builds the model; each `repeat` then does one repetition of one
cell and leaves nothing behind; `profile` says where the time of one repetition goes. A command that fails is answered
with an `error`.

Shapes: B rows, T tokens of a call, E hidden size, V vocabulary.
"""

import ctypes
import gc
import importlib
import json
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers.utils import logging

from experiments.baselines import read, state_tensors
from experiments.benchmark.contenders import (
    Contender,
    build,
    filling_length,
    random_ids,
    read_prompt,
    set_clock,
    state_at,
)
from rmt_hf import RMTCache, RMTForCausalLM


MIN_TOKENS = 8  # decoded at each context, however long they take
WARM_UP_TOKENS = 2
# Tokens of a call, up to which it is done once before it is timed, and up to which twice: in the first one, the system
# clears each page of memory that it gives, which training and a server that runs do not feel; in the second, a few.
# Longer prompts are read in slices, or are nearly all attention.
WARM_UP_LIMITS = (65_536, 16_384)
M_TRIM_THRESHOLD, M_MMAP_MAX, NEVER = -1, -4, -1
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def attention_flops(query: Any, key: Any, value: Any, *args: Any, is_causal: bool = False, **kwargs: Any) -> int:
    """Of torch's attention on a CPU, from shapes; a causal kernel leaves out the pairs that a mask would hide."""
    is_causal = args[1] if len(args) > 1 else is_causal
    return int(sdpa_flop_count(query, key, value) * _seen(query, is_causal))


def attention_backward_flops(
    grad: Any, query: Any, key: Any, value: Any, out: Any, sums: Any, dropout: float, is_causal: bool, **kwargs: Any
) -> int:
    """The same of its backward pass."""
    return int(sdpa_backward_flop_count(grad, query, key, value) * _seen(query, is_causal))


def _seen(query: Any, is_causal: bool) -> float:
    """Share of all pairs of tokens that attention computes."""
    return (query[2] + 1) / (2 * query[2]) if is_causal else 1.0


def chunked_loss_flops(hidden: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    """Of torch's chunked loss on (T, E) and (V, E), which computes its gradients, the last but one and two, at once."""
    of_input, of_weight = args[-3], args[-2]
    return 2 * hidden[0] * hidden[1] * weight[0] * (1 + of_input + of_weight)


def flop_formulas() -> dict[Any, Callable[..., int]]:
    """What torch's counter does not know by itself."""
    name = "_scaled_dot_product_flash_attention_for_cpu"
    formulas: dict[Any, Callable[..., int]] = {getattr(torch.ops.aten, name): attention_flops}
    formulas[getattr(torch.ops.aten, f"{name}_backward")] = attention_backward_flops
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        importlib.import_module("torch.nn.modules.linear_cross_entropy")  # torch itself does so at the first use
        formulas[torch.ops.torch_nn._linear_cross_entropy_batch_chunked] = chunked_loss_flops
    return formulas


@contextmanager
def counted_flops(figures: dict[str, Any]) -> Iterator[None]:
    """Writes the operations of matrix products, convolutions and attention inside the block to `figures["flops"]`."""
    with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
        yield
    figures["flops"] = counter.get_total_flops()


@contextmanager
def timed(figures: dict[str, Any]) -> Iterator[None]:
    """Appends CPU seconds (of all threads) and wall seconds of the block to lists in `figures`."""
    cpu, wall = time.process_time(), time.perf_counter()
    yield
    figures.setdefault("cpu_seconds", []).append(time.process_time() - cpu)
    figures.setdefault("wall_seconds", []).append(time.perf_counter() - wall)


def keep_memory() -> None:
    """Lets the allocator keep what it has got from the system until `return_memory` (glibc; elsewhere as it is).

    It would else map every tensor above 32 MiB anew, and give back the end of its heap whenever that is free: clearing
    pages then takes up to a third of a training step on long rows. README says how users get the same.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, NEVER)


def return_memory() -> None:
    """Gives freed memory back to the system, so that the next peak is that of the next cell (glibc; else in part)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def resident_bytes() -> int:
    """Memory of this process that is in use now."""
    return psutil.Process().memory_info().rss


def restart_peak() -> None:
    """Makes `peak_bytes` count from now on, where the system can (Linux)."""
    if CLEAR_REFS.exists():
        CLEAR_REFS.write_text("5", "utf-8")


def peak_bytes() -> int:
    """Largest resident memory since `restart_peak`; since the start of the process where there is no Linux."""
    if CLEAR_REFS.exists():
        (line,) = [line for line in STATUS.read_text("utf-8").splitlines() if line.startswith("VmHWM")]
        return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


class Runner:
    """A built contender and what can be measured with it.

    Args:
        contender: What to build.
        config: Fields of our configuration.
    """

    def __init__(self, contender: Contender, config: dict[str, Any]) -> None:
        self.contender, self.model = contender, build(contender, config)
        self.eager = self.model.forward
        self.forward: Callable[..., Any] = self.eager
        if contender.is_compiled:
            torch._dynamo.config.recompile_limit = 64  # one for each length of a static cache and number of rows
            self.forward = torch.compile(self.eager, dynamic=False)
        self.filled: dict[tuple[int, int], RMTCache] = {}

    def sizes(self) -> dict[str, int]:
        """Parameters, and bytes of those that every token needs: all but an embedding that is no projection as well."""
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        weights = {id(parameter): parameter.nbytes for parameter in self.model.parameters()}
        if head is not None and head.weight is not embedding.weight:
            del weights[id(embedding.weight)]
        return {"parameters": self.model.num_parameters(), "parameter_bytes": sum(weights.values())}

    def train(self, context: int, num_rows: int) -> Callable[[], Any]:
        """Forward and backward pass of the language-model loss; no optimizer."""
        model, input_ids = self.model.train(), random_ids(self.model, num_rows, context)

        def step() -> None:
            model(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward()
            model.zero_grad()

        return step

    def prefill(self, context: int, num_rows: int) -> Callable[[], Any]:
        """Reads a prompt; returns the state."""
        model, input_ids = self.model.eval(), random_ids(self.model, num_rows, context)
        return lambda: read_prompt(model, input_ids)[1]

    def repeat(self, phase: str, contexts: list[int], batch: int, is_counted: bool, **limits: Any) -> dict[str, Any]:
        """One repetition: figures of each context, and memory of this process before it and at its peak, in bytes.

        Args:
            phase: One of `PHASES`.
            contexts: Tokens of a row; several only when decoding, where they take turns at every token.
            batch: Rows of a call.
            is_counted: Whether to count operations; calls that are not warmed up take a little longer then.
            limits: `tokens` and `seconds` of `decode`.
        """
        return_memory()
        memory = {"base_bytes": resident_bytes()}
        restart_peak()
        if phase == "decode":
            results = self.decode(contexts, batch, is_counted, **limits)
        else:
            results = {str(contexts[0]): self.call(phase, contexts[0], batch, is_counted)}
        memory["peak_bytes"] = peak_bytes()
        return_memory()  # others need it while it is their turn
        return {"results": results, **memory}

    def call(self, phase: str, context: int, batch: int, is_counted: bool) -> dict[str, Any]:
        """Figures of a training step or a prompt, done before if it is short enough; arguments as of `repeat`."""
        figures: dict[str, Any] = {}
        step = getattr(self, phase)(context, batch)
        counts = [is_counted, *[False for limit in WARM_UP_LIMITS if context * batch <= limit]]
        for index, is_counted_now in enumerate(counts):
            state, is_last = None, index == len(counts) - 1
            with counted_flops(figures) if is_counted_now else nullcontext(), timed(figures if is_last else {}):
                state = step()
        return figures if state is None else {**figures, "state_bytes": self.state_bytes(state)}

    @torch.no_grad()
    def decode(
        self, contexts: list[int], batch: int, is_counted: bool, tokens: int, seconds: float
    ) -> dict[str, dict[str, Any]]:
        """One token per row at a time; contexts take turns at every token, so that a slow moment meets all of them.

        Args:
            contexts: Tokens before the first one that is decoded.
            batch: Number of rows.
            is_counted: Whether to count operations, of one more token.
            tokens: To decode at each context.
            seconds: After so many of CPU time it ends, if `MIN_TOKENS` are done.
        """
        model, token = self.model.eval(), random_ids(self.model, batch, 1)
        room = tokens + WARM_UP_TOKENS + 1 if self.contender.has_static_cache else None
        states = {context: self.state_at(context, batch, room) for context in contexts}
        results: dict[str, dict[str, Any]] = {str(context): {} for context in contexts}
        for context, state in states.items():
            with self.chosen_forward():
                for _ in range(WARM_UP_TOKENS):
                    read(model, token, state)
            if is_counted:
                with counted_flops(results[str(context)]):
                    read(model, token, state)
        return_memory()
        restart_peak()  # filling and compiling do not count
        end = time.process_time() + seconds
        with self.chosen_forward():
            for index in range(tokens):
                for context, state in states.items():
                    with timed(results[str(context)]):
                        read(model, token, state)
                if index + 1 >= MIN_TOKENS and time.process_time() > end:
                    break
        for context, state in states.items():
            results[str(context)]["state_bytes"] = self.state_bytes(state)
        return results

    @contextmanager
    def chosen_forward(self) -> Iterator[None]:
        """Makes the model run as the contender says; outside it is eager, which operations are counted in."""
        cast(Any, self.model).forward = self.forward
        try:
            yield
        finally:
            cast(Any, self.model).forward = self.eager

    def state_at(self, context: int, batch: int, room: int | None = None) -> Any:
        """As the function of that name; states of ours that differ in their clock alone are read once."""
        if not isinstance(self.model, RMTForCausalLM):
            return state_at(self.model, context, batch, room)
        key = (filling_length(self.model.config, context), batch)
        if key not in self.filled:
            self.filled[key] = state_at(self.model, context, batch)
        return set_clock(self.filled[key].clone(), context)

    def state_bytes(self, state: Any) -> int:
        """Bytes of what is carried from token to token."""
        return sum(tensor.nbytes for tensor in state_tensors(self.model, state))

    def profile(self, phase: str, context: int, batch: int, tokens: int) -> dict[str, str]:
        """Where the CPU time of one repetition (of so many decoded tokens) goes, as torch's own table."""
        step = getattr(self, phase)(context, batch) if phase != "decode" else self.decode_tokens(context, batch, tokens)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            step()
        averages = profiler.key_averages()
        return {"table": averages.table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=60)}

    def decode_tokens(self, context: int, batch: int, tokens: int) -> Callable[[], Any]:
        """Decodes so many tokens, eagerly."""
        model, token, state = self.model.eval(), random_ids(self.model, batch, 1), self.state_at(context, batch)
        return lambda: [read(model, token, state) for _ in range(tokens)]


def answer(runner: Runner | None, command: dict[str, Any]) -> tuple[Runner, dict[str, Any]]:
    """Does what a command says; the answer is what is measured, or an `error`."""
    action = command.pop("do")
    if action == "build":
        torch.set_num_threads(command["threads"])
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (command["memory_bytes"], hard))  # a refusal, not a killed process
        runner = Runner(Contender(**command["contender"]), command["config"])
        return runner, runner.sizes()
    runner = cast(Runner, runner)
    return runner, runner.repeat(**command) if action == "repeat" else runner.profile(**command)


def main() -> None:
    """Answers commands until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a model prints is no answer
    keep_memory()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    runner = None
    for line in sys.stdin:
        try:
            runner, result = answer(runner, json.loads(line))
        except Exception as error:
            words = str(error).strip().splitlines() or [""]
            is_memory = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
            result = {"error": "out of memory" if is_memory else f"{type(error).__name__}: {words[0][:200]}"}
        print(json.dumps(result), file=answers)


if __name__ == "__main__":
    main()
