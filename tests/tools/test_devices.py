"""accelerate: weights on a disk, in memory, or on several devices; a model computes the same, and its state stays."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import send_to_device
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from helpers import CLOSE, FORMS, SIZES, S, pad_left, prompts, read, row_state, tiny_ids, tiny_model
from rmt_hf import RMTCache
from rmt_hf.evaluation.ablation import empty_memories, stream_bits
from rmt_hf.evaluation.bits import token_bits
from rmt_hf.layout_rmt import CallLayout


SOME = ("gated select", "two parts", "paper")
SPREAD = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "disk"}
SPREAD |= {"model.rotary_emb": "cpu", "lm_head": "disk"}


def loaded(device_map: Any, **fields: Any) -> Callable:
    """From a folder, as `from_pretrained` spreads it."""

    def load(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
        model.save_pretrained(folder)
        settings = {"device_map": device_map, "offload_folder": folder / "offload", "dtype": torch.float64, **fields}
        return type(model).from_pretrained(folder, **settings).eval()

    return load


def dispatched(device_map: Any) -> Callable:
    return lambda model, folder: dispatch_model(model, device_map, "cpu", offload_dir=folder, force_hooks=True)


WAYS: dict[str, Callable] = {
    "cpu": loaded({"": "cpu"}),
    "disk": loaded({"": "disk"}),
    "auto": loaded("auto", max_memory={"cpu": 60_000}),  # some layers do not fit
    "spread": loaded(SPREAD),
    "cpu_offload": lambda model, folder: cpu_offload(model, torch.device("cpu"), offload_buffers=True),
    "disk_offload": lambda model, folder: disk_offload(model, folder, torch.device("cpu"), offload_buffers=True),
    "dispatch_model": dispatched({"": "cpu"}),
    "dispatch_model to a disk": dispatched({"model": "disk", "lm_head": "cpu"}),
}


def offloaded(way: str, model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    try:
        return WAYS[way](model, folder) or model
    except ValueError as error:
        if "offload the whole model to the disk" not in str(error):
            raise
        pytest.skip("this accelerate puts no whole model on a disk, a Llama neither")


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_a_llama_runs(way, tmp_path) -> None:
    """The yardstick of what follows."""
    torch.manual_seed(0)
    model, ids = LlamaForCausalLM(LlamaConfig(**SIZES)).to(torch.float64).eval(), tiny_ids(2, 20)
    expected = model(ids).logits
    torch.testing.assert_close(offloaded(way, model, tmp_path)(ids).logits, expected, **CLOSE)


@pytest.mark.parametrize(
    ("form", "way"), [*(("two parts", way) for way in WAYS), ("gated select", "disk"), ("paper", "disk")]
)
@torch.no_grad()
def test_forward_generation_and_a_state_across_calls(form, way, tmp_path) -> None:
    plain, batch = tiny_model(**FORMS[form]), pad_left(prompts())
    ids, mask, more = batch["input_ids"], batch["attention_mask"], tiny_ids(5, S + 2, seed=1)
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    logits, state = read(plain, ids, [5, 1], mask=mask)
    logits = torch.cat([logits, read(plain, more, [3, 1], state)[0]], 1)
    answers, loss = plain.generate(**batch, **settings), plain(**batch, labels=ids).loss
    model = offloaded(way, plain, tmp_path)
    found, own = read(model, ids, [5, 1], mask=mask)
    found = torch.cat([found, read(model, more, [3, 1], own)[0]], 1)
    torch.testing.assert_close(found[:, -1], logits[:, -1], **CLOSE)
    torch.testing.assert_close(found[:, : ids.shape[1]][mask], logits[:, : ids.shape[1]][mask], **CLOSE)
    assert torch.equal(model.generate(**batch, **settings), answers)
    torch.testing.assert_close(model(**batch, labels=ids).loss, loss, **CLOSE)


@pytest.mark.parametrize("way", ["cpu", "disk", "cpu_offload"])
def test_a_loss_in_chunks_reads_no_weight_that_is_elsewhere(way, tmp_path) -> None:
    """It was of uninitialised memory, without a word."""
    plain, ids = tiny_model(use_chunked_loss=True, dtype=torch.float32), tiny_ids(2, 20)
    expected = plain(ids, labels=ids).loss
    model = offloaded(way, plain, tmp_path)
    torch.testing.assert_close(model(ids, labels=ids).loss.to(expected), expected)


def tensors_in(given: Any) -> list[torch.Tensor]:
    if isinstance(given, torch.Tensor):
        return [given]
    given = vars(given) if isinstance(given, CallLayout) else given
    parts = given.values() if isinstance(given, dict) else given if isinstance(given, tuple | list) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


@pytest.mark.parametrize("form", SOME)
@torch.no_grad()
def test_all_that_a_layer_is_given_comes_to_its_device(form) -> None:
    """On a machine with one device, `meta` is the other: all is computed there but the numbers."""
    model, seen = tiny_model(**FORMS[form]), []
    for module in (model.model.layers[1], model.model.norm, model.lm_head):
        module.to("meta")
        add_hook_to_module(module, AlignDevicesHook(execution_device="meta"))
    model.model.layers[1].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.extend(tensors_in([args, kwargs])), with_kwargs=True
    )
    batch, cache = pad_left(prompts()), RMTCache(model.config)
    for size in (5, 1, 2 * S):
        columns = {name: tensor[:, :size] for name, tensor in batch.items()}
        assert model(**columns, past_key_values=cache).logits.is_meta
    assert seen and all(tensor.is_meta for tensor in seen)
    assert [layer.state.keys.device.type for layer in cache.layers] == ["cpu", "meta"]


@torch.no_grad()
def test_a_state_goes_to_a_device_and_goes_on_there() -> None:
    model, ids = tiny_model(), tiny_ids(2, 3 * S + 2)
    _, state = read(model, ids)
    before = row_state(state, model.config, 0)
    assert state.to("cpu") is state
    assert all(map(torch.equal, row_state(state, model.config, 0), before))
    assert all(tensor.is_meta for tensor in state.clone().to(torch.device("meta")).tensors())
    elsewhere = state.to("meta")
    assert model.to("meta")(ids[:, :1].to("meta"), past_key_values=elsewhere).logits.is_meta
    assert elsewhere.positions == [3 * S + 3] * 2
    assert not RMTCache(model.config).to("meta").is_initialized


def test_hooks_leave_a_state_where_it_is() -> None:
    """accelerate moves whatever has a method `to`: of inputs to a module, and of what it gives."""
    _, state = read(tiny_model(), tiny_ids(1, 3))
    for given in (state, {"past_key_values": state}, (state,)):
        send_to_device(given, "meta", non_blocking=True)
        send_to_device(given, "meta")
    assert not any(tensor.is_meta for tensor in state.tensors())


@pytest.mark.parametrize("way", ["disk", "cpu_offload", "dispatch_model to a disk"])
@torch.no_grad()
def test_a_saved_state_and_evaluation_of_an_offloaded_model(way, tmp_path) -> None:
    plain, ids = tiny_model(), tiny_ids(2, 3 * S)
    plain.memorize(ids).save_pretrained(tmp_path / "state")
    expected = read(plain, ids[:, :1], cache=plain.memorize(ids))[0]
    bits, conditions = token_bits(plain, ids), stream_bits(plain, ids, {"emptied": empty_memories})
    model = offloaded(way, plain, tmp_path)
    state = RMTCache.from_pretrained(tmp_path / "state", model)
    torch.testing.assert_close(read(model, ids[:, :1], cache=state)[0], expected, **CLOSE)
    torch.testing.assert_close(token_bits(model, ids), bits)
    torch.testing.assert_close(stream_bits(model, ids, {"emptied": empty_memories}), conditions)
