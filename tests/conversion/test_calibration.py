"""A score is fitted to the attention that tokens get once they have left the window; nothing else is changed."""

import re

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from helpers import FIELDS, SOURCES, WINDOW, S, make_source, tiny_ids, tiny_model, tiny_tokenizer
from rmt_hf import calibration
from rmt_hf.calibration import FLOOR, MEAN_WEIGHT, full_attention, later_attention
from rmt_hf.conversion import add_memory, calibrate, convert, main


LASTING = FIELDS | {"num_lasting_slots": 8, "use_local_attention": False}
LENGTH = 8 * WINDOW


def documents(count: int, length: int = LENGTH) -> list[torch.Tensor]:
    return list(tiny_ids(count, length))


@pytest.fixture
def small_blocks(monkeypatch) -> None:
    """Several blocks of queries in a tiny document, the last of them shorter."""
    monkeypatch.setattr(calibration, "BLOCK_LENGTH", 7)


@pytest.mark.parametrize("name", SOURCES)
def test_what_a_layer_attends_with_is_the_sources(name, small_blocks) -> None:
    """From hidden states and whole attention maps of the source, float64."""
    source = make_source(name, torch.float64)
    length = getattr(source.config, "sliding_window", None) or 45
    ids = tiny_ids(1, length)
    states = source(ids, output_hidden_states=True).hidden_states
    source.set_attn_implementation("eager")
    maps = source(ids, output_attentions=True).attentions
    model = add_memory(source, **LASTING)
    heads, groups = model.config.num_attention_heads, model.config.num_key_value_heads
    late = torch.ones(length, length, dtype=torch.bool).tril(-WINDOW - 1)
    with torch.no_grad():
        for index, (attention, hidden, query, key) in enumerate(full_attention(model, ids[0])):
            norm = model.model.layers[index].input_layernorm
            torch.testing.assert_close(hidden, norm(states[index])[0], rtol=0, atol=1e-10)
            by_group = maps[index][0].unflatten(0, (groups, heads // groups))
            found = later_attention(query, key, WINDOW, attention.scaling)
            # The softmax of the source's eager attention is in float32.
            torch.testing.assert_close(found, asked_for(by_group, late), rtol=0, atol=1e-5)
            least = (1 - MEAN_WEIGHT) * FLOOR
            assert found[-WINDOW - 1 :].eq(least).all() and found[: -WINDOW - 1].gt(least).all()
    assert index == model.config.num_hidden_layers - 1


def asked_for(by_group: torch.Tensor, late: torch.Tensor) -> torch.Tensor:
    """The target (T, G), of whole attention maps (G, H / G, T, T), by tokens that are late enough, (T, T) bool."""
    attention = by_group.masked_fill(~late, 0)
    mean = attention.sum((1, 2)) / (by_group.shape[1] * late.sum(0)).clamp_min(1)
    largest, mean = (each.T.log().clamp_min(FLOOR) for each in (attention.amax((1, 2)), mean))
    return largest - MEAN_WEIGHT * mean


@pytest.mark.parametrize("distance", [0, 1, 6, 7, 8, 20, 44, 45, 100])
def test_any_distance(distance, small_blocks) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(45, heads, 8, generator=generator, dtype=torch.float64) for heads in (6, 2))
    logits = torch.einsum("thd,shd->hts", query, key.repeat_interleave(3, 1))
    map_ = logits.masked_fill(torch.ones(45, 45, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    expected = asked_for(map_.unflatten(0, (2, 3)), torch.ones(45, 45, dtype=torch.bool).tril(-distance - 1))
    torch.testing.assert_close(later_attention(query, key, distance, 1.0), expected, rtol=0, atol=1e-10)


@pytest.fixture
def fit_of(monkeypatch):
    """Calibrates a model to a target that is a function of a layer's hidden state (T, E)."""

    def fit(model, ids: list[torch.Tensor], function) -> torch.Tensor:
        hidden_of = {}

        def walk(model, input_ids):
            for layer in full_attention(model, input_ids):
                hidden_of["now"] = layer[1]
                yield layer

        monkeypatch.setattr(calibration, "later_attention", lambda *_: function(hidden_of["now"]))
        monkeypatch.setattr(calibration, "full_attention", walk)
        return calibrate(model, ids, show_progress=False)

    return fit


def test_a_linear_target_is_recovered(fit_of, monkeypatch) -> None:
    """All of its variance is explained, and the mean score of what was fitted is 0."""
    model, ids = add_memory(make_source("llama", torch.float64), **LASTING), documents(3)
    planted = torch.randn(2, model.config.hidden_size, generator=torch.Generator().manual_seed(0)).double()
    monkeypatch.setattr(calibration, "RIDGE", 1e-12)
    monkeypatch.setattr(calibration, "LEAST_NEEDED", 0.0)
    shares = fit_of(model, ids, lambda hidden: hidden @ planted.T - 5)
    assert shares.shape == (model.config.num_hidden_layers, 2)
    torch.testing.assert_close(shares, torch.ones_like(shares), rtol=0, atol=1e-6)
    fitted = slice(calibration.SINK_LENGTH, -calibration.END_WINDOWS * WINDOW)
    for index, layer in enumerate(model.model.layers):
        score = layer.self_attn.memory.score_proj
        torch.testing.assert_close(score.weight, planted, rtol=0, atol=1e-6)
        scores = [score(list(full_attention(model, each))[index][1][fitted]) for each in ids]
        assert torch.cat(scores).mean(0).abs().max() < 1e-9


def test_how_little_the_lower_half_is_needed_is_no_matter(fit_of) -> None:
    ids, fitted = documents(2), slice(calibration.SINK_LENGTH, -calibration.END_WINDOWS * WINDOW)

    def target(hidden: torch.Tensor, factor: float) -> torch.Tensor:
        wanted = hidden[:, :2]
        middle = wanted[fitted].quantile(calibration.LEAST_NEEDED, 0, interpolation="higher")
        return torch.where(wanted < middle, middle + factor * (wanted - middle), wanted)

    weights = []
    for factor in (1.0, 30.0):
        model = add_memory(make_source("llama", torch.float64), **LASTING)
        fit_of(model, ids, lambda hidden, factor=factor: target(hidden, factor))
        weights.append(model.model.layers[0].self_attn.memory.score_proj.weight)
    torch.testing.assert_close(*weights, rtol=0, atol=1e-9)


def test_the_score_is_all_that_changes_and_it_is_kept(tmp_path) -> None:
    source, ids = make_source("llama", torch.float32), tiny_ids(2, 6 * WINDOW)
    model = add_memory(source, **LASTING)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shares = calibrate(model, documents(3), show_progress=False)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if ".score_proj." in name} != set()
    assert shares.gt(0).all() and shares.lt(1).all()
    inside = ids[:, :WINDOW]
    torch.testing.assert_close(model(inside).logits, source(inside).logits, rtol=0, atol=1e-4)
    assert not torch.allclose(model(ids).logits, add_memory(source, **LASTING)(ids).logits, atol=1e-3)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_tokens_with_the_best_scores_are_kept() -> None:
    """In the lasting part; a segment offers all of its tokens."""
    model, ids = add_memory(make_source("llama", torch.float64), **LASTING), tiny_ids(1, 5 * S)
    calibrate(model, documents(3), show_progress=False)
    state = model(ids, use_cache=True).past_key_values
    with torch.no_grad():
        scores = model.model.layers[0].self_attn.memory.scores(next(full_attention_of(model, ids)))
    scores = scores[1 : 4 * S - S]  # three segments have left the window; the sink stands for the first token
    best = scores.topk(8, 0).indices.sort(0).values + 1
    kept = state.layers[0].state.memory.positions[0, :8].sort(0).values
    agree = torch.tensor([len(set(best[:, g].tolist()) & set(kept[:, g].tolist())) for g in range(2)])
    assert agree.ge(6).all()  # gates of scale 8 mix slots of nearly equal strength


def full_attention_of(model, ids):
    return (layer[1] for layer in full_attention(model, ids[0]))


def test_one_text_needs_no_list() -> None:
    model, tokenizer = add_memory(make_source("llama"), **LASTING), tiny_tokenizer()
    prose = [" ".join(f"w{3 + number % 64}" for number in range(20_000))]
    shares = [calibrate(model, text, tokenizer, num_documents=2, show_progress=False) for text in (prose, prose[0])]
    assert torch.equal(*shares)


def test_what_cannot_be_calibrated_is_refused() -> None:
    source = make_source("llama")
    for model, message in (
        (add_memory(source, **FIELDS), "num_lasting_slots must be above 0 for a score to be fitted, got 0"),
        (add_memory(source, **FIELDS, memory_write="mean"), "num_lasting_slots must be above 0"),
        (add_memory(source, **FIELDS | {"num_memory_slots": 0}), "num_lasting_slots must be above 0"),
        (tiny_model(), "model must be from rmt_hf.conversion"),
        (source, "model must be from rmt_hf.conversion"),
        (torch.nn.Linear(1, 1), "must be a model of transformers"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            calibrate(model, documents(1))
    model = add_memory(source, **LASTING)
    with pytest.raises(ValueError, match="tokenizer must be given with texts"):
        calibrate(model, ["w3 w4"])
    with pytest.raises(ValueError, match="texts must have at least"):
        calibrate(model, ["w3 w4"], tiny_tokenizer())
    for texts in ([], documents(2, 3 * WINDOW)):
        with pytest.raises(ValueError, match=f"document of more than {3 * WINDOW + 4} tokens"):
            calibrate(model, texts)
    assert not any(parameter.any() for name, parameter in model.named_parameters() if ".score_proj." in name)


def config_of_default(tmp_path, text) -> tuple[int, int]:
    """Slots, and lasting ones, that `convert` gives where nothing but a segment length is said."""
    convert(tmp_path / "source", tmp_path / "default", texts=text, segment_length=8)
    config = AutoConfig.from_pretrained(tmp_path / "default")
    return config.num_memory_slots, config.num_lasting_slots


def test_from_the_command_line(tmp_path) -> None:
    """As many slots last as follow the present, or half of those that are given; other options are as they were."""
    pytest.importorskip("datasets", reason="texts are read with datasets")
    for part in (make_source("llama", torch.float32), tiny_tokenizer()):
        part.save_pretrained(tmp_path / "source")
    text = tmp_path / "prose.txt"
    text.write_text(" ".join(f"w{3 + number % 64}" for number in range(20_000)), "utf-8")
    where = [str(tmp_path / name) for name in ("source", "target")]
    main([*where, "--segment-length", "8", "--num-memory-slots", "32", "--calibrate", str(text)])
    model = AutoModelForCausalLM.from_pretrained(where[1])
    assert model.config.num_lasting_slots == 16
    assert config_of_default(tmp_path, text) == (32, 16)
    assert all(layer.self_attn.memory.score_proj.weight.any() for layer in model.model.layers)
    with pytest.raises(ValueError, match="texts are for a memory"):
        main([where[1], str(tmp_path / "back"), "--back", "--calibrate", str(text)])
