"""The script for a GPU, as far as a CPU goes: it runs, it finds that all is well, and it notices when it is not."""

import json

import pytest
import torch

from experiments import gpu_check
from experiments.gpu_check import agreement, attempt, compiled_step, gradients, main, rate, token_loop
from rmt_hf import attention_rmt, modeling_rmt


CPU = torch.device("cpu")
SIZES = ["--device", "cpu", "--contexts", "64", "--hidden-size", "64", "--num-hidden-layers", "1", "--repetitions", "1"]


def test_it_runs_on_a_cpu(tmp_path):
    main([*SIZES, "--output-dir", str(tmp_path)])
    report = json.loads((tmp_path / "gpu_check.json").read_text("utf-8"))
    checks = {check["name"]: check["holds"] for check in report["checks"]}
    assert {name: holds for name, holds in checks.items() if not name.startswith("fl")} == {
        "gradients, float32": True,
        "no waiting in the token loop": None,
        **{f"sdpa, {dtype}": True for dtype in ("float32", "float16", "bfloat16")},
        "a compiled step": True,
    }
    flash = {f"{name}, {dtype}" for name in ("flash_attention_2", "flex_attention") for dtype in gpu_check.TOLERANCES}
    assert {name for name, holds in checks.items() if holds is None} >= flash  # there is no GPU
    names = [(row["contender"], row["phase"]) for row in report["speed"]]
    assert names == [(name, phase) for name in ("ours", "llama") for phase in ("train", "decode")]
    assert all(row["tokens_per_second"] > 0 for row in report["speed"])


def test_a_wrong_kernel_is_noticed(tmp_path, monkeypatch):
    original = attention_rmt.attend

    def wrong(module, query, *args, **kwargs):
        output, weights = original(module, query, *args, **kwargs)
        return (1.01 if query.dtype == torch.float32 else 1.0) * output, weights

    assert agreement(CPU, "eager", "float32").holds is True
    monkeypatch.setattr(attention_rmt, "attend", wrong)
    assert agreement(CPU, "sdpa", "float32").holds is False
    monkeypatch.setattr(gpu_check, "check_all", lambda device: [attempt(agreement, device, "sdpa", "float32")])
    with pytest.raises(SystemExit):
        main([*SIZES, "--output-dir", str(tmp_path)])
    assert json.loads((tmp_path / "gpu_check.json").read_text("utf-8"))["checks"][0]["holds"] is False


def test_wrong_gradients_are_noticed(monkeypatch):
    original = attention_rmt.attend
    assert token_loop(CPU).holds is None and gradients(CPU).holds

    def wrong(module, query, *args, **kwargs):
        output, weights = original(module, query, *args, **kwargs)
        factor = 0.1 if query.dtype == torch.float32 else 0.0
        return output + factor * (output - output.detach()), weights

    monkeypatch.setattr(attention_rmt, "attend", wrong)
    assert gradients(CPU).holds is False


@pytest.mark.slow
def test_a_step_that_is_compiled_again_and_again_is_noticed(monkeypatch):
    original = attention_rmt.RMTAttention.read

    def with_a_look_at_the_clock(self, query, frame, prefix, layout, *args):
        return original(self, query[: len(list(range(layout.ends[0])))], frame, prefix, layout, *args)

    monkeypatch.setattr(attention_rmt.RMTAttention, "read", with_a_look_at_the_clock)
    monkeypatch.setattr(modeling_rmt, "replace", lambda layout, **fields: layout)  # which takes the clock away
    torch._dynamo.reset()
    assert compiled_step(CPU).holds is False


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
