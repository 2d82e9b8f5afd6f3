"""What a request may say, and how it is refused: the chat completions of OpenAI's API.

Clients name many things that they do not ask for: fields that are null, empty or false, and defaults written out. These pass. What
asks for something that is not here is refused in words, so that nobody takes an answer for more than it is.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

LABELS = (  # they say who asks, or help a provider's own caches: of no effect on an answer
    "user",
    "metadata",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prompt_cache_options",
)
DEFAULTS: dict[str, list[Any]] = {  # values of other fields that ask for what a chat completion is anyway
    "n": [1],
    "response_format": [{"type": "text"}],
    "modalities": [["text"]],
    "tool_choice": ["none", "auto"],
    "function_call": ["none", "auto"],
    "parallel_tool_calls": [True],
    "service_tier": ["auto", "default"],
    "reasoning_effort": ["none"],
    "verbosity": ["medium"],
}
NOTHING: list[Any] = [None, False, 0, "", [], {}]


class RequestError(Exception):
    """What the client is told instead of an answer."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, Any]:
        kind = "rate_limit_error" if self.status == 429 else "server_error" if self.status >= 500 else None
        error = {"message": str(self), "type": kind or "invalid_request_error", "param": self.param, "code": self.code}
        return {"error": error}


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def leave_out(cls, fields: Any) -> Any:
        """Without what asks for nothing."""
        if not isinstance(fields, dict):
            return fields
        return {
            name: value
            for name, value in fields.items()
            if value is not None
            and name not in LABELS
            and (name in cls.model_fields or value not in NOTHING + DEFAULTS.get(name, []))
        }


class Part(Strict):
    type: Literal["text"]
    text: str


def as_parts(content: Any) -> Any:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise ValueError("should be a string, or a list of parts of type text")
    return content


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], BeforeValidator(as_parts)]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates know it; to them "developer" is the newer name of "system"."""
        role = "system" if self.role == "developer" else self.role
        message = {"role": role, "content": "".join(part.text for part in self.content)}
        return message if self.name is None else message | {"name": self.name}


class StreamOptions(Strict):
    include_usage: bool = False
    continuous_usage_stats: bool = False  # usage in each chunk, and while the prompt is read


MAX_STOP_STRING = 1000  # characters


def is_no_longer(stop: str) -> str:
    if not 0 < len(stop) <= MAX_STOP_STRING:
        raise ValueError(f"has {len(stop):,} characters; a stop string has 1 to {MAX_STOP_STRING:,}")
    return stop


StopString = Annotated[str, AfterValidator(is_no_longer)]
StopStrings = Annotated[
    list[StopString], Field(max_length=4), BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop)
]


class ChatRequest(Strict):
    messages: list[Message] = Field(min_length=1)
    model: str | None = None
    session_id: str | None = Field(None, pattern="^(new|[0-9a-f]{32})$")
    fork: bool = False
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: StopStrings = []


def read_request(body: bytes) -> ChatRequest:
    """The request of a JSON body; raises RequestError with what is wrong first."""
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as errors:
        error = errors.errors(include_url=False)[0]
        where = ".".join(str(part) for part in error["loc"]) or None
        message = f"{where or 'the body'}: {error['msg'].removeprefix('Value error, ')}"
        if error["type"] == "extra_forbidden":
            message = f"{where} asks for what this server does not have; leave it out"
        raise RequestError(400, message, where) from errors
