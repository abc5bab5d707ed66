"""What a calibrated score is worth to a converted model: held-out text, and codes that are told and asked for later.

    python -m experiments.calibrated SOURCE --output-dir experiments/results/calibration

SOURCE is a folder, SmolLM2 say. The score is fitted once, to plays that nothing else is measured on, and kept in
scores.safetensors. Each finished unit is a line of JSON, and one that is there already is not measured again; the table
is written from the lines.

Shapes: T tokens.
"""

import argparse
import itertools
import json
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from experiments.baselines import read
from experiments.code_rows import TOWNS, ask_all
from experiments.corpora import shakespeare
from experiments.reports import environment
from experiments.retrofit import ROOM, window_with_sink
from experiments.stories import Background, Story, read_background
from rmt_hf import RMTForCausalLM
from rmt_hf.conversion import add_memory, calibrate
from rmt_hf.data import IGNORED, token_byte_counts
from rmt_hf.evaluation.bits import token_bits
from rmt_hf.files import digest, write_whole


FULL, WINDOW, EMPTY = "full attention", "window and sink", "window and sink, our keys"
NUM_CODES = 4  # in a row
# How a code is told, asked for, and asked for in an example; none of these words is in the documents of the fit.
WORDINGS = {
    "like the fit": ("The secret code of {} is {}.", "What is the secret code of {}?"),
    "another": (
        "Whoever came to {} at night had to whisper {} to be let in.",
        "Which number opened the gates at night in {}?",
    ),
}


class Setting(NamedTuple):
    """What is measured, of which model.

    Args:
        source: With full attention.
        tokenizer: Of the source.
        scores: Tensors of the fitted scores, by name.
        weights: Hash of them.
        args: Command line.
    """

    source: PreTrainedModel
    tokenizer: Any
    scores: dict[str, torch.Tensor]
    weights: str
    args: argparse.Namespace


class Unit(NamedTuple):
    """What is measured in one go; wording and distance are of codes."""

    contender: str
    wording: str | None = None
    distance: int | None = None


def with_memory(source: PreTrainedModel, segment_length: int, num_lasting_slots: int) -> RMTForCausalLM:
    """The source with slots for two segments, so many of them lasting; a segment offers no more than that to them."""
    candidates = min(segment_length, num_lasting_slots or segment_length)
    fields = {"num_lasting_slots": num_lasting_slots, "num_slots_per_chunk": candidates}
    return add_memory(source, segment_length=segment_length, **fields)


def calibrated(source: PreTrainedModel, setting: Setting, segment_length: int, num_lasting_slots: int) -> Any:
    """The same, with the scores that were fitted."""
    model = with_memory(source, segment_length, num_lasting_slots)
    model.load_state_dict(setting.scores, strict=False)
    return model


def contenders(setting: Setting) -> dict[str, Callable[[], PreTrainedModel]]:
    """What is compared, each made when it is called."""
    source, segment = setting.source, setting.args.segment_length
    made: dict[str, Callable[[], PreTrainedModel]] = {
        FULL: source.eval,
        WINDOW: partial(window_with_sink, source, segment),
        EMPTY: partial(window_with_sink, source, 2 * segment),
        f"0 of {2 * segment} lasting": partial(with_memory, source, segment, 0),
    }
    for lasting in (segment, segment // 2):
        name = f"{lasting} of {2 * segment} lasting"
        made[f"{name}, calibrated"] = partial(calibrated, source, setting, segment, lasting)
        made[f"{name}, untrained"] = partial(with_memory, source, segment, lasting)
    return made


def fitted_scores(source: PreTrainedModel, tokenizer: Any, args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Scores of the folder, fitted if it has none yet; what the fit explains and takes is printed."""
    file = args.output_dir / "scores.safetensors"
    if not file.exists():
        model, start = with_memory(source, args.segment_length, args.segment_length), time.process_time()
        texts = list(shakespeare(args.max_documents)[0]["text"])
        shares = calibrate(model, texts, tokenizer, num_documents=args.calibration_documents)
        print(f"explained: {shares.min():.2f} to {shares.max():.2f}; CPU seconds: {time.process_time() - start:.0f}")
        scores = {name: tensor for name, tensor in model.state_dict().items() if "score_proj" in name}
        write_whole(file, partial(save_file, scores))
    return load_file(file)


def text_line(model: PreTrainedModel, setting: Setting) -> dict[str, Any]:
    """Bits and bytes of each held-out play, from the end of the first window on."""
    args, first, found = setting.args, 2 * setting.args.segment_length, []
    for text in shakespeare(args.documents)[1]["text"]:
        ids = setting.tokenizer(text[: 8 * args.document_tokens], verbose=False)["input_ids"][: args.document_tokens]
        row = torch.tensor([ids])
        sizes = token_byte_counts(setting.tokenizer)[row[:, 1:]]
        bits = token_bits(model, row, show_progress=True)
        found.append([bits[:, first - 1 :].sum().item(), sizes[:, first - 1 :].sum().item()])
    return {"bits": [bits for bits, _ in found], "bytes": [size for _, size in found]}


def code_rows(background: Background, wording: str, distance: int, window: int, count: int) -> list[dict[str, Any]]:
    """Rows in which `NUM_CODES` codes are told, `distance` windows before the first question or one less."""
    rng, rows = random.Random(f"{wording} {distance}"), []
    tell, ask = WORDINGS[wording]
    span = ((distance - 1) * window, distance * window)
    for _ in range(count):
        towns = rng.sample(TOWNS, NUM_CODES)
        codes = {town: str(rng.randrange(1000, 10000)) for town in towns}
        facts = [tell.format(town, code) for town, code in codes.items()]
        example = f"{ask.format('Atlantis')}\nAnswer: 3141\nQuestion: "
        asked = [(example * (town == towns[0]) + ask.format(town), codes[town]) for town in towns]
        stories = [Story(facts, question, code) for question, code in asked]
        rows.append(ask_all(stories, background, span[1] + ROOM * (2 + NUM_CODES), span, rng))
    return rows


@torch.no_grad()
def recalled(model: PreTrainedModel, row: dict[str, Any], call_length: int = 512) -> list[tuple[bool, float]]:
    """Of each answer in a row: whether its tokens are the likeliest, and the mean of their log-probabilities."""
    input_ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
    is_answer = (labels != IGNORED).tolist()
    begin, state = is_answer.index(True) - 1, None
    for part in input_ids[:, :begin].split(call_length, 1):
        _, state = read(model, part, state)
    logits, _ = read(model, input_ids[:, begin:-1], state, logits_to_keep=0)
    wanted = input_ids[0, begin + 1 :]
    logs = F.log_softmax(logits[0].float(), -1).gather(1, wanted[:, None])[:, 0]
    is_likeliest = logits[0].argmax(-1) == wanted
    runs = itertools.groupby(range(begin + 1, len(is_answer)), key=is_answer.__getitem__)
    answers = [torch.tensor(list(columns)) - begin - 1 for is_run, columns in runs if is_run]
    return [(bool(is_likeliest[columns].all()), logs[columns].mean().item()) for columns in answers]


def code_line(model: PreTrainedModel, setting: Setting, unit: Unit, background: Background) -> dict[str, Any]:
    """Right answers, and the mean log-probability of a token of theirs."""
    window, count = 2 * setting.args.segment_length, setting.args.code_rows
    rows = code_rows(background, unit.wording or "", unit.distance or 0, window, count)
    found = [answer for row in tqdm(rows, desc=f"{unit}") for answer in recalled(model, row)]
    return {"right": [right for right, _ in found], "log_probability": [log for _, log in found]}


def measure(setting: Setting, file: Path) -> list[dict[str, Any]]:
    """All lines; those that are missing in the file are measured and added to it."""
    args, made = setting.args, contenders(setting)
    names = [name for name in made if args.contenders is None or name.startswith(tuple(args.contenders))]
    units = [Unit(name) for name in names]
    units += [Unit(name, wording, at) for wording in args.wordings for at in args.windows for name in names]
    lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []
    background = read_background("\n".join(shakespeare(args.max_documents)[1]["text"]), setting.tokenizer)
    for unit in units:
        sizes = ("segment_length", "code_rows") if unit.wording else ("segment_length", "documents", "document_tokens")
        settings = {name: getattr(args, name) for name in sizes}
        settings["scores"] = setting.weights if "calibrated" in unit.contender else ""
        if any(
            all(line[name] == value for name, value in {**unit._asdict(), "settings": settings}.items())
            for line in lines
        ):
            continue
        model = made[unit.contender]()
        found = code_line(model, setting, unit, background) if unit.wording else text_line(model, setting)
        lines.append({**unit._asdict(), **found, "settings": settings, "environment": environment()})
        text = "".join(f"{json.dumps(line, allow_nan=False)}\n" for line in lines)
        write_whole(file, partial(Path.write_text, data=text, encoding="utf-8"))
    return lines


def table(lines: list[dict[str, Any]]) -> str:
    """The latest figure of each unit as a Markdown table."""
    latest = {(line["contender"], line["wording"], line["distance"]): line for line in lines}
    columns = sorted({(wording, distance) for _, wording, distance in latest if wording is not None})
    head = ["sees", "bits per byte", *(f"{wording}, {distance} windows" for wording, distance in columns)]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for name in dict.fromkeys(contender for contender, _, _ in latest):
        cells = [
            name,
            "" if (text := latest.get((name, None, None))) is None else f"{sum(text['bits']) / sum(text['bytes']):.4f}",
        ]
        for column in columns:
            line = latest.get((name, *column))
            logs = line["log_probability"] if line else []
            cells.append(f"{sum(line['right'])} of {len(logs)} ({sum(logs) / len(logs):.2f})" if line else "")
        rows.append(cells)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder of the model that gets a memory")
    parser.add_argument("--output-dir", type=Path, default=Path("experiments/results/calibration"))
    parser.add_argument(
        "--contenders", nargs="+", metavar="NAME", help="names, or beginnings of them; all if not given"
    )
    parser.add_argument("--wordings", nargs="+", choices=list(WORDINGS), default=list(WORDINGS))
    parser.add_argument("--windows", type=int, nargs="+", default=[2, 4, 8], help="distances of codes")
    parser.add_argument("--segment-length", type=int, default=128)
    parser.add_argument("--documents", type=int, default=2, help="held-out plays")
    parser.add_argument("--document-tokens", type=int, default=4096)
    parser.add_argument("--code-rows", type=int, default=3, help=f"rows of {NUM_CODES} codes for each distance")
    parser.add_argument("--calibration-documents", type=int, default=8)
    parser.add_argument("--max-documents", type=int, help="plays that are read at all, for tests")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Fits and measures what is missing, and writes the table."""
    args = parse_arguments(arguments)
    torch.set_num_threads(args.threads)
    source = AutoModelForCausalLM.from_pretrained(args.source, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.source)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    scores = fitted_scores(source, tokenizer, args)
    setting = Setting(source, tokenizer, scores, digest(args.output_dir / "scores.safetensors")[:16], args)
    text = table(measure(setting, args.output_dir / "lines.jsonl"))
    write_whole(args.output_dir / "table.md", partial(Path.write_text, data=f"{text}\n", encoding="utf-8"))
    print(text)


if __name__ == "__main__":
    main()
