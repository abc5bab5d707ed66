"""What a converted model has gained and lost: against its source, and against windows of the same size.

    python -m experiments.retrofit SOURCE MODEL --output-dir experiments/results/retrofit

Text that was held out, a stream longer than the source can read, facts asked for at many distances, chats, and the cost
of a token. Each finished unit is a line of JSON, and one that is there already is not measured again; tables and plot
are written from the lines (`retrofit_report`).

Shapes: B documents, T tokens.
"""

import argparse
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM, PreTrainedModel

from experiments.baselines import read, state_bytes
from experiments.code_rows import ask_all, code_stories
from experiments.corpora import chat_openings, king_james, shakespeare
from experiments.reports import environment
from experiments.retrofit_report import write_retrofit_report
from experiments.stories import Background, read_background
from rmt_hf import RMTForCausalLM
from rmt_hf.conversion import add_memory
from rmt_hf.data import IGNORED, token_byte_counts, tokenize
from rmt_hf.evaluation.ablation import empty_memories, pass_on_memories, stream_bits
from rmt_hf.evaluation.bits import bucket_sums, position_edges, token_bits
from rmt_hf.files import digest, write_whole


OURS, EMPTIED, PASSED_ON = "ours", "ours, memory emptied", "ours, memory of another document"
ABLATIONS = {EMPTIED: empty_memories, PASSED_ON: pass_on_memories}
FULL = "full attention"
NUM_FACTS = {"needle": 1, "key/value": 4}
EXAMPLE = "What is the secret code of Atlantis?\nAnswer: 3141"  # shows the form, which ours has been taught
ROOM = 64  # tokens of a row for each question, and for as much before the facts
ANSWER_TOKENS = 32
DECODED_TOKENS = 32


class Sizes(NamedTuple):
    """How much is measured.

    Args:
        documents: Held-out plays.
        document_tokens: Read of each.
        stream_tokens: Read of the long stream.
        windows: Distances of facts, windows.
        recall_rows: Rows for each distance and number of facts.
        prompts: Chats.
        decode_at: Tokens read before the cost of one is measured.
    """

    documents: int = 4
    document_tokens: int = 8192
    stream_tokens: int = 65_536
    windows: tuple[int, ...] = (2, 4, 8, 16, 32)
    recall_rows: int = 8
    prompts: int = 200
    decode_at: int = 8192


@dataclass(frozen=True)
class Evidence:
    """What the units share.

    Args:
        model: Ours.
        source: With full attention.
        tokenizer: Of both.
        sizes: How much.
        weights: Which weights and configuration ours has: hashes, say.
    """

    model: RMTForCausalLM
    source: PreTrainedModel
    tokenizer: Any
    sizes: Sizes
    weights: str = ""

    @property
    def window(self) -> int:
        """Tokens of our window."""
        return self.model.config.window_length

    @cached_property
    def background(self) -> Background:
        """All held-out plays, for facts to be told in."""
        _, held_out = shakespeare()
        return read_background("\n".join(held_out["text"]), self.tokenizer)


def sliding_window(source: PreTrainedModel, window: int) -> MistralForCausalLM:
    """The source (of Llama's family, without biases) with attention to the last tokens alone; tensors are shared.

    Args:
        source: Any length of attention.
        window: Tokens that a token sees, itself included.
    """
    known = source.config.to_dict()
    kept = {name: known[name] for name in MistralConfig().to_dict() if name in known and name != "model_type"}
    config = MistralConfig(**{**kept, "sliding_window": window, "architectures": None})
    loaded: Any = MistralForCausalLM.from_pretrained(
        None, config=config, state_dict=source.state_dict(), dtype=source.dtype, output_loading_info=True
    )
    model, report = loaded
    if report["missing_keys"] or report["unexpected_keys"]:
        raise ValueError(
            f"source must have the tensors of Mistral, got {sorted(report['unexpected_keys'])[:5]} besides."
        )
    return model.eval()


def window_with_sink(source: PreTrainedModel, segment_length: int, num_lookback_segments: int = 1) -> RMTForCausalLM:
    """The source as a converted model without memory: its window and the sink are all that it sees."""
    fields = {"segment_length": segment_length, "chunk_length": segment_length, "num_memory_slots": 0}
    fields |= {"num_lookback_segments": num_lookback_segments}
    return add_memory(source, use_local_attention=False, **fields).eval()


def tokens_of_equal_state(model: RMTForCausalLM) -> int:
    """Tokens whose keys and values are as many bytes as the state of one of our streams, rounded up."""
    config = model.config
    num_heads, width = config.key_value_shape
    per_token = 2 * config.num_hidden_layers * num_heads * width * torch.finfo(model.dtype).bits // 8
    return -(-state_bytes(model, 1, config.window_length) // per_token)


def contenders(model: RMTForCausalLM, source: PreTrainedModel) -> dict[str, Callable[[], PreTrainedModel]]:
    """Ours, the source with its full attention, and what it is with windows; each is made when it is called."""
    window, equal, lookback = (
        model.config.window_length,
        tokens_of_equal_state(model),
        model.config.num_lookback_segments,
    )
    segment, longer = model.config.segment_length, equal // (lookback + 2)  # a state has one segment more than is seen
    slots = model.config.num_memory_slots
    return {
        OURS: lambda: model,
        FULL: source.eval,
        f"sliding window of {window}": partial(sliding_window, source, window),
        f"sliding window of {equal}, our state bytes": partial(sliding_window, source, equal),
        f"window of {window} and sink": partial(window_with_sink, source, segment, lookback),
        f"window of {window + slots} and sink, our keys": partial(
            window_with_sink, source, (window + slots) // (lookback + 1), lookback
        ),
        f"window of {longer * (lookback + 1)} and sink, our state bytes": partial(
            window_with_sink, source, longer, lookback
        ),
    }


def text_bits(name: str, model: PreTrainedModel, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Bits (B, T - 1) of documents read as streams; ours under ablations of memory, too."""
    if name != OURS:
        return {name: torch.cat([token_bits(model, row[None], show_progress=True) for row in input_ids])}
    ablations = ABLATIONS if len(input_ids) > 1 else {EMPTIED: empty_memories}
    bits = stream_bits(cast(RMTForCausalLM, model), input_ids, ablations, show_progress=True)
    return {OURS: bits.pop("own"), **bits}


def text_lines(
    table: str, name: str, evidence: Evidence, input_ids: torch.Tensor, edges: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Bits and bytes of each document in each bucket of positions, for a contender; and for ours under ablations."""
    contender = contenders(evidence.model, evidence.source)[name]()
    token_bytes = token_byte_counts(evidence.tokenizer)[input_ids[:, 1:]]
    for condition, bits in text_bits(name, contender, input_ids).items():
        found = {"bits": bucket_sums(bits, edges).tolist(), "bytes": bucket_sums(token_bytes, edges).tolist()}
        yield {"table": table, "contender": condition, "edges": list(edges), **found}


def document_lines(name: str, evidence: Evidence) -> Iterator[dict[str, Any]]:
    """Held-out plays, in buckets that double."""
    sizes = evidence.sizes
    _, held_out = shakespeare(sizes.documents)
    rows = tokenize(held_out, evidence.tokenizer)["input_ids"]
    input_ids = torch.tensor([ids[: sizes.document_tokens] for ids in rows])
    edges = position_edges(sizes.document_tokens, evidence.window)
    return text_lines("text", name, evidence, input_ids, edges)


def stream_lines(name: str, evidence: Evidence) -> Iterator[dict[str, Any]]:
    """The King James Bible from its beginning, one stream, in eight equal buckets."""
    num_tokens = evidence.sizes.stream_tokens
    ids = evidence.tokenizer(king_james()[: 8 * num_tokens], verbose=False)["input_ids"][:num_tokens]
    edges = [num_tokens * part // 8 for part in range(9)]
    return text_lines("stream", name, evidence, torch.tensor([ids]), edges)


class Asked(NamedTuple):
    """A row (1, T) and the tokens of it that are answers, one list of positions for each."""

    input_ids: torch.Tensor
    answers: list[list[int]]


def recall_rows(background: Background, num_facts: int, num_windows: int, window: int, count: int) -> list[Asked]:
    """Rows that ask for all codes told in them, at `num_windows` windows before the first question or one less.

    Before the first question one is answered that nothing was told about, as an example.

    Args:
        background: Text that was not trained on.
        num_facts: Codes in a row.
        num_windows: At least 2.
        window: Tokens of our window.
        count: Number of rows.
    """
    rng, rows = random.Random(f"{num_facts} {num_windows}"), []
    span = ((num_windows - 1) * window, num_windows * window)
    for _ in range(count):
        first, *others = code_stories(num_facts, rng)
        stories = [first._replace(question=f"{EXAMPLE}\nQuestion: {first.question}"), *others]
        row = ask_all(stories, background, span[1] + ROOM * (2 + num_facts), span, rng)
        is_answer = [label != IGNORED for label in row["labels"]]
        runs = itertools.groupby(range(len(is_answer)), key=is_answer.__getitem__)
        answers = [list(positions) for is_run, positions in runs if is_run]
        rows.append(Asked(torch.tensor([row["input_ids"]]), answers))
    return rows


@torch.no_grad()
def recall(
    model: PreTrainedModel, row: Asked, ablations: Sequence[Callable | None] = (None,), call_length: int = 512
) -> list[list[bool]]:
    """Whether each answer would be given, all of its tokens, by taking the likeliest token each time.

    Args:
        model: Any contender.
        row: What to read.
        ablations: What is done to the state before the questions; None for nothing. Others want a model of ours.
        call_length: Tokens in one call.

    Returns:
        The answers' verdicts under each ablation.
    """
    begin = row.answers[0][0] - 32  # within the question, or just before it
    state, wanted, found = None, row.input_ids[0], []
    for part in row.input_ids[:, :begin].split(call_length, 1):
        _, state = read(model, part, state)
    for ablation in ablations:
        asked = state if ablation is None and len(ablations) == 1 else cast(Any, state).clone()
        if ablation is not None:
            ablation(asked)
        logits, _ = read(model, row.input_ids[:, begin:-1], asked, logits_to_keep=0)
        said = logits.argmax(-1)[0]  # index c says what token begin + c + 1 is
        found.append([all(bool(said[c - begin - 1] == wanted[c]) for c in positions) for positions in row.answers])
    return found


def recall_lines(name: str, evidence: Evidence, distance: int) -> Iterator[dict[str, Any]]:
    """Share of right answers of each row at a distance; of ours with its memory emptied as well."""
    contender = contenders(evidence.model, evidence.source)[name]()
    conditions = {name: None} | ({EMPTIED: empty_memories} if name == OURS else {})
    shares: dict[str, dict[str, list[float]]] = {condition: {} for condition in conditions}
    for kind, num_facts in NUM_FACTS.items():
        rows = recall_rows(evidence.background, num_facts, distance, evidence.window, evidence.sizes.recall_rows)
        for row in tqdm(rows, desc=f"{name}: {kind}, {distance} windows"):
            for condition, hits in zip(conditions, recall(contender, row, list(conditions.values())), strict=True):
                shares[condition].setdefault(kind, []).append(sum(hits) / len(hits))
    for condition, found in shares.items():
        yield {"table": "recall", "contender": condition, "distance": distance, "shares": found}


@torch.no_grad()
def chat_lines(name: str, evidence: Evidence) -> Iterator[dict[str, Any]]:
    """Share of chat prompts that ours and its source answer with the same tokens, the likeliest each time."""
    prompts = [[{"role": "user", "content": text}] for text in chat_openings(evidence.sizes.prompts)]
    same = []
    for prompt in tqdm(prompts, desc="Answering"):
        ids = evidence.tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        settings = {"max_new_tokens": ANSWER_TOKENS, "do_sample": False}
        answers = [cast(Any, each).generate(**ids, **settings).tolist() for each in (evidence.model, evidence.source)]
        same.append(answers[0] == answers[1])
    yield {"table": "chat", "contender": name, "same": same}


@torch.no_grad()
def cost_lines(name: str, evidence: Evidence) -> Iterator[dict[str, Any]]:
    """Median CPU milliseconds of a token after many others, and the bytes that are carried then."""
    contender, position = contenders(evidence.model, evidence.source)[name](), evidence.sizes.decode_at
    state, times = None, []
    for part in torch.ones(1, position, dtype=torch.long).split(512, 1):
        _, state = read(contender, part, state)
    for _ in range(DECODED_TOKENS):
        start = time.process_time()
        _, state = read(contender, torch.ones(1, 1, dtype=torch.long), state)
        times.append(time.process_time() - start)
    milliseconds = 1000 * sorted(times)[len(times) // 2]
    carried = state_bytes(contender, 1, position)
    yield {"table": "cost", "contender": name, "position": position, "ms": milliseconds, "state_bytes": carried}


TABLES: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
    "text": document_lines,
    "stream": stream_lines,
    "recall": recall_lines,
    "chat": chat_lines,
    "cost": cost_lines,
}


class Unit(NamedTuple):
    """What is measured in one go: a table, a contender, and in recall a distance."""

    table: str
    contender: str
    distance: int | None = None


def units(evidence: Evidence, tables: Sequence[str] = tuple(TABLES)) -> list[Unit]:
    """What there is to measure."""
    names = list(contenders(evidence.model, evidence.source))
    wanted = {"stream": [name for name in names if name != FULL], "chat": [OURS], "cost": [OURS, FULL]}
    distances: dict[str, Sequence[int | None]] = {"recall": evidence.sizes.windows}
    return [
        Unit(table, name, distance)
        for table in tables
        for name in wanted.get(table, names)
        for distance in distances.get(table, [None])
    ]


SIZES_OF = {
    "text": ("documents", "document_tokens"),
    "stream": ("stream_tokens",),
    "recall": ("recall_rows",),
    "chat": ("prompts",),
    "cost": ("decode_at",),
}


def settings_of(unit: Unit, evidence: Evidence) -> dict[str, Any]:
    """What else the figures of a unit depend on."""
    sizes = {name: getattr(evidence.sizes, name) for name in SIZES_OF[unit.table]}
    fixed = {"dtype": str(evidence.model.dtype).removeprefix("torch."), "window": evidence.window}
    return {**sizes, **fixed, "weights": evidence.weights if unit.contender == OURS else ""}


def measure(evidence: Evidence, file: Path, chosen: Sequence[Unit]) -> None:
    """Adds lines of JSON for each unit that has none in the file yet, or has been measured with other settings.

    Args:
        evidence: What is measured.
        file: JSON lines; made if it does not exist.
        chosen: Units.
    """
    lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []
    done = [(Unit(line["table"], line["contender"], line.get("distance")), line["settings"]) for line in lines]
    facts = environment(("torch", "transformers"))
    for unit in chosen:
        settings = settings_of(unit, evidence)
        if (unit, settings) in done:
            continue
        arguments = [unit.contender, evidence] + ([] if unit.distance is None else [unit.distance])
        with torch.no_grad():
            lines += [{**line, "settings": settings, "environment": facts} for line in TABLES[unit.table](*arguments)]
        text = "".join(f"{json.dumps(line, allow_nan=False)}\n" for line in lines)
        write_whole(file, partial(Path.write_text, data=text, encoding="utf-8"))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder of the model that was converted")
    parser.add_argument("model", type=Path, help="folder of the converted model")
    parser.add_argument("--output-dir", type=Path, default=Path("experiments/results/retrofit"))
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument(
        "--contenders", nargs="+", metavar="NAME", help="names, or beginnings of them; all if not given"
    )
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
    model = RMTForCausalLM.from_pretrained(args.model, dtype=dtype)
    sizes = Sizes(**{name: getattr(args, name) for name in Sizes._fields})
    files = [args.model / "config.json", *sorted(args.model.glob("*.safetensors"))]
    weights = " ".join(digest(file)[:16] for file in files)
    evidence = Evidence(model.eval(), source.eval(), AutoTokenizer.from_pretrained(args.source), sizes, weights)
    chosen = units(evidence, args.tables)
    if args.contenders is not None:
        chosen = [unit for unit in chosen if unit.contender.startswith(tuple(args.contenders))]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    file = args.output_dir / "lines.jsonl"
    measure(evidence, file, chosen)
    write_retrofit_report(file, args.output_dir)


if __name__ == "__main__":
    main()
