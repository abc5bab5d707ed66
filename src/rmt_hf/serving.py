"""A server of the OpenAI protocol that reads only what is new in a conversation: `python -m rmt_hf.serving MODEL`."""

import argparse
import asyncio
import inspect
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


try:
    import uvicorn
    from fastapi import FastAPI, Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, StreamingResponse
    from starlette.datastructures import Headers
    from starlette.exceptions import HTTPException
    from starlette.types import ASGIApp, Receive, Scope, Send
except ModuleNotFoundError as error:
    raise ImportError(f'rmt_hf.serving needs {error.name}: pip install "rmt_hf[serve]".', name=error.name) from error

from .protocol import ChatRequest, CompletionRequest, ProtocolError
from .sessions import Sessions
from .worker import Done, Job, Limits, Worker


POLL_SECONDS = 0.2  # between two looks at whether a client is still there


async def results(job: Job, client: Request) -> AsyncIterator[str | Done]:
    """What the worker sends for a job, which is cancelled when the client has gone."""
    try:
        while not await client.is_disconnected():
            try:
                result = await asyncio.wait_for(job.results.get(), POLL_SECONDS)
            except TimeoutError:
                continue
            if isinstance(result, Exception):
                raise result
            yield result
            if isinstance(result, Done):
                return
    finally:
        job.cancelled.set()


def as_protocol_error(error: Exception) -> ProtocolError:
    if isinstance(error, ProtocolError):
        return error
    return ProtocolError("The server failed; its log says why.", 500, "server_error")


def refused(error: Exception) -> JSONResponse:
    found = as_protocol_error(error)
    return JSONResponse(found.body(), found.status, {"Retry-After": "1"} if found.status == 429 else None)


class BodyLimit:
    """Refuses what is too large before it is read."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        length = Headers(scope=scope).get("content-length", "") if scope.get("method") == "POST" else "0"
        if length.isdigit() and int(length) <= self.limit:
            return await self.app(scope, receive, send)
        rule = f"A request must have a content-length of at most {self.limit} bytes, got {length or 'none'}."
        await refused(ProtocolError(rule, 413))(scope, receive, send)


async def events(
    body: ChatRequest | CompletionRequest,
    answer: dict[str, Any],
    first: str | Done,
    words: AsyncIterator[str | Done],
) -> AsyncIterator[str]:
    """The lines of an answer that is sent word by word; `answer` is what all of them have."""

    def event(content: dict[str, Any]) -> str:
        return f"data: {json.dumps(content)}\n\n"

    has_usage = body.stream_options is not None and body.stream_options.include_usage
    result = first
    try:
        while isinstance(result, str):
            yield event(answer | body.part(result))
            result = await anext(words)
    except StopAsyncIteration:
        return  # nobody is there to read it
    except Exception as error:
        yield event(as_protocol_error(error).body())
        return
    yield event(answer | body.part(None, result.finish_reason))
    if has_usage:
        yield event(answer | body.part(None) | {"choices": [], "usage": result.usage()})
    yield "data: [DONE]\n\n"


def make_app(worker: Worker, name: str) -> FastAPI:
    """The application that answers with a worker.

    Args:
        worker: Not yet started; it runs as long as the application.
        name: Of the model in requests.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        worker.stop()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(BodyLimit, limit=worker.limits.max_body_bytes)
    created = int(time.time())

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        return refused(ProtocolError.of(error.errors()))

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> JSONResponse:
        return refused(ProtocolError(f"{request.method} {request.url.path}: {error.detail}", error.status_code))

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "waiting": len(worker.waiting), "states": len(worker.sessions.states)}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [await model(name)]}

    @app.get("/v1/models/{model_name:path}")
    async def model(model_name: str) -> Any:
        if model_name != name:
            return refused(
                ProtocolError(f"There is no model {model_name!r}, only {name!r}.", 404, code="model_not_found")
            )
        return {"id": name, "object": "model", "created": created, "owned_by": "rmt_hf"}

    @app.post("/load_model")  # `transformers chat` begins with it
    async def load_model() -> Response:
        ready = {"status": "ready", "model": name, "cached": True}
        return Response(f"data: {json.dumps(ready)}\n\n", media_type="text/event-stream")

    async def respond(body: ChatRequest | CompletionRequest, client: Request) -> Response:
        try:
            if body.model != name:
                rule = f"model must be {name!r}, got {body.model!r}."
                raise ProtocolError(rule, 404, param="model", code="model_not_found")
            job = Job(body)
            worker.submit(job)
            words = results(job, client)
            found: list[str | Done] = []
            async for result in words:
                found.append(result)
                if body.stream:
                    break  # an error before the first word has its own status
        except Exception as error:
            return refused(error)
        if not found:
            return Response(status_code=499)  # nobody is there to read it
        answer = {"id": f"{body.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        if body.stream:
            return StreamingResponse(events(body, answer, found[0], words), media_type="text/event-stream")
        *texts, done = found
        if not isinstance(done, Done):
            return Response(status_code=499)
        return JSONResponse(answer | body.whole("".join(map(str, texts)), done.finish_reason) | {"usage": done.usage()})

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, client: Request) -> Response:
        return await respond(body, client)

    @app.post("/v1/completions")
    async def complete(body: CompletionRequest, client: Request) -> Response:
        return await respond(body, client)

    return app


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    limits, sessions = Limits(), inspect.signature(Sessions).parameters
    parser = argparse.ArgumentParser("rmt serve", description=__doc__)
    add = partial(parser.add_argument, metavar="N", type=int)
    parser.add_argument("model", help="folder or Hub id of a model with its tokenizer")
    parser.add_argument("--name", help="of the model in requests; MODEL if left out")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in: nobody is asked for a key")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sessions-dir", type=Path, help="keeps states of conversations; none are kept if left out")
    for name in ("memory_bytes", "disk_bytes"):
        help_text = f"of states that are kept {'there' if name[0] == 'd' else 'in memory'}; %(default)s if left out"
        add(f"--{name.replace('_', '-')}", default=sessions[name].default, help=help_text)
    add("--max-queue", default=limits.max_queue, help="requests that wait; others get status 429")
    add("--max-prompt-tokens", default=limits.max_prompt_tokens)
    add("--max-tokens", default=limits.max_tokens, help="of an answer")
    add("--threads", help="of the CPU; all if left out")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line.

    Args:
        arguments: Those of the process if None.
    """
    args = parse(arguments)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").to(args.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    sessions = Sessions(model, args.sessions_dir, args.memory_bytes, args.disk_bytes)
    limits = Limits(args.max_queue, args.max_prompt_tokens, args.max_tokens)
    app = make_app(Worker(model, tokenizer, sessions, limits), args.name or args.model)
    uvicorn.run(app, host=args.host, port=args.port, log_level="info", timeout_graceful_shutdown=5)


if __name__ == "__main__":
    main()
