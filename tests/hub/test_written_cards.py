"""Cards that saving and pushing write: what they say, what they keep of a person's words, and what they never say."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from helpers import ROOT, make_source, tiny_ids, tiny_model
from rmt_hf import RMTCache, RMTForCausalLM, RMTForSequenceClassification, RMTModel, RMTTrainer, RMTTrainingArguments
from rmt_hf.cards import DESCRIPTION, write_card
from rmt_hf.conversion import convert
from rmt_hf.modeling_rmt import AUTO_CLASSES


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def said(folder: Path) -> str:
    return (folder / "README.md").read_text("utf-8")


def test_a_saved_model_has_a_card_whose_lines_load_it(tmp_path) -> None:
    for model_class, _ in AUTO_CLASSES.values():
        folder = tmp_path / model_class.__name__
        model = tiny_model(model_class, torch.float32)
        model.save_pretrained(folder)
        data = card_of(folder).data
        assert data.library_name == "transformers" and data.base_model is None and data.eval_results is None
        assert "recurrent-memory" in data.tags and data.pipeline_tag
        [lines] = re.findall(r"```python\n(.*?)```", said(folder), re.DOTALL)
        assert lines.count("\n") == 3 and str(tmp_path) not in said(folder)
        names: dict = {}
        exec(compile(lines.replace("this folder or repository", str(folder)), "card", "exec"), names)
        assert type(names["model"]) is model_class
    assert card_of(tmp_path / "RMTForSequenceClassification").data.pipeline_tag == "text-classification"
    assert card_of(tmp_path / "RMTModel").data.pipeline_tag == "feature-extraction"


def test_a_card_that_nobody_changed_is_brought_up_to_date(tmp_path) -> None:
    tiny_model().save_pretrained(tmp_path)
    tiny_model(num_memory_slots=16).save_pretrained(tmp_path)
    assert "and 16 earlier ones" in said(tmp_path)
    write_card(tmp_path, license="mit", datasets=["someone/words"])
    tiny_model().save_pretrained(tmp_path)
    data = card_of(tmp_path).data
    assert (data.license, data.datasets) == ("mit", ["someone/words"]) and "and 8 earlier ones" in said(tmp_path)


@pytest.mark.parametrize("text", ["# Mine\n\nMy words.\n", "---\nlicense: mit\ntags: [mine]\n---\n\n# Mine\n"])
def test_what_a_person_wrote_stays(text: str, tmp_path) -> None:
    (tmp_path / "README.md").write_text(text, "utf-8")
    model, words = tiny_model(), text.rpartition("---\n")[2]
    model.save_pretrained(tmp_path)
    model.memorize(tiny_ids(1, 20)).save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert card.text == words and card.data.pipeline_tag == "text-generation" and "memory-state" in card.data.tags
    assert card.data.license == ("mit" if "mit" in text else None) and ("mine" in card.data.tags) == ("mine" in text)
    before = said(tmp_path)
    model.save_pretrained(tmp_path)
    assert said(tmp_path) == before


def test_one_word_that_a_person_changed_makes_the_words_theirs(tmp_path) -> None:
    for part in (tiny_model(), tiny_model().memorize(tiny_ids(1, 20))):
        folder = tmp_path / type(part).__name__
        part.save_pretrained(folder)
        changed = said(folder).replace("constant size", "a constant size").replace("One stream", "Our stream")
        (folder / "README.md").write_text(changed, "utf-8")
        part.save_pretrained(folder)
        assert said(folder) == changed


def test_metadata_that_nobody_can_read_stay(tmp_path, caplog) -> None:
    text = "---\nlicense: [\n---\n# Mine\n"
    (tmp_path / "README.md").write_text(text, "utf-8")
    tiny_model().save_pretrained(tmp_path)
    assert said(tmp_path) == text


def test_a_state_beside_a_model_leaves_its_card(tmp_path) -> None:
    model = tiny_model()
    state = model.memorize(tiny_ids(1, 20))
    state.save_pretrained(tmp_path)
    assert "One stream at 20 tokens" in said(tmp_path)
    model.save_pretrained(tmp_path)
    state.save_pretrained(tmp_path)
    assert "Load it" in said(tmp_path) and "One stream" not in said(tmp_path)
    assert "memory-state" in card_of(tmp_path).data.tags


def test_conversion_names_the_base_model_and_its_license(tmp_path, monkeypatch) -> None:
    source = make_source("llama")
    source.save_pretrained(tmp_path / "source")
    (tmp_path / "source/README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# A source\n", "utf-8")
    convert(tmp_path / "source", tmp_path / "local", segment_length=16)
    data = card_of(tmp_path / "local").data
    assert (data.license, data.language, data.base_model) == ("mit", "en", None)
    assert str(tmp_path) not in said(tmp_path / "local") and "A source" not in said(tmp_path / "local")
    (tmp_path / "source/README.md").write_text("---\nlicense: mit\nbase_model: someone/llama\n---\n", "utf-8")
    convert(tmp_path / "source", tmp_path / "tuned", segment_length=16)
    assert card_of(tmp_path / "tuned").data.base_model == "someone/llama"
    # What was converted, is loaded from its folder, trained, and saved again.
    model = RMTForCausalLM.from_pretrained(tmp_path / "tuned")
    model.save_pretrained(tmp_path / "again")
    data = card_of(tmp_path / "again").data
    assert (data.license, data.base_model) == ("mit", "someone/llama") and str(tmp_path) not in said(tmp_path / "again")


def test_the_record_of_a_state_names_weights_and_base_model(tmp_path) -> None:
    records = []
    for seed, name in ((0, "someone/model"), (0, str(tmp_path)), (1, "/a/folder/that/is/gone")):
        model = tiny_model(seed=seed)
        model.config._name_or_path = name
        model.config.converted_from = {"_name_or_path": "/private/source"}
        model.memorize(tiny_ids(1, 20)).save_pretrained(tmp_path / "state")
        records.append(json.loads((tmp_path / "state/rmt_state.json").read_text("utf-8")))
        assert "/private" not in said(tmp_path / "state") and str(tmp_path) not in said(tmp_path / "state")
    assert [record["base_model"] for record in records] == ["someone/model", None, None]
    hashes = [record["weights_sha256"] for record in records]
    assert hashes[0] == hashes[1] != hashes[2] and hashes[2][:16] in said(tmp_path / "state")
    model.config._name_or_path, model.config.converted_from = "", {"_name_or_path": "someone/source"}
    model.memorize(tiny_ids(1, 20)).save_pretrained(tmp_path / "state")
    assert card_of(tmp_path / "state").data.base_model == "someone/source"
    assert RMTCache.from_pretrained(tmp_path / "state", model).positions == [20]


def test_a_trainer_writes_what_it_measured(tmp_path) -> None:
    rows = Dataset.from_dict({"input_ids": tiny_ids(2, 20).tolist(), "labels": tiny_ids(2, 20).tolist()})
    rows.info.download_checksums = {"hf://datasets/someone/words@abc/data.parquet": {}}
    arguments = RMTTrainingArguments(
        str(tmp_path),
        max_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    (tmp_path / "README.md").write_text("# Mine\n", "utf-8")
    trainer = RMTTrainer(tiny_model(dtype=torch.float32), arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    trainer.create_model_card(license="mit", tags="one", finetuned_from="someone/llama", dataset="Words")
    loss = next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        data = card_of(folder).data
        [result] = data.eval_results
        assert (result.metric_type, result.metric_value) == ("loss", round(loss, 4))
        assert result.dataset_type == "someone/words" and data.datasets == "someone/words"
        assert "generated_from_trainer" in data.tags
    data = card_of(tmp_path).data
    assert (data.license, data.base_model) == ("mit", "someone/llama") and "one" in data.tags
    assert card_of(tmp_path).text == "# Mine\n" and f"| loss | {loss:.4f}"[:12] in said(tmp_path / "checkpoint-1")
    trainer.evaluate()
    trainer.save_model()
    [again] = card_of(tmp_path).data.eval_results  # replaced, not added
    assert again.metric_type == "loss" and card_of(tmp_path).text == "# Mine\n"


def test_results_that_are_given_replace_those_of_the_same_name(tmp_path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    for value in (1.5, 1.25):
        result = EvalResult("text-generation", "someone/words", "Words", "bits_per_byte", value)
        write_card(tmp_path, results=[result, EvalResult("text-generation", "b", "B", "loss", value)])
    assert [each.metric_value for each in card_of(tmp_path).data.eval_results] == [1.25, 1.25]
    assert "| Words | bits_per_byte | 1.25 |" in said(tmp_path)


def test_the_card_of_no_words_is_that_of_transformers() -> None:
    source = Path(transformers.utils.hub.__file__).read_text("utf-8")
    assert DESCRIPTION in source and ModelCard.from_template(ModelCardData(), model_description=DESCRIPTION).text


def test_files_that_travel_name_no_home_file() -> None:
    assert RMTModel.write_card is RMTForSequenceClassification.write_card is not None
    for file in (ROOT / "src/rmt_hf").glob("*_rmt.py"):
        assert "from .cards" not in file.read_text("utf-8")
