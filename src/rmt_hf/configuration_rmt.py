"""Every number that defines a recurrent-memory transformer, with its meaning and its rule."""

import difflib
import re
import sys
from typing import Any, cast

import transformers


if tuple(map(int, re.findall(r"\d+", transformers.__version__)[:2])) < (5, 23):  # before names that are younger
    raise ImportError(
        f"This model needs transformers>=5.23, got {transformers.__version__}: pip install -U transformers."
    )

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
    """Configuration of a recurrent memory-augmented transformer; each field has its meaning and its rule beside it.

    Raises:
        ValueError: If a value breaks its rule; the message names the field, the value, the rule and a remedy.

    Source: names of `transformers.LlamaConfig`, and section 3 of arXiv 2507.00453 for the rest. Departs from the paper:
    chunk and segment are two lengths, and the memory is sized in slots per key/value head.
    """

    model_type = "rmt"
    auto_map = {}  # type: ignore[var-annotated]  # an annotation would make it a field
    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32000  # number of token ids; at least 1, as the sizes and numbers up to head_dim
    hidden_size: int = 768  # width of the residual stream
    intermediate_size: int = 2048  # width inside the MLP
    num_hidden_layers: int = 12  # decoder layers
    num_attention_heads: int = 12  # query heads; a multiple of num_key_value_heads
    num_key_value_heads: int | None = None  # heads of keys, values and memory; None for num_attention_heads
    head_dim: int | None = None  # even; None for hidden_size / num_attention_heads, which must divide then
    hidden_act: str = "silu"  # activation of the MLP; a name known to transformers
    rms_norm_eps: float = 1e-6  # added to the variance in every norm; above 0
    initializer_range: float | int = 0.02  # standard deviation of initial weights; at least 0
    max_position_embeddings: int = 2**30  # for tools that ask; it limits nothing
    rope_parameters: RopeParameters | dict | None = None  # rope_type, rope_theta, and what the type asks for
    attention_bias: bool = False  # whether the q, k, v and o projections have a bias
    attention_dropout: float | int = 0.0  # on attention weights in training; at least 0, below 1
    mlp_bias: bool = False  # whether the MLP projections have a bias
    tie_word_embeddings: bool = False  # whether lm_head shares the weight of embed_tokens
    use_cache: bool = True  # whether the forward pass returns the state by default
    pad_token_id: int | None = None  # of padding; below vocab_size
    bos_token_id: int | None = 1  # begins a document; below vocab_size
    eos_token_id: int | list[int] | None = 2  # end a document; below vocab_size
    chunk_length: int = 64  # tokens that local attention sees, condensed together; at least 1
    segment_length: int = 256  # tokens between two memory writes; a multiple of chunk_length
    num_lookback_segments: int = 1  # full segments before the current one that stay in the window; at least 0
    num_memory_slots: int = 64  # per layer and key/value head; 0 or a multiple of num_slots_per_segment
    num_lasting_slots: int | None = None  # that keep by the learned score, others by evidence; None: all
    lasting_distance: int = 0  # positions left free, at most, between lasting slots and present ones; at least 0
    num_observing_tokens: int = 16  # last before a write, whose attention is the evidence; 1 to segment_length
    num_slots_per_chunk: int = 1  # candidates of a chunk, 1 to chunk_length; with "mean" a divisor of it
    memory_write: str = "select"  # a chunk gives its strongest tokens; "mean": averages
    fusion_type: str = "gated"  # memory and window in one softmax, local path gated; "softmax": three of them
    use_local_attention: bool = True  # whether the chunked local path exists
    use_attention_sink: bool = False  # a learned key and value before memory, as a converted model wants
    use_qk_norm: bool = True  # whether queries and keys are normalised per head before the rotary encoding
    use_chunked_loss: bool = False  # no logits with a loss in training, where they never exist all at once; torch 2.13

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
        slots, lasting = self.num_memory_slots, self.num_lasting_slots
        lasting = slots if lasting is None else lasting
        parts = (lasting, self.memory_write == "select", False), (slots - lasting, False, True)
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
    def gives_attentions(self) -> bool:
        """Whether the attention implementation hands its weights out."""
        return self._attn_implementation == "eager"

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
        for _, uses_score, uses_evidence in self.memory_parts:
            ring = ["gate_weight", "gate_bias", *["gate_scale"] * (uses_score or uses_evidence)]
            ring += ["fade"] * uses_evidence
            by_head += [f"memory.rings.*.{name}" for name in ring] + ["memory.score_proj"] * uses_score
        if self.fusion_type == "softmax" and (self.prefix_length or self.use_local_attention):
            whole += ["fusion"]
        elif self.fusion_type == "gated" and self.use_local_attention:
            by_head += ["fusion.gate", "fusion.scale"]
        names |= dict.fromkeys(["mlp.gate_proj", "mlp.up_proj", *(f"self_attn.{name}" for name in by_head)], "colwise")
        names |= {f"self_attn.{name}": "replicated_with_grad_allreduce" for name in whole}
        return {f"layers.*.{name}": style for name, style in names.items()}

    def to_dict(self) -> dict[str, Any]:
        """As every configuration. So PEFT asks which model it adapts: what it adapts in a Llama has the same names."""
        for name, table in vars(sys.modules.get("peft.utils.constants", object)).items():
            if name.endswith("_MODULES_MAPPING") and "llama" in table:
                table.setdefault(self.model_type, table["llama"])
        return super().to_dict()

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
        at_least_0 = "num_lookback_segments num_memory_slots lasting_distance initializer_range attention_dropout"
        least = dict.fromkeys(at_least_1.split(), 1) | dict.fromkeys(at_least_0.split(), 0)
        slots, lasting, segment = self.num_memory_slots, self.num_lasting_slots, self.segment_length
        lasts = lasting is None or (self.memory_write != "mean" and 0 <= lasting <= slots)
        enough = [name for name in least if (value := getattr(self, name)) is not None and value >= least[name]]
        rules = [(name, name in enough, f"at least {number}") for name, number in least.items()]
        rules += [
            ("rms_norm_eps", self.rms_norm_eps > 0, "above 0"),
            ("num_observing_tokens", self.num_observing_tokens <= segment, f"at most segment_length ({segment})"),
            ("attention_dropout", self.attention_dropout < 1, "below 1"),
            ("head_dim", (self.head_dim or 0) % 2 == 0, "even for the rotary encoding"),
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
        if self.num_slots_per_chunk > self.chunk_length:
            rule = f"num_slots_per_chunk ({self.num_slots_per_chunk}) must be at most chunk_length"
            raise ValueError(f"{rule} ({self.chunk_length}): a chunk cannot give more slots than it has tokens.")

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
