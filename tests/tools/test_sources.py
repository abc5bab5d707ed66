"""A converted folder has what belongs to it; a source that cannot be converted is refused in the right words."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    TorchAoConfig,
)

from helpers import FIELDS, tiny_ids, tiny_tokenizer
from rmt_hf import RMTConfig, RMTForCausalLM
from rmt_hf.conversion import add_memory, convert, main, remove_memory
from rmt_hf.sources import hub_id


pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # PEFT's
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),  # the compiler's
]

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = {"vocab_size": 67, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def llama(model_class: type = LlamaForCausalLM):
    torch.manual_seed(0)
    return model_class(LlamaConfig(**SIZES, **IDS)).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "source")
    tiny_tokenizer("right").save_pretrained(tmp_path / "source")
    return tmp_path / "source"


# What is taken over


def test_the_cache_of_the_source_is_left_behind() -> None:
    source = llama()
    source.generation_config.update(cache_implementation="static", cache_config={"a": 1}, temperature=0.5)
    model, ids = add_memory(source, **FIELDS), tiny_ids(1, 5)
    settings = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 4}
    assert torch.equal(model.generate(ids, **settings), llama().generate(ids, **settings))
    assert model.generation_config.temperature == 0.5
    assert source.generation_config.cache_implementation == "static"  # the source is as it was
    assert remove_memory(model).generation_config.cache_implementation is None


def test_no_path_of_the_user_is_written(folder: Path, tmp_path: Path, monkeypatch) -> None:
    tokenizer, target = AutoTokenizer.from_pretrained(folder), tmp_path / "target"
    assert tokenizer.padding_side == "right"
    monkeypatch.chdir(tmp_path)
    for source in (folder, "source"):
        convert(source, target, **FIELDS)
        for file in target.glob("*.json"):
            assert str(tmp_path) not in file.read_text("utf-8") and '"source"' not in file.read_text("utf-8"), file
        assert AutoTokenizer.from_pretrained(target).padding_side == "left"
        target.rename(tmp_path / f"kept {len(str(source))}")


def test_an_id_of_the_hub_is_kept() -> None:
    source = llama()
    for name, kept in {"someone/model": True, "gpt2": True, "../model": False, "/a/model": False, "": False}.items():
        source.config.name_or_path = name
        config = add_memory(source, **FIELDS).config
        assert (hub_id(source.config) == name) is kept
        assert config.name_or_path == (name if kept else "")  # Trainer's cards have it as the base model
        assert config.converted_from.get("_name_or_path") == (name if kept else None)


def test_a_tokenizer_that_is_broken_is_no_missing_one(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(
        ValueError, match=rf"The tokenizer of {folder} cannot be loaded \(JSONDecodeError.*mend its files"
    ):
        convert(folder, tmp_path / "target", **FIELDS)
    assert not (tmp_path / "target").exists()
    for file in folder.glob("tokenizer*"):
        file.unlink()
    convert(folder, tmp_path / "target", **FIELDS)
    assert not list((tmp_path / "target").glob("tokenizer*"))


def test_a_folder_with_code_opens_where_the_package_is_not(folder: Path, tmp_path: Path) -> None:
    target, ids = tmp_path / "target", tiny_ids(1, 40)
    main([str(folder), str(target), "--segment-length", "8", "--with-code"])
    assert (
        json.loads((target / "config.json").read_text("utf-8"))["auto_map"]["AutoConfig"]
        == "configuration_rmt.RMTConfig"
    )
    assert RMTForCausalLM._auto_class is None and RMTConfig._auto_class is None
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    visit = (
        "import sys; sys.modules['rmt_hf'] = None\n"
        "from safetensors.torch import load_file, save_file; from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(target)!r}, trust_remote_code=True)\n"
        f"logits = model(load_file({str(tmp_path / 'ids.safetensors')!r})['ids']).logits\n"
        f"save_file({{'logits': logits.detach()}}, {str(tmp_path / 'logits.safetensors')!r})\n"
    )
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-I", "-c", visit], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(target)(ids).logits
    # The same products, in files whose weights may be aligned in another way: float32 sums of up to 64 terms.
    torch.testing.assert_close(load_file(tmp_path / "logits.safetensors")["logits"], wanted, rtol=0, atol=1e-5)
    convert(folder, tmp_path / "other", **FIELDS)
    assert not list((tmp_path / "other").glob("*.py"))


# What is refused


def with_value_head() -> torch.nn.Module:
    """As TRL had it: a module with the model and a head beside it."""
    wrapper = torch.nn.Module()
    wrapper.pretrained_model, wrapper.v_head = llama(), torch.nn.Linear(64, 1)
    return wrapper


def with_adapters(inside: bool = False) -> torch.nn.Module:
    peft = pytest.importorskip("peft", reason="adapters need PEFT")
    config, model = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"), llama()
    return (model.add_adapter(config) or model) if inside else peft.get_peft_model(model, config)


def on_meta() -> torch.nn.Module:
    with torch.device("meta"):
        return llama()


def offloaded() -> torch.nn.Module:
    from accelerate import cpu_offload

    return cpu_offload(llama(), execution_device="cpu")


def quantized_by_torch() -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao goes, torchao comes
        return torch.ao.quantization.quantize_dynamic(llama(), {torch.nn.Linear})


REFUSED = {
    "adapters": (with_adapters, "one in adapters of PEFT: merge them first, with merge_and_unload"),
    "adapters inside": (lambda: with_adapters(True), "one that has adapters in it: load it as a PEFT model"),
    "value head": (with_value_head, "one in a wrapper with a value head: give its pretrained_model"),
    "compiled": (lambda: torch.compile(llama()), "one in a wrapper of torch.compile: give the model inside of it"),
    "parallel": (
        lambda: torch.nn.DataParallel(llama()),
        "one in a wrapper that trains it: give the model inside of it",
    ),
    "no model of transformers": (lambda: torch.nn.Linear(1, 1), "a model of transformers, got a Linear"),
    "classifier": (lambda: llama(LlamaForSequenceClassification), "must be a LlamaForCausalLM, got a LlamaForSequence"),
    "no head": (lambda: llama(LlamaModel), "must be a LlamaForCausalLM, got a LlamaModel: load it with AutoModelFor"),
    "meta": (on_meta, "one that has weights on the meta device or offloaded: load it without device_map"),
    "offloaded": (offloaded, "one that has weights on the meta device or offloaded"),
    "quantized by torch": (quantized_by_torch, "one that is quantized: convert the model as it was before"),
    "eight bits": (lambda: llama().to(torch.float8_e4m3fn), "one that is quantized"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_source_that_cannot_be_converted_is_refused_in_the_right_words(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        add_memory(make(), **FIELDS)


@pytest.mark.parametrize("name", ["bitsandbytes 8", "bitsandbytes 4", "torchao"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_quantized_sources_are_refused(name: str, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip(name.split()[0], reason=f"{name} quantizes")
    if name == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        config = TorchAoConfig(Int8WeightOnlyConfig())
    else:
        config = BitsAndBytesConfig(**{f"load_in_{name[-1]}bit": True})
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    message = "one that is quantized: convert the model as it was before, and quantize the result when you load it"
    with pytest.raises(ValueError, match=message):
        add_memory(model, **FIELDS)
    if name != "torchao":
        model.save_pretrained(tmp_path / "quantized")
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / "quantized", tmp_path / "target", **FIELDS)


def test_folders_are_refused_in_the_right_words(folder: Path, tmp_path: Path) -> None:
    value_head = llama().state_dict() | {"v_head.summary.weight": torch.ones(1, 64)}
    llama().save_pretrained(tmp_path / "value head", state_dict=value_head)
    llama(LlamaForSequenceClassification).save_pretrained(tmp_path / "classifier")
    adapters = with_adapters()
    adapters.peft_config["default"].base_model_name_or_path = str(folder)
    adapters.save_pretrained(tmp_path / "adapters", save_embedding_layers=False)
    for name, message in {
        "value head": "v_head.summary.weight. It has a value head: save its pretrained_model, and convert that",
        "classifier": "lm_head.weight. It is no language model, but perhaps a classifier",
        "adapters": "one that has adapters in it: load it as a PEFT model",
    }.items():
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / name, tmp_path / "target", **FIELDS)
    assert not (tmp_path / "target").exists()


def test_what_was_taken_apart_again_is_converted() -> None:
    """Merged adapters, and a model that was compiled in place."""
    merged, compiled = with_adapters().merge_and_unload(), llama()
    compiled.compile()
    ids = tiny_ids(1, 8)
    for source in (merged, compiled):
        torch.testing.assert_close(add_memory(source, **FIELDS)(ids).logits, llama()(ids).logits, rtol=0, atol=1e-5)


def test_the_way_back_is_refused_in_the_same_words() -> None:
    peft = pytest.importorskip("peft", reason="adapters need PEFT")
    model = add_memory(llama(), **FIELDS)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="adapters of PEFT: merge them first"):
        remove_memory(wrapped)
    assert type(remove_memory(wrapped.merge_and_unload())) is LlamaForCausalLM
