"""Training with `Trainer`, with a state that goes on from step to step."""

from .arguments import RMTTrainingArguments, StreamSchedule
from .distillation import DistillationTrainer
from .monitoring import RMTGradientCallback, RMTMemoryCallback
from .trainer import RMTTrainer


__all__ = [
    "DistillationTrainer",
    "RMTGradientCallback",
    "RMTMemoryCallback",
    "RMTTrainer",
    "RMTTrainingArguments",
    "StreamSchedule",
]
