"""Reads a long stream in constant memory, saves what the model remembers of it, and goes on from there.

Shows that a model generates like any other of transformers; that a stream gives the same however it is cut into calls;
that its state does not grow; and that a saved state goes on bit for bit. The model is new, with random weights, so what
it generates means nothing; `--model` takes a folder or a Hub id instead. Takes ten seconds on two cores.

    python examples/01_stream_and_save.py
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from rmt_hf import RMTCache, RMTConfig, RMTForCausalLM


def new_model() -> RMTForCausalLM:
    """A small model: segments of 64 tokens, a window of two, and 32 slots of memory in each of two layers."""
    config = RMTConfig(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        chunk_length=16,
        segment_length=64,
        num_memory_slots=32,
    )
    return RMTForCausalLM(config).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or Hub id of an RMT model")
    parser.add_argument("--tokens", type=int, default=20_000, help="length of the stream")
    parser.add_argument("--output-dir", type=Path, default=Path("reports/stream"))
    args = parser.parse_args()
    torch.manual_seed(0)
    model = new_model() if args.model is None else AutoModelForCausalLM.from_pretrained(args.model).eval()
    vocab_size, settings = model.config.vocab_size, {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}

    prompt = torch.randint(vocab_size, (1, 12))
    print(f"Generated after a prompt: {model.generate(prompt, **settings)[0, 12:].tolist()}")

    stream = torch.randint(vocab_size, (1, args.tokens))
    state = RMTCache(model.config)
    with torch.no_grad():
        at_once = model(stream, logits_to_keep=1).logits
        for part in stream.split(777, dim=1):  # the same stream, cut anywhere
            logits = model(part, past_key_values=state, logits_to_keep=1).logits
    difference = (logits - at_once).abs().max().item()
    print(f"Read {state.positions[0]:,} tokens at once and in slices of 777: the logits differ by {difference:.1e}.")
    longer = model.memorize(stream, past_key_values=state.clone())  # reads any length and makes no logits
    print(f"The state has {state.nbytes:,} bytes, and {longer.nbytes:,} after {longer.positions[0]:,} tokens.")

    model.save_pretrained(args.output_dir / "model")
    state.save_pretrained(args.output_dir / "state")
    loaded = AutoModelForCausalLM.from_pretrained(args.output_dir / "model").eval()
    question = torch.randint(vocab_size, (1, 12))
    here = model.generate(question, past_key_values=state, **settings)
    saved = RMTCache.from_pretrained(args.output_dir / "state", loaded)
    there = loaded.generate(question, past_key_values=saved, **settings)
    print(f"Generated after the stream, by this model: {here[0, 12:].tolist()}")
    print(f"By the saved model and the saved state:    {there[0, 12:].tolist()}")


if __name__ == "__main__":
    main()
