"""`torch.export` and ONNX: a prompt, steps and segment ends are the stream, in onnxruntime, for any number of rows."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim
from transformers import LlamaConfig, LlamaForCausalLM

from helpers import CLOSE, FORMS, SIZES, S, read, tiny_ids, tiny_model
from rmt_hf.export import DecodingStep, PromptReader
from rmt_hf.memory_rmt import in_order


pytestmark = pytest.mark.filterwarnings(
    "ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"
)  # torch's

LENGTH = 3 * S + 3  # memory is read
FLOAT32 = {"num_hidden_layers": 1, "dtype": torch.float32}  # one layer: a conversion takes seconds
NEAR = {"rtol": 0, "atol": 1e-5}  # float32: values up to 5, and sums in another order
AS_CONVERTED = {"num_lasting_slots": 0, "use_attention_sink": True, "use_local_attention": False}


def in_onnx(module: nn.Module, arguments: tuple, folder: Path) -> Callable[..., list[torch.Tensor]]:
    """A function of the same arguments, computed by onnxruntime, that gives a flat list of tensors."""
    runtime = pytest.importorskip("onnxruntime", reason='pip install "rmt_hf[tools]"')
    pytest.importorskip("onnxscript", reason='pip install "rmt_hf[tools]"')
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    program = torch.onnx.export(module, arguments, dynamo=True, verbose=False, optimize=False)  # half the time
    program.save(folder / "model.onnx")
    session = runtime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])

    def call(*given) -> list[torch.Tensor]:
        flat = [each for one in given for each in (one if isinstance(one, list) else [one])]
        names = [argument.name for argument in session.get_inputs()]
        feed = {name: tensor.numpy() for name, tensor in zip(names, flat, strict=True)}
        return [torch.from_numpy(array) for array in session.run(None, feed)]

    return call


@pytest.mark.parametrize("name", ["llama", "ours"])
@torch.no_grad()
def test_a_plain_prompt(name, tmp_path) -> None:
    """As users export any model, without a state; a Llama is the yardstick."""
    torch.manual_seed(0)
    sizes = {**SIZES, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes)).eval() if name == "llama" else tiny_model(**FLOAT32)
    model.config.use_cache, ids = False, tiny_ids(2, LENGTH)
    (logits,) = in_onnx(model, (ids,), tmp_path)(ids)
    torch.testing.assert_close(logits, model(ids).logits, **NEAR)


@torch.no_grad()
def test_a_stream_in_onnxruntime(tmp_path) -> None:
    """A prompt, then token after token until the ring has turned."""
    model, ids, more = tiny_model(**AS_CONVERTED, **FLOAT32), tiny_ids(2, LENGTH), tiny_ids(2, 3 * S, seed=1)
    expected, state = read(model, ids)
    _, tensors = PromptReader(model)(ids)
    arguments = ids[:, :1], torch.full((2,), LENGTH), tensors
    steps = [in_onnx(DecodingStep(model, ends), arguments, tmp_path) for ends in (False, True)]
    logits, *tensors = in_onnx(PromptReader(model), (ids,), tmp_path)(ids)
    torch.testing.assert_close(logits, expected[:, -1:], **NEAR)
    for index, column in enumerate(more.split(1, 1)):
        position = LENGTH + index
        logits, *tensors = steps[(position + 1) % S == 0](column, torch.full((2,), position), tensors)
        torch.testing.assert_close(logits, model(column, past_key_values=state).logits, **NEAR)
    for got, want in zip(tensors[4:8], state.layers[0].state.memory, strict=True):
        torch.testing.assert_close(got, want, **NEAR)


@torch.no_grad()
def test_a_program_takes_any_number_of_rows() -> None:
    model, ids = tiny_model(**FLOAT32), tiny_ids(3, LENGTH)
    rows, (_, tensors) = {0: Dim("rows", min=2, max=64)}, PromptReader(model)(ids[:2])
    programs = [
        torch.export.export(PromptReader(model), (ids[:2],), dynamic_shapes=(rows,)),
        torch.export.export(model, (ids[:2],), {"use_cache": False}, dynamic_shapes=(rows, None)),
    ]
    arguments, shapes = (ids[:2, :1], torch.full((2,), LENGTH), tensors), (rows, rows, [rows] * len(tensors))
    for ends in (False, True):
        programs.append(torch.export.export(DecodingStep(model, ends), arguments, dynamic_shapes=shapes))
    reader, plain, step, end = (program.module() for program in programs)
    expected, state = read(model, ids)
    logits, tensors = reader(ids)
    torch.testing.assert_close(plain(ids, use_cache=False).logits, expected, **NEAR)
    torch.testing.assert_close(logits, expected[:, -1:], **NEAR)
    for index in range(S):
        column, position = ids[:, index : index + 1], LENGTH + index
        logits, tensors = (end if (position + 1) % S == 0 else step)(column, torch.full((3,), position), tensors)
        torch.testing.assert_close(logits, model(column, past_key_values=state).logits, **NEAR)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [3, 2 * S, 5 * S + 3])
@torch.no_grad()
def test_a_prompt_is_what_the_model_reads(form, length) -> None:
    model, ids, more = tiny_model(**FORMS[form]), tiny_ids(2, length), tiny_ids(2, S + 1, seed=1)
    expected, state = read(model, ids)
    logits, tensors = PromptReader(model)(ids)
    torch.testing.assert_close(logits, expected[:, -1:], **CLOSE)
    for index, column in enumerate(more.split(1, 1)):
        logits, tensors = DecodingStep(model, True)(column, torch.full((2,), length + index), tensors)
        torch.testing.assert_close(logits, read(model, column, cache=state)[0], **CLOSE)


@pytest.mark.parametrize("name", ["attention_mask", "position_ids"])
def test_what_decides_the_plan_cannot_be_exported(name) -> None:
    model, ids = tiny_model(), tiny_ids(1, 5)
    with pytest.raises(ValueError, match=r"must be None in torch\.export.*Export rows without padding"):
        torch.export.export(model, (ids,), {"use_cache": False, name: torch.ones_like(ids)})


@pytest.mark.parametrize("descending", [False, True])
def test_equal_strengths_keep_their_order_in_an_export(descending) -> None:
    class Order(nn.Module):
        def forward(self, numbers: torch.Tensor) -> torch.Tensor:
            return in_order(numbers, 1, descending)

    numbers = torch.tensor([[3.0, -1e7, 3.0, -torch.inf, 0.0, -torch.inf, 3.0, 1e7]])[..., None].expand(1, 8, 2)
    program = torch.export.export(Order(), (torch.zeros(1, 8, 2),))
    assert torch.equal(program.module()(numbers), in_order(numbers, 1, descending))


@torch.no_grad()
def test_embeddings_can_be_exported() -> None:
    model, ids = tiny_model(num_hidden_layers=1), tiny_ids(2, LENGTH)
    embeds = model.model.embed_tokens(ids)
    program = torch.export.export(model, (), {"inputs_embeds": embeds, "use_cache": False})
    found = program.module()(inputs_embeds=embeds, use_cache=False).logits
    torch.testing.assert_close(found, model(ids).logits, **CLOSE)
