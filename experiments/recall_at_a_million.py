"""Recall a million tokens later: trained on streams of 4,096 tokens, asked at 65,536, 262,144 and 1,048,576.

A fact is one token that says "key k has value v"; a question names a key, and the next token is the value. The facts of
a stream lie in one segment, each in a chunk of its own, among noise. The ring of memory is as long as the slots of one
segment, so every slot meets the gate at every segment end: 4,096 tokens train up to 62 such writes, a million tokens
are 16,384. Questions are asked from the next segment on, so the model also learns to answer from its window: its
baseline. At growing distances a copy of the state is asked for every fact: as it is, with its memory emptied, with the
memory of another row (the answers must be the other row's), and, memory emptied, for new facts that lie in the window.
The slots of facts are compared with what they were when the facts had just been written.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure

from experiments.one_token_facts import (
    FIRST_FACT,
    FIRST_QUESTION,
    NUM_FACTS,
    NUM_KEYS,
    NUM_VALUES,
    VOCABULARY,
    answers,
    noise,
    write_facts,
)
from experiments.reports import environment, read_lines
from rmt_hf import RMTCache, RMTConfig, RMTForCausalLM
from rmt_hf.evaluation.ablation import empty_memories, swap_memories
from rmt_hf.files import write_whole
from rmt_hf.memory_rmt import Slots


TOKENS_PER_QUESTION = 16  # in training; no question is asked in the streams that are read after it
TOKENS_PER_CALL = 65_536
CONDITIONS = ("own_memory", "memory_emptied", "swapped_other_row", "swapped_own_row", "control_window")


def batch(rows: int, length: int, config: RMTConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Input ids, labels, and which labels only memory can give: facts in the first quarter, questions from then on."""
    segment, num_segments = config.segment_length, length // config.segment_length
    input_ids = noise(rows, length)
    segments = torch.randint(max(1, num_segments // 4), (rows,))
    keys, values, _ = write_facts(input_ids, segments, segment, config.chunk_length)
    first = ((segments + 1) * segment)[:, None]
    questions = length // TOKENS_PER_QUESTION
    positions = first + (torch.rand(rows, questions) * (length - 1 - first)).long()
    input_ids.scatter_(1, positions, FIRST_QUESTION + keys.gather(1, torch.randint(NUM_FACTS, (rows, questions))))
    labels = answers(input_ids, keys, values)
    is_far = torch.arange(length) > first + config.num_lookback_segments * segment
    return input_ids, labels, (labels != -100) & is_far


def train(config: RMTConfig, args: argparse.Namespace, seed: int) -> tuple[RMTForCausalLM, dict]:
    """Trains from scratch: equal numbers of steps at each of the lengths, with as many tokens to a step."""
    torch.manual_seed(seed)
    model, started, history = RMTForCausalLM(config).train(), time.perf_counter(), []
    gate_bias = model.model.layers[0].self_attn.memory.rings[0].gate_bias
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(1, args.steps + 1):
        factor = min(step / 20, 1, (args.steps - step + 1) / (0.3 * args.steps))
        optimizer.param_groups[0]["lr"] = args.learning_rate * factor
        length = args.lengths[(step - 1) * len(args.lengths) // args.steps]
        input_ids, labels, is_far = batch(max(1, args.tokens_per_step // length), length, config)
        shift = args.gate_noise * torch.randn_like(gate_bias)  # a gate that is right with it has a margin without it
        gate_bias.data += shift
        outputs = model(input_ids=input_ids, labels=labels, use_cache=False)
        outputs.loss.backward()
        gate_bias.data -= shift
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        right, is_far = outputs.logits[:, :-1].argmax(-1) == labels[:, 1:], is_far[:, 1:]
        is_near = (labels[:, 1:] != -100) & ~is_far
        history.append((right[is_near].float().mean().item(), right[is_far].float().mean().item()))
        if step % 50 == 0 or step == args.steps:
            window, memory = (statistics.fmean(column) for column in zip(*history[-50:], strict=True))
            print(f"seed {seed} step {step:4d} length {length} window {window:.3f} memory {memory:.3f}", flush=True)
    return model.eval(), {"window": window, "memory": memory, "seconds": round(time.perf_counter() - started, 1)}


def under(ablation: Callable[[RMTCache], None], cache: RMTCache) -> RMTCache:
    """A copy of the state with its memory under an ablation and its window as it is."""
    copy = cache.clone()
    ablation(copy)
    return copy


@torch.no_grad()
def ask(model: RMTForCausalLM, cache: RMTCache, keys: torch.Tensor) -> torch.Tensor:
    """Answers (rows, facts) to one question for each fact, each asked of a copy of the state."""
    questions = (FIRST_QUESTION + keys).split(1, 1)
    logits = [model(input_ids=question, past_key_values=cache.clone()).logits[:, -1] for question in questions]
    return torch.stack(logits, 1).argmax(-1)


def measure(
    model: RMTForCausalLM, cache: RMTCache, keys: torch.Tensor, values: torch.Tensor, others: torch.Tensor
) -> dict[str, float]:
    """Accuracy in each of the CONDITIONS; `others` are the values of the same keys in the row to swap with."""
    from_swapped = ask(model, under(swap_memories, cache), keys)
    window = under(empty_memories, cache)
    config, first = model.config, torch.zeros(len(keys), dtype=torch.long)
    input_ids = noise(len(keys), config.segment_length)
    new_keys, new_values, _ = write_facts(input_ids, first, config.segment_length, config.chunk_length)
    model(input_ids=input_ids, past_key_values=window, logits_to_keep=1)
    right = (
        ask(model, cache, keys) == values,
        ask(model, under(empty_memories, cache), keys) == values,
        from_swapped == others,
        from_swapped == values,
        ask(model, window, new_keys) == new_values,
    )
    return {name: hits.float().mean().item() for name, hits in zip(CONDITIONS, right, strict=True)}


def slots_of(memory: Slots, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (rows, facts, heads, 2 D) of the slots of the tokens at positions (rows, facts), and whether they
    are there, (rows, facts, heads)."""
    matches = memory.positions[:, None] == positions[:, :, None, None]  # (rows, facts, M, heads)
    numbers = torch.cat([memory.keys, memory.values], -1)
    index = matches.long().argmax(2)
    return numbers[:, None].take_along_dim(index[:, :, None, :, None], 2)[:, :, 0], matches.any(2)


@torch.no_grad()
def follow(model: RMTForCausalLM, distances: list[int], streams: int) -> list[dict]:
    """Reads long streams once; asks and looks at the slots at each distance from the end of the segment with facts."""
    config, length, cache = model.config, model.config.segment_length, RMTCache(model.config)
    model.memorize(noise(streams, 16 * length), past_key_values=cache)  # the ring is full of noise
    input_ids = noise(streams, length)
    keys, values, _ = write_facts(input_ids, torch.zeros(streams, dtype=torch.long), length, config.chunk_length)
    by_key = torch.empty(streams, NUM_KEYS, dtype=torch.long).scatter_(1, keys, values)
    others = by_key.unflatten(0, (-1, 2)).flip(1).flatten(0, 1).gather(1, keys)
    model.memorize(input_ids, past_key_values=cache)
    tokens = FIRST_FACT + keys * NUM_VALUES + values
    positions = 16 * length + (input_ids[:, None] == tokens[:, :, None]).long().argmax(-1)  # (rows, facts)
    curve, at, started, first = [], 0, time.perf_counter(), None
    for distance in distances:
        while at < distance:
            num_tokens = min(max(length, TOKENS_PER_CALL // streams // length * length), distance - at)
            model.model(input_ids=noise(streams, num_tokens), past_key_values=cache)
            at += num_tokens
        state = cache.layers[0].state
        assert state is not None
        memory = state.memory
        slots, is_there = slots_of(memory, positions)
        if first is None:
            first, was_there, others_first = slots, is_there, memory.positions
            is_fact = (others_first[:, None] == positions[:, :, None, None]).any(1)  # (rows, M, heads)
        changed = (slots - first).norm(dim=-1) / first.norm(dim=-1)  # (rows, facts, heads)
        is_kept = is_there & was_there
        survives, is_same = (1 - changed).clamp_min(0) * is_kept, (slots == first).all(-1) & is_kept
        others_kept = (others_first[:, :, None] == memory.positions[:, None]).any(2)[~is_fact]
        point = {"tokens": at, "segments": at // length, **measure(model, cache, keys, values, others)}
        point |= {
            "fact_written_by_a_head": was_there.any(-1).float().mean().item(),
            "fact_survives": survives.amax(-1).mean().item(),
            "fact_slots_bit_for_bit": is_same[was_there].float().mean().item(),
            "fact_bit_for_bit_in_a_head": is_same.any(-1).float().mean().item(),
            "other_slots_kept": others_kept.float().mean().item(),
            "state_bytes": cache.nbytes,
            "seconds": round(time.perf_counter() - started, 1),
        }
        curve.append(point)
        print(json.dumps(point), flush=True)
    return curve


def plot(results: list[dict], path: Path) -> None:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    accuracy, retention = figure.subplots(1, 2)
    slots = ("fact_survives", "fact_bit_for_bit_in_a_head", "fact_slots_bit_for_bit", "other_slots_kept")
    for axes, names in ((accuracy, CONDITIONS), (retention, slots)):
        for index, name in enumerate(names):
            for result in results:
                points = [(point["tokens"], point[name]) for point in result["curve"]]
                label = name.replace("_", " ") if result is results[0] else None
                axes.plot(*zip(*points, strict=True), "o-", color=f"C{index}", alpha=0.7, label=label)
        axes.axvspan(1, results[0]["settings"]["lengths"][-1], color="gray", alpha=0.15, label="trained on")
        axes.set(xlabel="tokens of noise between facts and question", ylim=(-0.02, 1.05))
        axes.set_xscale("log", base=2)
        axes.legend(fontsize="small", loc="center left")
    accuracy.axhline(1 / NUM_VALUES, color="gray", linewidth=0.8)
    accuracy.set_title(f"Accuracy, {len(results)} seeds; gray line: chance")
    retention.set_title("Slots against the moment the facts were written")
    figure.savefig(path, dpi=120)


def summary_of(results: list[dict]) -> dict:
    """The worst seed at each distance, and means of the other conditions."""
    points = [point for result in results for point in result["curve"]]
    tokens = sorted({point["tokens"] for point in points})
    return {
        "accuracy_of_worst_seed": {at: min(p["own_memory"] for p in points if p["tokens"] == at) for at in tokens},
        **{name: statistics.fmean(point[name] for point in points) for name in CONDITIONS[1:]},
        "chance": 1 / NUM_VALUES,
        "seeds": [result["seed"] for result in results],
        "answers_per_seed": results[0]["settings"]["streams"] * NUM_FACTS,
        "state_bytes": sorted({point["state_bytes"] for point in points}),
        "seconds": round(sum(result["seconds"] for result in results), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path("reports/length"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[256, 1024, 4096], help="of training, multiples of 64"
    )
    parser.add_argument("--tokens-per-step", type=int, default=16_384)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument(
        "--gate-noise", type=float, default=1.0, help="standard deviation of a shift of the gate's bias"
    )
    parser.add_argument("--streams", type=int, default=64, help="an even number")
    parser.add_argument(
        "--distances",
        type=int,
        nargs="+",
        default=[64, 1024, 8192, 65_536, 262_144, 1_048_576],
        help="multiples of the segment",
    )
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # numbers next to zero, which closed gates make, are slow on a CPU
    config = RMTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        chunk_length=8,
        segment_length=64,
        num_memory_slots=32,
        num_slots_per_chunk=4,  # a fact has to be in the better half of its chunk, not the best
        use_local_attention=False,
        use_qk_norm=True,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
    )
    settings = {name: value for name, value in vars(args).items() if name not in ("output_dir", "seeds")}
    finished = args.output_dir / "seeds.jsonl"  # one line for each seed: a stop loses at most one
    finished.parent.mkdir(parents=True, exist_ok=True)
    results = {line["seed"]: line for line in read_lines(finished) if line["settings"] == settings}
    for seed in args.seeds:
        if seed in results:
            continue
        started = time.perf_counter()
        model, training = train(config, args, seed)
        curve = follow(model, args.distances, args.streams)
        seconds = round(time.perf_counter() - started, 1)
        results[seed] = {"seed": seed, "training": training, "curve": curve, "seconds": seconds, "settings": settings}
        with finished.open("a", encoding="utf-8") as file:
            file.write(json.dumps(results[seed]) + "\n")
    chosen = [results[seed] for seed in args.seeds]
    summary = summary_of(chosen)
    report = {**summary, "runs": chosen, "config": config.to_diff_dict(), "environment": environment()}
    text = json.dumps(report, indent=1)
    write_whole(args.output_dir / "metrics.json", lambda path: path.write_text(text, "utf-8"))
    write_whole(args.output_dir / "length.png", lambda path: plot(chosen, path))
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
