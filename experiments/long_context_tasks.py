"""Long-context tasks for lm-eval: YAML files over JSON, made offline, each prompt of up to so many tokens.

    python -m experiments.long_context_tasks TOKENIZER FOLDER --lengths 4096 8192
    python -m rmt_hf.evaluation.lm_eval --model_args pretrained=MODEL --include_path FOLDER --tasks vt_4096,needle_4096

| kind | made by | asked for |
|---|---|---|
| vt, fwe | RULER's variable tracking and frequent words, by the generators that lm-eval has | all names, three words |
| hard_needle | the package hard-needle 0.1.2: six facts of one kind | one of six values, by likelihood |
| needle | here, of the same kind as RULER's needle in an essay, which needs downloads: plays | a number |
"""

import argparse
import contextlib
import io
import json
import random
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from experiments.corpora import shakespeare
from experiments.recall_rows import TOWNS
from rmt_hf.files import write_whole


NUM_NEEDLES = 6  # of hard_needle, and so choices
VT_EXAMPLE, VT_ROOM = 500, 50  # tokens of the example before a document of variables, as in RULER; of an answer
NUMBER_TOKENS = 16  # that a needle may be answered with
TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {cache}}}
test_split: test
doc_to_text: "{{{{text}}}}"
"""
GENERATED = """output_type: generate_until
doc_to_target: "{{{{answers | join(' ')}}}}"
generation_kwargs: {{do_sample: false, until: {until}, max_gen_toks: {tokens}}}
process_results: !function experiments.long_context_tasks.found_share
metric_list: [{{metric: found, aggregation: mean, higher_is_better: true}}]
"""
CHOSEN = """output_type: multiple_choice
doc_to_choice: choices
doc_to_target: label
metric_list: [{{metric: acc}}]
"""


def found_share(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The share of answers that are in what was generated, as RULER counts."""
    answers = document["answers"]
    return {"found": sum(answer.lower() in results[0].lower() for answer in answers) / len(answers)}


def longest(build: Callable[[int], str], tokenizer: Any, length: int, most: int) -> str:
    """The text of the largest size, 1 to `most`, that has at most `length` tokens, or the smallest one."""
    least = 1
    while least < most:
        size = (least + most + 1) // 2
        fits = len(tokenizer(build(size), verbose=False)["input_ids"]) <= length
        least, most = (size, most) if fits else (least, size - 1)
    return build(least)


def needles(tokenizer: Any, length: int, count: int) -> Iterator[dict[str, Any]]:
    """A number that one sentence in plays names, at a depth that is drawn evenly."""
    rng, text = random.Random(f"needle {length}"), "\n".join(shakespeare()[1]["text"])
    sentences = [" ".join(sentence.split()) for sentence in re.split(r"(?<=[.!?])\s+", text)]
    for _ in range(count):
        town, number, depth = rng.choice(TOWNS), str(rng.randrange(1_000_000, 10_000_000)), rng.random()
        start = rng.randrange(len(sentences))
        told = f"The number that opens the gate of {town} is {number}."
        asked = f"Question: What number opens the gate?\nAnswer: The gate of {town} opens with number"

        def build(size: int, start: int = start, told: str = told, asked: str = asked, depth: float = depth) -> str:
            chosen = [sentences[(start + index) % len(sentences)] for index in range(size)]
            chosen.insert(round(depth * size), told)
            return f"Read the text, and remember the number in it.\n\n{' '.join(chosen)}\n\n{asked}"

        yield {"text": longest(build, tokenizer, length - NUMBER_TOKENS, length // 4), "answers": [number]}


def hard_needles(tokenizer: Any, length: int, count: int) -> Iterator[dict[str, Any]]:
    """One of six facts of one kind about six projects; the values are the choices."""
    from hard_needle import generate_hard_example

    for index in range(count):
        example = partial(generate_hard_example, NUM_NEEDLES, seed=index)
        text = longest(lambda size, make=example: make(size)["prompt"], tokenizer, length - NUMBER_TOKENS, 8 * length)  # type: ignore[misc]
        found = example(length)  # the same facts at any length
        values = sorted(record["value"] for record in found["needle_records"])
        yield {"text": text, "choices": values, "label": values.index(found["target"])}


def ruler(kind: str, tokenizer: Any, length: int, count: int) -> Iterator[dict[str, Any]]:
    """RULER's own documents, as lm-eval makes them."""
    from lm_eval.tasks.ruler import fwe_utils, vt_utils

    random.seed(length)
    np.random.seed(length)  # theirs draw from both
    with contextlib.redirect_stdout(io.StringIO()):
        if kind == "fwe":
            rows = fwe_utils.sys_kwext(tokenizer, length - KINDS[kind][1], count)  # theirs counts prompts alone
        else:
            make = vt_utils.sys_vartrack_w_noise_random
            for noises, most in (
                (5, VT_EXAMPLE),
                (10, length - VT_EXAMPLE),
            ):  # theirs would look for smaller ones for ever
                smallest = vt_utils.generate_input_output(noises, 1, 4)[0]
                if (needed := len(tokenizer(smallest)["input_ids"]) + VT_ROOM) > most:
                    raise ValueError(
                        f"vt needs {needed} tokens where there are {most}: give another length or tokenizer."
                    )
            example = make(tokenizer, num_samples=1, max_seq_length=VT_EXAMPLE, incremental=5)[0]
            rows = make(tokenizer, num_samples=count, max_seq_length=length, icl_example=example)
    for row in rows:
        yield {"text": f"{row['input']} {row['gen_prefix']}", "answers": row["outputs"]}


# What makes the documents of a kind, the most tokens that are generated, and what ends an answer.
KINDS: dict[str, tuple[Callable[[Any, int, int], Iterator[dict[str, Any]]], int, list[str]]] = {
    "needle": (needles, NUMBER_TOKENS, ["\n"]),
    "hard_needle": (hard_needles, 0, []),
    "vt": (partial(ruler, "vt"), 30, []),
    "fwe": (partial(ruler, "fwe"), 50, []),
}


def write_task(folder: Path, kind: str, tokenizer: Any, length: int, count: int) -> str:
    """Writes documents and task if they are not there; returns the name of the task.

    Args:
        folder: Where to.
        kind: One of `KINDS`.
        tokenizer: Of the model, which counts.
        length: The most tokens of a prompt and its answer.
        count: Documents.
    """
    make, tokens, until = KINDS[kind]
    name = f"{kind}_{length}"
    file = folder / f"{name}_{count}.jsonl"
    if not file.exists():
        lines = [json.dumps(document) + "\n" for document in make(tokenizer, length, count)]
        write_whole(file, lambda path: path.write_text("".join(lines), "utf-8"))
    facts = {
        "name": name,
        "file": json.dumps(str(file.resolve())),
        "cache": json.dumps(str((folder / "cache").resolve())),
    }
    text = (TASK + (GENERATED if tokens else CHOSEN)).format(**facts, until=json.dumps(until), tokens=tokens)
    write_whole(folder / f"{name}.yaml", lambda path: path.write_text(text, "utf-8"))
    return name


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokenizer", help="folder of the model that is measured")
    parser.add_argument("folder", type=Path, help="where tasks and documents go")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--documents", type=int, default=10)
    args = parser.parse_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    for kind in args.kinds:
        for length in args.lengths:
            print(write_task(args.folder, kind, tokenizer, length, args.documents))


if __name__ == "__main__":
    main()
