"""Trains on Shakespeare through a window of a few lines; measures on held-out plays what the memory behind it is worth.

    python -m experiments.train_on_a_book

takes at most 10 minutes on 2 CPU cores, one for the model and one for the model that has no memory. Everything goes to
the folder `--output-dir`: report.md, metrics.json, bits_per_byte.png, and the model with its tokenizer. The texts are
in the public domain; the package that brings them, shakespeare 0.6 (requirements-data.txt), is under the MIT licence.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import pipeline, set_seed

from experiments.comparison import Comparison, logits_in_new_process
from experiments.corpora import shakespeare
from experiments.reports import environment, write_report
from rmt_hf import RMTConfig, RMTForCausalLM, RMTTrainer, RMTTrainingArguments
from rmt_hf.data import cut_into_rows, token_byte_counts, tokenize, train_tokenizer
from rmt_hf.evaluation import token_bits
from rmt_hf.evaluation.ablation import empty_memories, pass_on_memories, stream_bits
from rmt_hf.files import write_whole


def make_config(
    args: argparse.Namespace, ids: dict[str, Any], intermediate_size: int, num_memory_slots: int
) -> RMTConfig:
    return RMTConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden_size // 32,
        chunk_length=16,
        segment_length=32,
        num_lookback_segments=0,
        num_slots_per_chunk=4,
        num_memory_slots=num_memory_slots,
        use_qk_norm=True,
        initializer_range=0.08,
        tie_word_embeddings=True,
        **ids,
    )


def make_models(args: argparse.Namespace, ids: dict[str, Any]) -> tuple[RMTForCausalLM, RMTForCausalLM]:
    """The model, and one without memory whose wider MLP makes up for the parameters of memory."""
    width = round(args.hidden_size * 8 / 3 / 16) * 16
    set_seed(args.seed)
    model = RMTForCausalLM(make_config(args, ids, width, args.memory_slots))
    bare = RMTForCausalLM(make_config(args, ids, width, 0))
    missing = model.num_parameters() - bare.num_parameters()
    width += round(missing / (3 * args.hidden_size * args.layers))
    set_seed(args.seed)
    return model, RMTForCausalLM(make_config(args, ids, width, 0))


def train(model: RMTForCausalLM, documents: Dataset, args: argparse.Namespace) -> str:
    """Trains in place on plain rows; returns size, seconds and loss in words."""
    arguments = RMTTrainingArguments(
        output_dir=str(args.output_dir),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, args.steps // 20),
        weight_decay=0.1,
        adam_beta2=0.99,
        logging_steps=max(1, args.steps // 10),
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=args.seed,  # the same rows in the same order for every model
    )
    trainer = RMTTrainer(model, arguments, train_dataset=cut_into_rows(documents, args.row_length))
    start = time.perf_counter()
    trainer.train()
    model.config.use_cache = True  # the Trainer has switched it off; generation wants it
    loss = float(trainer.state.log_history[-2]["loss"])
    return f"{model.num_parameters():,} parameters, {time.perf_counter() - start:.0f} s, last training loss {loss:.3f}"


def start_other_process(file: Path) -> subprocess.Popen:
    """Trains and measures the model without memory beside this one: two processes of one thread use two cores best."""
    command = [sys.executable, "-m", "experiments.train_on_a_book", *sys.argv[1:], "--no-memory-to", str(file)]
    with file.with_suffix(".log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path("reports/book"))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--row-length", type=int, default=1024, help="tokens of a training row")
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--hidden-size", type=int, default=128, help="a multiple of 32")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--memory-slots", type=int, default=64, help="per layer; a multiple of 8")
    parser.add_argument("--max-documents", type=int, help="texts to train on, and texts to evaluate on")
    parser.add_argument("--document-tokens", type=int, default=16384, help="longest start of a text to evaluate on")
    parser.add_argument("--sample-tokens", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1, help="of each of the two processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-memory-to", type=Path, help=argparse.SUPPRESS)  # train and measure that model only
    args = parser.parse_args()
    start = time.perf_counter()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # numbers next to zero, which closed gates make, are slow on a CPU
    args.output_dir.mkdir(parents=True, exist_ok=True)
    no_memory_file = args.output_dir / "no_memory.safetensors"
    if args.no_memory_to is None:
        other = start_other_process(no_memory_file)

    train_texts, held_out = shakespeare(args.max_documents)
    tokenizer = train_tokenizer(train_texts["text"], args.vocab_size)
    documents = tokenize(train_texts, tokenizer)
    held_out_ids = tokenize(held_out, tokenizer)["input_ids"]
    length = min(args.document_tokens, *map(len, held_out_ids))
    input_ids = torch.tensor([ids[:length] for ids in held_out_ids])
    token_bytes = token_byte_counts(tokenizer)[input_ids[:, 1:]]

    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    model, bare = make_models(args, {name: getattr(tokenizer, name) for name in names})
    if args.no_memory_to is not None:
        summary = train(bare, documents, args)
        return save_file({"bits": token_bits(bare, input_ids)}, args.no_memory_to, {"training": summary})
    training = {"own": train(model, documents, args)}
    ablations = {"empty": empty_memories, "other": pass_on_memories}
    bits = stream_bits(model, input_ids, ablations, show_progress=True)
    if other.wait():
        raise SystemExit(f"Training without memory failed: see {no_memory_file.with_suffix('.log')}")
    with safe_open(no_memory_file, "pt") as file:
        bits["no_memory"], training["no_memory"] = file.get_tensor("bits"), file.metadata()["training"]
    comparison = Comparison(bits, token_bytes, model.config.window_length)

    folder = args.output_dir / "model"
    write_whole(folder, lambda path: [part.save_pretrained(path) for part in (model, tokenizer)])
    probe = input_ids[:1, :2048]
    with torch.no_grad():
        is_identical = torch.equal(model.eval()(probe).logits, logits_in_new_process(folder, probe))
    set_seed(args.seed)
    prompt = held_out[0]["text"][:600]
    generator = pipeline("text-generation", model=str(folder))
    sample = generator(prompt, max_new_tokens=args.sample_tokens, do_sample=True, top_k=40, return_full_text=False)

    num_rows = sum(-(-len(ids) // args.row_length) for ids in documents["input_ids"])
    facts = {
        "trained on": f"{num_rows:,} rows of {args.row_length:,} tokens from {len(train_texts)} texts, "
        f"{args.steps:,} steps of {args.batch_size} rows, the same for both models",
        "measured on": f"the first {length:,} tokens of {', '.join(held_out['title'])}",
        "model (a)": training["own"],
        "model (d), a wider MLP in place of memory": training["no_memory"],
        "saved, and loaded in a new process through the Auto classes": "logits are "
        + ("bit for bit the same" if is_identical else "DIFFERENT"),
        "seconds in all": round(time.perf_counter() - start),
        **environment(("torch", "transformers", "tokenizers", "datasets", "shakespeare")),
    }
    title = f"Shakespeare through a window of {model.config.window_length} tokens"
    write_report(args.output_dir, title, comparison, facts, sample[0]["generated_text"])
    print((args.output_dir / "report.md").read_text("utf-8"))


if __name__ == "__main__":
    main()
