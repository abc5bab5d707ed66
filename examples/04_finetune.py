"""Trains a model on text, from scratch or on from one that is there, as streams: memory goes on from step to step.

    python examples/04_finetune.py --source book.txt --output_dir runs/book --stream_length 512 --bptt_segments 1 \
        --config_overrides hidden_size=256,num_hidden_layers=4,num_attention_heads=8 --max_steps 1000

`--source` is a text file, a folder of text files, or the name of a data set. `--model_name_or_path`, a folder or a Hub
id, goes on from a model with its tokenizer; without it, both are made. Every argument of `RMTTrainingArguments` can be
given; a JSON or YAML file with arguments can take their place. Afterwards the model, its tokenizer and metrics.json are
in the folder `--output_dir`; evaluation is in bits per byte of the texts that were held out.
"""

import json
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, PreTrainedTokenizerFast, set_seed

from rmt_hf import RMTConfig, RMTForCausalLM, RMTMemoryCallback, RMTTrainingArguments, StreamSchedule
from rmt_hf.data import train_tokenizer
from rmt_hf.report import environment, write_whole
from rmt_hf.text_training import hold_out, read_texts, text_trainer, tokenize_texts


@dataclass
class ModelArguments:
    """What is trained."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A folder or Hub id to go on from; None begins with a new model."}
    )
    config_overrides: str = field(
        default="", metadata={"help": "Of a new model: fields of RMTConfig as name=value,name=value."}
    )
    vocab_size: int = field(default=4096, metadata={"help": "Of a new model, whose tokenizer is trained on the texts."})


@dataclass
class DataArguments:
    """What it is trained on, and how."""

    source: str = field(metadata={"help": "A text file, a folder of *.txt files, or a name for datasets.load_dataset."})
    eval_source: str | None = field(
        default=None, metadata={"help": "Texts to evaluate on; None holds out the last ones of the source."}
    )
    dataset_configuration: str | None = field(default=None, metadata={"help": "Of a data set."})
    dataset_split: str = field(default="train", metadata={"help": "Of a data set."})
    text_column: str = field(default="text", metadata={"help": "Of a data set."})
    held_out_share: float = field(default=0.1, metadata={"help": "Of the texts; of a single text, its end."})
    stages: str = field(
        default="",
        metadata={"help": "A curriculum: first step, stream length, bptt segments of each stage, as 0,64,0;500,512,2."},
    )
    log_memory: bool = field(default=True, metadata={"help": "Whether what memory does is logged, too."})


def parse_overrides(text: str) -> dict[str, object]:
    """Fields of `RMTConfig` from name=value,name=value; values are JSON, or strings as they are."""
    fields: dict[str, object] = {}
    for part in filter(None, text.split(",")):
        name, sign, value = part.partition("=")
        if not sign or name not in RMTConfig.__dataclass_fields__:
            raise ValueError(f"config_overrides must be name=value with fields of RMTConfig, got {part!r}.")
        try:
            fields[name] = json.loads(value)
        except json.JSONDecodeError:
            fields[name] = value
    return fields


def load_tokenizer(name: str | None, output_dir: str, texts: Dataset, vocab_size: int) -> PreTrainedTokenizerFast:
    """The tokenizer of a model, or that of the run that is resumed, or a new one."""
    if name is None and (Path(output_dir) / "tokenizer.json").is_file():
        name = output_dir
    return train_tokenizer(texts["text"], vocab_size) if name is None else AutoTokenizer.from_pretrained(name)


def load_model(args: ModelArguments, tokenizer: PreTrainedTokenizerFast) -> RMTForCausalLM:
    """The model to train, in float32."""
    overrides = parse_overrides(args.config_overrides)
    if args.model_name_or_path is None:
        special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return RMTForCausalLM(RMTConfig(vocab_size=len(tokenizer), **special, **overrides))
    if overrides:
        raise ValueError("config_overrides are for a new model: leave them out, or leave out model_name_or_path.")
    model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype=torch.float32)
    if not isinstance(model, RMTForCausalLM):
        raise ValueError(
            f"model_name_or_path must be an RMT model, got a {type(model).__name__}: give it a memory first, with "
            "python -m rmt_hf.conversion SOURCE TARGET."
        )
    return model


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, RMTTrainingArguments), description=__doc__)
    if len(sys.argv) == 2 and sys.argv[1].endswith((".json", ".yaml", ".yml")):
        model_args, data_args, arguments = parser.parse_yaml_file(sys.argv[1])
    else:
        model_args, data_args, arguments = parser.parse_args_into_dataclasses()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    facts = environment(("torch", "transformers", "datasets"))
    if arguments.stream_length is None:
        raise ValueError("stream_length must be given: a multiple of segment_length, so that memory is carried along.")
    set_seed(arguments.seed)

    texts = read_texts(
        data_args.source, data_args.dataset_configuration, data_args.dataset_split, data_args.text_column
    )
    if data_args.eval_source is None:
        texts, held_out = hold_out(texts, data_args.held_out_share)
    else:
        held_out = read_texts(data_args.eval_source, column=data_args.text_column)
    name = model_args.model_name_or_path
    tokenizer = load_tokenizer(name, arguments.output_dir, texts, model_args.vocab_size)
    model = load_model(model_args, tokenizer)
    documents, held_out = (tokenize_texts(data, tokenizer) for data in (texts, held_out))

    callbacks = [RMTMemoryCallback()] if data_args.log_memory and model.config.num_memory_slots else []
    if data_args.stages:
        callbacks.append(StreamSchedule([[*map(int, part.split(","))] for part in data_args.stages.split(";")]))
    trainer = text_trainer(model, documents, arguments, held_out, callbacks=callbacks, tokenizer=tokenizer)
    if trainer.is_world_process_zero():
        tokenizer.save_pretrained(arguments.output_dir)
    resume = arguments.resume_from_checkpoint
    trained = trainer.train(resume_from_checkpoint=True if resume in ("True", "true") else resume)
    metrics = trained.metrics | trainer.evaluate()
    model.config.use_cache = True  # the Trainer has switched it off; generation wants it
    trainer.save_model()
    if trainer.is_world_process_zero():
        text = json.dumps({"metrics": metrics, "environment": facts, "log": trainer.state.log_history}, indent=1)
        write_whole(Path(arguments.output_dir) / "metrics.json", lambda path: path.write_text(text, "utf-8"))
        print(json.dumps({"steps": trainer.state.global_step, **metrics}))


if __name__ == "__main__":
    main()
