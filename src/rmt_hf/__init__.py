"""Recurrent memory-augmented transformers for the Hugging Face ecosystem: public names and their registration."""

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
    "RMTModel",
    "RMTPreTrainedModel",
]
