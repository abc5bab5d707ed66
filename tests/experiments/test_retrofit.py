"""How converted models are judged: contenders, bits, recall, chats and costs by hand; lines, tables and plot."""

import itertools
import json
import random

import pytest
import torch
from transformers import AutoTokenizer

from experiments import recall_rows, retrofit
from experiments.baselines import state_bytes
from experiments.recall_rows import CHANGE, CHANGED, CODE, NEEDLE, NUM_CODES, recall_row
from experiments.retrofit import (
    EVICTED,
    FULL,
    KINDS,
    UNTRAINED,
    Evidence,
    Sizes,
    Unit,
    chat_lines,
    contenders,
    cost_lines,
    main,
    measure,
    recall_lines,
    text_lines,
    units,
    window_with_sink,
)
from experiments.retrofit_report import closed, tables, write_retrofit_report
from helpers import WINDOW, S, make_source, tiny_ids
from rmt_hf import facts
from rmt_hf.conversion import add_memory
from rmt_hf.data import train_tokenizer
from rmt_hf.evaluation.ablation import empty_memories, stream_bits
from rmt_hf.evaluation.bits import token_bits


TEXT = "The sea was calm. A boat lay still? Nobody spoke! The evening came and went, and so did we. " * 400
TEXTS = {kind: [TEXT[number:] for number in range(0, 60, 20)] for kind in KINDS}
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
SIZES = Sizes(documents=2, document_tokens=1024, stream_tokens=256, windows=(2, 3), recall_tokens=64, prompts=3)


@pytest.fixture(scope="module")
def tokenizer():
    words = [*recall_rows.TOLD.values(), *recall_rows.ASKED.values(), CHANGE, *recall_rows.TOWNS, "0123456789"]
    made = train_tokenizer([TEXT, " ".join(words)], 400)
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def source(tokenizer):
    return make_source("llama", torch.float32, vocab_size=len(tokenizer))


@pytest.fixture
def evidence(source, tokenizer) -> Evidence:
    made = contenders(source, {}, S)
    return Evidence(made, tokenizer, SIZES, WINDOW, torch.float32, lambda: TEXTS)


def test_contenders_have_our_window_our_keys_or_our_bytes(source) -> None:
    made = contenders(source, {}, S)
    ours = made[UNTRAINED].make()
    names, slots = list(made), ours.config.num_memory_slots
    assert names[:3] == [FULL, f"window of {WINDOW} and sink", f"window of {WINDOW + slots} and sink, our keys"]
    assert names[4:] == [*EVICTED.values(), UNTRAINED]
    for name, length in ((names[1], WINDOW), (names[2], WINDOW + slots)):
        window = made[name].make()
        assert window.config.window_length == length and window.config.use_attention_sink
    equal = made[names[3]].make()
    per_segment = state_bytes(equal, 1, 1000) / (equal.config.window_length // 2 * 3)
    assert abs(state_bytes(equal, 1, 1000) - state_bytes(ours, 1, 1000)) <= 4 * per_segment


def test_a_model_with_other_bytes_has_a_window_of_its_own(source, tmp_path) -> None:
    names = {"same": 2 * S, "larger": 4 * S, "as large": 4 * S}
    for name, slots in names.items():
        add_memory(source, segment_length=S, num_memory_slots=slots).save_pretrained(tmp_path / name)
    made = contenders(source, [f"{name}={tmp_path / name}" for name in names], S)
    plain = contenders(source, [], S)
    (extra,) = [name for name in made if name not in (*plain, *names)]
    assert extra.endswith("bytes of larger") and list(made)[-4:] == [UNTRAINED, *names]
    window, larger = made[extra].make(), made["larger"].make()
    assert state_bytes(larger, 1, 1000) <= state_bytes(window, 1, 1000) < 1.05 * state_bytes(larger, 1, 1000)


def test_a_window_with_sink_is_a_conversion_whose_memory_is_emptied(source) -> None:
    model, ids = add_memory(source, segment_length=S), tiny_ids(2, 4 * WINDOW)
    bits = stream_bits(model, ids, {"empty": empty_memories})
    torch.testing.assert_close(token_bits(window_with_sink(source, S), ids), bits["empty"], rtol=0, atol=1e-4)
    assert not torch.allclose(bits["own"], bits["empty"], rtol=0, atol=1e-2)


def test_text_lines_are_sums_of_bits_and_bytes(evidence, source) -> None:
    (line,) = text_lines(source, evidence, "novels")
    cut = evidence.tokenizer(TEXTS["code"][:2], add_special_tokens=False)["input_ids"]
    ids = torch.tensor([row[:256] for row in cut])
    bits = token_bits(source, ids).double()
    edges = line["edges"]
    assert edges[:3] == [0, WINDOW, 2 * WINDOW] and edges[-1] == 256
    expected = [bits[:, max(start, 1) - 1 : end - 1].sum(1) for start, end in itertools.pairwise(edges)]
    torch.testing.assert_close(torch.tensor(line["bits"]).double(), torch.stack(expected, 1), rtol=1e-5, atol=0)
    read = evidence.tokenizer.decode(ids[0, edges[-2] : edges[-1]])
    assert line["bytes"][0][-1] == len(read.encode())


def test_facts_stand_where_they_are_said_to_stand(tokenizer) -> None:
    """None of their sentences is one that a memory is taught with."""
    window = 512
    for distance in (2, 4):
        row = recall_row(TEXT, tokenizer, distance, window, random.Random(1))
        again = recall_row(TEXT, tokenizer, distance, window, random.Random(1))
        assert torch.equal(row.prose, again.prose)
        text = tokenizer.decode(row.prose)
        near = tokenizer.decode(row.prose[-(distance - 1) * window :])
        far = tokenizer.decode(row.prose[-distance * window :])
        assert [question.kind for question in row.questions] == [NEEDLE, CHANGED, *[CODE] * NUM_CODES]
        for kind, question, answer in row.questions:
            said = tokenizer.decode(answer).strip()
            assert said in text and said in far and said not in near
            assert tokenizer.decode(question).startswith("\n\nQuestion: ") and kind in recall_rows.TOLD
        changed = tokenizer.decode(row.questions[1].answer).strip()
        assert CHANGE.format(changed) in text
        assert text.index("A ticket for the evening") < text.index("Everything is dearer")
    forms = [*facts.TOLD, *facts.TOLD_AGAIN, *facts.ASKED, *facts.NEWS, *(part for pair in facts.FREE for part in pair)]
    words = {word for form in recall_rows.TOLD.values() for word in form.split() if len(word) > 6}
    assert not any(word in form for word in words for form in forms)


def test_an_answer_counts_as_one_forward_pass_says(evidence, source) -> None:
    """Of a source that sees all, in one call; a right answer is one whose tokens are all the likeliest."""
    (line,) = recall_lines(source, evidence, 2)
    rng = random.Random(2)
    rows = [recall_row("\n\n".join(TEXTS["plays"]), evidence.tokenizer, 2, WINDOW, rng) for _ in range(4)]
    found = {kind: iter(row for answers in line["answers"][kind] for row in answers) for kind in line["answers"]}
    for row in rows:
        for kind, question, answer in row.questions:
            ids = torch.cat([row.prose, question, answer])[None]
            with torch.no_grad():
                logits = source(ids).logits[0, -len(answer) - 1 : -1]
            logs = logits.log_softmax(-1).gather(1, answer[:, None]).mean().item()
            right, log = next(found[kind])
            assert log == pytest.approx(logs, abs=1e-4) and right == logits.argmax(-1).equal(answer)
    assert all(next(rest, None) is None for rest in found.values())


def test_a_model_that_knows_is_right_and_an_emptied_memory_is_another(evidence) -> None:
    model = evidence.contenders[UNTRAINED].make()
    own, emptied = recall_lines(model, evidence, 3)
    assert (own["memory"], emptied["memory"]) == ("own", "emptied")
    assert own["answers"] != emptied["answers"]

    class Knows(type(model)):
        """Says what comes next."""

        def forward(self, input_ids=None, **kwargs):
            outputs = super().forward(input_ids=input_ids, **kwargs)
            keep = kwargs["logits_to_keep"]
            known = torch.cat([input_ids[0, 1:], input_ids[0, :1]])[-keep:]
            if keep > 1:
                known[-1] = self.last
            outputs.logits = torch.nn.functional.one_hot(known, self.config.vocab_size).float()[None]
            return outputs

    model.__class__ = Knows
    model.last = 5
    own, _ = recall_lines(model, evidence, 2)
    rng = random.Random(2)
    rows = [recall_row("\n\n".join(TEXTS["plays"]), evidence.tokenizer, 2, WINDOW, rng) for _ in range(4)]
    expected = [[bool(question.answer[-1] == 5) for question in row.questions if question.kind == CODE] for row in rows]
    assert [[right for right, _ in row] for row in own["answers"][CODE]] == expected


def test_a_new_conversion_answers_as_its_source(evidence, monkeypatch) -> None:
    monkeypatch.setattr(retrofit, "chat_openings", lambda count: ["calm"] * count)
    monkeypatch.setattr(retrofit, "ANSWER_TOKENS", 6)
    model = evidence.contenders[UNTRAINED].make()
    (line,) = chat_lines(model, evidence, None)
    assert len(line["alike"]) == 3 and all(alike == length > 0 for alike, length in line["alike"])
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.roll(1, 0))
    (line,) = chat_lines(model, evidence, None)
    assert all(alike == 0 < length for alike, length in line["alike"])


def test_costs_are_of_the_position(evidence) -> None:
    for name in (UNTRAINED, FULL):
        model = evidence.contenders[name].make()
        (line,) = cost_lines(model, evidence, 40)
        assert line["ms"] > 0 and line["prompt_seconds"] > 0
        assert line["state_bytes"] == state_bytes(model, 1, 40)


def test_units_are_what_a_table_asks_for(evidence) -> None:
    names = {table: {unit.contender for unit in units(evidence, [table])} for table in retrofit.TABLES}
    assert names["text"] == names["recall"] == set(evidence.contenders)
    assert names["ablation"] == {UNTRAINED} and names["chat"] == set() and names["cost"] == {UNTRAINED, FULL}
    assert not {FULL, *EVICTED.values()} & names["stream"]
    assert {unit.part for unit in units(evidence, ["recall"])} == {2, 3}
    assert Unit("cost", FULL, 65_536) not in units(evidence, ["cost"])


def test_what_is_measured_once_is_not_measured_again(source, tokenizer, tmp_path, monkeypatch) -> None:
    """The command line on folders: two tables of two contenders, then only what is missing."""
    monkeypatch.setattr(retrofit, "held_out_documents", lambda root: TEXTS)
    calibrated = add_memory(source, segment_length=S, num_lasting_slots=S)
    for name, part in (("source", source), ("calibrated", calibrated)):
        part.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    command = [str(tmp_path / "source"), f"fitted={tmp_path / 'calibrated'}", "--output-dir", str(tmp_path / "out")]
    command += ["--segment-length", str(S), "--documents", "2", "--document-tokens", "256", "--windows", "2"]
    command += ["--recall-tokens", "64", "--kinds", "plays", "chats"]
    main([*command, "--tables", "text", "--contenders", "full", "window of 16"])
    file = tmp_path / "out/lines.jsonl"
    first = file.read_text("utf-8")
    main([*command, "--tables", "text", "recall", "ablation"])
    assert file.read_text("utf-8").startswith(first)
    lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    found = {(line["table"], line["contender"], line["part"]) for line in lines}
    assert {("text", "fitted", "chats"), ("recall", "fitted", 2), ("ablation", "fitted", None)} <= found
    assert [line["settings"]["weights"] != "" for line in lines] == [line["contender"] == "fitted" for line in lines]
    text = (tmp_path / "out/tables.md").read_text("utf-8")
    assert "Plays, by position" in text and "of another document" in text
    assert "| fitted, memory emptied |" in text and "needle: windows back | 2 |" in text
    assert (tmp_path / "out/retrofit.png").stat().st_size > 10_000
    monkeypatch.setattr(retrofit, "TABLES", dict.fromkeys(retrofit.TABLES))  # nothing is measured again
    main([*command, "--tables", "text", "recall", "ablation"])
    assert (tmp_path / "out/tables.md").read_text("utf-8") == text


def test_a_cut_leaves_all_or_none_of_a_unit(evidence, tmp_path, monkeypatch) -> None:
    file = tmp_path / "lines.jsonl"

    def lines(model, evidence: Evidence, part: str):
        yield from text_lines(model, evidence, part)
        if part == "novels":
            raise KeyboardInterrupt

    monkeypatch.setitem(retrofit.TABLES, "text", lines)
    chosen = [Unit("text", FULL, "plays"), Unit("text", FULL, "novels")]
    with pytest.raises(KeyboardInterrupt):
        measure(evidence, file, chosen)
    (found,) = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert found["part"] == "plays" and list(tmp_path.iterdir()) == [file]


def test_the_share_of_the_gap_is_what_it_is(tmp_path) -> None:
    def line(name: str, bits: float) -> dict:
        parts = {"edges": [0, 16, 32], "bits": [[9.0, bits], [9.0, bits]], "bytes": [[10.0, 10.0], [10.0, 10.0]]}
        fixed = {"table": "text", "part": "plays", "environment": {"commit": "x"}, "settings": {"dtype": "y"}}
        return {"contender": name, **fixed, **parts}

    lines = [line(FULL, 20.0), line("window of 16 and sink", 40.0), line(UNTRAINED, 25.0)]
    assert closed({each["contender"]: each for each in lines}, UNTRAINED) == "0.75"
    text = tables(lines)
    assert "| untrained | 2.5000 ± 0.0000 (0.75) |" in text and "full attention -0.5000 ± 0.0000" in text
    write_retrofit_report(tmp_path / "none.jsonl", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_models_are_read_in_the_dtype_that_is_asked_for(source, tokenizer, tmp_path, monkeypatch, dtype) -> None:
    found = []

    def lines(model, evidence: Evidence, part: int):
        found.append((model.dtype, evidence.dtype))
        yield {"prompt_seconds": 1.0, "ms": 1.0, "state_bytes": 1}

    monkeypatch.setitem(retrofit.TABLES, "cost", lines)
    for part in (source, tokenizer):
        part.save_pretrained(tmp_path / "source")
    assert AutoTokenizer.from_pretrained(tmp_path / "source")
    where = [str(tmp_path / "source"), "--output-dir", str(tmp_path / "out"), "--segment-length", str(S)]
    main([*where, "--tables", "cost", "--positions", "40", "--dtype", dtype])
    assert found == [(getattr(torch, dtype),) * 2] * 2
    line = json.loads((tmp_path / "out/lines.jsonl").read_text("utf-8").splitlines()[0])
    assert line["settings"]["dtype"] == dtype
