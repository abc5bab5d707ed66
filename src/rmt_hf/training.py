"""Training with `Trainer`, and what it does not know: lanes whose state goes on from step to step.

In stream mode every row of a batch is a lane, which reads documents one after another in pieces (see `lanes`). A home
file.

Shapes: B rows, T columns of a batch, S segment length.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset, IterableDataset
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, default_data_collator
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, rotate_checkpoints

from .cache_rmt import RMTCache
from .checkpoints import UNFINISHED, damage, last_whole_checkpoint, publish_checkpoint, seal_checkpoint
from .data import IGNORED
from .lane_state import Call, Columns, LaneState, begin_documents, read_columns
from .lanes import Lanes, StreamedLanes
from .monitoring import RMTMemoryCallback
from .shared_out import NUMBERS_NAME, is_shared_out, load_optimizer, load_weights, save_optimizer
from .training_arguments import RMTTrainingArguments, StreamSchedule


class LaneSampler(Sampler[int]):
    """The items of `Lanes` in their order, which is the only one, in an epoch that can be set."""

    def __init__(self, lanes: Lanes) -> None:
        self.lanes, self.epoch = lanes, 0

    def __len__(self) -> int:
        return len(self.lanes)

    def __iter__(self) -> Iterator[int]:
        first = self.epoch * len(self.lanes)
        return iter(range(first, first + len(self.lanes)))


@contextmanager
def _without_optimizer(model: Any = None, args: Any = None, *others: Any, **named: Any) -> Iterator[None]:
    """Lets `Trainer` believe that only weights are saved: it refuses more if processes share them out."""
    saves_more = is_shared_out(model) and args is not None and not args.save_only_model
    if saves_more:
        args.save_only_model = True
    try:
        yield
    finally:
        if saves_more:
            args.save_only_model = False


class RMTTrainer(Trainer):
    """`Trainer` for RMT language models: rows or lanes, constant activation memory, checkpoints that are whole.

    Takes what `Trainer` takes; see `RMTTrainingArguments`. In stream mode data sets hold documents, of any length:
    `datasets.Dataset` or `datasets.IterableDataset` with `input_ids` and, if not all is to be learned, `labels`. They
    are evaluated as streams too, and the loss is the mean over all tokens.

    `train(resume_from_checkpoint=True)` takes the newest checkpoint that is whole.

    Raises:
        ValueError: If arguments do not fit the model or each other.
    """

    args: RMTTrainingArguments

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._lanes, self._evaluated = LaneState(), LaneState()
        self._sampler: LaneSampler | None = None
        self._unfinished: Path | None = None  # where a checkpoint is being written
        with _without_optimizer(*args, **kwargs):
            super().__init__(*args, **kwargs)
        if not isinstance(self.args, RMTTrainingArguments):
            raise ValueError(
                f"args must be RMTTrainingArguments, got {type(self.args).__name__}: they take what those take, and "
                "more."
            )
        self._plain_collator = self.data_collator
        self._check()

    def _check(self) -> None:
        """Refuses what does not fit, before anything is done."""
        arguments, segment = self.args, self.segment_length
        if self.compute_metrics is not None and self._config.use_chunked_loss and not arguments.prediction_loss_only:
            raise ValueError(
                "compute_metrics wants logits, and with use_chunked_loss=True a model that computes a loss makes none: "
                "leave out compute_metrics, or set use_chunked_loss=False."
            )
        if arguments.fsdp and not self.is_fsdp_enabled:
            raise ValueError(
                "fsdp is for accelerators, got processes on a CPU, where accelerate would train whole copies (DDP) "
                "without a word: load the model with distributed_config=DistributedConfig(fsdp_size=...), or leave it "
                "out."
            )
        if arguments.stream_length is None and arguments.checkpoint_segments is None:
            return
        if self.is_deepspeed_enabled:
            raise ValueError(
                "DeepSpeed trains whole plain rows only, got stream_length or checkpoint_segments: it does not go back "
                "through several calls at once. Leave them out, or train without deepspeed (docs/many_gpus.md)."
            )
        for name in ("stream_length", "checkpoint_segments"):
            if getattr(arguments, name) is not None and not self._loss_shifts_labels:
                raise ValueError(
                    f"{name} is for language models, got a {type(self.model).__name__}: train RMTForCausalLM, or leave "
                    "it out."
                )
        if self.compute_loss_func is not None:
            raise ValueError(
                "compute_loss_func works with whole plain rows only: leave out stream_length and checkpoint_segments."
            )
        if arguments.checkpoint_segments is not None and arguments.label_smoothing_factor:
            raise ValueError("label_smoothing_factor works without checkpoint_segments only: leave one of them out.")
        if arguments.stream_length is None:
            return
        if arguments.n_gpu > 1:
            raise ValueError("Stream mode wants one process for each device: start it with `accelerate launch`.")
        lengths = [arguments.stream_length, *(length for _, length, _ in self._schedule.stages)]
        for length in lengths:
            if length % segment or arguments.stream_length % length:
                raise ValueError(
                    f"stream_length must be a multiple of segment_length ({segment}), and in a StreamSchedule divide "
                    f"that of the arguments ({arguments.stream_length}); got {length}."
                )
            if arguments.ddp_static_graph and length < arguments.stream_length:
                raise ValueError(
                    "ddp_static_graph wants one backward pass in every step, got a StreamSchedule with a stage of "
                    f"{length} of {arguments.stream_length} columns, which has several: leave one of them out."
                )

    @property
    def segment_length(self) -> int:
        """`segment_length` of the model."""
        return self.accelerator.unwrap_model(self.model).config.segment_length

    @property
    def lane_state(self) -> LaneState:
        """What the lanes of this process remember between steps; empty outside of stream mode."""
        return self._lanes

    @property
    def _schedule(self) -> StreamSchedule:
        """The curriculum, which may be none: the same lengths at all steps."""
        schedules = [callback for callback in self.callback_handler.callbacks if isinstance(callback, StreamSchedule)]
        return (schedules or [StreamSchedule([(0, self.args.stream_length or 0, self.args.bptt_segments)])])[0]

    @property
    def _memory_callbacks(self) -> list[RMTMemoryCallback]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, RMTMemoryCallback)]

    # Data

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = cast(list[str], self._signature_columns)  # set by now
        if "shift_labels" not in columns:
            columns.append("shift_labels")

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Callable | None = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> DataLoader:
        """As every `Trainer`; in stream mode over the lanes of all processes."""
        if self.args.stream_length is None:
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)
        sizes = (batch_size * self.args.world_size, self.args.stream_length, self.segment_length)
        lanes: Lanes | StreamedLanes
        if isinstance(dataset, IterableDataset):
            lanes = StreamedLanes(dataset, *sizes, repeat=is_training)
        elif isinstance(dataset, Dataset):
            lanes = Lanes(dataset, *sizes, seed=self._data_seed if is_training else None)
        else:
            raise ValueError(
                "Stream mode wants a datasets.Dataset or a datasets.IterableDataset of documents, got a "
                f"{type(dataset).__name__}: make one with datasets.Dataset.from_list or from_generator."
            )
        sampler = LaneSampler(lanes) if isinstance(lanes, Lanes) else None
        if is_training:
            self._sampler = sampler
        self.data_collator = default_data_collator
        try:
            make_sampler = None if sampler is None else lambda _: sampler
            return super()._get_dataloader(lanes, description, batch_size, make_sampler, is_training, dataloader_key)
        finally:
            self.data_collator = self._plain_collator

    @property
    def _data_seed(self) -> int | None:
        """What the documents of a lane are shuffled with; None leaves them in their order."""
        if self.args.train_sampling_strategy == "sequential":
            return None
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _run_epoch(self, model: torch.nn.Module, epoch: int, *args: Any, **kwargs: Any) -> None:
        if self._sampler is not None:
            self._sampler.epoch = epoch
        super()._run_epoch(model, epoch, *args, **kwargs)

    # Loss

    def training_step(
        self, model: torch.nn.Module, inputs: Columns, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """As every `Trainer`, once for each piece of the stream length that the schedule gives."""
        if not self._is_stream(inputs):
            return super().training_step(model, inputs, num_items_in_batch)
        length, _ = self._schedule.at(self.state.global_step)
        *pieces, last = zip(*(tensor.split(length, 1) for tensor in inputs.values()), strict=True)
        losses = []
        for piece in pieces:
            with self.accelerator.no_sync(model):
                losses.append(super().training_step(model, dict(zip(inputs, piece, strict=True)), num_items_in_batch))
        losses.append(super().training_step(model, dict(zip(inputs, last, strict=True)), num_items_in_batch))
        return torch.stack(losses).sum()

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Columns,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """As every `Trainer`; lanes go on with their state, and take over the new one."""
        is_stream = self._is_stream(inputs)
        for callback in self._memory_callbacks if model.training else []:
            callback.keep(inputs, self._lanes)
        if is_stream and not model.training:
            return self._evaluate_piece(model, inputs, return_outputs)
        if return_outputs or not (
            is_stream or (self.args.checkpoint_segments and model.training and "labels" in inputs)
        ):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        group = self.args.checkpoint_segments and self.args.checkpoint_segments * self.segment_length
        if not is_stream:
            shifted = torch.nn.functional.pad(inputs["labels"], (0, 1), value=IGNORED)[:, 1:]
            inputs = {"shift_labels": shifted, **inputs}
        if num_items_in_batch is None:
            num_items_in_batch = (inputs["shift_labels"] != IGNORED).sum()
        num_items_in_batch = max(num_items_in_batch, 1)  # a step of nothing but prompts has the loss 0, not 0 / 0
        call_model = self._caller(model, num_items_in_batch)
        if not is_stream:
            return read_columns(call_model, inputs, RMTCache(self._config), group=group)[0]
        keep = self._schedule.at(self.state.global_step)[1] * self.segment_length
        columns, num_unlearned = self._lanes.again(inputs)
        state = RMTCache(self._config) if self._lanes.state is None else self._lanes.state
        loss, kept = read_columns(call_model, columns, state, num_unlearned, keep, group)
        rest = max(0, columns["input_ids"].shape[1] - keep)
        self._lanes = LaneState(kept, {name: tensor[:, rest:] for name, tensor in columns.items()} if keep else {})
        return loss

    def _caller(
        self, model: torch.nn.Module, num_items: torch.Tensor | int
    ) -> Callable[[Call, RMTCache], tuple[torch.Tensor, RMTCache]]:
        """What reads one call; only the last one through the wrapped model, whose hooks want one per backward pass."""

        def read(call: Call, before: RMTCache) -> tuple[torch.Tensor, RMTCache]:
            state, columns = before.clone(), dict(call.columns)
            begin_documents(state, columns)
            module = model if call.is_last else self.accelerator.unwrap_model(model)
            if call.is_learned:
                inputs: dict[str, Any] = {**columns, "past_key_values": state}
                loss = Trainer.compute_loss(self, module, inputs, num_items_in_batch=num_items)
                return cast(torch.Tensor, loss), state
            for name in ("labels", "shift_labels"):
                columns.pop(name)
            # No loss, but a place in the graph: processes that share out the weights must go back through the same
            # calls, also one in which a document has begun since and nothing leads back.
            return module(**columns, past_key_values=state, logits_to_keep=1).logits.sum() * 0, state

        def read_twice(call: Call, before: RMTCache) -> tuple[torch.Tensor, RMTCache]:
            if call.is_last:  # its activations are wanted at once
                return read(call, before)
            return checkpoint(read, call, before, use_reentrant=False)

        return read if self.args.checkpoint_segments is None else read_twice

    def _is_stream(self, inputs: Columns) -> bool:
        return self.args.stream_length is not None and "shift_labels" in inputs

    @property
    def _config(self) -> Any:
        return self.accelerator.unwrap_model(self.model).config

    # Evaluation

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As every `Trainer`; in stream mode with lanes of its own, and the loss of all tokens alike."""
        self._evaluated = LaneState()
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        loss_name = f"{kwargs.get('metric_key_prefix', 'eval')}_loss"
        if self.args.stream_length is not None and output.metrics is not None and loss_name in output.metrics:
            sums = torch.tensor([[self._evaluated.loss_sum, self._evaluated.num_targets]], dtype=torch.float64)
            total, count = self.accelerator.gather(sums.to(self.args.device)).sum(0).tolist()
            output.metrics[loss_name] = total / max(1, count)
        self._evaluated = LaneState()
        return output

    def _evaluate_piece(self, model: torch.nn.Module, inputs: Columns, return_outputs: bool) -> Any:
        """The loss of a piece, whose lanes go on from the piece before."""
        lanes = self._evaluated
        lanes.state = RMTCache(self._config) if lanes.state is None else lanes.state
        begin_documents(lanes.state, inputs)
        outputs = model(**inputs, past_key_values=lanes.state, num_items_in_batch=1)
        count = int((inputs["shift_labels"] != IGNORED).sum())
        lanes.loss_sum += outputs["loss"].item()
        lanes.num_targets += count
        loss = outputs["loss"] / max(1, count)
        return (loss, outputs) if return_outputs else loss

    # Logs and checkpoints

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As every `Trainer`; with the lengths of the step in stream mode, and what an `RMTMemoryCallback` sees."""
        if self.args.stream_length is not None and "loss" in logs:
            length, segments = self._schedule.at(max(0, self.state.global_step - 1))
            logs = {**logs, "stream_length": length, "bptt_segments": segments}
        for callback in self._memory_callbacks if "loss" in logs else []:
            logs = {**logs, **callback.measure()}
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As every `Trainer`.

        Args:
            resume_from_checkpoint: True for the newest checkpoint in `output_dir` that is whole, or a folder.
            args, kwargs: As `Trainer.train` takes them.

        Raises:
            ValueError: If there is no whole checkpoint, or the one that is named has been damaged.
        """
        self._check()  # a callback may have come since
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(str(self.args.output_dir))
        elif resume_from_checkpoint and (wrong := damage(Path(resume_from_checkpoint))):
            raise ValueError(
                f"The checkpoint {resume_from_checkpoint} cannot be used: {wrong}. Name another one, or take the "
                "newest that is whole with resume_from_checkpoint=True."
            )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> Any:
        """As every `Trainer`, and the lanes: from the checkpoint, or empty."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self._lanes = LaneState()
        if self.args.stream_length is not None and resume_from_checkpoint is not None:
            folder = Path(resume_from_checkpoint) / self._lanes_name
            self._lanes = LaneState.load(folder, self.accelerator.unwrap_model(self.model), self._lanes_record)
        return prepared

    @property
    def _lanes_name(self) -> str:
        return f"lanes-{self.args.process_index}"

    @property
    def _lanes_record(self) -> dict[str, Any]:
        """What must be the same when a run goes on."""
        names = ("stream_length", "per_device_train_batch_size", "gradient_accumulation_steps", "world_size")
        return {**{name: getattr(self.args, name) for name in names}, "data_seed": self._data_seed}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """As every `Trainer`; and weights that processes share out."""
        if not is_shared_out(self.model):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        return load_weights(Path(resume_from_checkpoint), self.model)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As every `Trainer`; and of weights that processes share out."""
        if not is_shared_out(self.model):
            return super()._save_optimizer_and_scheduler(output_dir)
        return save_optimizer(Path(output_dir), self.model, self.optimizer, self.lr_scheduler, self.args.should_save)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As every `Trainer`; and of weights that processes share out."""
        if checkpoint is None or not is_shared_out(self.model):
            if checkpoint is not None and (Path(checkpoint) / NUMBERS_NAME).is_file():
                raise ValueError(
                    f"The checkpoint {checkpoint} is of a model whose weights processes share out: go on with "
                    "distributed_config=DistributedConfig(fsdp_size=...), or begin anew from its weights."
                )
            return super()._load_optimizer_and_scheduler(checkpoint)
        return load_optimizer(Path(checkpoint), self.model, self.optimizer, self.lr_scheduler)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._unfinished is None else str(self._unfinished)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """As every `Trainer`, but aside, with the lanes; renamed into place when it is whole."""
        run_dir = Path(self._get_output_dir(trial))
        name, aside = f"checkpoint-{self.state.global_step}", run_dir / UNFINISHED
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._unfinished = aside
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._unfinished = None
        if not self.args.save_only_model:
            self._lanes.save(aside / name / self._lanes_name, self._lanes_record)
        if self.state.best_model_checkpoint == str(aside / name):
            self.state.best_model_checkpoint = str(run_dir / name)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(str(aside / name / TRAINER_STATE_NAME))
            seal_checkpoint(aside / name)
            publish_checkpoint(aside / name, run_dir / name)
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(run_dir), self.args.save_total_limit, best_model_checkpoint=best, use_mtime=True)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(run_dir / name))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing while a checkpoint is being written: what is uploaded must not be renamed meanwhile."""
