"""RMTConfig: what breaks a rule is refused with the field and the value; what keeps them survives a round trip."""

import json
import logging
import re

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import AutoConfig, PreTrainedConfig

from rmt_hf import RMTConfig


OWN_FIELDS = [name for name in RMTConfig.__dataclass_fields__ if name not in PreTrainedConfig.__dataclass_fields__]

# One value for each field that is valid and not the default; what a "mean" write excludes apart from the others.
UNUSUAL = {
    "vocab_size": 99,
    "hidden_size": 40,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "hidden_act": "gelu",
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.1,
    "max_position_embeddings": 99,
    "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0},
    "attention_bias": True,
    "attention_dropout": 0.25,
    "mlp_bias": True,
    "tie_word_embeddings": True,
    "use_cache": False,
    "pad_token_id": 3,
    "bos_token_id": 4,
    "eos_token_id": [5, 6],
    "chunk_length": 6,
    "segment_length": 12,
    "num_lookback_segments": 2,
    "num_memory_slots": 24,
    "num_lasting_slots": 18,
    "lasting_distance": 7,
    "num_observing_tokens": 5,
    "num_slots_per_chunk": 3,
    "fusion_type": "softmax",
    "use_local_attention": False,
    "use_qk_norm": False,
    "use_attention_sink": True,
    "use_chunked_loss": True,
}
UNUSUAL_MEAN = UNUSUAL | {"memory_write": "mean", "num_lasting_slots": None}


@pytest.fixture
def logged(caplog, monkeypatch):
    """What this package and transformers log; transformers passes it on to the root logger only where CI is set."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    return caplog


def test_no_argument_is_needed_and_nothing_is_said(logged, capfd):
    config = RMTConfig()
    assert logged.messages == []
    assert capfd.readouterr() == ("", "")
    assert (config.num_key_value_heads, config.head_dim) == (12, 64)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


AT_LEAST = {
    1: "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "chunk_length segment_length num_slots_per_chunk num_observing_tokens max_position_embeddings",
    0: "num_lookback_segments num_memory_slots lasting_distance initializer_range attention_dropout",
}
BELOW_THE_LEAST = [(name, least) for least, names in AT_LEAST.items() for name in names.split()]


@pytest.mark.parametrize(("name", "least"), BELOW_THE_LEAST)
def test_numbers_below_the_least_are_refused(name, least):
    for value in (least - 1, -12):
        with pytest.raises(ValueError, match=re.escape(f"{name} must be at least {least}, got {value}.")):
            RMTConfig(**{name: value})


LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 8192


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rms_norm_eps": 0.0}, "rms_norm_eps must be above 0, got 0.0."),
        ({"attention_dropout": 1.0}, "attention_dropout must be below 1, got 1.0."),
        ({"head_dim": 7}, "head_dim must be even for the rotary encoding, got 7."),
        (
            {"hidden_size": 50},
            "hidden_size (50) must be a multiple of num_attention_heads (12) unless head_dim is given: change",
        ),
        (
            {"num_key_value_heads": 5},
            "num_attention_heads (12) must be a multiple of num_key_value_heads (5): 10 is the nearest.",
        ),
        ({"segment_length": 200}, "segment_length (200) must be a multiple of chunk_length (64): 192 is the nearest."),
        ({"segment_length": 32}, "segment_length (32) must be a multiple of chunk_length (64): 64 is the nearest."),
        (
            {"num_memory_slots": 30},
            "num_memory_slots (30) must be a multiple of num_slots_per_chunk * segment_length / chunk_length (4): 32",
        ),
        (
            {"num_lasting_slots": 30},
            "num_lasting_slots (30) must be a multiple of num_slots_per_chunk * segment_length / chunk_length (4): 32",
        ),
        ({"num_lasting_slots": 68}, "num_lasting_slots must be from 0 to num_memory_slots (64), and None with"),
        ({"num_lasting_slots": -4}, 'and None with memory_write="mean", got -4.'),
        ({"num_lasting_slots": 32, "memory_write": "mean"}, 'and None with memory_write="mean", got 32.'),
        ({"num_observing_tokens": 257}, "num_observing_tokens must be at most segment_length (256), got 257."),
        (
            {"memory_write": "mean", "num_slots_per_chunk": 3, "num_memory_slots": 12},
            "chunk_length (64) must be a multiple of num_slots_per_chunk (3): 63 is the nearest.",
        ),
        (
            {"num_slots_per_chunk": 65, "num_memory_slots": 0},
            "num_slots_per_chunk (65) must be at most chunk_length (64): a chunk cannot give more",
        ),
        ({"memory_write": "max"}, "memory_write must be one of select, mean, got 'max'."),
        ({"fusion_type": "sum"}, "fusion_type must be one of gated, softmax, got 'sum'."),
        ({"hidden_act": "swoosh"}, "hidden_act must be a name in transformers.activations.ACT2FN, got 'swoosh'."),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
            "rope_parameters[\"rope_type\"] must be one of default, linear, llama3, got 'yarn'.",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "must be one of default, linear, llama3, got 'yarn'."),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}},
            "rope_parameters[\"rope_theta\"] must be a number above 0 with rope_type 'default', got -1.0.",
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
            "rope_parameters[\"factor\"] must be a number above 0 with rope_type 'linear', got None.",
        ),
        (
            {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": None}},
            "\"original_max_position_embeddings\"] must be a number above 0 with rope_type 'llama3', got None.",
        ),
    ],
)
def test_rules_are_enforced_with_name_value_and_remedy(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        RMTConfig(**fields)


@pytest.mark.parametrize("name", OWN_FIELDS)
def test_values_of_a_wrong_type_are_refused(name):
    with pytest.raises(StrictDataclassFieldValidationError, match=f"'{name}' expected .* got object"):
        RMTConfig(**{name: object()})


@pytest.mark.parametrize("name", ["pad_token_id", "bos_token_id", "eos_token_id"])
def test_ids_outside_the_vocabulary_are_warned_about(name, logged):
    RMTConfig(**{name: 32000})
    (message,) = logged.messages
    assert name in message
    assert "got 32000" in message


def test_rules_that_depend_on_something_switched_off_do_not_hold():
    RMTConfig(num_memory_slots=0)
    RMTConfig(num_memory_slots=0, num_slots_per_chunk=3)
    RMTConfig(memory_write="select", num_slots_per_chunk=3, num_memory_slots=12)  # 64 % 3: only mean needs equal parts
    RMTConfig(hidden_size=50, num_attention_heads=4, head_dim=8)


def test_the_rules_hold_again_when_a_changed_configuration_is_saved(tmp_path):
    config = RMTConfig()
    config.segment_length = 100
    with pytest.raises(StrictDataclassClassValidationError, match=r"segment_length \(100\) must be a multiple"):
        config.save_pretrained(tmp_path)


def test_optional_fields_follow_the_others():
    config = RMTConfig(hidden_size=48, num_attention_heads=6)
    assert (config.num_key_value_heads, config.head_dim) == (6, 8)
    config = RMTConfig(**UNUSUAL)
    assert (config.num_key_value_heads, config.head_dim) == (2, 10)
    assert config.num_slots_per_segment == 6  # 3 for each of 2 chunks
    assert config.window_length == 36  # the current segment and 2 before it
    assert config.prefix_length == 25  # slots and sink


@pytest.mark.parametrize(
    ("fields", "parts"),  # slots, whether the score counts, whether the evidence does
    [
        ({}, ((64, True, False),)),
        ({"num_lasting_slots": 16}, ((16, True, False), (48, False, True))),
        ({"num_lasting_slots": 0}, ((64, False, True),)),
        ({"num_lasting_slots": 64}, ((64, True, False),)),
        ({"memory_write": "mean"}, ((64, False, False),)),
        ({"num_memory_slots": 0}, ()),
        ({"num_memory_slots": 0, "num_lasting_slots": 0}, ()),
    ],
)
def test_parts_of_memory(fields, parts):
    assert RMTConfig(**fields).memory_parts == parts


@pytest.mark.parametrize("fields", [UNUSUAL, UNUSUAL_MEAN], ids=["select", "mean"])
def test_every_field_survives_a_round_trip(fields, tmp_path):
    config = RMTConfig(**fields)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text("utf-8"))
    for loaded in (RMTConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path), RMTConfig(**written)):
        assert type(loaded) is RMTConfig
        assert {name: getattr(loaded, name) for name in fields} == fields
        same = {**config.to_dict(), "_name_or_path": loaded._name_or_path}
        assert loaded.to_dict() == {**same, "transformers_version": loaded.transformers_version}
    assert {name: written[name] for name in fields} == fields
    assert written["model_type"] == "rmt"


def test_unusual_values_are_of_every_field_and_unusual():
    default = RMTConfig()
    unusual = [name for name, value in UNUSUAL_MEAN.items() if value != getattr(default, name)]
    assert {*unusual, "num_lasting_slots"} == set(OWN_FIELDS)


@pytest.mark.parametrize(
    "rope_parameters", [LLAMA3, {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}], ids=["llama3", "linear"]
)
def test_every_rotary_type_can_be_made_and_survives_a_round_trip(rope_parameters, tmp_path, logged):
    config = RMTConfig(rope_parameters=dict(rope_parameters))
    config.save_pretrained(tmp_path)
    assert RMTConfig.from_pretrained(tmp_path).rope_parameters == config.rope_parameters == rope_parameters
    assert logged.messages == []


def test_rotary_parameters_in_the_old_spelling():
    assert RMTConfig(rope_theta=5e5).rope_parameters == {"rope_type": "default", "rope_theta": 5e5}
    config = RMTConfig(rope_scaling={"type": "linear", "factor": 2.0}, rope_theta=5e5)
    assert config.rope_parameters["rope_type"] == "linear"
    assert (config.rope_parameters["factor"], config.rope_parameters["rope_theta"]) == (2.0, 5e5)


def test_paper_is_a_preset_that_overrides_win_over():
    config = RMTConfig.paper()
    assert (config.num_lookback_segments, config.fusion_type, config.memory_write) == (0, "softmax", "mean")
    different = {name for name, value in config.to_dict().items() if value != RMTConfig().to_dict()[name]}
    assert different == {"num_lookback_segments", "fusion_type", "memory_write", "use_qk_norm"}
    config = RMTConfig.paper(fusion_type="gated", hidden_size=24)
    assert (config.num_lookback_segments, config.fusion_type, config.hidden_size) == (0, "gated", 24)


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [("segment_lenght", "segment_length"), ("num_memory_slot", "num_memory_slots"), ("use_qknorm", "use_qk_norm")],
)
def test_a_keyword_near_a_field_is_warned_about(misspelt, meant, logged):
    RMTConfig(**{misspelt: 1})
    assert logged.messages == [
        f"RMTConfig has no field {misspelt!r}: it is kept but changes nothing. Did you mean {meant!r}?"
    ]


def test_keywords_near_no_field_are_kept_in_silence(logged):
    assert RMTConfig(num_labels=3, task_note="mine").task_note == "mine"
    assert logged.messages == []


def test_a_configuration_has_an_auto_map_of_its_own_once_code_is_saved_with_it(tmp_path, monkeypatch):
    """TRL reads the attribute of every configuration; it must neither be shared nor written where it says nothing."""
    assert RMTConfig().auto_map == RMTConfig.auto_map == {}
    RMTConfig().save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert RMTConfig.from_pretrained(tmp_path).auto_map == {}
    monkeypatch.setattr(RMTConfig, "_auto_class", "AutoConfig")  # as `register_for_auto_class` does
    config = RMTConfig()
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert written["auto_map"] == config.auto_map == {"AutoConfig": "configuration_rmt.RMTConfig"}
    assert RMTConfig().auto_map == RMTConfig.auto_map == {}
