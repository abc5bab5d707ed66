"""Requests, answers and errors of the OpenAI protocol, as far as `rmt_hf.serving` speaks it."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Json, model_validator
from transformers import PreTrainedTokenizerBase


# What changes an answer and is not there, with the values that change nothing.
NOT_THERE: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "tools": ([],),
    "functions": ([],),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "echo": (False,),
    "suffix": ("",),
}


class ProtocolError(Exception):
    """An error that a client is told.

    Args:
        message: What rule was broken, and what to do.
        status: Of HTTP.
        kind: In the words of the protocol.
        param: The field.
        code: For programs, if there is one.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.kind, self.param, self.code = message, status, kind, param, code

    def body(self) -> dict[str, Any]:
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    @classmethod
    def of(cls, errors: Sequence[Any]) -> "ProtocolError":
        """Of what pydantic has found, the first that is named most closely."""
        error = max(errors, key=lambda error: len(error["loc"]))
        param = ".".join(str(each) for each in error["loc"] if each != "body")
        message = error["msg"].removeprefix("Value error, ")
        return cls(f"{param}: {message}" if param else message, param=param or None)


def check_characters(text: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("a text must have whole characters, got half of a surrogate pair.")
    return text


Text = Annotated[str, AfterValidator(check_characters)]
StopString = Annotated[Text, Field(min_length=1)]


class Part(BaseModel):
    """Of the content of a message."""

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """Of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]

    def as_dict(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(BaseModel):
    """Of an answer that is sent word by word."""

    include_usage: bool = False


class GenerationSettings(BaseModel):
    """`GenerationConfig` as far as `transformers chat` sends it."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    max_new_tokens: int | None = Field(None, ge=1)
    do_sample: bool | None = None
    temperature: float | None = Field(None, ge=0.01)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    transformers_version: str | None = Field(None, exclude=True)


class GenerationRequest(BaseModel):
    """What both kinds of requests have. `session_id` is ours."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)
    prefix: ClassVar[str]
    source: ClassVar[str]

    model: str
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: StopString | list[StopString] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    session_id: str | None = None
    generation_config: Json[GenerationSettings] | None = None

    @model_validator(mode="after")
    def refuse_what_is_not_there(self) -> "GenerationRequest":
        for name, value in (self.model_extra or {}).items():
            if value is not None and name in NOT_THERE and value not in NOT_THERE[name]:
                raise ValueError(f"{name} is not supported, got {value!r}: leave it out.")
        if len(self.stops()) > 4:
            raise ValueError(f"stop must have at most 4 strings, got {len(self.stops())}.")
        return self

    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def settings(self, default_max_tokens: int) -> dict[str, Any]:
        """Arguments of `generate`; what a request does not say is as the model's generation_config has it."""
        found = self.generation_config.model_dump(exclude_none=True) if self.generation_config is not None else {}
        asked = self.max_completion_tokens or self.max_tokens or found.get("max_new_tokens")
        found["max_new_tokens"] = asked or default_max_tokens
        if self.temperature is not None or self.top_p is not None:
            found["do_sample"] = self.temperature is None or self.temperature >= 0.01  # below, sums overflow
        if found.get("do_sample"):
            given = {"temperature": self.temperature, "top_p": self.top_p}
            found |= {name: value for name, value in given.items() if value is not None}
        return found


class ChatRequest(GenerationRequest):
    """Body of `/v1/chat/completions`."""

    prefix = "chatcmpl"
    source = "messages"

    messages: Annotated[list[Message], Field(min_length=1)]

    def encode(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Ids of the conversation, and of what an answer begins with."""
        if tokenizer.chat_template is None:
            raise ProtocolError("The tokenizer has no chat template: use /v1/completions.", param="messages")
        messages = [message.as_dict() for message in self.messages]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(tokenizer.encode(str(text), add_special_tokens=False))

    def whole(self, text: str, reason: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
        return {"object": "chat.completion", "choices": [choice]}

    def part(self, text: str | None, reason: str | None = None) -> dict[str, Any]:
        delta = {} if text is None else {"role": "assistant", "content": text}
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return {"object": "chat.completion.chunk", "choices": [choice]}


class CompletionRequest(GenerationRequest):
    """Body of `/v1/completions`."""

    prefix = "cmpl"
    source = "prompt"

    prompt: Text | list[int]

    def encode(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Ids of the prompt, with what the tokenizer puts before a text."""
        return list(self.prompt if isinstance(self.prompt, list) else tokenizer.encode(self.prompt))

    def whole(self, text: str, reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}
        return {"object": "text_completion", "choices": [choice]}

    def part(self, text: str | None, reason: str | None = None) -> dict[str, Any]:
        return self.whole(text or "", reason)
