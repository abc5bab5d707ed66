"""What converted models have gained and lost: against their source, windows, and caches that evict.

    python -m experiments.retrofit SOURCE calibrated=FOLDER taught=FOLDER --output-dir experiments/results/retrofit

Held-out text of five kinds, one stream longer than the source can read, facts asked for at many distances, chats, and
the cost of a token. The untrained conversion is made of SOURCE. Each finished unit is a line of JSON, and one that is
there already is not measured again; tables and plot are written from the lines (`retrofit_report`).

Shapes: B documents, T tokens.
"""

import argparse
import copy
import random
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from experiments.baselines import read, state_bytes
from experiments.corpora import chat_openings, held_out_documents, king_james
from experiments.eviction import POLICIES, EvictionForCausalLM
from experiments.recall_rows import recall_row
from experiments.reports import environment, read_lines, write_lines
from experiments.retrofit_report import write_retrofit_report
from rmt_hf import RMTForCausalLM
from rmt_hf.conversion import add_memory
from rmt_hf.data import token_byte_counts
from rmt_hf.evaluation.ablation import empty_memories, pass_on_memories, stream_bits
from rmt_hf.evaluation.bits import bucket_sums, position_edges, token_bits
from rmt_hf.files import digest


FULL, UNTRAINED = "full attention", "untrained"
EVICTED = {"sum": "evicted by attention so far (H2O)", "last": "evicted by the last 32 tokens (SnapKV)"}
ABLATIONS = {"emptied": empty_memories, "of another document": pass_on_memories}
PLAYS, KINDS = "plays", ("plays", "novels", "messages", "code", "chats")
ANSWER_TOKENS = DECODED_TOKENS = 32
CALL_LENGTH = 512


class Sizes(NamedTuple):
    """How much is measured.

    Args:
        documents: Of each kind of text.
        document_tokens: Read of each play; of other kinds a quarter.
        stream_tokens: Read of the long stream.
        windows: Distances of facts, windows.
        recall_tokens: Of all rows of one distance; there are 4 to 12 rows.
        prompts: Chats.
        positions: Tokens read before the cost of one is measured.
    """

    documents: int = 4
    document_tokens: int = 8192
    stream_tokens: int = 65_536
    windows: tuple[int, ...] = (2, 4, 8, 16, 32)
    recall_tokens: int = 24_576
    prompts: int = 200
    positions: tuple[int, ...] = (8192, 65_536)


class Contender(NamedTuple):
    """How it is made, and a hash of its weights ("" for what is made of the source alone)."""

    make: Callable[[], Any]
    weights: str = ""


class Evidence(NamedTuple):
    """What the units share."""

    contenders: dict[str, Contender]
    tokenizer: Any
    sizes: Sizes
    window: int
    dtype: torch.dtype
    texts: Callable[[], dict[str, list[str]]]


def window_with_sink(source: PreTrainedModel, segment_length: int) -> RMTForCausalLM:
    """The source as a converted model without memory: its window and the sink are all that it sees."""
    return add_memory(source, segment_length=segment_length, num_memory_slots=0).eval()


def segment_of_equal_state(model: RMTForCausalLM) -> int:
    """Segment length of a window with sink whose state has the bytes of ours, rounded up; it holds three segments."""
    num_heads, width = model.config.key_value_shape
    per_token = 2 * model.config.num_hidden_layers * num_heads * width * model.dtype.itemsize
    return -(-state_bytes(model, 1, model.config.window_length) // (3 * per_token))


def contenders(source: PreTrainedModel, models: Sequence[str], segment_length: int) -> dict[str, Contender]:
    """The source, what it is without a memory of ours, the untrained conversion, and converted models, NAME=FOLDER.

    Of each converted model whose state has other bytes than the untrained one's, there is a window of as many bytes.
    """
    untrained = add_memory(source, segment_length=segment_length)
    slots, equal = untrained.config.num_memory_slots, segment_of_equal_state(untrained)
    converted = {}
    for name, _, folder in (model.partition("=") for model in models):
        load = partial(RMTForCausalLM.from_pretrained, folder, dtype=source.dtype)
        converted[name] = Contender(load, digest(Path(folder) / "model.safetensors")[:16])
    made = {
        FULL: Contender(source.eval),
        f"window of {2 * segment_length} and sink": Contender(partial(window_with_sink, source, segment_length)),
        f"window of {2 * segment_length + slots} and sink, our keys": Contender(
            partial(window_with_sink, source, segment_length + slots // 2)
        ),
        f"window of {2 * equal} and sink, our bytes": Contender(partial(window_with_sink, source, equal)),
    }
    lengths = {equal}
    for name, each in converted.items():
        if (other := segment_of_equal_state(each.make())) not in lengths:
            lengths.add(other)
            label = f"window of {2 * other} and sink, bytes of {name}"
            made[label] = Contender(partial(window_with_sink, source, other))
    for policy in POLICIES:
        made[EVICTED[policy]] = Contender(partial(EvictionForCausalLM, source, segment_length, slots, policy))
    return {**made, UNTRAINED: Contender(untrained.eval), **converted}


def documents(evidence: Evidence, kind: str, num_tokens: int) -> torch.Tensor:
    """Beginnings of the first held-out documents of a kind, (B, T)."""
    texts = evidence.texts()[kind][: evidence.sizes.documents]
    cut = evidence.tokenizer([text[: 8 * num_tokens] for text in texts], add_special_tokens=False, verbose=False)
    return torch.tensor([ids[:num_tokens] for ids in cut["input_ids"]])


def sums(evidence: Evidence, bits: torch.Tensor, input_ids: torch.Tensor, edges: Sequence[int]) -> dict[str, Any]:
    """Bits and bytes of each document in each bucket of positions."""
    token_bytes = token_byte_counts(evidence.tokenizer)[input_ids[:, 1:]]
    found = {"bits": bucket_sums(bits, edges).tolist(), "bytes": bucket_sums(token_bytes, edges).tolist()}
    return {"edges": list(edges), **found}


def text_lines(model: Any, evidence: Evidence, kind: str) -> Iterator[dict[str, Any]]:
    """Held-out documents of a kind, in buckets that double."""
    num_tokens = evidence.sizes.document_tokens // (1 if kind == PLAYS else 4)
    input_ids = documents(evidence, kind, num_tokens)
    bits = torch.cat([token_bits(model, row[None]) for row in tqdm(input_ids, desc=kind)])
    yield sums(evidence, bits, input_ids, position_edges(num_tokens, evidence.window))


def ablation_lines(model: RMTForCausalLM, evidence: Evidence, _: Any) -> Iterator[dict[str, Any]]:
    """A quarter of each play, with the own memory, with none, and with that of the next play."""
    num_tokens = evidence.sizes.document_tokens // 4
    input_ids = documents(evidence, PLAYS, num_tokens)
    for name, bits in stream_bits(model, input_ids, ABLATIONS, show_progress=True).items():
        yield {"memory": name, **sums(evidence, bits, input_ids, position_edges(num_tokens, evidence.window))}


def stream_lines(model: Any, evidence: Evidence, _: Any) -> Iterator[dict[str, Any]]:
    """The King James Bible from its beginning, one stream, in eight equal buckets."""
    size = evidence.sizes.stream_tokens
    ids = evidence.tokenizer(king_james()[: 8 * size], add_special_tokens=False, verbose=False)["input_ids"][:size]
    input_ids = torch.tensor([ids])
    bits = token_bits(model, input_ids, show_progress=True)
    yield sums(evidence, bits, input_ids, [size * part // 8 for part in range(9)])


@torch.no_grad()
def recall_lines(model: Any, evidence: Evidence, distance: int) -> Iterator[dict[str, Any]]:
    """Of each row and question: whether the answer's tokens are the likeliest, and their mean log-probability."""
    rng, text = random.Random(distance), "\n\n".join(evidence.texts()[PLAYS])
    count = max(4, min(12, evidence.sizes.recall_tokens // (distance * evidence.window)))
    rows = [recall_row(text, evidence.tokenizer, distance, evidence.window, rng) for _ in range(count)]
    conditions: dict[str, Callable | None] = {"own": None}
    if isinstance(model, RMTForCausalLM) and model.config.num_memory_slots:
        conditions["emptied"] = empty_memories
    answers: dict[str, dict[str, list[list[tuple[bool, float]]]]] = {name: {} for name in conditions}
    for row in tqdm(rows, desc=f"{distance} windows"):
        state = None
        for part in row.prose[None].split(CALL_LENGTH, 1):
            _, state = read(model, part, state)
        for name, ablate in conditions.items():
            for kind in dict.fromkeys(question.kind for question in row.questions):
                answers[name].setdefault(kind, []).append([])
            for kind, question, answer in row.questions:
                asked = copy.deepcopy(state)
                if ablate is not None:
                    ablate(asked)
                logits, _ = read(model, torch.cat([question, answer])[None, :-1], asked, logits_to_keep=len(answer))
                logs = F.log_softmax(logits[0].float(), -1).gather(1, answer[:, None])
                is_right = bool((logits[0].argmax(-1) == answer).all())
                answers[name][kind][-1].append((is_right, logs.mean().item()))
    for name, found in answers.items():
        yield {"memory": name, "answers": found}


@torch.no_grad()
def chat_lines(model: Any, evidence: Evidence, _: Any) -> Iterator[dict[str, Any]]:
    """How many tokens a model and its source answer alike to each chat prompt, the likeliest each time."""
    source = evidence.contenders[FULL].make()
    prompts = [[{"role": "user", "content": text}] for text in chat_openings(evidence.sizes.prompts)]
    alike = []
    for prompt in tqdm(prompts, desc="Answering"):
        ids = evidence.tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        settings = {"max_new_tokens": ANSWER_TOKENS, "do_sample": False}
        ours, theirs = (cast(Any, each).generate(**ids, **settings)[0].tolist() for each in (model, source))
        first = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
        length = ids["input_ids"].shape[1]
        alike.append([len(ours) - length if first is None else first - length, len(ours) - length])
    yield {"alike": alike}


@torch.no_grad()
def cost_lines(model: Any, evidence: Evidence, position: int) -> Iterator[dict[str, Any]]:
    """CPU seconds of a prompt, median CPU milliseconds of a token after it, and the bytes that are carried then."""
    state, times, start = None, [], time.process_time()
    for part in torch.ones(1, position, dtype=torch.long).split(CALL_LENGTH, 1):
        _, state = read(model, part, state)
    prompt = time.process_time() - start
    for _ in range(DECODED_TOKENS):
        start = time.process_time()
        _, state = read(model, torch.ones(1, 1, dtype=torch.long), state)
        times.append(time.process_time() - start)
    carried = state_bytes(model, 1, position)
    yield {"prompt_seconds": prompt, "ms": 1000 * sorted(times)[len(times) // 2], "state_bytes": carried}


TABLES: dict[str, Callable[[Any, Evidence, Any], Iterator[dict[str, Any]]]] = {
    "text": text_lines,
    "ablation": ablation_lines,
    "stream": stream_lines,
    "recall": recall_lines,
    "chat": chat_lines,
    "cost": cost_lines,
}


class Unit(NamedTuple):
    """What is measured in one go: a table, a contender, and the kind of text, the distance or the position."""

    table: str
    contender: str
    part: Any = None


def units(evidence: Evidence, tables: Sequence[str] = tuple(TABLES), kinds: Sequence[str] = KINDS) -> list[Unit]:
    """What there is to measure."""
    names = list(evidence.contenders)
    ours = names[names.index(UNTRAINED) :]
    wanted = {
        "ablation": ours,
        "stream": [name for name in names[1:] if name not in EVICTED.values()],
        "chat": [name for name in ours if evidence.contenders[name].weights],
        "cost": [FULL, *ours],
    }
    parts: dict[str, Sequence[Any]] = {
        "text": kinds,
        "recall": evidence.sizes.windows,
        "cost": evidence.sizes.positions,
    }
    found = [
        Unit(table, name, part)
        for table in tables
        for part in parts.get(table, [None])
        for name in wanted.get(table, names)
    ]
    return [unit for unit in found if unit.table != "cost" or unit.contender != FULL or unit.part <= 8192]


SIZES_OF = {
    "text": ("documents", "document_tokens"),
    "ablation": ("documents", "document_tokens"),
    "stream": ("stream_tokens",),
    "recall": ("recall_tokens",),
    "chat": ("prompts",),
    "cost": (),
}


def settings_of(unit: Unit, evidence: Evidence) -> dict[str, Any]:
    """What else the figures of a unit depend on."""
    sizes = {name: getattr(evidence.sizes, name) for name in SIZES_OF[unit.table]}
    fixed = {"dtype": str(evidence.dtype).removeprefix("torch."), "window": evidence.window}
    return {**sizes, **fixed, "weights": evidence.contenders[unit.contender].weights}


def measure(evidence: Evidence, file: Path, chosen: Sequence[Unit]) -> None:
    """Adds lines of JSON for each unit that has none in the file yet, or has been measured with other settings.

    Args:
        evidence: What is measured.
        file: JSON lines; made if it does not exist.
        chosen: Units.
    """
    lines = read_lines(file)
    done = [(Unit(line["table"], line["contender"], line["part"]), line["settings"]) for line in lines]
    facts = environment(("torch", "transformers"))
    for unit in chosen:
        settings = settings_of(unit, evidence)
        if (unit, settings) in done:
            continue
        model = evidence.contenders[unit.contender].make()
        found = TABLES[unit.table](model, evidence, unit.part)
        lines += [{**unit._asdict(), **line, "settings": settings, "environment": facts} for line in found]
        write_lines(file, lines)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder of the model that was converted")
    parser.add_argument("models", nargs="*", metavar="NAME=FOLDER", help="converted models")
    parser.add_argument("--output-dir", type=Path, default=Path("experiments/results/retrofit"))
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of text")
    parser.add_argument(
        "--contenders", nargs="+", metavar="NAME", help="names, or beginnings of them; all if not given"
    )
    parser.add_argument("--austen", type=Path, default=Path("/"), help="where r-cran-janeaustenr was unpacked")
    parser.add_argument("--segment-length", type=int, default=128)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    for name, value in Sizes()._asdict().items():
        several: dict[str, Any] = {"nargs": "+"} if isinstance(value, tuple) else {}
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, **several)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measures what is missing and writes the report."""
    args = parse_arguments(arguments)
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    source = AutoModelForCausalLM.from_pretrained(args.source, dtype=dtype)
    made = contenders(source, args.models, args.segment_length)
    sizes = Sizes(**{name: getattr(args, name) for name in Sizes._fields})
    tokenizer = AutoTokenizer.from_pretrained(args.source)
    texts = cache(partial(held_out_documents, args.austen))  # read once for all units
    evidence = Evidence(made, tokenizer, sizes, 2 * args.segment_length, dtype, texts)
    chosen = [
        unit
        for unit in units(evidence, args.tables, args.kinds)
        if args.contenders is None or unit.contender.startswith(tuple(args.contenders))
    ]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    file = args.output_dir / "lines.jsonl"
    measure(evidence, file, chosen)
    write_retrofit_report(file, args.output_dir)


if __name__ == "__main__":
    main()
