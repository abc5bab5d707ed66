"""What a layer costs, counted and not timed, so that any machine sees a regression; and what a GPU would wait for.

The numbers were read off this test, with the pinned torch. They are upper bounds: whoever lowers one writes the lower
number here. A count of less than 95 % fails too: it means a count that misses operations, or a number to be lowered.
"""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rmt_hf import RMTCache, RMTConfig, RMTForCausalLM


PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
KERNEL = "_scaled_dot_product_flash_attention_for_cpu"
TOKENS_OF_A_RING = 64  # as many are read before the ring of `make_model` is full, with the window


class Costs(TorchDispatchMode):
    """Counts operations by name, and bytes of results, both without views."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        made = [leaf for leaf in tree_leaves(result) if torch.is_tensor(leaf)]
        new = [leaf for leaf in made if leaf.untyped_storage()._cdata not in given]
        name = function._schema.name.removeprefix("aten::")
        if new or name.endswith("_"):  # no view
            self.operations[name] += 1
        self.bytes += sum(leaf.nbytes for leaf in new)
        return result


def make_model(num_layers: int, **fields) -> RMTForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": num_layers}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"chunk_length": 4, "segment_length": 8, "num_memory_slots": 8, "num_observing_tokens": 4}
    return RMTForCausalLM(RMTConfig(**(sizes | fields)))


def step_costs(num_layers: int, position: int = 75, num_rows: int = 1, **fields) -> Costs:
    """A decoding step, which leaves `position` tokens behind it."""
    model, token = make_model(num_layers, **fields).eval(), torch.full((num_rows, 1), 3)
    with torch.no_grad():
        cache = model.memorize(torch.randint(64, (num_rows, position - 1)))
        with Costs() as costs:
            model(token, past_key_values=cache)
    return costs


def training_costs(num_layers: int, length: int = 128, **fields) -> Costs:
    """Forward and backward pass of one row."""
    model, ids = make_model(num_layers, **fields).train(), torch.randint(64, (1, length))
    with Costs() as costs:
        model(ids, labels=ids, use_cache=False).loss.backward()
    return costs


def prefill_costs(num_layers: int, length: int = 128, **fields) -> Costs:
    """A prompt that begins a stream."""
    model, ids = make_model(num_layers, **fields).eval(), torch.randint(64, (1, length))
    with torch.no_grad(), Costs() as costs:
        model(ids, past_key_values=RMTCache(model.config), logits_to_keep=1)
    return costs


def per_layer(measure: Callable[..., Costs], **arguments) -> tuple[Counter[str], int]:
    """Operations and bytes that one more layer costs."""
    three, two = measure(3, **arguments), measure(2, **arguments)
    return three.operations - two.operations, three.bytes - two.bytes


@pytest.mark.parametrize(
    ("measure", "arguments", "operations", "size"),
    [
        (step_costs, {}, 57, 4_040),
        (step_costs, {"position": 79, "num_lasting_slots": 4}, 61, 7_400),  # its query is kept: soon there is a write
        (step_costs, {"position": 80}, 220, 35_094),  # a write
        (step_costs, {"position": 80, "num_lasting_slots": 4}, 355, 49_423),
        (step_costs, {"use_qk_norm": False}, 45, 3_416),
        (prefill_costs, {}, 391, 858_513),
        (training_costs, {}, 853, 3_100_660),
        (training_costs, {"num_memory_slots": 0}, 208, 2_068_100),
    ],
)
def test_a_layer_costs_what_it_did(measure, arguments, operations, size) -> None:
    found, made = per_layer(measure, **arguments)
    for number, most in ((found.total(), operations), (made, size)):
        assert 0.95 * most <= number <= most, (found.total(), made)


@pytest.mark.parametrize("num_rows", [1, 3])
def test_kernels_of_a_step(num_rows) -> None:
    """Prefix and window are one attention, the own chunk another one; weights: attention, MLP, score and local gate."""
    found, _ = per_layer(step_costs, num_rows=num_rows)
    assert found[KERNEL] == 2 and sum(found[name] for name in PRODUCTS) == 4 + 3 + 2


@pytest.mark.parametrize("offset", range(8))
def test_a_step_costs_the_same_anywhere_in_the_stream(offset) -> None:
    near, far = (step_costs(2, TOKENS_OF_A_RING + 8 + offset + more) for more in (0, 64 * 8))
    assert near.operations == far.operations and near.bytes == far.bytes and near.operations.total() > 2 * 45


@pytest.mark.parametrize("length", [TOKENS_OF_A_RING, 8 * TOKENS_OF_A_RING])
def test_kernels_of_a_training_step_do_not_depend_on_length(length) -> None:
    """One for what sees no memory, one for each write until the ring is full, where it stays; one for all chunks."""
    found, _ = per_layer(training_costs, length=length)
    assert found[KERNEL] == found[KERNEL + "_backward"] == 1 + 4 + 1
    assert sum(found[name] for name in ("mm", "addmm")) == 3 * 9  # nine weights: forward, and two backward


def test_bytes_of_a_training_step_grow_as_its_length() -> None:
    sizes = [training_costs(2, length).bytes for length in (256, 512, 1024)]
    assert (sizes[2] - sizes[1]) / (sizes[1] - sizes[0]) == pytest.approx(2, rel=0.02)


def test_the_gate_takes_one_step_for_a_whole_ring() -> None:
    """Longer rows add rounds of the recurrence, one for M / K = 4 segments, and no other operation."""
    more = training_costs(2, 512).operations - training_costs(2, 256).operations
    rounds = (512 - 256) // (4 * 8)
    assert more["sigmoid"] == 2 * rounds and more["lerp"] % (2 * rounds) == 0
    assert not any(more[name] for name in (*PRODUCTS, KERNEL))


@pytest.mark.parametrize("fields", [{}, {"fusion_type": "softmax"}, {"memory_write": "mean"}, {"num_memory_slots": 0}])
def test_a_step_reads_nothing_back_from_a_device(fields) -> None:
    """On the meta device there is nothing to read: `.item()` and shapes that depend on data raise there.

    Two segment ends are passed. Ids are checked in prompts only, since that reads them.
    """
    with torch.device("meta"):
        model, ids = make_model(2, **fields).eval(), torch.zeros(2, 43, dtype=torch.long)
        with torch.no_grad():
            cache = model(ids, use_cache=True).past_key_values
            for _ in range(20):
                logits = model(ids[:, :1], past_key_values=cache, logits_to_keep=1).logits
    assert logits.is_meta and cache.positions == [63, 63]


def test_a_step_waits_for_no_number_to_arrive(monkeypatch) -> None:
    """`torch.tensor` with a device waits until a GPU has done all before; a segment end and two plans are passed."""
    model, ids, original = make_model(1).eval(), torch.zeros(2, 43, dtype=torch.long), torch.tensor

    def tensor(*args, device=None, **kwargs):
        assert device is None
        return original(*args, **kwargs)

    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        monkeypatch.setattr(torch, "tensor", tensor)
        for _ in range(10):
            model(ids[:, :1], past_key_values=cache, logits_to_keep=1)
    assert cache.positions == [53, 53]


def test_ids_are_checked_in_prompts_only_where_that_costs_a_read(monkeypatch) -> None:
    checked = []
    monkeypatch.setattr("rmt_hf.layout_rmt.check_ids", lambda ids, size: checked.append(ids.shape[1]))
    with torch.device("meta"), torch.no_grad():
        model, ids = make_model(1).eval(), torch.zeros(2, 43, dtype=torch.long)
        cache = model(ids, use_cache=True).past_key_values
        model(ids[:, :1], past_key_values=cache)
    assert checked == [43]
