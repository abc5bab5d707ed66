"""An answer while it is generated: its text as far as it is certain, and where a stop string ends it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation import StoppingCriteria


class Answer(StoppingCriteria):
    """A stopping criterion of `generate` for one row, which hands its text on, word by word.

    Args:
        tokenizer: Of the model. Special tokens are no text.
        num_prompt_tokens: Given to `generate` before the answer.
        emit: Called with each part of the text, as soon as no stop string can begin in it.
        stop: Strings that end the answer; they do not belong to its text.
        is_cancelled: Asked after every token; the answer ends there if true.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        num_prompt_tokens: int,
        emit: Callable[[str], object] = lambda text: None,
        stop: Sequence[str] = (),
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        if not all(stop):
            raise ValueError(f"stop must have strings of at least one character, got {list(stop)}: leave '' out.")
        self.tokenizer, self.num_prompt_tokens, self.emit = tokenizer, num_prompt_tokens, emit
        self.stop, self.is_cancelled = tuple(stop), is_cancelled
        self.ids: list[int] = []
        self.text, self.is_stopped = "", False  # whether by a stop string
        self._first = self._read = self._emitted = 0  # ids decoded again for the blanks between words; characters

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Takes the newest tokens of `input_ids`, (1, T); returns whether they are the last, (1,) bool."""
        self.ids += input_ids[0, self.num_prompt_tokens + len(self.ids) :].tolist()
        self._take()
        return torch.full((1,), self.is_stopped or self.is_cancelled(), device=input_ids.device)

    def finish(self) -> None:
        """Hands on what was held back, after the last token."""
        self._take(is_last=True)

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _take(self, is_last: bool = False) -> None:
        if self.is_stopped:
            return
        text = self._decode(self.ids[self._first :])
        new = text[len(self._decode(self.ids[self._first : self._read])) :]  # nothing of a special token
        if new and (is_last or not text.endswith("\ufffd")):  # which is a character that several tokens make
            self.text += new
            self._first, self._read = self._read, len(self.ids)
        found = [at for at in (self.text.find(word, self._emitted) for word in self.stop) if at >= 0]
        if found:
            self.text, self.is_stopped = self.text[: min(found)], True
        end = len(self.text)
        if not (self.is_stopped or is_last):
            end -= max((self._begun(word) for word in self.stop), default=0)
        if end > self._emitted:
            self.emit(self.text[self._emitted : end])
            self._emitted = end

    def _begun(self, word: str) -> int:
        """With how many characters of a stop string the text ends."""
        return next((size for size in range(len(word) - 1, 0, -1) if self.text.endswith(word[:size])), 0)

    def forget_stop(self) -> int:
        """Removes the last `ids`, from the one on in which the stop string begins; returns how many they are."""
        kept = number = len(self.ids)
        while self.is_stopped and kept and not self.text.startswith(self._decode(self.ids[:kept])):
            kept -= 1
        del self.ids[kept:]
        return number - kept
