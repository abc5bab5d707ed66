"""The benchmark runs at tiny settings and reports every figure that it promises."""

import json
import math
import shlex
from pathlib import Path

import pytest
import torch

from rmt_hf import benchmark, decoding_benchmark


TINY = shlex.split(
    "--hidden-size 32 --intermediate-size 64 --num-hidden-layers 1 --num-attention-heads 2 --vocab-size 64 "
    "--segment-length 64 --num-memory-slots 4 --train-lengths 64 256 --forward-lengths 256 512 --rounds 1 "
    "--decode-positions 100 400"
)


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    results = benchmark.main([*TINY, "--output-dir", str(tmp_path)])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == results
    assert json.loads((tmp_path / "benchmark.json").read_text()) == results
    assert {path.name for path in tmp_path.iterdir()} == {"benchmark.json", "benchmark.png", "profile.txt"}
    names = {"train_256_over_64", "train_64_over_llama", "train_256_over_llama"}
    assert set(results["ratios"]) == names | {"decode_400_over_100", "forward_exponent"}
    exponent = results["ratios"].pop("forward_exponent")
    assert math.isfinite(exponent)  # at these lengths it is noise, of either sign: the fit has a test of its own
    assert all(value > 0 for value in results["ratios"].values())
    assert len(set(results["decode"]["state_bytes"].values())) == 1


def test_models_have_equal_size() -> None:
    args = benchmark.parse_arguments([])
    ours, llama = (model.num_parameters() for model in benchmark.build_models(args).values())
    assert abs(ours / llama - 1) < 0.002  # the MLP is widened by whole units


def test_exponent_of_a_power_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fit finds the exponent of times that follow a power law exactly."""
    args = benchmark.parse_arguments([*TINY, "--forward-lengths", "8", "16", "64"])
    monkeypatch.setattr(benchmark, "best_seconds", lambda tasks, rounds: {length: length**1.25 for length in tasks})
    result = benchmark.measure_forward(torch.nn.Identity(), args)
    assert abs(result["exponent"] - 1.25) < 1e-12


DECODING = shlex.split(
    "--hidden-size 32 --intermediate-size 64 --num-hidden-layers 1 --num-attention-heads 2 --vocab-size 64 "
    "--segment-length 64 --num-memory-slots 4 --contexts 100 9000 --longest-llama 100 --batch-sizes 2 --tokens 3"
)


def test_decoding_report(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    results = decoding_benchmark.main([*DECODING, "--no-compile", "--output-dir", str(tmp_path)])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == results
    assert json.loads((tmp_path / "decoding.json").read_text()) == results
    assert {path.name for path in tmp_path.iterdir()} == {"decoding.json", "decoding.png"}
    times = results["milliseconds"]["2"]
    assert set(times["100"]) == {"ours", "Llama, dynamic cache", "Llama, static cache"} and set(times["9000"]) == {
        "ours"
    }
    ratio = times["100"]["ours"] / min(value for name, value in times["100"].items() if name != "ours")
    assert results["ratios"]["ours over Llama's best eager, batch 2, 100"] == pytest.approx(ratio)


def test_a_state_whose_clock_is_set_costs_what_a_state_that_has_read_costs() -> None:
    args = decoding_benchmark.parse_arguments(DECODING)
    model = benchmark.build_models(args)["ours"].eval()
    set_on = decoding_benchmark.state_at(model, 9000, 2)
    read = model.memorize(torch.zeros(2, 9000 % 64 + 6 * 64, dtype=torch.long))
    assert set_on.positions == [9000] * 2 and set_on.nbytes == read.nbytes
    for ours, theirs in zip(set_on.layers, read.layers, strict=True):
        assert torch.equal(ours.state.memory.strengths.isfinite(), theirs.state.memory.strengths.isfinite())
        assert ours.state.memory.strengths.isfinite().all()
