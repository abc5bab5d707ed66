"""A plain step of one token gives what the general path gives, and nothing that it keeps between steps goes stale."""

from dataclasses import fields
from importlib.util import find_spec, module_from_spec

import pytest
import torch
from torch.nn import functional as F

from rmt_hf import layers_rmt
from rmt_hf.layers_rmt import FEW_ROWS, NARROW, RMTLinear, processor_name, rotate
from rmt_hf.layout_rmt import PLANNED_STEPS, StepView, plan_call, plan_steps
from rmt_hf.step_rmt import rotation_matrices
from test_cache_rmt import CLOSE, FORMS, S, every_form, prompts
from test_costs import Costs
from tiny import pad_left, read, tiny_config, tiny_ids, tiny_model


def general(model, ids, cache):
    """Logits of a step by the path that serves gradients and other calls; the state goes on as well."""
    with torch.enable_grad():
        return model(ids, past_key_values=cache).logits.detach()


@torch.no_grad()
@every_form
@pytest.mark.parametrize("rows", [1, 3, 5])
def test_a_plain_step_is_the_general_one(form, rows):
    model, batch = tiny_model(**FORMS[form]), pad_left(prompts()[:rows])
    _, cache = read(model, batch["input_ids"], mask=batch["attention_mask"])
    expected = cache.clone()
    for column in tiny_ids(rows, 3 * S + 1, seed=3).split(1, 1):
        logits = model(column, past_key_values=cache).logits
        torch.testing.assert_close(logits, general(model, column, expected), **CLOSE)
        expected.detach()


def stepped(**overrides):
    """A model, and a state with a filled memory that has just made a step: it keeps what steps keep."""
    model = tiny_model(**overrides)
    _, cache = read(model, tiny_ids(2, 5 * S + 1), (5 * S,))
    return model, cache


@torch.no_grad()
@pytest.mark.parametrize("change", ["memory", "null key", "dtype", "rows", "position", "another state"])
def test_a_step_sees_what_was_changed_since_the_last(change):
    model, cache = stepped()
    state, memory = cache.layers[1].state, model.model.layers[1].self_attn.memory
    if change == "memory":
        cache.layers[1].state = state._replace(memory=state.memory.map(lambda tensor: tensor * 1.5))
    elif change == "null key":
        memory.null_key.data.add_(1)  # unseen by the version counter
    elif change == "dtype":
        model.to(torch.float32)
    elif change == "rows":
        cache.reorder_cache(torch.tensor([1, 0]))
    elif change == "position":
        cache.crop(-1)
    else:
        cache.layers[1].state = read(model, tiny_ids(2, 5 * S + 1, seed=5))[1].layers[1].state
    ids = tiny_ids(2, 1, seed=4)
    wanted = general(model, ids, cache.clone())
    tolerance = {"rtol": 0, "atol": 1e-4} if change == "dtype" else CLOSE  # float32 rounds
    torch.testing.assert_close(model(ids, past_key_values=cache).logits, wanted, **tolerance)


def test_steps_in_and_out_of_inference_mode():
    model, cache = stepped()
    ids, modes = tiny_ids(2, S, seed=4), [torch.inference_mode, torch.no_grad]
    expected = cache.clone()
    for index, column in enumerate(ids.split(1, 1)):
        with modes[index % 2]():
            logits = model(column, past_key_values=cache).logits
        with torch.no_grad():
            torch.testing.assert_close(logits.clone(), model(column, past_key_values=expected).logits, **CLOSE)


@pytest.mark.parametrize("starts", [[3], [S - 1, S - 1], [2 * S + 1, 5], [9, 2 * S, 40]])
@pytest.mark.parametrize("lookback", [0, 1])
def test_steps_planned_ahead_are_those_planned_one_by_one(starts, lookback):
    config = tiny_config(num_lookback_segments=lookback)
    layouts = plan_steps(config, starts, torch.device("cpu"))
    assert 0 < len(layouts) <= PLANNED_STEPS

    def seen(step: StepView, row: int, kind: str) -> set[int]:
        (start, end), mask = getattr(step, f"{kind}_span"), getattr(step, f"{kind}_mask")
        visible = torch.ones(1, end - start) if mask is None else mask[row, 0]
        return {start + column for column in visible[0].nonzero().flatten().tolist()}

    for index, layout in enumerate(layouts):
        wanted = plan_call(config, [start + index for start in starts], None, 1, torch.device("cpu"))
        for name in {field.name for field in fields(wanted)} - {"step", "rotations"}:
            got, want = getattr(layout, name), getattr(wanted, name)
            assert torch.equal(got, want) if isinstance(want, torch.Tensor) else got == want, name
        assert layout.position_ids.stride() == wanted.position_ids.stride()  # a compiled step is compiled for it
        assert torch.equal(layout.step.columns, wanted.step.columns)
        for row in range(len(starts)):
            for kind in ("global", "local"):
                assert seen(layout.step, row, kind) == seen(wanted.step, row, kind)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_rotation_is_a_product(rows):
    model, position_ids = tiny_model(), torch.tensor([[5], [77], [10**9]])[:rows] + torch.arange(3)
    cos, sin = model.model.rotary_emb(position_ids, torch.float64)
    states = torch.randn(rows, 3, 4, 8, dtype=torch.float64)
    wanted = rotate(states, cos, sin)
    for column, (for_query, for_key) in enumerate(rotation_matrices(cos, sin, 0.3)):
        assert for_key.shape == ((8, 8) if rows == 1 else (rows, 8, 8))
        torch.testing.assert_close(states[:, column] @ for_key, wanted[:, column], **CLOSE)
        torch.testing.assert_close(states[:, column] @ for_query, 0.3 * wanted[:, column], **CLOSE)


@pytest.fixture(
    params=[(False, False), (True, False), (True, True)], ids=["Intel", "AMD with AVX2", "AMD with AVX-512"]
)
def processor(request, monkeypatch) -> tuple[bool, bool]:
    """Whether few rows are slow, and whether one is even slower, whatever the tests run on."""
    for name, value in zip(("FEW_ROWS_ARE_SLOW", "ONE_ROW_IS_SLOW"), request.param, strict=True):
        monkeypatch.setattr(layers_rmt, name, value)
    return request.param


@pytest.mark.parametrize("shape", [(1, 1), (1,), (2, 1), (FEW_ROWS,), (3, FEW_ROWS)])
@pytest.mark.parametrize("width", [24, NARROW + 8])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.usefixtures("processor")
def test_a_few_rows_are_multiplied_as_many_are(shape, width, bias):
    linear = RMTLinear(width, 10, bias=bias).double().eval()
    states = torch.randn(*shape, width, dtype=torch.float64, requires_grad=True)
    got, want = linear(states), F.linear(states, linear.weight, linear.bias)
    assert got.is_contiguous()
    torch.testing.assert_close(got, want, **CLOSE)
    gradients = (torch.autograd.grad(output.square().sum(), [states, linear.weight]) for output in (got, want))
    for pair in zip(*gradients, strict=True):
        torch.testing.assert_close(*pair, rtol=0, atol=1e-10)  # sums of squares up to 1,000
    assert torch.equal(linear.train()(states), want)


@torch.no_grad()
def test_few_rows_are_multiplied_another_way_only_where_that_is_quicker(processor):
    few_rows_are_slow, one_row_is_slow = processor
    linear = RMTLinear(24, 10).eval()
    for rows in (1, FEW_ROWS, FEW_ROWS + 1):
        with Costs() as costs:
            linear(torch.randn(rows, 24))
        is_other = few_rows_are_slow and rows <= FEW_ROWS and (rows > 1 or one_row_is_slow)
        assert costs.operations["clone"] == is_other  # of the transposed product
        assert costs.operations["cat"] == (is_other and rows == 1)


def test_the_processor_is_named_where_torch_tells(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": "AMD EPYC"}, raising=False)
    assert processor_name() == "AMD EPYC"
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert processor_name() == ""
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert processor_name() == ""


@pytest.mark.parametrize(
    ("name", "has_mkl", "is_slow"), [("AMD EPYC", True, True), ("AMD EPYC", False, False), ("Intel Xeon", True, False)]
)
def test_few_rows_are_slow_for_mkl_on_amd(name, has_mkl, is_slow, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name}, raising=False)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: has_mkl)
    spec = find_spec("rmt_hf.layers_rmt")
    read_anew = module_from_spec(spec)
    spec.loader.exec_module(read_anew)
    assert is_slow == read_anew.FEW_ROWS_ARE_SLOW
