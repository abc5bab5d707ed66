"""The cells of the benchmark, the processes that do them, and what is left out and why."""

import argparse
import hashlib
import json
import os
import select
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from experiments.benchmark.contenders import Contender
from experiments.benchmark.worker import MIN_TOKENS


LONGEST_GROWING = 131_072  # tokens; longer contexts are for prefill and decoding with a state that does not grow
CHEAP = 0.25  # of `--cell-seconds`: third and later repetitions, and repetitions of decoding, take no longer
MAIN = ("ours", "llama")  # the promised ratios are made of their cells at batch 1, which may take longer


class WorkerError(RuntimeError):
    """A worker died or did not answer in time, or its command failed."""


class Worker:
    """A process with one contender.

    Args:
        contender: What it builds.
        config: Fields of our configuration.
        threads: That it computes with.
        memory_bytes: That it may take; a larger allocation fails in it.

    Raises:
        WorkerError: If the contender cannot be built.
    """

    def __init__(self, contender: Contender, config: dict[str, Any], threads: int, memory_bytes: int) -> None:
        # The compiler would else compute in processes of its own, beside the one whose turn it is.
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        command = [sys.executable, "-m", "experiments.benchmark.worker"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        build = {"do": "build", "contender": contender._asdict(), "config": config, "threads": threads}
        try:
            self.sizes = self.ask({**build, "memory_bytes": memory_bytes}, 600.0)
        except WorkerError:
            self.close()
            raise

    def ask(self, command: dict[str, Any], timeout: float) -> dict[str, Any]:
        """Sends a command and waits for the answer.

        Args:
            command: See `experiments.benchmark.worker`.
            timeout: Wall seconds after which the process is ended.

        Raises:
            WorkerError: If the process has died or runs out of time, or the command failed.
        """
        stdin, stdout, line = self.process.stdin, self.process.stdout, ""
        if stdin is None or stdout is None:
            raise WorkerError("the process has no pipes")
        try:
            stdin.write(json.dumps(command) + "\n")
            stdin.flush()
            if not select.select([stdout], [], [], timeout)[0]:
                self.close()
                raise WorkerError(f"no answer within {timeout:,.0f} s")
            line = stdout.readline()
        except BrokenPipeError:
            pass
        if not line:
            code = self.close()
            raise WorkerError(f"the process died: {signal.Signals(-code).name if code < 0 else f'exit code {code}'}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def close(self) -> int:
        """Ends the process; returns its exit code, or minus the signal that ended it."""
        if self.process.poll() is None:
            self.process.terminate()
        for pipe in (self.process.stdin, self.process.stdout):
            try:
                if pipe is not None:
                    pipe.close()
            except BrokenPipeError:  # what was not read any more
                continue
        return self.process.wait()


class Job(NamedTuple):
    """One contender's part of a cell; several contexts take turns at every token that is decoded."""

    name: str
    phase: str
    contexts: tuple[int, ...]
    batch: int


def cells(args: argparse.Namespace) -> list[list[Job]]:
    """What takes turns, in order: contenders at one context and batch; when decoding, at all contexts of one batch."""

    def jobs(phase: str, contexts: list[int], batch: int) -> list[Job]:
        found = []
        for name, contender in args.contender.items():
            if phase in contender.phases:
                is_one = phase == "decode" and contender.takes_turns
                parts = [tuple(contexts)] if is_one else [(context,) for context in contexts]
                found += [Job(name, phase, part, batch) for part in parts]
        return found

    result = []
    for phase in args.phases:
        if phase == "train":
            lengths = [context for context in args.contexts if context <= LONGEST_GROWING]
            result += [jobs(phase, [context], max(1, args.train_tokens // context)) for context in lengths]
        elif phase == "prefill":
            result += [jobs(phase, [context], batch) for batch in args.batch_sizes for context in args.contexts]
        else:
            result += [jobs(phase, args.contexts, batch) for batch in args.batch_sizes]
    return [cell for cell in result if cell]


def extrapolate(points: dict[int, float], context: int) -> float | None:
    """A cost at a context, on the line through the two longest ones that are known; it never falls.

    Args:
        points: Cost by context, all shorter.
        context: Where the cost is wanted.

    Returns:
        The cost, the same as at the longest if only one is known; None if none is.
    """
    if not points:
        return None
    *_, last = lengths = sorted(points)
    rise = (points[last] - points[lengths[-2]]) / (last - lengths[-2]) if len(lengths) > 1 else 0.0
    return points[last] + max(0.0, rise) * (context - last)


def units(phase: str, batch: int, context: int) -> int:
    """What costs are counted in: tokens that are read, or a step of decoding."""
    return 1 if phase == "decode" else batch * context


def row_of(job: Job, context: int, answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of one context from all repetitions: the fastest one, or the median token when decoding."""
    parts = [answer["results"][str(context)] for answer in answers]
    pick = statistics.median if job.phase == "decode" else min
    seconds = {
        name: pick([value for part in parts for value in part[name]]) for name in ("cpu_seconds", "wall_seconds")
    }
    tokens = job.batch if job.phase == "decode" else job.batch * context
    return {
        **identity(job, context),
        "status": "measured",
        "repetitions": len(answers),
        **seconds,
        "tokens_per_cpu_second": tokens / seconds["cpu_seconds"],
        "peak_bytes": max(answer["peak_bytes"] for answer in answers),
        "base_bytes": max(answer["base_bytes"] for answer in answers),
        "state_bytes": parts[0].get("state_bytes"),
        "flops": parts[0]["flops"],
    }


def identity(job: Job, context: int) -> dict[str, Any]:
    """What names a row."""
    return {"phase": job.phase, "contender": job.name, "context": context, "batch": job.batch}


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Rows of a file of JSON lines; a last line without an end, of a run that was killed, is taken away."""
    if not file.exists():
        return []
    text = file.read_text("utf-8")
    if text and not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        file.write_text(text, "utf-8")
    return [json.loads(line) for line in text.splitlines()]


class Run:
    """Rows that are done, in a file of JSON lines, and the processes that do more.

    Args:
        args: Of the command line.
        config: Fields of our configuration.
        settings: What a row must have been measured with to count as done.
    """

    def __init__(self, args: argparse.Namespace, config: dict[str, Any], settings: dict[str, Any]) -> None:
        self.args, self.config, self.file = args, config, args.output_dir / "rows.jsonl"
        self.memory_bytes = int(args.memory_gib * 2**30)
        self.workers: dict[str, Worker] = {}
        self.sizes: dict[str, dict[str, int]] = {}  # what workers answered when they were built
        self.costs: dict[tuple, dict[int, dict[str, float]]] = {}  # of a unit, by context
        self.failures: dict[tuple, dict[int, str]] = {}
        self.fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        args.output_dir.mkdir(parents=True, exist_ok=True)
        self.rows = [row for row in read_rows(self.file) if row["run"] == self.fingerprint]
        for row in self.rows:
            self.learn(row)
        if not self.rows:
            self.append([{"phase": "settings", **settings}])

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Keeps rows, in the file as well."""
        rows = [{"run": self.fingerprint, **row} for row in rows]
        self.rows += rows
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write("".join(json.dumps(row) + "\n" for row in rows))

    def learn(self, row: dict[str, Any]) -> None:
        """Remembers what a row cost, or that it failed: longer contexts are judged by it."""
        if row.get("status") == "failed":
            self.failures.setdefault(self.series(row), {})[row["context"]] = row["reason"]
        elif row.get("status") == "measured":
            number = units(row["phase"], row["batch"], row["context"])
            memory = row["peak_bytes"] - row["base_bytes"]
            cost = {"seconds": row["cpu_seconds"] / number, "bytes": memory / number}
            self.costs.setdefault(self.series(row), {})[row["context"]] = cost

    @staticmethod
    def series(row: dict[str, Any]) -> tuple:
        """What makes two contexts comparable; the batch of training follows from the context."""
        return row["contender"], row["phase"], None if row["phase"] == "train" else row["batch"]

    def run_cell(self, jobs: list[Job]) -> None:
        """Every contender does one repetition in turn, round after round; then their rows are kept."""
        answers: dict[Job, list[dict[str, Any]]] = {}
        for number in range(self.args.rounds):
            for job in map(self.without_done, jobs) if number == 0 else list(answers):
                is_wanted = self.is_wanted(job) if number == 0 else self.has_time(job, answers[job])
                if not is_wanted:
                    continue
                try:
                    answers.setdefault(job, []).append(self.repeat(job, number == 0))
                except WorkerError as error:
                    answers.pop(job, None)
                    self.leave_out(job, "failed", str(error))
                    continue
                if len(job.contexts) == 1:
                    self.learn(row_of(job, job.contexts[0], answers[job]))
        rows = []
        for job, given in answers.items():
            beside = [other.name for other in answers if other != job and set(other.contexts) & set(job.contexts)]
            others = {**self.sizes[job.name], "beside": beside}
            rows += [{**row_of(job, context, given), **others} for context in job.contexts]
        self.append(rows)

    def without_done(self, job: Job) -> Job:
        """The job with the contexts that were neither measured nor tried in vain."""
        tried = [row for row in self.rows if row.get("status") in ("measured", "failed")]
        done = {
            context for context in job.contexts if any(identity(job, context).items() <= row.items() for row in tried)
        }
        return job._replace(contexts=tuple(context for context in job.contexts if context not in done))

    def is_wanted(self, job: Job) -> bool:
        """Whether there is anything to do; what must be skipped is recorded."""
        reason = self.reason_to_skip(job) if job.contexts else None
        if reason is not None:
            self.leave_out(job, "skipped", reason)
        return bool(job.contexts) and reason is None

    def leave_out(self, job: Job, status: str, reason: str) -> None:
        """Records contexts that have no figures."""
        rows = [{**identity(job, context), "status": status, "reason": reason} for context in job.contexts]
        self.append(rows)
        for row in rows:
            self.learn(row)

    def limit(self, job: Job) -> float:
        """CPU seconds that all repetitions of a job may take."""
        is_main = job.name in MAIN and (job.phase == "train" or (job.phase == "prefill" and job.batch == 1))
        return max(self.args.cell_seconds, self.args.main_cell_seconds if is_main else 0.0)

    def has_time(self, job: Job, answers: list[dict[str, Any]]) -> bool:
        """Whether one more repetition fits into the limit; after two of them, into a quarter of `--cell-seconds`."""
        spent = [sum(sum(part["cpu_seconds"]) for part in answer["results"].values()) for answer in answers]
        limit = self.limit(job) if len(spent) < 2 else CHEAP * self.args.cell_seconds
        return sum(spent) + min(spent) <= limit

    def reason_to_skip(self, job: Job) -> str | None:
        """Why a job is not done, judged by shorter contexts; None if it is done, as contexts that take turns are."""
        context, contender = job.contexts[-1], self.args.contender[job.name]
        if context > LONGEST_GROWING and not contender.is_bounded:
            return f"its state grows with context: measured up to {LONGEST_GROWING:,} tokens"
        series = self.series(identity(job, context))
        failed = [length for length in self.failures.get(series, {}) if length < context]
        if failed:
            return f"failed at {min(failed):,} tokens: {self.failures[series][min(failed)]}"
        shorter = {length: cost for length, cost in self.costs.get(series, {}).items() if length < context}
        if not shorter or len(job.contexts) > 1:
            return None
        number = units(job.phase, job.batch, context)
        seconds, memory = (
            number * (extrapolate({length: cost[name] for length, cost in shorter.items()}, context) or 0.0)
            for name in ("seconds", "bytes")
        )
        seconds *= MIN_TOKENS if job.phase == "decode" else 1
        if seconds > self.limit(job):
            return f"would take {seconds:,.0f} CPU seconds, more than {self.limit(job):,.0f}"
        if memory > self.memory_bytes:
            return f"would take {memory / 2**30:,.1f} GiB, more than {self.memory_bytes / 2**30:,.1f}"
        return None

    def repeat(self, job: Job, is_first: bool) -> dict[str, Any]:
        """One repetition."""
        command: dict[str, Any] = {**job._asdict(), "do": "repeat", "is_counted": is_first}
        del command["name"]
        if job.phase == "decode":
            command |= {"tokens": self.args.tokens, "seconds": CHEAP * self.args.cell_seconds}
        return self.worker(job.name).ask(command, 900.0 + 10 * self.limit(job))

    def worker(self, name: str) -> Worker:
        """The process of a contender, started if there is none that lives."""
        if name not in self.workers or self.workers[name].process.poll() is not None:
            contender = self.args.contender[name]
            self.workers[name] = Worker(contender, self.config, self.args.threads, self.memory_bytes)
            self.sizes[name] = self.workers[name].sizes
        return self.workers[name]

    def close(self, names: list[str] | None = None) -> None:
        """Ends the processes of these contenders, or of all."""
        for name in list(self.workers) if names is None else names:
            if name in self.workers:
                self.workers.pop(name).close()
