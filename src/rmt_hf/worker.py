"""The thread that answers the requests of `rmt_hf.serving`: one after the other, from the states of conversations."""

import asyncio
import logging
import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import jinja2
import torch
from transformers import PreTrainedTokenizerBase

from .answers import Answer
from .cache_rmt import RMTCache
from .modeling_rmt import RMTForCausalLM
from .protocol import ChatRequest, CompletionRequest, ProtocolError
from .saving_rmt import reading_device
from .sessions import Sessions


logger = logging.getLogger(__name__)
READ_TOKENS = 1024  # between two looks at whether the client is still there


@dataclass(frozen=True)
class Limits:
    """What a server takes.

    Args:
        max_queue: Requests that wait, beside the one that is answered; more are refused with 429.
        max_prompt_tokens: Of a request, read before or not.
        max_tokens: Of an answer.
        default_max_tokens: Of an answer whose request does not say.
        max_body_bytes: Of a request.
    """

    max_queue: int = 32
    max_prompt_tokens: int = 1_000_000
    max_tokens: int = 8192
    default_max_tokens: int = 512
    max_body_bytes: int = 32_000_000


@dataclass(frozen=True)
class Done:
    """How an answer has ended."""

    finish_reason: str
    num_prompt: int
    num_cached: int  # of the prompt: not read again
    num_new: int

    def usage(self) -> dict[str, Any]:
        total, cached = self.num_prompt + self.num_new, {"cached_tokens": self.num_cached}
        counts = {"prompt_tokens": self.num_prompt, "completion_tokens": self.num_new, "total_tokens": total}
        return {**counts, "prompt_tokens_details": cached}


@dataclass
class Job:
    """A request on its way to the worker, and what comes back: words, and at last `Done` or an error."""

    request: ChatRequest | CompletionRequest
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    results: asyncio.Queue[str | Done | Exception] = field(default_factory=asyncio.Queue)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def send(self, result: str | Done | Exception) -> None:
        with suppress(RuntimeError):  # the server has ended
            self.loop.call_soon_threadsafe(self.results.put_nowait, result)


class Worker(threading.Thread):
    """The one thread that knows model, tokenizer and states: it answers requests one after the other."""

    def __init__(
        self, model: RMTForCausalLM, tokenizer: PreTrainedTokenizerBase, sessions: Sessions, limits: Limits
    ) -> None:
        super().__init__(daemon=True, name="rmt-worker")
        self.model, self.tokenizer, self.sessions, self.limits = model, tokenizer, sessions, limits
        self.waiting: deque[Job] = deque()
        self.changed, self.is_stopped = threading.Condition(), False

    def submit(self, job: Job) -> None:
        """ProtocolError with status 429 if too many wait."""
        with self.changed:
            self.waiting = deque(each for each in self.waiting if not each.cancelled.is_set())
            if len(self.waiting) >= self.limits.max_queue:
                got = f"{len(self.waiting)} requests wait already"
                raise ProtocolError(f"{got}: try again later.", 429, "rate_limit_error", code="queue_full")
            self.waiting.append(job)
            self.changed.notify()

    def stop(self) -> None:
        with self.changed:
            self.is_stopped = True
            self.changed.notify()
        self.join()

    def run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.is_stopped)
                if self.is_stopped:
                    return
                job = self.waiting.popleft()
            try:
                if not job.cancelled.is_set():
                    job.send(self.answer(job))
            except ProtocolError as error:
                job.send(error)
            except Exception as error:
                logger.exception("A request failed")
                job.send(error)

    def answer(self, job: Job) -> Done:
        """Reads what is new of the prompt, says what comes next, and keeps the states of both moments."""
        request, sessions = job.request, self.sessions
        ids = self.encode(request)
        settings = request.settings(self.limits.default_max_tokens)
        if settings["max_new_tokens"] > self.limits.max_tokens:
            rule = f"max_tokens must be at most {self.limits.max_tokens}, got {settings['max_new_tokens']}"
            raise ProtocolError(f"{rule}: ask for less, and then for more.", param="max_tokens")
        if request.session_id is not None:
            try:
                sessions.check_room(request.session_id)
            except ValueError as error:
                raise ProtocolError(str(error), param="session_id") from error
        state = sessions.find(ids)
        num_cached = sum(state.positions)
        self.read(job, ids[num_cached:-1], state)
        kept: dict[tuple[int, str], RMTCache] = {}
        if len(ids) > 1:  # all but the token that is asked for what comes next: so the same prompt finds it, too
            before = state.clone()
            kept[sessions.keep(ids[:-1], before)] = before
        answer = Answer(self.tokenizer, len(ids), job.send, request.stops(), lambda: self.is_gone(job))
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices, enabled=request.seed is not None):
            if request.seed is not None:
                torch.manual_seed(request.seed)
            self.model.generate(
                **self.inputs(ids),
                past_key_values=state,
                stopping_criteria=[answer],
                pad_token_id=0,  # one row has no padding
                **settings,
            )
        answer.finish()
        ends = self.model.generation_config.eos_token_id
        is_whole = answer.is_stopped or answer.ids[-1] in (ends if isinstance(ends, list) else [ends])
        num_new = len(answer.ids)
        gone = answer.forget_stop()
        if not self.is_gone(job) and gone <= state.num_croppable_columns:
            state.crop(-gone)
            kept[sessions.keep(ids + answer.ids, state)] = state
        if request.session_id is not None and not self.is_gone(job):
            sessions.save(request.session_id, kept)
        return Done("stop" if is_whole else "length", len(ids), num_cached, num_new)

    def encode(self, request: ChatRequest | CompletionRequest) -> list[int]:
        """The ids of a prompt."""
        try:
            ids = request.encode(self.tokenizer)
        except jinja2.TemplateError as error:
            raise ProtocolError(f"messages do not fit the chat template: {error}", param="messages") from error
        limit, vocabulary = self.limits.max_prompt_tokens, self.model.config.vocab_size
        if not ids or not all(0 <= token < vocabulary for token in ids):
            rule = f"{request.source} must have at least one token, each from 0 to {vocabulary - 1}."
            raise ProtocolError(rule, param=request.source)
        if len(ids) > limit:
            got = f"A prompt must have at most {limit} tokens, got {len(ids)}"
            raise ProtocolError(f"{got}: send less.", param=request.source, code="context_length_exceeded")
        return ids

    def read(self, job: Job, ids: list[int], state: RMTCache) -> None:
        for start in range(0, len(ids), READ_TOKENS):
            if self.is_gone(job):
                raise ProtocolError("The client has gone.", 499)
            self.model.memorize(self.inputs(ids[start : start + READ_TOKENS])["input_ids"], past_key_values=state)

    def inputs(self, ids: list[int]) -> dict[str, torch.Tensor]:
        input_ids = torch.tensor([ids], device=reading_device(self.model))
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}

    def is_gone(self, job: Job) -> bool:
        return job.cancelled.is_set() or self.is_stopped
