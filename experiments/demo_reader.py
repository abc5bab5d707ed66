"""Reads a long text with a model from a folder that carries its code, and answers about its beginning.

This is what a user does: no rmt_hf is imported here, only transformers. `demo` runs it in a process of its own.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline


SLICE_LENGTH = 512


class Reading(NamedTuple):
    """Bits of the tokens, and seconds and bytes of state after each slice."""

    bits: list[float]
    seconds: list[float]
    state_bytes: list[int]
    state: Any


@torch.no_grad()
def read_text(model: Any, input_ids: torch.Tensor, words: str) -> Reading:
    """Reads (1, T) slice by slice, the state carried.

    Args:
        model: Any causal language model with a cache.
        input_ids: Token ids.
        words: Of the progress bar.
    """
    bits, seconds, num_bytes, state = [], [], [], None
    for start in tqdm(range(0, input_ids.shape[1] - 1, SLICE_LENGTH), desc=words, unit="slice"):
        ids = input_ids[:, start : min(start + SLICE_LENGTH, input_ids.shape[1] - 1)]
        begun = time.perf_counter()
        outputs = model(ids, past_key_values=state, use_cache=True)
        state = outputs.past_key_values
        seconds.append(time.perf_counter() - begun)
        wanted = input_ids[0, start + 1 : start + ids.shape[1] + 1]
        bits += (F.cross_entropy(outputs.logits[0].float(), wanted, reduction="none") / math.log(2)).tolist()
        num_bytes.append(bytes_of(state))
    return Reading(bits, seconds, num_bytes, state)


def bytes_of(state: Any) -> int:
    """Bytes of keys and values of a cache of transformers, or all bytes of ours."""
    if hasattr(state, "nbytes"):
        return state.nbytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in state.layers)


def answers(model: Any, tokenizer: Any, state: Any, questions: list[str]) -> list[str]:
    """What the text-generation pipeline says to each question after the text."""
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    settings = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    return [generator(words, past_key_values=state.clone(), **settings)[0]["generated_text"] for words in questions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="of the model")
    parser.add_argument("text", type=Path, help="JSON: input_ids, questions, and ask_at, tokens after which to ask")
    parser.add_argument("result", type=Path, help="JSON")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.folder, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.folder, trust_remote_code=True)
    task = json.loads(args.text.read_text("utf-8"))
    input_ids = torch.tensor([task["input_ids"]])
    with torch.no_grad():
        probe = model(input_ids[:, :300]).logits.double().sum().item()
    reading = read_text(model, input_ids, "With memory")
    said = {}
    for length in task["ask_at"]:
        state = reading.state if length >= input_ids.shape[1] - 1 else model.memorize(input_ids[:, :length])
        said[length] = answers(model, tokenizer, state, task["questions"])
    found = {**reading._asdict(), "answers": said, "probe": probe, "code": type(model).__module__}
    found.pop("state")
    args.result.write_text(json.dumps(found), "utf-8")


if __name__ == "__main__":
    main()
