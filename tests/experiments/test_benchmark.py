"""The benchmark at tiny settings, through real processes; figures, ratios and rules against numbers made by hand."""

import json
import math
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from experiments.baselines import state_tensors
from experiments.benchmark import __main__ as benchmark
from experiments.benchmark import cells as benchmark_cells
from experiments.benchmark import report as benchmark_report
from experiments.benchmark import worker as benchmark_worker
from experiments.benchmark.cells import Job, Run, Worker, WorkerError, cells, extrapolate, read_rows, row_of
from experiments.benchmark.contenders import CONTENDERS, Contender, build, read_prompt, state_at
from experiments.benchmark.worker import Runner


pytestmark = pytest.mark.xdist_group("benchmark")  # one worker makes what all of these tests look at


SIZES = shlex.split(
    "--hidden-size 32 --intermediate-size 64 --num-hidden-layers 1 --num-attention-heads 2 --vocab-size 64 "
    "--segment-length 64 --num-memory-slots 4"
)
TINY = [*SIZES, *shlex.split("--contexts 64 512 1024 --batch-sizes 1 --train-tokens 512 --tokens 4 --rounds 2")]
TINY += ["--contenders", "ours", "llama"]
FIELDS = benchmark.model_fields(benchmark.parse_arguments(SIZES))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run in which Llama's process is killed at a prompt of 512 tokens, and 1,024 are too many for what grows."""
    folder, asked, ask = tmp_path_factory.mktemp("benchmark"), [], Worker.ask

    def kill_and_ask(self: Worker, command: dict[str, Any], timeout: float) -> dict[str, Any]:
        is_llama = getattr(self, "sizes", {}).get("parameters") == llama_parameters
        asked.append((command["do"], "llama" if is_llama else "other", command.get("phase"), command.get("contexts")))
        if asked[-1] == ("repeat", "llama", "prefill", (512,)):
            self.process.kill()
            self.process.wait()
        return ask(self, command, timeout)

    llama_parameters = build(CONTENDERS["llama"], FIELDS).num_parameters()
    assert llama_parameters != build(CONTENDERS["ours"], FIELDS).num_parameters()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Worker, "ask", kill_and_ask)
        patch.setattr(benchmark_cells, "LONGEST_GROWING", 600)
        results = benchmark.main([*TINY, "--output-dir", str(folder)])
    return {"results": results, "folder": folder, "asked": asked}


def find(results: dict[str, Any], contender: str, phase: str, context: int) -> dict[str, Any]:
    wanted = {"contender": contender, "phase": phase, "context": context}
    (row,) = [row for row in results["rows"] if wanted.items() <= row.items()]
    return row


def test_files(finished: dict[str, Any]) -> None:
    folder = finished["folder"]
    assert json.loads((folder / "benchmark.json").read_text()) == json.loads(json.dumps(finished["results"]))
    profiles = {f"profile_{phase}.txt" for phase in ("train", "prefill", "decode")}
    assert {path.name for path in folder.iterdir()} == {
        "benchmark.json",
        "table.md",
        "benchmark.png",
        "rows.jsonl",
    } | profiles
    assert "Self CPU" in (folder / "profile_train.txt").read_text()
    assert str(folder) not in (folder / "rows.jsonl").read_text()


def test_every_cell_has_a_row(finished: dict[str, Any]) -> None:
    """Measured, or left out for a reason that is said in the table as well."""
    results = finished["results"]
    states = {(row["phase"], row["contender"], row["context"]): row["status"] for row in results["rows"]}
    expected = {(phase, "ours", context): "measured" for phase in ("prefill", "decode") for context in (64, 512, 1024)}
    expected |= {("train", name, context): "measured" for name in ("ours", "llama") for context in (64, 512)}
    expected |= {("prefill", "llama", 64): "measured", ("prefill", "llama", 512): "failed"}
    expected |= {("prefill", "llama", 1024): "skipped", ("decode", "llama", 1024): "skipped"}
    expected |= {("decode", "llama", context): "measured" for context in (64, 512)}  # in a new process
    assert states == expected
    assert find(results, "llama", "prefill", 512)["reason"] == "the process died: SIGKILL"
    assert "its state grows" in find(results, "llama", "prefill", 1024)["reason"]
    assert "- llama, 512: failed, the process died: SIGKILL" in (finished["folder"] / "table.md").read_text()


def test_figures_of_a_row(finished: dict[str, Any]) -> None:
    results = finished["results"]
    row = find(results, "ours", "train", 64)
    assert row["batch"] == 8 and find(results, "ours", "train", 512)["batch"] == 1  # the same tokens in a step
    assert row["tokens_per_cpu_second"] == pytest.approx(512 / row["cpu_seconds"])
    assert row["beside"] == ["llama"] and row["repetitions"] == 2
    assert row["peak_bytes"] > row["base_bytes"] > 0 and row["wall_seconds"] > 0
    speed = row["flops"] / row["cpu_seconds"]
    assert row["flops_utilization"] == pytest.approx(speed / results["machine"]["flops_per_second"])
    assert row["flops_utilization"] < 1
    decoding = [find(results, "ours", "decode", context) for context in (64, 512, 1024)]
    assert len({row["state_bytes"] for row in decoding}) == 1
    name = "decoding time, ours, slowest over fastest context, batch 1"
    times = [row["cpu_seconds"] for row in decoding]
    assert results["ratios"][name] == pytest.approx(max(times) / min(times))
    llama = find(results, "llama", "decode", 512)
    assert llama["state_bytes"] >= 2 * 32 * 4 * 512
    ratio = decoding[1]["cpu_seconds"] / llama["cpu_seconds"]
    assert results["ratios"]["decoding time, ours over llama's best eager, batch 1, 512"] == pytest.approx(ratio)


def test_contenders_take_turns(finished: dict[str, Any]) -> None:
    turns = [entry[1] for entry in finished["asked"] if entry[0] == "repeat" and entry[2:] == ("train", (64,))]
    assert turns == ["other", "llama", "other", "llama"]


def test_a_run_that_is_done_starts_nothing(
    finished: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(benchmark_cells, "LONGEST_GROWING", 600)
    monkeypatch.setattr(benchmark_cells, "Worker", None)
    results = benchmark.main([*TINY, "--output-dir", str(finished["folder"])])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == json.loads(json.dumps(results))
    for row in finished["results"]["rows"]:
        if row["status"] != "skipped":
            again = find(results, row["contender"], row["phase"], row["context"])
            assert again["status"] == row["status"] and again.get("cpu_seconds") == row.get("cpu_seconds")


def test_other_settings_are_another_run(finished: dict[str, Any]) -> None:
    rows = read_rows(finished["folder"] / "rows.jsonl")
    args = benchmark.parse_arguments([*TINY, "--output-dir", str(finished["folder"]), "--tokens", "5"])
    run = Run(args, FIELDS, benchmark.settings(args, finished["results"]["environment"]))
    assert len(run.rows) == 1 and run.fingerprint != rows[0]["run"]
    job = Job("ours", "prefill", (64,), 1)
    assert run.without_done(job) == job


def test_half_a_line_is_taken_away(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    assert read_rows(file) == []
    file.write_text('{"a": 1}\n{"b')
    assert read_rows(file) == [{"a": 1}] and file.read_text() == '{"a": 1}\n'


def test_a_worker_out_of_memory_answers_and_goes_on(tmp_path: Path) -> None:
    """A saved model from a folder, whose mask of 65,536 × 65,536 numbers does not fit."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    config = MistralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
    MistralForCausalLM(config).save_pretrained(tmp_path)
    worker = Worker(Contender(str(tmp_path)), FIELDS, 1, 3 * 2**29)
    try:
        assert worker.sizes["parameters"] == MistralForCausalLM(config).num_parameters()
        command = {"do": "repeat", "phase": "prefill", "contexts": [65536], "batch": 1, "is_counted": False}
        with pytest.raises(WorkerError, match=r"^out of memory$"):
            worker.ask(command, 60.0)
        answer = worker.ask({**command, "contexts": [64]}, 60.0)
        assert answer["results"]["64"]["cpu_seconds"][0] > 0
        with pytest.raises(WorkerError, match=r"^TypeError: "):
            worker.ask({"do": "repeat", "phase": "prefill"}, 60.0)
        with pytest.raises(WorkerError, match="no answer within 0 s"):
            worker.ask(command, 0.0)
        assert worker.process.poll() is not None
    finally:
        worker.close()


def test_operations_of_a_llama_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Projections, MLP, one projected token and a causal triangle of attention; training costs three times as much."""
    hidden, inner, vocabulary, length = 8, 12, 11, 6
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
    )
    monkeypatch.setattr(benchmark_worker, "build", lambda contender, config: LlamaForCausalLM(config))
    runner = Runner(CONTENDERS["llama"], config)  # type: ignore[arg-type]
    dense = 2 * length * (4 * hidden**2 + 3 * hidden * inner)
    attention = 2 * 2 * hidden * length * (length + 1) // 2
    figures = runner.repeat("prefill", [length], 1, True)["results"]["6"]
    assert figures["flops"] == dense + attention + 2 * hidden * vocabulary
    assert figures["state_bytes"] == 2 * 4 * hidden * length
    figures = runner.repeat("train", [length], 1, True)["results"]["6"]
    assert figures["flops"] == 3 * (dense + 2 * length * hidden * vocabulary) + attention + attention * 5 // 2
    figures = runner.repeat("decode", [length], 1, True, tokens=3, seconds=9.0)["results"]["6"]
    one = dense // length + 2 * 2 * hidden * (length + 3) + 2 * hidden * vocabulary
    assert figures["flops"] == one and len(figures["cpu_seconds"]) == 3
    weights = hidden * vocabulary + 4 * hidden**2 + 3 * hidden * inner + 3 * hidden
    assert runner.sizes() == {"parameters": weights, "parameter_bytes": 4 * weights}


@pytest.mark.parametrize(("limits", "calls"), [((64, 64), 3), ((64, 63), 2), ((63, 63), 1)])
@pytest.mark.parametrize("is_counted", [True, False])
def test_a_short_call_is_warmed_up(limits, calls, is_counted, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the last one is timed."""
    monkeypatch.setattr(benchmark_worker, "WARM_UP_LIMITS", limits)
    runner, done = Runner(CONTENDERS["ours"], FIELDS), []

    def step() -> None:
        done.append(1)
        if len(done) == 1:
            time.sleep(0.5)

    monkeypatch.setattr(runner, "train", lambda context, batch: step)
    figures = runner.repeat("train", [32], 2, is_counted)["results"]["32"]
    assert len(done) == calls and len(figures["wall_seconds"]) == len(figures["cpu_seconds"]) == 1
    assert (figures["wall_seconds"][0] >= 0.5) == (calls == 1)
    assert ("flops" in figures) == is_counted


@pytest.mark.skipif(not benchmark_worker.CLEAR_REFS.exists(), reason="an allocator that Linux has")
@pytest.mark.parametrize("is_kept", [True, False])
def test_memory_is_kept_within_a_turn(is_kept: bool) -> None:
    """A large tensor made again and again costs no page that the system has to clear; in a process of its own."""
    lines = [
        "import resource, sys, torch",
        "from experiments.benchmark import worker as benchmark_worker",
        "benchmark_worker.main()" if is_kept else "",  # it has no commands, and ends at once
        "counts = [0]",
        "for _ in range(8):",
        "    torch.ones(2**26)",  # 256 MiB
        "    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)",
        "print(min(later - count for count, later in zip(counts[1:], counts[2:])), file=sys.stderr)",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], input="", capture_output=True, text=True, check=True
    )
    assert (int(done.stderr.splitlines()[-1]) < 20) == is_kept  # libraries may complain before


def test_memory_is_given_back_before_the_next_ones_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not before it is known how much there was."""
    events: list[str] = []
    monkeypatch.setattr(benchmark_worker, "return_memory", lambda: events.append("returned"))
    monkeypatch.setattr(benchmark_worker, "peak_bytes", lambda: events.append("measured") or 1)
    Runner(CONTENDERS["ours"], FIELDS).repeat("train", [32], 2, False)
    assert events[-2:] == ["measured", "returned"]


@pytest.mark.skipif(not hasattr(torch.nn.functional, "linear_cross_entropy"), reason="needs torch 2.13")
def test_both_losses_are_counted_alike() -> None:
    counts = [
        Runner(CONTENDERS[name], FIELDS).repeat("train", [64], 2, True)["results"]["64"]["flops"]
        for name in ("ours", "ours_all_logits")
    ]
    assert counts[0] == counts[1]


def test_an_untied_embedding_is_not_read_by_every_token() -> None:
    runner = Runner(CONTENDERS["ours"], {**FIELDS, "tie_word_embeddings": False})
    sizes = runner.sizes()
    assert sizes["parameter_bytes"] == 4 * (sizes["parameters"] - 64 * 32)


def test_a_compiled_contender_runs_what_the_compiler_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def compiler(forward: Any, dynamic: bool) -> Any:
        def compiled(*args: Any, **kwargs: Any) -> Any:
            calls.append(kwargs["input_ids"].shape)
            return forward(*args, **kwargs)

        return compiled

    monkeypatch.setattr(torch, "compile", compiler)
    runner = Runner(CONTENDERS["llama_static_compiled"], FIELDS)
    figures = runner.repeat("decode", [20], 2, True, tokens=3, seconds=9.0)["results"]["20"]
    assert calls == [(2, 1)] * 5  # two to warm up; reading and counting are eager
    assert figures["state_bytes"] == 2 * 2 * 32 * 4 * (20 + 3 + 2 + 1)  # rows, keys and values, positions to the end


@pytest.mark.skipif(not benchmark_worker.CLEAR_REFS.exists(), reason="Linux resets the peak")
def test_peak_is_that_of_the_cell() -> None:
    size = 64 * 2**20
    benchmark_worker.return_memory()
    benchmark_worker.restart_peak()
    before = benchmark_worker.peak_bytes()
    tensor = torch.ones(size // 4)
    del tensor
    assert benchmark_worker.peak_bytes() >= before + 0.9 * size
    benchmark_worker.return_memory()
    benchmark_worker.restart_peak()
    assert benchmark_worker.peak_bytes() < before + 0.5 * size


def outline(model: Any, state: Any) -> list[Any]:
    """Shapes of a state, and the clock of each attention layer."""
    layers = [layer for layer in getattr(state, "layers", []) if getattr(layer, "keys", None) is not None]
    return [*(tensor.shape for tensor in state_tensors(model, state)), *(layer.get_seq_length() for layer in layers)]


@pytest.mark.parametrize("name", [name for name, each in CONTENDERS.items() if "prefill" in each.phases])
@pytest.mark.parametrize("context", [5, 700])
def test_a_filled_state_is_as_large_as_one_that_has_read(name: str, context: int) -> None:
    """The same tensors, and so the same cost."""
    model = build(CONTENDERS[name], FIELDS)
    filled = state_at(model, context, 2)
    _, state = read_prompt(model, torch.zeros(2, context, dtype=torch.long))
    assert outline(model, filled) == outline(model, state)


def test_a_state_of_ours_whose_clock_is_set_costs_what_one_that_has_read_costs() -> None:
    model = build(CONTENDERS["ours"], FIELDS)
    set_on = state_at(model, 9000, 2)
    read = model.memorize(torch.zeros(2, 9000 % 64 + 6 * 64, dtype=torch.long))
    assert set_on.positions == [9000] * 2 and set_on.nbytes == read.nbytes
    for ours, theirs in zip(set_on.layers, read.layers, strict=True):
        assert torch.equal(ours.state.memory.strengths.isfinite(), theirs.state.memory.strengths.isfinite())
        assert ours.state.memory.strengths.isfinite().all()
    runner = Runner(CONTENDERS["ours"], FIELDS)
    first, second = runner.state_at(64 * 100, 1), runner.state_at(64 * 1000, 1)
    assert len(runner.filled) == 1 and (first.positions, second.positions) == ([6400], [64000])


def test_models_have_equal_size() -> None:
    fields = benchmark.model_fields(benchmark.parse_arguments([]))
    ours, llama = (build(CONTENDERS[name], fields).num_parameters() for name in ("ours", "llama"))
    assert abs(ours / llama - 1) < 0.002  # the MLP is widened by whole units


def test_cells_of_contexts_and_batches() -> None:
    args = benchmark.parse_arguments(shlex.split("--contexts 512 8192 1048576 --contenders ours llama llama_static"))
    found = cells(args)
    assert [[job.name for job in cell] for cell in found[:2]] == [["ours", "llama"]] * 2
    assert [(cell[0].phase, cell[0].contexts, cell[0].batch) for cell in found] == [
        ("train", (512,), 16),
        ("train", (8192,), 1),
        *(("prefill", (context,), batch) for batch in (1, 8) for context in (512, 8192, 1048576)),
        *(("decode", (512, 8192, 1048576), batch) for batch in (1, 8)),
    ]
    assert [job.contexts for job in found[-1] if job.name == "llama_static"] == [(512,), (8192,), (1048576,)]


def test_what_would_take_too_long_or_too_much_is_skipped(tmp_path: Path) -> None:
    args = benchmark.parse_arguments([*TINY, "--output-dir", str(tmp_path), "--contenders", "llama", "mistral"])
    args.memory_gib, args.cell_seconds, args.main_cell_seconds = 1.0, 10.0, 100.0
    run = Run(args, FIELDS, {})

    def learn(name: str, context: int, seconds: float, memory: float) -> None:
        row = {"contender": name, "phase": "prefill", "batch": 1, "context": context, "status": "measured"}
        run.learn({**row, "cpu_seconds": seconds, "base_bytes": 7, "peak_bytes": 7 + memory})

    def reason(name: str, context: int, phase: str = "prefill") -> str | None:
        return run.reason_to_skip(Job(name, phase, (context,), 1))

    assert reason("llama", 1024) is None  # nothing is known
    for name in ("llama", "mistral"):  # a token costs 1 ms and 40 KiB, then twice that: at 4,000 it will be 4 times
        learn(name, 1000, 1.0, 40 * 2**10 * 1000)
        learn(name, 2000, 4.0, 80 * 2**10 * 2000)
    assert reason("mistral", 2500) is None and reason("mistral", 4000, "train") is None
    assert reason("mistral", 4000) == "would take 16 CPU seconds, more than 10"
    assert reason("llama", 4000) is None  # one of the main contenders
    assert reason("llama", 9000) == "would take 3.1 GiB, more than 1.0"
    assert reason("llama", 200_000) == "its state grows with context: measured up to 131,072 tokens"
    assert not run.is_wanted(Job("llama", "prefill", (9000,), 1)) and run.is_wanted(Job("llama", "prefill", (4000,), 1))
    assert [row["context"] for row in run.rows if row.get("status") == "skipped"] == [9000]
    run.leave_out(Job("llama", "prefill", (3000,), 1), "failed", "out of memory")
    assert reason("llama", 4000) == "failed at 3,000 tokens: out of memory"
    assert run.without_done(Job("llama", "prefill", (3000, 4000), 1)).contexts == (4000,)


def test_repetitions_stop_at_the_limit(tmp_path: Path) -> None:
    args = benchmark.parse_arguments([*TINY, "--output-dir", str(tmp_path), "--cell-seconds", "10"])
    run, job = Run(args, FIELDS, {}), Job("mistral", "train", (64,), 1)

    def has_time(*seconds: float) -> bool:
        answers = [
            {"results": {"64": {"cpu_seconds": [part, part]}, "512": {"cpu_seconds": [part]}}} for part in seconds
        ]
        return run.has_time(job, answers)

    assert has_time(1.6) and not has_time(1.7)  # three times that, twice
    assert has_time(0.25, 0.25) and not has_time(0.3, 0.3)  # a third time only within a quarter


def test_extrapolation() -> None:
    assert extrapolate({}, 100) is None
    assert extrapolate({10: 3.0}, 100) == 3.0
    assert extrapolate({30: 5.0, 10: 99.0, 20: 3.0}, 100) == pytest.approx(19.0)  # the line through the longest two
    assert extrapolate({10: 3.0, 20: 2.0}, 100) == 2.0


def test_the_fastest_repetition_and_the_median_token() -> None:
    def answer(times: list[float], peak: int) -> dict[str, Any]:
        figures = {"cpu_seconds": times, "wall_seconds": [2 * time for time in times], "state_bytes": 5, "flops": 6}
        return {"results": {"10": figures}, "peak_bytes": peak, "base_bytes": 1}

    job = Job("llama", "prefill", (10,), 2)
    row = row_of(job, 10, [answer([3.0], 3), answer([4.0], 9), answer([2.0], 3)])
    assert (row["cpu_seconds"], row["wall_seconds"], row["peak_bytes"]) == (2.0, 4.0, 9)
    assert row["tokens_per_cpu_second"] == 20 / 2.0 and row["repetitions"] == 3
    row = row_of(job._replace(phase="decode"), 10, [answer([1.0, 9.0], 3), answer([2.0], 3)])
    assert row["cpu_seconds"] == 2.0 and row["tokens_per_cpu_second"] == 2 / 2.0


def made_up(phase: str, contender: str, batch: int, speeds: dict[int, float]) -> list[dict[str, Any]]:
    """Rows with so many tokens per second, by context; memory is a MB and 10 bytes per token."""
    rows = []
    for context, speed in speeds.items():
        tokens = batch if phase == "decode" else batch * context
        row = {"phase": phase, "contender": contender, "batch": batch, "context": context, "status": "measured"}
        memory = {"base_bytes": 10**6, "peak_bytes": 10**6 + 10 * tokens, "state_bytes": 300, "parameter_bytes": 700}
        figures = {"tokens_per_cpu_second": speed, "cpu_seconds": tokens / speed, "wall_seconds": 1.0, "flops": 40}
        rows.append({**row, **figures, **memory, "repetitions": 2})
    return rows


def test_ratios_by_hand() -> None:
    rows = made_up("train", "ours", 16, {512: 600.0}) + made_up("train", "ours", 1, {8192: 540.0})
    rows += made_up("train", "llama", 16, {512: 500.0}) + made_up("train", "llama", 1, {8192: 200.0})
    rows += made_up("prefill", "ours", 1, {512: 1.0, 8192: 8192**-0.25, 32768: 32768**-0.25})
    rows += made_up("prefill", "llama", 1, {8192: 0.5 * 8192**-0.25})
    rows += made_up("decode", "ours", 8, {512: 104.0, 8192: 100.0, 32768: 102.0})
    rows += made_up("decode", "ours_compiled", 8, {8192: 200.0})
    rows += made_up("decode", "llama", 8, {512: 130.0, 8192: 10.0}) + made_up("decode", "llama_static", 8, {8192: 20.0})
    rows += made_up("decode", "llama_static_compiled", 8, {8192: 25.0})
    expected = {
        "training speed, ours over llama, 512": 1.2,
        "training speed, ours over llama, 8,192": 2.7,
        "training speed, ours, 8,192 over 512": 0.9,
        "training memory per token, ours, 8,192 over 512": 1.0,
        "prefill speed, ours over llama, batch 1, 8,192": 2.0,
        "prefill peak memory, ours, batch 1, 32,768 over 8,192": (10**6 + 327680) / (10**6 + 81920),
        "prefill exponent of time, ours, batch 1": 1.25,
        "decoding time, ours over llama's best eager, batch 8, 512": 1.25,
        "decoding speed, ours over llama's best, batch 8, 512": 0.8,
        "decoding time, ours over llama's best eager, batch 8, 8,192": 0.2,
        "decoding speed, ours over llama's best, batch 8, 8,192": 4.0,
        "decoding time, ours, slowest over fastest context, batch 8": 1.04,
        "decoding time, ours_compiled over llama's best eager, batch 8, 8,192": 0.1,
        "decoding speed, ours_compiled over llama's best, batch 8, 8,192": 8.0,
    }
    figures = benchmark_report.ratios(rows, full=4608)
    assert figures == pytest.approx(expected)
    held = {name: promise["holds"] for name, promise in benchmark_report.promises(figures).items()}
    assert held == {
        "training speed, ours over llama, 512": True,
        "training speed, ours over llama, 8,192": True,
        "prefill speed, ours over llama, batch 1, 8,192": False,
        "decoding time, ours over llama's best eager, batch 8, 512": False,
    }


def test_promises_are_the_ratios_of_a_run() -> None:
    """Each is a ratio that the contexts of the published run give, holds at its bound and not beyond it."""
    rows = []
    for name in ("ours", "llama", "llama_static"):
        for phase in CONTENDERS[name].phases:
            for batch in (1, 8) if phase != "train" else (1,):
                rows += made_up(phase, name, batch, dict.fromkeys([512, 2048, 8192, 32_768], 1.0))
    assert set(benchmark_report.PROMISES) <= set(benchmark_report.ratios(rows, full=4608))
    lower = {("training", 512): 0.95, ("training", 2048): 1.2, ("training", 8192): 2.2, ("training", 32_768): 6.0}
    lower |= {("prefill", 512): 0.95, ("prefill", 2048): 1.2, ("prefill", 8192): 2.3}
    upper = {"decoding time, ours over llama's best eager, batch 1, 512": 1.10}
    upper |= {"decoding time, ours over llama's best eager, batch 8, 512": 1.0}
    upper |= {"decoding time, ours, slowest over fastest context, batch 1": 1.03}
    for (phase, context), least in lower.items():
        batch = ", batch 1" if phase == "prefill" else ""
        name = f"{phase} speed, ours over llama{batch}, {context:,}"
        judged = [benchmark_report.promises({name: value})[name] for value in (least, least - 0.01)]
        assert [each["holds"] for each in judged] == [True, False] and judged[0]["promise"] == f"at least {least}"
    for name, most in upper.items():
        judged = [benchmark_report.promises({name: value})[name] for value in (most, most + 0.01)]
        assert [each["holds"] for each in judged] == [True, False] and judged[0]["promise"] == f"at most {most}"
    assert len(benchmark_report.PROMISES) == len(lower) + len(upper)


def test_utilization_by_hand() -> None:
    rows = [*made_up("decode", "ours", 2, {512: 4.0}), {"status": "skipped"}]
    row, skipped = benchmark_report.with_utilization(rows, {"flops_per_second": 160.0, "bytes_per_second": 8000.0})
    assert row["flops_utilization"] == pytest.approx(0.5)  # 40 operations in half a second
    assert row["bandwidth_utilization"] == pytest.approx(0.25)  # weights and state, 1,000 bytes
    assert skipped == {"status": "skipped"}


def test_the_last_row_of_a_cell_counts() -> None:
    old, new = made_up("train", "ours", 1, {512: 1.0}) + made_up("train", "ours", 1, {512: 2.0})
    assert benchmark_report.latest([{"phase": "machine"}, old, new]) == [new]


def test_exponent_of_a_power_law() -> None:
    assert benchmark_report.exponent({length: length**1.25 for length in (8, 16, 64)}) == pytest.approx(1.25)
    assert math.isfinite(benchmark_report.exponent({8: 1.0, 16: 3.0}))


def test_folders_that_do_not_exist_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for text in (f"mine={tmp_path}/none", f"ours={tmp_path}", str(tmp_path)):
        with pytest.raises(SystemExit):
            benchmark.parse_arguments(["--model", text])
        assert "--model wants NAME=FOLDER" in capsys.readouterr().err
    with pytest.raises(ValueError, match="baseline or a folder"):
        build(Contender(f"{tmp_path}/none"), {})
    assert benchmark.parse_arguments(["--model", f"mine={tmp_path}"]).contender["mine"].model == str(tmp_path)
