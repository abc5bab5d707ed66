"""Several documents in one row: each is read as if it were alone, whatever is before it, in one call or in many."""

import pytest
import torch
from torch.nn import functional as F

from helpers import FORMS, read, segments_alone, tiny_ids, tiny_model
from rmt_hf import RMTCache, RMTModel


S = 8  # segment_length of the tiny configuration

# Float64 sums of some 100 terms taken in another order: values up to 10 agree to 1e-12.
CLOSE = {"rtol": 0, "atol": 1e-12}

every_form = pytest.mark.parametrize("form", FORMS)

# Lengths of the documents of each row; the largest ring turns every four segments.
ROWS = [[7 * S + 3, 5, 12 * S], [S, 9 * S - 1, 2 * S + 2], [3, 3, 3], [21 * S + 5]]


def packed(rows: list[list[int]] = ROWS) -> tuple[dict[str, torch.Tensor], list[list[tuple[torch.Tensor, slice]]]]:
    """A batch with documents padded to whole segments, and for each row its documents alone and their columns."""
    columns = max(sum(-(-length // S) * S for length in row) for row in rows)
    batch = {name: torch.zeros(len(rows), columns, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    batch["position_ids"] = torch.full((len(rows), columns), 10**9)  # padding: what is said there means nothing
    documents = []
    for index, row in enumerate(rows):
        start, alone = 0, []
        for number, length in enumerate(row):
            ids, place = tiny_ids(1, length, seed=10 * index + number), slice(start, start + length)
            batch["input_ids"][index, place] = ids[0]
            batch["attention_mask"][index, place] = 1
            batch["position_ids"][index, place] = torch.arange(length)
            alone.append((ids, place))
            start += -(-length // S) * S
        documents.append(alone)
    return batch, documents


@every_form
@torch.no_grad()
def test_each_document_is_read_as_if_it_were_alone(form: str) -> None:
    model, (batch, documents) = tiny_model(**FORMS[form]), packed()
    logits = model(**batch).logits
    for row, alone in enumerate(documents):
        for ids, place in alone:
            torch.testing.assert_close(logits[row, place], model(ids).logits[0], **CLOSE)


@every_form
@torch.no_grad()
@pytest.mark.parametrize(
    ("rows", "cuts"), [(ROWS, ()), (ROWS, (8 * S,)), (ROWS, (S, 2 * S, 9 * S)), ([[7 * S + 3, 5]], ())]
)
def test_a_state_holds_the_last_document_only(form: str, rows: list[list[int]], cuts: tuple[int, ...]) -> None:
    """After packed calls, the first of which begins the streams, rows go on as their last documents alone."""
    model, (batch, documents) = tiny_model(**FORMS[form]), packed(rows)
    cache, start, logits = RMTCache(model.config), 0, []
    for size in [*cuts, batch["input_ids"].shape[1] - sum(cuts)]:
        part = {name: tensor[:, start : start + size] for name, tensor in batch.items()}
        begins = (part["position_ids"][:, 0] == 0) & (start > 0)
        if begins.any():
            cache.reset(rows=begins)
        logits.append(model(**part, past_key_values=cache).logits)
        start += size
    logits, more = torch.cat(logits, 1), tiny_ids(len(rows), 3 * S + 1, seed=99)
    single, going_on = cache.split(), model(more, past_key_values=cache).logits
    for row, alone in enumerate(documents):
        for ids, place in alone:
            torch.testing.assert_close(logits[row, place], model(ids).logits[0], **CLOSE)
        ids = alone[-1][0]
        expected, _ = read(model, torch.cat([ids, more[row : row + 1]], 1))
        torch.testing.assert_close(going_on[row], expected[0, ids.shape[1] :], **CLOSE)
        assert single[row].positions == [ids.shape[1]]
        _, own = read(model, ids)
        for got, want in zip(single[row].layers, own.layers, strict=True):
            torch.testing.assert_close(got.state.memory, want.state.memory, **CLOSE)
            first = max(0, 1 + model.config.num_lookback_segments - ids.shape[1] // S) * S
            assert not any(segments_alone(states, model.config)[:, :, :first].any() for states in got.state[:2])


@torch.no_grad()
def test_what_is_before_the_last_document_cannot_be_taken_back() -> None:
    model, (batch, documents) = tiny_model(), packed([[S + 2, 3], [2 * S, S]])
    cache = model(**{name: tensor[:, : 2 * S + 3] for name, tensor in batch.items()}, use_cache=True).past_key_values
    cache.crop(-S)  # five columns more than the last documents have, here and in a call shorter than that
    assert cache.positions == [0, 0]
    short = read(model, tiny_ids(1, 2 * S - 2))[1]
    model(tiny_ids(1, 3), position_ids=torch.tensor([[2 * S - 2, 2 * S - 1, 0]]), past_key_values=short)
    short.crop(-S)
    assert short.positions == [0]
    more = tiny_ids(2, 2 * S, seed=5)
    torch.testing.assert_close(model(more, past_key_values=cache).logits, model(more).logits, **CLOSE)
    cache = model(**batch, use_cache=True).past_key_values
    cache.crop(-6)  # five columns of padding and one token of the first row, six tokens of the second
    assert cache.positions == [2, S - 6]
    going_on = model(more, past_key_values=cache).logits
    for row, kept in enumerate((2, S - 6)):
        whole = torch.cat([documents[row][-1][0][:, :kept], more[row : row + 1]], 1)
        torch.testing.assert_close(going_on[row], model(whole).logits[0, kept:], **CLOSE)


@every_form
def test_gradients_are_those_of_the_documents_alone(form: str) -> None:
    batch, documents = packed()
    together, apart = tiny_model(**FORMS[form]), tiny_model(**FORMS[form])
    together(**batch).logits[batch["attention_mask"] == 1].pow(2).sum().backward()
    sum(apart(ids).logits.pow(2).sum() for alone in documents for ids, _ in alone).backward()
    for (name, parameter), other in zip(together.named_parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-10, atol=1e-9, msg=name)


@every_form
def test_no_gradient_crosses_from_one_document_to_another(form: str) -> None:
    """Law 4, exactly: not small, zero. And the gradient inside a document is not zero anywhere."""
    model, (batch, documents) = tiny_model(RMTModel, **FORMS[form]), packed([[7 * S + 3, 5 * S, 9 * S]])
    embeds = model.embed_tokens(batch.pop("input_ids")).detach().requires_grad_()
    output = model(inputs_embeds=embeds, **batch, use_cache=True).last_hidden_state
    for number, (_, place) in enumerate(documents[0]):
        (gradient,) = torch.autograd.grad(output[0, place].pow(2).sum(), embeds, retain_graph=True)
        inside = torch.zeros(embeds.shape[1], dtype=torch.bool)
        inside[place] = True
        assert torch.equal(gradient[0].ne(0).any(-1), inside), number


@torch.no_grad()
def test_padding_inside_documents_and_on_the_left_changes_nothing() -> None:
    model, ids = tiny_model(), tiny_ids(1, 5 * S)
    mask, positions = torch.ones(1, 7 * S, dtype=torch.int64), torch.zeros(1, 7 * S, dtype=torch.int64)
    mask[:, :3] = mask[:, 20:24] = mask[:, 3 * S + 2 : 4 * S] = mask[:, -S:] = 0
    padded = torch.zeros_like(mask)
    first, second = mask.clone(), mask.clone()
    first[:, 4 * S :] = second[:, : 4 * S] = 0
    for part in (first.bool(), second.bool()):
        positions[part] = torch.arange(int(part.sum()))
        padded[part] = ids[0, : int(part.sum())]
    logits = model(padded, attention_mask=mask, position_ids=positions).logits
    for part in (first.bool(), second.bool()):
        torch.testing.assert_close(logits[part], model(ids[:, : int(part.sum())]).logits[0], **CLOSE)


@torch.no_grad()
def test_a_row_goes_on_with_its_stream_before_a_new_document() -> None:
    """The state stands in the middle of a segment, so that the new document begins at a column that is not S * n."""
    model, ids = tiny_model(), tiny_ids(2, 6 * S + 3)
    alone, other = tiny_ids(1, 3 * S, seed=7), tiny_ids(1, 3 * S + 5, seed=8)
    expected, _ = read(model, ids)
    cache = read(model, ids[:, : 5 * S + 3])[1]
    going_on = torch.cat([ids[:1, 5 * S + 3 :], ids[:1, :5]], 1)[:, : S - 3]
    batch = torch.cat([torch.cat([going_on, alone], 1), torch.cat([going_on, alone], 1)])
    batch[1, : S - 3], batch[1, S - 3 :] = ids[1, 5 * S + 3 : 6 * S], other[0, : 3 * S]
    positions = torch.cat([torch.arange(5 * S + 3, 6 * S), torch.arange(3 * S)])[None]
    logits = model(batch, position_ids=positions, past_key_values=cache).logits
    torch.testing.assert_close(logits[1, : S - 3], expected[1, 5 * S + 3 : 6 * S], **CLOSE)
    torch.testing.assert_close(logits[0, S - 3 :], model(alone).logits[0], **CLOSE)
    torch.testing.assert_close(logits[1, S - 3 :], model(other[:, : 3 * S]).logits[0], **CLOSE)
    assert cache.positions == [3 * S, 3 * S]


def test_documents_that_begin_elsewhere_are_refused() -> None:
    model, ids = tiny_model(), tiny_ids(1, 3 * S)
    positions = torch.cat([torch.arange(S + 2), torch.arange(2 * S - 2)])[None]
    with pytest.raises(ValueError, match=rf"segment start, got 0 at column {S + 2} of row 0, which is 2 columns into"):
        model(ids, position_ids=positions)
    with pytest.raises(ValueError, match=rf"row 0, column {S + 1} is at 1 of its stream, got 2"):
        model(ids, position_ids=torch.cat([torch.arange(S), torch.tensor([0]), torch.arange(2, 2 * S + 1)])[None])
    cache = read(model, ids)[1]
    with pytest.raises(ValueError, match=r"row 0, column 0 is at 24 .* got 0\..*reset\(rows="):
        model(ids, position_ids=torch.arange(3 * S)[None], past_key_values=cache)


def test_the_loss_of_a_packed_row_is_that_of_its_documents() -> None:
    """The first token of a document is nobody's target: its label is left out, as `rmt_hf.data.pack` does."""
    model, (batch, documents) = tiny_model(), packed([[2 * S + 3, 3 * S]])
    labels = torch.where(batch["attention_mask"] == 1, batch["input_ids"], -100)
    labels[batch["position_ids"] == 0] = -100
    apart = [F.cross_entropy(model(ids).logits[0, :-1].float(), ids[0, 1:], reduction="sum") for ids, _ in documents[0]]
    torch.testing.assert_close(model(**batch, labels=labels).loss, sum(apart) / (5 * S + 1))
