"""Chats with a model that has a memory, for as long as you like, at the same cost for every message.

Shows `Chat`: the model reads what is new, and its state has the rest. Messages come from the keyboard, or from
`--messages`. With `--chat` the conversation is kept in that folder and goes on with the next start. The model is a
folder with a tokenizer that has a chat template, such as 05_give_a_model_memory.py writes. Takes about ten seconds
for an answer of SmolLM2-135M on two cores.

    python examples/06_chat.py reports/memory/model --chat reports/chat
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import rmt_hf  # noqa: F401  # makes the Auto classes know the model
from rmt_hf.chat import Chat


def typed() -> Iterator[str]:
    """Messages from the keyboard, until an empty one or the end of the input."""
    while True:
        try:
            message = input("> ")
        except EOFError:
            return
        if not message:
            return
        yield message


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of model and tokenizer")
    parser.add_argument("--chat", type=Path, help="folder that the chat is kept in")
    parser.add_argument("--messages", nargs="+", help="what to say instead of what is typed")
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(args.model), AutoTokenizer.from_pretrained(args.model)
    chat = Chat(model, tokenizer, max_new_tokens=args.max_new_tokens, do_sample=False)
    if args.chat is not None and args.chat.exists():
        chat.load(args.chat)
    for message in args.messages or typed():
        chat.say(message, streams=True)
        if args.chat is not None:
            chat.save(args.chat)
    if chat.state.is_initialized:
        print(f"{chat.state.positions[0]:,} tokens read, {chat.state.nbytes:,} bytes carried")


if __name__ == "__main__":
    main()
