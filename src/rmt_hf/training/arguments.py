"""Arguments of `RMTTrainer`, and a curriculum of stream lengths."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState


@dataclass
class RMTTrainingArguments(TrainingArguments):
    """`TrainingArguments`, and how rows are read.

    Args:
        stream_length: Columns that a step reads of each row, a multiple of `segment_length`. A value turns on stream
            mode: every row of a batch reads documents one after another, and carries its state from step to step. None
            trains on plain rows, each a stream of its own.
        bptt_segments: Stream mode: segments before a slice that its loss sends gradient through. They are read again,
            so a step costs 1 + bptt_segments * segment_length / stream_length times as much.
        checkpoint_segments: Segments whose activations are kept at a time; the backward pass computes all others again
            from the state before them. None keeps all. Works with and without stream mode.
    """

    stream_length: int | None = field(default=None, metadata={"help": "Columns of a slice; None for plain rows."})
    bptt_segments: int = field(default=0, metadata={"help": "Segments before a slice that get gradient."})
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
                "rows goes through the whole row. Give a stream_length, or leave out bptt_segments."
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
            self._refuse_what_breaks_streams()

    def _parallel(self, name: str) -> int:
        """A size of the parallelism configuration."""
        return 1 if self.parallelism_config is None else getattr(self.parallelism_config, name, 1)

    def _refuse_what_breaks_streams(self) -> None:
        """Refuses options with which streams would silently lose their position."""
        wrong = {
            "train_sampling_strategy": (
                self.train_sampling_strategy not in ("random", "sequential"),
                "streams have an order of their own",
            ),
            "ignore_data_skip": (self.ignore_data_skip, "a resumed stream goes on in the middle of a document"),
            "auto_find_batch_size": (self.auto_find_batch_size, "the number of streams must not change"),
            "label_smoothing_factor": (
                self.label_smoothing_factor != 0,
                "it does not know the first label of the next slice",
            ),
            "dataloader_in_order": (not self.dataloader_in_order, "slices of a stream must come one after another"),
            "label_names": (
                self.label_names is not None and not set(self.label_names) <= {"labels", "shift_labels"},
                "slices have labels and shift_labels, and cannot be evaluated without them",
            ),
            "ddp_static_graph": (
                bool(self.ddp_static_graph) and self.gradient_accumulation_steps > 1,
                "DDP then needs one backward pass in every step; leave out gradient_accumulation_steps",
            ),
            "enable_jit_checkpoint": (
                self.enable_jit_checkpoint,
                "it may save in the middle of a step, before the loss of what was read is learned; use save_steps",
            ),
            "accelerator_config.split_batches": (
                self.accelerator_config.split_batches,  # type: ignore[union-attr]  # made by super().__post_init__
                "streams belong to processes",
            ),
        }
        for name, (is_wrong, reason) in wrong.items():
            if is_wrong:
                raise ValueError(f"{name} does not work in stream mode (stream_length={self.stream_length}): {reason}.")


class StreamSchedule(TrainerCallback, ExportableState):
    """A curriculum for stream mode: how far gradient reaches, by step. Tokens per step stay the same.

    Each step reads as many columns as before, in slices of the length of its stage, with a backward pass for each. Logs
    and trainer state name the stream length and `bptt_segments` of the step.

    Args:
        stages: (first step, stream length, `bptt_segments`) of each stage, the first one from step 0. Stream lengths
            are multiples of `segment_length` and divide that of the arguments. A larger `bptt_segments` has its full
            effect from the second step of the stage.

    Raises:
        ValueError: If the stages are not triples, or not in order.
    """

    def __init__(self, stages: Sequence[Sequence[int]]) -> None:
        self.stages = [list(stage) for stage in stages]
        steps = [stage[0] for stage in self.stages if len(stage) == 3]
        if len(steps) < len(self.stages) or steps[:1] != [0] or steps != sorted(set(steps)):
            raise ValueError(
                "stages must be triples (first step, stream length, bptt_segments) with rising steps, the first from "
                f"step 0; got {self.stages}."
            )

    def at(self, step: int) -> tuple[int, int]:
        """Stream length and `bptt_segments` of a step."""
        _, length, segments = next(stage for stage in reversed(self.stages) if stage[0] <= step)
        return length, segments

    def state(self) -> dict:
        return {"args": {"stages": self.stages}, "attributes": {}}
