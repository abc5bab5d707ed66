"""Memory tokens against a loop without any state, and what they must let through: gradients, tokens, and no more."""

import pytest
import torch
from transformers import DynamicCache
from transformers.loss.loss_utils import ForCausalLMLoss

from experiments.memory_tokens import MemoryTokensConfig, MemoryTokensForCausalLM, MemoryTokensState


SEGMENT, MEMORY, LAYERS, WIDTH = 6, 3, 2, 16


@pytest.fixture
def model() -> MemoryTokensForCausalLM:
    """In eval mode, float64, with weights so large that nothing is negligible."""
    torch.manual_seed(0)
    config = MemoryTokensConfig(
        vocab_size=31,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        initializer_range=0.3,
        segment_length=SEGMENT,
        num_memory_tokens=MEMORY,
        tie_word_embeddings=True,
    )
    return MemoryTokensForCausalLM(config).double().eval()


def some_ids(num_columns: int, num_rows: int = 2) -> torch.Tensor:
    return torch.randint(31, (num_rows, num_columns), generator=torch.Generator().manual_seed(1))


def naive_logits(model: MemoryTokensForCausalLM, input_ids: torch.Tensor) -> torch.Tensor:
    """The definition: one row and one segment at a time, whole and with both memories, without a cache."""
    rows = []
    for row in input_ids:
        memory, hidden = model.first_memory.weight, []
        for segment in row.split(SEGMENT):
            inputs = torch.cat([memory, model.model.embed_tokens(segment), memory])
            outputs = model.model(inputs_embeds=inputs[None], use_cache=False).last_hidden_state[0]
            hidden.append(outputs[MEMORY : MEMORY + len(segment)])
            memory = outputs[MEMORY + len(segment) :]
        rows.append(model.lm_head(torch.cat(hidden)))
    return torch.stack(rows)


@pytest.mark.parametrize("num_columns", [1, SEGMENT - 1, SEGMENT, SEGMENT + 1, 3 * SEGMENT, 3 * SEGMENT + 2])
@pytest.mark.parametrize("use_cache", [False, True])
def test_logits_are_those_of_a_naive_loop(model: MemoryTokensForCausalLM, num_columns: int, use_cache: bool) -> None:
    input_ids = some_ids(num_columns)
    outputs = model(input_ids, use_cache=use_cache)
    assert (outputs.past_key_values is not None) == use_cache
    torch.testing.assert_close(
        outputs.logits, naive_logits(model, input_ids), rtol=0, atol=1e-12
    )  # float64, sums differ


@pytest.mark.parametrize("use_cache", [False, True])
def test_gradients_are_those_of_a_naive_loop(model: MemoryTokensForCausalLM, use_cache: bool) -> None:
    """Over all segments, and for the library's loss: shifted by one position, a mean over the labels that count."""
    input_ids = some_ids(2 * SEGMENT + 4)
    labels = input_ids.clone()
    labels[:, 3:5] = -100
    loss = model.train()(input_ids, labels=labels, use_cache=use_cache).loss
    expected = ForCausalLMLoss(naive_logits(model, input_ids), labels, 31)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)  # the loss is computed in float32
    parameters = list(model.parameters())
    for found, wanted in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)  # as the loss


@pytest.mark.parametrize("cuts", [[1] * 20, [5, 1, 6, 8], [6, 6, 8], [7, 13], [19, 1]])
def test_reading_in_pieces_is_reading_at_once(model: MemoryTokensForCausalLM, cuts: list[int]) -> None:
    input_ids, state = some_ids(20), MemoryTokensState()
    logits = [model(part, past_key_values=state).logits for part in input_ids.split(cuts, 1)]
    torch.testing.assert_close(torch.cat(logits, 1), model(input_ids).logits, rtol=0, atol=1e-12)  # float64
    at_once = model(input_ids).past_key_values
    torch.testing.assert_close(state.memory, at_once.memory, rtol=0, atol=1e-12)  # float64
    assert state.cache.get_seq_length() == at_once.cache.get_seq_length() == MEMORY + 20 % SEGMENT


def test_gradient_of_the_last_segment_reaches_the_first(model: MemoryTokensForCausalLM) -> None:
    """Also through a state from an earlier call."""
    input_ids = some_ids(4 * SEGMENT)
    seen = []
    hook = model.model.embed_tokens.register_forward_hook(lambda *call: seen.append(call[-1]) or call[-1].retain_grad())
    model.train()(input_ids).logits[:, -1].logsumexp(-1).sum().backward()
    assert (seen[0].grad.abs().sum(-1) > 0).all()
    state = MemoryTokensState()
    for part in input_ids.split(SEGMENT + 1, 1):
        last = model(part, past_key_values=state).logits[:, -1]
    last.logsumexp(-1).sum().backward()
    hook.remove()
    torch.testing.assert_close(torch.cat([part.grad for part in seen[1:]], 1), seen[0].grad)


def test_memory_is_all_that_a_segment_hands_on(model: MemoryTokensForCausalLM) -> None:
    """A token of segment 0 changes the logits of segment 3, unless the memory after segment 0 is put back."""
    input_ids = some_ids(4 * SEGMENT)
    changed = input_ids.clone()
    changed[:, 2] = (changed[:, 2] + 1) % 31
    one, other = model(input_ids).logits, model(changed).logits
    assert torch.equal(one[:, :2], other[:, :2])
    assert ((one - other)[:, 3 * SEGMENT :].abs().amax(-1) > 1e-6).all()
    state = model(changed[:, :SEGMENT]).past_key_values
    state.memory = model(input_ids[:, :SEGMENT]).past_key_values.memory
    rest = model(changed[:, SEGMENT:], past_key_values=state).logits
    torch.testing.assert_close(rest, one[:, SEGMENT:], rtol=0, atol=1e-12)  # float64


def test_logits_to_keep(model: MemoryTokensForCausalLM) -> None:
    input_ids = some_ids(2 * SEGMENT + 1)
    torch.testing.assert_close(model(input_ids, logits_to_keep=3).logits, model(input_ids).logits[:, -3:])


def test_first_memory_is_drawn_and_saved(model: MemoryTokensForCausalLM, tmp_path) -> None:
    assert 0.15 < model.first_memory.weight.std() < 0.45  # 0.3, of 48 numbers
    model.save_pretrained(tmp_path)
    loaded = MemoryTokensForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(loaded(some_ids(20)).logits, model(some_ids(20)).logits)


def test_refusals(model: MemoryTokensForCausalLM) -> None:
    input_ids = some_ids(4)
    assert torch.equal(model(input_ids, attention_mask=torch.ones(2, 4)).logits, model(input_ids).logits)
    with pytest.raises(ValueError, match="without padding"):
        model(input_ids, attention_mask=torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]))
    with pytest.raises(ValueError, match=r"got DynamicCache: pass MemoryTokensState\(\)"):
        model(input_ids, past_key_values=DynamicCache())
    for name in ("segment_length", "num_memory_tokens"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            MemoryTokensConfig(**{name: 0})
