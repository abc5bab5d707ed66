"""Every number that defines a recurrent-memory transformer, with its meaning and its rule."""

import difflib
from typing import Any, cast

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters
from transformers.utils import logging


logger = logging.get_logger(__name__)

MEMORY_WRITES = ("select", "mean")
NO_LIMIT = 2**30  # a number for tools that ask how long an input may be
FUSION_TYPES = ("gated", "softmax")
ROPE_TYPES = {  # and the numbers that each asks for besides rope_theta
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@strict
class RMTConfig(PreTrainedConfig):
    """Configuration of a recurrent memory-augmented transformer.

    Args:
        vocab_size (`int`, defaults to 32000): Number of token ids; at least 1.
        hidden_size (`int`, defaults to 768): Width of the residual stream; at least 1.
        intermediate_size (`int`, defaults to 2048): Width inside the MLP; at least 1.
        num_hidden_layers (`int`, defaults to 12): Number of decoder layers; at least 1.
        num_attention_heads (`int`, defaults to 12): Number of query heads; a multiple of `num_key_value_heads`.
        num_key_value_heads (`int`, *optional*): Number of key/value heads, which are also the heads of memory; defaults
            to `num_attention_heads`.
        head_dim (`int`, *optional*): Width of one head, even because of the rotary encoding; defaults to
            `hidden_size // num_attention_heads`, which must then divide exactly.
        hidden_act (`str`, defaults to `"silu"`): Activation of the MLP; a name known to transformers.
        rms_norm_eps (`float`, defaults to 1e-6): Added to the variance in every norm; above 0.
        initializer_range (`float`, defaults to 0.02): Standard deviation of initial weights; at least 0.
        max_position_embeddings (`int`, defaults to 2^30): For tools that ask. It is no limit of this model and limits
            nothing; a converted model has the number of its source.
        rope_parameters (`dict`, *optional*): `rope_type` (`"default"`, `"linear"` or `"llama3"`) and `rope_theta`, with
            what the type asks for; defaults to the plain type with theta 10,000.
        attention_bias (`bool`, defaults to `False`): Whether the q, k, v and o projections have a bias.
        attention_dropout (`float`, defaults to 0.0): Dropout on attention weights in training; at least 0, below 1.
        mlp_bias (`bool`, defaults to `False`): Whether the MLP projections have a bias.
        tie_word_embeddings (`bool`, defaults to `False`): Whether `lm_head` shares the weight of `embed_tokens`.
        use_cache (`bool`, defaults to `True`): Whether the forward pass returns the state by default.
        pad_token_id (`int`, *optional*): Id used for padding; below `vocab_size`.
        bos_token_id (`int`, *optional*, defaults to 1): Id that begins a document; below `vocab_size`.
        eos_token_id (`int`, *optional*, defaults to 2): Id, or ids, that end a document; below `vocab_size`.
        chunk_length (`int`, defaults to 64): Tokens that local attention sees, condensed together; at least 1.
        segment_length (`int`, defaults to 256): Tokens between two memory writes; a multiple of `chunk_length`.
        num_lookback_segments (`int`, defaults to 1): Full segments before the current one that stay live; at least 0.
        num_memory_slots (`int`, defaults to 64): Slots of memory per layer and key/value head; 0 turns memory off,
            else a multiple of `num_slots_per_segment`.
        num_lasting_slots (`int`, *optional*): Slots of the part of memory that keeps tokens by their learned score; the
            others form the part that keeps what the present attends to. `None` makes one ring of all slots, whose
            strength is the sum of both. Multiples of `num_slots_per_segment`.
        num_observing_tokens (`int`, defaults to 16): Last tokens before a write, whose attention to the leaving segment
            is the evidence of its tokens; 1 to `segment_length`.
        num_slots_per_chunk (`int`, defaults to 1): Candidates for slots that a chunk gives; at least 1, at most
            `chunk_length`, and a divisor of it with `memory_write="mean"`.
        memory_write (`str`, defaults to `"select"`): How a chunk becomes candidates: `"select"` takes its strongest
            tokens, `"mean"` averages.
        fusion_type (`str`, defaults to `"gated"`): `"gated"` reads memory and window in one softmax and adds the local
            path through a gate; `"softmax"` adds three softmaxes, weighted by three scalars.
        use_local_attention (`bool`, defaults to `True`): Whether the chunked local path exists.
        use_attention_sink (`bool`, defaults to `False`): Whether each key/value head has a key and value that stand
            before memory once the beginning of the stream has left the window, as a converted model wants it.
        use_qk_norm (`bool`, defaults to `True`): Whether queries and keys are normalised per head before the rotary
            encoding, as Qwen3 does.
        use_chunked_loss (`bool`, defaults to `False`): Whether the loss of the language model comes from pieces of the
            logits, which never exist all at once; outputs with a loss then have no `logits`. Needs torch 2.13.

    Raises:
        ValueError: If a value breaks its rule; the message names the field, the value, the rule and a remedy.

    Source: names of `transformers.LlamaConfig`, and section 3 of arXiv 2507.00453 for the rest. Departs from the paper:
    chunk and segment are two lengths, and the memory is sized in slots per key/value head.
    """

    model_type = "rmt"
    auto_map = {}
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    initializer_range: float | int = 0.02
    max_position_embeddings: int = NO_LIMIT
    rope_parameters: RopeParameters | dict | None = None
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    chunk_length: int = 64
    segment_length: int = 256
    num_lookback_segments: int = 1
    num_memory_slots: int = 64
    num_lasting_slots: int | None = None
    num_observing_tokens: int = 16
    num_slots_per_chunk: int = 1
    memory_write: str = "select"
    fusion_type: str = "gated"
    use_local_attention: bool = True
    use_attention_sink: bool = False
    use_qk_norm: bool = True
    use_chunked_loss: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                    f"({self.num_attention_heads}) unless head_dim is given: change one of them or give head_dim."
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        self._warn_about_misspelt(kwargs)
        self._check_rope(kwargs.get("rope_scaling") or cast(dict, self.rope_parameters) or {})
        super().__post_init__(**kwargs)
        self.validate_architecture()

    @classmethod
    def paper(cls, **overrides: Any) -> "RMTConfig":
        """The form closest to arXiv 2507.00453: no lookback, softmax fusion, mean write, no query/key norm.

        Args:
            overrides: Any field of the configuration; wins over the preset.
        """
        fields = {"num_lookback_segments": 0, "fusion_type": "softmax", "memory_write": "mean", "use_qk_norm": False}
        return cls(**{**fields, **overrides})

    @property
    def num_slots_per_segment(self) -> int:
        """Candidates that one segment offers to each part of memory."""
        return self.num_slots_per_chunk * (self.segment_length // self.chunk_length)

    @property
    def memory_parts(self) -> tuple[tuple[int, bool, bool], ...]:
        """The rings of memory: number of slots, whether the score counts for them, and whether the evidence does."""
        selects, lasting = self.memory_write == "select", self.num_lasting_slots
        if lasting is None:
            parts = [(self.num_memory_slots, selects, selects)]
        else:
            parts = [(lasting, True, False), (self.num_memory_slots - lasting, False, True)]
        return tuple(part for part in parts if part[0])

    @property
    def prefix_length(self) -> int:
        """Columns before the window: the slots, and the sink."""
        return self.num_memory_slots + self.use_attention_sink

    @property
    def window_length(self) -> int:
        """Largest number of live tokens that global attention sees."""
        return (self.num_lookback_segments + 1) * self.segment_length

    @property
    def key_value_shape(self) -> tuple[int, int]:
        """Number of key/value heads and width of a head: two fields that are numbers once the configuration is made."""
        return cast(int, self.num_key_value_heads), cast(int, self.head_dim)

    @property
    def base_model_tp_plan(self) -> dict[str, str]:  # type: ignore[override]  # which modules there are depends on fields
        """How tensor parallelism deals a layer out: by heads, whose memory is their own, and by columns of the MLP."""
        names = {f"mlp.{name}_proj": "colwise" for name in ("gate", "up")} | {"mlp.down_proj": "rowwise"}
        names |= {f"self_attn.{name}_proj": "colwise" for name in "qkv"} | {"self_attn.o_proj": "rowwise"}
        norms = ["q_norm", "k_norm"] if self.use_qk_norm else []
        names |= {f"self_attn.{name}": "replicated_with_grad_allreduce" for name in norms}
        for index, (_, uses_score, uses_evidence) in enumerate(self.memory_parts):
            ring = ["gate_weight", "gate_scale", "gate_bias", "fade"]
            ring += ["evidence_scale"] if uses_score and uses_evidence else []
            names |= {f"self_attn.memory.rings.{index}.{name}": "colwise" for name in ring}
            names |= {"self_attn.memory.score_proj": "colwise"} if uses_score else {}
        if self.use_attention_sink:
            names |= {f"self_attn.sink.{name}": "colwise" for name in ("key", "value")}
        if self.fusion_type == "softmax" and (self.prefix_length or self.use_local_attention):
            names |= {"self_attn.fusion": "replicated_with_grad_allreduce"}
        elif self.fusion_type == "gated" and self.use_local_attention:
            names |= {"self_attn.fusion.gate": "colwise", "self_attn.fusion.scale": "colwise"}
        return {f"layers.*.{name}": style for name, style in names.items()}

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As every configuration; where the code is saved with it, too, `auto_map` becomes its own."""
        if self._auto_class is not None:
            self.auto_map = dict(self.auto_map)
        super().save_pretrained(*args, **kwargs)

    def validate_architecture(self) -> None:
        """Checks the rules that hold for one field or between several. Called by `@strict` and before saving."""
        at_least = {name: 1 for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
        at_least |= {name: 1 for name in ("num_attention_heads", "num_key_value_heads", "head_dim")}
        at_least |= {name: 1 for name in ("chunk_length", "segment_length", "num_slots_per_chunk")}
        at_least |= {name: 1 for name in ("num_observing_tokens", "max_position_embeddings")}
        at_least |= {"num_lookback_segments": 0, "num_memory_slots": 0, "initializer_range": 0, "attention_dropout": 0}
        for name, minimum in at_least.items():
            value = getattr(self, name)
            if value is None or value < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {value}.")
        if self.rms_norm_eps <= 0:
            raise ValueError(f"rms_norm_eps must be above 0, got {self.rms_norm_eps}.")
        if self.num_observing_tokens > self.segment_length:
            raise ValueError(
                f"num_observing_tokens must be at most segment_length ({self.segment_length}), got "
                f"{self.num_observing_tokens}."
            )
        if self.attention_dropout >= 1:
            raise ValueError(f"attention_dropout must be below 1, got {self.attention_dropout}.")
        if self.key_value_shape[1] % 2:
            raise ValueError(f"head_dim must be even for the rotary encoding, got {self.head_dim}.")
        self._check_choices()
        self._check_multiples()

    def _check_choices(self) -> None:
        lasting = self.num_lasting_slots
        if lasting is not None and (self.memory_write == "mean" or not 0 <= lasting <= self.num_memory_slots):
            raise ValueError(
                f"num_lasting_slots must be from 0 to num_memory_slots ({self.num_memory_slots}), and None with "
                f'memory_write="mean", got {lasting}.'
            )
        for name, choices in (("memory_write", MEMORY_WRITES), ("fusion_type", FUSION_TYPES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act must be a name in transformers.activations.ACT2FN, got {self.hidden_act!r}.")
        self._check_rope(cast(dict, self.rope_parameters))

    @staticmethod
    def _check_rope(rope_parameters: dict) -> None:
        rope_type = rope_parameters.get("rope_type", rope_parameters.get("type", "default"))
        if rope_type not in ROPE_TYPES:
            choices = ", ".join(ROPE_TYPES)
            raise ValueError(f'rope_parameters["rope_type"] must be one of {choices}, got {rope_type!r}.')
        for name in ROPE_TYPES[rope_type] + (("rope_theta",) if "rope_theta" in rope_parameters else ()):
            value = rope_parameters.get(name)
            if not isinstance(value, int | float) or value <= 0:
                raise ValueError(
                    f'rope_parameters["{name}"] must be a number above 0 with rope_type {rope_type!r}, got {value!r}.'
                )

    def standardize_rope_params(self) -> None:
        """Names the type. (The inherited method asks for `max_position_embeddings`; a stream has no such thing.)"""
        parameters = cast(dict, self.rope_parameters)
        parameters.setdefault("rope_type", parameters.get("type", "default"))

    def _validate_llama3_rope_parameters(self, rope_parameters: Any, ignore_keys: set[str] | None = None) -> None:
        """Warns about unknown keys; the inherited method compares with `max_position_embeddings` as well."""
        known = {"rope_type", "rope_theta", *ROPE_TYPES["llama3"]}
        self._check_received_keys("llama3", set(rope_parameters), known, ignore_keys=ignore_keys)

    def _check_multiples(self) -> None:
        rules = [
            ("num_attention_heads", self.num_attention_heads, "num_key_value_heads", self.key_value_shape[0]),
            ("segment_length", self.segment_length, "chunk_length", self.chunk_length),
        ]
        if self.num_memory_slots:
            segment_rule = "num_slots_per_chunk * segment_length / chunk_length"
            rules.append(("num_memory_slots", self.num_memory_slots, segment_rule, self.num_slots_per_segment))
            rules.append(("num_lasting_slots", self.num_lasting_slots or 0, segment_rule, self.num_slots_per_segment))
        if self.memory_write == "mean":
            rules.append(("chunk_length", self.chunk_length, "num_slots_per_chunk", self.num_slots_per_chunk))
        for name, value, divisor_name, divisor in rules:
            if value % divisor:
                nearest = divisor * max(1, round(value / divisor))
                raise ValueError(
                    f"{name} ({value}) must be a multiple of {divisor_name} ({divisor}): {nearest} is the nearest."
                )
        if self.num_slots_per_chunk > self.chunk_length:
            raise ValueError(
                f"num_slots_per_chunk ({self.num_slots_per_chunk}) must be at most chunk_length ({self.chunk_length}): "
                "a chunk cannot give more slots than it has tokens."
            )

    def _warn_about_misspelt(self, kwargs: dict) -> None:
        names = [name for name in type(self).__dataclass_fields__ if not name.startswith("_")]
        for name in kwargs:
            for match in [] if hasattr(type(self), name) else difflib.get_close_matches(name, names, n=1, cutoff=0.85):
                logger.warning(
                    f"RMTConfig has no field {name!r}: it is kept but changes nothing. Did you mean {match!r}?"
                )


__all__ = ["RMTConfig"]
