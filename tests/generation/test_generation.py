"""`generate` is inherited: what it makes of streams, rows, beams and turns must equal plain forward passes."""

import pytest
import torch
from transformers import DynamicCache, TextStreamer, pipeline

from helpers import pad_left, tiny_config, tiny_ids, tiny_model, tiny_tokenizer
from rmt_hf import RMTCache


S = 8  # segment_length of the tiny configuration; its window is two segments
PROMPTS = (3, S - 1, S, 2 * S + 5)
FORMS = [
    {},
    {"memory_write": "mean", "num_slots_per_chunk": 2, "use_qk_norm": True},
    {"num_lookback_segments": 0, "fusion_type": "softmax", "memory_write": "mean"},
    {"num_memory_slots": 0},
    {"use_attention_sink": True},
]
ROUNDED = {"rtol": 0, "atol": 1e-6}  # generate keeps logits in float32
GREEDY = {"do_sample": False, "eos_token_id": None}


def prompts() -> list[torch.Tensor]:
    return [tiny_ids(1, length, seed=length)[0] for length in PROMPTS]


# Rows and lengths


def teacher_forced(model, batch: dict[str, torch.Tensor], sequences: torch.Tensor) -> torch.Tensor:
    """Logits of one plain forward pass over prompts and what was generated, at the columns that were generated."""
    prompt = batch["input_ids"].shape[1]
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, sequences.shape[1] - prompt), value=True)
    return model(sequences, attention_mask=mask).logits[:, prompt - 1 : -1]


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "sampling", [GREEDY, {"do_sample": True, "top_k": 20, "temperature": 0.7, "eos_token_id": None}]
)
def test_generation_equals_a_teacher_forced_pass(form: dict, sampling: dict) -> None:
    """Left-padded prompts of 3, S - 1, S and 2S + 5 tokens: each step's logits, and each row alone."""
    model, batch = tiny_model(**form), pad_left(prompts())
    torch.manual_seed(0)
    output = model.generate(**batch, **sampling, max_new_tokens=5 * S, output_logits=True, return_dict_in_generate=True)
    logits = torch.stack(output.logits, 1).double()
    torch.testing.assert_close(logits, teacher_forced(model, batch, output.sequences), **ROUNDED)
    if sampling is GREEDY:
        for row, prompt in enumerate(prompts()):
            alone = model.generate(prompt[None], **GREEDY, max_new_tokens=5 * S)
            assert torch.equal(alone[0], output.sequences[row, -alone.shape[1] :])
    else:
        assert (logits.argmax(-1) != output.sequences[:, -5 * S :]).any()


@torch.no_grad()
def test_thousands_of_tokens_past_the_window() -> None:
    torch.manual_seed(0)
    model, batch = tiny_model(num_hidden_layers=1), pad_left([prompts()[0], prompts()[-1]])
    sampling = {"do_sample": True, "top_k": 0, "eos_token_id": None, "max_new_tokens": 2100}
    output = model.generate(**batch, **sampling, output_logits=True, return_dict_in_generate=True)
    logits = torch.stack(output.logits, 1).double()
    assert logits.shape[1] == 2100 and output.past_key_values.positions == [3 + 2100, 2 * S + 5 + 2100]
    torch.testing.assert_close(logits, teacher_forced(model, batch, output.sequences), **ROUNDED)


@torch.no_grad()
def test_the_state_does_not_grow() -> None:
    model, ids = tiny_model(), tiny_ids(2, 5)
    sizes = set()
    for length in (1, 3, 5 * S, 20 * S):
        cache = model.generate(ids, **GREEDY, max_new_tokens=length, return_dict_in_generate=True).past_key_values
        assert isinstance(cache, RMTCache) and cache.get_seq_length() == 5 + length
        sizes.add(cache.nbytes)
    assert len(sizes) == 1 and sizes.pop() > 0


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_generation_without_a_state_gives_the_same_tokens(form: dict) -> None:
    model, batch = tiny_model(**form), pad_left(prompts())
    cached = model.generate(**batch, **GREEDY, max_new_tokens=4 * S)
    assert torch.equal(model.generate(**batch, **GREEDY, max_new_tokens=4 * S, use_cache=False), cached)


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 3, S, 2 * S + 1, 100])
def test_prefill_in_pieces_changes_nothing(size: int) -> None:
    model, batch = tiny_model(), pad_left([tiny_ids(1, 5 * S + 3)[0], *prompts()])
    whole = model.generate(**batch, **GREEDY, max_new_tokens=2 * S)
    assert torch.equal(model.generate(**batch, **GREEDY, max_new_tokens=2 * S, prefill_chunk_size=size), whole)


@torch.no_grad()
def test_generation_from_inputs_embeds() -> None:
    model, ids = tiny_model(), tiny_ids(2, 2 * S + 5)
    tokens = model.generate(inputs_embeds=model.model.embed_tokens(ids), **GREEDY, max_new_tokens=2 * S)
    assert torch.equal(tokens, model.generate(ids, **GREEDY, max_new_tokens=2 * S)[:, ids.shape[1] :])


@torch.no_grad()
def test_a_row_that_ends_early_disturbs_no_other() -> None:
    model, batch = tiny_model(), pad_left(prompts())
    tokens = model.generate(**batch, **GREEDY, max_new_tokens=3 * S)[:, max(PROMPTS) :]
    end = tokens[0, S].item()  # some row meets this id first; from there on it is padded
    padded = model.generate(**batch, do_sample=False, eos_token_id=end, max_new_tokens=3 * S)[:, max(PROMPTS) :]
    assert (padded[:, -1] == 0).any()
    for row, wanted in zip(padded, tokens, strict=True):
        ends = (wanted == end).nonzero().flatten().tolist() or [3 * S]
        length = min(ends[0] + 1, len(row))
        assert torch.equal(row[:length], wanted[:length]) and not row[length:].any()


# Beams and several answers


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_beam_search_equals_one_row_at_a_time_and_no_state(form: dict) -> None:
    model, batch = tiny_model(**form), pad_left(prompts())
    beams = {**GREEDY, "num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 3 * S}
    sequences = model.generate(**batch, **beams)
    assert torch.equal(model.generate(**batch, **beams, use_cache=False), sequences)
    for row, prompt in enumerate(prompts()):
        alone = model.generate(prompt[None], **beams)
        assert torch.equal(alone, sequences[2 * row : 2 * row + 2, -alone.shape[1] :])
    assert not torch.equal(model.generate(**batch, **GREEDY, max_new_tokens=3 * S), sequences[::2])


@torch.no_grad()
def test_several_samples_of_one_prompt_are_streams_of_their_own() -> None:
    model, batch = tiny_model(), pad_left(prompts())
    torch.manual_seed(0)
    several = {"do_sample": True, "top_k": 0, "eos_token_id": None, "num_return_sequences": 3, "max_new_tokens": 3 * S}
    output = model.generate(**batch, **several, output_logits=True, return_dict_in_generate=True)
    repeated = {name: tensor.repeat_interleave(3, 0) for name, tensor in batch.items()}
    wanted = teacher_forced(model, repeated, output.sequences)
    torch.testing.assert_close(torch.stack(output.logits, 1).double(), wanted, **ROUNDED)
    assert len({tuple(row.tolist()) for row in output.sequences}) == 3 * len(PROMPTS)


# Turns


@torch.no_grad()
@pytest.mark.parametrize("said", [1, S, 3 * S + 1])
def test_a_second_turn_goes_on_from_the_state(said: int) -> None:
    """What was read stays read: ragged prompts, then what the user says, in one state or from scratch."""
    model, batch = tiny_model(), pad_left(prompts())
    batch = {name: torch.nn.functional.pad(tensor, (2, 0)) for name, tensor in batch.items()}  # pads in every row
    first = model.generate(**batch, **GREEDY, max_new_tokens=S + 3, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, tiny_ids(len(PROMPTS), said, seed=9)], 1)
    said_and_read = ids.shape[1] - batch["input_ids"].shape[1]
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, said_and_read), value=True)
    turn = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 2 * S, **GREEDY}
    from_scratch = model.generate(**turn)
    cache = first.past_key_values
    assert torch.equal(model.generate(**turn, past_key_values=cache), from_scratch)
    assert cache.get_seq_length() == from_scratch.shape[1]


@torch.no_grad()
def test_one_prompt_may_be_continued_in_two_ways() -> None:
    model, ids = tiny_model(), tiny_ids(1, 3 * S + 3)
    cache = model(ids[:, :-1], use_cache=True).past_key_values
    kept = cache.clone()
    once = model.generate(ids, past_key_values=cache, **GREEDY, max_new_tokens=2 * S)
    assert torch.equal(model.generate(ids, past_key_values=kept, **GREEDY, max_new_tokens=2 * S), once)
    assert torch.equal(model.generate(ids, **GREEDY, max_new_tokens=2 * S), once)


@torch.no_grad()
def test_a_refused_draft_leaves_no_trace_in_the_state() -> None:
    model, ids = tiny_model(), tiny_ids(2, 3 * S + 3)
    cache = model(ids[:, :-2], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="batch_size = 1"):
        model.generate(ids, past_key_values=cache, **GREEDY, max_new_tokens=S, prompt_lookup_num_tokens=3)
    answer = model.generate(ids[:, -2:], past_key_values=cache, **GREEDY, max_new_tokens=S)
    assert torch.equal(answer[:, 2:], model.generate(ids, **GREEDY, max_new_tokens=S)[:, ids.shape[1] :])


# Around the model


def test_pipeline_by_path(tmp_path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    pipe = pipeline("text-generation", model=str(tmp_path), device="cpu")
    assert type(pipe.model) is type(model)
    texts = ["w3 w4 w5", "w7 " * (2 * S + 5)]
    answers = pipe(texts, batch_size=2, max_new_tokens=S, do_sample=False, eos_token_id=None, return_full_text=False)
    for text, answer in zip(texts, answers, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        wanted = model.generate(ids, **GREEDY, max_new_tokens=S)[0, ids.shape[1] :]
        assert answer[0]["generated_text"].split() == tokenizer.decode(wanted, skip_special_tokens=True).split()


def test_text_streamer(capsys) -> None:
    model, ids, tokenizer = tiny_model(), tiny_ids(1, 5), tiny_tokenizer()
    tokens = model.generate(ids, **GREEDY, max_new_tokens=3 * S, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.split() == tokenizer.decode(tokens[0, 5:]).split()


def test_generation_does_not_need_use_cache_of_the_configuration() -> None:
    """Trainer sets it to False."""
    model, ids = tiny_model(), tiny_ids(1, 5)
    wanted = model.generate(ids, **GREEDY, max_new_tokens=3 * S)
    model.config.use_cache = False
    output = model.generate(ids, **GREEDY, max_new_tokens=3 * S, return_dict_in_generate=True)
    assert torch.equal(output.sequences, wanted) and output.past_key_values.get_seq_length() == wanted.shape[1]


@pytest.mark.parametrize("name", ["static", "offloaded", "quantized", "offloaded_static"])
def test_other_caches_are_refused(name: str) -> None:
    model, ids = tiny_model(), tiny_ids(1, 5)
    with pytest.raises(ValueError, match=f"cache_implementation='{name}'.*constant size.*leave it out"):
        model.generate(ids, cache_implementation=name, max_new_tokens=3)
    with pytest.raises(TypeError, match=r"must be an RMTCache, got DynamicCache: pass RMTCache\(model.config\)"):
        model.generate(ids, past_key_values=DynamicCache(config=model.config), max_new_tokens=3)
    with pytest.raises(TypeError, match="must be an RMTCache, got tuple"):
        model.generate(ids, past_key_values=((ids, ids),), max_new_tokens=3)


def test_the_configuration_alone_sets_what_ends_and_pads() -> None:
    model = tiny_model(eos_token_id=5, bos_token_id=3)
    assert (model.generation_config.eos_token_id, model.generation_config.bos_token_id) == (5, 3)
    assert model.generation_config.pad_token_id == tiny_config().pad_token_id == 0
