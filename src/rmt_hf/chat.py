"""A chat of any length at constant cost: each turn reads only the new message, from the state of the chat."""

import json
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedTokenizerBase, TextStreamer, pipeline

from .cache_rmt import RMTCache
from .files import write_whole
from .modeling_rmt import RMTForCausalLM


ANSWER = "\N{OBJECT REPLACEMENT CHARACTER}"  # stands for an answer in a template
RECORD_NAME = "chat.json"


class Chat:
    """A chat through transformers' text-generation pipeline, with one state for all turns.

    Args:
        model (`RMTForCausalLM`): New, trained or converted.
        tokenizer: With a chat template.
        settings: Arguments of `generate`, for example `max_new_tokens` and `do_sample`.

    Raises:
        ValueError: If the tokenizer has no chat template, or one that changes answers, or `num_beams` or
            `num_return_sequences` is above 1.

    Source: ours.
    """

    def __init__(self, model: RMTForCausalLM, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> None:
        if tokenizer.chat_template is None:
            raise ValueError("tokenizer must have a chat_template, got None: set tokenizer.chat_template first.")
        for name in ("num_beams", "num_return_sequences"):
            number = settings.get(name, getattr(model.generation_config, name, None)) or 1
            if number > 1:
                raise ValueError(f"{name} must be 1, got {number}: a chat has one state.")
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.pipeline: Any = cast(Any, pipeline)("text-generation", model=model, tokenizer=tokenizer)
        self.state = RMTCache(model.config)
        self.end = ""  # end token of the last answer as text; empty if the answer was cut off

    def say(self, message: str, streams: bool = False) -> str:
        """Returns the answer of the model. An interrupted answer leaves the chat unchanged.

        Args:
            message: Of the user.
            streams: Whether to print the answer word by word (`TextStreamer`).
        """
        prompt = self._turn(message)
        length = len(self.tokenizer.encode(prompt, add_special_tokens=False))
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True) if streams else None
        state = self.state.clone()
        state.begin_prompt()  # all of the prompt is new
        found = self.pipeline(
            prompt,
            add_special_tokens=False,
            return_tensors=True,
            past_key_values=state,
            streamer=streamer,
            **self.settings,
        )
        answer = found[0]["generated_token_ids"][length:]
        self.state, self.end = state, self._text(answer[-1:]) if answer[-1] in self._ends() else ""
        return self._text(answer, skip_special_tokens=True)

    def _turn(self, message: str) -> str:
        """The text of a turn by the template; after the first turn only what follows the last answer."""
        new = {"role": "user", "content": message}
        if not self.state.is_initialized:
            return self._render([new])
        before = [{"role": "user", "content": ""}, {"role": "assistant", "content": ANSWER}]
        _, answer, rest = self._render([*before, new]).partition(ANSWER)
        if not answer:
            raise ValueError("chat_template must show answers as they are: this one omits or changes them.")
        begun = rest.lstrip()
        return begun.removeprefix(self.end) if self.end and begun.startswith(self.end) else rest

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
        """Goes on with a chat that was saved, also by another process.

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
        self.state, self.end = state, record["end"]
