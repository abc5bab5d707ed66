"""A state on disk: the stream goes on as if nothing had happened, and nothing damaged is ever believed."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import RemoteEntryNotFoundError
from safetensors.torch import load_file, save_file

import rmt_hf.saving_rmt
from helpers import FORMS, S, every_form, pad_left, prompts, read, tiny_ids, tiny_model
from rmt_hf import RMTCache, cards
from rmt_hf.saving_rmt import _record_digest


def ragged_state(model) -> RMTCache:
    batch = pad_left(prompts())
    with torch.no_grad():
        return read(model, batch["input_ids"], mask=batch["attention_mask"])[1]


def assert_same(one: RMTCache, other: RMTCache) -> None:
    """Bit for bit, clock and all."""
    assert one.tensors() and all(map(torch.equal, one.tensors(), other.tensors()))
    clock = ("positions", "num_columns", "num_croppable_columns", "is_stale")
    for name in (*clock, "state_dtype", "fingerprint", "nbytes", "batch_size"):
        assert getattr(one, name) == getattr(other, name), name


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_stream_goes_on_bit_for_bit(form, dtype, tmp_path):
    model = tiny_model(dtype=dtype, **FORMS[form])
    cache = ragged_state(model)
    cache.crop(-1)  # one row goes back into the segment before, so that its prefix is out of date
    cache.save_pretrained(tmp_path / "new" / "folder")
    loaded = RMTCache.from_pretrained(tmp_path / "new" / "folder", model)
    assert_same(loaded, cache)
    # As torch allocates: kernels take another path, and round in another way, where a tensor begins anywhere.
    assert not any(tensor.data_ptr() % 64 for tensor in loaded.tensors())
    with torch.no_grad():
        for state in (cache, loaded):  # the columns that a rewind needs are there as well
            state.crop(-3)
        more = tiny_ids(len(prompts()), 3 * S + 1, seed=3)
        logits, wanted = (read(model, more, (1, 1, S), cache=state)[0] for state in (loaded, cache))
    assert torch.equal(logits, wanted)
    assert_same(loaded, cache)


CONTINUE = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from rmt_hf import RMTCache
torch.set_num_threads(int(sys.argv[4]))
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
cache = RMTCache.from_pretrained(sys.argv[2], model)
ids = torch.arange(3, 3 + 5 * 21).reshape(5, 21) % 64 + 3
with torch.no_grad():
    save_file({"logits": model(ids, past_key_values=cache).logits}, sys.argv[3])
"""


def test_a_stream_goes_on_in_another_process(tmp_path):
    model = tiny_model(dtype=torch.float32)
    cache = ragged_state(model)
    model.save_pretrained(tmp_path / "model")
    cache.save_pretrained(tmp_path / "state")
    paths = [str(tmp_path / name) for name in ("model", "state", "logits.safetensors")]
    subprocess.run([sys.executable, "-c", CONTINUE, *paths, str(torch.get_num_threads())], check=True)
    with torch.no_grad():
        wanted = model(torch.arange(3, 3 + 5 * 21).reshape(5, 21) % 64 + 3, past_key_values=cache).logits
    assert torch.equal(load_file(paths[2])["logits"], wanted)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_a_wider_dtype_and_back_changes_nothing(narrow, tmp_path):
    cache = ragged_state(tiny_model(dtype=narrow))
    wide = cache.clone()
    for layer in wide.layers:
        layer.state = layer.state.cast(torch.float32)
    wide.save_pretrained(tmp_path)
    back = RMTCache.from_pretrained(tmp_path, tiny_model(dtype=torch.float32))
    assert back.state_dtype == torch.float32
    for layer in back.layers:
        layer.state = layer.state.cast(narrow)
    assert_same(back, cache)


def test_a_model_of_another_dtype_goes_on(tmp_path):
    narrow, wide = tiny_model(dtype=torch.float32), tiny_model(dtype=torch.float64)
    ragged_state(narrow).save_pretrained(tmp_path)
    cache, more = RMTCache.from_pretrained(tmp_path, wide), tiny_ids(len(prompts()), S + 3)
    with torch.no_grad():
        logits, _ = read(wide, more, (1,), cache=cache)
        exact, _ = read(wide, more, (1,), cache=ragged_state(wide))
    assert cache.state_dtype == logits.dtype == torch.float64
    torch.testing.assert_close(logits, exact, rtol=0, atol=1e-3)  # the state had been rounded to float32


def test_gradients_are_not_saved(tmp_path):
    model = tiny_model()
    _, cache = read(model, tiny_ids(1, 3 * S))
    assert cache.layers[0].state.keys.requires_grad
    cache.save_pretrained(tmp_path)
    assert not any(tensor.requires_grad for tensor in RMTCache.from_pretrained(tmp_path, model).tensors())


# Files


def files(folder: Path) -> list[str]:
    return sorted(re.sub(r"state-\w{16}\.", "state-*.", path.name) for path in folder.iterdir())


def test_what_is_written(tmp_path):
    model = tiny_model(dtype=torch.float32)
    (tmp_path / "notes.txt").write_text("mine")
    first, second = ragged_state(model), ragged_state(model)
    first.save_pretrained(tmp_path)
    with torch.no_grad():
        read(model, tiny_ids(len(prompts()), 3), cache=second)
    second.save_pretrained(tmp_path)  # over the first
    assert files(tmp_path) == ["README.md", "notes.txt", "rmt_state.json", "state-*.safetensors"]
    record = json.loads((tmp_path / "rmt_state.json").read_text("utf-8"))
    assert (record["format_version"], record["dtype"], record["positions"]) == (3, "torch.float32", second.positions)
    assert record["fingerprint"]["segment_length"] == S
    card = (tmp_path / "README.md").read_text("utf-8")
    assert "5 streams at 6, 11, 24, 10, 44 tokens" in card and f"{second.nbytes:,} bytes" in card
    assert_same(RMTCache.from_pretrained(tmp_path, model), second)


@pytest.mark.parametrize("writer", ["save_file", "Path.replace"])
def test_an_interrupted_save_leaves_the_old_state(writer, tmp_path, monkeypatch):
    model = tiny_model(dtype=torch.float32)
    old, new = ragged_state(model), ragged_state(model)
    old.save_pretrained(tmp_path)
    with torch.no_grad():
        read(model, tiny_ids(len(prompts()), 3), cache=new)

    def fail(*_):
        raise OSError("disk full")

    replace = Path.replace

    def fail_late(self, target):
        return fail() if Path(target).name == "rmt_state.json" else replace(self, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(*((rmt_hf.saving_rmt, writer, fail) if writer == "save_file" else (Path, "replace", fail_late)))
        new.save_pretrained(tmp_path)
    assert_same(RMTCache.from_pretrained(tmp_path, model), old)
    new.save_pretrained(tmp_path)
    assert_same(RMTCache.from_pretrained(tmp_path, model), new)


def test_push_to_hub_uploads_the_folder(monkeypatch):
    model, calls = tiny_model(dtype=torch.float32), []

    def create_repo(self, repo_id, **kwargs):
        calls.append((repo_id, kwargs))
        return type("Url", (), {"repo_id": repo_id})

    def upload_folder(self, *, repo_id, folder_path, **kwargs):
        calls.append((repo_id, files(Path(folder_path)), kwargs))
        return "address of the commit"

    def no_card(*args, **kwargs):
        raise RemoteEntryNotFoundError.__new__(RemoteEntryNotFoundError)

    monkeypatch.setattr(cards, "hf_hub_download", no_card)
    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "create_branch", lambda self, *args, **kwargs: calls.append((*args, kwargs)))
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    assert ragged_state(model).push_to_hub("me/read", private=True, revision="v2") == "address of the commit"
    assert calls == [
        ("me/read", {"private": True, "exist_ok": True}),
        ("me/read", {"branch": "v2", "exist_ok": True}),
        (
            "me/read",
            ["README.md", "rmt_state.json", "state-*.safetensors"],
            {"commit_message": "Upload memory state", "delete_patterns": "state-*.safetensors", "revision": "v2"},
        ),
    ]


# What is refused


@pytest.fixture
def saved(tmp_path) -> Path:
    model = tiny_model(dtype=torch.float32)  # which a state knows as long as it is there
    ragged_state(model).save_pretrained(tmp_path)
    return tmp_path


def edit_record(folder: Path, seal: bool = False, **changes) -> None:
    path = folder / "rmt_state.json"
    record = json.loads(path.read_text("utf-8")) | changes
    if seal:
        record["record_sha256"] = _record_digest(record)
    path.write_text(json.dumps(record))


def edit_tensors(folder: Path, change, **record) -> None:
    """Changes the tensors and makes the record say that this is how they were written."""
    (file,) = folder.glob("state-*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    digest = rmt_hf.saving_rmt.hashlib.sha256(file.read_bytes()).hexdigest()
    edit_record(folder, seal=True, tensor_sha256=digest, **record)


def tensor_file(folder: Path) -> Path:
    (file,) = folder.glob("state-*.safetensors")
    return file


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def set_value(name: str, value: float):
    return lambda tensors: tensors[name].view(-1)[:1].fill_(value)


DAMAGE = {
    "cut tensors": (
        lambda f: tensor_file(f).write_bytes(tensor_file(f).read_bytes()[:-9]),
        "state-.* is not as it was",
    ),
    "a changed byte": (lambda f: flip_a_byte(tensor_file(f)), "state-.*safetensors is not as it was written"),
    "a changed position": (lambda f: edit_record(f, positions=[1, 2, 3, 4, 5]), "rmt_state.json is not as it was"),
    "a cut record": (lambda f: (f / "rmt_state.json").write_text('{"format_ver'), "rmt_state.json cannot be read"),
    "no record": (lambda f: (f / "rmt_state.json").write_text("[]"), "rmt_state.json cannot be read"),
    "another format": (lambda f: edit_record(f, seal=True, format_version=9), "must have format_version 3, got 9"),
    "the first form": (
        lambda f: edit_record(f, seal=True, format_version=1),
        "must have format_version 3, got 1: read it with the version of rmt_hf that wrote it, or let the model read",
    ),
    "NaN": (lambda f: edit_tensors(f, set_value("layers.1.values", torch.nan)), "got NaN .* layers.1.values"),
    "infinite key": (lambda f: edit_tensors(f, set_value("layers.0.keys", torch.inf)), "infinity in layers.0.keys"),
    "infinite strength": (
        lambda f: edit_tensors(f, set_value("layers.0.memory.strengths", torch.inf)),
        "infinity in layers.0.memory.strengths",
    ),
    "a missing tensor": (
        lambda f: edit_tensors(f, lambda tensors: tensors.pop("layers.1.memory.keys")),
        r"1 tensors .* layers.1.memory.keys should be torch.float32 of shape \(5, 8, 2, 8\), got nothing",
    ),
    "a tensor too much": (
        lambda f: edit_tensors(f, lambda tensors: tensors.update(extra=torch.zeros(3))),
        "extra should be .* no tensor at all, got torch.float32",
    ),
    "rows that do not fit": (
        lambda f: edit_tensors(f, lambda tensors: None, positions=[3, 8]),
        r"\(2, 2, 32, 8\), got",
    ),
    "another dtype": (
        lambda f: edit_tensors(f, lambda tensors: tensors.update({k: v.double() for k, v in tensors.items()})),
        "should be torch.float32 .* got torch.float64",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused(name, saved):
    damage, message = DAMAGE[name]
    damage(saved)
    with pytest.raises(ValueError, match=message):
        RMTCache.from_pretrained(saved, tiny_model(dtype=torch.float32))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"segment_length": 16}, "segment_length 8 instead of 16"),
        ({"num_memory_slots": 4}, "num_memory_slots 8 instead of 4"),
        ({"num_lasting_slots": 4}, "num_lasting_slots None instead of 4"),
        ({"lasting_distance": 5}, "lasting_distance 0 instead of 5"),
        ({"num_observing_tokens": 4}, "num_observing_tokens 3 instead of 4"),
        ({"rope_parameters": {"rope_theta": 5000.0}}, "rope_parameters .*10000.* instead of .*5000"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps 1e-06 instead of 1e-05"),
        ({"hidden_act": "gelu"}, "hidden_act silu instead of gelu"),
        ({"intermediate_size": 64}, "intermediate_size 48 instead of 64"),
        ({"use_local_attention": False}, "use_local_attention True instead of False"),
    ],
)
def test_a_state_of_another_configuration_is_refused(fields, message, saved):
    with pytest.raises(ValueError, match=f"a state of this configuration, got one with {message}"):
        RMTCache.from_pretrained(saved, tiny_model(**fields))


def test_a_field_that_changes_nothing_of_a_state_is_no_other_configuration(saved):
    RMTCache.from_pretrained(saved, tiny_model(dtype=torch.float32, use_chunked_loss=True, attention_dropout=0.1))


@pytest.mark.parametrize(
    "name", ["embed_tokens.weight", "layers.1.mlp.up_proj.weight", "layers.0.self_attn.q_proj.weight"]
)
def test_a_state_of_other_weights_is_refused(name, saved):
    """Also those of some steps of training."""
    model = tiny_model(dtype=torch.float32)
    with torch.no_grad():
        model.model.get_parameter(name).add_(1e-4)
    with pytest.raises(ValueError, match=rf"must be of the weights of this model, got .*{name} differs.*check_weights"):
        RMTCache.from_pretrained(saved, model)
    assert RMTCache.from_pretrained(saved, model, check_weights=False).is_initialized
    with pytest.raises(ValueError, match="must be of the weights of this model"):
        RMTCache.from_pretrained(saved, tiny_model(dtype=torch.float32, seed=1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_weights_in_another_dtype_are_no_other_weights(dtype, saved):
    model = tiny_model(dtype=torch.float32).to(dtype)
    assert RMTCache.from_pretrained(saved, model).is_initialized
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.1)
    with pytest.raises(ValueError, match="must be of the weights of this model"):
        RMTCache.from_pretrained(saved, model)


def test_a_state_whose_model_is_gone_is_saved_all_the_same(tmp_path):
    _, cache = read(tiny_model(), tiny_ids(1, 3 * S))
    cache.save_pretrained(tmp_path)
    assert RMTCache.from_pretrained(tmp_path, tiny_model(seed=1)).is_initialized


def test_what_is_not_there_is_said_so(tmp_path):
    with pytest.raises(OSError, match=r"rmt_state.json"):
        RMTCache.from_pretrained(tmp_path, tiny_model())


def test_an_empty_or_a_broken_state_is_not_written(tmp_path):
    model = tiny_model(dtype=torch.float32)
    with pytest.raises(ValueError, match="must have read something, got an empty one"):
        RMTCache(model.config).save_pretrained(tmp_path)
    cache = ragged_state(model)
    cache.layers[1].state.memory.keys[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"must be finite, got NaN or infinity in layers.1.memory.keys"):
        cache.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
