"""The command `rmt`, also `python -m rmt_hf`. A command imports its module alone, so that it needs no other extra."""

import argparse
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from . import RMTConfig, __version__


NUM_UNDO = 8  # turns of a chat, each of which keeps a state
CHAT_HELP = "/undo takes the last turn back, /again answers it anew, /state says what is kept, /quit or Ctrl-D ends."


class Command(NamedTuple):
    """What is called with the arguments, the extra that brings what it needs, its purpose, and an example."""

    function: str
    extra: str
    purpose: str
    example: str


COMMANDS = {
    "convert": Command("conversion:main", "train", "give a model a memory, or take it away", "SOURCE TARGET"),
    "calibrate": Command("calibration:main", "train", "fit what lasting slots keep", "MODEL book.txt TARGET"),
    "chat": Command("cli:chat", "chat", "talk to a model in the terminal", "MODEL --keep my_chat"),
    "serve": Command("serving:main", "serve", "answer the OpenAI protocol", "MODEL --sessions-dir sessions"),
    "evaluate": Command(
        "evaluation.lm_eval:main", "eval", "run tasks of lm-eval", "--model_args pretrained=MODEL --tasks piqa"
    ),
    "inspect": Command("inspection:main", "inspect", "show what memory holds of a text", "MODEL book.txt book.html"),
    "card": Command("cli:card", "train", "write README.md of a model", "MODEL --license mit --result Hamlet bpb 1.51"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line. What a user can mend ends it with a message and exit code 1, wrong options with exit code 2.

    Args:
        arguments: Those of the process if None.
    """
    rows = "\n".join(f"  {name:10} {it.purpose}\n{'':12} rmt {name} {it.example}" for name, it in COMMANDS.items())
    parser = argparse.ArgumentParser(
        "rmt",
        description="Language models with a memory of constant size.",
        epilog=f"commands, each with an example:\n{rows}\n\n`rmt COMMAND --help` has the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"rmt_hf {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...")
    args = parser.parse_args(arguments)
    name, command = f"rmt {args.command}", COMMANDS[args.command]
    if {"-h", "--help"} & set(args.arguments):
        print(f"example: {name} {command.example}\n")
    try:
        pkgutil.resolve_name(f"rmt_hf.{command.function}")(args.arguments)
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # as of a shell
    except (ValueError, OSError, ImportError) as error:
        missing = error.name or "" if isinstance(error, ModuleNotFoundError) else ""
        if missing.startswith("rmt_hf"):
            raise  # a fault of ours
        remedy = f'{missing} is missing: pip install "rmt_hf[{command.extra}]".'
        raise SystemExit(f"{name}: {remedy if missing else error}") from None


def chat(arguments: Sequence[str]) -> None:
    """A chat in the terminal."""
    parser = argparse.ArgumentParser("rmt chat", description=f"A chat of any length at constant cost. {CHAT_HELP}")
    parser.add_argument("model", help="folder or Hub id of a model with memory, whose tokenizer has a chat template")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="the chat is kept there, and goes on from there")
    parser.add_argument("--system", help="what the model is told before the first message")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends an answer; can be repeated")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="of an answer (default %(default)s)")
    parser.add_argument("--temperature", type=float, help="0: the most likely words; as the model says if left out")
    parser.add_argument("--device", default="cpu", help="default %(default)s")
    args = parser.parse_args(arguments)
    from .chat import RECORD_NAME, Chat

    model: Any = AutoModelForCausalLM.from_pretrained(args.model, config=_config(args.model), dtype="auto")
    settings: dict[str, Any] = {"max_new_tokens": args.max_new_tokens}
    if args.temperature is not None:
        settings |= {"do_sample": args.temperature > 0, "temperature": args.temperature or None}
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    talk = Chat(model.to(args.device), tokenizer, args.system, args.stop, NUM_UNDO, **settings)
    if args.keep is not None and (args.keep / RECORD_NAME).exists():
        talk.load(args.keep)
    print(CHAT_HELP, file=sys.stderr)
    while True:
        try:
            message = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            message = "/quit"
        if message in ("/state", "/quit") and talk.state.is_initialized:
            print(f"{talk.state.positions[0]:,} tokens read, {talk.state.nbytes:,} bytes of state")
        if message == "/quit":
            break
        if message in ("/undo", "/again") and not talk.before:
            print("There is no turn to undo.")
        elif message == "/undo":
            print(f"Undone: {talk.undo()}")
        elif message not in ("", "/state"):
            try:
                for text in talk.regenerate() if message == "/again" else talk.stream(message):
                    print(text, end="", flush=True)
                print()
            except KeyboardInterrupt:
                print("\nInterrupted: the chat stands where it stood.")
        if args.keep is not None and talk.state.is_initialized:
            talk.save(args.keep)
        elif args.keep is not None:  # all of it is undone
            (args.keep / RECORD_NAME).unlink(missing_ok=True)


def card(arguments: Sequence[str]) -> None:
    """The card of a folder."""
    parser = argparse.ArgumentParser("rmt card", description="Writes README.md of a model, or brings it up to date.")
    parser.add_argument("model", type=Path, help="folder of a model with memory; words of yours in its card stay")
    parser.add_argument("--repo-id", help="where it goes on the Hub, which is asked for the card of the base model")
    for name in ("license", "base-model"):
        parser.add_argument(f"--{name}")
    for name in ("language", "datasets", "tags"):
        parser.add_argument(f"--{name}", nargs="+")
    parser.add_argument("--result", nargs=3, action="append", default=[], metavar=("DATA", "METRIC", "VALUE"))
    args = vars(parser.parse_args(arguments))
    folder, repo_id, rows = (args.pop(name) for name in ("model", "repo_id", "result"))
    from .cards import write_card

    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    results = [EvalResult("text-generation", data, data, metric, float(value)) for data, metric, value in rows]
    write_card(folder, _config(folder), repo_id, results=results, **args)
    print(folder / "README.md")


def _config(model: str | Path) -> RMTConfig:
    """The configuration of a model with memory."""
    config = AutoConfig.from_pretrained(model)
    if not isinstance(config, RMTConfig):
        raise ValueError(f"{model} has no memory ({config.model_type!r}): rmt convert SOURCE TARGET gives it one.")
    return config
