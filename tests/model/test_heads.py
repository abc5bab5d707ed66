"""What the heads owe the library: losses, embeddings, recorded outputs, checkpointing, number formats, saving."""

import copy
import math
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from helpers import pad_left, tiny_config, tiny_ids, tiny_model
from rmt_hf import (
    RMTCache,
    RMTForCausalLM,
    RMTForQuestionAnswering,
    RMTForSequenceClassification,
    RMTForTokenClassification,
    RMTModel,
    modeling_rmt,
)
from rmt_hf.layout_rmt import visible_columns
from rmt_hf.modeling_rmt import FADE, GATE_BIAS, GATE_SCALE


C, S, N, WINDOW = 4, 8, 1, 16  # of the tiny configuration
FORMS = [
    {},
    {"num_lasting_slots": 4, "use_attention_sink": True},
    {"memory_write": "mean", "num_slots_per_chunk": 2, "use_qk_norm": True},
    {"num_lookback_segments": 0},
]
PAPER = {"num_lookback_segments": 0, "fusion_type": "softmax", "memory_write": "mean"}
CLOSE = {"rtol": 0, "atol": 1e-12}  # float64, where other orders of summation differ by about 1e-15


# Loss and logits of the language model


def test_loss_is_the_cross_entropy_of_the_next_token() -> None:
    model, ids = tiny_model(), tiny_ids(2, 5 * S + 3)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.2, -100)
    output = model(ids, labels=labels)
    logits, wanted = output.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
    torch.testing.assert_close(output.loss, F.cross_entropy(logits, wanted, ignore_index=-100))
    total = F.cross_entropy(logits, wanted, ignore_index=-100, reduction="sum")
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=37).loss, total / 37)


def test_shift_labels_replace_labels() -> None:
    model, ids, shifted = tiny_model(), tiny_ids(2, 20), tiny_ids(2, 20, seed=1)
    output = model(ids, labels=ids, shift_labels=shifted)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits.flatten(0, 1).float(), shifted.flatten()))


def test_logits_to_keep() -> None:
    model, ids = tiny_model(), tiny_ids(2, 30)
    logits = model(ids).logits
    mask = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    for keep, wanted in (
        (1, logits[:, -1:]),
        (7, logits[:, -7:]),
        (torch.tensor([0, 17, 29]), logits[:, [0, 17, 29]]),
        (torch.tensor([[3, 4], [28, 0]]), torch.stack([logits[0, [3, 4]], logits[1, [28, 0]]])),
        (mask, logits[mask]),
    ):
        torch.testing.assert_close(model(ids, logits_to_keep=keep).logits, wanted, **CLOSE)


def test_outputs_come_as_a_tuple_on_request() -> None:
    model, ids = tiny_model(), tiny_ids(1, 20)
    output = model(ids, labels=ids, output_hidden_states=True)
    loss, logits, cache, hidden_states = model(ids, labels=ids, output_hidden_states=True, return_dict=False)
    assert torch.equal(loss, output.loss) and torch.equal(logits, output.logits)
    assert cache.get_seq_length() == 20 and len(hidden_states) == len(output.hidden_states)
    assert torch.equal(model.model(ids, return_dict=False)[0], model.model(ids).last_hidden_state)


# Embeddings


@pytest.mark.parametrize("tied", [False, True])
def test_tied_and_untied_embeddings_survive_saving(tied: bool, tmp_path) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    ids = tiny_ids(1, 60)
    model.save_pretrained(tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not tied
    again = RMTForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    for each in (model, again):
        assert (each.lm_head.weight is each.model.embed_tokens.weight) is tied
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_inputs_embeds_stand_for_input_ids() -> None:
    model, ids = tiny_model(), tiny_ids(2, 2 * S + 5)
    batch = pad_left([ids[0], ids[1, :3]])
    embeds = model.get_input_embeddings()(batch["input_ids"])
    by_embeds = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"], use_cache=True)
    by_ids = model(**batch, use_cache=True)
    assert torch.equal(by_embeds.logits, by_ids.logits)
    further = tiny_ids(2, 1)
    assert torch.equal(
        model(inputs_embeds=model.model.embed_tokens(further), past_key_values=by_embeds.past_key_values).logits,
        model(further, past_key_values=by_ids.past_key_values).logits,
    )


@pytest.mark.parametrize("tied", [False, True])
def test_resized_embeddings_take_the_new_ids(tied: bool, tmp_path) -> None:
    model, ids = tiny_model(tie_word_embeddings=tied), tiny_ids(1, 20)
    before = model(ids).logits
    with pytest.raises(ValueError, match="resize_token_embeddings"):
        model(torch.tensor([[67]]))
    model.resize_token_embeddings(80)
    after = model(ids, labels=ids)
    assert model.config.vocab_size == 80 and after.logits.shape[-1] == 80 and after.loss.isfinite()
    torch.testing.assert_close(after.logits[..., :67], before, **CLOSE)
    new_ids = torch.tensor([[67, 5, 79]])
    assert model(new_ids, labels=new_ids).loss.isfinite()
    with pytest.raises(ValueError, match=r"0 \.\. 79, got 5 \.\. 80"):
        model(torch.tensor([[5, 80]]))
    model.save_pretrained(tmp_path)
    again = RMTForCausalLM.from_pretrained(tmp_path)
    # The order of sums of a few tokens depends on how weights are aligned.
    torch.testing.assert_close(again(new_ids).logits, model(new_ids).logits, **CLOSE)
    model.resize_token_embeddings(40)
    with pytest.raises(ValueError, match=r"0 \.\. 39"):
        model(torch.tensor([[40]]))


# The other heads


HEADS = {
    AutoModelForSequenceClassification: RMTForSequenceClassification,
    AutoModelForTokenClassification: RMTForTokenClassification,
    AutoModelForQuestionAnswering: RMTForQuestionAnswering,
}


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM, *HEADS])
def test_auto_classes_build_and_load_every_head(auto_class, tmp_path) -> None:
    model_class = {AutoModel: RMTModel, AutoModelForCausalLM: RMTForCausalLM, **HEADS}[auto_class]
    assert type(auto_class.from_config(tiny_config())) is model_class
    model = tiny_model(model_class)
    model.save_pretrained(tmp_path)
    again = auto_class.from_pretrained(tmp_path)
    assert type(again) is model_class and again.dtype == torch.float64
    ids = tiny_ids(1, 6 * S)
    assert torch.equal(again(ids)[0], model(ids)[0])


@pytest.mark.parametrize("auto_class", HEADS)
def test_a_language_model_loads_into_another_head(auto_class, tmp_path) -> None:
    language_model = tiny_model()
    language_model.save_pretrained(tmp_path)
    model, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
    new = "qa_outputs" if HEADS[auto_class] is RMTForQuestionAnswering else "score"
    assert {name.split(".")[0] for name in info["missing_keys"]} == {new}
    assert info["unexpected_keys"] == {"lm_head.weight"}
    ids = tiny_ids(2, 3 * S)
    assert torch.equal(model.model(ids).last_hidden_state, language_model.model(ids).last_hidden_state)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_sequence_classification_reads_the_last_real_token() -> None:
    model, ids = tiny_model(RMTForSequenceClassification, num_labels=3), tiny_ids(2, 2 * S + 5)
    labels = torch.tensor([2, 0])
    rows = [ids[0], ids[1, :5]]
    alone = torch.cat([model(row[None]).logits for row in rows])
    left = pad_left(rows)
    output = model(**left, labels=labels)
    torch.testing.assert_close(output.logits, alone, **CLOSE)
    torch.testing.assert_close(output.loss, F.cross_entropy(alone, labels))
    right = torch.stack([rows[0], F.pad(rows[1], (0, 2 * S))])
    torch.testing.assert_close(model(right, attention_mask=right != 0).logits, alone, **CLOSE)
    torch.testing.assert_close(alone[:1], model.score(model.model(ids[:1]).last_hidden_state[:, -1]), **CLOSE)


def test_token_classification_reads_every_token() -> None:
    model, ids = tiny_model(RMTForTokenClassification, num_labels=3), tiny_ids(2, 2 * S + 5)
    labels = ids % 3
    labels[0, :4] = -100
    output = model(ids, labels=labels)
    torch.testing.assert_close(output.logits, model.score(model.model(ids).last_hidden_state), **CLOSE)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits.flatten(0, 1).float(), labels.flatten()))


@pytest.mark.parametrize(("dropout", "expected"), [(None, 0.1), (0.0, 0.0), (0.3, 0.3)])
def test_token_classification_takes_its_dropout_from_the_configuration(dropout, expected: float) -> None:
    assert RMTForTokenClassification(tiny_config(classifier_dropout=dropout)).dropout.p == expected


def test_question_answering_points_at_start_and_end() -> None:
    model, ids = tiny_model(RMTForQuestionAnswering), tiny_ids(2, 2 * S + 5)
    start, end = torch.tensor([3, 17]), torch.tensor([5, 20])
    output = model(ids, start_positions=start, end_positions=end)
    logits = model.qa_outputs(model.model(ids).last_hidden_state)
    torch.testing.assert_close(torch.stack([output.start_logits, output.end_logits], -1), logits, **CLOSE)
    wanted = (F.cross_entropy(logits[..., 0], start) + F.cross_entropy(logits[..., 1], end)) / 2
    torch.testing.assert_close(output.loss, wanted)


# Recorded outputs


@pytest.mark.parametrize("num_columns", [5, 3 * S + 2])
def test_hidden_states_are_those_between_the_layers(num_columns: int) -> None:
    model, ids = tiny_model(num_hidden_layers=3), tiny_ids(2, num_columns)
    output = model(ids, output_hidden_states=True, use_cache=True)
    assert [tuple(states.shape) for states in output.hidden_states] == [(2, num_columns, 32)] * 4
    assert torch.equal(output.hidden_states[0], model.model.embed_tokens(ids))
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)
    cut = copy.deepcopy(model)
    cut.model.layers = cut.model.layers[:2]
    cut.config.num_hidden_layers = 2
    assert torch.equal(cut(ids).logits, model.lm_head(model.model.norm(output.hidden_states[2])))
    one_more = model(tiny_ids(2, 1), past_key_values=output.past_key_values, output_hidden_states=True)
    assert [tuple(states.shape) for states in one_more.hidden_states] == [(2, 1, 32)] * 4


def window_attention_weights(model, ids: torch.Tensor) -> torch.Tensor:
    """Weights (B, H, T, T) of the first layer, as they would be if each token saw its window alone."""
    attention, config = model.model.layers[0].self_attn, model.config
    hidden_states = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
    positions = torch.arange(ids.shape[1])
    exponents = torch.arange(0, config.head_dim, 2).double() / config.head_dim
    frequencies = config.rope_parameters["rope_theta"] ** -exponents
    turn = torch.polar(torch.ones(()).double(), positions[:, None] * frequencies)  # (T, D / 2) complex

    def rotated(name: str) -> torch.Tensor:
        heads = getattr(attention, f"{name}_proj")(hidden_states).unflatten(-1, (-1, config.head_dim)).transpose(1, 2)
        heads = getattr(attention, f"{name}_norm")(heads) if config.use_qk_norm else heads
        first, second = heads.chunk(2, -1)
        spun = torch.complex(first, second) * turn
        return torch.cat([spun.real, spun.imag], -1)

    query, key = rotated("q"), rotated("k").repeat_interleave(2, 1)
    first_seen = (positions // S - config.num_lookback_segments) * S
    seen = (positions <= positions[:, None]) & (positions >= first_seen[:, None])
    scores = query @ key.transpose(2, 3) / math.sqrt(config.head_dim)
    return scores.masked_fill(~seen, -math.inf).softmax(-1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_columns", [1, S - 3, S])
def test_attentions_within_the_window_are_a_dense_softmax(form: dict, num_columns: int) -> None:
    model = tiny_model(**form)
    ids = tiny_ids(2, num_columns + model.config.num_lookback_segments * S)
    model.set_attn_implementation("eager")
    attentions = model(ids, output_attentions=True).attentions
    assert [tuple(weights.shape) for weights in attentions] == [(2, 4, ids.shape[1], ids.shape[1])] * 2
    # The model's frequencies are Llama's, rounded to float32; the dense ones here are not.
    torch.testing.assert_close(attentions[0], window_attention_weights(model, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("call", [6 * S + 5, 1, 3, S, 2 * S + 3])
def test_attentions_show_the_prefix_and_then_the_window(form: dict, call: int) -> None:
    """One softmax over both: within the window its weights are in the proportions of attention to that alone."""
    model, ids = tiny_model(**form), tiny_ids(2, 6 * S + 5)
    model.set_attn_implementation("eager")
    lookback, prefix = model.config.num_lookback_segments, model.config.prefix_length
    whole, dense, cache = model(ids, output_attentions=True).attentions, window_attention_weights(model, ids), None
    for start, part in zip(range(0, ids.shape[1], call), ids.split(call, 1), strict=True):
        output = model(part, past_key_values=cache, use_cache=True, output_attentions=True)
        cache = output.past_key_values
        if part.shape[1] <= model.config.window_length and start == 0:
            continue  # has the columns of the call
        for weights, wanted in zip(output.attentions, whole, strict=True):
            assert weights.shape == (2, 4, part.shape[1], prefix + (lookback + 1) * S)
            torch.testing.assert_close(weights, wanted[:, :, start : start + call], **CLOSE)
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]).double(), **CLOSE)
        for column in range(part.shape[1]):
            segment = (start + column) // S
            seen = int(visible_columns(model.config, torch.tensor(max(0, segment - lookback))))
            before, window = output.attentions[0][:, :, column].split([prefix, (lookback + 1) * S], -1)
            assert not before[..., : prefix - seen].any() and before[..., prefix - seen :].all()
            first = (segment - lookback) * S + S
            alone = F.pad(dense[:, :, start + column], (S, S))[..., first : first + (lookback + 1) * S]
            torch.testing.assert_close(window / window.sum(-1, keepdim=True), alone, rtol=0, atol=1e-5)  # as above


def test_attentions_of_a_padded_row_are_those_of_the_row_alone() -> None:
    """In the columns of prefix and window, whose current segment comes last; nothing is on what is not there."""
    model, ids = tiny_model(), tiny_ids(1, 2 * S + 5)[0]
    model.set_attn_implementation("eager")
    weights = model(**pad_left([ids, ids[:6]]), output_attentions=True).attentions[1][1, :, -6:]
    first = model.config.prefix_length + S
    alone = model(ids[None, :6], output_attentions=True).attentions[1][0]
    torch.testing.assert_close(weights[..., first : first + 6], alone, **CLOSE)
    assert not weights[..., :first].any() and not weights[..., first + 6 :].any()


# Training


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("form", [*FORMS, PAPER, {"memory_write": "mean"}, {"attention_bias": True, "mlp_bias": True}])
def test_every_parameter_gets_a_gradient(form: dict) -> None:
    model = tiny_model(**form).train()
    ids = tiny_ids(2, 8 * S)  # more segments than the window and the ring hold: the write gate is asked, too
    model(ids, labels=ids).loss.backward()
    assert not [name for name, gradient in gradients(model).items() if gradient is None or not gradient.any()]


@pytest.mark.parametrize(("in_parts", "use_reentrant"), [(False, False), (False, True), (True, False)])
def test_gradient_checkpointing_changes_nothing(in_parts: bool, use_reentrant: bool) -> None:
    """Whole or as three calls with a state between them: losses and gradients, through memory, are the same.

    The state is given: the library revolutions `use_cache=True` off where it checkpoints, and warns of it.
    """
    models = tiny_model().train(), tiny_model().train()
    models[1].activation_checkpointing_enable({"use_reentrant": use_reentrant})
    models[1].enable_input_require_grads()  # what a reentrant checkpoint asks for
    ids, losses = tiny_ids(2, 8 * S), []
    for model in models:
        loss, cache = torch.zeros(()), RMTCache(model.config) if in_parts else None
        for part in ids.split([5, 5 * S, 3 * S - 5], 1) if in_parts else [ids]:
            loss = loss + model(part, labels=part, past_key_values=cache, use_cache=False).loss
        loss.backward()
        losses.append(loss)
    assert torch.equal(*losses)
    for name, gradient in gradients(models[0]).items():
        assert torch.equal(gradient, models[1].get_parameter(name).grad), name


def test_a_checkpoint_that_would_cut_the_gradient_is_refused() -> None:
    model, ids = tiny_model().train(), tiny_ids(1, S)
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=False"):
        model(ids, past_key_values=RMTCache(model.config))
    assert model.eval()(ids, past_key_values=RMTCache(model.config)).past_key_values.get_seq_length() == S


# Number formats


def by_steps(model, ids: torch.Tensor, part: int = 1) -> torch.Tensor:
    cache, logits = None, []
    for columns in ids.split(part, 1):
        output = model(columns, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, 1)


# Logits have standard deviation 1. A format with p bits of mantissa rounds every one of some 40 operations in a row by
# up to 2^-p relative, and cached and uncached calls round in different orders. (A score that is rounded may select
# another token, which is no matter of tolerance: the narrow formats are tested with memories that do not select.)
FORMATS = [
    (torch.float64, 1e-12, {}),
    (torch.float32, 1e-4, {}),
    (torch.bfloat16, 0.3, {"memory_write": "mean"}),
    (torch.bfloat16, 0.3, PAPER),
    (torch.float16, 0.04, {"memory_write": "mean"}),
    (torch.float16, 0.04, PAPER | {"use_qk_norm": True}),
]


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("dtype", "atol", "form"), FORMATS)
def test_every_format_gives_the_same_logits_cached_and_uncached(dtype, atol: float, form: dict, implementation) -> None:
    model, ids = tiny_model(dtype=dtype, **form), tiny_ids(2, 6 * S + 3)
    model.set_attn_implementation(implementation)
    logits = model(ids).logits
    assert logits.dtype == dtype and logits.isfinite().all()
    torch.testing.assert_close(logits.double(), tiny_model(**form)(ids).logits, rtol=0, atol=max(atol, 1e-6))
    for part in (1, 5, 2 * S + 3):
        torch.testing.assert_close(by_steps(model, ids, part), logits, rtol=0, atol=atol)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("form", [{"memory_write": "mean"}, PAPER, {"memory_write": "mean", "use_qk_norm": True}])
def test_autocast_is_close_cached_and_uncached(form: dict, implementation: str) -> None:
    model, ids = tiny_model(dtype=torch.float32, **form), tiny_ids(2, 6 * S + 3)
    model.set_attn_implementation(implementation)
    wanted = model(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = [model(ids).logits, *(by_steps(model, ids, part) for part in (1, 5, 2 * S + 3))]
    for each in logits:
        torch.testing.assert_close(each.float(), wanted, rtol=0, atol=0.3)  # as bfloat16 above


@pytest.mark.parametrize("form", [*FORMS, PAPER, {"use_qk_norm": True}])
def test_autocast_trains(form: dict) -> None:
    model, ids = tiny_model(dtype=torch.float32, **form).train(), tiny_ids(2, 8 * S)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients(model).values())


@torch.no_grad()
@pytest.mark.parametrize("narrow_first", [False, True])
def test_a_state_goes_on_in_another_format(narrow_first: bool) -> None:
    """Prefill under autocast and go on without it, or the other way round."""
    model, ids = tiny_model(dtype=torch.float32, memory_write="mean"), tiny_ids(2, 6 * S + 3)
    wanted = model(ids).logits
    for part in (1, 3, 3 * S):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow_first):
            cache = model(ids[:, : 2 * S + 3], use_cache=True).past_key_values
        logits = []
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not narrow_first):
            for columns in ids[:, 2 * S + 3 :].split(part, 1):
                logits.append(model(columns, past_key_values=cache).logits)
        torch.testing.assert_close(torch.cat(logits, 1).float(), wanted[:, 2 * S + 3 :], rtol=0, atol=0.3)


def test_a_narrow_model_keeps_its_rotary_encoding_exact() -> None:
    model = tiny_model()
    positions = torch.tensor([[0, 1, 12_345, 10**8]])
    wanted = model.model.rotary_emb(positions, torch.float64)
    revolutions = model.model.rotary_emb.revolutions.clone()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model.to(dtype)
        assert torch.equal(model.model.rotary_emb.revolutions, revolutions)
        for narrow, wide in zip(model.model.rotary_emb(positions, torch.float32), wanted, strict=True):
            # Only the final rounding of angle, cosine and sine to float32 is left, at any position.
            torch.testing.assert_close(narrow.double(), wide, rtol=0, atol=1e-6)


# Saving, loading, copying


@pytest.fixture
def nan_in_empty():
    """Fills what `torch.empty` returns with NaN, so that nothing passes because old memory happened to look right."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("form", [*FORMS, PAPER, {"num_memory_slots": 0}, {"use_local_attention": False}])
def test_saving_and_loading_keep_every_bit(form: dict, tmp_path) -> None:
    model, ids = tiny_model(dtype=torch.float32, **form), tiny_ids(1, 4 * S)
    model.save_pretrained(tmp_path)
    again, info = RMTForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert again.config.to_diff_dict() == model.config.to_diff_dict()
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    "rope_parameters",
    [
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        {
            **{"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 32},
            **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        },
    ],
    ids=["linear", "llama3"],
)
def test_every_kind_of_rotary_encoding_is_loaded(tmp_path, rope_parameters) -> None:
    model, ids = tiny_model(dtype=torch.float32, rope_parameters=rope_parameters), tiny_ids(1, 3 * S)
    model.save_pretrained(tmp_path)
    assert torch.equal(RMTForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_a_model_made_on_the_meta_device_loads_all_it_needs(tmp_path) -> None:
    model, ids = tiny_model(), tiny_ids(1, 4 * S)
    with torch.device("meta"):
        shell = RMTForCausalLM(tiny_config())
    assert all(parameter.is_meta for parameter in shell.parameters())
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for again in (RMTForCausalLM.from_pretrained(tmp_path), RMTForCausalLM.from_pretrained(tmp_path, device_map="cpu")):
        assert not any(tensor.is_meta for tensor in [*again.parameters(), *again.buffers()])
        assert torch.equal(again(ids).logits, model(ids).logits)
    shell = shell.to_empty(device="cpu").to(torch.float64)  # what is not in a state_dict must be computable again
    with torch.no_grad():
        for tensor in [*shell.parameters(), *shell.buffers()]:
            tensor.fill_(-1)
    shell.init_weights()
    shell.load_state_dict(model.state_dict())
    assert torch.equal(shell.eval()(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("form", "name", "is_right"),
    [
        ({}, "self_attn.memory.rings.0.gate_weight", lambda tensor: not tensor.any()),
        ({}, "self_attn.memory.rings.0.gate_scale", lambda tensor: (tensor == GATE_SCALE).all()),
        ({}, "self_attn.memory.rings.0.gate_bias", lambda tensor: (tensor == GATE_BIAS).all()),
        ({"num_lasting_slots": 0}, "self_attn.memory.rings.0.fade", lambda tensor: (tensor == FADE).all()),
        ({}, "self_attn.memory.score_proj.weight", lambda tensor: 0 < tensor.abs().max() < 0.2),
        ({"use_attention_sink": True}, "self_attn.sink.key", lambda tensor: 0 < tensor.abs().max() < 0.2),
        ({"use_attention_sink": True}, "self_attn.sink.value", lambda tensor: not tensor.any()),
        ({}, "self_attn.fusion.gate.bias", lambda tensor: not tensor.any()),
        ({}, "self_attn.fusion.scale", lambda tensor: (tensor == 1).all()),
        (PAPER, "self_attn.fusion.logits", lambda tensor: not tensor.any()),
        (PAPER, "input_layernorm.weight", lambda tensor: (tensor == 1).all()),
        ({"use_qk_norm": True}, "self_attn.q_norm.weight", lambda tensor: (tensor == 1).all()),
    ],
)
def test_what_a_checkpoint_lacks_is_initialised(form: dict, name: str, is_right, tmp_path, nan_in_empty) -> None:
    model = tiny_model(dtype=torch.float32, **form)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[f"model.layers.1.{name}"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again, info = RMTForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {f"model.layers.1.{name}"}
    assert is_right(again.state_dict()[f"model.layers.1.{name}"])
    for other, tensor in weights.items():
        assert torch.equal(again.state_dict()[other], tensor), other


def test_models_can_be_copied_and_pickled() -> None:
    model, ids = tiny_model(), tiny_ids(1, 3 * S)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(ids).logits, model(ids).logits)
        assert again.config == model.config and again.config is not model.config
        with torch.no_grad():
            again.model.norm.weight.zero_()
        assert model.model.norm.weight.any()


# Facts that tools look up


def test_weights_that_are_asked_for_in_vain_are_warned_about(monkeypatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(modeling_rmt.logger, "warning_once", said.append)
    model, ids = tiny_model(), tiny_ids(1, 5)
    model(ids)
    assert not said
    assert model(ids, output_attentions=True).attentions == ()
    assert len(said) == 1 and 'attn_implementation="eager"' in said[0]
    model.set_attn_implementation("eager")
    assert len(model(ids, output_attentions=True).attentions) == 2 and len(said) == 1


def test_no_engine_that_pages_keys_is_told_that_it_can_run_this() -> None:
    assert not tiny_model().is_backend_compatible()
