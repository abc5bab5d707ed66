"""Gives a pretrained model a memory, calibrates it, and teaches it with the model itself, which sees everything.

Shows `add_memory`, `calibrate` and `DistillationTrainer`. The teacher reads whole rows; the student reads them through
a window of 256 tokens, and learns to predict as the teacher does. Rows are slices of your texts, each `--texts` equally
often, and documents in which facts are told and asked for later. Only what is new is trained, a thousandth of the
parameters; `--lora` adds LoRA on all projections. It goes on where it was stopped. At most an hour on two cores with
SmolLM2-135M; `--bf16` is quicker where the processor has it.

    python examples/05_teach_a_memory.py HuggingFaceTB/SmolLM2-135M-Instruct --texts books/ code/ chats/
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, default_data_collator
from transformers.trainer_utils import get_last_checkpoint

from rmt_hf import RMTForCausalLM
from rmt_hf.adapters import memory_lora_config
from rmt_hf.conversion import add_memory, calibrate, freeze_base
from rmt_hf.facts import teaching_rows
from rmt_hf.files import write_whole
from rmt_hf.texts import read_texts
from rmt_hf.training import RMTTrainingArguments
from rmt_hf.training.distillation import DistillationTrainer, parameter_groups


def calibrated(args: argparse.Namespace, source, tokenizer, groups: list[list[str]]) -> RMTForCausalLM:
    """The converted model, whose score is fitted once and kept."""
    folder = args.output_dir / "calibrated"
    if not folder.exists():
        length = args.segment_length
        model = add_memory(source, segment_length=length, num_lasting_slots=2 * length)
        calibrate(model, groups[0], tokenizer, num_documents=args.calibration_documents)
        write_whole(folder, lambda path: [part.save_pretrained(path) for part in (model, tokenizer)])
    return RMTForCausalLM.from_pretrained(folder, dtype=torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="folder or Hub id of a Llama, Mistral, Qwen2 or Qwen3 model")
    parser.add_argument("--texts", type=Path, nargs="+", required=True, help="files or folders; the first calibrates")
    parser.add_argument("--output-dir", type=Path, default=Path("reports/taught"))
    parser.add_argument("--segment-length", type=int, default=128, help="half of the window, a quarter of the slots")
    parser.add_argument("--stages", nargs="+", default=["1024:20", "2048:60"], metavar="TOKENS:ROWS")
    parser.add_argument("--lora", action="store_true", help="train low-rank updates of all projections, too")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="a quarter of it suits LoRA")
    parser.add_argument("--label-weight", type=float, default=8.0, help="of a token of an answer")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--calibration-documents", type=int, default=24)
    parser.add_argument("--save-steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    source = AutoModelForCausalLM.from_pretrained(args.source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.source)
    groups = [list(read_texts(path)) for path in args.texts]
    stages = [(int(length), int(count)) for length, _, count in (stage.partition(":") for stage in args.stages)]
    model = calibrated(args, source, tokenizer, groups)
    print(freeze_base(model))
    trained = get_peft_model(model, memory_lora_config(model.config, r=16, lora_alpha=32)) if args.lora else model
    optimizer = torch.optim.AdamW(parameter_groups(trained, args.learning_rate), betas=(0.9, 0.98), weight_decay=0.0)
    arguments = RMTTrainingArguments(
        output_dir=str(args.output_dir / "training"),
        per_device_train_batch_size=1,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        warmup_steps=10,
        lr_scheduler_type="cosine",
        logging_steps=5,
        save_steps=args.save_steps,
        save_total_limit=1,
        report_to="none",
        bf16=args.bf16,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
    )
    trainer = DistillationTrainer(
        trained,
        arguments,
        train_dataset=Dataset.from_list(list(teaching_rows(groups, tokenizer, stages))),
        data_collator=default_data_collator,
        teacher=source,
        label_weight=args.label_weight,
        optimizers=(optimizer, None),
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(arguments.output_dir) is not None or None)
    model = trained.merge_and_unload() if args.lora else model
    model.config.use_cache = True  # the Trainer has switched it off; generation wants it
    folder = args.output_dir / "model"
    write_whole(folder, lambda path: [part.save_pretrained(path) for part in (model, tokenizer)])
    print(f"Saved in {folder}: AutoModelForCausalLM.from_pretrained loads it.")


if __name__ == "__main__":
    main()
