"""Long-context tasks and what is measured on them: documents, scores, lines that are resumed, the table."""

import json

import pytest
import torch

from experiments import long_context_tasks
from experiments.long_context_tasks import KINDS, found_share, write_task
from helpers import make_source
from rmt_hf.conversion import add_memory
from rmt_hf.data import train_tokenizer


pytest.importorskip("lm_eval", reason="lm_eval comes with the extra eval")
from lm_eval.api.instance import Instance

from experiments import long_context
from experiments.long_context import main, scores_of, table
from rmt_hf.evaluation.lm_eval import RMTLM


TEXT = "The sea was calm. A boat lay still? Nobody spoke! The evening came and went, and so did we. " * 60
LENGTHS = {"needle": 200, "hard_needle": 900, "vt": 1600, "fwe": 600}


@pytest.fixture(scope="module")
def tokenizer():
    words = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. " * 3
    words += "VAR JKL = 1234567890 Find all variables that are assigned the value Question Answer number project "
    words += "Memorize and track the chain(s) of variable assignment hidden in the following text. According to "
    return train_tokenizer([TEXT, words * 20], 600)


@pytest.fixture(autouse=True)
def texts(monkeypatch) -> None:
    monkeypatch.setattr(long_context_tasks, "shakespeare", lambda: ({}, {"text": [TEXT]}))


@pytest.mark.parametrize("kind", KINDS)
def test_documents_have_their_length_and_their_answer(kind: str, tokenizer, tmp_path) -> None:
    if kind == "hard_needle":
        pytest.importorskip("hard_needle", reason="it is installed by make, with requirements-data.txt")
    name = write_task(tmp_path, kind, tokenizer, LENGTHS[kind], 2)
    rows = [json.loads(line) for line in (tmp_path / f"{name}_2.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == 2 and rows[0] != rows[1]
    for row in rows:
        size = len(tokenizer(row["text"])["input_ids"])
        assert LENGTHS[kind] * 0.5 < size <= LENGTHS[kind] - KINDS[kind][1]
        for answer in [row["choices"][row["label"]]] if kind == "hard_needle" else row["answers"]:
            assert answer in row["text"]
    if kind == "hard_needle":
        assert all(
            len(set(row["choices"])) == 6 and all(value in row["text"] for value in row["choices"]) for row in rows
        )


def test_a_length_that_their_generator_cannot_make_is_refused(tokenizer, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"vt needs .* give another length"):
        write_task(tmp_path, "vt", tokenizer, 600, 1)


def test_the_share_of_answers_is_counted() -> None:
    assert found_share({"answers": ["AB", "cd"]}, ["xx ab yy"]) == {"found": 0.5}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the harness and of datasets
def test_lines_are_resumed_and_the_table_shows_them(tmp_path, tokenizer, monkeypatch, capsys) -> None:
    pytest.importorskip("hard_needle", reason="it is installed by make, with requirements-data.txt")
    source = make_source("llama", torch.float32, vocab_size=len(tokenizer))
    for part in (source, tokenizer):
        part.save_pretrained(tmp_path / "source")
    where = [str(tmp_path / "source"), "--output-dir", str(tmp_path / "out"), "--documents", "2"]
    where += ["--kinds", "needle", "hard_needle", "--segment-length", "32", "--lengths", "400"]
    main(where)
    lines = [json.loads(line) for line in (tmp_path / "out/lines.jsonl").read_text("utf-8").splitlines()]
    names = list(dict.fromkeys(line["contender"] for line in lines))
    assert len(names) == 5 and len(lines) == 10 and all(len(line["scores"]) == 2 for line in lines)
    said = (tmp_path / "out/table.md").read_text("utf-8")
    assert said == f"{table(lines)}\n" and said.count("\n") == 4 and said in capsys.readouterr().out
    monkeypatch.setattr(long_context, "scores_of", None)  # nothing is measured again
    main(where)
    assert (tmp_path / "out/table.md").read_text("utf-8") == said
    monkeypatch.setattr(long_context, "scores_of", lambda model, *_: [float(model.dtype == torch.bfloat16)] * 2)
    main([*where, "--output-dir", str(tmp_path / "narrow"), "--dtype", "bfloat16", "--contenders", "untrained"])
    lines = [json.loads(line) for line in (tmp_path / "narrow/lines.jsonl").read_text("utf-8").splitlines()]
    assert len(lines) == 2 and all(line["scores"] == [1, 1] for line in lines)
    main([*where[:-2], "--lengths", "100000", "--contenders", "full"])  # more than the source was trained for
    assert (tmp_path / "out/table.md").read_text("utf-8") == said


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_the_model_says_is_what_is_scored(tmp_path, tokenizer, monkeypatch) -> None:
    """A document whose answer is what this model goes on with scores 1, one with another answer 0."""
    model = add_memory(make_source("llama", torch.float32, vocab_size=len(tokenizer)), segment_length=16)
    settings = {"until": ["\n"], "max_gen_toks": 16, "do_sample": False}
    asked = [Instance("generate_until", {}, (TEXT[: 400 + cut].strip(), settings), cut) for cut in range(8)]
    told = RMTLM(model, tokenizer=tokenizer).generate_until(asked, disable_tqdm=True)
    prompt, said = max(zip((each.args[0] for each in asked), told, strict=True), key=lambda pair: len(pair[1]))
    assert len(said) > 3
    rows = [{"text": prompt, "answers": [answer]} for answer in (said, "no such word")]
    monkeypatch.setitem(KINDS, "needle", (lambda *_: iter(rows), 16, ["\n"]))
    write_task(tmp_path, "needle", tokenizer, 100, 2)
    assert scores_of(model, tokenizer, tmp_path, "needle_100") == [1, 0]
