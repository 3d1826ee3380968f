"""What the body of a request may say: chat completions and completions, read as OpenAI's API has them.

Fields that do not change an answer are ignored. Fields that would change it and are not built are refused, never
ignored: tools, several choices, biases, formats. Nothing here knows a model.
"""

import json
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from kvfold.data import Message
from kvfold.serve.refusal import Refusal

_NOT_BUILT = (
    *("tools", "functions", "logit_bias", "suffix", "audio", "prediction", "web_search_options", "modalities"),
    *("frequency_penalty", "presence_penalty", "best_of", "echo"),
)
_HARMLESS: dict[str, Any] = {"best_of": 1, "modalities": ["text"]}  # that change nothing, beside what is empty or 0
_Body = TypeVar("_Body", bound="CompletionBody | ChatBody")


class Part(BaseModel):
    """One part of a message's content."""

    type: Literal["text"]
    text: str


class Said(BaseModel):
    """One message."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None

    @field_validator("content", mode="before")
    @classmethod
    def text_alone(cls, content: Any) -> Any:
        """Parts of other kinds, such as images, are refused in words of our own."""
        parts = content if isinstance(content, list) else []
        kinds = [part.get("type", "text") for part in parts if isinstance(part, dict)]
        other = next((kind for kind in kinds if kind != "text"), None)
        if other is not None:
            raise ValueError(f"a part of type {str(other)!r:.40} was given; only text is read; give parts of text")
        return content

    def message(self) -> Message:
        """Give the message as chat templates take it."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return Message(role="system" if self.role == "developer" else self.role, content=text)


class StreamOptions(BaseModel):
    """How a stream ends."""

    include_usage: bool | None = False


class OurOptions(BaseModel):
    """A field of our own."""

    kept: bool = False  # whether the answer says what is kept of the text


class _Shared(BaseModel):
    """What both kinds of request may say."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: str
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: str | list[str] | None = None
    n: Annotated[int, Field(strict=True, ge=1, le=1)] | None = 1

    @field_validator("stop")
    @classmethod
    def few_stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        """Four at most, as OpenAI has it, and none empty."""
        listed = [stop] if isinstance(stop, str) else stop or []
        if len(listed) > 4 or not all(listed):
            raise ValueError("give at most 4 stop strings, none of them empty")
        return stop

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        """Whether a stream shall end with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatBody(_Shared):
    """The body of a chat completion."""

    messages: Annotated[list[Said], Field(min_length=1, max_length=10_000)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    metadata: dict[str, str] | None = None
    kvfold: OurOptions | None = None

    @property
    def longest(self) -> int | None:
        """The longest reply that is wanted."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def chances(self) -> int | None:
        """How many likeliest tokens are listed for each token; None: no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(_Shared):
    """The body of a completion."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @property
    def text(self) -> str:
        """The prompt."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]

    @property
    def longest(self) -> int | None:
        """The longest reply that is wanted."""
        return self.max_tokens

    @property
    def chances(self) -> int | None:
        """How many likeliest tokens are listed for each token; None: no log-probabilities at all."""
        return self.logprobs


def read(raw: bytes, kind: type[_Body]) -> _Body:
    """Read a body. Raises Refusal for what is no JSON, lacks a field, or asks for what is not built."""
    try:
        plain = json.loads(raw)
        json.dumps(plain, ensure_ascii=False).encode()  # half a character would fail in the tokenizer
    except (ValueError, RecursionError):
        raise Refusal(400, "the body could not be read; it is no JSON in UTF-8; send a JSON object") from None
    try:
        body = kind.model_validate(plain)
    except ValidationError as error:
        _refuse_invalid(error)
    extra = body.model_extra or {}
    for name in _NOT_BUILT:
        if _changes_answer(name, extra.get(name)):
            truth = "this server answers with text alone, and samples by temperature and top_p"
            raise Refusal(400, f"{name} was asked for; {truth}; leave it away", code="unsupported", param=name)
    form = extra.get("response_format") or {"type": "text"}
    if form != {"type": "text"}:
        raise Refusal(400, "response_format was given; replies are plain text; leave it away", param="response_format")
    return body


def _changes_answer(name: str, value: Any) -> bool:
    """Tell whether a field that is not built asks for something. True is no 1 here, though Python holds them equal."""
    harmless = _HARMLESS.get(name)
    return bool(value) and (type(value) is not type(harmless) or value != harmless)


def _refuse_invalid(error: ValidationError) -> NoReturn:
    """Refuse by the first thing that is wrong."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(step) for step in first["loc"] if not str(step).startswith(("list[", "constrained")))
    said = first["msg"].removeprefix("Value error, ")
    raise Refusal(400, f"{where or 'the body'}: {said}", code="invalid_value", param=where or None)
