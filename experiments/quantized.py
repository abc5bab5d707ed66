"""What quantization saves and costs: bytes and loss of a converted model beside its source, on the Bible's beginning.

python -m experiments.quantized SOURCE MODEL
"""

import argparse
import io
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TorchAoConfig

import rmt_hf  # noqa: F401  # registers the model
from experiments.corpora import king_james
from rmt_hf.evaluation.bits import token_bits


def load(path: str, quantization: Any = None) -> Any:
    """A model in float32, or quantized as it is loaded."""
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=quantization, dtype=torch.float32).eval()


def load_dynamic(path: str) -> Any:
    """A model whose linear maps torch itself has quantized."""
    return torch.ao.quantization.quantize_dynamic(load(path), {nn.Linear})


FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
WAYS: dict[str, Callable[[str], Any]] = {
    "float32": load,
    "bitsandbytes, 8 bit": partial(load, quantization=BitsAndBytesConfig(load_in_8bit=True)),
    "bitsandbytes, 4 bit (nf4)": partial(load, quantization=BitsAndBytesConfig(**FOUR_BITS)),
    "torchao, int8 weights": partial(load, quantization=TorchAoConfig(Int8WeightOnlyConfig(version=2))),
    "torchao, int8 weights and activations": partial(
        load, quantization=TorchAoConfig(Int8DynamicActivationInt8WeightConfig(version=2))
    ),
    "torch, `quantize_dynamic`": load_dynamic,
}


def megabytes(model: nn.Module) -> float:
    """What a model has as a file, whatever its tensors are; to be asked before it is called."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return len(file.getbuffer()) / 1e6


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source")
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    text = king_james()[: 8 * args.tokens]
    ids = AutoTokenizer.from_pretrained(args.source)(text, return_tensors="pt", verbose=False)["input_ids"]
    print("| | source, MB | loss | ours, MB | loss |\n|---|---:|---:|---:|---:|")
    for name, make in WAYS.items():
        cells = []
        for path in (args.source, args.model):
            model = make(path)
            size = megabytes(model)
            bits = token_bits(model, ids[:, : args.tokens], slice_length=1024)
            cells += [f"{size:.1f}", f"{bits.mean() * math.log(2):.3f}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
