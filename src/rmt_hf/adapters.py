"""PEFT configurations for RMT models: LoRA for projections, and whole copies of memory, fusion and sink."""

from typing import TYPE_CHECKING, Any

from .configuration_rmt import RMTConfig


if TYPE_CHECKING:
    from peft import LoraConfig

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # as in a Llama


def memory_lora_config(config: RMTConfig, memory_only: bool = False, **fields: Any) -> "LoraConfig":
    """LoRA on the projections of a model; memory, fusion and sink are trained whole and saved with the adapter.

    Args:
        config: Of the model.
        memory_only: Whether to train memory, fusion and sink alone, without projections.
        fields: Of `peft.LoraConfig`; `task_type` is `"CAUSAL_LM"` unless it is given.

    Raises:
        ImportError: If PEFT is not installed.
        ValueError: If a field is given that this function sets, or `memory_only` for a model without memory.
    """
    try:
        from peft import LoraConfig
        from peft.utils.constants import DUMMY_TARGET_MODULES
    except ImportError as error:
        raise ImportError('memory_lora_config needs PEFT: pip install "rmt_hf[train]".') from error
    for name in ("target_modules", "modules_to_save"):
        if name in fields:
            raise ValueError(
                f"{name} is set by memory_lora_config, got {fields[name]!r}: leave it out, or write a peft.LoraConfig."
            )
    if memory_only and not config.num_memory_slots:
        raise ValueError("memory_only is for a model with memory, got num_memory_slots=0: leave it out.")
    has_fusion = config.use_local_attention or (config.fusion_type == "softmax" and config.prefix_length > 0)
    whole = ["memory"] * (config.num_memory_slots > 0) + ["fusion"] * has_fusion + ["sink"] * config.use_attention_sink
    targets = DUMMY_TARGET_MODULES if memory_only else [*PROJECTIONS]  # PEFT's word for none
    return LoraConfig(**{"task_type": "CAUSAL_LM", **fields}, target_modules=targets, modules_to_save=whole or None)
