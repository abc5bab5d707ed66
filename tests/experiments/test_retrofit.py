"""How a converted model is judged: contenders, bits, recall, chats and costs by hand; lines, tables and plot."""

import json

import pytest
import torch

from experiments import retrofit
from experiments.baselines import state_bytes
from experiments.code_rows import ask_all, code_stories
from experiments.retrofit import (
    EMPTIED,
    FULL,
    OURS,
    PASSED_ON,
    Evidence,
    Sizes,
    chat_lines,
    contenders,
    cost_lines,
    main,
    measure,
    recall,
    recall_rows,
    sliding_window,
    text_lines,
    tokens_of_equal_state,
    units,
    window_with_sink,
)
from experiments.retrofit_report import recovered, tables, write_retrofit_report
from experiments.stories import read_background
from helpers import FIELDS, WINDOW, S, make_source, tiny_ids
from rmt_hf import RMTForCausalLM
from rmt_hf.conversion import add_memory
from rmt_hf.data import IGNORED, train_tokenizer
from rmt_hf.evaluation import token_bits
from rmt_hf.evaluation.ablation import empty_memories, stream_bits


TEXT = "The sea was calm. A boat lay still? Nobody spoke! The evening came and went, and so did we. " * 60
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer():
    made = train_tokenizer([TEXT, "secret code of 0123456789"], 300)
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def evidence(tokenizer) -> Evidence:
    source = make_source("llama", torch.float32, vocab_size=len(tokenizer))
    model = add_memory(source, use_local_attention=False, **FIELDS)
    return Evidence(model, source, tokenizer, Sizes(decode_at=40, prompts=3))


def test_a_sliding_window_is_the_source_until_it_is_full():
    source, ids = make_source("llama", torch.float32), tiny_ids(2, 2 * WINDOW)
    window = sliding_window(source, WINDOW)
    with torch.no_grad():
        ours, theirs = window(ids).logits, source(ids).logits
    torch.testing.assert_close(ours[:, :WINDOW], theirs[:, :WINDOW], rtol=0, atol=1e-4)
    assert not torch.allclose(ours[:, WINDOW + 2 :], theirs[:, WINDOW + 2 :], rtol=0, atol=1e-2)
    with pytest.raises(ValueError, match="tensors of Mistral"):
        sliding_window(make_source("llama with biases"), WINDOW)


def test_contenders_have_our_window_or_our_state(evidence):
    model, source = evidence.model, evidence.source
    equal, ours = tokens_of_equal_state(model), state_bytes(model, 1, WINDOW)
    names = list(contenders(model, source))
    assert names[:3] == [OURS, FULL, f"sliding window of {WINDOW}"]
    assert names[3] == f"sliding window of {equal}, our state bytes"
    theirs = state_bytes(sliding_window(source, equal + 1), 1, 4 * equal)  # a window sees itself: one less is kept
    assert 0 <= theirs - ours < theirs / equal
    one_segment = add_memory(source, use_local_attention=False, num_lookback_segments=0, **FIELDS)
    assert list(contenders(one_segment, source))[4] == f"window of {S} and sink"
    keys = WINDOW + model.config.num_memory_slots
    assert names[5] == f"window of {keys} and sink, our keys"
    with_sink = window_with_sink(source, equal // 3)
    assert names[6].startswith(f"window of {with_sink.config.window_length} and sink")
    assert abs(state_bytes(with_sink, 1, 4 * equal) - ours) <= 3 * theirs / equal


def test_a_window_with_sink_is_a_conversion_whose_memory_is_emptied(evidence):
    ids = tiny_ids(2, 4 * WINDOW)
    made = contenders(evidence.model, evidence.source)[f"window of {WINDOW} and sink"]()
    assert made.config.use_attention_sink and not made.config.num_memory_slots
    bits = stream_bits(evidence.model, ids, {"empty": empty_memories})
    torch.testing.assert_close(token_bits(made, ids), bits["empty"], rtol=0, atol=1e-4)
    assert not torch.allclose(bits["own"], bits["empty"], rtol=0, atol=1e-2)


def test_text_lines_are_sums_of_bits_and_bytes(evidence):
    ids, edges = tiny_ids(3, 40), [0, 16, 40]
    (line,) = text_lines("text", FULL, evidence, ids, edges)
    bits = token_bits(evidence.source, ids).double()
    expected = torch.stack([bits[:, :15].sum(1), bits[:, 15:].sum(1)], 1)
    torch.testing.assert_close(torch.tensor(line["bits"], dtype=torch.float64), expected, rtol=1e-6, atol=0)
    tokens = [len(evidence.tokenizer.convert_ids_to_tokens([i])[0]) if i else 0 for i in ids[0, 16:].tolist()]
    assert line["bytes"][0][1] == sum(tokens)
    lines = {line["contender"]: line for line in text_lines("text", OURS, evidence, ids, edges)}
    assert set(lines) == {OURS, EMPTIED, PASSED_ON}
    within, beyond = zip(
        *([[each[i] for each in line["bits"]] for i in (0, 1)] for line in lines.values()), strict=True
    )
    assert all(each == within[0] for each in within)  # memory counts for nothing, and then it does
    assert len({tuple(each) for each in beyond}) == 3
    alone = [line["contender"] for line in text_lines("stream", OURS, evidence, ids[:1], edges)]
    assert alone == [OURS, EMPTIED]


def test_facts_stand_where_they_are_said_to_stand(tokenizer):
    background = read_background(TEXT, tokenizer)
    rows = recall_rows(background, 4, 2, 256, 3)
    again = recall_rows(background, 4, 2, 256, 3)
    assert [row.input_ids.tolist() for row in rows] == [row.input_ids.tolist() for row in again]
    for row in rows:
        ids = row.input_ids[0].tolist()
        told = tokenizer.decode(ids).partition("\nQuestion: ")[0]
        first = len(tokenizer.encode(told, add_special_tokens=False))
        assert len(row.answers) == 4 and tokenizer.decode(ids).count("Answer: ") == 5
        assert "secret code of" in tokenizer.decode(ids[first - 512 : first - 256])
        assert not any(
            "secret code of" in tokenizer.decode(part) for part in (ids[: first - 514], ids[first - 254 : first])
        )
        for positions in row.answers:
            code = tokenizer.decode([ids[position] for position in positions]).strip()
            assert len(code) == 4 and code in told


def test_recall_is_what_the_likeliest_tokens_say(evidence, tokenizer):
    background = read_background(TEXT, tokenizer)
    (row,) = recall_rows(background, 4, 2, 128, 1)
    model, wanted = evidence.source, row.input_ids[0]
    with torch.no_grad():
        said = model(row.input_ids).logits[0].argmax(-1)
    expected = [all(said[position - 1] == wanted[position] for position in positions) for positions in row.answers]
    assert recall(model, row, call_length=50) == [expected]

    class Knows(type(model)):
        """Says what comes next, but for one token."""

        def forward(self, input_ids=None, **kwargs):
            outputs = super().forward(input_ids=input_ids, **kwargs)
            end = outputs.past_key_values.get_seq_length()
            known = row.input_ids[0, end - input_ids.shape[1] + 1 : end + 1].clone()
            wrong = row.answers[2][1] - (end - input_ids.shape[1] + 1)
            if 0 <= wrong < len(known):
                known[wrong] += 1
            logits = torch.nn.functional.one_hot(known, self.config.vocab_size).float()[None]
            outputs.logits = logits[:, -kwargs["logits_to_keep"] :]
            return outputs

    model.__class__ = Knows
    assert recall(model, row, call_length=50) == [[True, True, False, True]]


def test_an_emptied_memory_is_emptied_before_the_question(evidence, tokenizer):
    (row,) = recall_rows(read_background(TEXT, tokenizer), 1, 2, 128, 1)
    found = []

    def ablation(state) -> None:
        empty_memories(state)
        found.append(state.positions[0])

    hits = recall(evidence.model, row, [None, ablation, None])
    assert found == [row.answers[0][0] - 32] and hits[0] == hits[2]


def test_questions_are_answered_in_their_row(tokenizer):
    import random

    rng = random.Random(0)
    row = ask_all(code_stories(3, rng), read_background(TEXT, tokenizer), 500, (100, 200), rng)
    assert len(row["input_ids"]) == len(row["labels"]) == 500
    assert all(label in (IGNORED, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))


def test_a_new_conversion_answers_as_its_source(evidence, monkeypatch):
    monkeypatch.setattr(retrofit, "chat_openings", lambda count: ["calm"] * count)
    monkeypatch.setattr(retrofit, "ANSWER_TOKENS", 6)
    (line,) = chat_lines(OURS, evidence)
    assert line["same"] == [True] * 3
    with torch.no_grad():
        evidence.model.lm_head.weight.data = evidence.model.lm_head.weight.data.roll(1, 0)
    (line,) = chat_lines(OURS, evidence)
    assert line["same"] == [False] * 3


def test_costs_are_of_the_position(evidence):
    lines = {name: next(cost_lines(name, evidence)) for name in (OURS, FULL)}
    assert all(line["ms"] > 0 and line["position"] == 40 for line in lines.values())
    assert lines[OURS]["state_bytes"] == state_bytes(evidence.model, 1, 40)
    assert lines[FULL]["state_bytes"] == 40 * state_bytes(evidence.source, 1, 1)


def test_what_is_measured_once_is_not_measured_again(evidence, tmp_path, monkeypatch, tokenizer):
    """The command line on folders: text and recall of two contenders, then only what is missing."""
    monkeypatch.setattr(retrofit, "shakespeare", lambda count=None: (None, {"text": [TEXT, TEXT[40:]]}))
    monkeypatch.setattr(retrofit, "tokenize", lambda rows, by: by(rows["text"]))
    longer = {"segment_length": 64, "chunk_length": 8, "num_memory_slots": 16}  # a window that holds the facts
    model = add_memory(evidence.source, num_slots_per_chunk=1, **longer)
    for name, part in (("source", evidence.source), ("model", model)):
        part.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    sizes = ["--documents", "2", "--document-tokens", "200", "--windows", "4", "8", "--recall-rows", "2"]
    command = [str(tmp_path / "source"), str(tmp_path / "model"), "--output-dir", str(tmp_path / "out"), *sizes]
    main([*command, "--tables", "text", "--contenders", "full"])
    main([*command, "--tables", "text", "recall", "--contenders", "full", "ours"])
    lines = [json.loads(line) for line in (tmp_path / "out/lines.jsonl").read_text("utf-8").splitlines()]
    found = [(line["table"], line["contender"]) for line in lines]
    assert found == [
        *[("text", FULL), ("text", OURS), ("text", EMPTIED), ("text", PASSED_ON)],
        *[("recall", name) for name in (OURS, EMPTIED, OURS, EMPTIED, FULL, FULL)],
    ]
    assert all(line["settings"]["dtype"] == "float32" for line in lines)
    text = (tmp_path / "out/tables.md").read_text("utf-8")
    assert "| ours | " in text and "key/value: windows back | 4 | 8 |" in text
    assert (tmp_path / "out/retrofit.png").stat().st_size > 10_000

    # Another model, or more of a text, is measured anew, and is what the table shows.
    add_memory(evidence.source, num_slots_per_chunk=2, **longer).save_pretrained(tmp_path / "model")
    for more in (["--contenders", "ours"], ["--contenders", "ours", "full", "--document-tokens", "150"]):
        main([*command, "--tables", "text", *more])
    again = [json.loads(line) for line in (tmp_path / "out/lines.jsonl").read_text("utf-8").splitlines()]
    assert again[: len(lines)] == lines
    found = [(line["contender"], line["edges"][-1]) for line in again[len(lines) :]]
    assert found == [(name, 200) for name in (OURS, EMPTIED, PASSED_ON)] + [
        (name, 150) for name in (OURS, EMPTIED, PASSED_ON, FULL)
    ]
    assert "| 128–150 |" in (tmp_path / "out/tables.md").read_text("utf-8")


def test_a_cut_leaves_all_or_none_of_a_unit(evidence, tmp_path, monkeypatch) -> None:
    file, ids = tmp_path / "lines.jsonl", tiny_ids(2, 40)

    def lines(name: str, evidence: Evidence):
        yield from text_lines("text", name, evidence, ids, [0, 16, 40])
        if name == FULL:
            raise KeyboardInterrupt

    monkeypatch.setitem(retrofit.TABLES, "text", lines)
    chosen = units(evidence, ["text"])[:2]
    with pytest.raises(KeyboardInterrupt):
        measure(evidence, file, chosen)
    found = [json.loads(line)["contender"] for line in file.read_text("utf-8").splitlines()]
    assert found == [OURS, EMPTIED, PASSED_ON] and list(tmp_path.iterdir()) == [file]


def test_units_are_what_a_table_asks_for(evidence):
    names = {table: [unit.contender for unit in units(evidence, [table])] for table in retrofit.TABLES}
    assert names["chat"] == [OURS] and names["cost"] == [OURS, FULL]
    assert FULL not in names["stream"] and set(names["stream"]) | {FULL} == set(names["text"]) == set(names["recall"])
    distances = [unit.distance for unit in units(evidence, ["recall"]) if unit.contender == OURS]
    assert distances == [2, 4, 8, 16, 32]


def test_the_share_of_the_gap_is_what_it_is(tmp_path):
    def line(name: str, bits: float) -> dict:
        parts = {"edges": [0, 16, 32], "bits": [[9.0, bits], [9.0, bits]], "bytes": [[10.0, 10.0], [10.0, 10.0]]}
        return {"table": "text", "contender": name, "environment": {"commit": "x"}, "settings": {"dtype": "y"}, **parts}

    lines = [line(OURS, 25.0), line(FULL, 20.0), line("a window", 40.0)]
    assert "a window 0.75 of 2.0000" in recovered({each["contender"]: each for each in lines})
    text = tables(lines)
    assert "a window 1.5000 ± 0.0000" in text and "full attention -0.5000 ± 0.0000" in text
    write_retrofit_report(tmp_path / "none.jsonl", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_models_are_read_in_the_dtype_that_is_asked_for(evidence, tmp_path, monkeypatch, tokenizer, dtype) -> None:
    assert isinstance(evidence.model, RMTForCausalLM) and evidence.window == 2 * S
    found = []

    def lines(name: str, evidence: Evidence):
        found.append((evidence.model.dtype, evidence.source.dtype))
        yield {"table": "cost", "contender": name, "position": 1, "ms": 1.0, "state_bytes": 1}

    monkeypatch.setitem(retrofit.TABLES, "cost", lines)
    for name, part in (("source", evidence.source), ("model", evidence.model)):
        part.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    folders = [str(tmp_path / "source"), str(tmp_path / "model"), "--output-dir", str(tmp_path / "out")]
    main([*folders, "--tables", "cost", "--dtype", dtype])
    assert found == [(getattr(torch, dtype),) * 2] * 2
    line = json.loads((tmp_path / "out/lines.jsonl").read_text("utf-8").splitlines()[0])
    assert line["settings"]["dtype"] == dtype
