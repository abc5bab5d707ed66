"""Every decoding mode of `generate` against loops, formulas and searches of its own over plain, uncached forwards."""

import itertools
from collections.abc import Callable

import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast
from transformers.generation import GenerationConfig, LogitsProcessor, StoppingCriteria

from helpers import pad_left, tiny_ids, tiny_model
from rmt_hf import RMTForCausalLM


S = 8  # segment_length of the tiny configuration; its window is two segments
PROMPT = 2 * S + 5
STEPS = 2 * S  # two segments end on the way
RAGGED = (1, S - 1, S, PROMPT, 5 * S + 1)
GREEDY = {"do_sample": False, "eos_token_id": None}
SAMPLE = {"do_sample": True, "eos_token_id": None, "top_k": 0}
ROUNDED = {"rtol": 0, "atol": 1e-5}  # generate keeps logits in float32, and divides them by temperatures below 1
DICT = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}

Rule = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # ids (B, T) and logits (B, V) to logits (B, V)

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model() -> RMTForCausalLM:
    return tiny_model()


def ragged() -> list[torch.Tensor]:
    return [tiny_ids(1, length, seed=length) for length in RAGGED]


def left_padded() -> dict[str, torch.Tensor]:
    return pad_left([prompt[0] for prompt in ragged()])


def next_logits(model: RMTForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits[:, -1].float()


def write(model: RMTForCausalLM, ids: torch.Tensor, steps: int, rule: Rule | None = None, sample: bool = False):
    """The plainest decoding: every token from a pass over all of its stream."""
    for _ in range(steps):
        logits = next_logits(model, ids)
        logits = logits if rule is None else rule(ids, logits)
        token = torch.multinomial(logits.softmax(-1), 1) if sample else logits.argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], 1)
    return ids


# Sampling

INFINITY = float("inf")


def first_of(order: torch.Tensor, logits: torch.Tensor, mass: float) -> torch.Tensor:
    """The fewest tokens, in this order, whose probabilities reach the mass."""
    probabilities = logits.softmax(-1).gather(-1, order)
    beyond = probabilities.cumsum(-1) - probabilities >= mass
    return logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -INFINITY)


def repetition_penalty(ids: torch.Tensor, logits: torch.Tensor, penalty: float) -> torch.Tensor:
    seen = torch.zeros_like(logits).scatter(-1, ids, 1.0) > 0
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def typical_p(ids: torch.Tensor, logits: torch.Tensor, mass: float) -> torch.Tensor:
    surprise = -logits.log_softmax(-1)
    entropy = (logits.softmax(-1) * surprise).nansum(-1, keepdim=True)
    return first_of((surprise - entropy).abs().argsort(-1), logits, mass)


def min_p(ids: torch.Tensor, logits: torch.Tensor, share: float) -> torch.Tensor:
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < share * probabilities.amax(-1, keepdim=True), -INFINITY)


FORMULAS = {
    "repetition_penalty": repetition_penalty,
    "temperature": lambda ids, logits, temperature: logits / temperature,
    "top_k": lambda ids, logits, k: logits.masked_fill(logits < logits.topk(k).values[:, -1:], -INFINITY),
    "top_p": lambda ids, logits, mass: first_of(logits.argsort(-1, descending=True), logits, mass),
    "min_p": min_p,
    "typical_p": typical_p,
}
ALL = {"repetition_penalty": 1.3, "temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.02, "typical_p": 0.9}
WARPERS = [{}, *({name: value} for name, value in ALL.items()), {"top_k": 3}, {"top_p": 0.4}, ALL]


def warped(warpers: dict[str, float]) -> Rule:
    def rule(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        for name, value in warpers.items():
            logits = FORMULAS[name](ids, logits, value)
        return logits

    return rule


@pytest.mark.parametrize("warpers", WARPERS, ids=str)
def test_samples_are_those_of_the_textbook(model, warpers):
    """Three answers to each of two prompts, from the same random numbers."""
    ids = tiny_ids(2, PROMPT)
    torch.manual_seed(0)
    sampled = model.generate(ids, **(SAMPLE | warpers), num_return_sequences=3, max_new_tokens=STEPS)
    torch.manual_seed(0)
    assert torch.equal(sampled, write(model, ids.repeat_interleave(3, 0), STEPS, warped(warpers), sample=True))
    assert len({tuple(row.tolist()) for row in sampled}) == 6


def test_sampled_scores_of_ragged_rows_are_those_of_each_row_alone(model):
    torch.manual_seed(0)
    output = model.generate(**left_padded(), **(SAMPLE | ALL), **DICT, max_new_tokens=STEPS)
    for row, prompt in enumerate(ragged()):
        stream = torch.cat([prompt, output.sequences[row : row + 1, -STEPS:]], 1)
        logits = model(stream).logits[0, prompt.shape[1] - 1 : -1].float()
        for step in range(STEPS):
            wanted = warped(ALL)(stream[:, : prompt.shape[1] + step], logits[step : step + 1])[0]
            torch.testing.assert_close(output.logits[step][row], logits[step], **ROUNDED)
            torch.testing.assert_close(output.scores[step][row], wanted, **ROUNDED)
            assert wanted[stream[0, prompt.shape[1] + step]] > -INFINITY


@pytest.mark.parametrize("negative", [None, S + 3])
def test_guidance_by_a_second_stream(model, negative):
    ids, scale = tiny_ids(1, PROMPT), 1.5
    other = ids[:, -1:] if negative is None else tiny_ids(1, negative, seed=3)
    options = {} if negative is None else {"negative_prompt_ids": other}

    def guide(read: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        without = next_logits(model, torch.cat([other, read[:, PROMPT:]], 1)).log_softmax(-1)
        return without + scale * (logits.log_softmax(-1) - without)

    guided = model.generate(ids, **GREEDY, **options, guidance_scale=scale, max_new_tokens=STEPS)
    assert torch.equal(guided, write(model, ids, STEPS, guide))


# Beams


def beam_search(model: RMTForCausalLM, ids: torch.Tensor, steps: int, beams: int, rule: Rule | None = None):
    """The best sequences (beams, T + steps) of one prompt and the mean log-probabilities of their new tokens."""
    totals = torch.zeros(1, 1)
    for _ in range(steps):
        log_probs = next_logits(model, ids).log_softmax(-1)
        log_probs = totals + (log_probs if rule is None else rule(ids, log_probs))
        totals, best = log_probs.flatten().topk(beams)
        width = log_probs.shape[1]
        ids, totals = torch.cat([ids[best // width], best[:, None] % width], 1), totals[:, None]
    return ids, totals[:, 0] / steps


def log_prob_of(model: RMTForCausalLM, prompt: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Summed log-probabilities of new tokens (N, n) after a prompt (1, T)."""
    stream = torch.cat([prompt.expand(len(new), -1), new], 1)
    log_probs = model(stream).logits[:, prompt.shape[1] - 1 : -1].log_softmax(-1)
    return log_probs.gather(-1, new[..., None]).sum((1, 2)).float()


@pytest.mark.parametrize("end", [None, 3])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_wide_beams_find_the_best_of_all_sequences(end, length_penalty):
    """Four tokens of five: 625 sequences, or all that end earlier; the second segment ends during the search."""
    tiny, prompt, steps = tiny_model(vocab_size=5), 1 + tiny_ids(1, 2 * S - 2) % 4, 4
    found = []
    for length in range(1, steps + 1):
        all_new = torch.tensor(list(itertools.product(range(5), repeat=length)))
        ended = (all_new == (-1 if end is None else end)).int()
        complete = (ended[:, :-1].sum(1) == 0) & ((ended[:, -1] == 1) | torch.tensor(length == steps))
        new = all_new[complete]
        if len(new):
            scores = log_prob_of(tiny, prompt, new) / length**length_penalty
            found += zip(scores.tolist(), new.tolist(), strict=True)
    found.sort(reverse=True)
    options = {"do_sample": False, "eos_token_id": end, "early_stopping": "never", "length_penalty": length_penalty}
    beams = {"num_beams": 125, "num_return_sequences": 10, "max_new_tokens": steps}
    output = tiny.generate(prompt, attention_mask=torch.ones_like(prompt), **options, **beams, **DICT)
    torch.testing.assert_close(output.sequences_scores, torch.tensor([score for score, _ in found[:10]]), **ROUNDED)
    for row, (_, new) in zip(output.sequences, found, strict=False):
        assert row[2 * S - 2 :].tolist()[: len(new)] == new


def test_narrow_beams_are_those_of_a_plain_search(model):
    """Ragged rows, read at once or in pieces."""
    beams = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": STEPS}
    plain = [beam_search(model, prompt, STEPS, 4) for prompt in ragged()]
    for size in (None, 1, S + 1):
        output = model.generate(**left_padded(), **GREEDY, **beams, **DICT, prefill_chunk_size=size)
        assert torch.equal(output.sequences[:, -STEPS:], torch.cat([sequences[:, -STEPS:] for sequences, _ in plain]))
        torch.testing.assert_close(output.sequences_scores, torch.cat([scores for _, scores in plain]), **ROUNDED)


def test_sampled_beams_have_the_scores_of_their_sequences(model):
    beams = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": STEPS}

    def sampled(seed: int):
        torch.manual_seed(seed)
        return model.generate(**left_padded(), **SAMPLE, **beams, **DICT)

    output = sampled(0)
    transitions = model.compute_transition_scores(output.sequences, output.scores, output.beam_indices)
    sums = {"rtol": 0, "atol": 1e-4}  # 16 terms in float32
    torch.testing.assert_close(transitions.sum(1), output.sequences_scores * STEPS, **sums)
    for row, prompt in enumerate(ragged()):
        rows = slice(3 * row, 3 * row + 3)
        wanted = log_prob_of(model, prompt, output.sequences[rows, -STEPS:])
        torch.testing.assert_close(output.sequences_scores[rows], wanted / STEPS, **ROUNDED)
        assert not torch.equal(output.sequences[rows, -STEPS:], beam_search(model, prompt, STEPS, 3)[0][:, -STEPS:])
    assert torch.equal(sampled(0).sequences, output.sequences)
    assert not torch.equal(sampled(1).sequences, output.sequences)


# Drafts


def draft_model(num_tokens: int, noise: float = 0.0, **fields) -> RMTForCausalLM:
    """The tiny model or another; it guesses this many tokens at a time, sure or not."""
    model, generator = tiny_model(**fields), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter += noise * torch.randn(parameter.shape, generator=generator) * parameter.std()
    model.generation_config.num_assistant_tokens = num_tokens
    model.generation_config.assistant_confidence_threshold, model.generation_config.eos_token_id = 0.0, None
    return model


def accepted_and_drafted(model: RMTForCausalLM, ids: torch.Tensor, **options):
    """What `generate` returns, the number of drafted tokens that were kept, and of all that were drafted."""
    calls = []
    hook = model.register_forward_pre_hook(lambda *call: calls.append(call[2]["input_ids"].shape[1]), with_kwargs=True)
    with hook:
        mask = torch.ones_like(ids)  # the id of padding is a token among others here
        output = model.generate(ids, attention_mask=mask, eos_token_id=None, **DICT, **options)
    num_new = output.sequences.shape[1] - ids.shape[1]
    assert output.past_key_values.get_seq_length() == output.sequences.shape[1]
    return output, num_new - len(calls), sum(calls) - ids.shape[1] - (len(calls) - 1)


DRAFTS = {"identical": {}, "similar": {"noise": 0.05}, "other": {"seed": 1}, "one layer": {"num_hidden_layers": 1}}
LENGTHS = [("identical", S, S), ("identical", PROMPT, 1), ("identical", 10 * S + 3, 3), ("similar", 1, 3)]
LENGTHS += [("similar", PROMPT, S), ("similar", 10 * S + 3, 3), ("other", PROMPT, S), ("one layer", PROMPT, 3)]


@pytest.mark.parametrize("name, length, num_tokens", LENGTHS)
def test_a_draft_changes_no_token(model, name, length, num_tokens):
    draft = draft_model(num_tokens, **DRAFTS[name])
    options = {"do_sample": False, "max_new_tokens": 6 * S, "assistant_model": draft}
    output, accepted, drafted = accepted_and_drafted(model, tiny_ids(1, length), **options)
    assert torch.equal(output.sequences, write(model, tiny_ids(1, length), 6 * S))
    if name == "identical":
        assert accepted == drafted == 6 * S - -(-6 * S // (num_tokens + 1))
    else:
        assert (0.1 if name == "similar" else 0) * drafted <= accepted < drafted


def test_a_draft_that_samples_as_the_model_does_is_always_right(model):
    options = {"do_sample": True, "top_k": 20, "max_new_tokens": 6 * S, "suppress_tokens": [0]}
    torch.manual_seed(0)
    output, accepted, drafted = accepted_and_drafted(
        model, tiny_ids(1, PROMPT), assistant_model=draft_model(3), **options
    )
    assert accepted == drafted == 6 * S - 12
    wanted = model(output.sequences).logits[0, PROMPT - 1 : -1].float()
    torch.testing.assert_close(torch.cat(output.logits), wanted, **ROUNDED)
    assert not torch.equal(wanted.argmax(-1), output.sequences[0, PROMPT:])


def test_a_draft_may_grow_beyond_a_segment_while_it_is_right(model):
    ids, draft = tiny_ids(1, PROMPT), draft_model(S - 1)
    draft.generation_config.num_assistant_tokens_schedule = "heuristic_transient"
    options = {"do_sample": False, "max_new_tokens": 6 * S, "assistant_model": draft}
    output, accepted, drafted = accepted_and_drafted(model, ids, **options)
    assert accepted == drafted == 6 * S - 5 and torch.equal(output.sequences, write(model, ids, 6 * S))


@pytest.mark.parametrize("num_tokens, do_sample", [(1, False), (S, False), (3, True)])
def test_lookup_in_the_prompt(model, num_tokens, do_sample):
    """What greedy writes is the prompt, so that some of it is found there; then it goes on otherwise."""
    ids = write(model, tiny_ids(1, 4).repeat(1, 6), 2 * S)
    options = {"do_sample": do_sample, "max_new_tokens": 6 * S, "prompt_lookup_num_tokens": num_tokens}
    options |= {"temperature": 0.1} if do_sample else {}
    torch.manual_seed(0)
    output, accepted, drafted = accepted_and_drafted(model, ids, top_k=None, **options)
    wanted = model(output.sequences).logits[0, ids.shape[1] - 1 : -1].float()
    torch.testing.assert_close(torch.cat(output.logits), wanted, **ROUNDED)
    assert do_sample or torch.equal(output.sequences, write(model, ids, 6 * S))
    assert 0 < accepted < drafted


def test_drafts_with_padding_pieces_and_processors(model):
    ids, rule = tiny_ids(1, PROMPT), warped({"repetition_penalty": 1.3})
    batch = {name: torch.nn.functional.pad(tensor, (S + 3, 0)) for name, tensor in pad_left([ids[0]]).items()}
    options = {**GREEDY, "max_new_tokens": STEPS, "prefill_chunk_size": 3, "repetition_penalty": 1.3}
    for guesser in ({"assistant_model": draft_model(4, num_hidden_layers=1)}, {"prompt_lookup_num_tokens": 4}):
        written = model.generate(**batch, **options, **guesser)
        assert torch.equal(written[:, S + 3 :], write(model, ids, STEPS, rule))


def test_a_wrong_draft_longer_than_a_segment_is_refused(model):
    for guesser in ({"assistant_model": draft_model(S + 1, seed=1)}, {"prompt_lookup_num_tokens": S + 1}):
        with pytest.raises(RuntimeError, match=r"crop.*segment_length.*num_assistant_tokens"):
            model.generate(tiny_ids(1, 4).repeat(1, 6), **GREEDY, max_new_tokens=STEPS, **guesser)


def test_drafts_for_several_rows_are_refused_by_transformers(model):
    for guesser in ({"assistant_model": model}, {"prompt_lookup_num_tokens": 3}):
        with pytest.raises(ValueError, match="only supported for batch_size = 1"):
            model.generate(tiny_ids(2, S), **GREEDY, max_new_tokens=3, **guesser)
        with pytest.raises(ValueError, match="num_return_sequences has to be 1"):
            model.generate(tiny_ids(1, S), **SAMPLE, max_new_tokens=3, num_return_sequences=2, **guesser)


# Turns


def dialogue(model: RMTForCausalLM, turns: list[tuple[int, dict]]) -> None:
    """Every turn goes on from the state of the one before, and says what a stream that is read again says."""
    ids, cache = tiny_ids(1, PROMPT), None
    for said, options in turns:
        ids = torch.cat([ids, tiny_ids(1, said, seed=said)], 1)
        going_on = {"past_key_values": cache, "return_dict_in_generate": True, "max_new_tokens": 2 * S}
        output = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY, **going_on, **options)
        assert torch.equal(output.sequences, write(model, ids, 2 * S))
        ids, cache = output.sequences, output.past_key_values
        assert cache.get_seq_length() == ids.shape[1]


def test_many_turns(model):
    pieces = {1: None, S: 3, 3 * S + 1: S, 2: 1}
    dialogue(model, [(said, {"prefill_chunk_size": size}) for said, size in pieces.items()])


def test_turns_after_drafts(model):
    dialogue(model, [(1, {"assistant_model": draft_model(5, num_hidden_layers=1)}), (3, {}), (S, {})])
    dialogue(model, [(1, {"prompt_lookup_num_tokens": 5}), (3, {}), (S, {})])


@pytest.mark.parametrize("name", ["identical", "similar", "lookup"])
def test_drafts_in_every_turn(model, name):
    lookup = {"prompt_lookup_num_tokens": 5}
    guesser = lookup if name == "lookup" else {"assistant_model": draft_model(5, **DRAFTS[name])}
    dialogue(model, [(said, guesser) for said in (1, S, 3 * S + 1)])


@pytest.mark.parametrize("answer", [1, S])
def test_answers_that_are_taken_back(model, answer):
    """Three turns of ragged rows; the user takes back each answer and says something else."""
    batch, cache, streams = left_padded(), None, ragged()
    for turn in range(3):
        options = {"past_key_values": cache, "return_dict_in_generate": True, "max_new_tokens": answer}
        output = model.generate(**batch, **GREEDY, **options)
        for row, stream in enumerate(streams):
            assert torch.equal(output.sequences[row, -answer:], write(model, stream, answer)[0, -answer:])
        cache = output.past_key_values
        cache.crop(-answer)
        more = tiny_ids(len(RAGGED), turn + 3, seed=turn)
        streams = [torch.cat([stream, more[row : row + 1]], 1) for row, stream in enumerate(streams)]
        batch["input_ids"] = torch.cat([batch["input_ids"], more], 1)
        batch["attention_mask"] = torch.nn.functional.pad(batch["attention_mask"], (0, turn + 3), value=True)


# What users plug in


def allowed_after(row: int, last: int) -> list[int]:
    return [3 + (7 * last + 5 * row + offset) % 64 for offset in range(6)]


def prefix_rule(row: int) -> Rule:
    def rule(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        kept = [allowed_after(row, last) for last in ids[:, -1].tolist()]
        return torch.full_like(logits, -INFINITY).scatter(-1, torch.tensor(kept), logits.gather(-1, torch.tensor(kept)))

    return rule


class NoEcho(LogitsProcessor):
    """Forbids what one of the last four tokens was."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.scatter(-1, input_ids[:, -4:], -INFINITY)


class DivisibleBy13(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs) -> torch.Tensor:
        return input_ids[:, -1] % 13 == 0


@pytest.mark.parametrize("beams", [1, 3])
def test_allowed_tokens_of_each_row(model, beams):
    options = {"prefix_allowed_tokens_fn": lambda row, ids: allowed_after(row, int(ids[-1])), "num_beams": beams}
    written = model.generate(**left_padded(), **GREEDY, **options, max_new_tokens=STEPS)
    for row, prompt in enumerate(ragged()):
        rule = prefix_rule(row)
        plain = write(model, prompt, STEPS, rule) if beams == 1 else beam_search(model, prompt, STEPS, beams, rule)[0]
        assert torch.equal(written[row, -STEPS:], plain[0, -STEPS:])
        assert not torch.equal(written[row, -STEPS:], write(model, prompt, STEPS)[0, -STEPS:])


@pytest.mark.parametrize("beams", [1, 3])
def test_a_processor_and_the_scores_it_leaves(model, beams):
    """Padding is in what the processor sees: its id is suppressed."""
    options = {"logits_processor": [NoEcho()], "num_beams": beams, "max_new_tokens": STEPS, "suppress_tokens": [0]}
    output = model.generate(**left_padded(), **GREEDY, **options, **DICT)

    def rule(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return logits.scatter(-1, torch.nn.functional.pad(ids[:, -4:], (1, 0)), -INFINITY)

    for row, prompt in enumerate(ragged()):
        plain = write(model, prompt, STEPS, rule) if beams == 1 else beam_search(model, prompt, STEPS, beams, rule)[0]
        assert torch.equal(output.sequences[row, -STEPS:], plain[0, -STEPS:])
        for step in range(STEPS if beams == 1 else 0):
            read = plain[:, : prompt.shape[1] + step]
            logits = next_logits(model, read)
            torch.testing.assert_close(output.logits[step][row : row + 1], logits, **ROUNDED)
            torch.testing.assert_close(output.scores[step][row : row + 1], rule(read, logits), **ROUNDED)


def character_tokenizer() -> PreTrainedTokenizerFast:
    """A token is a character: stop strings may end anywhere."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<pad>", "<s>", "</s>", *letters, *letters.upper(), *"0123456789", ".", ","]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = Split(Regex("."), "isolated"), Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", padding_side="left")


@pytest.mark.parametrize("how", ["string", "criterion"])
def test_rows_stop_where_each_of_them_would(model, how):
    """The longest row is done when all are; with an id of the end, which never comes, others are padded until then."""
    tokenizer = character_tokenizer()
    whole = [write(model, prompt, STEPS)[0].tolist() for prompt in ragged()]
    plain = [row[-STEPS:] for row in whole]
    strings = [tokenizer.decode(row[4 + 2 * number : 6 + 2 * number]) for number, row in enumerate(plain[:-1])]
    if how == "string":
        options = {"stop_strings": strings, "tokenizer": tokenizer}
        texts = [[tokenizer.decode(row[: len(row) - STEPS + n]) for n in range(1, STEPS + 1)] for row in whole]
        stops = [[text.endswith(tuple(strings)) for text in row] for row in texts]  # one may begin in the prompt
    else:
        options = {"stopping_criteria": [DivisibleBy13()]}
        stops = [[token % 13 == 0 for token in row] for row in plain]
    ends = [[*stop[:-1], True].index(True) + 1 for stop in stops]
    assert len(set(ends)) > 2
    written = model.generate(**left_padded(), **GREEDY, **options, max_new_tokens=STEPS)[:, max(RAGGED) :]
    assert written.tolist() == [row[: max(ends)] for row in plain]
    end = next(token for token in range(1, 67) if not any(token in row for row in plain))
    options |= {"do_sample": False, "eos_token_id": end}
    padded = model.generate(**left_padded(), **options, max_new_tokens=STEPS)[:, max(RAGGED) :]
    assert padded.tolist() == [row[:n] + [0] * (max(ends) - n) for row, n in zip(plain, ends, strict=True)]


def test_no_time_is_time_for_one_token(model):
    output = model.generate(**left_padded(), **GREEDY, max_new_tokens=STEPS, max_time=1e-9)
    for row, prompt in enumerate(ragged()):
        assert torch.equal(output[row, max(RAGGED) :], write(model, prompt, 1)[0, -1:])


# What such a model cannot do

ELSEWHERE = [{"penalty_alpha": 0.6, "top_k": 4}, {"dola_layers": "high"}, {"num_beams": 4, "force_words_ids": [[5]]}]
ELSEWHERE += [{"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}]


@pytest.mark.parametrize("options", ELSEWHERE, ids=str)
def test_modes_that_transformers_has_given_away(model, options):
    with pytest.raises(ValueError, match=r"requires `trust_remote_code=True`.*it loads https://hf.co/"):
        model.generate(tiny_ids(1, S), **(GREEDY | options), max_new_tokens=3)


def test_drafts_by_a_part_of_the_model_are_refused(model):
    with pytest.raises(ValueError, match="Could not find `num_mtp_layers` in the model config"):
        model.generate(tiny_ids(1, S), **GREEDY, max_new_tokens=3, use_mtp=True)


def test_early_exit_is_refused():
    model = tiny_model()
    try:
        with pytest.raises(ValueError, match="assistant_early_exit"):
            model.generate(tiny_ids(1, S), **GREEDY, max_new_tokens=3, assistant_early_exit=1)
    finally:
        assert model.config.num_hidden_layers == 2


def test_continuous_batching_is_refused(model):
    with pytest.raises(ValueError, match="no continuous batching"):
        model.generate_batch([[3, 4, 5]], generation_config=GenerationConfig(eos_token_id=2))
    assert not hasattr(model, "init_continuous_batching")  # so asks `transformers serve`
