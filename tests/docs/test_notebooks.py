"""Notebooks of examples run from their first cell to the last, in an empty folder, and are committed without output.

Their cells are executed as plain Python. Jupyter would bring 30 more packages to pin, and shows nothing else here: what
the notebooks need of it is stood in for.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import ROOT, make_source, tiny_tokenizer


NOTEBOOKS = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted((ROOT / "examples").glob("*.ipynb"))}
RUNNER = """
import contextlib, io, json, sys, types

display = types.ModuleType("IPython.display")
display.IFrame = lambda src, **size: print(f"shown: {src}")
sys.modules |= {"IPython": types.ModuleType("IPython"), "IPython.display": display}
for cells in json.load(sys.stdin):
    said, names = io.StringIO(), {"__name__": "__main__"}
    with contextlib.redirect_stdout(said):
        for number, cell in enumerate(cells):
            exec(compile(cell, f"code cell {number}", "exec"), names)
    print(json.dumps(said.getvalue()))
"""


def code_of(name: str, **parameters: str) -> list[str]:
    """The code cells of a notebook, with other parameters."""
    cells = ["".join(cell["source"]) for cell in NOTEBOOKS[name]["cells"] if cell["cell_type"] == "code"]
    for parameter, value in parameters.items():
        cells[0], count = re.subn(rf"^{parameter} = None\b", f"{parameter} = {value!r}", cells[0], flags=re.MULTILINE)
        assert count == 1
    return cells


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("notebooks")


@pytest.fixture(scope="module")
def printed(folder: Path) -> list[str]:
    """What is printed by the quickstart, the other notebook, and that one with a model and a text."""
    for part in (make_source("llama", torch.float32), tiny_tokenizer()):
        part.save_pretrained(folder / "source")
    (folder / "text.txt").write_text(" ".join(f"w{3 + number * number % 61}" for number in range(8000)), "utf-8")
    memory = "memory_for_your_model"
    runs = [code_of("quickstart"), code_of(memory), code_of(memory, SOURCE="source", TEXTS="text.txt")]
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-c", RUNNER]
    options = {"capture_output": True, "text": True, "timeout": 600, "check": False}
    done = subprocess.run(command, input=json.dumps(runs), cwd=folder, env=environment, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning: " not in done.stderr, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_quickstart(printed: list[str]) -> None:
    said = printed[0]
    assert said.startswith("Same logits: True\n") and "\nThe same: True\n" in said
    [(_, before), (_, after)] = re.findall(r"([\d,]+) tokens read, ([\d,]+) bytes of state", said)
    assert before == after
    here, there, rewound = re.findall(r"\[[\d, ]+\]", said)
    assert here == there == rewound and len(here.split()) == 8
    assert "256 slots in 2 layers of 4 heads" in said and re.search(r"The oldest is token \d+ of 5000, in layer", said)


@pytest.mark.parametrize("run", [1, 2])
def test_memory_for_your_model(run: int, printed: list[str], folder: Path) -> None:
    said = printed[run]
    assert float(re.search(r"window of 64 tokens the logits differ by at most (\S+)\.\n", said)[1]) < 1e-4
    assert re.search(r"The scores explain -?\d+% of the variance", said)
    bits = dict(re.findall(r"^(\w[\w ]+?) +([\d.]+) bits per byte$", said, re.MULTILINE))
    assert list(bits) == ["everything", "with memory", "memory emptied"]
    assert all(2 < float(value) < 12 for value in bits.values())  # a random model: four digits may agree
    assert "shown: memory.html\n" in said and (folder / "memory.html").stat().st_size > 10_000
    assert re.search(r"\n600 tokens read, [\d,]+ bytes of state\n$", said)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_is_committed_without_output_and_in_small_cells(name: str) -> None:
    """In the format that Jupyter writes, so that it changes nothing else when it is opened."""
    notebook = NOTEBOOKS[name]
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    kinds = [cell["cell_type"] for cell in notebook["cells"]]
    assert kinds[0] == "markdown" and "".join(notebook["cells"][0]["source"]).startswith("# ")
    assert len({cell["id"] for cell in notebook["cells"]}) == len(kinds)
    for cell in notebook["cells"]:
        assert len(cell["source"]) <= 25 and all(len(line) <= 400 for line in cell["source"])
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


def test_each_is_run_here() -> None:
    assert list(NOTEBOOKS) == ["memory_for_your_model", "quickstart"]
