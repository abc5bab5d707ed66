"""The grid of evidence: equal sizes, labels that are right, runs that are not done twice, a table of what there is."""

import json

import pytest
import torch

from experiments import evidence, one_token_facts
from experiments.baselines import num_parameters
from experiments.corpora import shakespeare
from experiments.evidence_report import differences, mean_and_error, read_runs
from rmt_hf.modeling_rmt import FADE, GATE_BIAS, GATE_SCALE


TINY = ["--recall-steps", "2", "--text-tokens", "64", "--row-length", "32", "--document-tokens", "96", "--threads", "1"]


@pytest.mark.parametrize("distance", [None, 2, 8])
def test_labels_of_recall_are_the_facts_beyond_the_window(distance):
    batch = evidence.recall_batch(16, 12, torch.Generator().manual_seed(0), distance)
    segment = evidence.RECALL_SEGMENT
    for ids, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
        known, fact_segments, asked = {}, set(), 0
        for index, token in enumerate(ids):
            if one_token_facts.FIRST_FACT <= token < one_token_facts.FIRST_NOISE:
                key, value = divmod(token - one_token_facts.FIRST_FACT, one_token_facts.NUM_VALUES)
                assert key not in known
                known[key] = value
                fact_segments.add(index // segment)
            elif one_token_facts.FIRST_QUESTION <= token < one_token_facts.FIRST_FACT:
                asked += 1
                assert labels[index + 1] == known[token - one_token_facts.FIRST_QUESTION]
                distances = index // segment - max(fact_segments)
                assert distances >= 2 if distance is None else distances == distance
        assert len(known) == one_token_facts.NUM_FACTS and len(fact_segments) == 1 and asked > 0
        assert sum(label != -100 for label in labels) == asked


BASES = [evidence.recall_config(), evidence.text_config(1024, 0)]


@pytest.mark.parametrize("base", BASES, ids=["recall", "text"])
@pytest.mark.parametrize("name", [name for name, row in evidence.ROWS.items() if row.baseline is None])
def test_forms_have_one_size_and_one_state(name, base):
    row = evidence.ROWS[name]
    if row.is_for_text_alone and base.segment_length == evidence.RECALL_SEGMENT:
        pytest.skip("a row of text alone")
    model = evidence.build(row, base, 0)
    wanted = num_parameters(evidence.build(evidence.ROWS["default"], base, 0)).non_embedding
    assert abs(num_parameters(model).non_embedding - wanted) < 0.01 * wanted
    config = model.config
    num_keys = (config.num_lookback_segments + 2) * config.segment_length + 2 * config.num_memory_slots
    if config.num_memory_slots:  # to a ring group of slots
        wanted = 3 * base.segment_length + 2 * base.num_memory_slots
        assert abs(num_keys - wanted) <= base.num_slots_per_segment


def test_every_row_differs_from_the_default_and_from_every_other():
    base = BASES[1]
    found = {}
    for name, row in evidence.ROWS.items():
        if row.baseline is None:
            model = evidence.build(row, base, 0)
            rings = [p.tolist() for n, p in model.named_parameters() if n.endswith(("gate_scale", "gate_bias", "fade"))]
            fields = {key: value for key, value in model.config.to_dict().items() if key != "intermediate_size"}
            found[name] = json.dumps([fields, rings])
    assert len(set(found.values())) == len(found)


@pytest.fixture
def two_plays(monkeypatch):
    """Training a tokenizer on all of them takes ten seconds."""
    monkeypatch.setattr(evidence, "shakespeare", lambda: shakespeare(2))


def test_a_finished_run_is_not_done_again_and_the_table_shows_it(tmp_path, two_plays):
    arguments = ["--output-dir", str(tmp_path), "--rows", "default", "Llama", "--seeds", "0", *TINY]
    evidence.main(arguments)
    lines = (tmp_path / "runs.jsonl").read_text("utf-8").splitlines()
    assert len(lines) == 4  # two rows, two tasks
    assert {"own", "empty", "other"} == set(json.loads(lines[2])["bits_per_byte"])
    evidence.main(arguments)
    assert (tmp_path / "runs.jsonl").read_text("utf-8").splitlines() == lines
    table = (tmp_path / "table.md").read_text("utf-8")
    assert "|default|1|" in table and "|Llama|1|" in table
    assert (tmp_path / "evidence.png").stat().st_size > 0
    rows = read_runs(tmp_path / "runs.jsonl")["recall"]
    expected = rows["Llama"][0]["accuracy_8"] - rows["default"][0]["accuracy_8"]
    assert differences("recall", rows, "Llama") == [expected]


def test_mean_and_standard_error_over_seeds():
    assert mean_and_error([]) == ""
    assert mean_and_error([0.5]) == "0.5000"
    assert mean_and_error([1.0, 2.0, 3.0]) == "2.0000 ± 0.5774"


def test_a_baseline_in_our_time_reads_its_share_of_text_alone_and_rows_come_in_order(tmp_path, two_plays):
    rows = ["memory tokens, our time", "default"]
    arguments = [*TINY, "--text-tokens", "320"]
    evidence.main(["--output-dir", str(tmp_path), "--rows", rows[0], "--seeds", "0", *arguments])
    evidence.main(["--output-dir", str(tmp_path), "--rows", rows[1], "--seeds", "0", *arguments])
    runs = read_runs(tmp_path / "runs.jsonl", list(evidence.ROWS))
    assert list(runs["text"]) == rows[::-1] and list(runs["recall"]) == ["default"]
    tokens = [runs["text"][name][0]["train_tokens"] for name in rows]
    assert tokens == [round(0.4 * 320 / 32) * 32, 320]


@pytest.mark.parametrize("base", BASES, ids=["recall", "text"])
def test_parts_groups_and_gates_are_what_they_say(base):
    slots = base.num_memory_slots
    is_text = base.segment_length != evidence.RECALL_SEGMENT
    rows = evidence.ROWS.items()
    forms = [name for name, row in rows if row.baseline is None and (is_text or not row.is_for_text_alone)]
    built = {name: evidence.build(evidence.ROWS[name], base, 0) for name in forms}
    sizes = {name: [part[0] for part in model.config.memory_parts] for name, model in built.items()}
    assert sizes["default"] == sizes["evidence alone"] == [slots]
    uses = {name: model.config.memory_parts[0][1:] for name, model in built.items() if model.config.num_memory_slots}
    assert uses["default"] == (True, False) and uses["evidence alone"] == (False, True)  # score, evidence
    assert sizes["two parts, halves"] == [slots // 2, slots // 2]
    for name, share in {"groups of a segment": 1, "groups of half a segment": 2}.items():
        if name not in built:
            continue
        assert built[name].config.num_slots_per_segment * share == base.segment_length
        assert built[name].config.chunk_length == base.chunk_length
    if is_text:
        assert sizes["two parts, a quarter lasting"] == [slots // 4, slots - slots // 4]
    begin = (GATE_SCALE, GATE_BIAS)
    gates = {"default": begin, "hard gates": (8.0, GATE_BIAS), "half-open gates": (GATE_SCALE, 0.0)}
    gates |= {"gate bias -3": (GATE_SCALE, -3.0), "evidence alone": (*begin, FADE)}
    gates |= {f"evidence alone, fade {fade}": (*begin, fade) for fade in (0.1, 0.4)}
    for name, wanted in gates.items():
        for layer in built[name].model.layers:
            (ring,) = layer.self_attn.memory.rings
            found = [each for each in (ring.gate_scale, ring.gate_bias, ring.fade) if each is not None]
            for parameter, value in zip(found, wanted, strict=True):
                assert (parameter == torch.tensor(value)).all()
