"""The script that quantizes a model and its source prints a row for each way, at tiny sizes."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers import SIZES, tiny_tokenizer
from rmt_hf.conversion import add_memory


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:(torch.quantize_per_tensor|TypedStorage):UserWarning")
def test_every_way_is_a_row(tmp_path, monkeypatch, capsys) -> None:
    for name in ("bitsandbytes", "torchao"):
        pytest.importorskip(name, reason='pip install "rmt_hf[tools]"')
    from experiments import quantized

    torch.manual_seed(0)
    source = LlamaForCausalLM(LlamaConfig(**SIZES | {"hidden_size": 128, "intermediate_size": 64}))  # blocks of 64
    source.save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    add_memory(source, segment_length=16).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(quantized, "king_james", lambda: "w7 w8 w9 " * 40)
    paths = [str(tmp_path / "source"), str(tmp_path / "model")]
    quantized.main([*paths, "--tokens", "40", "--threads", "1"])
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert header.count("|") == 6 and [row.split(" | ")[0][2:] for row in rows] == list(quantized.WAYS)
    sizes = [float(row.split(" | ")[3]) for row in rows]
    assert all(size < sizes[0] for size in sizes[1:])
