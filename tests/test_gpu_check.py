"""The script for a GPU, as far as a CPU goes: it runs, it finds that all is well, and it notices when it is not."""

import json

import pytest
import torch

from rmt_hf import gpu_check, tiles_rmt
from rmt_hf.gpu_check import agreement, attempt, compiled_layer, gradients, main, rate, token_loop


CPU = torch.device("cpu")
SIZES = ["--device", "cpu", "--contexts", "64", "--hidden-size", "64", "--num-hidden-layers", "1", "--repetitions", "1"]


def test_it_runs_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "IMPLEMENTATIONS", ("sdpa", "flex_attention"))
    monkeypatch.setattr(gpu_check, "TOLERANCES", {"float32": 1e-3, "bfloat16": 0.4})
    main([*SIZES, "--output-dir", str(tmp_path)])
    report = json.loads((tmp_path / "gpu_check.json").read_text("utf-8"))
    assert [check["holds"] for check in report["checks"]] == [True, True, None, None, True, None, True]
    names = [(row["contender"], row["phase"]) for row in report["speed"]]
    assert names == [(name, phase) for name in ("ours", "llama") for phase in ("train", "prefill", "decode")]
    assert all(row["tokens_per_second"] > 0 for row in report["speed"])


def test_a_wrong_kernel_is_noticed(tmp_path, monkeypatch):
    original = tiles_rmt.tiled_attention
    monkeypatch.setattr(
        "rmt_hf.attention_rmt.tiled_attention", lambda *args, **kwargs: 1.01 * original(*args, **kwargs)
    )
    assert agreement(CPU, "sdpa", "float32").holds is False
    assert agreement(CPU, "eager", "float32").holds is True
    monkeypatch.setattr(gpu_check, "check_all", lambda device: [attempt(agreement, device, "sdpa", "float32")])
    with pytest.raises(SystemExit):
        main([*SIZES, "--output-dir", str(tmp_path)])
    assert json.loads((tmp_path / "gpu_check.json").read_text("utf-8"))["checks"][0]["holds"] is False


def test_wrong_gradients_and_graphs_are_noticed(monkeypatch):
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    assert compiled_layer(CPU).holds and token_loop(CPU).holds is None

    def wrong(gradient, query, *args, **kwargs):
        given = backward(gradient, query, *args, **kwargs)
        return (given[0] * (1.1 if query.dtype == torch.float32 else 1.0), *given[1:])

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", wrong)
    assert gradients(CPU).holds is False


def test_a_gpu_that_is_not_there_is_refused(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        main([])
    assert "--device cpu does what is possible without one" in capsys.readouterr().err


def test_what_raises_fails_and_the_rest_goes_on(capsys):
    def broken(device):
        raise ValueError("no such kernel\nand more")

    assert attempt(broken, CPU) == ("broken cpu", False, "ValueError: no such kernel")
    assert capsys.readouterr().out.startswith("FAILS")

    def full():
        raise torch.OutOfMemoryError

    assert rate(CPU, full, 1) == {"failed": "out of memory"}
