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
ROPE_TYPES = {  # and the numbers that each asks for besides rope_theta
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@strict
class RMTConfig(PreTrainedConfig):
    """Configuration of a recurrent memory-augmented transformer. Fields without a default are optional.

    Args:
        vocab_size (`int`, 32000): Number of token ids; at least 1.
        hidden_size (`int`, 768): Width of the residual stream; at least 1.
        intermediate_size (`int`, 2048): Width inside the MLP; at least 1.
        num_hidden_layers (`int`, 12): Number of decoder layers; at least 1.
        num_attention_heads (`int`, 12): Number of query heads; a multiple of `num_key_value_heads`.
        num_key_value_heads (`int`): Heads of keys, values and memory; by default `num_attention_heads`.
        head_dim (`int`): Width of a head, even; by default `hidden_size // num_attention_heads`, without a rest.
        hidden_act (`str`, `"silu"`): Activation of the MLP; a name known to transformers.
        rms_norm_eps (`float`, 1e-6): Added to the variance in every norm; above 0.
        initializer_range (`float`, 0.02): Standard deviation of initial weights; at least 0.
        max_position_embeddings (`int`, 2^30): For tools that ask; it limits nothing.
        rope_parameters (`dict`): `rope_type` ("default", "linear", "llama3"), `rope_theta` and what the type asks for.
        attention_bias (`bool`, `False`): Whether the q, k, v and o projections have a bias.
        attention_dropout (`float`, 0.0): Dropout on attention weights in training; at least 0, below 1.
        mlp_bias (`bool`, `False`): Whether the MLP projections have a bias.
        tie_word_embeddings (`bool`, `False`): Whether `lm_head` shares the weight of `embed_tokens`.
        use_cache (`bool`, `True`): Whether the forward pass returns the state by default.
        pad_token_id (`int`): Id used for padding; below `vocab_size`.
        bos_token_id (`int`, 1): Id that begins a document; below `vocab_size`.
        eos_token_id (`int` or `list`, 2): Id, or ids, that end a document; below `vocab_size`.
        chunk_length (`int`, 64): Tokens that local attention sees, condensed together; at least 1.
        segment_length (`int`, 256): Tokens between two memory writes; a multiple of `chunk_length`.
        num_lookback_segments (`int`, 1): Full segments before the current one that stay in the window; at least 0.
        num_memory_slots (`int`, 64): Slots of a head; 0 for no memory, else a multiple of `num_slots_per_segment`.
        num_lasting_slots (`int`): Slots of the ring that keeps tokens by their learned score; the others keep what the
            present attends to. None for one ring by the sum of both. A multiple of `num_slots_per_segment`.
        num_observing_tokens (`int`, 16): Last tokens before a write, whose attention to the leaving segment is the
            evidence of its tokens; 1 to `segment_length`.
        num_slots_per_chunk (`int`, 1): Candidates that a chunk gives; 1 to `chunk_length`, a divisor of it for "mean".
        memory_write (`str`, `"select"`): A chunk gives its strongest tokens, or, with `"mean"`, averages.
        fusion_type (`str`, `"gated"`): Memory and window are read in one softmax, and the local path is added through
            a gate; or, with `"softmax"`, all three have their own softmax and are weighted by three scalars.
        use_local_attention (`bool`, `True`): Whether the chunked local path exists.
        use_attention_sink (`bool`, `False`): Whether each key/value head has a key and a value that stand before memory
            once the beginning of the stream has left the window, as a converted model wants it.
        use_qk_norm (`bool`, `True`): Whether queries and keys are normalised per head before the rotary encoding.
        use_chunked_loss (`bool`, `False`): Whether the loss comes without logits that exist all at once, of which
            outputs then have none. Needs torch 2.13.

    Raises:
        ValueError: If a value breaks its rule; the message names the field, the value, the rule and a remedy.

    Source: names of `transformers.LlamaConfig`, and section 3 of arXiv 2507.00453 for the rest. Departs from the paper:
    chunk and segment are two lengths, and the memory is sized in slots per key/value head.
    """

    model_type = "rmt"
    auto_map = {}
    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

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
    max_position_embeddings: int = 2**30
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
        names = [name for name in type(self).__dataclass_fields__ if not name.startswith("_")]
        for name in kwargs:
            near = [] if hasattr(type(self), name) else difflib.get_close_matches(name, names, n=1, cutoff=0.85)
            for meant in near:
                logger.warning(
                    f"RMTConfig has no field {name!r}: it is kept but changes nothing. Did you mean {meant!r}?"
                )
        self._check_rope(kwargs.get("rope_scaling") or cast(dict, self.rope_parameters) or {})
        super().__post_init__(**kwargs)
        self.validate_architecture()

    @classmethod
    def paper(cls, **overrides: Any) -> "RMTConfig":
        """The form closest to arXiv 2507.00453: no lookback, softmax fusion, mean write, no query/key norm."""
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
        """How tensor parallelism shards a layer: by heads, whose memory is their own, and by columns of the MLP."""
        names = dict.fromkeys(("mlp.down_proj", "self_attn.o_proj"), "rowwise")
        by_head = ["q_proj", "k_proj", "v_proj", *(["sink.key", "sink.value"] if self.use_attention_sink else [])]
        whole = ["q_norm", "k_norm"] if self.use_qk_norm else []
        for index, (_, uses_score, uses_evidence) in enumerate(self.memory_parts):
            ring = ["gate_weight", "gate_scale", "gate_bias", "fade"]
            ring += ["evidence_scale"] if uses_score and uses_evidence else []
            by_head += [f"memory.rings.{index}.{name}" for name in ring] + ["memory.score_proj"] * uses_score
        if self.fusion_type == "softmax" and (self.prefix_length or self.use_local_attention):
            whole += ["fusion"]
        elif self.fusion_type == "gated" and self.use_local_attention:
            by_head += ["fusion.gate", "fusion.scale"]
        names |= dict.fromkeys(["mlp.gate_proj", "mlp.up_proj", *(f"self_attn.{name}" for name in by_head)], "colwise")
        names |= {f"self_attn.{name}": "replicated_with_grad_allreduce" for name in whole}
        return {f"layers.*.{name}": style for name, style in names.items()}

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As every configuration; where the code is saved with it, too, `auto_map` becomes its own."""
        if self._auto_class is not None:
            self.auto_map = dict(self.auto_map)
        super().save_pretrained(*args, **kwargs)

    def validate_architecture(self) -> None:
        """Checks the rules that hold for one field or between several. Called by `@strict` and before saving."""
        at_least_1 = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads head_dim
            num_key_value_heads chunk_length segment_length num_slots_per_chunk num_observing_tokens
            max_position_embeddings"""
        at_least_0 = "num_lookback_segments num_memory_slots initializer_range attention_dropout"
        for minimum, names in ((1, at_least_1), (0, at_least_0)):
            for name in names.split():
                value = getattr(self, name)
                if value is None or value < minimum:
                    raise ValueError(f"{name} must be at least {minimum}, got {value}.")
        slots, lasting, segment = self.num_memory_slots, self.num_lasting_slots, self.segment_length
        lasts = lasting is None or (self.memory_write != "mean" and 0 <= lasting <= slots)
        chunk, width = self.chunk_length, self.key_value_shape[1]
        rules = [
            ("rms_norm_eps", self.rms_norm_eps > 0, "above 0"),
            ("num_observing_tokens", self.num_observing_tokens <= segment, f"at most segment_length ({segment})"),
            ("attention_dropout", self.attention_dropout < 1, "below 1"),
            ("head_dim", width % 2 == 0, "even for the rotary encoding"),
            ("num_lasting_slots", lasts, f'from 0 to num_memory_slots ({slots}), and None with memory_write="mean"'),
            ("memory_write", self.memory_write in MEMORY_WRITES, "one of select, mean"),
            ("fusion_type", self.fusion_type in ("gated", "softmax"), "one of gated, softmax"),
            ("hidden_act", self.hidden_act in ACT2FN, "a name in transformers.activations.ACT2FN"),
        ]
        for name, holds, rule in rules:
            if not holds:
                raise ValueError(f"{name} must be {rule}, got {getattr(self, name)!r}.")
        self._check_rope(cast(dict, self.rope_parameters))
        self._check_multiples()
        if self.num_slots_per_chunk > chunk:
            raise ValueError(
                f"num_slots_per_chunk ({self.num_slots_per_chunk}) must be at most chunk_length ({chunk}): a chunk "
                "cannot give more slots than it has tokens."
            )

    def _check_multiples(self) -> None:
        rules = [("num_attention_heads", "num_key_value_heads"), ("segment_length", "chunk_length")]
        rules += [("chunk_length", "num_slots_per_chunk")] if self.memory_write == "mean" else []
        names = ("num_memory_slots", "num_lasting_slots") if self.num_memory_slots else ()
        rules += [(name, "num_slots_per_chunk * segment_length / chunk_length") for name in names]
        for name, divisor_name in rules:
            value, divisor = getattr(self, name) or 0, getattr(self, divisor_name, self.num_slots_per_segment)
            if value % divisor:
                nearest = divisor * max(1, round(value / divisor))
                raise ValueError(
                    f"{name} ({value}) must be a multiple of {divisor_name} ({divisor}): {nearest} is the nearest."
                )

    @staticmethod
    def _check_rope(parameters: dict) -> None:
        rope_type = parameters.get("rope_type", parameters.get("type", "default"))
        if rope_type not in ROPE_TYPES:
            raise ValueError(f'rope_parameters["rope_type"] must be one of {", ".join(ROPE_TYPES)}, got {rope_type!r}.')
        for name in ROPE_TYPES[rope_type] + (("rope_theta",) if "rope_theta" in parameters else ()):
            value = parameters.get(name)
            if not isinstance(value, int | float) or value <= 0:
                rule = f"a number above 0 with rope_type {rope_type!r}"
                raise ValueError(f'rope_parameters["{name}"] must be {rule}, got {value!r}.')

    def standardize_rope_params(self) -> None:
        """Names the type. (The inherited method asks for `max_position_embeddings`; a stream has no such thing.)"""
        parameters = cast(dict, self.rope_parameters)
        parameters.setdefault("rope_type", parameters.get("type", "default"))

    def _validate_llama3_rope_parameters(self, rope_parameters: Any, ignore_keys: set[str] | None = None) -> None:
        """Warns about unknown keys; the inherited method compares with `max_position_embeddings` as well."""
        known = {"rope_type", "rope_theta", *ROPE_TYPES["llama3"]}
        self._check_received_keys("llama3", set(rope_parameters), known, ignore_keys=ignore_keys)


__all__ = ["RMTConfig"]
