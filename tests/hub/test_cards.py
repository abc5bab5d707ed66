"""Model cards: what is committed is what the script writes, says what it must, and loads as it says."""

import re

import pytest
import transformers
from huggingface_hub import ModelCard

from experiments.cards import OURS, ROWS, cards
from helpers import ROOT, make_source
from rmt_hf import RMTForCausalLM
from rmt_hf.conversion import config_with_memory


FOLDER = ROOT / "model_cards"


def test_cards_are_those_that_the_script_writes() -> None:
    written = {path.name: path.read_text("utf-8") for path in FOLDER.iterdir()}
    assert written == {name: str(card) for name, card in cards().items()}, "run `make cards`"


@pytest.mark.parametrize("name", cards())
def test_the_hub_can_read_it(name: str) -> None:
    card = ModelCard.load(FOLDER / name)
    assert card.data.license == "apache-2.0" and card.data.base_model and card.data.library_name == "transformers"
    assert card.text.count("\n") < 70


def test_figures_with_their_errors() -> None:
    card = cards()["smollm2_135m_memory.md"]
    rows = re.findall(r"^\| (.+?) \| (\d\.\d{4}) ± (\d\.\d{4}) \| (.*) \|$", card.text, re.M)
    assert [row[0] for row in rows] == list(ROWS.values()) and len(rows) == 7
    means = {label: float(mean) for label, mean, _, _ in rows}
    for label, _, _, minus in rows:
        if label != ROWS[OURS]:
            difference = float(minus.split(" ± ")[0])
            # Three figures of four digits, rounded one by one.
            assert difference == pytest.approx(means[label] - means[ROWS[OURS]], abs=1.6e-4)
    assert card.data.eval_results[0].metric_value == means[ROWS[OURS]]


def test_its_lines_load_the_model_that_it_describes(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (FOLDER / "smollm2_135m_memory.md").read_text("utf-8")
    source, asked = make_source("llama"), []
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda name: (asked.append(name), source)[1]
    )
    names: dict = {}
    [block] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(block, "model card", "exec"), names)
    assert isinstance(names["model"], RMTForCausalLM) and asked == [ModelCard(text).data.base_model]
    config = config_with_memory(source.config)
    assert (config.segment_length, config.window_length, config.num_memory_slots) == (128, 256, 256)
    assert config.num_lasting_slots == 0 and config.use_attention_sink  # "that the present still attends to"
