"""A folder that carries its code works where the package is not installed; and the files that travel stand alone."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import rmt_hf
from helpers import tiny_ids, tiny_model
from rmt_hf import RMTConfig, RMTForCausalLM, RMTForSequenceClassification, RMTModel
from rmt_hf.modeling_rmt import AUTO_CLASSES


SOURCE = Path(rmt_hf.__file__).parent
TRAVELLING = sorted(path.name for path in SOURCE.glob("*_rmt.py"))
ALL_CLASSES = {
    "AutoConfig": "configuration_rmt.RMTConfig",
    "AutoModel": "modeling_rmt.RMTModel",
    "AutoModelForCausalLM": "modeling_rmt.RMTForCausalLM",
    "AutoModelForSequenceClassification": "modeling_rmt.RMTForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_rmt.RMTForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_rmt.RMTForQuestionAnswering",
}
S = 8  # segment_length of the tiny configuration


@pytest.fixture
def register(monkeypatch):
    """`register_for_auto_class` of several classes, undone after the test."""

    def register_all(**auto_class_of) -> None:
        classes = {"RMTConfig": RMTConfig} | {cls.__name__: cls for cls, _ in AUTO_CLASSES.values()}
        for name, auto_class in auto_class_of.items():
            monkeypatch.setattr(classes[name], "_auto_class", None)
            classes[name].register_for_auto_class(auto_class)

    return register_all


def auto_map(folder: Path) -> dict[str, str] | None:
    return json.loads((folder / "config.json").read_text("utf-8")).get("auto_map")


# What is saved


def test_nothing_travels_unless_it_is_asked_for(tmp_path) -> None:
    for cls in (RMTConfig, *(cls for cls, _ in AUTO_CLASSES.values())):
        assert cls._auto_class is None
    tiny_model().save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py")) and auto_map(tmp_path) is None


@pytest.mark.parametrize(
    "registered",
    [
        {"RMTConfig": "AutoConfig", "RMTModel": "AutoModel", "RMTForCausalLM": "AutoModelForCausalLM"},
        {"RMTForCausalLM": "AutoModelForCausalLM"},
    ],
)
def test_all_code_and_the_names_of_all_classes_are_saved(registered: dict, register, tmp_path) -> None:
    register(**registered)
    for folder in (tmp_path / "first", tmp_path / "again"):
        model = tiny_model()
        model.save_pretrained(folder)
        assert sorted(path.name for path in folder.glob("*.py")) == TRAVELLING
        for name in TRAVELLING:
            assert (folder / name).read_text("utf-8") == (SOURCE / name).read_text("utf-8")
        assert auto_map(folder) == ALL_CLASSES
    ids = tiny_ids(1, 6 * S)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert type(loaded) is RMTForCausalLM  # where the package is imported, it wins over the copy
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_classifier_travels_as_well(register, tmp_path) -> None:
    register(RMTForSequenceClassification="AutoModelForSequenceClassification")
    tiny_model(RMTForSequenceClassification).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.py")) == TRAVELLING and auto_map(tmp_path) == ALL_CLASSES


# Where the package is not installed


VISITOR = """
import json, sys
from pathlib import Path

class NoPackage:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "rmt_hf":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NoPackage())
try:
    import rmt_hf
except ModuleNotFoundError:
    pass

import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForQuestionAnswering, AutoModelForSequenceClassification,
    AutoModelForTokenClassification, Trainer, TrainingArguments
)

folder, report = sys.argv[1], {}
ids = load_file(folder + "/ids.safetensors")["ids"]
trust = {"trust_remote_code": True}
# First, while no other class is registered: a head must not need the auto class of the base model.
for head in (AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoModelForQuestionAnswering):
    report[head.__name__] = type(head.from_pretrained(folder, **trust)).__name__
    fresh = head.from_config(AutoConfig.from_pretrained(folder, **trust), **trust)
    assert type(fresh).__name__ == report[head.__name__]

report["config"] = AutoConfig.from_pretrained(folder, **trust).to_dict()
model = AutoModelForCausalLM.from_pretrained(folder, **trust)
report["module"] = type(model).__module__
report["configuration is that of the model file"] = isinstance(model.config, type(model).config_class)
report["logits"] = model(ids).logits.tolist()
report["hidden_states"] = AutoModel.from_pretrained(folder, **trust)(ids).last_hidden_state.tolist()
step = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
step["suppress_tokens"] = [0]  # padding
generated = model.generate(ids, **step)
report["generated"] = generated.sequences.tolist()
turn = torch.cat([generated.sequences, ids], 1)
report["second turn"] = model.generate(turn, past_key_values=generated.past_key_values, **step).sequences.tolist()

arguments = TrainingArguments(folder + "/run", use_cpu=True, max_steps=1, save_strategy="no", disable_tqdm=True,
                              label_smoothing_factor=0.1, report_to="none")
rows = [{"input_ids": row, "labels": row} for row in ids]
trainer = Trainer(model, arguments, train_dataset=rows)
report["smoothed loss"] = trainer.compute_loss(model.eval(), {"input_ids": ids, "labels": ids}).item()
before = model.lm_head.weight.clone()
trainer.train()
report["trained"] = not torch.equal(before, model.lm_head.weight)
model.save_pretrained(folder + "/again")
again = AutoModel.from_pretrained(folder + "/again", **trust)
report["saved again"] = torch.equal(again(ids).last_hidden_state, model.eval().model(ids).last_hidden_state)
report["has the package"] = "rmt_hf" in sys.modules
(Path(folder) / "report.json").write_text(json.dumps(report))
"""


def test_a_folder_is_enough_without_the_package(register, tmp_path) -> None:
    register(RMTConfig="AutoConfig", RMTModel="AutoModel", RMTForCausalLM="AutoModelForCausalLM")
    model, ids = tiny_model(), tiny_ids(2, 5 * S + 3)
    model.save_pretrained(tmp_path)
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    visit = subprocess.run(
        [sys.executable, "-I", "-W", "error::FutureWarning", "-c", VISITOR, str(tmp_path)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert visit.returncode == 0, visit.stderr
    report = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert report["has the package"] is False and report["module"].startswith("transformers_modules.")
    # Each file is loaded under a hash of itself and what it imports, so there are two configuration classes: the reason
    # why the code never asks for the class of a configuration. When this fails, that rule may go.
    assert report["configuration is that of the model file"] is False
    fields = model.config.to_dict()
    assert {name: report["config"][name] for name in fields if name in RMTConfig.__annotations__} == {
        name: value for name, value in fields.items() if name in RMTConfig.__annotations__
    }
    # float64: products sum in an order that depends on where a file puts the weights in memory (1.8e-15 was seen).
    logits = torch.tensor(report["logits"], dtype=torch.float64)
    torch.testing.assert_close(logits, model(ids).logits, rtol=0, atol=1e-13)
    hidden_states = torch.tensor(report["hidden_states"], dtype=torch.float64)
    torch.testing.assert_close(hidden_states, model.model(ids).last_hidden_state, rtol=0, atol=1e-13)
    step = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "suppress_tokens": [0]}
    generated = model.generate(ids, **step)
    assert report["generated"] == generated.tolist()
    assert report["second turn"] == model.generate(torch.cat([generated, ids], 1), **step).tolist()
    for name in ALL_CLASSES.keys() - {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}:
        assert report[name] == ALL_CLASSES[name].split(".")[1]
    logits, wanted = model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    smoothed = torch.nn.functional.cross_entropy(logits, wanted, label_smoothing=0.1).item()
    assert report["smoothed loss"] == pytest.approx(smoothed, rel=1e-6)  # of the next token, also there
    assert report["trained"] and report["saved again"]


# What the files may import


def imports(path: Path) -> tuple[set[str], set[str], bool]:
    """Top-level packages, sibling files, and whether a relative import is of a form that the exporter misses."""
    packages, siblings, is_odd = set(), set(), False
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            packages.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            siblings.add(node.module or "")
            is_odd |= node.level != 1 or not node.module or "." in node.module
    return packages, siblings, is_odd


@pytest.mark.parametrize("name", TRAVELLING)
def test_travelling_files_import_only_what_every_visitor_has(name: str) -> None:
    packages, siblings, is_odd = imports(SOURCE / name)
    # huggingface_hub and safetensors come with transformers.
    assert packages <= {"torch", "transformers", "huggingface_hub", "safetensors"} | sys.stdlib_module_names
    assert not is_odd, "write `from .name_rmt import ...`: the exporter finds nothing else"
    assert all(f"{sibling}.py" in TRAVELLING for sibling in siblings)
    assert "__future__" not in packages  # would turn annotations that transformers reads into strings


def test_every_travelling_file_is_reached_from_the_model() -> None:
    reached, todo = set(), ["modeling_rmt"]
    while todo:
        name = todo.pop()
        reached.add(f"{name}.py")
        todo += [sibling for sibling in imports(SOURCE / f"{name}.py")[1] if f"{sibling}.py" not in reached]
    assert sorted(reached) == TRAVELLING


def test_auto_classes_are_all_registered() -> None:
    references = {name: f"{cls.__module__}.{cls.__name__}" for name, (cls, _) in AUTO_CLASSES.items()}
    assert {"AutoConfig": "rmt_hf.configuration_rmt.RMTConfig"} | references == {
        name: f"rmt_hf.{reference}" for name, reference in ALL_CLASSES.items()
    }
    assert all(names["rmt"] == cls.__name__ for cls, names in AUTO_CLASSES.values())
    assert AUTO_CLASSES["AutoModel"][0] is RMTModel
