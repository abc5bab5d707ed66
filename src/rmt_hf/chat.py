"""A chat of any length at constant cost: each turn reads only the new message, from the state of the chat."""

import json
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .answers import Answer
from .cache_rmt import RMTCache
from .files import write_whole
from .modeling_rmt import RMTForCausalLM
from .saving_rmt import reading_device


ANSWER = "\N{OBJECT REPLACEMENT CHARACTER}"  # stands for an answer in a template
RECORD_NAME = "chat.json"
PROMPT_TOKENS = 4096  # what is before the last of a message is read in calls of bounded size


@dataclass(frozen=True)
class Moment:
    """Where a chat stands between two turns. Its state is never changed, only copied."""

    state: RMTCache
    end: str = ""  # end token of the last answer as text; empty if the answer was cut off
    message: str = ""  # that the last answer is an answer to


class Chat:
    """A chat with one state for all turns.

    Args:
        model (`RMTForCausalLM`): New, trained or converted.
        tokenizer: With a chat template.
        system: What the model is told before the first message; nothing, or what the template says, if None.
        stop: Strings that end an answer. They are neither in it nor in the state.
        num_undo: How many turns can be undone; each keeps a state.
        settings: Arguments of `generate`, for example `max_new_tokens` (256 if left out) and `do_sample`.

    Raises:
        ValueError: If the tokenizer has no chat template, or one that changes answers, or `num_beams` or
            `num_return_sequences` is above 1.

    Source: ours.
    """

    def __init__(
        self,
        model: RMTForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        system: str | None = None,
        stop: Sequence[str] = (),
        num_undo: int = 1,
        **settings: Any,
    ) -> None:
        if tokenizer.chat_template is None:
            raise ValueError("tokenizer must have a chat_template, got None: set tokenizer.chat_template first.")
        for name in ("num_beams", "num_return_sequences"):
            number = settings.get(name, getattr(model.generation_config, name, None)) or 1
            if number > 1:
                raise ValueError(f"{name} must be 1, got {number}: a chat has one state.")
        self.model, self.tokenizer, self.system, self.stop = model, tokenizer, system, tuple(stop)
        self.settings = {"max_new_tokens": 256, "pad_token_id": 0} | settings  # one row has no padding
        self.moment = Moment(RMTCache(model.config))
        self.before: deque[Moment] = deque(maxlen=num_undo)

    @property
    def state(self) -> RMTCache:
        """What the model remembers of the chat; not to be changed."""
        return self.moment.state

    @property
    def end(self) -> str:
        """The end token of the last answer as text; empty if the answer was cut off."""
        return self.moment.end

    def say(self, message: str, streams: bool = False) -> str:
        """Returns the answer of the model. An interrupted answer leaves the chat unchanged.

        Args:
            message: Of the user.
            streams: Whether to print the answer word by word.
        """
        found = self._answer(self.moment, message, partial(print, end="", flush=True) if streams else lambda text: None)
        if streams:
            print(flush=True)
        return self._commit(found, [self.moment])

    def stream(self, message: str) -> Iterator[str]:
        """The answer of the model, word by word. One that is not read to its end leaves the chat unchanged.

        Args:
            message: Of the user.
        """
        yield from self._stream(self.moment, message, [self.moment])

    def regenerate(self) -> Iterator[str]:
        """Another answer to the last message, word by word, in place of the one that was given.

        RuntimeError as for `undo`; an answer that is not read to its end leaves the chat unchanged.
        """
        yield from self._stream(self._last(), self.moment.message, [])

    def undo(self) -> str:
        """Takes the last message and its answer out of the chat; returns the message.

        RuntimeError if the last `num_undo` turns are undone, or none was made since the chat began or was loaded.
        """
        message, self.moment = self.moment.message, self._last()
        self.before.pop()
        return message

    def _last(self) -> Moment:
        if not self.before:
            kept = f"{self.before.maxlen} turns are kept, those since the chat began or was loaded"
            raise RuntimeError(f"There is no turn to undo: {kept}. Make the chat with a larger num_undo.")
        return self.before[-1]

    def _commit(self, found: tuple[Moment, str], before: list[Moment]) -> str:
        self.moment, answer = found
        self.before.extend(before)
        return answer

    def _stream(self, start: Moment, message: str, before: list[Moment]) -> Iterator[str]:
        """Generates in a thread, so that the reader has the words when they are there."""
        words: queue.Queue[str | tuple[Moment, str] | BaseException] = queue.Queue()
        gone = threading.Event()

        def run() -> None:
            try:
                words.put(self._answer(start, message, words.put, gone.is_set))
            except BaseException as error:  # raised where the words are read
                words.put(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            while isinstance(word := words.get(), str):
                yield word
        finally:  # also if nobody reads on
            gone.set()
            thread.join()
        if isinstance(word, BaseException):
            raise word
        self._commit(word, before)

    @torch.no_grad()
    def _answer(
        self, start: Moment, message: str, emit: Callable[[str], object], is_gone: Callable[[], bool] = bool
    ) -> tuple[Moment, str]:
        """The moment after an answer, and the answer."""
        prompt = self.tokenizer.encode(self._turn(start, message), add_special_tokens=False)
        ids = self._ids(prompt[-PROMPT_TOKENS:])
        answer = Answer(self.tokenizer, ids.shape[1], emit, self.stop, is_gone)
        state = start.state.clone()
        self._read(prompt[:-PROMPT_TOKENS], state)
        state.begin_prompt()  # all of the prompt is new
        mask = torch.ones_like(ids)
        self.model.generate(
            ids, attention_mask=mask, past_key_values=state, stopping_criteria=[answer], **self.settings
        )
        answer.finish()
        end = self._text(answer.ids[-1:]) if answer.ids[-1] in self._ends() and not answer.is_stopped else ""
        if (gone := answer.forget_stop()) <= state.num_croppable_columns:
            state.crop(-gone)
        else:
            state = start.state.clone()
            self._read(prompt + answer.ids, state)
        rest = answer.text.removeprefix(self._text(answer.ids, skip_special_tokens=True)) if answer.is_stopped else ""
        self._read(self.tokenizer.encode(rest, add_special_tokens=False), state)
        return Moment(state, end, message), answer.text

    def _read(self, ids: list[int], state: RMTCache) -> None:
        if ids:
            self.model.memorize(self._ids(ids), past_key_values=state)

    def _ids(self, ids: list[int]) -> torch.Tensor:
        return torch.tensor([ids], device=reading_device(self.model))

    def _turn(self, start: Moment, message: str) -> str:
        """The text of a turn by the template; after the first turn only what follows the last answer."""
        new = {"role": "user", "content": message}
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        if not start.state.is_initialized:
            return self._render([*system, new])
        system = [{**each, "content": ""} for each in system]  # it was read
        before = [*system, {"role": "user", "content": ""}, {"role": "assistant", "content": ANSWER}]
        _, answer, rest = self._render([*before, new]).partition(ANSWER)
        if not answer:
            raise ValueError("chat_template must show answers as they are: this one omits or changes them.")
        begun = rest.lstrip()
        return begun.removeprefix(start.end) if start.end and begun.startswith(start.end) else rest

    def _render(self, messages: list[dict[str, str]]) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def _text(self, ids: list[int], **settings: Any) -> str:
        return str(self.tokenizer.decode(ids, **settings))

    def _ends(self) -> list[int]:
        """Ids that end an answer."""
        ends = self.settings.get("eos_token_id", getattr(self.model.generation_config, "eos_token_id", None))
        ends = self.tokenizer.eos_token_id if ends is None else ends
        return [] if ends is None else ends if isinstance(ends, list) else [ends]

    def save(self, folder: str | Path) -> None:
        """Writes the chat, whose size does not depend on its length.

        Args:
            folder: Where to; made if it does not exist. Other files in it stay.
        """
        self.state.save_pretrained(folder)
        text = json.dumps({"end": self.end, "positions": self.state.positions})
        write_whole(Path(folder) / RECORD_NAME, lambda path: path.write_text(text, "utf-8"))

    def load(self, folder: str | Path) -> None:
        """Goes on with a chat that was saved, also by another process. Turns of before cannot be undone.

        Args:
            folder: Written by `save`.

        Raises:
            ValueError: As `RMTCache.from_pretrained`, for example for another model; or if saving was interrupted.
        """
        state = RMTCache.from_pretrained(folder, self.model)
        record = json.loads((Path(folder) / RECORD_NAME).read_text("utf-8"))
        if record["positions"] != state.positions:
            raise ValueError(
                f"The state in {folder} must have read {record['positions']} tokens, as {RECORD_NAME} says, got "
                f"{state.positions}: saving was interrupted. Begin a new chat, or go on with the state alone."
            )
        self.moment = Moment(state, record["end"])
        self.before.clear()
