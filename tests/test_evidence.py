"""The grid of evidence: equal sizes, labels that are right, runs that are not done twice, a table of what there is."""

import json

import pytest
import torch

from rmt_hf import evidence, recall
from rmt_hf.evidence_report import differences, mean_and_error, read_runs
from rmt_hf.peers import num_parameters


TINY = ["--recall-steps", "2", "--text-tokens", "64", "--row-length", "32", "--document-tokens", "96", "--threads", "1"]


@pytest.mark.parametrize("distance", [None, 2, 8])
def test_labels_of_recall_are_the_facts_beyond_the_window(distance):
    batch = evidence.recall_batch(16, 12, torch.Generator().manual_seed(0), distance)
    segment = evidence.RECALL_SEGMENT
    for ids, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
        known, fact_segments, asked = {}, set(), 0
        for place, token in enumerate(ids):
            if recall.FIRST_FACT <= token < recall.FIRST_NOISE:
                key, value = divmod(token - recall.FIRST_FACT, recall.NUM_VALUES)
                assert key not in known
                known[key] = value
                fact_segments.add(place // segment)
            elif recall.FIRST_QUESTION <= token < recall.FIRST_FACT:
                asked += 1
                assert labels[place + 1] == known[token - recall.FIRST_QUESTION]
                distances = place // segment - max(fact_segments)
                assert distances >= 2 if distance is None else distances == distance
        assert len(known) == recall.NUM_FACTS and len(fact_segments) == 1 and asked > 0
        assert sum(label != -100 for label in labels) == asked


@pytest.mark.parametrize("base", [evidence.recall_config(), evidence.text_config(1024, 0)])
@pytest.mark.parametrize("name", [name for name, row in evidence.ROWS.items() if row.peer is None])
def test_forms_have_one_size_and_one_state(name, base):
    model = evidence.build(evidence.ROWS[name], base, 0)
    wanted = num_parameters(evidence.build(evidence.ROWS["default"], base, 0)).non_embedding
    shared = base.num_hidden_layers * base.hidden_size**2 if name == "shared query" else 0
    assert abs(num_parameters(model).non_embedding + shared - wanted) < 0.01 * wanted
    columns = (model.config.num_lookback_segments + 2) * model.config.segment_length
    if name != "no memory":
        assert columns + 2 * model.config.num_memory_slots == 3 * base.segment_length + 2 * base.num_memory_slots


def test_a_finished_run_is_not_done_again_and_the_table_shows_it(tmp_path, capsys):
    arguments = ["--output-dir", str(tmp_path), "--rows", "reference", "Llama", "--seeds", "0", *TINY]
    evidence.main(arguments)
    lines = (tmp_path / "runs.jsonl").read_text("utf-8").splitlines()
    assert len(lines) == 4  # two rows, two tasks
    assert {"own", "empty", "other"} == set(json.loads(lines[2])["bits_per_byte"])
    evidence.main(arguments)
    assert (tmp_path / "runs.jsonl").read_text("utf-8").splitlines() == lines
    table = (tmp_path / "table.md").read_text("utf-8")
    assert "|reference|1|" in table and "|Llama|1|" in table
    assert (tmp_path / "evidence.png").stat().st_size > 0
    rows = read_runs(tmp_path / "runs.jsonl")["recall"]
    expected = rows["Llama"][0]["accuracy_8"] - rows["reference"][0]["accuracy_8"]
    assert differences("recall", rows, "Llama") == [expected]


def test_mean_and_standard_error_over_seeds():
    assert mean_and_error([]) == ""
    assert mean_and_error([0.5]) == "0.5000"
    assert mean_and_error([1.0, 2.0, 3.0]) == "2.0000 ± 0.5774"


def test_the_stretch_of_the_gate_is_that_of_the_row_while_it_runs(tmp_path, monkeypatch):
    before, seen = evidence.memory_rmt.GATE_STRETCH, []

    def run_recall(*_) -> dict:
        seen.append(evidence.memory_rmt.GATE_STRETCH)
        return {"train_seconds": 0.0, "accuracy_8": 0.0, "accuracy_64": 0.0}

    monkeypatch.setattr(evidence, "run_recall", run_recall)
    rows = ["plain sigmoid gate", "default"]
    evidence.main(["--output-dir", str(tmp_path), "--tasks", "recall", "--rows", *rows, "--seeds", "0", *TINY])
    assert seen == [0.0, before]
    assert evidence.memory_rmt.GATE_STRETCH == before > 0


def test_a_peer_in_our_time_reads_its_share_of_text_alone_and_rows_come_in_order(tmp_path):
    rows = ["memory tokens, our time", "default"]
    arguments = [*TINY, "--text-tokens", "320"]
    evidence.main(["--output-dir", str(tmp_path), "--rows", rows[0], "--seeds", "0", *arguments])
    evidence.main(["--output-dir", str(tmp_path), "--rows", rows[1], "--seeds", "0", *arguments])
    runs = read_runs(tmp_path / "runs.jsonl", list(evidence.ROWS))
    assert list(runs["text"]) == rows[::-1] and list(runs["recall"]) == ["default"]
    tokens = [runs["text"][name][0]["train_tokens"] for name in rows]
    assert tokens == [round(0.4 * 320 / 32) * 32, 320]


def test_gates_and_a_shared_query_are_what_they_say():
    base = evidence.recall_config()
    gates = {"default": (-1, [0, -2]), "reference": (1, [0, 0]), "closed fusion gate": (1, [-2, -2])}
    for name, (memory, fusion) in (gates | {"keeping gate": (-1, [0, 0])}).items():
        (layer,) = evidence.build(evidence.ROWS[name], base, 0).model.layers
        assert (layer.self_attn.memory.gate_bias == memory).all()
        assert layer.self_attn.fusion.gate.bias.tolist() == base.num_attention_heads * fusion
    (layer,) = evidence.build(evidence.ROWS["shared query"], base, 0).model.layers
    assert layer.self_attn.memory_q_proj is layer.self_attn.q_proj
