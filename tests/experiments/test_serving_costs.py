"""The script that holds one conversation with two servers prints a row for each, at tiny sizes."""

import os

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers import ROOT, SIZES, TEMPLATE, tiny_tokenizer
from rmt_hf.conversion import add_memory


def test_both_servers_have_a_row_for_each_turn(tmp_path, monkeypatch, capsys) -> None:
    for name in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(name, reason='pip install "rmt_hf[tools]"')
    from experiments import serving

    torch.manual_seed(0)
    source, tokenizer = LlamaForCausalLM(LlamaConfig(**SIZES, eos_token_id=2)), tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    for folder, model in (("source", source), ("model", add_memory(source, segment_length=16))):
        model.save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
    monkeypatch.setattr(serving, "king_james", lambda: "w7 w8 w9 " * 40)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'src'}:{os.environ.get('PYTHONPATH', '')}")
    serving.main(
        [str(tmp_path / "source"), str(tmp_path / "model"), "--turns", "2", "--words", "5", "--new-tokens", "6"]
    )
    _, _, *rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [row[1] for row in rows] == ["1", "2"] * 2 and rows[0][2] == rows[2][2]
    assert all(0 <= float(cell) < 60 for row in rows for cell in row[3:5])  # a tiny model's seconds may be 0.00
