"""bitsandbytes, torchao and torch's own quantization: they quantize what they do of a Llama, memory and gates stay."""

import io
from collections.abc import Callable
from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel, TorchAoConfig

from helpers import read, tiny_ids
from rmt_hf import RMTCache, RMTConfig, RMTForCausalLM
from rmt_hf.adapters import memory_lora_config


# PEFT 0.21 asks transformers 5.23 by names that are old; torch would have users take torchao.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.\w*gradient_checkpointing\w*. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:(torch.quantize_per_tensor|TypedStorage):UserWarning"),
]

# Widths that every quantizer can take: bitsandbytes wants multiples of 64. Three heads, as SmolLM2 has.
SIZES = {"vocab_size": 67, "hidden_size": 192, "intermediate_size": 256, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 3, "eos_token_id": None, "pad_token_id": 0}
FORMS = {
    "default": {},
    "as converted": {"num_lasting_slots": 0, "use_attention_sink": True, "use_local_attention": False},
    "paper": {"fusion_type": "softmax", "memory_write": "mean"},
}
LENGTH = 60  # the ring has turned


def tiny(form: str = "default", **fields) -> RMTForCausalLM:
    torch.manual_seed(0)
    fields = {
        "chunk_length": 4,
        "segment_length": 8,
        "num_memory_slots": 4,
        "num_observing_tokens": 3,
        **SIZES,
        **FORMS[form],
        **fields,
    }
    return RMTForCausalLM(RMTConfig(**fields)).eval()


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def loaded(model: PreTrainedModel, folder, config) -> PreTrainedModel:
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, quantization_config=config).eval()


def bits_and_bytes(model: PreTrainedModel, folder, **fields) -> PreTrainedModel:
    pytest.importorskip("bitsandbytes", reason='pip install "rmt_hf[tools]"')
    return loaded(model, folder, BitsAndBytesConfig(**fields))


def torchao(model: PreTrainedModel, folder, name: str, in_place: bool = False) -> PreTrainedModel:
    quantization = pytest.importorskip("torchao.quantization", reason='pip install "rmt_hf[tools]"')
    config = getattr(quantization, name)(version=2)
    if not in_place:
        return loaded(model, folder, TorchAoConfig(config))
    quantization.quantize_(model, config)
    return model


def dynamic(model: PreTrainedModel, folder) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


QUANTIZERS: dict[str, Callable] = {
    "8 bit": partial(bits_and_bytes, load_in_8bit=True),
    "4 bit": partial(bits_and_bytes, load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "torchao weights": partial(torchao, name="Int8WeightOnlyConfig"),
    "torchao": partial(torchao, name="Int8DynamicActivationInt8WeightConfig"),
    "torchao in place": partial(torchao, name="Int8DynamicActivationInt8WeightConfig", in_place=True),
    "dynamic": dynamic,
}
PURE = ("4 bit", "torchao weights")  # the others scale activations by what else is in the call
every_quantizer = pytest.mark.parametrize("quantizer", QUANTIZERS)


def is_quantized(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    if callable(weight):  # of torch.ao
        return True
    return weight is not None and (type(weight) is not nn.Parameter or not weight.is_floating_point())


def quantized_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if is_quantized(module)}


@every_quantizer
@pytest.mark.parametrize("form", FORMS)
def test_what_is_quantized_is_what_is_in_a_llama(quantizer, form, tmp_path) -> None:
    ours, theirs = (QUANTIZERS[quantizer](model, tmp_path) for model in (tiny(form), llama()))
    assert quantized_names(ours) == quantized_names(theirs) != set()
    kept = [p for name, p in ours.named_parameters() if any(part in name for part in ("memory", "fusion", "sink"))]
    assert kept and all(type(p) is nn.Parameter and p.dtype == torch.float32 for p in kept)


@every_quantizer
@torch.no_grad()
def test_streams_of_a_quantized_model(quantizer, tmp_path) -> None:
    """Logits near those of the model, closer than a tenth of their spread; prompt, steps and `generate` as one call."""
    plain, ids = tiny("default"), tiny_ids(2, LENGTH)
    expected = plain(ids).logits
    model = QUANTIZERS[quantizer](plain, tmp_path)
    logits, _ = read(model, ids, [20, *[1] * 10])
    near = 0.25 if quantizer == "4 bit" else 0.1
    assert (logits - expected).std() < near * expected.std()
    if quantizer in PURE:  # float32
        torch.testing.assert_close(logits, model(ids).logits, rtol=0, atol=1e-4)
    state = model.memorize(ids)
    answers = model.generate(ids[:, :3], past_key_values=state, max_new_tokens=12, do_sample=False)
    assert isinstance(state, RMTCache) and answers.shape == (2, 15)
    assert state.positions == [LENGTH + 3 + 12] * 2


@pytest.mark.parametrize("quantizer", list(QUANTIZERS)[:4])
@torch.no_grad()
def test_saved_and_loaded_quantized(quantizer, tmp_path) -> None:
    model, ids = QUANTIZERS[quantizer](tiny("as converted"), tmp_path / "plain"), tiny_ids(1, LENGTH)
    # Before the model is called: on a CPU bitsandbytes lays 4-bit weights out anew in the first call without gradients.
    model.save_pretrained(tmp_path)
    again = RMTForCausalLM.from_pretrained(tmp_path).eval()
    assert quantized_names(again) == quantized_names(model)
    assert torch.equal(again(ids).logits, model(ids).logits)


@torch.no_grad()
def test_weights_of_torch_quantization_are_saved_and_loaded(tmp_path) -> None:
    model, ids, file = dynamic(tiny(), tmp_path), tiny_ids(1, LENGTH), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again = dynamic(tiny(initializer_range=0.1), tmp_path)
    again.load_state_dict(torch.load(file, weights_only=False))
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_loss_in_chunks_knows_a_quantized_projection(tmp_path) -> None:
    """It works on plain weights alone; others give logits."""
    model, ids = QUANTIZERS["torchao in place"](tiny(use_chunked_loss=True), tmp_path), tiny_ids(1, LENGTH)
    outputs = model(ids, labels=ids)
    assert outputs.logits is not None and outputs.loss.isfinite()


def learn(model: PeftModel, steps: int = 4) -> list[float]:
    """Losses of a few steps on one batch."""
    ids, losses = tiny_ids(2, LENGTH), []
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=0.01)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in learned)
        optimizer.step()
        losses.append(loss.item())
    return losses


prepare_for_training = partial(prepare_model_for_kbit_training, gradient_checkpointing_kwargs={"use_reentrant": False})


@pytest.mark.parametrize("quantizer", ["8 bit", "4 bit", "torchao weights"])
@pytest.mark.parametrize("memory_only", [False, True])
def test_an_adapter_learns_on_quantized_weights(quantizer, memory_only, tmp_path) -> None:
    """QLoRA: losses fall as with a Llama, memory and fusion have moved, and the adapter is loaded without loss."""

    def base() -> PreTrainedModel:
        return prepare_for_training(QUANTIZERS[quantizer](tiny(), tmp_path / "base"))

    model = get_peft_model(base(), memory_lora_config(tiny().config, memory_only, r=4))
    before = {name: parameter.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("memory" in name for name in before) and any("fusion" in name for name in before)
    losses = learn(model)
    assert losses[-1] < losses[0] - (0.01 if memory_only else 0.1)
    moved = [
        name for name, parameter in model.named_parameters() if name in before and (parameter != before[name]).any()
    ]
    assert set(moved) == set(before)
    model.save_pretrained(tmp_path)
    ids, again = tiny_ids(1, LENGTH), PeftModel.from_pretrained(base(), tmp_path).eval()
    assert torch.equal(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_a_llama_learns_on_quantized_weights(tmp_path) -> None:
    """The yardstick of the test above."""
    model = prepare_for_training(QUANTIZERS["8 bit"](llama(), tmp_path))
    losses = learn(get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", target_modules="all-linear")))
    assert losses[-1] < losses[0] - 0.1
