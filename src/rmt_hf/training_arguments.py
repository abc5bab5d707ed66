"""What `RMTTrainer` takes besides what every `Trainer` takes: its arguments, and a curriculum. A home file."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState


@dataclass
class RMTTrainingArguments(TrainingArguments):
    """`TrainingArguments`, and how rows are read.

    Args:
        stream_length: Columns of a piece, a multiple of `segment_length`: every row of a batch is a lane that reads
            documents of the data set one after another in such pieces, its state carried from step to step. None
            trains on rows as they are, each a stream of its own.
        bptt_segments: Stream mode: segments before a piece that its loss sends gradient through, and no further back.
            They are read again, so a step costs 1 + bptt_segments * segment_length / stream_length times as much.
        checkpoint_segments: Segments of a call whose activations are kept at a time; those of all others are computed
            again in the backward pass, from the state before them. None keeps all. Also without stream mode.
    """

    stream_length: int | None = field(default=None, metadata={"help": "Columns of a piece; None for plain rows."})
    bptt_segments: int = field(default=0, metadata={"help": "Segments before a piece that get gradient."})
    checkpoint_segments: int | None = field(
        default=None, metadata={"help": "Segments whose activations are kept at a time; None for all."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("stream_length", 1), ("bptt_segments", 0), ("checkpoint_segments", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")
        if self.bptt_segments and self.stream_length is None:
            raise ValueError(
                f"bptt_segments={self.bptt_segments} is for stream mode, got stream_length=None: the gradient of plain "
                "rows goes through the whole row. Give a stream_length, or leave it out."
            )
        if self.use_liger_kernel:
            raise ValueError(
                "use_liger_kernel has no kernels for RMT models and would change nothing: leave it out; "
                "RMTConfig(use_chunked_loss=True) saves the memory of the logits."
            )
        split = [name for name in ("cp_size", "sp_size") if self._parallel(name) > 1]
        if split:
            raise ValueError(
                f"parallelism_config must not split rows into columns, got {split} above 1: the segments of a "
                "row are written to memory one after another. Leave it out; checkpoint_segments makes long rows fit."
            )
        if self.stream_length is not None:
            self._refuse_what_breaks_lanes()

    def _parallel(self, name: str) -> int:
        """A size of the parallelism configuration."""
        return 1 if self.parallelism_config is None else getattr(self.parallelism_config, name, 1)

    def _refuse_what_breaks_lanes(self) -> None:
        """Refuses options under which a lane would silently not go on where it was."""
        wrong = {
            "train_sampling_strategy": (
                self.train_sampling_strategy not in ("random", "sequential"),
                "lanes have an order of their own",
            ),
            "ignore_data_skip": (self.ignore_data_skip, "a resumed lane goes on in the middle of a document"),
            "auto_find_batch_size": (self.auto_find_batch_size, "the number of lanes must not change"),
            "label_smoothing_factor": (
                self.label_smoothing_factor != 0,
                "it does not know the first label of the next piece",
            ),
            "dataloader_in_order": (not self.dataloader_in_order, "pieces of a lane must come one after another"),
            "label_names": (
                self.label_names is not None and not set(self.label_names) <= {"labels", "shift_labels"},
                "pieces have labels and shift_labels, and cannot be evaluated without",
            ),
            "ddp_static_graph": (
                bool(self.ddp_static_graph) and self.gradient_accumulation_steps > 1,
                "DDP then wants one backward pass in every step; leave out gradient_accumulation_steps",
            ),
            "enable_jit_checkpoint": (
                self.enable_jit_checkpoint,
                "it may save in the middle of a step, when lanes have read what is not learned yet; use save_steps",
            ),
            "accelerator_config.split_batches": (
                self.accelerator_config.split_batches,  # type: ignore[union-attr]  # made by super().__post_init__
                "lanes belong to processes",
            ),
        }
        for name, (is_wrong, reason) in wrong.items():
            if is_wrong:
                raise ValueError(f"{name} does not work in stream mode (stream_length={self.stream_length}): {reason}.")


class StreamSchedule(TrainerCallback, ExportableState):
    """A curriculum for stream mode: how far gradient reaches, by step. Tokens per step stay the same.

    The lanes are read as ever, `stream_length` of the arguments at a time; a shorter piece cuts each of those, so that
    less is learned through memory, from more and cheaper backward passes. Logs, and with them the trainer state, name
    both lengths.

    Args:
        stages: (first step, stream length, `bptt_segments`) of each stage, the first one from step 0. Stream lengths
            are multiples of `segment_length` and divide that of the arguments. What a stage reads again more than the
            one before, it reads again from its second step on.

    Raises:
        ValueError: If the stages are not in order.
    """

    def __init__(self, stages: Sequence[Sequence[int]]) -> None:
        self.stages = [list(stage) for stage in stages]
        steps = [stage[0] for stage in self.stages if len(stage) == 3]
        if len(steps) < len(self.stages) or steps[:1] != [0] or steps != sorted(set(steps)):
            raise ValueError(
                "stages must be triples (first step, stream length, bptt_segments), in the order of their steps, the "
                f"first from step 0; got {self.stages}."
            )

    def at(self, step: int) -> tuple[int, int]:
        """Stream length and `bptt_segments` of a step."""
        _, length, segments = next(stage for stage in reversed(self.stages) if stage[0] <= step)
        return length, segments

    def state(self) -> dict:
        return {"args": {"stages": self.stages}, "attributes": {}}
