"""What a server costs that reads only what is new: one conversation with ours, and with `transformers serve`.

python -m experiments.serving SOURCE MODEL
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
from transformers import AutoTokenizer

from experiments.corpora import king_james


@contextmanager
def started(*command: str, threads: int) -> Iterator[tuple[str, Callable[[], float]]]:
    """The address of a server that is started with a free port, and ended; and what asks for its CPU seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    server = subprocess.Popen(
        [sys.executable, "-m", *command, "--port", str(port)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                if server.poll() is not None:
                    raise RuntimeError(f"The server ended with {server.returncode}: {' '.join(command)}") from None
                time.sleep(0.5)
        process = psutil.Process(server.pid)
        yield f"http://127.0.0.1:{port}/v1/chat/completions", lambda: sum(process.cpu_times()[:2])
    finally:
        server.terminate()
        server.wait()


def ask(url: str, clock: Callable[[], Any], body: dict[str, Any]) -> tuple[str, Any, Any, Any]:
    """An answer, and what the clock says before it, at its first word and at its end."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    start, first, text = clock(), None, ""
    with urllib.request.urlopen(request, timeout=600) as lines:
        for line in lines:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(event["error"])
            word = event["choices"][0]["delta"].get("content") if event.get("choices") else None
            if word:
                first = first or clock()
                text += word
    return text, start, first or clock(), clock()


def converse(
    url: str, cpu_seconds: Callable[[], float], said: list[str], tokenizer: Any, **body: Any
) -> list[tuple[float, ...]]:
    """Of each turn: tokens of the prompt; seconds, CPU seconds to the first word; tokens a second, a CPU second."""

    def clock() -> tuple[float, float]:
        return time.perf_counter(), cpu_seconds()

    body |= {"temperature": 0, "stream": True}
    messages: list[dict[str, str]] = [{"role": "user", "content": said[0][:20]}]
    ask(url, clock, {**body, "messages": messages})  # the weights are there, and have been read once
    messages, turns = [], []
    for message in said:
        messages.append({"role": "user", "content": message})
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        text, start, first, end = ask(url, clock, {**body, "messages": messages})
        messages.append({"role": "assistant", "content": text})
        waited = [now - before for now, before in zip(first, start, strict=True)]
        number = len(tokenizer.encode(text)) - 1
        rates = [number / max(now - before, 0.01) for now, before in zip(end, first, strict=True)]
        turns.append((len(tokenizer.encode(prompt)), *waited, *rates))
    return turns


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source")
    parser.add_argument("model")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--words", type=int, default=75, help="of a message")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    tokenizer, words = AutoTokenizer.from_pretrained(args.source), king_james().split()
    said = [" ".join(words[turn * args.words : (turn + 1) * args.words]) for turn in range(args.turns)]
    servers = {
        "`transformers serve`, source": (args.source, "transformers.cli.transformers", "serve"),
        "`rmt_hf.serving`": (args.model, "rmt_hf.serving", args.model),
    }
    print("| server | turn | tokens of the prompt | s to the first word | CPU s | tokens/s | tokens/CPU s |")
    print("|---|---:|---:|---:|---:|---:|---:|", flush=True)
    for name, (model, *command) in servers.items():
        with started(*command, threads=args.threads) as (url, cpu_seconds):
            turns = converse(url, cpu_seconds, said, tokenizer, model=model, max_tokens=args.new_tokens)
        for turn in sorted({1, 5, 10, 20, args.turns} & set(range(1, args.turns + 1))):
            prompt, *seconds = turns[turn - 1]
            cells = [name, str(turn), f"{prompt:,}", *(f"{number:.2f}" for number in seconds)]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
