"""Attention block by block is attention, gradients and all, and looks at no key in vain."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from rmt_hf import layers_rmt, layout_rmt, tiles_rmt
from rmt_hf.layers_rmt import RMTRMSNorm
from rmt_hf.layout_rmt import causal_mask, kept_causal_mask
from rmt_hf.paths_rmt import Paths, Shares, fuse
from rmt_hf.tiles_rmt import Windows, can_be_tiled, cut_into_blocks, tiled_attention, windows_from_the_start
from test_costs import KERNEL, Costs
from tiny import read, tiny_ids, tiny_model


S = 8  # segments, in the tiny models as well


def naive_attention(query, key, value, windows, scaling, shift=0):
    """One query at a time, in plain sums."""
    output, groups = torch.zeros_like(query), query.shape[2] // key.shape[2]
    for first, count, step, columns in windows:
        for place in range(count * step):
            column = first + place
            start = first + place // step * step + step - columns + shift
            for head in range(query.shape[2]):
                keys, values = (states[:, start : column + shift + 1, head // groups] for states in (key, value))
                scores = torch.einsum("bd,bkd->bk", query[:, column, head], keys) * scaling
                output[:, column, head] = torch.einsum("bk,bkd->bd", scores.softmax(-1), values)
    return output


CASES = {
    "less than a window": (windows_from_the_start(11, S, 2 * S), 11, 0),
    "a window": (windows_from_the_start(2 * S, S, 2 * S), 2 * S, 0),
    "a window and a token": (windows_from_the_start(2 * S + 1, S, 2 * S), 2 * S + 1, 0),
    "segments and a rest": (windows_from_the_start(6 * S + 3, S, 2 * S), 6 * S + 3, 0),
    "no lookback": (windows_from_the_start(4 * S + 5, S, S), 4 * S + 5, 0),
    "three segments back": (windows_from_the_start(7 * S, S, 4 * S), 7 * S, 0),
    "behind a state": ([Windows(0, 3, S, 2 * S)], 3 * S, 2 * S),
    "one segment behind a state": ([Windows(0, 1, S, 3 * S)], S, 3 * S),
}


def random_states(num_rows, length, shift, groups=2, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = [(num_rows, length, 2 * groups, 4), *[(num_rows, length + shift, 2, 4)] * 2]
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("block", [1, 3, 4, 128])
@pytest.mark.parametrize(("num_rows", "groups"), [(1, 1), (3, 2), (9, 1)])
def test_it_is_attention(case, block, num_rows, groups, monkeypatch):
    monkeypatch.setattr(tiles_rmt, "BLOCK", block)
    windows, length, shift = CASES[case]
    states = random_states(num_rows, length, shift, groups)
    output, expected = (attention(*states, windows, 0.3, shift) for attention in (tiled_attention, naive_attention))
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    gradient = torch.randn_like(output)
    found, wanted = (torch.autograd.grad(result, states, gradient) for result in (output, expected))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_windows_from_the_start_hold_every_query_once():
    for length in range(1, 60):
        windows = windows_from_the_start(length, S, 3 * S)
        columns = [first + place for first, count, step, _ in windows for place in range(count * step)]
        assert columns == list(range(length))


def test_no_key_behind_the_last_query_of_a_block_is_looked_at(monkeypatch):
    monkeypatch.setattr(tiles_rmt, "BLOCK", 4)
    for block in cut_into_blocks(windows_from_the_start(5 * S + 3, S, 2 * S), 0, 1):
        assert sum(block.keys) == sum(block.queries)


def test_keys_and_values_are_not_copied():
    """The kernel gives as much as it takes queries; masks are one for each shape of a block."""
    query, key, value = (states.detach() for states in random_states(1, 40 * S, 0))
    windows = windows_from_the_start(40 * S, S, 2 * S)
    with Costs() as costs:
        tiled_attention(query, key, value, windows, 0.3)
    assert costs.operations[KERNEL] == len(windows) == 2
    assert costs.bytes < 3 * query.nbytes  # output of the kernel and of the function, logarithms of sums, masks


@pytest.mark.parametrize("lookback", [0, 1, 2])
@pytest.mark.parametrize("cuts", [(), (2 * S + 3, 2 * S, S)])
def test_a_model_computes_what_it_does_with_eager_attention(lookback, cuts, monkeypatch):
    monkeypatch.setattr(tiles_rmt, "BLOCK", 3)
    calls = []
    original = tiles_rmt.cut_into_blocks
    monkeypatch.setattr(tiles_rmt, "cut_into_blocks", lambda *args: calls.append(args[1] > 0) or original(*args))
    results = []
    for implementation in ("sdpa", "eager"):
        model = tiny_model(num_lookback_segments=lookback, use_qk_norm=True)
        model.config._attn_implementation = implementation
        logits, cache = read(model.train(), tiny_ids(2, 9 * S + 5), cuts)
        logits.square().mean().backward()
        results.append(
            [logits, *(parameter.grad for parameter in model.parameters()), *cache.layers[1].state.tensors()]
        )
        assert (True in calls) == (implementation == "sdpa" and bool(cuts))  # behind a state
        assert (False in calls) == (implementation == "sdpa")
        calls.clear()
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_masks_of_windows_are_made_once_for_all_layers_and_calls(implementation, monkeypatch):
    model, made = tiny_model(num_hidden_layers=3), []
    model.config._attn_implementation = implementation
    kept_causal_mask.cache_clear()
    monkeypatch.setattr(layout_rmt, "causal_mask", lambda *args: made.append(args) or causal_mask(*args))
    for _ in range(2):
        model(tiny_ids(1, 5 * S + 3), use_cache=False).logits.sum().backward()
    assert made and len(made) == len(set(made))


def test_a_mask_that_was_made_in_inference_mode_serves_training():
    kept_causal_mask.cache_clear()
    model = tiny_model(attn_implementation="eager")
    with torch.inference_mode():
        model(tiny_ids(1, 5 * S))
    model(tiny_ids(1, 5 * S), use_cache=False).logits.sum().backward()
    assert not kept_causal_mask(S, 2 * S, torch.device("cpu")).is_inference()


def test_a_mask_never_becomes_a_fake_one():
    kept_causal_mask.cache_clear()
    model, ids = tiny_model(), tiny_ids(1, 5 * S)
    expected = model(ids).logits
    kept_causal_mask.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        assert isinstance(model(mode.from_tensor(ids), use_cache=False).logits, FakeTensor)
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=0)


def test_what_the_kernel_cannot_do_is_left_to_others(monkeypatch):
    model = tiny_model(attention_dropout=0.1, num_hidden_layers=1)
    layer, states = model.model.layers[0].self_attn, random_states(1, 4, 0)
    assert can_be_tiled(layer, *states)
    assert not can_be_tiled(layer.train(), *states)
    assert not can_be_tiled(layer.eval(), states[0], states[1], states[2].float())
    assert not can_be_tiled(layer, *(state.to("meta") for state in states))
    assert not can_be_tiled(layer, states[0].transpose(2, 3), *states[1:])
    assert not can_be_tiled(layer, *(states[0].detach().as_subclass(torch.nn.Parameter), *states[1:]))
    monkeypatch.setattr(tiles_rmt, "KERNEL_HAS_GROUPS", False)
    assert not can_be_tiled(layer, *states)
    assert can_be_tiled(layer, states[1], *states[1:])
    monkeypatch.undo()
    model.config._attn_implementation = "eager"
    assert not can_be_tiled(layer, *states)


@pytest.mark.parametrize("shape", [(2, 5, 8), (2, 5, 3, 8), (8,), (7, 8)])
@pytest.mark.parametrize("size", [2**18, 20])
def test_the_norm_is_the_norm(shape, size, monkeypatch):
    """Values, gradients, and the bits of the form without gradients."""
    monkeypatch.setattr(layers_rmt, "PIECE", size)
    torch.manual_seed(0)
    norm, states = RMTRMSNorm(8, 0.1).double(), torch.randn(shape, dtype=torch.float64).requires_grad_()
    norm.weight.data.normal_()
    output, gradient = norm(states), torch.randn(shape, dtype=torch.float64)
    plain = torch.nn.functional.rms_norm(states, (8,), norm.weight, 0.1)
    torch.testing.assert_close(output, plain, rtol=0, atol=1e-14)
    inputs = (states, norm.weight)
    found, expected = (torch.autograd.grad(result, inputs, gradient) for result in (output, plain))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    with torch.no_grad():
        assert norm(states).equal(output)


@pytest.mark.parametrize("shape", [(7, 8), (2, 5, 8), (2, 5, 3, 8), (1, 40, 1, 2)])
def test_pieces_are_small_and_make_up_the_whole(shape, monkeypatch):
    monkeypatch.setattr(layers_rmt, "PIECE", 20)
    states, axis = torch.randn(shape), min(len(shape) - 2, 1)
    ones = torch.arange(shape[axis]).view(*[1] * axis, -1, *[1] * (len(shape) - axis - 1))
    cut = list(layers_rmt.pieces(states, ones))
    assert torch.cat([piece for piece, _ in cut], axis).equal(states) and len(cut) > 1
    assert all(piece.shape[axis] == other.shape[axis] for piece, other in cut)
    row = states.numel() // shape[axis]
    assert all(piece.numel() <= max(20, row) for piece, _ in cut)


def assert_same(found, expected, inputs, gradient, inner):
    """Values, gradients of the inputs, as they are and with a graph, and gradients of these with respect to `inner`."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    pairs = [torch.autograd.grad(each, inputs, gradient, retain_graph=True) for each in (found, expected)]
    torch.testing.assert_close(*pairs, rtol=0, atol=1e-13)
    pairs = [torch.autograd.grad(each, inputs, gradient, create_graph=True) for each in (found, expected)]
    torch.testing.assert_close(*pairs, rtol=0, atol=1e-13)
    sums = [sum(each.cos().sum() for each in pair) for pair in pairs]
    pairs = [torch.autograd.grad(each, inner, retain_graph=True) for each in sums]
    torch.testing.assert_close(*pairs, rtol=0, atol=1e-13)


def swiglu(gate, up):
    return layers_rmt.gated_product(torch.nn.SiLU(), gate, up)


def swiglu_plainly(gate, up):
    return torch.nn.functional.silu(gate) * up


def rotate_plainly(states, cos, sin):
    return states * cos + torch.cat([states[..., 4:], states[..., :4]], -1) * sin


@pytest.mark.parametrize("length", [5, 16])
def test_swiglu_and_rotation_in_pieces(length, monkeypatch):
    """Values, gradients and their gradients are those of the plain form, in pieces and as a whole."""
    torch.manual_seed(0)
    wide = {"dtype": torch.float64}
    gate, up = torch.randn(2, length, 8, **wide, requires_grad=True).unbind()
    states = torch.randn(2, length, 3, 8, **wide, requires_grad=True)
    halves = [torch.randn(rows, length, 1, 4, **wide) for rows in (1, 2)]
    cases = [(swiglu, swiglu_plainly, (gate, up))]
    for half in halves:
        tables = torch.cat([half.cos()] * 2, -1), torch.cat([-half.sin(), half.sin()], -1)
        cases.append((layers_rmt.rotate, rotate_plainly, (states, *tables)))
    for function, plainly, inputs in cases:
        expected, given = plainly(*inputs), [each for each in inputs if each.requires_grad]
        gradient = torch.randn_like(expected).requires_grad_()
        for size in (2**18, 20):
            monkeypatch.setattr(layers_rmt, "PIECE", size)
            found = function(*inputs)
            assert ("Backward" in found.grad_fn.name() and "_" in found.grad_fn.name()) == (size == 20)
            inner = [gradient, *given] if function is swiglu else [gradient]  # a rotation is linear
            assert_same(found, expected, given, gradient, inner)
            with torch.no_grad():
                assert function(*inputs).equal(found)


@pytest.mark.parametrize("num_columns", [6, 4])
def test_fusion_in_pieces(num_columns, monkeypatch):
    """Values, gradients and their gradients are those of the plain form; a path may have the last columns alone."""
    torch.manual_seed(0)
    wide = {"dtype": torch.float64, "requires_grad": True}
    output, local = torch.randn(2, 2, 6, 3, 8, **wide).unbind()
    memory, shares = torch.randn(2, num_columns, 3, 8, **wide), torch.randn(2, 6, 3, 2, **wide)
    inputs = (output, local, memory, shares)
    of_local, of_memory = shares.split(1, -1)
    of_memory_there = of_memory[:, -num_columns:] * memory
    expected = output + of_local * local + torch.nn.functional.pad(of_memory_there, (*[0] * 4, 6 - num_columns, 0))
    gradient = torch.randn_like(expected)
    for size in (2**18, 50):
        monkeypatch.setattr(layers_rmt, "PIECE", size)
        found = fuse(Shares(None, of_local, of_memory), Paths(output, local, memory))
        assert ("Fusion" in found.grad_fn.name()) == (size == 50)
        assert_same(found, expected, inputs, gradient, inputs[1:])
        with torch.no_grad():
            assert fuse(Shares(None, of_local, of_memory), Paths(output, local, memory)).equal(found)
        softmax = shares[0, 0, 0].softmax(0)  # one number for the layer
        found = fuse(Shares(softmax[0], softmax[1], softmax[1]), Paths(output, local, memory))
        whole = torch.nn.functional.pad(memory, (*[0] * 4, 6 - num_columns, 0))
        torch.testing.assert_close(found, softmax[0] * output + softmax[1] * (local + whole), rtol=0, atol=1e-14)


@pytest.mark.parametrize("activation", ["silu", "swish", "gelu"])
def test_the_mlp_has_the_activation_of_the_configuration(activation, monkeypatch):
    monkeypatch.setattr(layers_rmt, "PIECE", 20)
    mlp = tiny_model(hidden_act=activation).model.layers[0].mlp
    states = torch.randn(2, 9, mlp.gate_proj.in_features, dtype=mlp.gate_proj.weight.dtype)
    plain = getattr(torch.nn.functional, {"swish": "silu"}.get(activation, activation))
    expected = mlp.down_proj(plain(mlp.gate_proj(states)) * mlp.up_proj(states))
    found = mlp(states)
    torch.testing.assert_close(found, expected)
    names = []
    walk = [found.grad_fn]
    while walk:
        node = walk.pop()
        names.append(node.name())
        walk += [parent for parent, _ in node.next_functions if parent is not None]
    assert ("_SwiGLUBackward" in names) == (activation != "gelu")


def test_a_model_in_pieces_is_the_model(monkeypatch):
    """Logits, gradients and states, also where rows go on, across segment ends, at different places."""
    results = []
    for size in (2**18, 64):
        monkeypatch.setattr(layers_rmt, "PIECE", size)
        model, ids = tiny_model(), tiny_ids(2, 9 * S + 3)
        logits = model(ids, use_cache=False).logits
        logits.square().mean().backward()
        found = [logits, *(parameter.grad for parameter in model.parameters())]
        mask = torch.ones(2, 5 * S + 1, dtype=torch.long)
        mask[0, : S + 2] = 0
        with torch.no_grad():
            read = model.eval()(ids[:, : 5 * S + 1], attention_mask=mask, use_cache=True)
            state = read.past_key_values
            more = model(ids[:, 5 * S + 1 :], past_key_values=state)
        states = [tensor for layer in state.layers for tensor in (*layer.state[:3], *layer.state.memory)]
        results.append([*found, read.logits, more.logits, *states])
    torch.testing.assert_close(*results, rtol=0, atol=1e-11)


def test_an_activation_that_somebody_listens_to_is_called(monkeypatch):
    monkeypatch.setattr(layers_rmt, "PIECE", 20)
    mlp, calls = tiny_model().model.layers[0].mlp, []
    states = torch.randn(2, 9, mlp.gate_proj.in_features, dtype=mlp.gate_proj.weight.dtype)
    expected = mlp(states)
    for register in (mlp.act_fn.register_forward_hook, mlp.act_fn.register_forward_pre_hook):
        handle = register(lambda *args: calls.append(args))
        torch.testing.assert_close(mlp(states), expected)
        handle.remove()
    assert len(calls) == 2
    mlp.act_fn.forward = torch.relu
    assert not torch.allclose(mlp(states), expected)


def test_the_norm_of_zeros_has_a_gradient_that_is_finite():
    norm, states = RMTRMSNorm(4, 1e-6), torch.zeros(2, 4, requires_grad=True)
    norm(states).sum().backward()
    assert states.grad.isfinite().all()


def test_the_gradient_of_a_norm_is_wide_in_autocast():
    norm, states = RMTRMSNorm(64, 0.1), torch.randn(7, 64, requires_grad=True)
    gradients = []
    for is_narrow in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_narrow):
            gradients += torch.autograd.grad(norm(states).square().sum(), states)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("dtype", "close"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
@pytest.mark.parametrize("is_autocast", [False, True])
def test_narrow_numbers(dtype, close, is_autocast, monkeypatch):
    """Gradients of a narrow model, or of a wide one in autocast, point where those of eager float64 do."""
    gradients, calls = [], []
    original = tiles_rmt.cut_into_blocks
    monkeypatch.setattr(tiles_rmt, "cut_into_blocks", lambda *args: calls.append(args) or original(*args))
    for is_narrow in (True, False):
        model = tiny_model(memory_write="mean", use_qk_norm=True, dtype=torch.float32 if is_autocast else torch.float64)
        model = model.to(dtype) if is_narrow and not is_autocast else model
        model.config._attn_implementation = "sdpa" if is_narrow else "eager"
        with torch.autocast("cpu", dtype, enabled=is_narrow and is_autocast):
            logits = model(tiny_ids(2, 5 * S + 3), use_cache=False).logits
        logits.double().square().mean().backward()
        gradients.append(torch.cat([parameter.grad.double().flatten() for parameter in model.parameters()]))
        assert calls
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 1 - close


def test_norm_and_attention_under_transforms_and_twice():
    """`torch.func` and gradients of gradients: the norm has them; attention as far as its implementation does."""
    norm = RMTRMSNorm(8, 0.1).double()
    states = torch.randn(3, 8, dtype=torch.float64)

    def loss(row):
        return norm(row).cos().sum()

    by_row = torch.func.vmap(torch.func.grad(loss))(states)
    torch.testing.assert_close(by_row, torch.func.grad(loss)(states), rtol=0, atol=1e-14)
    assert torch.autograd.gradgradcheck(norm, (states.requires_grad_(),))
    model, ids = tiny_model(num_hidden_layers=1), tiny_ids(3, 3 * S)
    embeds = model.model.embed_tokens(ids).detach()
    by_row = torch.func.grad(lambda inputs: model(inputs_embeds=inputs, use_cache=False).logits.square().sum())(embeds)
    embeds.requires_grad_()
    model(inputs_embeds=embeds, use_cache=False).logits.square().sum().backward()
    torch.testing.assert_close(by_row, embeds.grad, rtol=0, atol=1e-11)


class _NoGradient(torch.autograd.Function):
    """Gives its input no gradient at all, not even zeros."""

    @staticmethod
    def forward(ctx, states):
        return states.clone()

    @staticmethod
    def backward(ctx, gradient):
        return None


def test_no_gradient_is_no_gradient(monkeypatch):
    monkeypatch.setattr(layers_rmt, "PIECE", 2)
    norm, states = RMTRMSNorm(4, 0.1).double(), torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    _NoGradient.apply(norm(states)).sum().backward()
    tensors = random_states(1, 4, 0)
    _NoGradient.apply(tiled_attention(*tensors, [Windows(0, 1, 4, 4)], 0.3)).sum().backward()
    others = [torch.randn(1, 4, 2, 8, requires_grad=True) for _ in range(5)]
    share = torch.randn(1, 4, 2, 1, requires_grad=True)
    table = torch.randn(1, 4, 1, 8)
    fused = fuse(Shares(None, share, None), Paths(others[0], others[1], None))
    for made in (swiglu(*others[2:4]), layers_rmt.rotate(others[4], table, table), fused):
        _NoGradient.apply(made).sum().backward()
    assert all(tensor.grad is None for tensor in (states, norm.weight, *tensors, *others, share))


@pytest.mark.parametrize("size", [2**18, 4])
def test_a_frozen_norm_costs_no_gradient(size, monkeypatch):
    monkeypatch.setattr(layers_rmt, "PIECE", size)
    norm, states = RMTRMSNorm(4, 0.1).requires_grad_(False), torch.randn(2, 4, requires_grad=True)
    total = norm(states).sum()
    with Costs() as costs:
        total.backward()
    assert norm.weight.grad is None and states.grad is not None
    assert not costs.operations["sum"]  # none is computed
