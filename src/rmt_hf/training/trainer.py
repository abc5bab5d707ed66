"""`Trainer` for RMT models: streams whose state goes on from step to step, and whole checkpoints."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset, IterableDataset
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import Trainer, default_data_collator
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, rotate_checkpoints

from ..attention_rmt import RMTFusion, RMTSink
from ..cache_rmt import RMTCache
from ..data import IGNORED
from ..memory_rmt import RMTRing
from .arguments import RMTTrainingArguments, StreamSchedule
from .cards import write_trainer_card
from .checkpoints import UNFINISHED, damage, last_whole_checkpoint, publish_checkpoint, seal_checkpoint
from .monitoring import RMTGradientCallback, RMTMemoryCallback
from .sharded import NUMBERS_NAME, is_sharded, load_optimizer, load_weights, save_optimizer, with_weights_only
from .stream_state import Call, Columns, StreamState, begin_documents, fingerprint_documents, read_columns
from .streams import IterableStreamDataset, StreamDataset, StreamSampler


class RMTTrainer(Trainer):
    """`Trainer` for RMT language models: plain rows or streams, constant activation memory, whole checkpoints.

    Takes what `Trainer` takes; see `RMTTrainingArguments`. In stream mode data sets hold documents of any length:
    `datasets.Dataset` or `datasets.IterableDataset` with `input_ids` and, if not every token is to be learned,
    `labels`. Evaluation reads streams too, and its loss is the mean over all tokens.

    Raises:
        ValueError: If arguments do not fit the model or each other.
    """

    args: RMTTrainingArguments

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._stream_state, self._evaluated = StreamState(), StreamState()
        self._sampler: StreamSampler | None = None
        self._unfinished: Path | None = None  # where a checkpoint is being written
        with with_weights_only(*args, **kwargs):
            super().__init__(*args, **kwargs)
        if not isinstance(self.args, RMTTrainingArguments):
            raise ValueError(
                f"args must be RMTTrainingArguments, got {type(self.args).__name__}: they accept the same and more."
            )
        self._plain_collator = self.data_collator
        if not any(isinstance(callback, RMTGradientCallback) for callback in self.callback_handler.callbacks):
            self.add_callback(RMTGradientCallback())
        self._check()

    def _check(self) -> None:
        """Refuses arguments that do not fit, before training begins."""
        arguments, segment = self.args, self.segment_length
        if arguments.fsdp and not self.is_fsdp_enabled:
            raise ValueError(
                "fsdp is for accelerators, got processes on a CPU, where accelerate would silently train whole copies "
                "(DDP): load the model with distributed_config=DistributedConfig(fsdp_size=...), or leave it out."
            )
        if arguments.stream_length is None and arguments.checkpoint_segments is None:
            return
        if self.is_deepspeed_enabled:
            raise ValueError(
                "DeepSpeed trains whole plain rows only, got stream_length or checkpoint_segments: its backward pass "
                "takes one call. Leave them out, or train without deepspeed (docs/distributed.md)."
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
            raise ValueError("Stream mode needs one process for each device: start it with `accelerate launch`.")
        lengths = [arguments.stream_length, *(length for _, length, _ in self._schedule.stages)]
        for length in lengths:
            if length % segment or arguments.stream_length % length:
                raise ValueError(
                    f"stream_length must be a multiple of segment_length ({segment}), and in a StreamSchedule divide "
                    f"that of the arguments ({arguments.stream_length}); got {length}."
                )
            if arguments.ddp_static_graph and length < arguments.stream_length:
                raise ValueError(
                    "ddp_static_graph needs one backward pass in every step, got a StreamSchedule with a stage of "
                    f"{length} of {arguments.stream_length} columns, which has several: leave one of them out."
                )

    @property
    def segment_length(self) -> int:
        """`segment_length` of the model."""
        return self.accelerator.unwrap_model(self.model).config.segment_length

    @property
    def stream_state(self) -> StreamState:
        """State of the streams of this process between steps; empty outside of stream mode."""
        return self._stream_state

    @property
    def _schedule(self) -> StreamSchedule:
        """The curriculum; without one, the lengths of the arguments at all steps."""
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
        """As every `Trainer`; in stream mode over the streams of all processes."""
        if self.args.stream_length is None:
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)
        sizes = (batch_size * self.args.world_size, self.args.stream_length, self.segment_length)
        streams: StreamDataset | IterableStreamDataset
        if isinstance(dataset, IterableDataset):
            streams = IterableStreamDataset(dataset, *sizes, repeat=is_training)
        elif isinstance(dataset, Dataset):
            streams = StreamDataset(dataset, *sizes, seed=self._data_seed if is_training else None)
        else:
            raise ValueError(
                "Stream mode needs a datasets.Dataset or a datasets.IterableDataset of documents, got a "
                f"{type(dataset).__name__}: make one with datasets.Dataset.from_list or from_generator."
            )
        sampler = StreamSampler(streams) if isinstance(streams, StreamDataset) else None
        if is_training:
            self._sampler = sampler
        self.data_collator = default_data_collator
        try:
            make_sampler = None if sampler is None else lambda _: sampler
            return super()._get_dataloader(streams, description, batch_size, make_sampler, is_training, dataloader_key)
        finally:
            self.data_collator = self._plain_collator

    @property
    def _data_seed(self) -> int | None:
        """Seed of the order of documents in a stream; None keeps their order."""
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
        """As every `Trainer`, once for each slice of the length that the schedule gives."""
        if not self._is_stream(inputs):
            return super().training_step(model, inputs, num_items_in_batch)
        length, _ = self._schedule.at(self.state.global_step)
        slices = zip(*(tensor.split(length, 1) for tensor in inputs.values()), strict=True)
        *first, last = (dict(zip(inputs, tensors, strict=True)) for tensors in slices)
        losses = []
        for part in first:
            with self.accelerator.no_sync(model):
                losses.append(super().training_step(model, part, num_items_in_batch))
        losses.append(super().training_step(model, last, num_items_in_batch))
        return torch.stack(losses).sum()

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Columns,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """As every `Trainer`; streams go on from their state, and keep the new one."""
        is_stream = self._is_stream(inputs)
        for callback in self._memory_callbacks if model.training else []:
            callback.keep(inputs, self._stream_state)
        if is_stream and not model.training:
            return self._evaluate_slice(model, inputs, return_outputs)
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
        num_items_in_batch = max(num_items_in_batch, 1)  # a step of prompts alone has the loss 0, not 0 / 0
        call_model = self._caller(model, num_items_in_batch)
        if not is_stream:
            return read_columns(call_model, inputs, RMTCache(self._config), group=group)[0]
        keep = self._schedule.at(self.state.global_step)[1] * self.segment_length
        columns, num_unlearned = self._stream_state.with_earlier_columns(inputs)
        state = RMTCache(self._config) if self._stream_state.state is None else self._stream_state.state
        loss, kept = read_columns(call_model, columns, state, num_unlearned, keep, group)
        rest = max(0, columns["input_ids"].shape[1] - keep)
        self._stream_state = StreamState(
            kept, {name: tensor[:, rest:] for name, tensor in columns.items()} if keep else {}
        )
        return loss

    def _caller(
        self, model: torch.nn.Module, num_items: torch.Tensor | int
    ) -> Callable[[Call, RMTCache], tuple[torch.Tensor, RMTCache]]:
        """A function that reads one call; only the last goes through the wrapper, whose hooks expect one a backward."""

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
            # A loss of 0 that stays in the graph: processes with sharded weights must run backward through the same
            # calls, even where a document has begun since and no gradient flows.
            return module(**columns, past_key_values=state, logits_to_keep=1).logits.sum() * 0, state

        def read_twice(call: Call, before: RMTCache) -> tuple[torch.Tensor, RMTCache]:
            if call.is_last:  # the backward pass needs its activations first
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
        """As every `Trainer`; in stream mode from empty states, and the loss is the mean over all tokens."""
        self._evaluated = StreamState()
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        loss_name = f"{kwargs.get('metric_key_prefix', 'eval')}_loss"
        if self.args.stream_length is not None and output.metrics is not None and loss_name in output.metrics:
            sums = torch.tensor([[self._evaluated.loss_sum, self._evaluated.num_targets]], dtype=torch.float64)
            total, count = self.accelerator.gather(sums.to(self.args.device)).sum(0).tolist()
            output.metrics[loss_name] = total / max(1, count)
        self._evaluated = StreamState()
        return output

    def _evaluate_slice(self, model: torch.nn.Module, inputs: Columns, return_outputs: bool) -> Any:
        """The loss of a slice, read from the state after the slice before it."""
        streams = self._evaluated
        streams.state = RMTCache(self._config) if streams.state is None else streams.state
        begin_documents(streams.state, inputs)
        outputs = model(**inputs, past_key_values=streams.state, num_items_in_batch=1)
        count = int((inputs["shift_labels"] != IGNORED).sum())
        streams.loss_sum += outputs["loss"].item()
        streams.num_targets += count
        loss = outputs["loss"] / max(1, count)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: torch.nn.Module, inputs: Columns, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """As every `Trainer`; where a chunked loss is all that is asked for, there are no logits either."""
        needs_logits = not prediction_loss_only or self.label_smoother is not None or self.compute_loss_func is not None
        if not needs_logits and getattr(self.accelerator.unwrap_model(model), "has_chunked_loss", False):
            inputs = {**inputs, "logits_to_keep": 1}  # type: ignore[dict-item]
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    # Optimizer

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """As every `Trainer`, without gates, fades, scales and sinks: weights of linear maps and embeddings decay."""
        kinds = RMTRing, RMTFusion, RMTSink
        own = [module for module in model.modules() if isinstance(module, kinds)]
        kept = {id(parameter) for module in own for parameter in module.parameters(recurse=False)}
        kept_names = {name for name, parameter in model.named_parameters() if id(parameter) in kept}
        return [name for name in super().get_decay_parameter_names(model) if name not in kept_names]

    # Logs and checkpoints

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As every `Trainer`; with the lengths of the step in stream mode, and the means of `RMTMemoryCallback`."""
        if self.args.stream_length is not None and "loss" in logs:
            length, segments = self._schedule.at(max(0, self.state.global_step - 1))
            logs = {**logs, "stream_length": length, "bptt_segments": segments}
        for callback in self._memory_callbacks if "loss" in logs else []:
            logs = {**logs, **callback.measure()}
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As every `Trainer`.

        Args:
            resume_from_checkpoint: True for the newest whole checkpoint in `output_dir`, or a folder.
            args, kwargs: As `Trainer.train` takes them.

        Raises:
            ValueError: If there is no whole checkpoint, or the named one is damaged.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(str(self.args.output_dir))
        elif resume_from_checkpoint and (wrong := damage(Path(resume_from_checkpoint))):
            raise ValueError(
                f"The checkpoint {resume_from_checkpoint} cannot be used: {wrong}. Name another one, or take the "
                "newest whole one with resume_from_checkpoint=True."
            )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _hp_search_setup(self, trial: Any) -> None:
        """As every `Trainer`, which has made the model by now; then checks again: a callback may have been added."""
        super()._hp_search_setup(trial)
        self._check()

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> Any:
        """As every `Trainer`, and the state of the streams: from the checkpoint, or empty."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self._stream_state = StreamState()
        if self.args.stream_length is not None and resume_from_checkpoint is not None:
            folder = Path(resume_from_checkpoint) / self._streams_folder
            self._stream_state = StreamState.load(
                folder, self.accelerator.unwrap_model(self.model), self._streams_record
            )
        return prepared

    @property
    def _streams_folder(self) -> str:
        return f"streams-{self.args.process_index}"

    @property
    def _streams_record(self) -> dict[str, Any]:
        """Settings that must be the same when a run is resumed."""
        names = ("stream_length", "per_device_train_batch_size", "gradient_accumulation_steps", "world_size")
        record = {name: getattr(self.args, name) for name in names} | {"data_seed": self._data_seed}
        return record | {"documents": fingerprint_documents(self.train_dataset)}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """As every `Trainer`; and sharded weights."""
        if not is_sharded(self.model):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        return load_weights(Path(resume_from_checkpoint), self.model)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As every `Trainer`; and of sharded weights."""
        if not is_sharded(self.model):
            return super()._save_optimizer_and_scheduler(output_dir)
        return save_optimizer(Path(output_dir), self.model, self.optimizer, self.lr_scheduler, self.args.should_save)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As every `Trainer`; and of sharded weights."""
        if checkpoint is None or not is_sharded(self.model):
            if checkpoint is not None and (Path(checkpoint) / NUMBERS_NAME).is_file():
                raise ValueError(
                    f"The checkpoint {checkpoint} is of a sharded model: resume with "
                    "distributed_config=DistributedConfig(fsdp_size=...), or begin anew from its weights."
                )
            return super()._load_optimizer_and_scheduler(checkpoint)
        return load_optimizer(Path(checkpoint), self.model, self.optimizer, self.lr_scheduler)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """As every `Trainer`, with what was measured so far in the card."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            write_trainer_card(self, output_dir or str(self.args.output_dir))

    def create_model_card(self, **fields: Any) -> None:  # type: ignore[override]  # all of them by name
        """As every `Trainer`, but a card that is there keeps its words; see `rmt_hf.cards`."""
        if not hasattr(self.accelerator.unwrap_model(self.model), "write_card"):  # adapters have cards of their own
            super().create_model_card(**fields)
        elif self.is_world_process_zero():
            write_trainer_card(self, str(self.args.output_dir), **fields)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._unfinished is None else str(self._unfinished)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """As every `Trainer`, with the state of the streams; written aside, and renamed into place when it is whole."""
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
            self._stream_state.save(aside / name / self._streams_folder, self._streams_record)
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
            for code in (run_dir / name).glob("*.py") if self.args.should_save else ():  # `Trainer` pushes no code
                shutil.copy(code, str(self.args.output_dir))
            super()._push_from_checkpoint(str(run_dir / name))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Does nothing while a checkpoint is being written, since its folder is renamed later."""
