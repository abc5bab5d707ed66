"""Recurrent memory-augmented transformers for the Hugging Face ecosystem: public names and their registration."""

from typing import TYPE_CHECKING

import transformers

from .cache_rmt import RMTCache
from .configuration_rmt import RMTConfig
from .modeling_rmt import (
    AUTO_CLASSES,
    RMTForCausalLM,
    RMTForQuestionAnswering,
    RMTForSequenceClassification,
    RMTForTokenClassification,
    RMTModel,
    RMTPreTrainedModel,
)


if TYPE_CHECKING:
    from .monitoring import RMTMemoryCallback
    from .training import RMTTrainer
    from .training_arguments import RMTTrainingArguments, StreamSchedule

transformers.AutoConfig.register(RMTConfig.model_type, RMTConfig, exist_ok=True)
for _auto_class, (_model_class, _) in AUTO_CLASSES.items():
    getattr(transformers, _auto_class).register(RMTConfig, _model_class, exist_ok=True)

__all__ = [
    "RMTCache",
    "RMTConfig",
    "RMTForCausalLM",
    "RMTForQuestionAnswering",
    "RMTForSequenceClassification",
    "RMTForTokenClassification",
    "RMTMemoryCallback",
    "RMTModel",
    "RMTPreTrainedModel",
    "RMTTrainer",
    "RMTTrainingArguments",
    "StreamSchedule",
]


def __getattr__(name: str) -> object:
    """Training is imported when it is asked for: it needs `datasets`, and the model does not."""
    if name in ("RMTMemoryCallback", "RMTTrainer", "RMTTrainingArguments", "StreamSchedule"):
        from . import training

        return getattr(training, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
