"""The model: MLP, decoder layer, stack of layers, and the heads that make it useful.

Shapes: B rows, T columns of a call, E hidden size, V vocabulary. The walk of one call: embed; plan where the columns
belong (layout_rmt); rotary tables once; the only loop over layers; norm; head.
"""

import re
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers import modeling_layers as heads
from transformers.activations import ACT2FN
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.models.auto import modeling_auto
from transformers.utils import can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_rmt import RMTAttention, RMTFusion, RMTRMSNorm, RMTRotaryEmbedding, rotary_revolutions
from .cache_rmt import RMTCache, check_cache_type, stream_starts
from .configuration_rmt import RMTConfig
from .generation_rmt import RMTGeneration
from .layout_rmt import (
    CallLayout,
    check_ids,
    check_labels,
    clear_padding,
    embed,
    find_restarts,
    plan_call,
    real_columns,
)
from .memory_rmt import RMTPerHead, RMTRing, RMTSink
from .state_rmt import LayerState


logger = logging.get_logger(__name__)

# Packed documents as kernels take them: they say nothing that position_ids do not say, and nothing is made of them.
PACKING = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
MEMORIZE_TOKENS = 4096  # tokens of all rows in one call of `memorize`: on a CPU 8,192 take a tenth longer
GATE_SCALE, GATE_BIAS, FADE = 1.0, -2.0, 0.0  # how gates of memory begin: a slot is mostly kept, and does not fade
# First values of rings and fusion: every slot is treated alike, and the paths have equal shares.
AUTO_CONFIG = {"AutoConfig": "configuration_rmt.RMTConfig"}  # of a folder that has the code
FIRST_VALUES = {"gate_weight": 0.0, "gate_scale": GATE_SCALE, "gate_bias": GATE_BIAS, "fade": FADE}
FIRST_VALUES |= {"scale": 1.0, "logits": 0.0}


class RMTMLP(nn.Module):
    """SwiGLU feed-forward network, (B, T, E) to (B, T, E)."""

    def __init__(self, config: RMTConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class RMTDecoderLayer(heads.GradientCheckpointingLayer):
    """Pre-norm block: attention and MLP, each added to the residual stream."""

    def __init__(self, config: RMTConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = RMTAttention(config, layer_idx)
        self.mlp = RMTMLP(config)
        self.input_layernorm = RMTRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMTRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, LayerState | None]:
        """(B, T, E) to (B, T, E), and the state; see `RMTAttention.forward`."""
        attended, _, state = self.self_attn(self.input_layernorm(hidden_states), *args, **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)), state


class RMTPreTrainedModel(PreTrainedModel):
    """What all RMT models share: configuration, initialisation, abilities."""

    config: RMTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RMTDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = _supports_flex_attn = _supports_flash_attn = True
    _supports_attention_backend = _supports_context_parallel = _can_compile_fullgraph = False  # no pages of keys
    _can_record_outputs = {"hidden_states": RMTDecoderLayer, "attentions": RMTAttention}
    write_card: Any = None  # `rmt_hf.cards`, which does not travel, puts a function here
    accepts_loss_kwargs = False  # the inherited heads leave num_items_in_batch out: Trainer must divide their loss

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As Llama: linear and embedding weights normal (`initializer_range`), biases 0, norms 1. The sink's key is
        normal, too, and its value 0; rings and fusion begin with FIRST_VALUES."""
        super()._init_weights(module)
        if isinstance(module, RMTRing | RMTFusion):
            for name, parameter in module.named_parameters(recurse=False):
                init.constant_(parameter, FIRST_VALUES[name])
        elif isinstance(module, RMTPerHead):
            init.normal_(module.weight, std=self.config.initializer_range)
            init.zeros_(module.bias)
        elif isinstance(module, RMTSink):
            init.normal_(module.key, std=self.config.initializer_range)
            init.zeros_(module.value)
        elif isinstance(module, RMTRotaryEmbedding):
            init.copy_(module.revolutions, rotary_revolutions(module.config))

    @classmethod
    def maybe_distribute_model(cls, model: nn.Module, distributed_config: Any, *args: Any, **kwargs: Any) -> nn.Module:
        """As every model; refuses a `distributed_config` of `from_pretrained` that cannot be followed (ValueError)."""
        config = cast(RMTConfig, model.config)
        tp_size, pp_size = (getattr(distributed_config, name, None) or 1 for name in ("tp_size", "pp_size"))
        if config.key_value_shape[0] % tp_size:
            rule = f"tp_size must divide num_key_value_heads ({config.num_key_value_heads}), got {tp_size}"
            raise ValueError(f"{rule}: memory belongs to a head. Use fewer processes, or fsdp_size.")
        if pp_size > config.num_hidden_layers:
            rule = f"pp_size must be at most num_hidden_layers ({config.num_hidden_layers}), got {pp_size}"
            raise ValueError(f"{rule}: every stage of a pipeline needs a layer. Use fewer processes.")
        return super().maybe_distribute_model(model, distributed_config, *args, **kwargs)

    @staticmethod
    def _finalize_model_loading(model: Any, load_config: Any, loading_info: Any) -> Any:
        """As every model; refuses weights whose memory has a query and a null slot of its own (ValueError)."""
        old = [name for name in loading_info.unexpected_keys if "memory_q_proj" in name or "memory.null_key" in name]
        if old:
            rule = f"Weights must be of a memory that is a prefix of the window, got {min(old)}, of an earlier form of "
            raise ValueError(f"{rule}this model: load them with the version of rmt_hf that wrote them.")
        return PreTrainedModel._finalize_model_loading(model, load_config, loading_info)

    @torch.no_grad()
    def memorize(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: RMTCache | None = None,
        show_progress: bool = False,
    ) -> RMTCache:
        """Reads any number of tokens in bounded memory: calls of `MEMORIZE_TOKENS`, no logits, no gradients.

        The model reads as it is: call `eval()` first if it has dropout. If it is interrupted, a state that was given
        stands at the end of the last whole call. ValueError if an input breaks a rule; nothing has been read then.

        Args:
            input_ids: (B, T) int64, may be much longer than the window.
            attention_mask: (B, T), 0 at padding, which may be anywhere.
            past_key_values: The state to go on from, changed in place and returned; a new one if None.
            show_progress: Whether to show a progress bar.
        """
        check_ids(input_ids, self.config.vocab_size)
        cache = RMTCache(self.config) if past_key_values is None else past_key_values
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            rule = f"attention_mask must have the shape of input_ids, {tuple(input_ids.shape)}"
            raise ValueError(
                f"{rule}, got {tuple(attention_mask.shape)}: columns read before are not named again here."
            )
        (num_rows, num_columns), segment = input_ids.shape, self.config.segment_length
        size = max(1, MEMORIZE_TOKENS // num_rows // segment) * segment
        starts = range(0, num_columns, size)
        # A pipeline is a matter of the model with its head, and sends nothing between stages but in its forward.
        reader = partial(self, logits_to_keep=1) if hasattr(self, "_pp_stage") else self.base_model
        for start in logging.tqdm(starts, desc="Memorizing", unit=f"x{size} tokens", disable=not show_progress):
            columns = slice(start, start + size)
            mask = None if attention_mask is None else attention_mask[:, columns]
            reader(input_ids=input_ids[:, columns], attention_mask=mask, past_key_values=cache)
        return cache

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any) -> None:
        """As every model, and a card. Where the code is saved, too (`register_for_auto_class`), all its classes load.

        A model whose configuration names code, because it came with it, is saved with the code again.
        """
        registered, known = self._auto_class, self.config.auto_map
        if registered is not None or known:
            classes = {name: f"modeling_rmt.{model_class.__name__}" for name, (model_class, _) in AUTO_CLASSES.items()}
            self.config.auto_map = known | AUTO_CONFIG | classes
            own = next(name for name, (model_class, _) in AUTO_CLASSES.items() if isinstance(self, model_class))
            type(self)._auto_class = registered or own  # asked of the class
        try:
            super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        finally:
            type(self)._auto_class = registered
        if self.write_card is not None and self.should_save_on_this_rank(is_main_process):
            self.write_card(save_directory)

    def _upload_modified_files(self, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """As every model, after the card that is there, or the one of no words that every model gets, is completed."""
        if self.write_card is not None:
            self.write_card(working_dir, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)


class RMTModel(RMTPreTrainedModel):
    """The decoder without a head.

    Source: arXiv 2507.00453, section 3; docs/architecture.md lists every departure.
    """

    def __init__(self, config: RMTConfig) -> None:
        config.validate_architecture()  # fields may have been set since it was made
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([RMTDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = RMTRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RMTRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: RMTCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Reads T more columns of B streams: `last_hidden_state` (B, T, E) and `past_key_values`.

        ValueError or TypeError if an input breaks a rule, and nothing has been changed then; RuntimeError if another
        call, in another thread, is reading with the same state.

        Args:
            input_ids: (B, T) int64; this or `inputs_embeds`.
            attention_mask: (B, T) for this call, or (B, columns read before + T); 0 at padding, which may be anywhere.
            position_ids: (B or 1, T) stream positions of the real tokens, checked against the state. Where they go back
                to 0, at a segment start, a new document begins, which sees nothing of what is before it.
            past_key_values: The state of the B streams, changed by the call; None begins new streams.
            inputs_embeds: (B, T, E) instead of `input_ids`.
            use_cache: Whether to return a state although none was given.
            kwargs: What records outputs, or is for the loss.
        """
        if position_ids is None and (packing := sorted(PACKING & set(kwargs))):
            raise ValueError(f"{packing[0]} must come with position_ids, got none: they tell packed documents apart.")
        cache = RMTCache(self.config) if past_key_values is None and use_cache else past_key_values
        if cache is not None:
            check_cache_type(cache)
        if kwargs.get("output_attentions") and not self.config.gives_attentions:
            logger.warning_once('output_attentions=True gives weights with attn_implementation="eager" alone.')
        read = self._read if torch.compiler.is_exporting() else self._read_in_python
        with nullcontext() if cache is None else cache.exclusive():
            hidden_states = read(cache, input_ids, attention_mask, position_ids, inputs_embeds)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=cache)

    def _read(self, cache: RMTCache | None, *inputs: torch.Tensor | None) -> torch.Tensor:
        """Last hidden states (B, T, E); the state changes when all is done."""
        hidden_states, layout = self._prepare(cache, *inputs)
        states = None if cache is None else [layer.state for layer in cache.layers]
        hidden_states, states = self._run_layers(hidden_states, replace(layout, starts=(), ends=()), states)
        if cache is not None:
            cache.commit(states, layout, inputs[0], self)
        return hidden_states

    # The bookkeeping of a call is Python and changes with every call: `torch.compile` compiles `_run_layers` alone.
    _read_in_python = torch.compiler.disable(_read, recursive=False)

    @torch.compiler.disable
    def _prepare(self, cache: RMTCache | None, *inputs: torch.Tensor | None) -> tuple[torch.Tensor, CallLayout]:
        """Checks everything, before anything changes: embeddings (B, T, E), and where their columns belong."""
        (input_ids, attention_mask, position_ids, inputs_embeds), config = inputs, self.config
        inputs_embeds = embed(self.embed_tokens, config.hidden_size, input_ids, inputs_embeds)
        batch_size, num_columns = inputs_embeds.shape[:2]
        if cache is not None and self.training and torch.is_grad_enabled():
            refuse_reentrant_checkpoints(self.layers)
        is_exporting = torch.compiler.is_exporting()  # values are not known then, and there may be any number of rows
        if is_exporting and (attention_mask is not None or position_ids is not None):
            remedy = "they decide what is computed. Export rows without padding and packing, without these arguments."
            raise ValueError(f"attention_mask and position_ids must be None in torch.export: {remedy}")
        starts = stream_starts(cache, config, 1 if is_exporting and cache is None else batch_size)
        num_past = 0 if cache is None else cache.num_columns
        is_real = real_columns(attention_mask, num_past, batch_size, num_columns)
        inputs_embeds = clear_padding(inputs_embeds, is_real, check=input_ids is None and not is_exporting)
        restarts = find_restarts(position_ids, starts, is_real, num_columns, config.segment_length)
        forgotten, refreshes = ((), False) if cache is None else (cache.forgotten, cache.is_stale)
        refreshes = cache is not None and config.prefix_length > 0 and (refreshes or torch.is_grad_enabled())
        device = inputs_embeds.device
        return inputs_embeds, plan_call(config, starts, is_real, num_columns, device, restarts, refreshes, forgotten)

    def _run_layers(
        self, hidden_states: torch.Tensor, layout: CallLayout, states: list[LayerState | None] | None
    ) -> tuple[torch.Tensor, list[Any]]:
        """The only loop over layers, and the norm after all: (B, T, E), and the states if some were given."""
        tables = self.rotary_emb.of_call(layout, hidden_states.dtype, states is not None)
        new_states: list[Any] = []
        for index, layer in enumerate(self.layers):
            state = None if states is None else states[index]
            found = layer(hidden_states, layout=layout, tables=tables, state=state, keep_state=states is not None)
            # A layer of another stage of a pipeline is an identity here, which has no state.
            hidden_states, state = found if isinstance(found, tuple) else (found, None)
            new_states.append(state)
        return self.norm(hidden_states), new_states


class RMTForCausalLM(RMTPreTrainedModel, RMTGeneration, GenerationMixin):  # type: ignore[misc]  # hooks take less
    """The language model: decoder and vocabulary projection."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # type: ignore[dict-item]  # as every model has it
    _fsdp_plan = {"lm_head": "keep_full_weight"}
    accepts_loss_kwargs = True

    def __init__(self, config: RMTConfig) -> None:
        super().__init__(config)
        self.model = RMTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def has_chunked_loss(self) -> bool:
        """Whether a loss needs no logits: `config.use_chunked_loss`, unless a tool has changed the projection.

        Quantized, sharded, offloaded or adapted weights are for the forward pass of their own module alone.
        """
        is_plain = type(self.lm_head) is nn.Linear and "forward" not in vars(self.lm_head)
        is_plain = is_plain and type(self.lm_head.weight) in (nn.Parameter, torch.Tensor)
        return self.config.use_chunked_loss and is_plain

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: RMTCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss if labels are given; other arguments and errors as of `RMTModel.forward`.

        Args:
            labels: (B, T) token ids, not shifted; -100 is ignored.
            logits_to_keep: Last columns to project (0 for all), or a tensor of columns.

        Returns:
            `logits` (B, T, V), `loss`, `past_key_values`, and what `output_hidden_states`, `output_attentions` ask for.
            In training, with labels and `has_chunked_loss`, no logits.
        """
        check_labels(labels, input_ids if inputs_embeds is None else inputs_embeds)
        in_chunks = labels is not None and self.has_chunked_loss
        if in_chunks and not hasattr(F, "linear_cross_entropy"):
            version = f"torch 2.13 or newer, got {torch.__version__}"
            raise RuntimeError(f"use_chunked_loss=True needs {version}: set it to False, or install a newer torch.")
        inputs: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
        }
        inputs |= {"past_key_values": past_key_values, "inputs_embeds": inputs_embeds, "use_cache": use_cache}
        outputs = self.model(**inputs, **kwargs)
        logits = loss = None
        if not (in_chunks and self.training):  # who evaluates may want them
            logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        if in_chunks:
            loss = chunked_loss(outputs.last_hidden_state, self.lm_head.weight, cast(torch.Tensor, labels), **kwargs)
        elif labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        rest = {name: outputs.get(name) for name in ("past_key_values", "hidden_states", "attentions")}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **rest)


class RMTForSequenceClassification(heads.GenericForSequenceClassification, RMTPreTrainedModel):
    """One prediction per row, from its last token that is no padding."""

    def __init__(self, config: RMTConfig) -> None:
        super(heads.GenericForSequenceClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = RMTModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()


class RMTForTokenClassification(heads.GenericForTokenClassification, RMTPreTrainedModel):
    """One prediction per token."""

    def __init__(self, config: RMTConfig) -> None:
        super(heads.GenericForTokenClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = RMTModel(config)
        dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.score = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()


class RMTForQuestionAnswering(heads.GenericForQuestionAnswering, RMTPreTrainedModel):
    """Start and end of an answer in the text."""

    def __init__(self, config: RMTConfig) -> None:
        super(heads.GenericForQuestionAnswering, self).__init__(config)
        self.model = RMTModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


def chunked_loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """The loss of transformers, of hidden states (B, T, E) and weights (V, E), without all logits at once."""
    ignored, shifted = kwargs.get("ignore_index", -100), kwargs.get("shift_labels")
    shifted = F.pad(labels[:, 1:], (0, 1), value=ignored) if shifted is None else shifted
    targets, num_items = shifted.flatten().to(hidden.device), kwargs.get("num_items_in_batch")
    options = {"ignore_index": ignored, "options": nn.LinearCrossEntropyOptions()}
    options["reduction"] = "mean" if num_items is None else "sum"
    loss = F.linear_cross_entropy(hidden.flatten(0, 1), weight, targets, **options)
    return loss if num_items is None else loss / num_items


def refuse_reentrant_checkpoints(layers: nn.ModuleList) -> None:
    """Refuses the kind of checkpoint that cuts the gradient through the state without a word."""
    functions = [layer._gradient_checkpointing_func for layer in layers if layer.gradient_checkpointing]
    if any(getattr(function, "keywords", {}).get("use_reentrant", True) for function in functions):
        remedy = "enable checkpoints with use_reentrant=False, or pass no past_key_values."
        raise ValueError(f"use_reentrant=True cuts the gradient through past_key_values: {remedy}")


# The class for each auto class, and the library's table of class names for it, which Trainer and pipelines ask and
# `register` leaves as it is. Filled here and not in the package, because this file travels to the Hub.
AUTO_CLASSES: dict[str, tuple[type[RMTPreTrainedModel], dict[str, Any]]] = {}
for _class in RMTPreTrainedModel.__subclasses__():
    _name = f"Model{_class.__name__.removeprefix('RMT').removeprefix('Model')}"
    _table = getattr(modeling_auto, re.sub("(?<=[a-z])(?=[A-Z])", "_", _name).upper() + "_MAPPING_NAMES")
    _table.setdefault(RMTConfig.model_type, _class.__name__)
    AUTO_CLASSES[f"Auto{_name}"] = _class, _table

__all__ = [*(_class.__name__ for _class, _ in AUTO_CLASSES.values()), "RMTPreTrainedModel"]
