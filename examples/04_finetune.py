"""Trains a model on from where it is, on texts of your own, and says in bits per byte what held-out text gains.

Shows `RMTTrainer` in stream mode on a model with its tokenizer: documents of any length, memory that goes on from step
to step, and checkpoints to resume from. `--texts` is a file (.txt, .md, .jsonl, .csv, .parquet, each also .gz), a
folder, or the name of a data set; the last tenth is held out. Every argument of `RMTTrainingArguments` can be given
besides, and `torchrun` starts it on several devices. A pretrained model gets its memory first, with
05_give_a_model_memory.py. Takes about three minutes on two cores for 100 steps of the model of 02_train_on_a_text.py.

    python examples/04_finetune.py --model reports/text/model --texts book.txt --max_steps 100
"""

from dataclasses import dataclass, field

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed

from rmt_hf import RMTForCausalLM, RMTMemoryCallback, RMTTrainer, RMTTrainingArguments
from rmt_hf.data import token_byte_counts, tokenize
from rmt_hf.evaluation import token_bits
from rmt_hf.texts import read_texts


@dataclass
class Arguments:
    """What is trained, and on what."""

    model: str = field(metadata={"help": "Folder or Hub id of an RMT model and its tokenizer."})
    texts: str = field(metadata={"help": "A file, a folder, or the name of a data set."})
    text_column: str = field(default="text", metadata={"help": "Of rows in .jsonl, .csv, .parquet and data sets."})
    held_out_tokens: int = field(default=8192, metadata={"help": "The most that are evaluated on."})


def hold_out(texts: list[str]) -> tuple[list[str], str]:
    """Texts to train on, and the last tenth of the texts, or of a single one."""
    if len(texts) == 1:
        end = len(texts[0]) - max(1, len(texts[0]) // 10)
        return [texts[0][:end]], texts[0][end:]
    end = len(texts) - max(1, len(texts) // 10)
    return texts[:end], "\n".join(texts[end:])


def main() -> None:
    parser = HfArgumentParser((Arguments, RMTTrainingArguments), description=__doc__.splitlines()[0])
    defaults = {"output_dir": "reports/finetuned", "stream_length": 1024, "learning_rate": 1e-4, "logging_steps": 10}
    parser.set_defaults(**defaults, dataloader_pin_memory=torch.cuda.is_available())
    args, arguments = parser.parse_args_into_dataclasses()
    set_seed(arguments.seed)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if not isinstance(model, RMTForCausalLM):
        raise SystemExit(f"{args.model} has no memory: rmt convert {args.model} TARGET gives it one.")
    texts, held_out = hold_out(read_texts(args.texts, args.text_column))
    documents = tokenize(Dataset.from_dict({"text": texts}), tokenizer)
    ids = tokenizer(held_out, return_tensors="pt", verbose=False).input_ids[:, : args.held_out_tokens]
    num_bytes = token_byte_counts(tokenizer)[ids[:, 1:]].sum().item()
    if not num_bytes:
        raise SystemExit(f"{args.texts} is too short to hold out a tenth of it: give more text.")

    callbacks = [RMTMemoryCallback()] if model.config.num_memory_slots else []  # logs what memory does
    trainer = RMTTrainer(model, arguments, train_dataset=documents, processing_class=tokenizer, callbacks=callbacks)
    before = token_bits(trainer.model, ids).sum().item() / num_bytes
    resume = arguments.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if resume in ("True", "true") else resume)
    after = token_bits(trainer.model, ids).sum().item() / num_bytes
    model.config.use_cache = True  # the Trainer has switched it off; generation wants it
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"Bits per byte of {num_bytes:,} held-out bytes: {before:.4f} before, {after:.4f} after")
        print(f"{trainer.state.global_step} steps; the model and its tokenizer are in {arguments.output_dir}")


if __name__ == "__main__":
    main()
