"""Recall through memory: facts are read, noise follows, and questions come when the facts have left the window.

A fact is one token that says "key k has value v"; a question names a key, and its label is the value. The facts of a
stream lie in one segment, one in each chunk. Attention sees the current and the previous segment: from two segments on
only memory can answer. The baseline is the same model, trained the same way, but asked in the segment after the facts,
where the window still holds them. After training, long streams are read with an RMTCache, and at growing distances a
copy of the state is asked for every fact: once as it is, once with its memory emptied.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure

from experiments.one_token_facts import (
    FIRST_QUESTION,
    NUM_FACTS,
    NUM_VALUES,
    answers,
    noise,
    recall_config,
    write_facts,
)
from experiments.reports import environment
from rmt_hf import RMTCache, RMTConfig, RMTForCausalLM
from rmt_hf.evaluation.ablation import empty_memories
from rmt_hf.files import write_whole


QUESTIONS = 16


def batch(rows: int, num_segments: int, config: RMTConfig, in_window: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Input ids and labels: facts in a random segment, questions that only memory can answer, or only the window."""
    length, first_distance = config.segment_length, config.num_lookback_segments + 1
    input_ids = noise(rows, num_segments * length)
    segments = torch.randint(num_segments - first_distance, (rows,))
    keys, values, _ = write_facts(input_ids, segments, length, config.chunk_length)
    first = (segments + (1 if in_window else first_distance)) * length
    end = first + length if in_window else torch.full_like(first, num_segments * length)
    positions = first[:, None] + (torch.rand(rows, QUESTIONS) * (end - 1 - first)[:, None]).long()
    input_ids.scatter_(1, positions, FIRST_QUESTION + keys.gather(1, torch.randint(NUM_FACTS, (rows, QUESTIONS))))
    labels = answers(input_ids, keys, values)
    return input_ids, labels


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    asked = labels[:, 1:] != -100
    return (logits[:, :-1].argmax(-1) == labels[:, 1:])[asked].float().mean().item()


def train(config: RMTConfig, args: argparse.Namespace, seed: int, in_window: bool) -> tuple[RMTForCausalLM, dict]:
    """Trains from scratch, on streams that grow to the training length in the first half of the steps."""
    torch.manual_seed(seed)
    model, started, history = RMTForCausalLM(config).train(), time.perf_counter(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    shortest = config.num_lookback_segments + 2
    for step in range(1, args.steps + 1):
        factor = min(step / 20, 1, (args.steps - step + 1) / (0.3 * args.steps))
        optimizer.param_groups[0]["lr"] = args.learning_rate * factor
        grown = shortest + (args.segments - shortest) * 2 * step // args.steps
        input_ids, labels = batch(args.batch_size, min(grown, args.segments), config, in_window)
        outputs = model(input_ids=input_ids, labels=labels, use_cache=False)
        outputs.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        history.append(accuracy(outputs.logits, labels))
        if step % 50 == 0 or step == args.steps:
            recent = statistics.fmean(history[-50:])
            print(f"seed {seed} {'window' if in_window else 'memory'} step {step:4d} accuracy {recent:.3f}", flush=True)
    with torch.no_grad():
        input_ids, labels = batch(args.eval_streams, args.segments, config, in_window)
        fresh = accuracy(model.eval()(input_ids=input_ids, use_cache=False).logits, labels)
    learned = [step for step in range(20, args.steps + 1) if min(history[step - 20 : step]) >= 0.95]
    seconds = round(time.perf_counter() - started, 1)
    return model, {"accuracy": fresh, "steps_to_learn": learned[0] if learned else None, "train_seconds": seconds}


@torch.no_grad()
def follow(model: RMTForCausalLM, distances: list[int], streams: int) -> tuple[list[dict], dict[str, float]]:
    """Reads long streams once and asks at each distance; also says which tokens outlive a ring full of writes."""
    config, length = model.config, model.config.segment_length
    chunks, writes = length // config.chunk_length, config.num_memory_slots // config.num_slots_per_segment
    cache, at, curve, slots = RMTCache(config), 0, [], {}
    model(
        input_ids=noise(streams, writes * length), past_key_values=cache, logits_to_keep=1
    )  # the ring is full of noise
    input_ids = noise(streams, length)
    keys, values, fact_chunks = write_facts(
        input_ids, torch.zeros(streams, dtype=torch.long), length, config.chunk_length
    )
    while True:
        model(input_ids=input_ids, past_key_values=cache, logits_to_keep=1)
        at += input_ids.shape[1] // length  # segments since the one with the facts began
        if at in distances:
            hits = {"accuracy": 0.0, "memory_emptied": 0.0}
            for name in hits:
                for fact in range(NUM_FACTS):
                    state = cache.clone()
                    if name == "memory_emptied":
                        empty_memories(state)
                    logits = model(input_ids=FIRST_QUESTION + keys[:, fact, None], past_key_values=state).logits
                    hits[name] += (logits[:, -1].argmax(-1) == values[:, fact]).float().mean().item() / NUM_FACTS
            curve.append({"segments": at, "tokens": at * length, **hits, "state_bytes": cache.nbytes})
            slots[at] = torch.stack([layer.state.memory.positions for layer in cache.layers if layer.state is not None])
        if at == distances[-1]:
            break
        input_ids = noise(streams, min(16, min(stop for stop in distances if stop > at) - at) * length)
    first, later = slots[distances[0]], slots[distances[0] + writes]  # (layers, streams, slots, heads)
    kept = (first[:, :, :, None] == later[:, :, None]).any(3).float()
    chunk = first // config.chunk_length - writes * chunks  # of the segment with the facts
    is_fact = (chunk[..., None] == fact_chunks[:, None, None]).any(-1)
    return curve, {"fact_slots_kept": kept[is_fact].mean().item(), "noise_slots_kept": kept[~is_fact].mean().item()}


def distances_to_ask(config: RMTConfig, args: argparse.Namespace) -> list[int]:
    """From the first distance that the window does not reach, doubling, in segments."""
    first, longest = config.num_lookback_segments + 1, args.longest * args.segments
    writes = config.num_memory_slots // config.num_slots_per_segment
    doubling = {first * 2**power for power in range(longest.bit_length())}
    return sorted({at for at in doubling if at < longest} | {first + writes, args.segments - 1, args.segments, longest})


def plot(results: list[dict], args: argparse.Namespace, path: Path) -> None:
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for index, result in enumerate(results):
        for name, style in (("accuracy", "-o"), ("memory_emptied", ":")):
            points = [(point["segments"], point[name]) for point in result["curve"]]
            axes.plot(*zip(*points, strict=True), style, color=f"C{index}", label=f"{name}, seed {result['seed']}")
    axes.axhline(1 / NUM_VALUES, color="gray", linewidth=0.8, label="chance")
    axes.axvspan(1, args.segments - 1, color="gray", alpha=0.15, label="trained on")
    axes.set(xlabel="segments from the facts to the question", ylabel="accuracy", ylim=(0, 1.05))
    axes.set_xscale("log")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path("reports/recall"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=500, help="for the model and again for the baseline")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--segments", type=int, default=48, help="training length; at least 4")
    parser.add_argument("--longest", type=int, default=100, help="longest distance, in training lengths")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--eval-streams", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    started = time.perf_counter()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # numbers next to zero, which closed gates make, are slow on a CPU
    config = recall_config(args.layers)
    results = []
    for seed in args.seeds:
        window = train(config, args, seed, in_window=True)[1]
        model, memory = train(config, args, seed, in_window=False)
        curve, gate = follow(model, distances_to_ask(config, args), args.eval_streams)
        falls = next((point["segments"] for point in curve if point["accuracy"] < 0.99), None)
        results.append({"seed": seed, "memory": memory, "window": window, "gate": gate, "below_0.99_from": falls})
        results[-1]["curve"] = curve
        print(f"\nseed {seed}: segments  tokens  accuracy  memory emptied")
        for point in curve:
            print("{segments:16d} {tokens:7d} {accuracy:9.3f} {memory_emptied:15.3f}".format(**point))
    summary = {
        "accuracy": min(result["memory"]["accuracy"] for result in results),
        "window_accuracy": min(result["window"]["accuracy"] for result in results),
        "memory_emptied_accuracy": statistics.fmean(p["memory_emptied"] for result in results for p in result["curve"]),
        "chance": 1 / NUM_VALUES,
        "accuracy_at_longest": min(result["curve"][-1]["accuracy"] for result in results),
        "longest_segments": results[0]["curve"][-1]["segments"],
        "seconds": round(time.perf_counter() - started, 1),
    }
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    report = {**summary, "seeds": results, "settings": settings, "config": config.to_diff_dict()}
    text = json.dumps({**report, "environment": environment(("torch", "transformers"))}, indent=1)
    write_whole(args.output_dir / "metrics.json", lambda path: path.write_text(text, "utf-8"))
    write_whole(args.output_dir / "recall.png", lambda path: plot(results, args, path))
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
