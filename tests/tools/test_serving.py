"""The server of the OpenAI protocol: real servers on loopback, asked by the `openai` client and by plain HTTP."""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from helpers import ROOT, TEMPLATE, tiny_ids, tiny_model, tiny_tokenizer
from rmt_hf.sessions import Sessions


openai = pytest.importorskip("openai", reason="the openai client is not installed")
uvicorn = pytest.importorskip("uvicorn", reason="the extra serve is not installed")
pytest.importorskip("fastapi", reason="the extra serve is not installed")
from rmt_hf.serving import make_app  # noqa: E402  # which need the extra
from rmt_hf.worker import Limits, Worker  # noqa: E402


LIMITS = Limits(max_queue=16, max_prompt_tokens=200, max_tokens=1000, default_max_tokens=5, max_body_bytes=20_000)


@dataclass
class Served:
    """A server in a thread of this process."""

    worker: Worker
    url: str
    read: list[int]  # tokens of each call of the model
    client: Any = None  # of `openai`

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, dict[str, Any]]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json", **headers})
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def expected(self, ids: list[int], number: int = 5) -> list[int]:
        """What the model says after ids that are read at once."""
        return self.worker.model.generate(torch.tensor([ids]), max_new_tokens=number, do_sample=False)[0].tolist()


@contextmanager
def serving(folder: Any = None, limits: Limits = LIMITS, **sizes: int) -> Iterator[Served]:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    model.generation_config.eos_token_id = 2
    model.generation_config.suppress_tokens = [0, 1]  # which no text shows, so that they would be read anew
    worker = Worker(model, tokenizer, Sessions(model, folder, **sizes), limits)
    config = uvicorn.Config(make_app(worker, "tiny"), host="127.0.0.1", port=0, log_level="error", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    read: list[int] = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, given: read.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300) as client:
            yield Served(worker, url, read, client)
    finally:
        hook.remove()
        server.should_exit = True
        thread.join()


@pytest.fixture
def served() -> Iterator[Served]:
    with serving() as found:
        yield found


def words(length: int, seed: int) -> str:
    return " ".join(f"w{number}" for number in tiny_ids(1, length, seed=seed)[0].tolist())


def talk(served: Served, messages: list[dict[str, str]], **settings: Any) -> Any:
    """An answer of a chat, which is put into the messages."""
    settings = {"model": "tiny", "messages": messages, "temperature": 0, **settings}
    answer = served.client.chat.completions.create(**settings)
    messages.append({"role": "assistant", "content": answer.choices[0].message.content})
    return answer


def ids_of(served: Served, messages: list[dict[str, str]]) -> list[int]:
    tokenizer = served.worker.tokenizer
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


# Only what is new is read


def test_a_turn_reads_what_is_new_and_says_what_all_of_it_would_give(served: Served) -> None:
    messages: list[dict[str, str]] = []
    before = 0
    for turn in range(6):
        messages.append({"role": "user", "content": words(9, turn)})
        ids = ids_of(served, messages)
        served.read.clear()
        answer = talk(served, messages)
        assert sum(served.read) == len(ids) - before + answer.usage.completion_tokens
        assert answer.usage.prompt_tokens == len(ids)
        assert answer.usage.prompt_tokens_details.cached_tokens == before
        found = served.expected(ids)
        assert messages[-1]["content"] == served.worker.tokenizer.decode(found[len(ids) :], skip_special_tokens=True)
        assert answer.choices[0].finish_reason == ("stop" if found[-1] == 2 else "length")
        before = len(found)
    assert before > 4 * served.worker.model.config.window_length


def test_the_same_prompt_and_another_turn_are_read_from_the_end_of_the_prompt(served: Served) -> None:
    messages = [{"role": "user", "content": words(30, 1)}]
    ids = ids_of(served, messages)
    first = talk(served, list(messages))
    again = talk(served, list(messages))
    assert again.usage.prompt_tokens_details.cached_tokens == len(ids) - 1
    assert again.choices[0].message.content == first.choices[0].message.content
    other = [*messages, {"role": "assistant", "content": "w9 w8"}, {"role": "user", "content": "w7"}]
    answer = talk(served, other)  # an answer that the model has not given, as if the tokenizer had cut it otherwise
    assert answer.usage.prompt_tokens_details.cached_tokens == len(ids) - 1
    ids = ids_of(served, other[:-1])
    assert answer.choices[0].message.content == served.worker.tokenizer.decode(
        served.expected(ids)[len(ids) :], skip_special_tokens=True
    )


def test_words_come_one_by_one_with_the_usage(served: Served) -> None:
    messages = [{"role": "user", "content": words(9, 3)}]
    whole = talk(served, list(messages), max_tokens=9)
    stream = served.client.chat.completions.create(
        model="tiny",
        messages=messages,
        temperature=0,
        max_tokens=9,
        stream=True,
        stream_options={"include_usage": True},
    )
    *parts, end, usage = list(stream)
    assert len(parts) == whole.usage.completion_tokens - (whole.choices[0].finish_reason == "stop")
    assert "".join(part.choices[0].delta.content for part in parts) == whole.choices[0].message.content
    assert parts[0].choices[0].delta.role == "assistant" and len({part.id for part in parts}) == 1
    assert end.choices[0].finish_reason == whole.choices[0].finish_reason
    assert not usage.choices and usage.usage.total_tokens == whole.usage.total_tokens


def test_completions_models_and_health(served: Served) -> None:
    client, ids = served.client, tiny_ids(1, 40, seed=4)[0].tolist()
    expected = served.worker.tokenizer.decode(served.expected(ids, 7)[40:], skip_special_tokens=True)
    for prompt in (words(40, 4), ids):
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=7, temperature=0)
        assert answer.choices[0].text == expected
    assert answer.usage.prompt_tokens_details.cached_tokens == 39
    parts = client.completions.create(model="tiny", prompt=ids, max_tokens=7, temperature=0, stream=True)
    assert "".join(part.choices[0].text for part in parts) == expected
    assert [model.id for model in client.models.list()] == [client.models.retrieve("tiny").id] == ["tiny"]
    with urllib.request.urlopen(served.url + "/health", timeout=300) as answer:
        assert json.load(answer)["status"] == "ok"


def test_a_stop_string_ends_an_answer_and_is_not_in_its_state(served: Served) -> None:
    messages = [{"role": "user", "content": words(9, 5)}]
    answer = talk(served, list(messages), max_tokens=9).choices[0].message.content.split()
    stop = " ".join(["", *answer[4:6]])
    for stream in (False, True):
        result = served.client.chat.completions.create(
            model="tiny", messages=messages, temperature=0, max_tokens=9, stop=["w3 w3 w3", stop], stream=stream
        )
        found = [result] if not stream else list(result)
        texts = [each.choices[0].delta.content or "" if stream else each.choices[0].message.content for each in found]
        assert "".join(texts).split() == answer[:4]
        assert found[-1].choices[0].finish_reason == "stop"
    messages += [{"role": "assistant", "content": " ".join(answer[:4])}, {"role": "user", "content": "w9"}]
    number = len(ids_of(served, messages[:1])) + 4
    assert talk(served, messages).usage.prompt_tokens_details.cached_tokens == number


def test_a_seed_settles_what_is_drawn(served: Served) -> None:
    def draw(**settings: Any) -> str:
        messages = [{"role": "user", "content": "w5 w6"}]
        return talk(served, messages, **{"max_tokens": 20, "temperature": 1.5, **settings}).choices[0].message.content

    torch.manual_seed(0)
    assert draw(seed=1) == draw(seed=1) != draw(seed=2)
    assert draw() != draw()
    assert draw(top_p=1e-9, seed=1) == draw(temperature=0)


# What is refused

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "w5"}]
REFUSED = [
    (CHAT, {"n": 2}, "n is not supported, got 2", None),
    (CHAT, {"tools": [{}]}, "tools", None),
    (CHAT, {"logprobs": True}, "logprobs", None),
    (CHAT, {"messages": []}, "messages", "messages"),
    (CHAT, {"messages": [{"role": "cook", "content": "w5"}]}, "role", "messages.0.role"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "text", None),
    (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, "content", None),
    (CHAT, {"temperature": -1}, "greater than", "temperature"),
    (CHAT, {"temperature": float("nan")}, "finite", "temperature"),
    (CHAT, {"top_p": 0}, "greater than", "top_p"),
    (CHAT, {"max_tokens": 0}, "greater than", "max_tokens"),
    (CHAT, {"max_completion_tokens": 1001}, "at most 1000, got 1001", "max_tokens"),
    (CHAT, {"stop": ["a", "b", "c", "d", "e"]}, "at most 4", None),
    (CHAT, {"stop": [""]}, "at least 1", None),
    (CHAT, {"session_id": "kept"}, "folder", "session_id"),
    (CHAT, {"generation_config": '{"num_beams": 2}'}, "num_beams", None),
    (CHAT, {"messages": [{"role": "user", "content": words(300, 0)}]}, "at most 200 tokens, got 305", "messages"),
    (TEXT, {"prompt": ""}, "at least one token", "prompt"),
    (TEXT, {"prompt": [5, 67]}, "from 0 to 66", "prompt"),
    (TEXT, {"prompt": ["w5", "w6"]}, "prompt", None),
    (TEXT, {"prompt": None}, "prompt", None),
    (TEXT, {"echo": True}, "echo", None),
]


def test_what_is_malformed_is_refused_in_the_words_of_the_protocol(served: Served) -> None:
    for path, fields, message, param in REFUSED:
        body = {"model": "tiny", **({"messages": HELLO} if path == CHAT else {"prompt": "w5"}), **fields}
        status, answer = served.post(path, body)
        error = answer["error"]
        assert status == 400 and error["type"] == "invalid_request_error", (fields, answer)
        assert message in error["message"] and param in (None, error["param"]), (fields, answer)
        assert ("context" in (error["code"] or "")) == ("tokens, got" in message)
    for status, path, body in (
        (400, CHAT, b"{"),
        (400, CHAT, b"\xff"),
        (400, CHAT, []),
        (400, CHAT, {"messages": HELLO}),
        (404, CHAT, {"model": "other", "messages": HELLO}),
        (404, "/v1/nothing", {}),
        (405, "/health", {}),
        (413, CHAT, b" " * 20_001),
    ):
        got, answer = served.post(path, body)
        assert got == status and answer["error"]["message"], (body, answer)
    with pytest.raises(openai.NotFoundError, match="only 'tiny'"):
        served.client.models.retrieve("other")
    served.worker.tokenizer.chat_template = "{{ raise_exception('no system') }}"
    assert "no system" in served.post(CHAT, {"model": "tiny", "messages": HELLO})[1]["error"]["message"]
    served.worker.tokenizer.chat_template = None
    assert "chat template" in served.post(CHAT, {"model": "tiny", "messages": HELLO})[1]["error"]["message"]
    assert not served.worker.sessions.states


def test_a_failure_is_told_and_changes_no_state(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = [{"role": "user", "content": words(20, 1)}]
    talk(served, messages)
    messages.append({"role": "user", "content": words(20, 2)})
    forward, calls = served.worker.model.forward, []

    @functools.wraps(forward)
    def fail(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("secret")
        return forward(*args, **kwargs)

    for stream in (False, True):
        calls.clear()
        monkeypatch.setattr(served.worker.model, "forward", fail)
        body = {"model": "tiny", "messages": messages, "stream": stream, "temperature": 0}
        with pytest.raises(openai.APIError, match="server failed") as error:
            list(served.client.chat.completions.create(**body))
        assert "secret" not in str(error.value)
        monkeypatch.undo()
    ids = ids_of(served, messages)
    answer = talk(served, messages)
    assert answer.usage.prompt_tokens_details.cached_tokens == len(ids) - 1  # the prompt was read well
    assert messages[-1]["content"] == served.worker.tokenizer.decode(
        served.expected(ids)[len(ids) :], skip_special_tokens=True
    )


# Many clients


def test_sixteen_clients_at_once_have_sixteen_conversations(served: Served) -> None:
    def converse(number: int) -> list[str]:
        messages: list[dict[str, str]] = []
        for turn in range(2):
            messages.append({"role": "user", "content": words(8, 10 * number + turn)})
            talk(served, messages, max_tokens=3)
        return [message["content"] for message in messages[1::2]]

    with ThreadPoolExecutor(16) as threads:
        together = list(threads.map(converse, range(16)))
    served.worker.sessions.states.clear()
    assert together[3:5] == [converse(number) for number in (3, 4)]
    assert len({tuple(each) for each in together}) == 16


def hold(served: Served) -> threading.Event:
    """Lets the worker wait in its next calls of the model until the event is set."""
    let_go = threading.Event()
    served.worker.model.model.register_forward_pre_hook(lambda *args: let_go.wait(300) and None)
    return let_go


def wait_for(condition: Any, seconds: float = 100) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


def test_a_full_queue_says_so_and_is_free_again(served: Served) -> None:
    let_go = hold(served)

    def ask(number: int) -> int:
        return served.post(TEXT, {"model": "tiny", "prompt": [5, 3 + number], "max_tokens": 1})[0]

    with ThreadPoolExecutor(24) as threads:
        running = threads.submit(ask, 0)
        wait_for(lambda: not served.worker.waiting and served.read)
        others = [threads.submit(ask, number) for number in range(1, 17)]
        wait_for(lambda: len(served.worker.waiting) == 16)
        with pytest.raises(openai.RateLimitError, match="16 requests wait") as error:
            served.client.completions.create(model="tiny", prompt="w5")
        assert error.value.response.headers["retry-after"] == "1"
        let_go.set()
        assert {each.result() for each in [running, *others]} == {200}
    assert ask(60) == 200


def connect(served: Served, body: dict[str, Any]) -> socket.socket:
    """A request whose connection is ours to cut."""
    connection = socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])))
    data = json.dumps({"model": "tiny", "prompt": words(9, 1), **body}).encode()
    head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_nobody_waits_for_is_not_finished(served: Served, stream: bool) -> None:
    served.worker.model.generation_config.eos_token_id = None
    with connect(served, {"stream": stream, "max_tokens": 1000}) as connection:
        wait_for(lambda: len(served.read) > 5)
        if stream:
            assert connection.recv(100)
    kept = len(served.worker.sessions.states)
    assert served.post(TEXT, {"model": "tiny", "prompt": "w5", "max_tokens": 1})[0] == 200  # after the other
    assert len(served.read) < 900 and kept == 1


def test_who_has_gone_leaves_the_queue(served: Served) -> None:
    let_go = hold(served)
    with connect(served, {}):
        wait_for(lambda: served.read and not served.worker.waiting)  # two at once might come in either order
        with connect(served, {"prompt": "w7"}):
            wait_for(lambda: len(served.worker.waiting) == 1)
            job = served.worker.waiting[0]
        wait_for(job.cancelled.is_set)
        let_go.set()
    assert served.post(TEXT, {"model": "tiny", "prompt": "w5", "max_tokens": 1})[0] == 200
    assert all(length != 1 for length, _ in list(served.worker.sessions.states)[:1]) and not served.worker.waiting


# States on the disk


def test_states_move_to_the_disk_and_come_back(tmp_path: Any) -> None:
    model = tiny_model()
    tiny_state = model.memorize(tiny_ids(1, 20))
    tiny_state.save_pretrained(tmp_path / "probe")
    limits = {
        "memory_bytes": 2 * tiny_state.nbytes,
        "disk_bytes": 5 * sum(file.stat().st_size for file in (tmp_path / "probe").iterdir()) + 1000,
    }
    tmp_path /= "sessions"
    sessions = Sessions(model, tmp_path, **limits)
    texts = [tiny_ids(1, 20 + number, seed=number)[0].tolist() for number in range(9)]

    def read(ids: list[int]) -> Any:
        state = model.memorize(torch.tensor([ids]))
        sessions.keep(ids, state)
        return state

    states = [read(ids) for ids in texts]
    kept = [any(length == len(ids) for length, _ in sessions.states) for ids in texts]
    assert kept == [False] * 2 + [True] * 7  # two in memory, and five on the disk: six have no room
    for number in (2, 8):
        found = sessions.find([*texts[number], 5])
        assert found.positions == [20 + number]
        assert all(map(torch.equal, found.tensors(), states[number].tensors()))
        model.memorize(torch.tensor([[5, 6]]), past_key_values=found)  # a copy: what is kept does not change
        assert sessions.find([*texts[number], 7]).positions == [20 + number]
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= limits["disk_bytes"]
    assert sum(kept.state is not None for kept in sessions.states.values()) <= 2
    for nothing in (texts[0], [9, *texts[8]], texts[8][:-1], texts[8], []):
        assert not sessions.find(nothing).is_initialized
    again = Sessions(model, tmp_path, **limits)
    assert again.find([*texts[2], 5]).positions == [22]
    assert not Sessions(tiny_model(seed=1), tmp_path).states
    for file in tmp_path.rglob("*.safetensors"):
        file.write_bytes(b"damaged")
    assert not Sessions(model, tmp_path).find([*texts[3], 5]).is_initialized


def test_a_named_session_is_never_dropped(tmp_path: Any) -> None:
    model = tiny_model()
    size = Sessions(model).state_bytes
    sessions = Sessions(model, tmp_path, memory_bytes=0, disk_bytes=4 * size + 40_000)
    for number in range(8):
        ids = tiny_ids(1, 20 + number, seed=number)[0].tolist()
        state = model.memorize(torch.tensor([ids]))
        key = sessions.keep(ids, state)
        if number in (1, 3):
            sessions.save("mine", {key: state})
    again = Sessions(model, tmp_path, disk_bytes=4 * size + 40_000)
    assert [length for length, _ in again.names["mine"]] == [23] and (23, key[1]) != key
    assert again.find([*tiny_ids(1, 23, seed=3)[0].tolist(), 5]).positions == [23]
    again.check_room("other")
    with pytest.raises(ValueError, match="larger limit"):
        again.check_room("other", 20)
    for name in ("", "../up", "a" * 65, ".hidden"):
        with pytest.raises(ValueError, match="name like"):
            again.save(name, {})


def test_a_session_comes_back_after_a_restart(tmp_path: Any) -> None:
    messages, others = [{"role": "user", "content": words(9, 1)}], [{"role": "user", "content": words(9, 2)}]
    with serving(tmp_path) as served:
        talk(served, messages, extra_body={"session_id": "mine"})
        talk(served, others)
        ids = ids_of(served, messages)[:-3]  # without the end of the turn and what an answer begins with
    for each, is_kept in ((messages, True), (others, False)):
        each.append({"role": "user", "content": "w9"})
        with serving(tmp_path) as served:
            cached = talk(served, list(each)).usage.prompt_tokens_details.cached_tokens
            assert cached == is_kept * len(ids)
            status, answer = served.post(CHAT, {"model": "tiny", "messages": HELLO, "session_id": "../up"})
            assert status == 400 and answer["error"]["param"] == "session_id"


def test_a_killed_server_has_lost_no_saved_session(tmp_path: Any) -> None:
    """It is killed in the middle of requests that each save a session."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "rmt_hf.serving", str(tmp_path / "model"), "--port", str(port)]
    command += ["--sessions-dir", str(tmp_path / "sessions"), "--threads", "1", "--name", "tiny"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{os.environ.get('PYTHONPATH', '')}"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stderr:
            if "running on" in line:
                assert f"http://127.0.0.1:{port}" in line
                break
        served = Served(None, f"http://127.0.0.1:{port}", [])  # type: ignore[arg-type]
        ids, saved = tiny_ids(1, 30, seed=1)[0].tolist(), 0
        killer = threading.Timer(0.05, process.send_signal, [signal.SIGKILL])
        for seed in range(1000):
            if seed == 5:
                killer.start()
            body = {"model": "tiny", "prompt": ids, "max_tokens": 1, "temperature": 0, "session_id": "mine"}
            try:
                answer = served.post(TEXT, body)[1]
            except (OSError, ValueError):
                break
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == saved
            saved = len(ids)  # the answer is one token more, which the next prompt does not have
            ids += tiny_ids(1, 3, seed=seed)[0].tolist()
            saved -= 1
        killer.join()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
    assert saved >= 40
    sessions = Sessions(type(model).from_pretrained(tmp_path / "model"), tmp_path / "sessions")
    assert len(sessions.names["mine"]) == 2 and sessions.find(ids).positions >= [saved]


# Other people's programs


def test_transformers_chat_talks_to_it(served: Served, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    chat = pytest.importorskip("transformers.cli.chat", reason="rich is not installed").Chat
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # or its client refuses loopback, too
    served.worker.model.generation_config.eos_token_id = None  # so that it asks whether to go on
    said = iter(["w5 w6 w7", "n", "w8", "n", "!exit"])
    monkeypatch.setattr("builtins.input", lambda *args: next(said))
    chat("tiny", f"{served.url}/v1", ["max_new_tokens=4", "do_sample=False"])
    assert "w" in capsys.readouterr().out
    assert len(served.worker.sessions.states) == 4 and max(served.read) < 20
