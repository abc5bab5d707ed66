"""The model: MLP, decoder layer, stack of layers, and the heads that make it useful.

Shapes: B rows, T columns of a call, E hidden size, V vocabulary. The walk of one call: embed; lay out the columns
(layout_rmt); rotary tables once; the only loop over layers; norm; head.
"""

from typing import Any, cast

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.models.auto import modeling_auto
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_rmt import RMTAttention, RMTFusionGate, RMTRMSNorm, RMTRotaryEmbedding, rotary_turns
from .cache_rmt import LayerState, RMTCache, state_fingerprint
from .configuration_rmt import RMTConfig
from .layout_rmt import CallLayout, plan_call
from .memory_rmt import RMTMemory


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


class RMTDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm block: attention and MLP, each added to the residual stream."""

    def __init__(self, config: RMTConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = RMTAttention(config, layer_idx)
        self.mlp = RMTMLP(config)
        self.input_layernorm = RMTRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMTRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, LayerState | None]:
        """(B, T, E) to (B, T, E) and the layer's new state; other arguments as `RMTAttention.forward` takes them."""
        attended, _, state = self.self_attn(self.input_layernorm(hidden_states), *args, **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)), state


FUSION_GATE_BIAS = -2.0  # sigmoid 0.12: the extra paths begin nearly closed
MEMORY_GATE_BIAS = 1.0  # stretched sigmoid 0.78: a write begins as mostly a replacement, with a gradient


class RMTPreTrainedModel(PreTrainedModel):
    """What all RMT models share: configuration, initialisation, abilities."""

    config: RMTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RMTDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _supports_context_parallel = False
    _can_compile_fullgraph = False
    _can_record_outputs = {"hidden_states": RMTDecoderLayer, "attentions": RMTAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initial values. As Llama: linear and embedding weights normal, `initializer_range`; biases 0; norms 1. Own:

        | tensor | law |
        |---|---|
        | memory.null_key | normal, `initializer_range` |
        | memory.gate_weight | 0: every slot is treated alike at first |
        | memory.gate_bias | MEMORY_GATE_BIAS |
        | fusion_gate_proj.bias | FUSION_GATE_BIAS |
        | fusion_scale | 1 |
        | fusion_logits | 0: equal shares |
        """
        super()._init_weights(module)
        if isinstance(module, RMTMemory):
            init.normal_(module.null_key, std=self.config.initializer_range)
            init.zeros_(module.gate_weight)
            init.constant_(module.gate_bias, MEMORY_GATE_BIAS)
        elif isinstance(module, RMTAttention):
            if hasattr(module, "fusion_scale"):
                init.ones_(module.fusion_scale)
            if hasattr(module, "fusion_logits"):
                init.zeros_(module.fusion_logits)
        elif isinstance(module, RMTFusionGate):
            init.constant_(module.bias, FUSION_GATE_BIAS)
        elif isinstance(module, RMTRotaryEmbedding):
            init.copy_(module.turns, rotary_turns(module.config))

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As every model. Where the code is saved, too (`register_for_auto_class`), all its classes can be loaded."""
        if self._auto_class is not None:
            classes = {name: f"modeling_rmt.{model_class.__name__}" for name, (model_class, _) in AUTO_CLASSES.items()}
            known = getattr(self.config, "auto_map", None) or {}
            self.config.auto_map = known | {"AutoConfig": "configuration_rmt.RMTConfig"} | classes
        super().save_pretrained(*args, **kwargs)


class RMTModel(RMTPreTrainedModel):
    """The decoder without a head.

    Args:
        config (`RMTConfig`): What to build.

    Source: arXiv 2507.00453, section 3; docs/design.md lists every departure.
    """

    def __init__(self, config: RMTConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([RMTDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = RMTRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RMTRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(  # type: ignore[misc]  # TransformersKwargs names position_ids again
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: RMTCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Reads T more columns of B streams.

        Args:
            input_ids: (B, T) int64; this or `inputs_embeds`.
            attention_mask: (B, T) for this call, or (B, columns read before + T); 0 at padding, which may be anywhere.
            position_ids: (B or 1, T) stream positions of the real tokens; only checked against the state.
            past_key_values: The state of the B streams, changed by the call; None begins new streams.
            inputs_embeds: (B, T, E) instead of `input_ids`.
            use_cache: Whether to return a state although none was given.

        Returns:
            `last_hidden_state` (B, T, E) and `past_key_values`.

        Raises:
            ValueError: If an input breaks a rule; nothing has been changed then.
            TypeError: If `past_key_values` is not an RMTCache.
        """
        inputs_embeds = self._embed(input_ids, inputs_embeds)
        batch_size, num_columns = inputs_embeds.shape[:2]
        if past_key_values is None and use_cache:
            past_key_values = RMTCache(self.config)
        if past_key_values is not None and self.training and torch.is_grad_enabled():
            _refuse_reentrant_checkpoints(self.layers)
        starts = _stream_starts(past_key_values, self.config, batch_size)
        is_real = _real_columns(attention_mask, past_key_values, batch_size, num_columns)
        inputs_embeds = _clear_padding(inputs_embeds, is_real, check=input_ids is None)
        layout = plan_call(self.config, starts, is_real, num_columns, inputs_embeds.device)
        _check_position_ids(position_ids, layout, num_columns)

        position_embeddings = self.rotary_emb(layout.position_ids, inputs_embeds.dtype)
        if layout.write_position_ids is not None:
            position_embeddings += self.rotary_emb(layout.write_position_ids, inputs_embeds.dtype)
        output_attentions = kwargs.get("output_attentions") or self.config.output_attentions
        hidden_states, states = inputs_embeds, []
        for index, layer in enumerate(self.layers):
            hidden_states, state = layer(
                hidden_states,
                layout=layout,
                position_embeddings=position_embeddings,
                state=past_key_values.layers[index].state if past_key_values is not None else None,
                keep_state=past_key_values is not None,
                output_attentions=output_attentions,
            )
            states.append(state)
        if past_key_values is not None:
            past_key_values.commit(states, list(layout.ends), num_columns)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _embed(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """Embeddings of checked inputs, (B, T, E)."""
        if (input_ids is None) == (inputs_embeds is None):
            got = "neither" if input_ids is None else "both"
            raise ValueError(f"Exactly one of input_ids and inputs_embeds is wanted, got {got}: give one of them.")
        if inputs_embeds is not None:
            _check_axes("inputs_embeds", inputs_embeds, ("batch", "columns", "hidden_size"))
            if inputs_embeds.shape[2] != self.config.hidden_size:
                raise ValueError(
                    f"inputs_embeds must be hidden_size ({self.config.hidden_size}) wide, got {inputs_embeds.shape[2]}."
                )
            return inputs_embeds
        ids = cast(torch.Tensor, input_ids)
        _check_axes("input_ids", ids, ("batch", "columns"))
        if not torch.compiler.is_compiling() and not ids.is_meta:
            lowest, highest = int(ids.min()), int(ids.max())
            if lowest < 0 or highest >= self.embed_tokens.num_embeddings:
                raise ValueError(
                    f"input_ids must lie in 0 .. {self.embed_tokens.num_embeddings - 1}, got {lowest} .. {highest}: is "
                    "the tokenizer the model's own? If tokens were added, call "
                    "model.resize_token_embeddings(len(tokenizer))."
                )
        return self.embed_tokens(ids)


def _check_axes(name: str, given: torch.Tensor, axes: tuple[str, ...]) -> None:
    """Refuses inputs with other axes than these, or with nothing in them."""
    if given.dim() != len(axes) or 0 in given.shape:
        raise ValueError(
            f"{name} must have {len(axes)} axes, ({', '.join(axes)}), none of them empty; got shape "
            f"{tuple(given.shape)}. (`generate` with past_key_values wants all columns since the state began, not only "
            "the new ones.)"
        )


def _refuse_reentrant_checkpoints(layers: nn.ModuleList) -> None:
    """Refuses the kind of checkpoint that cuts the gradient through the state without a word."""
    functions = [layer._gradient_checkpointing_func for layer in layers if layer.gradient_checkpointing]
    if any(getattr(function, "keywords", {}).get("use_reentrant", True) for function in functions):
        raise ValueError(
            "Gradient checkpointing with use_reentrant=True cuts the gradient through past_key_values: enable it with "
            "use_reentrant=False, or pass no past_key_values."
        )


def _check_cache_type(cache: object) -> None:
    """Refuses caches of other models; by what it has, as the class from a Hub folder is not that of the package."""
    if not hasattr(cache, "fingerprint"):
        raise TypeError(
            f"past_key_values must be an RMTCache, got {type(cache).__name__}: pass RMTCache(model.config), or "
            "use_cache=True and the state that the first call returns. (Prefix tuning brings its own: it cannot work.)"
        )


def _stream_starts(cache: RMTCache | None, config: RMTConfig, batch_size: int) -> list[int]:
    """Stream position of each row, after checking that the state is one of this model and this batch."""
    if cache is None:
        return [0] * batch_size
    _check_cache_type(cache)
    ours = state_fingerprint(config)
    different = [
        f"{name} {cache.fingerprint[name]} instead of {ours[name]}"
        for name in ours
        if cache.fingerprint[name] != ours[name]
    ]
    if different:
        raise ValueError(
            f"past_key_values must be a state of this configuration, got one with {', '.join(different)}: begin a new "
            "one with RMTCache(model.config), or use the model that wrote it."
        )
    if cache.positions and len(cache.positions) != batch_size:
        raise ValueError(
            f"past_key_values holds {len(cache.positions)} streams, the input has {batch_size} rows: give one row per "
            "stream, or use the state's batch_select_indices or batch_repeat_interleave."
        )
    return cache.positions or [0] * batch_size


def _real_columns(
    attention_mask: torch.Tensor | None, cache: RMTCache | None, batch_size: int, num_columns: int
) -> torch.Tensor | None:
    """(B, T) bool of this call's columns, None if no column is padding."""
    if attention_mask is None:
        return None
    past = cache.num_columns if cache is not None else 0
    shapes = {(batch_size, num_columns), (batch_size, past + num_columns)}
    if not isinstance(attention_mask, torch.Tensor) or tuple(attention_mask.shape) not in shapes:
        got = tuple(attention_mask.shape) if isinstance(attention_mask, torch.Tensor) else type(attention_mask).__name__
        raise ValueError(
            f"attention_mask must be a tensor of shape {' or '.join(map(str, sorted(shapes)))}, 1 at real tokens and 0 "
            f"at padding; got {got}."
        )
    is_real = attention_mask[:, -num_columns:] != 0
    return None if is_real.all() else is_real


def _clear_padding(inputs_embeds: torch.Tensor, is_real: torch.Tensor | None, check: bool) -> torch.Tensor:
    """Embeddings (B, T, E) with zeros at padding, which need not even be finite; the rest must be, if `check`."""
    if is_real is not None:
        inputs_embeds = inputs_embeds.masked_fill(~is_real[..., None], 0)
    check = check and not torch.compiler.is_compiling() and not inputs_embeds.is_meta
    if check and not inputs_embeds.isfinite().all():
        raise ValueError("inputs_embeds must be finite, got NaN or infinity: check what produced them.")
    return inputs_embeds


def _check_position_ids(position_ids: torch.Tensor | None, layout: CallLayout, columns: int) -> None:
    """Refuses stream positions that are not those the state is at."""
    if position_ids is None:
        return
    shapes = {(1, columns), (len(layout.starts), columns)}
    if tuple(position_ids.shape) not in shapes:
        raise ValueError(
            f"position_ids must be a tensor of shape {' or '.join(map(str, sorted(shapes)))}, got "
            f"{tuple(position_ids.shape)}: leave position_ids out, the state counts real tokens itself."
        )
    if layout.is_real is None:
        expected = layout.per_row(layout.starts)[:, None] + torch.arange(columns, device=position_ids.device)
        wrong = position_ids != expected
    else:
        expected = layout.per_row(layout.starts)[:, None] + layout.is_real.cumsum(1) - 1
        wrong = (position_ids != expected) & layout.is_real
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        got = position_ids.expand_as(expected)[row, column]
        raise ValueError(
            f"position_ids contradict the state: row {row}, column {column} is at {expected[row, column]} of its "
            f"stream, got {got}. Leave position_ids out: the state counts real tokens itself. "
            "(`generate` makes them from attention_mask: give it one, or every padding id counts as padding.) "
            "Several documents packed into one row are not supported: give each its own row."
        )


def _check_labels(labels: torch.Tensor | None, inputs: torch.Tensor | None) -> None:
    """Refuses labels of another shape before the call changes the state, and not after it."""
    if labels is not None and inputs is not None and labels.shape != inputs.shape[:2]:
        raise ValueError(
            f"labels must have the shape of the input, {tuple(inputs.shape[:2])}, got {tuple(labels.shape)}: give one "
            "label for each column of the call, not shifted, -100 where none is wanted."
        )


class RMTForCausalLM(RMTPreTrainedModel, GenerationMixin):
    """The language model: decoder and vocabulary projection."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: RMTConfig) -> None:
        super().__init__(config)
        self.model = RMTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(  # type: ignore[misc]  # TransformersKwargs names position_ids again
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: RMTCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss if labels are given; other arguments as `RMTModel.forward` takes them.

        Args:
            labels: (B, T) token ids, not shifted; -100 is ignored.
            logits_to_keep: Last columns to project (0 for all), or a tensor of columns.

        Returns:
            `logits` (B, T, V), `loss`, `past_key_values`, and what `output_hidden_states`, `output_attentions` ask for.
        """
        _check_labels(labels, input_ids if inputs_embeds is None else inputs_embeds)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Gives `generate` an RMTCache where it would make a cache that grows."""
        given = model_kwargs.get("past_key_values")
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} does not apply to this model, whose "
                "state is of constant size anyway: leave it out."
            )
        if given is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = RMTCache(self.config)
        elif given is not None:
            _check_cache_type(given)
            given._is_user_defined = True


class RMTForSequenceClassification(GenericForSequenceClassification, RMTPreTrainedModel):
    """One prediction per row, from its last token that is no padding."""

    def __init__(self, config: RMTConfig) -> None:
        super(GenericForSequenceClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = RMTModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()


class RMTForTokenClassification(GenericForTokenClassification, RMTPreTrainedModel):
    """One prediction per token."""

    def __init__(self, config: RMTConfig) -> None:
        super(GenericForTokenClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = RMTModel(config)
        dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.score = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()


class RMTForQuestionAnswering(GenericForQuestionAnswering, RMTPreTrainedModel):
    """Start and end of an answer in the text."""

    def __init__(self, config: RMTConfig) -> None:
        super(GenericForQuestionAnswering, self).__init__(config)
        self.model = RMTModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


# The class for each auto class, and the library's table of class names for it.
AUTO_CLASSES: dict[str, tuple[type[RMTPreTrainedModel], dict]] = {
    "AutoModel": (RMTModel, modeling_auto.MODEL_MAPPING_NAMES),
    "AutoModelForCausalLM": (RMTForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "AutoModelForSequenceClassification": (
        RMTForSequenceClassification,
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
    "AutoModelForTokenClassification": (
        RMTForTokenClassification,
        modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    ),
    "AutoModelForQuestionAnswering": (
        RMTForQuestionAnswering,
        modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    ),
}

# Trainer asks these tables whether label smoothing must shift the labels, pipelines whether a head is the right one,
# and `register` leaves them as they are. Filled here and not in the package, because this file travels to the Hub.
for _model_class, _names in AUTO_CLASSES.values():
    _names.setdefault(RMTConfig.model_type, _model_class.__name__)

__all__ = [
    "RMTForCausalLM",
    "RMTForQuestionAnswering",
    "RMTForSequenceClassification",
    "RMTForTokenClassification",
    "RMTModel",
    "RMTPreTrainedModel",
]
