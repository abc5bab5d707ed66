"""Does training stay finite, and does gradient through many segments? Ten thousand steps of a tiny model, watched.

`python -m experiments.stability` trains in stream mode on Shakespeare, once for each precision, and looks at every
loss, gradient, parameter and stream after every step; then it takes gradients through rows of 1, 2, 4, ... segments,
with the model as it began and as it ended. Writes stability.json and stability.png.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback, set_seed

from experiments.corpora import shakespeare
from experiments.reports import environment
from rmt_hf.configuration_rmt import RMTConfig
from rmt_hf.data import tokenize, train_tokenizer
from rmt_hf.files import write_whole
from rmt_hf.modeling_rmt import RMTForCausalLM
from rmt_hf.training.arguments import RMTTrainingArguments
from rmt_hf.training.trainer import RMTTrainer


STREAM_LENGTH = 64  # tokens of a slice, four segments
BPTT_SEGMENTS = 4
NUM_STREAMS = 4
WARMUP_STEPS = 100
PRECISIONS = ("float32", "bfloat16")  # the second one is autocast


def tiny_config(vocab_size: int) -> RMTConfig:
    """Two layers of 64; segments of 16, a ring of eight writes."""
    return RMTConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        chunk_length=8,
        segment_length=16,
        num_memory_slots=16,
        initializer_range=0.08,
    )


def documents(vocab_size: int, max_documents: int | None) -> Dataset:
    """The training texts of Shakespeare as `input_ids`, cut by a byte-level tokenizer of this size without padding."""
    texts, _ = shakespeare(max_documents)
    return tokenize(texts, train_tokenizer(texts["text"], vocab_size + 1))


def non_finite(named: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    """Names of the tensors that hold a number that is not finite."""
    return [name for name, tensor in named if not tensor.isfinite().all()]


def stream_tensors(trainer: RMTTrainer) -> list[tuple[str, torch.Tensor]]:
    """What the streams carry, by name; the strength -inf of slots that were never written counts as zero."""
    cache, named = trainer.stream_state.state, []
    for index, layer in enumerate([] if cache is None else cache.layers):
        if layer.state is None:
            continue
        keys, values, scores, queries, *memories = layer.state
        named += [("keys", keys), ("values", values), ("scores", scores), ("queries", queries)]
        for memory in memories:
            strengths = memory.strengths.masked_fill(memory.strengths == -torch.inf, 0)
            named += [("slot keys", memory.keys), ("slot values", memory.values), ("slot strengths", strengths)]
        named[-10:] = [(f"{name} of layer {index} of the streams", tensor) for name, tensor in named[-10:]]
    return named


@dataclass
class Watch(TrainerCallback):
    """Looks at everything at every step, and ends the training at the first number that is not finite.

    Args:
        trainer: Whose training it is; set before it begins.
        found: Names of what was not finite, empty while all is well.
        losses: Of each step.
        gradient_norms: Of each step, before clipping.
    """

    trainer: RMTTrainer | None = None
    found: list[str] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.found += non_finite((f"gradient of {name}", p.grad) for name, p in named if p.grad is not None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found += non_finite(kwargs["model"].named_parameters())
        if self.trainer is not None:
            self.found += non_finite(stream_tensors(self.trainer))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        self.losses.append(logs["loss"])
        self.gradient_norms.append(logs["grad_norm"])
        self.found += [name for name in ("loss", "grad_norm") if not math.isfinite(logs[name])]
        if self.found:
            control.should_training_stop = True


def train(model: RMTForCausalLM, data: Dataset, precision: str, args: argparse.Namespace) -> dict[str, Any]:
    """Trains in place; what was seen, ready for JSON."""
    arguments = RMTTrainingArguments(
        output_dir=str(args.output_dir),
        stream_length=STREAM_LENGTH,
        bptt_segments=BPTT_SEGMENTS,
        per_device_train_batch_size=NUM_STREAMS,
        max_steps=args.steps,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=WARMUP_STEPS,
        weight_decay=0.1,
        adam_beta2=0.99,
        logging_steps=1,
        logging_nan_inf_filter=False,  # which would hide what is looked for
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=args.seed,
        bf16=precision == "bfloat16",
    )
    watch = Watch()
    watch.trainer = trainer = RMTTrainer(model, arguments, train_dataset=data, callbacks=[watch])
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    trainer.train()
    return {
        "steps": trainer.state.global_step,
        "non_finite": sorted(set(watch.found)),
        "loss": window_means(watch.losses),
        "gradient_norm": window_means(watch.gradient_norms),
        "largest_gradient_norm": max(watch.gradient_norms),
        "largest_parameter": max(parameter.abs().max().item() for parameter in model.parameters()),
        "seconds": round(time.perf_counter() - start),
    }


def window_means(values: list[float], num_windows: int = 100) -> list[float]:
    """Means of at most so many stretches of equal length."""
    size = math.ceil(len(values) / num_windows)
    return [statistics.fmean(values[start : start + size]) for start in range(0, len(values), size)]


def gradient_norms(model: RMTForCausalLM, stream: torch.Tensor, num_segments: list[int]) -> list[dict[str, float]]:
    """Gradients through rows of so many segments.

    Args:
        model: Left as it is.
        stream: (1, T) int64, at least as long as the longest row; rows are its first tokens.
        num_segments: Lengths of the rows.

    Returns:
        For each length, the norm of the gradient of the mean loss of the row with respect to all parameters, and that
        of the loss of the last segment alone with respect to the embeddings of the first segment.
    """
    segment, figures = model.config.segment_length, []
    embeddings = model.get_input_embeddings()
    for number in num_segments:
        ids = stream[:, : number * segment]
        inputs = embeddings(ids).detach().requires_grad_()
        last = ids.clone()
        last[:, :-segment] = -100
        (from_first,) = torch.autograd.grad(model(inputs_embeds=inputs, labels=last).loss, inputs)
        parameters = [p for p in model.parameters() if p.requires_grad]
        of_all = torch.autograd.grad(model(ids, labels=ids).loss, parameters, allow_unused=True)
        total = torch.stack([gradient.norm() for gradient in of_all if gradient is not None]).norm()
        figures.append(
            {
                "segments": number,
                "all_parameters": total.item(),
                "first_segment_from_last": from_first[:, :segment].norm().item(),
            }
        )
    return figures


def run(precision: str, data: Dataset, args: argparse.Namespace) -> dict[str, Any]:
    """Trains one model and takes its gradients through rows of growing length, in float32, before and after."""
    set_seed(args.seed)
    model = RMTForCausalLM(tiny_config(args.vocab_size))
    lengths = [2**power for power in range(args.longest_row.bit_length()) if 2**power <= args.longest_row]
    ids = next(row for row in data["input_ids"] if len(row) >= lengths[-1] * model.config.segment_length)
    stream = torch.tensor([ids[: lengths[-1] * model.config.segment_length]])
    before = gradient_norms(model.eval(), stream, lengths)
    figures = train(model, data, precision, args)
    after = gradient_norms(model.eval(), stream, lengths)
    return {
        "precision": precision,
        **figures,
        "parameters": model.num_parameters(),
        "gradients": {"before training": before, "after training": after},
    }


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Loss and gradient norm over steps, and gradient norms over the number of segments. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7), layout="constrained")
    (losses, norms), (of_all, of_first) = figure.subplots(2, 2)
    for color, run in enumerate(runs):
        for axes, name in ((losses, "loss"), (norms, "gradient_norm")):
            steps = [(index + 1) * run["steps"] / len(run[name]) for index in range(len(run[name]))]
            axes.plot(steps, run[name], color=f"C{color}", label=run["precision"])
        for axes, name in ((of_all, "all_parameters"), (of_first, "first_segment_from_last")):
            for style, (when, points) in zip(("o--", "o-"), run["gradients"].items(), strict=True):
                lengths, values = ([point[key] for point in points] for key in ("segments", name))
                label = f"{when}, {run['precision']}"
                axes.plot(lengths, values, style, color=f"C{color}", label=label)
    losses.set(title="Training loss, means of steps", xlabel="step")
    norms.set(title="Gradient norm before clipping, means of steps", xlabel="step", yscale="log")
    of_all.set(title="Gradient norm of the mean loss of a row, all parameters", xlabel="segments of the row")
    of_first.set(title="Gradient of the last segment's loss at the first segment", xlabel="segments of the row")
    for axes in (of_all, of_first):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
    for axes in (losses, norms, of_all, of_first):
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def write_results(runs: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Writes stability.json and stability.png."""
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    text = json.dumps({"settings": settings, "runs": runs}, indent=1) + "\n"
    write_whole(args.output_dir / "stability.json", lambda path: path.write_text(text, "utf-8"))
    write_whole(args.output_dir / "stability.png", lambda path: plot(runs, path))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line; the defaults are what experiments/results/stability is made with."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path("experiments/results/stability"))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--learning-rate", type=float, default=1e-2, help="high, and constant after a warm-up")
    parser.add_argument("--vocab-size", type=int, default=512)
    parser.add_argument("--max-documents", type=int, help="texts to train on")
    parser.add_argument("--longest-row", type=int, default=256, help="segments that gradient goes through at the end")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Runs one precision after the other; the files are written anew after each.

    Raises:
        SystemExit: If something was not finite; the files say what.
    """
    args = parse_arguments(arguments)
    torch.set_num_threads(args.threads)
    facts = environment()  # before anything is written, which would count as a change
    data, runs = documents(args.vocab_size, args.max_documents), []
    for precision in args.precisions:
        runs.append({**run(precision, data, args), "environment": facts})
        write_results(runs, args)
        names = ("precision", "steps", "non_finite", "largest_gradient_norm", "largest_parameter", "seconds")
        print({name: runs[-1][name] for name in names}, flush=True)
    if any(run["non_finite"] for run in runs):
        raise SystemExit(f"Not everything stayed finite: see {args.output_dir / 'stability.json'}")


if __name__ == "__main__":
    main()
