"""Push and pull over HTTP, against a stand-in of the Hub: models, tokenizers, states, training, and code."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from helpers import ROOT


pytest.importorskip("fastapi", reason="the stand-in of the Hub needs fastapi and uvicorn")
pytest.importorskip("uvicorn", reason="the stand-in of the Hub needs fastapi and uvicorn")

from hub_server import Hub, running_hub


START = """
import json, sys, torch
from helpers import tiny_ids, tiny_model, tiny_tokenizer
from rmt_hf import RMTCache, RMTForCausalLM, RMTTrainer, RMTTrainingArguments
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

def say(**found):
    print("FOUND", json.dumps(found))

model, ids = tiny_model(), tiny_ids(2, 45)
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


@pytest.fixture
def visit(hub: Hub, tmp_path: Path) -> Callable[..., dict]:
    """Runs a script as a user of this Hub, who has an empty cache; returns what it says."""

    def run(script: str, start: str = START) -> dict:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_of_nobody", "HF_HOME": str(tmp_path / "home")}
        environment |= {"PYTHONPATH": os.pathsep.join(map(str, (ROOT / "src", ROOT / "tests"))), "OMP_NUM_THREADS": "1"}
        environment |= {
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "DISABLE_SAFETENSORS_CONVERSION": "1",
        }
        command = [sys.executable, "-c", start + script]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        lines = [line.removeprefix("FOUND ") for line in done.stdout.splitlines() if line.startswith("FOUND ")]
        return {name: value for line in lines for name, value in json.loads(line).items()}

    return run


def test_models_and_states_there_and_back(hub: Hub, visit) -> None:
    """A state replaces the one before, in the branch that is named, which is made."""
    found = visit("""
for part in (model, tiny_tokenizer()):
    part.push_to_hub("someone/model")
loaded = AutoModelForCausalLM.from_pretrained("someone/model", dtype=torch.float64)
say(error=(loaded(ids).logits - model(ids).logits).abs().max().item())
say(ids=AutoTokenizer.from_pretrained("someone/model")("w5 w7").input_ids)

state = model.memorize(ids)
state.push_to_hub("state")
model.memorize(ids, past_key_values=state)
state.push_to_hub("someone/state")
state.push_to_hub("someone/state", path_in_repo="deep/one")
state.push_to_hub("someone/state", path_in_repo="deep/one", revision="new")
model.memorize(ids, past_key_values=state)
state.push_to_hub("someone/state", path_in_repo="deep/one", revision="new")
state.push_to_hub("someone/other", revision="new")
loaded = RMTCache.from_pretrained("someone/other", model, revision="new")
say(same=all(torch.equal(*pair) for pair in zip(loaded.tensors(), state.tensors(), strict=True)))
say(read=RMTCache.from_pretrained("someone/state", model).positions)
try:
    RMTCache(model.config).push_to_hub("someone/empty")
except ValueError as error:
    say(refused=str(error))
""")
    assert found["error"] < 1e-13 and found["ids"] == [5, 7]  # sums depend on where a file puts the weights in memory
    assert not [name for name in hub.files("someone/model") if name.endswith(".py")]
    assert found["same"] and found["read"] == [90, 90] and "must have read something" in found["refused"]
    assert "someone/empty" not in hub.commits  # what raises has changed nothing
    for branch, folders in {"main": 2, "new": 2}.items():
        names = list(hub.files("someone/state", branch))
        for end in (".safetensors", "rmt_state.json", "README.md"):
            assert len([name for name in names if name.endswith(end)]) == folders, names
    assert list(hub.files("someone/other")) == [".gitattributes"]


def test_training_adds_no_file_with_each_save(hub: Hub, visit) -> None:
    visit("""
from datasets import Dataset
documents = Dataset.from_dict({"input_ids": tiny_ids(3, 60).tolist()})
arguments = RMTTrainingArguments(
    "run", stream_length=16, bptt_segments=1, per_device_train_batch_size=2, max_steps=6, save_steps=2, use_cpu=True,
    push_to_hub=True, hub_model_id="someone/run", hub_strategy="checkpoint", hub_always_push=True, report_to="none",
    save_total_limit=1, disable_tqdm=True,
)
trainer = RMTTrainer(tiny_model(dtype=torch.float32), arguments, train_dataset=documents)
trainer.train()
trainer._finish_current_push()
""")
    files = hub.files("someone/run")
    sealed = json.loads(files["last-checkpoint/rmt_checkpoint.json"])["sha256"]
    wanted = {"last-checkpoint/rmt_checkpoint.json", *(f"last-checkpoint/{name}" for name in sealed)}
    assert {name for name in files if "/" in name} == wanted and any("streams-0/state" in name for name in sealed)
    assert all(sha256(files[f"last-checkpoint/{name}"]).hexdigest() == digest for name, digest in sealed.items())
    assert sum(request.startswith("POST /api/models/someone/run/commit") for request in hub.requests) == 6  # two a save


PUSH_CODE = """
RMTForCausalLM.register_for_auto_class("AutoModelForCausalLM")
model.push_to_hub("someone/code")
torch.save(model(ids).logits, "logits.pt")
torch.save(ids, "ids.pt")
"""
PULL_CODE = """
import sys; sys.modules["rmt_hf"] = None
import json, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("someone/code", trust_remote_code=True, dtype=torch.float64)
error = (model(torch.load("ids.pt")).logits - torch.load("logits.pt")).abs().max().item()
print("FOUND", json.dumps({"error": error, "module": type(model).__module__}))
"""


def test_code_from_the_hub(hub: Hub, visit) -> None:
    """Each file is asked for and fetched once; what else transformers asks for does not depend on the code."""
    visit(PUSH_CODE)
    files = [name for name in hub.files("someone/code") if name.endswith(".py")]
    hub.requests.clear()
    found = visit(PULL_CODE, "")
    assert found["error"] < 1e-13 and found["module"].startswith("transformers_modules.")
    of_code = [request for request in hub.requests if request.endswith("_rmt.py")]
    assert len(of_code) == 2 * len(files) > 0
    assert len(hub.requests) - len(of_code) <= 11


def test_cards_are_written_and_a_persons_are_kept(hub: Hub, visit) -> None:
    visit("""
model.config._name_or_path = "someone/base"
model.push_to_hub("someone/new", tags=["asked"])
model.push_to_hub("someone/mine")
state = model.memorize(ids)
state.push_to_hub("someone/mine")
state.push_to_hub("someone/states", path_in_repo="one")
model.save_pretrained("folder", push_to_hub=True, repo_id="someone/saved")
""")  # the Hub has no someone/base, and is asked for its license
    for name in ("new", "mine", "saved"):
        card = hub.files(f"someone/{name}")["README.md"].decode()
        assert f'from_pretrained("someone/{name}")' in card and "base_model: someone/base" in card
        assert "pipeline_tag: text-generation" in card and "automatically generated" not in card
        assert ("memory-state" in card) == (name == "mine") and ("- asked" in card) == (name == "new")
    assert 'from_pretrained("someone/states", model)' in hub.files("someone/states")["one/README.md"].decode()
    for repo, words in (("mine", "# Mine\n"), ("base", "---\nlicense: mit\n---\n# Base\n")):
        hub.commits.setdefault(f"someone/{repo}", {})
        hub.branches.setdefault(f"someone/{repo}", {"main": ""})
        before = hub.commits[f"someone/{repo}"].get(hub.branches[f"someone/{repo}"]["main"], {})
        hub.commit(f"someone/{repo}", "main", {**before, "README.md": words.encode()})
    visit("""
model.config._name_or_path = "someone/base"
model.push_to_hub("someone/mine")
model.memorize(ids).push_to_hub("someone/mine")
""")
    card = hub.files("someone/mine")["README.md"].decode()
    assert card.endswith("---\n# Mine\n") and "license: mit" in card and "memory-state" in card
