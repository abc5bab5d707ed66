"""Recurrent memory-augmented transformers for the Hugging Face ecosystem: public names and their registration."""

import sys
from typing import TYPE_CHECKING

import transformers

from .cache_rmt import RMTCache
from .cards import write_model_card, write_state_card
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
    from .training import RMTMemoryCallback as RMTMemoryCallback
    from .training import RMTTrainer as RMTTrainer
    from .training import RMTTrainingArguments as RMTTrainingArguments
    from .training import StreamSchedule as StreamSchedule

__version__ = "0.1.0"
__all__ = [  # what `import *` brings: all that needs no extra
    "RMTCache",
    "RMTConfig",
    "RMTForCausalLM",
    "RMTForQuestionAnswering",
    "RMTForSequenceClassification",
    "RMTForTokenClassification",
    "RMTModel",
    "RMTPreTrainedModel",
]
_OF_TRAINING = ("RMTMemoryCallback", "RMTTrainer", "RMTTrainingArguments", "StreamSchedule")

transformers.AutoConfig.register(RMTConfig.model_type, RMTConfig, exist_ok=True)
for _auto_class, (_model_class, _) in AUTO_CLASSES.items():
    getattr(transformers, _auto_class).register(RMTConfig, _model_class, exist_ok=True)
    # `transformers serve` looks the name in `config.architectures` up here. (transformers imports itself twice.)
    for _module in (transformers, sys.modules["transformers"]):
        setattr(_module, _model_class.__name__, _model_class)


RMTPreTrainedModel.write_card, RMTCache.write_card = write_model_card, write_state_card


def __getattr__(name: str) -> object:
    """Training is imported when it is asked for: it needs an extra, and the model does not."""
    if name not in _OF_TRAINING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from . import training
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("rmt_hf"):
            raise  # no extra brings it
        raise ImportError(f'{name} needs {error.name}: pip install "rmt_hf[train]".', name=error.name) from error
    return getattr(training, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_OF_TRAINING])
